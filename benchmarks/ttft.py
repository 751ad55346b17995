"""Time to first token (TTFT) of FastVLM-0.5B and of the models it is compared with, by parts.

    python benchmarks/ttft.py                                    # every row not yet measured, one process each
    python benchmarks/ttft.py only=fastvlm-1024,llava-onevision  # measure these again
    python benchmarks/ttft.py modes=eager,none,reparameterize,reparameterize+channels_last,bf16,int8_dynamic,levers \\
        only=fastvlm-512 out=levers.json                         # levers one by one; `none`: the engine without levers
    python benchmarks/ttft.py report=true                        # tables, CSV and plot of the measured rows

The models are stock classes with random weights (`ttft_subjects.py`). Mode `eager` is float32 as in `generate`, with
logits of the last position only; `levers` applies levers=... and decodes with the engine; any other mode applies the
levers in its name. A prompt is an image and 32 more tokens. Seconds are one thread's CPU time (threads=1) or wall time
(threads=all, device=cuda). Each row times a fixed matrix product before and after, which shows whether the machine was
busy. The median over the repeats of each part is reported (repeats=...; at most two for encoding and prefill of a tiled
image). A sum's spread ranges from the sum of the fastest parts to that of the slowest; a ratio's divides the extremes.
Errors are those of the visual tokens and of the logits after the prompt, relative to float32 with the same weights (the
last `eager` run on this machine): norm of the difference over the norm.
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
import tempfile
import time
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

from ttft_report import draw, tabulate, write_csv  # noqa: E402
from ttft_subjects import SUBJECTS, Subject, build  # noqa: E402

RESULTS = Path(__file__).parent / "results"
TEXT = 32  # text positions of the prompt
DEFAULTS = {
    "only": "",
    "modes": "eager,levers",
    "levers": "fast,compile",
    "threads": "1",
    "device": "cpu",
    "repeats": "3",
    "flops": "true",
    "report": "false",
    "out": str(RESULTS / "ttft.json"),
}


def photograph() -> bytes:
    """Return a JPEG of 1,600 x 1,200 pixels like a camera's: smooth, with some grain."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((1600, 1200), Image.BICUBIC)
    grain = rng.normal(0, 6, (1200, 1600, 1))
    file = io.BytesIO()
    Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(file, "jpeg", quality=90)
    return file.getvalue()


def unit_seconds(clock) -> float:
    """Time a fixed matrix product, which shows the machine's current speed."""
    import torch

    a = torch.ones(768, 768)
    return min(clock.time(lambda: [a @ a for _ in range(8)], repeats=3)[0])


def measure(subject: Subject, model, *, mode: str, clock, repeats: int, pulled: tuple[str, ...]) -> tuple[dict, dict]:
    """Time each part of a request.

    Returns:
        The result row (median seconds, spread, memory, load, ...), and the outputs (visual tokens, logits).
    """
    import torch

    from fastvlm.data.transforms import ImageTransform
    from fastvlm.inference.clock import peak_bytes
    from fastvlm.inference.fast_decoder import FastDecoder
    from fastvlm.inference.kv_cache import KVCache
    from fastvlm.inference.levers import count_bytes

    device, before = clock.device, unit_seconds(clock)
    transform, file = ImageTransform(image_size=subject.image_size, tiles=subject.tiles), photograph()
    llm, hf = model.llm, model.llm.hf
    fast = None if mode == "eager" else FastDecoder(llm)
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
        many = repeats if subject.tiles is None else min(2, repeats)
        parts["preprocessing"], views = clock.time(lambda: transform(file), repeats=max(3, repeats))
        # Tiled images take about a minute, so warm-up does not matter, except with a compiler.
        warm = 0 if subject.tiles and "compile" not in pulled else 1
        encode = lambda: model.encode_patches(views.to(device))
        parts["encoding"], patches = clock.time(encode, repeats=many, warm=warm)
        parts["projection"], visual = clock.time(lambda: model.project(patches), repeats=repeats)
        parts["prefill"], (logits, cache, length) = clock.time(lambda: prefill(visual), repeats=many, warm=warm)
        steps, token = iter(range(10**9)), logits.argmax(-1)
        parts["first decode"], _ = clock.time(lambda: decode(token, cache, length + next(steps)), repeats=5)
        if fast is not None:  # a second question about the image, with the image's KV cache kept
            image = prefill(visual)[1].kept(0, columns=length)
            image = [(keys[:, :, :-TEXT], values[:, :, :-TEXT]) for keys, values in image]
            again = lambda: llm.head(fast.decode(llm.embed(text), at_end, None, KVCache(image))[0][:, -1])
            at_end = torch.arange(length - TEXT, length, device=device)[None]
            parts["second question"], _ = clock.time(again, repeats=repeats)
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
        "repeats": {name: len(times) for name, times in parts.items()},
        "ttft": sum(seconds[name] for name in ("preprocessing", "encoding", "projection", "prefill")),
        "weight_bytes": count_bytes(model),
        "peak_bytes": peak_bytes(device),
        "unit_seconds": [before, after],
        "load": os.getloadavg()[0],
        "time": clock.kind,
    }
    return row, outputs


