"""Memory and step time of adapters and quantised weights, relative to full fine-tuning of the language model.

    python benchmarks/adapting.py > benchmarks/adapting.md               # both small models; about fifteen minutes
    python benchmarks/adapting.py models=embedded rounds=5               # about three minutes
    python benchmarks/adapting.py models=qwen2_1_5b rows=4               # for a GPU with 40 GB
    python benchmarks/adapting.py models=qwen2_1_5b rows=4 estimate=true # what it will hold there; seconds, any machine

Every arm runs in its own process: the model with random weights, real batches of the embedded instructions, full
optimiser steps (forward, backward, clipping, AdamW). All arms train resampler and projector, none the encoder. Memory
is counted tensor by tensor: weights including quantisation scales, gradients, optimiser state, and what autograd saves
in one forward pass. The peak is that of the process on a CPU, minus what it held before the model was built, and that
of the allocator on a GPU. Arms take turns; step time is the median over rounds of an arm's time divided by `full`'s,
in CPU time on a CPU and in wall time on a GPU.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the process that starts the arms does not import these
    from omegaconf import DictConfig
    from torch.optim import Optimizer

    from fastvlm.batch import Batch
    from fastvlm.hardware import Hardware
    from fastvlm.models.vlm import VLM
    from fastvlm.stages.stage import Stage

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

QWEN2 = ["llm=qwen2_micro"]
MODELS = {
    "embedded": [],  # that of the embedded run
    "qwen2_140m": [
        *QWEN2,
        "llm.hidden_size=1024",
        "llm.intermediate_size=2816",
        "llm.num_hidden_layers=12",
        "llm.num_attention_heads=16",
        "llm.num_key_value_heads=4",
    ],
    "qwen2_1_5b": [  # Qwen2.5-1.5B's shape
        *QWEN2,
        "llm.hidden_size=1536",
        "llm.intermediate_size=8960",
        "llm.num_hidden_layers=28",
        "llm.num_attention_heads=12",
        "llm.num_key_value_heads=2",
    ],
}
VOCABULARY = {"qwen2_1_5b": 151_936}  # other models have the embedded tokenizer's vocabulary
ADAPTERS = "method: lora, lr: 1e-4, r: 8, alpha: 16"
ARMS = {
    "full": "{method: full, lr: 1e-4}",
    "lora": f"{{{ADAPTERS}}}",
    "int8": f"{{{ADAPTERS}, quantise: int8}}",
    "nf4": f"{{{ADAPTERS}, quantise: nf4}}",
    "torchao_int8": f"{{{ADAPTERS}, quantise: torchao_int8}}",
    "torchao_int4": f"{{{ADAPTERS}, quantise: torchao_int4}}",
}
WORDS = {"full": "full fine-tuning", "lora": "LoRA", "int8": "8-bit (int8) + LoRA", "nf4": "4-bit (nf4) + LoRA"}
MIB = 2**20


def storages(tensors) -> int:
    """Return the bytes of all storages behind the tensors, counting each storage once."""
    found = {}
    for tensor in tensors:
        names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
        for one in [getattr(tensor, name) for name in names] or [tensor]:
            found[one.untyped_storage()._cdata] = one.untyped_storage().nbytes()
    return sum(found.values())


def weights_of(model) -> list:
    """Return parameters, buffers and the quantisation state that bitsandbytes keeps for its weights."""
    import torch

    from fastvlm.models.quantised import quantised_layers

    held = [*model.parameters(), *model.buffers()]
    for _, layer in quantised_layers(model):
        states = [layer.state, getattr(layer.state, "state2", None)]
        held += [v for state in states if state is not None for v in vars(state).values() if torch.is_tensor(v)]
    return held


def kept_by_autograd(forward, model) -> tuple[object, int]:
    """Return a forward pass's output and the bytes it saves for the backward pass, excluding weights."""
    import torch

    own = {t.untyped_storage()._cdata for t in weights_of(model)}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward()
    return out, sum(storage.nbytes() for storage in kept.values())


def configuration(model: str, arm: str, *, rows: int, tokens: int, steps: int):
    from fastvlm.config import check, compose

    stage = "stages.instruct"
    overrides = ["pipeline=instruct", "~task", "logger=none", "num_samples=0", f"{stage}.lora=null", *MODELS[model]]
    overrides += [f"{stage}.batch_size={rows}", f"{stage}.max_tokens={tokens}", f"{stage}.steps={steps + 2}"]
    overrides += [f"{stage}.val_samples=0", f"{stage}.adapt.llm={ARMS[arm]}"]
    config = compose("train", overrides)
    check(config)
    return config


