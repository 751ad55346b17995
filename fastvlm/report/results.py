"""The report's first half: the results, and answers with their images."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from typing import Any

from fastvlm.report.charts import bar, is_number
from fastvlm.report.page import none, table

BLIND = {"removed": "image removed", "swapped": "image of another question", "majority": "most frequent answer"}


def embed_image(path: Path, *, most: int = 360) -> str | None:
    """Return an image as a data URL, at most `most` pixels wide or high; None if it cannot be read."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except (OSError, UnidentifiedImageError):
        return None
    if max(image.size) > most:
        image.thumbnail((most, most), Image.Resampling.LANCZOS)
    stored = io.BytesIO()
    image.save(stored, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(stored.getvalue()).decode()


def percent(value: Any, *, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %" if is_number(value) else "–"


def duration(seconds: Any) -> str:
    """Format seconds: 75 -> '1 min 15 s'."""
    if not is_number(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds + 0.5), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def score_key(row: dict) -> str:
    """Return the key of a row's score, whose name depends on the benchmark: the first number not among `known`."""
    known = {"type", "n", "low", "high", "mean", "nll", "nll_swapped", *BLIND}
    return next((k for k, v in row.items() if k not in known and is_number(v)), "accuracy")


def mean(rows: list[dict], key: str) -> float | int | None:
    """Return the mean over question types, each counted once."""
    values = [row[key] for row in rows if is_number(row.get(key))]
    return sum(values) / len(values) if values else None


def summarise(rows: list[dict]) -> list[dict]:
    """Return the table's own means (`"mean": true`), or one over all types; the last is the headline."""
    own = [row for row in rows if row.get("mean")]
    if own or len(rows) < 2:
        return own or rows
    keys = (score_key(rows[0]), *BLIND, "nll", "nll_swapped")
    return [{"type": "mean over types", "n": sum(r.get("n") or 0 for r in rows)} | {k: mean(rows, k) for k in keys}]


def headline(results: dict, *, seconds: float | int | None, parameters: int | None) -> str:
    """Render the run's most important numbers."""
    rows, cards = results.get("table") or [], []
    if rows:
        last = summarise(rows)[-1]
        key = score_key(last)
        blind = max((last[k] for k in BLIND if is_number(last.get(k))), default=None)
        note = f"{key.replace('_', ' ')}, {last['type']}"
        cards.append(
            (percent(last.get(key)), note + (f"; best blind baseline {percent(blind)}" if blind is not None else ""))
        )
    words = results.get("text_perplexity") or {}
    if is_number(words.get("after")):
        before = f"{words['before']:.1f} → " if is_number(words.get("before")) else ""
        cards.append((f"{before}{words['after']:.1f}", "text perplexity before → after learning to see"))
    if is_number(parameters):
        cards.append(
            (f"{parameters / 1e6:,.1f} M" if parameters >= 1e5 else f"{parameters:,}", "parameters of the model")
        )
    if is_number(seconds):
        cards.append((duration(seconds), "for everything below"))
    return '<div class="cards">' + "".join(
        f'<div class="card"><b>{value}</b><span>{escape(note)}</span></div>' for value, note in cards
    ) + "</div>" if cards else ""  # fmt: skip


def results_section(results: dict | None) -> str:
    """Render accuracy per question type beside the blind baselines (`BLIND`)."""
    if not results:
        return none("No results.json: the evaluation has not run.")
    html = ""
    rows = results.get("table") or []
    if rows:
        key = score_key(rows[0])
        means = summarise(rows) if len(rows) > 1 else []
        single = [row for row in rows if not row.get("mean")]
        html += f"<p>{escape(key.replace('_', ' ').capitalize())} on held-out questions. The marks are what the same "
        html += "questions score without looking: "
        html += "; ".join(f'<span class="soft"><i class="key {k}"></i>{escape(v)}</span>' for k, v in BLIND.items())
        html += ". The thin stroke is the 95 % interval."
        columns = ["question type", "questions", "score", "", "removed", "swapped", "majority"]
        if any(is_number(row.get("nll")) for row in rows):
            columns.append("NLL, swapped")
            html += " NLL is that of the right answer (nats per token), and with another question's image."
        shown = [_result_row(row, key=key, columns=columns) for row in single + means]
        html += "</p>" + table(columns, shown, numeric=set(range(3, len(columns))) | {1}, num_sums=len(means))
    else:
        html += none("The evaluation wrote no table per question type.")
    words = results.get("text_perplexity") or {}
    if is_number(words.get("before")) and is_number(words.get("after")):
        change = words["after"] / words["before"] - 1
        html += (
            f"<p>Perplexity of held-out text, without any image: <b>{words['before']:.2f}</b> before the model learnt "
            f"to see, <b>{words['after']:.2f}</b> after ({change:+.1%}).</p>"
        )
    metrics = {k: v for k, v in (results.get("metrics") or {}).items() if is_number(v)}
    if metrics:
        cells = [[f"<code>{escape(k)}</code>", f"{v:.4g}"] for k, v in sorted(metrics.items())]
        listed = table(["metric", "value"], cells, numeric={1})
        html += f"<details><summary>All {len(cells)} metrics</summary>{listed}</details>"
    return html


def _result_row(row: dict, *, key: str, columns: list[str]) -> list[str]:
    interval = (row.get("low"), row.get("high"))
    known = all(is_number(v) for v in interval)
    low, high = (100 * v for v in interval) if known else (0.0, 0.0)
    cells = [
        escape(str(row.get("type", "?"))),
        f"{row.get('n') or 0:,}",
        bar(row.get(key), interval=interval if known else None, marks={k: row.get(k) for k in BLIND}),
        f"<b>{percent(row.get(key))}</b>{f'<small>{low:.1f} – {high:.1f}</small>' if known else ''}",
        *(percent(row.get(k)) for k in BLIND),
    ]
    if len(columns) > len(cells):
        nll, swapped = (f"{row[k]:.2f}" if is_number(row.get(k)) else "–" for k in ("nll", "nll_swapped"))
        cells.append(f'{nll} <small class="soft">{swapped}</small>')
    return cells


def choose_predictions(predictions: list[dict], *, most: int = 6) -> tuple[list[dict], list[dict]]:
    """Choose right and wrong answers: of every type in turn, in the given order, so that none is picked by hand."""

    def in_turn(rows: list[dict]) -> list[dict]:
        kinds: dict[str, list[dict]] = {}
        for row in rows:
            kinds.setdefault(str(row.get("type")), []).append(row)
        chosen, depth = [], 0
        while len(chosen) < min(most, len(rows)):
            chosen += [group[depth] for group in kinds.values() if depth < len(group)]
            depth += 1
        return chosen[:most]

    return in_turn([p for p in predictions if p.get("correct")]), in_turn(
        [p for p in predictions if not p.get("correct")]
    )


def predictions_section(results: dict | None, *, folder: Path) -> str:
    """Render answers with their images, whose paths are relative to the run directory."""
    predictions = (results or {}).get("predictions") or []
    if not predictions:
        return none("No predictions were kept.")
    right, wrong = choose_predictions(predictions)
    html = f"<p>Of {len(predictions)} kept answers, the first of every question type in turn.</p>"
    for name, rows in (("Right", right), ("Wrong", wrong)):
        cards = "".join(_answer_card(row, folder=folder) for row in rows)
        html += f"<h3>{name}</h3>" + (
            f'<div class="answers">{cards}</div>' if cards else none(f"No {name.lower()} ones.")
        )
    return html


def _answer_card(row: dict, *, folder: Path) -> str:
    source = embed_image(folder / row["image"]) if row.get("image") else None
    picture = f'<img alt="" src="{source}">' if source else '<span class="blank">no picture</span>'
    colour = "good" if row.get("correct") else "bad"
    lines = [("model", f'<b class="{colour}">{_clip(row.get("prediction"))}</b>')]
    if not row.get("correct"):
        lines.append(("right is", _clip(row.get("reference"))))
    for key, name in (("removed", "no image"), ("swapped", "other image")):
        blind = row.get(f"prediction_{key}", row.get(key))
        if blind is not None:
            lines.append((name, f'<span class="soft">{_clip(blind)}</span>'))
    prompt = str(row.get("prompt") or "").replace("<image>", " ").strip()  # the image is shown beside it
    facts = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in lines)
    return (
        f'<div class="answer">{picture}<div><p class="type">{escape(str(row.get("type", "")))}</p>'
        f"<p>{_clip(prompt, most=220)}</p><dl>{facts}</dl></div></div>"
    )


def _clip(text: Any, *, most: int = 120) -> str:
    text = "" if text is None else str(text)
    return escape(text if len(text) <= most else text[:most].rstrip() + " …") or "<i>nothing</i>"
