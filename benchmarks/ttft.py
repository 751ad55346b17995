"""Time to first token of FastVLM-0.5B and of what it is compared with, in parts.

    python benchmarks/ttft.py                                    # every row, a process each: about half an hour
    python benchmarks/ttft.py only=fastvlm-1024,llava-onevision  # in one process, about ten minutes on one core
    python benchmarks/ttft.py plot=true                          # table and plot of what was measured, paper's beside

The models are stock classes with random weights, which time does not depend on: timm's fastvit_mci3 (FastViTHD) and
transformers' SigLIP, CLIP and Qwen2-0.5B. `eager` is float32 as `generate` runs it, with logits of the last position
only; `levers` pulls levers=... and decodes by the engine. A prompt is an image and 32 further tokens. Seconds are those
of one thread's CPU time (threads=1), or of the wall clock (threads=all, device=cuda). Each row measures a fixed matrix
product before and after: rows taken while the machine was busier show it there. The error of the levers is that of the
visual tokens, and that of the logits after the prompt, against float32 with the same weights.
"""

from __future__ import annotations

import io
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

RESULTS = Path(__file__).parent / "results"
TEXT = 32  # positions of the prompt that are no image
DEFAULTS = {
    "only": "",
    "modes": "eager,levers",
    "levers": "fast,compile",
    "threads": "1",
    "device": "cpu",
    "repeats": "3",
    "flops": "true",
    "plot": "false",
    "out": str(RESULTS / "ttft.json"),
}


@dataclass(frozen=True)
class Subject:
    """One row: what encodes the image, at which size, in how many views, to how many tokens."""

    name: str
    encoder: str
    image_size: int
    tiles: tuple[tuple[int, int], ...] | None = None
    resampler: str = "identity"

    @property
    def idle_levers(self) -> set[str]:
        """Levers this encoder has no use for."""
        return set() if self.encoder == "fastvithd" else {"reparameterize", "channels_last"}


SUBJECTS = {
    s.name: s
    for s in (
        *(Subject(f"fastvlm-{px}", "fastvithd", px) for px in (256, 512, 768, 1024)),
        Subject("clip-l-336", "clip", 336),
        Subject("perceiver-64", "clip", 336, resampler="perceiver"),
        Subject("siglip-so400m", "siglip", 384),
        Subject("llava-onevision", "siglip", 384, tiles=((3, 3),)),
    )
}
# FastVLM, table 10: Qwen2-0.5B on an M1 Max, encoder on the Neural Engine, language model on the GPU; milliseconds.
PAPER = {"fastvlm-1024": (116.3, 50.5), "llava-onevision": (2721.4, 11402.4)}


