"""The report's second half: each stage's curves, shares, speed, freezing check and handoff; provenance of the run."""

from __future__ import annotations

import json
import statistics
from html import escape
from pathlib import Path
from typing import Any

from fastvlm.report.charts import Line, bar, is_number, line_chart, smooth, thin
from fastvlm.report.page import none, table
from fastvlm.report.results import duration, embed_image, percent


def read_json(path: Path) -> dict | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def read_metrics(path: Path) -> list[dict]:
    """Return the readable lines of metrics.jsonl, sorted by step."""
    records = []
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return sorted(records, key=lambda r: r["step"])


class StageRecord:
    """What one stage left in its folder; any piece may be missing."""

    def __init__(self, name: str, folder: Path, *, seconds: float | int | None = None, reused: bool = False):
        self.name, self.folder, self.reused = name, folder, reused
        self.records = read_metrics(folder / "metrics.jsonl")
        self.freezing = read_json(folder / "freezing.json")
        self.manifest = read_json(folder / "handoff" / "manifest.json") or read_json(folder / "manifest.json")
        self.provenance = read_json(folder / "provenance.json")
        self.sheets = sorted((folder / "samples").glob("step-*.png"))
        # Time that this run spent on it (next to nothing for a reused stage); if unknown, its training time.
        self.seconds = seconds if seconds is not None else self.last("train/seconds")

    def series(self, key: str) -> tuple[list, list]:
        found = [(r["step"], r[key]) for r in self.records if is_number(r.get(key))]
        return [s for s, _ in found], [v for _, v in found]

    def last(self, key: str) -> float | int | None:
        return next((r[key] for r in reversed(self.records) if is_number(r.get(key))), None)

    def middle(self, key: str) -> float | int | None:
        """Return the median of the records, without the first step and its warm-up."""
        values = [r[key] for r in self.records if is_number(r.get(key)) and r["step"] > 1]
        return statistics.median(values) if values else self.last(key)

    def sources(self, prefix: str) -> list[str]:
        found = {key.removeprefix(prefix): None for r in self.records for key in r if key.startswith(prefix)}
        return list(found)

    @property
    def num_steps(self) -> int | None:
        return self.records[-1]["step"] if self.records else None


def chain(stages: list[StageRecord]) -> str:
    """Render the pipeline as a row of boxes."""
    boxes = []
    for stage in stages:
        steps = f"{stage.num_steps:,} steps" if stage.num_steps else "no metrics"
        loss = stage.last("val/loss")
        note = " · ".join([steps, *([f"val loss {loss:.3f}"] if loss is not None else []), duration(stage.seconds)])
        reused = " (reused)" if stage.reused else ""
        boxes.append(f'<div class="card"><b>{escape(stage.name)}{reused}</b><span>{note}</span></div>')
    legend = (
        '<p class="soft">In the tables of sources <i class="key target"></i>marks the target, in the mixture\'s '
        "unit; the last three columns count the same samples in every unit.</p>"
    )
    return '<div class="chain">' + '<span class="arrow">→</span>'.join(boxes) + "</div>" + legend


def stage_section(stage: StageRecord) -> str:
    html = f"<h3>{escape(stage.name)}</h3>"
    if not stage.records:
        html += none(f"Stage {stage.name} left no metrics.jsonl.")
    else:
        html += _charts(stage) + "<h4>Shares of the sources</h4>" + _shares(stage)
    if features := read_json(stage.folder / "features.json"):
        html += (
            f'<p class="soft">The frozen encoder ran before the first step: {features.get("images", 0):,} planned '
            f"images, {features.get('written', 0):,} written in {duration(features.get('seconds'))}, all read from the "
            f"feature cache <code>{escape(str(features.get('key'))[:12])}</code>.</p>"
        )
    html += "<h4>What learnt, what stayed</h4>" + freezing_table(stage)
    if stage.sheets:
        picture = embed_image(stage.sheets[-1], most=1240)
        if picture:
            step = stage.sheets[-1].stem.removeprefix("step-").lstrip("0") or "0"
            html += f"<details><summary>Held-out samples at step {step}</summary>"
            html += f'<img class="sheet" alt="samples of stage {escape(stage.name)}" src="{picture}"></details>'
    return html