def estimates(model: str, arms: list[str], **sizes: int) -> str:
    """Return a Markdown table of each arm's estimated memory in bf16, computed from shapes only."""
    from omegaconf import OmegaConf

    from fastvlm.hardware import Hardware
    from fastvlm.pipeline.memory_notes import stage_memory
    from fastvlm.study.dry_run import build_without_weights

    hardware = Hardware(accelerator="cpu", precision="bf16-mixed")
    columns = ("weights", "gradients", "optimiser", "activations", "logits", "total")
    lines = []
    for arm in arms:
        config = configuration(model, arm, **sizes)
        OmegaConf.update(config, "llm.vocab_size", VOCABULARY.get(model, 2048), force_add=True)
        vlm = build_without_weights(config)
        need = stage_memory("instruct", config.stages.instruct, vlm, hardware)
        if not lines:
            number = sum(p.numel() for p in vlm.parameters()) / 1e6
            lines += [f"## {model}: {number:,.1f}M parameters, estimated", "", f"| arm | {' | '.join(columns)} |"]
            lines.append(f"| --- |{' ---: |' * len(columns)}")
        cells = " | ".join(f"{getattr(need, column) / MIB:,.1f}" for column in columns)
        lines.append(f"| {WORDS.get(arm, f'{arm} + LoRA')} | {cells} |")
    return "\n".join(lines) + "\n"


@dataclass
class Arm:
    """One arm, ready for its first training step."""

    hardware: Hardware
    options: DictConfig  # of the stage
    model: VLM
    batches: Iterator[Batch]
    module: Stage
    optimizer: Optimizer
    resident: int  # bytes the process held before the model was built
    estimate: int  # estimated bytes
    parameters: int  # count before adapters and quantisation


def build_arm(model: str, arm: str, *, rows: int, tokens: int, steps: int) -> Arm:
    from omegaconf import OmegaConf

    from fastvlm.build import build_model, build_tokenizer, instantiate
    from fastvlm.pipeline import Pipeline
    from fastvlm.pipeline.learned import build_freezing
    from fastvlm.pipeline.memory_notes import stage_memory
    from fastvlm.pipeline.stage_data import build_data

    config = configuration(model, arm, rows=rows, tokens=tokens, steps=steps)
    pipeline = Pipeline(config)
    hardware, options = pipeline.hardware, config.stages.instruct
    hardware.apply()
    tokenizer = build_tokenizer(config)
    before = resident()
    vlm = build_model(config, tokenizer)
    if model in VOCABULARY:
        vlm.llm.hf.resize_token_embeddings(VOCABULARY[model], mean_resizing=False)
    estimate = stage_memory("instruct", options, vlm, hardware).total
    parameters = sum(p.numel() for p in vlm.parameters())
    known = {"hardware": hardware, "options": config.data, "seed": config.seed, "plan_cache": pipeline.runs / "plans"}
    data = build_data("instruct", options, vlm, tokenizer, **known)
    data.setup("fit")
    vlm.to(hardware.device)
    optimizer = instantiate(options.optimizer, key="optimizer")
    own = {"model": vlm, "name": "instruct", "num_steps": steps, "optimizer": optimizer}
    module = instantiate(options.objective, key="objective", **own)
    plain = OmegaConf.to_container(options, resolve=True)
    build_freezing("instruct", plain, quantise=hardware.quantise, path=Path("unused")).apply(module)
    optimizer = module.configure_optimizers()["optimizer"]
    batches = iter(data.train_dataloader())
    return Arm(hardware, options, vlm, batches, module, optimizer, before, estimate, parameters)


def take_steps(arm: Arm, steps: int) -> tuple[dict[str, int], list[tuple[float, float]]]:
    """Take two warm-up steps and `steps` timed ones.

    Returns:
        Bytes of activations and gradients, measured in the first step; (wall, CPU) seconds of each timed step.
    """
    import torch

    hardware, device = arm.hardware, arm.hardware.device
    learned = [p for p in arm.module.parameters() if p.requires_grad]
    precision = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(hardware.precision)
    found: dict[str, int] = {}
    times: list[tuple[float, float]] = []

    def forward(batch):
        with torch.autocast(device, precision or torch.bfloat16, enabled=precision is not None):
            return arm.module.training_step(batch)["loss"]

    for step in range(steps + 2):
        batch = next(arm.batches).to(device)
        if step == 1:
            gc.collect()
            if sys.platform == "linux":
                ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory from building the model must not count
            hardware.forget_peak()
        begun = time.perf_counter(), time.process_time()
        if step == 0:
            loss, found["activations"] = kept_by_autograd(lambda b=batch: forward(b), arm.model)
        else:
            loss = forward(batch)
        loss.backward()
        if step == 0:
            found["gradients"] = storages(p.grad for p in learned)
        del loss
        torch.nn.utils.clip_grad_norm_(learned, arm.options.clip)
        arm.optimizer.step()
        arm.optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        if step >= 2:
            times.append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
    return found, times


