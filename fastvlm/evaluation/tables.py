"""Tables of a short-answer task: from predictions to table rows, flat metrics, Markdown and terminal text."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Sequence

from fastvlm.evaluation.metrics import accuracy, bootstrap_interval, mean_answer_length, wilson_interval

HEADER = ("question type", "n", "exact match", "95 %", "no image", "other image", "majority", "NLL", "NLL other image")


def make_table(predictions: Sequence[dict], *, formed: Sequence[str] = ()) -> list[dict]:
    """Return a row per question type in alphabetical order, then the means of `formed` and of all types.

    Means weigh types equally. The 95 % intervals are Wilson's for a type, and bootstrapped within types for a mean.
    """
    groups: dict[str, list[dict]] = defaultdict(list)
    for prediction in predictions:
        groups[prediction["type"]].append(prediction)
    rows = []
    for kind in sorted(groups):
        group = groups[kind]
        correct = [p["correct"] for p in group]
        low, high = wilson_interval(sum(correct), len(correct))
        rows.append(
            {
                "type": kind,
                "mean": False,
                "n": len(group),
                "exact_match": accuracy(correct),
                "low": low,
                "high": high,
                "removed": _share(group, "correct_removed"),
                "swapped": _share(group, "correct_swapped"),
                "majority": _share(group, "correct_majority"),
                "nll": _nll(group, "nats"),
                "nll_swapped": _nll(group, "nats_swapped"),
            }
        )
    by_type = {row["type"]: row for row in rows}
    means = [(f"mean of {len(formed)}: {', '.join(formed)}", list(formed))] if formed else []
    for name, kinds in [*means, (f"mean of all {len(rows)}", sorted(groups))]:
        members = [p for kind in kinds for p in groups[kind]]
        low, high = bootstrap_interval([[p["correct"] for p in groups[kind]] for kind in kinds])
        rows.append(
            {
                "type": name,
                "mean": True,
                "n": len(members),
                **{
                    column: _mean([by_type[kind][column] for kind in kinds])
                    for column in ("exact_match", "removed", "swapped", "majority")
                },
                "low": low,
                "high": high,
                "nll": _nll(members, "nats"),
                "nll_swapped": _nll(members, "nats_swapped"),
            }
        )
    return rows


def collect_metrics(table: Sequence[dict], predictions: Sequence[dict]) -> dict[str, float]:
    """Return flat metrics `test/<metric>[_<condition>]/<type, formed or mean>`, without undefined ones.

    NLLs are in nats per token over all reference tokens, end tokens included; lengths are in tokens.
    """
    metrics: dict[str, float | None] = {}
    for row in table:
        name = row["type"] if not row["mean"] else "mean" if row is table[-1] else "formed"
        metrics[f"test/exact_match/{name}"] = row["exact_match"]
        for condition in ("removed", "swapped", "majority"):
            metrics[f"test/exact_match_{condition}/{name}"] = row[condition]
    metrics["test/answer_nll"] = table[-1]["nll"]
    metrics["test/answer_nll_swapped"] = table[-1]["nll_swapped"]
    # Only on questions that have both: those without an image have no NLL with another image.
    both = [p for p in predictions if "nats_swapped" in p]
    metrics["test/answer_nll_gap"] = _nll(both, "nats_swapped") - _nll(both, "nats") if both else None
    metrics["test/answer_length"] = mean_answer_length([p["prediction_tokens"] for p in predictions])
    metrics["test/answer_length_reference"] = mean_answer_length([p["reference_tokens"] for p in predictions])
    metrics["test/num_questions"] = len(predictions)
    return {name: float(value) for name, value in metrics.items() if value is not None}


def format_share(value: float | None) -> str:
    """Format a share in per cent with one decimal; "-" for None and nan."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def format_number(value: float | None, *, digits: int = 3) -> str:
    """Format a number with fixed decimals; "-" for None and nan."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def table_cells(rows: Sequence[dict]) -> list[tuple[str, ...]]:
    """Return the cells of the result's `table`, in the order of HEADER."""
    return [
        (
            row["type"],
            str(row["n"]),
            format_share(row["exact_match"]),
            f"{format_share(row['low'])}-{format_share(row['high'])}",
            format_share(row["removed"]),
            format_share(row["swapped"]),
            format_share(row["majority"]),
            format_number(row["nll"]),
            format_number(row["nll_swapped"]),
        )
        for row in rows
    ]


def describe_text(result: dict) -> str:
    """Return one line about the held-out text, or "" without it; `before` is shown if the result has it."""
    perplexity = result.get("text_perplexity")
    if not perplexity:
        return ""
    line = f"Held-out text: perplexity {perplexity['after']:.2f}"
    if perplexity.get("before") is not None:
        line += f" (the language model before the image stages: {perplexity['before']:.2f})"
    return f"{line}, {result['metrics']['test/text_bits_per_byte']:.3f} bits per byte."


def describe_answers(result: dict) -> str:
    """Return one line about lengths and likelihood of the answers."""
    metrics = result["metrics"]
    return (
        f"Answers have {metrics['test/answer_length']:.2f} tokens on average, references "
        f"{metrics['test/answer_length_reference']:.2f}; NLL per reference token {metrics['test/answer_nll']:.3f}, "
        f"with another image {format_number(metrics.get('test/answer_nll_swapped'))}."
    )


def render_markdown(result: dict) -> str:
    """Return the table and the lines below it as Markdown."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---" + "|---:" * (len(HEADER) - 1) + "|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in table_cells(result["table"])]
    return (
        "\n".join(lines) + "\n\n" + "\n\n".join(filter(None, (describe_answers(result), describe_text(result)))) + "\n"
    )


def render_text(result: dict, *, width: int = 120) -> str:
    """Return the same for a terminal of `width` columns."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="held-out questions (exact match in %)", title_justify="left")
    for i, name in enumerate(HEADER):
        table.add_column(name, justify="right" if i else "left")
    for row, cells, after in zip(
        result["table"], table_cells(result["table"]), [*(r["mean"] for r in result["table"][1:]), False]
    ):
        table.add_row(*cells, end_section=after and not row["mean"])
    # Fixed width instead of the terminal's, because the text also goes into logs.
    console = Console(file=io.StringIO(), width=width, color_system=None)
    for part in (table, describe_answers(result), describe_text(result)):
        if part:
            console.print(part, highlight=False)
    return console.file.getvalue().rstrip("\n")


def _share(predictions: Sequence[dict], column: str) -> float | None:
    values = [p[column] for p in predictions if column in p]
    return accuracy(values) if values else None


def _nll(predictions: Sequence[dict], column: str) -> float | None:
    """Return nats per token over all tokens together, not the mean over questions."""
    scored = [p for p in predictions if column in p]
    return sum(p[column] for p in scored) / sum(p["scored_tokens"] for p in scored) if scored else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
