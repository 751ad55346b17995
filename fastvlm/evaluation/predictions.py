"""Predictions on disk: JSON lines, an HTML page, and the input file of the benchmark's official scorer."""

from __future__ import annotations

import base64
import contextlib
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path

from fastvlm.evaluation.protocol import Protocol
from fastvlm.files import write_whole

NAMES = ("key", "question_id", "questionId", "image_id", "sent_id", "image")  # identify a question in result files
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1a1a1a }
article { display: grid; grid-template-columns: 11rem 1fr; gap: 1rem; padding: .8rem 0; border-top: 1px solid #ddd }
img { max-width: 11rem } .score { font-weight: 600 } .right .score { color: #17693b } .wrong .score { color: #a1260d }
dt { color: #666; font-size: .85em } dd { margin: 0 0 .3rem; white-space: pre-wrap; overflow-wrap: anywhere }
@media (max-width: 40rem) { article { grid-template-columns: 1fr } }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd } article { border-color: #444 } }
"""


def write_predictions(out: Path, result: dict, *, protocol: Protocol) -> list[dict]:
    """Write `<task>.jsonl`, `<task>.html` with thumbnails in `<task>/`, and the official files in `predictions/`.

    Returns:
        The first 12 rows that have a thumbnail, in the form of a run's report.
    """
    folder, name = out / "predictions", result["task"]
    folder.mkdir(parents=True, exist_ok=True)
    for place, row in enumerate(result["predictions"]):
        if thumbnail := row.pop("thumbnail", ""):
            key = re.sub(r"[^\w-]+", "-", row["key"])  # two keys may differ in what is replaced
            file = Path(name) / f"{key}-{place}.jpg"
            (folder / name).mkdir(exist_ok=True)
            (folder / file).write_bytes(base64.b64decode(thumbnail.split(",", 1)[1]))
            row["image"] = file.as_posix()
    rows = result["predictions"]
    write_whole(folder / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for file, text in protocol.official_files(name, rows).items():
        write_whole(folder / file, text)
    write_whole(folder / f"{name}.html", render_page(result))
    examples = []
    for row in [row for row in rows if row.get("image")][:12]:
        examples.append(
            {
                "type": row["type"],
                "prompt": row["question"],
                "reference": row["answers"][0],
                "prediction": row["prediction"],
                "correct": row["score"] >= 0.5,
                "image": (Path("predictions") / row["image"]).as_posix(),
            }
        )
    return examples


def render_page(result: dict) -> str:
    """Return an HTML page, without scripts, of the questions that have a thumbnail, the lowest scores first."""
    total = result["table"][-1]
    low, high = result["interval"]
    head = f"{result['task']}: {result['metric'].replace('_', ' ')} {100 * total[result['metric']]:.2f}"
    body = [f"<h1>{html.escape(head)}</h1>"]
    body.append(f"<p>{total['n']} questions of the {result['split']} split, 95 % {100 * low:.2f}-{100 * high:.2f}. ")
    shown = sorted((row for row in result["predictions"] if row.get("image")), key=lambda row: row["score"])
    body.append(f"Shown are {len(shown)} of them, the lowest scores first.</p>")
    for row in shown:
        said = [
            ("question", row["question"]),
            ("said", row["prediction"]),
            ("right", " | ".join(count(row["answers"]))),
        ]
        if row.get("parsed") not in (None, row["prediction"]):
            said.insert(2, ("read as", str(row["parsed"])))
        if row.get("fault"):
            said.append(("fault", row["fault"]))
        words = "".join(f"<dt>{key}</dt><dd>{html.escape(str(value))}</dd>" for key, value in said)
        kind = "right" if row["score"] >= 0.5 else "wrong"
        score = f"{row['score']:.2f}" + (f" · {row['type']}" if row["type"] else "")
        body.append(
            f'<article class="{kind}"><img src="{html.escape(row["image"], quote=True)}" alt="" loading="lazy">'
            f'<div><span class="score">{html.escape(score)}</span><dl>{words}</dl></div></article>'
        )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(result['task'])}</title><style>{STYLE}</style>{''.join(body)}</html>\n"
    )


def count(answers: Sequence[str]) -> list[str]:
    """Return distinct answers with their counts, the most frequent first."""
    times = {answer: answers.count(answer) for answer in dict.fromkeys(answers)}
    ordered = sorted(times, key=lambda answer: -times[answer])
    return [answer if times[answer] == 1 else f"{answer} ({times[answer]})" for answer in ordered]


def read_rows(path: str | Path) -> tuple[dict[str, str], str]:
    """Read answers from a file: our JSON lines, by key, or a file for an official scorer, by question id.

    Returns:
        The answers, and what identifies their questions: `key`, `question_id` or `image` (the file's name).

    Raises:
        ValueError: the file cannot be read, has no answers, or two for one question.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"predictions={path}: {error.strerror or error}") from None
    listed = text.lstrip()[:1] == "["
    with contextlib.suppress(ValueError, RecursionError):  # an object over several lines; JSON lines fail here
        if not listed and isinstance(whole := json.loads(text), dict):
            text = json.dumps(whole)
    try:
        # (location for error messages, row)
        rows = [(f"row {i}", row) for i, row in enumerate(json.loads(text), 1)] if listed else []
        # Not splitlines: answers may contain other line separators.
        for number, line in enumerate([] if listed else text.split("\n"), 1):
            if line.strip():
                rows.append((f"line {number}", json.loads(line)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"predictions={path} is neither JSON nor JSON lines ({error})") from None
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(
                f"predictions={path}, {place}: {json.dumps(row)[:80]} is not an object with a question_id and an answer"
            )
    if len(rows) == 1 and not listed and not {"prediction", "answer"} & set(rows[0][1]):
        rows = [("line 1", {"question_id": name, "answer": said}) for name, said in rows[0][1].items()]
    answers: dict[str, str] = {}
    for place, row in rows:
        named = next((row[k] for k in NAMES if k in row), None)
        said = next((row[k] for k in ("prediction", "answer", "caption", "response") if k in row), None)
        if isinstance(said, dict):
            said = next(iter(said.values()), None)
        if named is None or not isinstance(said, str):
            shown = str(row)[:80]
            raise ValueError(f"predictions={path}, {place}: there is no question_id or no answer in words: {shown}")
        if str(named) in answers:
            raise ValueError(f"predictions={path}, {place}: question {named} is answered twice")
        answers[str(named)] = said
    if not answers:
        raise ValueError(f"predictions={path} holds no answer")
    named_by = next(name for name in NAMES if name in rows[0][1])
    return answers, named_by if named_by in ("key", "image") else "question_id"


def question_name(row: dict, named_by: str) -> str:
    """Return what identifies a question in a file of answers.

    Args:
        named_by: `key`, `question_id`, or `image`: the name of the image's file, which hub copies lack `.jpg` of.
    """
    if named_by != "image":
        return str(row[named_by])
    name = str(row["question_id"] if row.get("image_id") is None else row["image_id"])
    return name if Path(name).suffix else f"{name}.jpg"
