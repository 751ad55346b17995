"""Tables, a CSV file and a plot of the results of `ttft.py`, next to the paper's figures."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from ttft_subjects import SUBJECTS

PARTS = ("preprocessing", "encoding", "projection", "prefill")
LONG = ("encoding", "prefill")  # nearly all of the time
# Milliseconds of encoder and prefill on an M1 Max, with the encoder on the Neural Engine and the language model on the
# GPU: FastVLM (arXiv 2412.13303), table 10; fastvlm-512 from table 4, whose latencies are a separate set; the prefill
# of siglip-so400m is that of nanoLLaVA, with Qwen1.5-0.5B. None: not given for a language model of this size.
PAPER: dict[str, tuple[float, float | None]] = {
    "fastvlm-256": (6.8, None),
    "fastvlm-512": (33.5, None),
    "fastvlm-768": (54.8, None),
    "fastvlm-1024": (116.3, 50.5),
    "clip-l-336": (127.4, None),
    "siglip-so400m": (272.1, 263.3),
    "llava-onevision": (2721.4, 11402.4),
}
RATIOS = (
    ("FastVLM 1024: eager / levers", ("fastvlm-1024", "eager"), ("fastvlm-1024", "levers"), 4.5),
    ("LLaVA-OneVision eager / FastVLM 1024 eager", ("llava-onevision", "eager"), ("fastvlm-1024", "eager"), None),
    ("LLaVA-OneVision levers / FastVLM 1024 levers", ("llava-onevision", "levers"), ("fastvlm-1024", "levers"), None),
    ("LLaVA-OneVision eager / FastVLM 1024 levers", ("llava-onevision", "eager"), ("fastvlm-1024", "levers"), 85.0),
    ("CLIP ViT-L/14-336 eager / FastVLM 512 eager", ("clip-l-336", "eager"), ("fastvlm-512", "eager"), None),
    ("CLIP ViT-L/14-336 levers / FastVLM 512 levers", ("clip-l-336", "levers"), ("fastvlm-512", "levers"), 3.9),
)


def order(row: dict) -> tuple:
    """Return a sort key: by subject; eager first, then single levers, combinations, and all levers."""
    return list(SUBJECTS).index(row["row"]), row["mode"] != "eager", row["mode"] == "levers", row["mode"].count("+")


def settings(rows: Sequence[dict]) -> dict[tuple, list[dict]]:
    """Group the rows that may be compared: same machine, device, number of threads and kind of seconds."""
    key = lambda r: (r["machine"], r["device"], r["threads"], r["time"])
    return {k: sorted((r for r in rows if key(r) == k), key=order) for k in dict.fromkeys(map(key, rows))}


def ttft_range(row: dict) -> tuple[float, float] | None:
    """Return TTFT in seconds with the fastest and with the slowest repeat of every part.

    None if a long part was timed only once, or if the row has no spread.
    """
    spread = row.get("spread", {})
    if not set(PARTS) <= set(spread) or any(spread[part][0] == spread[part][1] for part in LONG):
        return None
    return sum(spread[part][0] for part in PARTS), sum(spread[part][1] for part in PARTS)


def ratio(above: dict, below: dict) -> str:
    """Format the ratio of two TTFTs, with its minimum and maximum over the repeats."""
    text, ranges = f"{above['ttft'] / below['ttft']:.2f}", (ttft_range(above), ttft_range(below))
    if None in ranges:
        return text
    (least, most), (least_below, most_below) = ranges
    return f"{text} ({least / most_below:.2f}-{most / least_below:.2f})"


def errors(row: dict) -> str:
    return ", ".join(f"{value:.3f}" for value in row.get("error", {}).values())


def repeats(row: dict) -> str:
    """Format the repeats of encoding and prefill; for older files without them, those that follow from the spread."""
    once = {part: 1 for part in LONG if part in row.get("spread", {}) and len(set(row["spread"][part])) == 1}
    given = once | row.get("repeats", {})
    return ", ".join(str(given[part]) for part in LONG if part in given)


def tabulate(rows: Sequence[dict]) -> str:
    """Return Markdown tables: milliseconds of every part, then ratios next to the paper's."""
    lines = []
    for (machine, device, threads, kind), chosen in settings(rows).items():
        kind = "CPU time" if kind == "cpu" else "wall clock"
        lines += [f"{machine}, {device}, threads={threads}, milliseconds of {kind}", ""]
        names = ["row", "mode", "tokens", "pre", "encode", "project", "prefill", "TTFT", "min-max", "repeats"]
        names += ["decode", "2nd question"]
        names += ["weights GB", "peak GB", "GFLOP", "error: tokens, logits", "unit", "load"]
        lines += [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
        for r in chosen:
            s = {k: f"{1000 * v:.1f}" for k, v in r["seconds"].items()}
            flops = f"{sum(r['flops'].values()) / 1e9:.0f}" if r["flops"] else ""
            cells = [r["row"], r["mode"], r["tokens"], *(s[part] for part in PARTS)]
            span = "-".join(f"{1000 * x:.0f}" for x in ttft_range(r) or ())
            cells += [f"{1000 * r['ttft']:.0f}", span, repeats(r), s["first decode"], s.get("second question", "")]
            cells += [f"{r['weight_bytes'] / 1e9:.2f}", f"{r['peak_bytes'] / 1e9:.1f}", flops]
            cells += [errors(r), "-".join(f"{1000 * u:.0f}" for u in r["unit_seconds"]), f"{r['load']:.1f}"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        found = {(r["row"], r["mode"]): r for r in chosen}
        lines += ["", *rivals(found), *lever_by_lever(found)]
    return "\n".join(lines)


def rivals(found: dict[tuple[str, str], dict]) -> list[str]:
    """Return table lines for those `RATIOS` whose rows were measured."""
    paper = sum(PAPER["llava-onevision"]) / sum(PAPER["fastvlm-1024"])
    lines = []
    for label, above, below, bar in RATIOS:
        if above in found and below in found:
            said = f"{paper:.0f}" if above[0] == "llava-onevision" else ""
            lines.append(f"| {label} | {ratio(found[above], found[below])} | {bar or ''} | {said} |")
    head = ["| ratio of TTFT | here (spread) | bar | paper (M1 Max) |", "|---|---|---|---|"]
    return [*head, *lines, ""] if lines else []


def lever_by_lever(found: dict[tuple[str, str], dict]) -> list[str]:
    """Return a table for each model measured with single levers: each mode relative to `eager`."""
    lines = []
    for name in dict.fromkeys(name for name, _ in found):
        modes = [mode for row, mode in found if row == name]
        if set(modes) <= {"eager", "levers"} or (name, "eager") not in found:
            continue
        eager = found[name, "eager"]
        lines += [f"| {name} with | levers | eager TTFT / its TTFT (spread) | encode | prefill | decode | weights GB |"]
        lines[-1] += " error: tokens, logits |"
        lines.append("|" + "---|" * 8)
        for mode in modes:
            r = found[name, mode]
            pulled = ", ".join(r["levers"]) if mode == "levers" else ""
            cells = [mode, pulled, "1" if r is eager else ratio(eager, r)]
            cells += [f"{eager['seconds'][part] / r['seconds'][part]:.2f}" for part in (*LONG, "first decode")]
            lines.append("| " + " | ".join([*cells, f"{r['weight_bytes'] / 1e9:.2f}", errors(r)]) + " |")
        lines.append("")
    return lines


def write_csv(rows: Sequence[dict], path: Path) -> None:
    """Write one line per measurement, in seconds."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        parts = [*PARTS, "first decode", "second question"]
        writer.writerow(
            ["row", "mode", "levers", "machine", "device", "threads", "time", "tokens", "positions", "ttft"]
            + [part.replace(" ", "_") for part in parts]
            + ["weight_bytes", "peak_bytes", "flops", "error_tokens", "error_logits", "unit_before", "unit_after"]
            + ["load", "paper_encoding", "paper_prefill", "ttft_min", "ttft_max", "repeats"]
        )
        for chosen in settings(rows).values():
            for r in chosen:
                said = [x and x / 1000 for x in PAPER.get(r["row"], (None, None))]
                error = [r["error"].get(key) for key in ("visual tokens", "logits")]
                numbers = [r["ttft"], *(r["seconds"].get(part) for part in parts)]
                writer.writerow(
                    [r["row"], r["mode"], "+".join(r["levers"]), r["machine"], r["device"], r["threads"], r["time"]]
                    + [r["tokens"], r["positions"], *(x and f"{x:.5f}" for x in numbers)]
                    + [r["weight_bytes"], r["peak_bytes"], sum(r["flops"].values()) or None]
                    + [x and f"{x:.4f}" for x in error]
                    + [f"{x:.4f}" for x in r["unit_seconds"]]
                    + [f"{r['load']:.1f}", *said]
                    + [x and f"{x:.5f}" for x in ttft_range(r) or (None, None)]
                    + [repeats(r).split(", ")[-1]]
                )


def draw(rows: Sequence[dict], path: Path) -> None:
    """Plot TTFT on a logarithmic axis, and next to it the share of each part."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = settings([r for r in rows if r["mode"] in ("eager", "levers")])
    if not groups:
        return
    tall = [max(2.2, 0.28 * len(chosen) + 1.2) for chosen in groups.values()]
    figure, panels = plt.subplots(
        len(groups), 2, figsize=(11, sum(tall)), layout="constrained", squeeze=False, height_ratios=tall
    )
    for ((machine, device, threads, kind), chosen), (left, right) in zip(groups.items(), panels):
        names = list(dict.fromkeys(r["row"] for r in chosen))[::-1]
        for mode, colour in (("eager", "tab:gray"), ("levers", "tab:blue")):
            found = {r["row"]: r["ttft"] for r in chosen if r["mode"] == mode}
            left.plot(found.values(), [names.index(n) for n in found], "o", color=colour, label=mode)
            for name, seconds in found.items():
                left.annotate(
                    f"{seconds:.2f}" if seconds < 10 else f"{seconds:.0f}",
                    (seconds, names.index(name)),
                    (0, 6),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                )
        said = {n: sum(PAPER[n]) / 1000 for n in names if n in PAPER and PAPER[n][1] is not None}
        left.plot(said.values(), [names.index(n) for n in said], "k|", markersize=12, label="paper (M1 Max)")
        kind = "CPU time" if kind == "cpu" else "wall clock"
        left.set(xscale="log", xlabel=f"seconds to first token ({kind})", yticks=range(len(names)), yticklabels=names)
        left.set_title(f"{machine}, {device}, threads={threads}", fontsize=9, loc="left")
        left.set_ylim(-0.6, len(names) - 0.2)
        left.margins(x=0.1)
        left.grid(axis="x", alpha=0.3)
        left.legend(fontsize=8)
        bars, start = chosen[::-1], [0.0] * len(chosen)
        for part in PARTS:
            shares = [r["seconds"][part] / r["ttft"] for r in bars]
            right.barh(range(len(bars)), shares, left=start, label=part)
            start = [a + b for a, b in zip(start, shares)]
        right.set(yticks=range(len(bars)), yticklabels=[f"{r['row']}, {r['mode']}" for r in bars], xlim=(0, 1))
        right.set_xlabel("share of it")
        right.tick_params(axis="y", labelsize=8)
        right.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=110)
    plt.close(figure)
