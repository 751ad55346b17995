"""Measure how fast a trained model answers.

    python -m fastvlm.bench run=runs/latest                    # seconds for the embedded run
    python -m fastvlm.bench run=runs/latest levers=fast threads=2 requests=50 tokens=64 out=speed.json

Prints time to first token and its parts, latency percentiles, tokens/s compared with `transformers`' own `generate` on
the same model, the cost of a second question about an image, and memory. time=cpu measures CPU time of the thread
(needs threads=1).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fastvlm.commands import run_command

DEFAULTS = {
    "run": "",
    "levers": "",
    "device": "cpu",
    "threads": "0",  # 0: torch's default
    "time": "wall",
    "requests": "20",
    "tokens": "32",
    "batch": "8",
    "reference": "true",
    "out": "",
}


def parse(arguments: Sequence[str]) -> dict[str, str]:
    options = dict(DEFAULTS)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in options or not equals:
            raise ValueError(f"{argument}: keys are {', '.join(f'{k}=' for k in options)}")
        options[key] = value
    if not options["run"]:
        raise ValueError("run=DIR names the run to measure, e.g. run=runs/latest; see --help")
    for key in ("threads", "requests", "tokens", "batch"):
        if not options[key].isdigit() or (key != "threads" and int(options[key]) < 1):
            raise ValueError(f"{key}={options[key]} must be a whole number, 1 or more")
    options["reference"] = options["reference"].lower()
    if options["reference"] not in ("true", "false"):
        raise ValueError(f"reference={options['reference']} must be true or false")
    if options["out"] and Path(options["out"]).is_dir():
        raise ValueError(f"out={options['out']} is a folder; name a file, such as {options['out']}/speed.json")
    if options["out"] and not Path(options["out"]).absolute().parent.is_dir():
        raise ValueError(f"out={options['out']}: there is no folder {Path(options['out']).parent}; make it first")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    options = parse(arguments)
    from fastvlm.inference.opening import check_device, check_source, open_engine

    check_source(options["run"])
    check_device(options["device"])
    import torch

    from fastvlm.bench.speed import measure_speed, reference_speed
    from fastvlm.inference.clock import Clock
    from fastvlm.inference.levers import parse_levers

    if int(options["threads"]):
        torch.set_num_threads(int(options["threads"]))
    clock = Clock(options["device"], kind=options["time"])
    tokens, requests = int(options["tokens"]), int(options["requests"])
    parse_levers(options["levers"], device=options["device"])
    reference = None
    if options["reference"] == "true":
        engine = open_engine(options["run"], device=options["device"])
        reference = reference_speed(engine, tokens=tokens, repeats=max(3, requests // 4), clock=clock)
        del engine
    engine = open_engine(options["run"], device=options["device"], levers=options["levers"])
    speed = measure_speed(
        engine, requests=requests, tokens=tokens, batch=int(options["batch"]), clock=clock, reference=reference
    )
    speed.setting = {**options, "levers": ",".join(engine.levers), "threads": str(torch.get_num_threads())}
    threads = f"{speed.setting['threads']} threads" if options["device"] == "cpu" else options["device"]
    print(f"{options['run']}: {threads}, {options['time']} time, levers: {speed.setting['levers'] or 'none'}")
    print("\n".join(speed.lines()))
    if options["out"]:
        Path(options["out"]).write_text(json.dumps(speed.as_dict(), indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