def _charts(stage: StageRecord) -> str:
    steps, losses = stage.series("train/loss")
    steps, losses = thin(steps, losses)
    lines = [
        Line("train", steps, losses, style="faint", legend=False),
        Line("train", steps, smooth(losses)),
        Line("held out", *stage.series("val/loss"), colour=1, style="points"),
    ]
    charts = [line_chart(lines, title="Loss", y="mean, and what was held out")]
    more = [_lines_chart(stage, "train/grad_norm/", title="Gradient norm", y="before clipping")]
    rates = _lines_chart(stage, "train/lr/", title="Learning rate", zero=True)
    sources = stage.sources("train/loss/")
    if len(sources) > 1:
        charts.append(_lines_chart(stage, "train/loss/", title="Loss per source", y="train, smoothed", smoothed=True))
        more.append(rates)
    else:
        charts.append(rates)
    html = f'<div class="charts">{"".join(charts)}</div>'
    names = "Gradient norms" + (", learning rates" if len(more) > 1 else "")
    return html + f'<details><summary>{names}</summary><div class="charts">{"".join(more)}</div></details>'


def _lines_chart(
    stage: StageRecord, prefix: str, *, title: str, y: str = "", smoothed: bool = False, zero: bool = False
) -> str:
    """Render one line for every metric below `prefix`."""
    lines = []
    # A source has the same colour as in the table of shares.
    order = {name: i for i, name in enumerate(stage.sources("train/share/"))} if prefix == "train/loss/" else {}
    for i, name in enumerate(sorted(stage.sources(prefix), key=lambda name: order.get(name, len(order)))):
        xs, ys = thin(*stage.series(prefix + name))
        lines.append(Line(name, xs, smooth(ys) if smoothed else ys, colour=order.get(name, i)))
    return line_chart(lines, title=title, y=y, zero=zero)


def _shares(stage: StageRecord) -> str:
    sources = stage.sources("train/share/") or stage.sources("train/share_samples/")
    if not sources:
        return none("No shares were recorded.")
    rows = []
    for i, source in enumerate(sources):
        target, share = stage.last(f"train/share_target/{source}"), stage.last(f"train/share/{source}")
        kinds = [stage.last(f"train/share_{kind}/{source}") for kind in ("samples", "tokens", "answer_tokens")]
        rows.append([
            escape(source),
            bar(share, marks={"target": target}, colour=i),
            percent(share),
            percent(target),
            *(percent(v) for v in kinds),
        ])  # fmt: skip
    columns = ["source", "share", "", "target", "of samples", "of tokens", "of answers"]
    return table(columns, rows, numeric={2, 3, 4, 5, 6})


def freezing_table(stage: StageRecord) -> str:
    """Render for each part how many tensors learn and changed, and how many are frozen and kept their bytes."""
    rows = (stage.freezing or {}).get("rows")
    if not rows:
        return none("No freezing.json: nothing proves what learnt.")
    cells, frozen, moved = [], 0, 0
    loose = [row for row in rows if not row.get("parameters")]
    if loose:  # buffers of the model itself, such as the pixels' mean
        learns = any(row.get("trainable") for row in loose)
        counts = {k: sum(row.get(k) or 0 for row in loose) for k in ("changed", "unchanged")}
        rows = [row for row in rows if row.get("parameters")] + [{"part": "buffers", "trainable": learns, **counts}]
    for row in rows:
        learns = bool(row.get("trainable"))
        changed, unchanged = row.get("changed") or 0, row.get("unchanged") or 0
        if not learns:
            frozen, moved = frozen + unchanged, moved + changed
        verdict = f"{changed:,} of {changed + unchanged:,} tensors moved"
        if not learns:
            verdict = (
                f'<span class="bad">{changed:,} moved</span>' if changed else f"all {unchanged:,} tensors unchanged"
            )
        rate = row.get("lr")
        cells.append([
            escape(str(row.get("part", "?"))),
            f"{row.get('parameters') or 0:,}",
            '<span class="pill good">learns</span>' if learns else '<span class="pill soft">frozen</span>',
            (f"{rate:.1e}" if is_number(rate) else escape(str(rate or "–"))) if learns else "–",
            verdict,
        ])  # fmt: skip
    html = table(["part", "parameters", "", "learning rate", "bytes, before against after"], cells, numeric={1, 3})
    if moved:
        return html + f'<p class="bad">{moved} frozen tensors moved.</p>'
    return html + (
        f'<p class="soft"><span class="good">✓</span> {frozen:,} frozen tensors verified.</p>' if frozen else ""
    )


def speed_section(stages: list[StageRecord]) -> str:
    shown = [stage for stage in stages if stage.records]
    if not shown:
        return none("No stage left metrics.")
    gpu = any(stage.last("train/gpu_memory_gib") for stage in shown)
    rows = []
    for stage in shown:
        memory = [stage.last("train/gpu_memory_gib" if gpu else "train/memory_gib")]
        norm = stage.middle("train/grad_norm")
        rows.append([
            escape(stage.name),
            *(_count(stage.middle(f"train/{key}_per_second")) for key in ("text_tokens", "image_tokens", "samples")),
            percent(stage.middle("train/padding")),
            percent(stage.middle("train/data_wait")),
            *(f"{m:.2f} GiB" if m else "–" for m in memory),
            f"{norm:.2f}" if norm is not None else "–",
            f"{stage.last('train/skipped') or 0:.0f}",
            duration(stage.last("train/seconds")),
        ])  # fmt: skip
    columns = ["stage", "text tok/s", "image tok/s", "samples/s", "padding", "data wait"]
    columns += ["GPU memory" if gpu else "memory", "grad norm", "unreadable", "training"]
    html = (
        "<p>Medians over the stage. Tokens are real ones, without padding; data wait is the share of the time in which "
        "no batch was ready; unreadable counts samples.</p>"
    )
    return html + table(columns, rows, numeric=set(range(1, len(columns))))


