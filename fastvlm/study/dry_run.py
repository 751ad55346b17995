"""Check a configuration without data, weights or training (`dry_run=true`), on any machine.

Parts are built at full size on torch's meta device, which holds shapes but no values. Trainable patterns are matched,
mixtures are built, and each stage's sizes, operations and memory are printed.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from fastvlm.build import build_model, build_tokenizer, instantiate, settle_views
from fastvlm.callbacks.cost import count_forward
from fastvlm.config import check, compose, typed_overrides
from fastvlm.models.llms.published import PUBLISHED
from fastvlm.models.pretrained import PretrainedVLM, without_weights
from fastvlm.models.recompute import recompute_layers
from fastvlm.models.vlm import VLM
from fastvlm.pipeline.learned import count_learned
from fastvlm.pipeline.memory_notes import memory_notes, planned_hardware
from fastvlm.pipeline.stage_data import check_size
from fastvlm.study.arms import load_study


def dry_run(config: DictConfig) -> None:
    """Check one configuration, or all arms of a study at this scale if no arm is given; print their sizes.

    Raises:
        ValueError: the first thing that would not run.
    """
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning)  # these address a library's developers
    if config.study is None or config.arm is not None:
        describe(config)
        return
    study = load_study(config.study.name)
    typed = typed_overrides() or [f"experiment={study.name}"]
    for arm in study.arms.get(config.scale, {}):
        one = compose("train", [*typed, f"scale={config.scale}", f"arm={arm}"])
        check(one)
        describe(one, memory=False)


def describe(config: DictConfig, *, memory: bool = True) -> list[dict[str, float | int]]:
    """Print and return each stage's `learns` (parameters), `steps`, `tokens` (per view), `flops` (forward, per step).

    Args:
        memory: also print an estimate of the memory that each stage needs.
    """
    settle_views(config)
    model = build_without_weights(config)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.parts.items()}
    print(f"\n{config.get('arm') or config.name}: " + ", ".join(f"{n} {c / 1e6:,.1f}M" for n, c in counts.items()))
    stages = []
    for name, stage in config.stages.items():
        stages.append(describe_stage(name, stage, model))
    if memory:
        hardware, known = planned_hardware(config.hardware)
        if hardware.gradient_checkpointing:
            recompute_layers(model.parts)
        for line in memory_notes(config, model, hardware, known=known):
            print(f"  {line}")
    if config.task is not None:
        for group in ("sources", "held_out", "benchmarks"):
            for source, given in (config.task.get(group) or {}).items():
                instantiate(given, key=f"task.{group}.{source}")
    sys.stdout.flush()
    return stages


def describe_stage(name: str, stage: DictConfig, model: VLM) -> dict[str, float | int]:
    mixture = instantiate(stage.mixture, key=f"stages.{name}.mixture")
    learns = count_learned(name, stage, model)
    adapters = ["llm LoRA"] if stage.get("lora") else []
    for part, one in (stage.get("adapt") or {}).items():
        if one.method in ("lora", "dora"):
            adapters.append(f"{part} {one.method} r={one.r}" + (f" over {one.quantise}" if one.quantise else ""))
    reads = {"encoder", "llm"} <= set(stage.parts)
    slots = check_size(name, stage, model)
    tokens = slots if reads else 0
    step = 0.0
    if not isinstance(model, PretrainedVLM):  # its forward pass is its own, so its operations are not counted
        forward = count_forward(model, parts=list(stage.parts), image_size=stage.image_size, length=stage.max_tokens)
        row = forward.linear * stage.max_tokens + forward.square * stage.max_tokens**2
        step = stage.batch_size * (row + sum(forward.view.values()))  # one view per row, forward only
    steps = stage.steps
    length = f"{steps:,} steps" if steps else f"{stage.epochs:g} epochs (steps are known once the shards are here)"
    size = f"{stage.batch_size:,} rows of {stage.max_tokens:,}"
    view = f", {stage.image_size} px = {tokens} tokens" if reads else ""
    total = f"; {steps * stage.batch_size * stage.max_tokens / 1e9:,.3g}G positions at most" if steps else ""
    learnt = f"learns {learns / 1e6:,.1f}M" + (f" with {' and '.join(adapters)}" if adapters else "")
    print(f"  {name}: {length} x {size}{view}{total}; {learnt}")
    if step:
        print(f"    forward, one view a row: {step / 1e12:,.3g} TFLOP a step")
    for source_name, source in mixture.sources.items():
        share = f"{mixture.weights[source_name]:.0%} of {mixture.unit}" if mixture.weights else "as much as it holds"
        where = present(source.path)
        print(f"    {source_name} {share}: {where}")
    return {"learns": learns, "steps": steps or 0, "tokens": tokens, "flops": step}


def present(path) -> str:
    paths = [path] if isinstance(path, str | Path) else list(path)
    first = str(paths[0])
    if "://" in first or any(Path(p).exists() for p in paths):
        return first
    return f"{first} is not here yet; conf/source/ says how to make it"


def build_without_weights(config: DictConfig) -> VLM:
    """Build the VLM of a configuration on the meta device.

    Raises:
        ValueError: the language model is neither in PUBLISHED nor a local folder.
    """
    if config.vlm is not None:
        if config.vlm["_target_"].endswith("pretrained.from_pretrained"):
            return without_weights(**{k: v for k, v in config.vlm.items() if k != "_target_"})
        return build_model(config, build_tokenizer(config)).to("meta")
    with torch.device("meta"):
        encoder = instantiate(bare(config.encoder), key="encoder")
        resampler = instantiate(config.resampler, key="resampler", in_dim=encoder.out_dim)
        llm_config, vocab_size = bare_llm(config.llm, tokenizer=config.tokenizer)
        llm = instantiate(llm_config, key="llm", vocab_size=vocab_size)
        llm.to(getattr(torch, config.llm.get("dtype", "float32")))
        projector = instantiate(config.projector, key="projector", in_dim=resampler.out_dim, out_dim=llm.dim)
        model = VLM(encoder, resampler, projector, llm, image_token_id=0)
    return model.to("meta")


def bare(config: DictConfig) -> DictConfig:
    """Return a part's configuration without the keys that load weights, in nested constructor calls, too."""
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)

    def strip(node):
        if isinstance(node, list):
            return [strip(value) for value in node]
        if not isinstance(node, dict):
            return node
        target = str(node.get("_target_", ""))
        kept = {k: strip(v) for k, v in node.items() if k not in ("checkpoint", "pretrained")}
        if "open_clip" in target:
            kept["device"] = "meta"  # create_model moves the model to a device itself
        return kept

    return OmegaConf.create(strip(plain))