def measure(model: str, arm: str, *, rows: int, tokens: int, steps: int) -> dict:
    """Measure one arm in this process."""
    import torch

    built = build_arm(model, arm, rows=rows, tokens=tokens, steps=steps)
    hardware, on_gpu = built.hardware, built.hardware.device == "cuda"
    found, times = take_steps(built, steps)
    state = [v for one in built.optimizer.state.values() for v in one.values() if torch.is_tensor(v)]
    return found | {
        "weights": storages(weights_of(built.model)),
        "optimiser": storages(state),
        "peak": hardware.peak_gib() * 2**30 - (0 if on_gpu else built.resident),
        "estimate": built.estimate,
        "learned": sum(p.numel() for p in built.module.parameters() if p.requires_grad),
        "parameters": built.parameters,
        "seconds": statistics.median(one[0 if on_gpu else 1] for one in times),
        "precision": hardware.precision,
        "machine": torch.cuda.get_device_name() if on_gpu else f"{processor()}, {hardware.threads} threads",
    }


def resident() -> int:
    import psutil

    gc.collect()
    return psutil.Process().memory_info().rss


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def table(model: str, found: dict[str, list[dict]]) -> str:
    """Return a Markdown table of one model's arms; memory in MiB."""
    first = found["full"][0]
    lines = [
        f"## {model}: {first['parameters'] / 1e6:.1f}M parameters",
        "",
        f"{first['machine']}, {first['precision']}.",
        "",
        "| arm | learns | weights | gradients | optimiser | activations | peak | of full's | estimate | step time |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for arm, rounds in found.items():
        one = {key: statistics.median(r[key] for r in rounds) for key in ("peak", "seconds")}
        full = statistics.median(r["peak"] for r in found["full"])
        pace = statistics.median(r["seconds"] / f["seconds"] for r, f in zip(rounds, found["full"], strict=True))
        parts = [rounds[0][key] / MIB for key in ("weights", "gradients", "optimiser", "activations")]
        sizes = " | ".join(f"{part:,.1f}" for part in parts)
        lines.append(
            f"| {WORDS.get(arm, f'{arm} + LoRA')} | {rounds[0]['learned'] / rounds[0]['parameters']:.1%} | {sizes} | "
            f"{one['peak'] / MIB:,.1f} | {one['peak'] / full:.2f} | {rounds[0]['estimate'] / MIB:,.1f} | {pace:.2f}x |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    options = {"models": "embedded,qwen2_140m", "arms": "full,lora,int8,nf4", "rounds": "3", "steps": "4"}
    options |= {"rows": "2", "tokens": "256", "arm": "", "estimate": "false"}
    for argument in sys.argv[1:]:
        key, _, value = argument.partition("=")
        if key not in options:
            sys.exit(f"error: unknown key {key}; there are {', '.join(options)}")
        options[key] = value
    models, arms = options["models"].split(","), options["arms"].split(",")
    for kind, names, known in (("models", models, MODELS), ("arms", arms, ARMS)):
        if unknown := [name for name in names if name not in known]:
            sys.exit(f"error: {kind}={unknown[0]} is not one of {', '.join(known)}")
    numbers = {key: int(options[key]) for key in ("rows", "tokens", "steps")}
    if options["arm"]:
        print(json.dumps(measure(models[0], options["arm"], **numbers)))
        return
    arms = ["full", *(arm for arm in arms if arm != "full")]
    command = " ".join(["python benchmarks/adapting.py", *sys.argv[1:]])
    print(f"# Adapting\n\nBy `{command}`. MiB; {__doc__.split(chr(10) * 2)[2].replace(chr(10), ' ')}\n")
    if options["estimate"] == "true":
        print("\n".join(estimates(model, arms, **numbers) for model in models), flush=True)
        return
    for model in models:
        found: dict[str, list[dict]] = {arm: [] for arm in arms}
        for number in range(int(options["rounds"])):
            for arm in arms if number % 2 == 0 else reversed(arms):
                same = [f"{key}={value}" for key, value in numbers.items()]
                child = [sys.executable, __file__, f"models={model}", f"arm={arm}", *same]
                done = subprocess.run(child, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"error: {model} {arm}: {done.stderr.strip().splitlines()[-1]}")
                found[arm].append(json.loads(done.stdout.splitlines()[-1]))
                line = f"{model} {arm}, round {number + 1}: {found[arm][-1]['seconds']:.2f} s a step"
                print(f"{line}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
        print(table(model, found), flush=True)


if __name__ == "__main__":
    main()