def count_operations(subject: Subject) -> dict[str, int]:
    """Count the FLOPs of each part of one request on the meta device."""
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


def relative_errors(outputs: dict, exact: dict) -> dict[str, float]:
    return {key: float((value - exact[key]).norm() / exact[key].norm()) for key, value in outputs.items()}


def run(options: dict[str, str], *, name: str, mode: str) -> None:
    """Measure one row in one mode, in this process, and save it."""
    import torch

    from fastvlm.inference.clock import Clock
    from fastvlm.inference.levers import apply_levers, parse_levers

    began, subject, device = time.perf_counter(), SUBJECTS[name], options["device"]
    threads = os.cpu_count() if options["threads"] == "all" else int(options["threads"])
    torch.set_num_threads(threads)
    clock = Clock(device, kind="cpu" if threads == 1 and device == "cpu" else "wall")
    operations = count_operations(subject) if options["flops"] == "true" else {}
    model, pulled = build(subject).to(device), ()
    if mode != "eager":
        wanted = parse_levers(options["levers"] if mode == "levers" else mode.replace("+", ","), device=device)
        pulled = apply_levers(model, [lever for lever in wanted if lever not in subject.idle_levers])
    row, outputs = measure(subject, model, mode=mode, clock=clock, repeats=int(options["repeats"]), pulled=pulled)
    kept = Path(tempfile.gettempdir(), f"fastvlm-ttft-{name}.pt")
    if mode == "eager":
        torch.save({key: value.cpu() for key, value in outputs.items()}, kept)
    exact = torch.load(kept, map_location=device) if mode != "eager" and kept.exists() else None
    if mode != "eager" and exact is None:
        print(f"{name} {mode}: no error is told; modes=eager,{mode} measures what it is against", file=sys.stderr)
    row["error"] = relative_errors(outputs, exact) if exact else {}
    row |= {"levers": list(pulled), "threads": threads, "device": device, "machine": machine(device)}
    row |= {"flops": operations, "took": round(time.perf_counter() - began)}
    save(row, Path(options["out"]))
    parts = "  ".join(f"{part} {1000 * s:.1f}" for part, s in row["seconds"].items())
    print(f"{name} {mode}: {row['tokens']} tokens, TTFT {1000 * row['ttft']:.0f} ms  ({parts})", end="; ")
    print(f"load {row['load']:.1f}, {row['took']} s", flush=True)


def machine(device: str) -> str:
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return models[0].split(":")[1].strip() if models else platform.processor()


def save(row: dict, path: Path) -> None:
    """Add a row to the results file, replacing an earlier measurement of the same setting."""
    key = lambda r: (r["row"], r["mode"], r["threads"], r["device"])
    rows = [r for r in load(path) if key(r) != key(row)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*rows, row], indent=1) + "\n")


def load(path: Path) -> list[dict]:
    return json.loads(path.read_text()) if path.exists() else []


def parse(arguments: list[str]) -> dict[str, str]:
    options = dict(DEFAULTS)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in options or not equals:
            raise ValueError(f"{argument}: not one of {', '.join(f'{k}=' for k in options)}")
        options[key] = value
    for key in ("flops", "report"):
        if options[key] not in ("true", "false"):
            raise ValueError(f"{key}={options[key]}: true or false")
    names = [n for n in options["only"].split(",") if n]
    if unknown := [n for n in names if n not in SUBJECTS]:
        raise ValueError(f"only={unknown[0]}: not one of {', '.join(SUBJECTS)}")
    from fastvlm.inference.levers import parse_levers  # reject unknown levers before anything is measured

    for mode in set(options["modes"].split(",")) - {"eager", "levers"}:
        parse_levers(mode.replace("+", ","), device=options["device"])
    return options


def missing(wanted: list[tuple[str, str]], rows: list[dict], options: dict[str, str]) -> list[tuple[str, str]]:
    """Return the (row, mode) pairs not yet measured with these threads on this device."""
    threads = os.cpu_count() if options["threads"] == "all" else int(options["threads"])
    there = {(r["row"], r["mode"]) for r in rows if (r["threads"], r["device"]) == (threads, options["device"])}
    return [pair for pair in wanted if pair not in there]


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    out, names = Path(options["out"]), [n for n in options["only"].split(",") if n]
    wanted = [(name, mode) for name in names or SUBJECTS for mode in options["modes"].split(",")]
    if len(names) == len(wanted) == 1:
        run(options, name=names[0], mode=wanted[0][1])
        return
    if options["report"] != "true":
        for name, mode in wanted if names else missing(wanted, load(out), options):
            # One process each, so that peak memory is measured separately.
            subprocess.run([sys.executable, __file__, *arguments, f"only={name}", f"modes={mode}"], check=True)
    rows = load(out)
    print(table := tabulate(rows))
    out.with_suffix(".md").write_text(table)
    write_csv(rows, out.with_suffix(".csv"))
    draw(rows, out.with_suffix(".png"))
    print(f"also in {', '.join(str(f) for f in map(out.with_suffix, ('.md', '.csv', '.png')) if f.exists())}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
