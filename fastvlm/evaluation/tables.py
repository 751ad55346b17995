"""The result of a short-answer task as rows, as Markdown, and in the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

HEADER = ("question type", "n", "exact match", "95 %", "no image", "other image", "majority", "NLL", "NLL other image")


def format_share(value: float | None) -> str:
    """A share in per cent with one decimal; a dash where there is none."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def format_number(value: float | None, *, digits: int = 3) -> str:
    """A number with fixed decimals; a dash where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def table_cells(rows: Sequence[dict]) -> list[tuple[str, ...]]:
    """Cells of the result's `table`, in the order of HEADER."""
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


def describe_text(result: dict, *, before: dict | None = None) -> str:
    """One line about the text guard, with the model's figure before the image stages where it is known; "" without.

    Args:
        before: the same task's result for the language model before (or only its `text_perplexity`).
    """
    metrics = result["metrics"]
    if "test/text_perplexity" not in metrics:
        return ""
    line = (
        f"Held-out text: perplexity {metrics['test/text_perplexity']:.2f}, "
        f"{metrics['test/text_bits_per_byte']:.3f} bits per byte"
    )
    if before is not None:
        earlier = before.get("metrics", before)
        line += f" (before: {earlier.get('test/text_perplexity', earlier.get('perplexity', math.nan)):.2f})"
    return line + "."


def describe_answers(result: dict) -> str:
    """One line about lengths and likelihood of the answers."""
    metrics = result["metrics"]
    return (
        f"Answers have {metrics['test/answer_length']:.2f} tokens on average, references "
        f"{metrics['test/answer_length_reference']:.2f}; NLL per reference token {metrics['test/answer_nll']:.3f}, "
        f"with another image {format_number(metrics.get('test/answer_nll_swapped'))}."
    )


def render_markdown(result: dict, *, before: dict | None = None) -> str:
    """The table and its two lines as Markdown."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---" + "|---:" * (len(HEADER) - 1) + "|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in table_cells(result["table"])]
    lines += ["", describe_answers(result)]
    if text := describe_text(result, before=before):
        lines += ["", text]
    return "\n".join(lines) + "\n"


def print_table(result: dict, *, before: dict | None = None, title: str = "Held-out questions") -> None:
    """The table and its two lines in the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for i, name in enumerate(HEADER):
        table.add_column(name, justify="right" if i else "left")
    for row, cells in zip(result["table"], table_cells(result["table"])):
        table.add_row(*cells, style="bold" if row["mean"] else None)
    console = Console()
    console.print(table)
    console.print(describe_answers(result))
    if text := describe_text(result, before=before):
        console.print(text)