def bare_llm(config: DictConfig, *, tokenizer: DictConfig) -> tuple[DictConfig, int]:
    plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    if not plain["_target_"].endswith("from_pretrained"):
        return config, plain.get("vocab_size") or vocabulary(tokenizer)
    path = str(plain["path"])
    if path in PUBLISHED:
        architecture = dict(PUBLISHED[path])
    elif (Path(path) / "config.json").exists():
        from transformers import AutoConfig

        found = AutoConfig.from_pretrained(path)
        known = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        known += ("head_dim", "ffn_dim", "word_embed_proj_dim", "tie_word_embeddings", "max_position_embeddings")
        architecture = {k: getattr(found, k) for k in known if getattr(found, k, None) is not None}
        architecture |= {"model_type": found.model_type, "vocab_size": found.vocab_size}
    else:
        raise ValueError(
            f"llm.path={path}: its sizes are not known here; name a folder with config.json, or one of "
            f"{', '.join(PUBLISHED)}"
        )
    vocab_size = architecture.pop("vocab_size")
    own = {"gradient_checkpointing": plain.get("gradient_checkpointing", False)}
    return OmegaConf.create({"_target_": "fastvlm.models.llms.from_config", **architecture, **own}), vocab_size


def vocabulary(tokenizer: DictConfig) -> int:
    """Return the number of embedding rows for this tokenizer; 32,000 if it is not on this machine."""
    try:
        with torch.device("cpu"):
            return len(instantiate(tokenizer, key="tokenizer"))
    except (ValueError, OSError):
        return 32_000