def build(subject: Subject):
    """The whole model with random weights."""
    import torch
    from torch import nn
    from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

    from fastvlm.models.encoders.timm_encoder import TimmEncoder
    from fastvlm.models.llms.language_model import from_config
    from fastvlm.models.projectors.mlp import MLPProjector
    from fastvlm.models.resamplers.identity import IdentityResampler
    from fastvlm.models.resamplers.perceiver import PerceiverResampler
    from fastvlm.models.vlm import VLM

    class Stock(nn.Module):
        """A vision transformer of transformers as an encoder; LLaVA takes its last layer but one."""

        def __init__(self, model, *, prefix: int):
            super().__init__()
            self.model, self.prefix, config = model, prefix, model.config
            self.out_dim, self.patch = config.hidden_size, config.patch_size
            self.mean, self.std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

        def num_patches(self, image_size: int) -> int:
            return (image_size // self.patch) ** 2

        def forward(self, images):
            return self.model(images).last_hidden_state[:, self.prefix :]

    torch.manual_seed(0)
    if subject.encoder == "fastvithd":
        encoder = TimmEncoder("fastvit_mci3", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    elif subject.encoder == "clip":
        sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
        config = CLIPVisionConfig(num_hidden_layers=23, image_size=336, patch_size=14, **sizes)
        encoder = Stock(CLIPVisionModel(config), prefix=1)
    else:
        sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16}
        config = SiglipVisionConfig(num_hidden_layers=26, image_size=384, patch_size=14, vision_use_head=False, **sizes)
        encoder = Stock(SiglipVisionModel(config), prefix=0)
    resampler = (
        IdentityResampler(in_dim=encoder.out_dim)
        if subject.resampler == "identity"
        else PerceiverResampler(in_dim=encoder.out_dim, num_tokens=64)
    )
    llm = from_config(
        "qwen2",
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
    )
    projector = MLPProjector(in_dim=resampler.out_dim, out_dim=llm.dim)
    return VLM(encoder, resampler, projector, llm, image_token_id=0).eval().requires_grad_(False)


def photograph() -> bytes:
    """A JPEG of 1,600 x 1,200 pixels, as a camera's: smooth, with some grain."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((1600, 1200), Image.BICUBIC)
    grain = rng.normal(0, 6, (1200, 1600, 1))
    file = io.BytesIO()
    Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(file, "jpeg", quality=90)
    return file.getvalue()


def unit_seconds(clock) -> float:
    """A fixed matrix product: what the machine gives at the moment."""
    import torch

    a = torch.ones(768, 768)
    return min(clock.time(lambda: [a @ a for _ in range(8)], repeats=3)[0])


def measure(subject: Subject, model, *, mode: str, clock, repeats: int, pulled: tuple[str, ...]) -> tuple[dict, dict]:
    """Seconds (median) of each part with what they took besides, and what came out."""
    import torch

    from fastvlm.data.transforms import ImageTransform
    from fastvlm.inference.clock import peak_bytes
    from fastvlm.inference.fast_decoder import FastDecoder
    from fastvlm.inference.kv_cache import KVCache
    from fastvlm.inference.levers import count_bytes

    device, before = clock.device, unit_seconds(clock)
    transform, file = ImageTransform(image_size=subject.image_size, tiles=subject.tiles), photograph()
    llm, hf = model.llm, model.llm.hf
    fast = FastDecoder(llm) if mode == "levers" else None
    text = torch.arange(1, TEXT + 1, device=device)[None]

    def prefill(visual):
        embeds = torch.cat([visual.to(llm.embed(text).dtype).flatten(0, 1)[None], llm.embed(text)], dim=1)
        positions = torch.arange(embeds.shape[1], device=device)[None]
        if fast is None:
            out = hf(inputs_embeds=embeds, position_ids=positions, use_cache=True, logits_to_keep=1)
            return out.logits[:, -1].float(), out.past_key_values, embeds.shape[1]
        hidden, cache = fast.decode(embeds, positions, None, KVCache())
        return llm.head(hidden[:, -1]).float(), cache, embeds.shape[1]

    def decode(token, cache, length):
        positions = torch.tensor([[length]], device=device)
        if fast is None:
            out = hf(input_ids=token[:, None], position_ids=positions, past_key_values=cache, use_cache=True)
            return out.logits[:, -1].argmax(-1)
        return llm.head(fast.decode(llm.embed(token[:, None]), positions, None, cache)[0][:, -1]).argmax(-1)

    with torch.inference_mode():
        parts = {}
        many = repeats if subject.tiles is None else max(1, repeats // 3)
        parts["preprocessing"], views = clock.time(lambda: transform(file), repeats=max(3, repeats))
        # Of a minute, the first second may be cold; but a compiler is no part of it.
        warm = 0 if subject.tiles and "compile" not in pulled else 1
        encode = lambda: model.encode_patches(views.to(device))
        parts["encoding"], patches = clock.time(encode, repeats=many, warm=warm)
        parts["projection"], visual = clock.time(lambda: model.project(patches), repeats=repeats)
        parts["prefill"], (logits, cache, length) = clock.time(lambda: prefill(visual), repeats=many, warm=warm)
        steps, token = iter(range(10**9)), logits.argmax(-1)
        parts["first decode"], _ = clock.time(lambda: decode(token, cache, length + next(steps)), repeats=5)
        after = unit_seconds(clock)
    seconds = {name: statistics.median(times) for name, times in parts.items()}
    outputs = {"visual tokens": visual.float(), "logits": logits}
    row = {
        "row": subject.name,
        "mode": mode,
        "tokens": visual.shape[0] * visual.shape[1],
        "positions": length,
        "seconds": seconds,
        "spread": {name: [min(times), max(times)] for name, times in parts.items()},
        "ttft": sum(seconds[name] for name in ("preprocessing", "encoding", "projection", "prefill")),
        "weight_bytes": count_bytes(model),
        "peak_bytes": peak_bytes(device),
        "unit_seconds": [before, after],
        "load": os.getloadavg()[0],
        "time": clock.kind,
    }
    return row, outputs


def count_operations(subject: Subject) -> dict[str, int]:
    """Of the parts of one request, on tensors without data."""
    import torch

    from fastvlm.inference.clock import count_flops

    with torch.device("meta"), torch.inference_mode():
        model = build(subject)
        tiles = 1 + math.prod(subject.tiles[0]) if subject.tiles else 1
        pixels = torch.empty(tiles, 3, subject.image_size, subject.image_size, dtype=torch.uint8)
        patches = model.encode_patches(pixels)
        visual = model.project(patches)
        embeds = torch.empty(1, visual.shape[0] * visual.shape[1] + TEXT, model.llm.dim)
        prefill = {"inputs_embeds": embeds, "position_ids": torch.arange(embeds.shape[1])[None], "logits_to_keep": 1}
        return {
            "encoding": count_flops(lambda: model.encode_patches(pixels)),
            "projection": count_flops(lambda: model.project(patches)),
            "prefill": count_flops(lambda: model.llm.hf(**prefill)),
        }


def relative_errors(outputs: dict, exact: dict | None) -> dict[str, float]:
    """Norm of the difference over the norm of what float32 gives, for the same random weights."""
    if exact is None:
        return {}
    return {key: float((value - exact[key]).norm() / exact[key].norm()) for key, value in outputs.items()}


def run(options: dict[str, str], names: list[str]) -> list[dict]:
    """Measure rows in this process, one after the other."""
    import torch

    from fastvlm.inference.clock import Clock
    from fastvlm.inference.levers import apply_levers, parse_levers

    threads = os.cpu_count() if options["threads"] == "all" else int(options["threads"])
    torch.set_num_threads(threads)
    device = options["device"]
    clock = Clock(device, kind="cpu" if threads == 1 and device == "cpu" else "wall")
    measured = []
    for name in names:
        subject, model, exact = SUBJECTS[name], None, None
        operations = count_operations(subject) if options["flops"] == "true" else {}
        for mode in options["modes"].split(","):
            model = None  # the last mode's weights go before the next come
            model = build(subject).to(device)
            pulled = ()
            if mode == "levers":
                wanted = parse_levers(options["levers"], device=device)
                pulled = apply_levers(model, [name for name in wanted if name not in subject.idle_levers])
            repeats = int(options["repeats"])
            row, outputs = measure(subject, model, mode=mode, clock=clock, repeats=repeats, pulled=pulled)
            row["flops"] = operations
            exact = outputs if mode == "eager" else exact
            row["error"] = relative_errors(outputs, exact) if mode == "levers" else {}
            row |= {"levers": list(pulled), "threads": threads, "device": device, "machine": machine(device)}
            measured.append(row)
            save(row, Path(options["out"]))
            parts = "  ".join(f"{part} {1000 * s:.1f}" for part, s in row["seconds"].items())
            print(f"{name} {mode}: {row['tokens']} tokens, TTFT {1000 * row['ttft']:.0f} ms  ({parts})", flush=True)
    return measured


def machine(device: str) -> str:
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return models[0].split(":")[1].strip() if models else platform.processor()


def save(row: dict, path: Path) -> None:
    """Into the results, in place of an earlier measurement of the same."""
    key = lambda r: (r["row"], r["mode"], r["threads"], r["device"])
    rows = [r for r in load(path) if key(r) != key(row)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*rows, row], indent=1) + "\n")


def load(path: Path) -> list[dict]:
    return json.loads(path.read_text()) if path.exists() else []


RATIOS = (
    ("FastVLM 1024: eager / levers", ("fastvlm-1024", "eager"), ("fastvlm-1024", "levers")),
    ("LLaVA-OneVision eager / FastVLM 1024 eager", ("llava-onevision", "eager"), ("fastvlm-1024", "eager")),
    ("LLaVA-OneVision levers / FastVLM 1024 levers", ("llava-onevision", "levers"), ("fastvlm-1024", "levers")),
    ("LLaVA-OneVision eager / FastVLM 1024 levers", ("llava-onevision", "eager"), ("fastvlm-1024", "levers")),
    ("CLIP ViT-L/14-336 levers / FastVLM 512 levers", ("clip-l-336", "levers"), ("fastvlm-512", "levers")),
    ("CLIP ViT-L/14-336 eager / FastVLM 512 eager", ("clip-l-336", "eager"), ("fastvlm-512", "eager")),
)


def tabulate(rows: list[dict]) -> str:
    """Milliseconds of every part, then the ratios, the paper's figures beside ours."""
    lines = []
    for setting in dict.fromkeys((r["device"], r["threads"], r["time"]) for r in rows):
        chosen = [r for r in rows if (r["device"], r["threads"], r["time"]) == setting]
        lines += [f"{setting[0]}, threads={setting[1]}, {setting[2]} milliseconds on {chosen[0]['machine']}", ""]
        lines += [
            "| row | mode | tokens | pre | encode | project | prefill | TTFT | decode | weights GB | GFLOP | unit |"
        ]
        lines += ["|" + "---|" * 12]
        for r in sorted(chosen, key=lambda r: (list(SUBJECTS).index(r["row"]), r["mode"])):
            s = {k: f"{1000 * v:.1f}" for k, v in r["seconds"].items()}
            flops = f"{sum(r['flops'].values()) / 1e9:.0f}" if r["flops"] else ""
            cells = [r["row"], r["mode"], r["tokens"], s["preprocessing"], s["encoding"], s["projection"], s["prefill"]]
            cells += [f"{1000 * r['ttft']:.0f}", s["first decode"], f"{r['weight_bytes'] / 1e9:.2f}", flops]
            cells += [", ".join(f"{value:.3f}" for value in r.get("error", {}).values())]
            cells += ["-".join(f"{1000 * u:.0f}" for u in r["unit_seconds"])]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        ttft = {(r["row"], r["mode"]): r["ttft"] for r in chosen}
        lines += ["", "| ratio | here | paper |", "|---|---|---|"]
        paper = sum(PAPER["llava-onevision"]) / sum(PAPER["fastvlm-1024"])
        for label, above, below in RATIOS:
            if above in ttft and below in ttft:
                said = f"{paper:.0f} (M1 Max)" if above[0] == "llava-onevision" else ""
                lines.append(f"| {label} | {ttft[above] / ttft[below]:.2f} | {said} |")
        lines.append("")
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """Stacked parts of every row, on a logarithmic second axis for the sum."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = sorted(rows, key=lambda r: (r["mode"], list(SUBJECTS).index(r["row"])))
    parts = ("preprocessing", "encoding", "projection", "prefill")
    figure, axis = plt.subplots(figsize=(9, 0.42 * len(rows) + 1.6), layout="constrained")
    labels = [f"{r['row']}, {r['mode']}" + (f", {r['threads']} threads" if r["threads"] > 1 else "") for r in rows]
    left = [0.0] * len(rows)
    for part in parts:
        widths = [r["seconds"][part] for r in rows]
        axis.barh(labels, widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths)]
    for i, total in enumerate(left):
        axis.text(total, i, f" {total:.2f} s", va="center", fontsize=8)
    for name, (encode, prefill) in PAPER.items():
        here = [i for i, r in enumerate(rows) if r["row"] == name]
        axis.plot([(encode + prefill) / 1000] * len(here), here, "k|", markersize=14)
    axis.plot([], [], "k|", label="paper (M1 Max)")
    axis.set(xlabel="seconds to first token", xscale="symlog")
    axis.invert_yaxis()
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def parse(arguments: list[str]) -> dict[str, str]:
    options = dict(DEFAULTS)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in options or not equals:
            raise ValueError(f"{argument}: not one of {', '.join(f'{k}=' for k in options)}")
        options[key] = value
    names = [n for n in options["only"].split(",") if n]
    if unknown := [n for n in names if n not in SUBJECTS]:
        raise ValueError(f"only={unknown[0]}: not one of {', '.join(SUBJECTS)}")
    if bad := set(options["modes"].split(",")) - {"eager", "levers"}:
        raise ValueError(f"modes={bad.pop()}: not one of eager, levers")
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    out, names = Path(options["out"]), [n for n in options["only"].split(",") if n]
    if options["plot"] != "true":
        if names:
            run(options, names)
        else:  # a process each, so that peak memory is the row's own
            for name in SUBJECTS:
                subprocess.run([sys.executable, __file__, *arguments, f"only={name}"], check=True)
    if not names:
        rows = load(out)
        print(tabulate(rows))
        draw(rows, out.with_suffix(".png"))
        print(f"plot: {out.with_suffix('.png')}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