def _count(value: float | int | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def timing_section(stages: list[StageRecord], seconds: dict[str, Any]) -> str:
    """Render where the time went."""
    spent = {stage.name: stage.seconds for stage in stages if is_number(stage.seconds)}
    spent |= {key: value for key, value in seconds.items() if is_number(value) and key != "total"}
    if not spent:
        return none("No times were recorded.")
    total = sum(spent.values())
    rows = [
        [
            escape(name),
            bar(value / total if total else 0),
            duration(value),
            percent(value / total if total else 0, digits=0),
        ]
        for name, value in spent.items()
    ]
    rows.append(["sum", "", duration(total), ""])
    return table(["", "share of the time", "took", ""], rows, numeric={2, 3}, num_sums=1)


def handoff_section(stages: list[StageRecord]) -> str:
    """Render what each stage handed on, and from which stages its parts came."""
    rows, components = [], []
    for stage in stages:
        manifest = stage.manifest
        if manifest is None:
            rows.append([escape(stage.name), '<span class="soft">no manifest: nothing was handed on</span>', *[""] * 5])
            continue
        rows.append([
            escape(stage.name),
            *(_hash(manifest.get(key)) for key in ("hash", "parent", "config_hash", "tokenizer", "commit")),
            escape(str(manifest.get("created") or "–")),
        ])  # fmt: skip
        for name, entry in (manifest.get("components") or {}).items():
            entry = entry if isinstance(entry, dict) else {"sha256": entry}
            size = entry.get("parameters")
            components.append([
                escape(stage.name),
                escape(name),
                f"{size:,}" if is_number(size) else "–",
                f"<code>{escape(str(entry.get('sha256', '–')))}</code>",
            ])  # fmt: skip
    html = table(["stage", "hash", "parent", "configuration", "tokenizer", "commit", "written"], rows)
    if components:
        listed = table(["stage", "component", "parameters", "sha256 of the file"], components, numeric={2})
        html += f"<details><summary>{len(components)} component files and their hashes</summary>{listed}</details>"
    return html


def _hash(value: Any) -> str:
    if isinstance(value, dict):  # a parent per component
        named: dict[str, list[str]] = {}
        for part, entry in value.items():
            named.setdefault(str(entry.get("hash") if isinstance(entry, dict) else entry), []).append(str(part))
        return "<br>".join(
            f"{_hash(h)} <small>{escape(', '.join(parts))}</small>" for h, parts in named.items()
        ) or _hash("")
    return (
        f'<code title="{escape(str(value))}">{escape(str(value)[:12])}</code>'
        if value
        else '<span class="soft">–</span>'
    )


def provenance_section(provenance: dict | None, config: str | None) -> str:
    """Render how to reproduce the run."""
    html = ""
    if provenance:
        git, hardware = provenance.get("git") or {}, provenance.get("hardware") or {}
        commit = (
            f"<code>{escape(str(git['commit']))}</code>" if git.get("commit") else "not in a repository with commits"
        )
        commit += ' <span class="bad">with local changes</span>' if git.get("dirty") else ""
        machine = [str(hardware.get("cpu") or ""), f"{hardware.get('cores', '?')} cores"]
        machine += [f"{hardware['memory_gib']} GiB"] if hardware.get("memory_gib") else []
        machine += [str(gpu) for gpu in hardware.get("gpus") or []]
        facts = {
            "command": f'<code class="command">{escape(str(provenance.get("command", "–")))}</code>',
            "commit": commit,
            "machine": escape(", ".join(m for m in machine if m)),
            "seeds": escape(", ".join(f"{k} {v}" for k, v in (provenance.get("seeds") or {}).items()) or "–"),
            "versions": escape(", ".join(f"{k} {v}" for k, v in (provenance.get("versions") or {}).items()) or "–"),
            "started": escape(str(provenance.get("created", "–"))),
        }
        html += '<dl class="facts">' + "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in facts.items()) + "</dl>"
    else:
        html += none("No provenance.json was found.")
    if config:
        html += f"<details><summary>Resolved configuration</summary><pre>{escape(config)}</pre></details>"
    else:
        html += none("No resolved configuration was found.")
    return html
