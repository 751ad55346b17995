"""Tokens per second of the engine relative to `generate` of `transformers`, for Qwen2-0.5B with random weights.

    python benchmarks/decode.py                         # about five minutes on one core
    python benchmarks/decode.py levers=none,packed,bf16+packed tokens=32 prompt=288 repeats=3

For each lever (combine with +), `generate` and the engine are timed in turn in one process, on the same weights with
that lever applied. The last column compares the engine with `generate` of the model without levers, which is always
timed first. Seconds are one thread's CPU time (threads=1 on a CPU) or wall time.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

DEFAULTS = {
    "levers": "none,packed,bf16,bf16+packed,int8_weight_only,int8_dynamic",
    "tokens": "24",
    "prompt": "288",
    "repeats": "3",
    "threads": "1",
    "device": "cpu",
}


def speeds(llm, *, prompt: int, tokens: int, repeats: int, clock) -> tuple[float, float]:
    """Return tokens per second after the first token, for `generate` and for the engine's decoder."""
    import torch

    from fastvlm.inference.fast_decoder import FastDecoder
    from fastvlm.inference.kv_cache import KVCache

    ids = torch.arange(1, prompt + 1, device=clock.device)[None]
    fast = FastDecoder(llm)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}

    def generate(count: int):
        return llm.hf.generate(ids, **options, max_new_tokens=count, min_new_tokens=count)

    def ours(count: int):
        cache = KVCache()
        hidden, _ = fast.decode(llm.embed(ids), torch.arange(prompt, device=clock.device)[None], None, cache)
        written = [llm.head(hidden[:, -1]).argmax(-1)]
        for step in range(count - 1):
            positions = torch.tensor([[prompt + step]], device=clock.device)
            hidden, _ = fast.decode(llm.embed(written[-1][:, None]), positions, None, cache)
            written.append(llm.head(hidden[:, -1]).argmax(-1))
        return torch.stack(written, dim=1)

    def speed(write) -> float:
        rates = []
        for _ in range(repeats):
            (first,), _ = clock.time(lambda: write(1), warm=0)
            (whole,), _ = clock.time(lambda: write(tokens + 1), warm=0)
            rates.append(tokens / (whole - first))
        return statistics.median(rates)

    with torch.inference_mode():
        generate(2), ours(2)
        return speed(generate), speed(ours)


def main(arguments: list[str]) -> None:
    options = dict(DEFAULTS)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in options or not equals:
            raise ValueError(f"{argument}: not one of {', '.join(f'{k}=' for k in options)}")
        options[key] = value
    import os

    import torch
    from ttft_subjects import SUBJECTS, build

    from fastvlm.inference.clock import Clock
    from fastvlm.inference.levers import apply_levers

    threads = int(options["threads"])
    torch.set_num_threads(threads)
    clock = Clock(options["device"], kind="cpu" if threads == 1 and options["device"] == "cpu" else "wall")
    sizes = {"prompt": int(options["prompt"]), "tokens": int(options["tokens"]), "repeats": int(options["repeats"])}
    plain = None
    print("| levers | generate | engine | engine / generate, same weights | engine / generate, no lever |")
    print("|---|---|---|---|---|")
    for lever in ["none", *(lever for lever in options["levers"].split(",") if lever != "none")]:
        model = None
        model = build(SUBJECTS["fastvlm-256"]).to(options["device"])
        apply_levers(model, lever.replace("+", ","))
        theirs, ours = speeds(model.llm, **sizes, clock=clock)
        plain = plain or theirs
        print(f"| {lever} | {theirs:.2f} | {ours:.2f} | {ours / theirs:.2f} | {ours / plain:.2f} |", flush=True)
    print(f"tokens/s, {threads} threads, {clock.kind} time, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
