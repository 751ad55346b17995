"""Compare two runs on the same questions, paired.

    python -m fastvlm.evaluation.compare a=runs/one b=runs/two task=vqav2

Reads `eval/predictions/<task>.jsonl` of both (or a file given directly: a=path.jsonl), and prints the difference with a
paired bootstrap interval over images and, if all scores are 0 or 1, McNemar's exact test.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastvlm.evaluation.scores import LEVEL, resampled_means


def read_scores(where: str | Path, task: str) -> dict[str, dict]:
    """Return scored rows by key.

    Args:
        where: a run, an evaluation's folder, or a predictions file.

    Raises:
        ValueError: there are no predictions of the task, or they have no scores.
    """
    where = Path(where)
    places = [where, where / "eval/predictions" / f"{task}.jsonl", where / "predictions" / f"{task}.jsonl"]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        remedy = shlex.join(["python", "eval.py", f"checkpoint={where}", f"task={task}"])
        raise ValueError(f"{where} holds no predictions of task {task}; run `{remedy}`")
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except ValueError as error:
        raise ValueError(f"{file} is not JSON lines ({error}); score it again with `python eval.py`") from None
    if not rows or not all(isinstance(row, dict) and {"key", "score"} <= row.keys() for row in rows):
        raise ValueError(f"{file} holds no scored predictions; score it again with `python eval.py`")
    return {row["key"]: row for row in rows}


def compare(
    a: dict[str, dict], b: dict[str, dict], *, resamples: int = 10_000, seed: int = 0
) -> dict[str, float | int | list[float]]:
    """Compute the difference b - a over the counted questions.

    Returns:
        `a`, `b` (mean scores), `difference`, its 95 % `interval`, `p` (two-sided, of the bootstrap), `n`, and, if all
        scores are 0 or 1, `only_a`, `only_b` (questions that only one of them answers correctly) and `mcnemar_p`.

    Raises:
        ValueError: the two do not answer the same questions.
    """
    if a.keys() != b.keys():
        lone, common = min(a.keys() ^ b.keys()), len(a.keys() & b.keys())
        raise ValueError(
            f"the two hold answers to other questions ({len(a)} and {len(b)}, {common} in common; only the "
            f"{'first' if lone in a else 'second'} answers {lone}): compare runs on the same task, split and limit"
        )
    names = [name for name in a if a[name].get("counted", True)]
    first, second = (np.array([rows[name]["score"] for name in names], dtype=np.float64) for rows in (a, b))
    images = [a[name].get("image_id", name) for name in names]
    gaps = second - first
    means = resampled_means(gaps.tolist(), images, resamples=resamples, seed=seed)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    beyond = min((means <= 0).mean(), (means >= 0).mean())
    result = {
        "a": float(first.mean()),
        "b": float(second.mean()),
        "difference": float(gaps.mean()),
        "interval": [float(low), float(high)],
        "p": float(min(1.0, 2 * max(beyond, 1 / resamples))),
        "n": len(names),
    }
    if set(first) | set(second) <= {0.0, 1.0}:
        only_a, only_b = int((gaps < 0).sum()), int((gaps > 0).sum())
        result |= {"only_a": only_a, "only_b": only_b, "mcnemar_p": mcnemar(only_a, only_b)}
    return result


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p-value of McNemar's test: a binomial test of the discordant pairs against 1/2."""
    n, k = only_a + only_b, min(only_a, only_b)
    if not n:
        return 1.0
    # In logarithms, because n may be in the thousands.
    choose = lambda i: math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
    return min(1.0, 2 * math.fsum(math.exp(choose(i) - n * math.log(2)) for i in range(k + 1)))


def describe(result: dict, *, names: Sequence[str] = ("a", "b")) -> str:
    """Return the comparison as one line, or two with McNemar's test."""
    low, high = result["interval"]
    lines = [
        f"{names[0]} {100 * result['a']:.2f}, {names[1]} {100 * result['b']:.2f} on {result['n']} questions: "
        f"difference {100 * result['difference']:+.2f} (95 % {100 * low:+.2f} to {100 * high:+.2f}, paired bootstrap "
        f"over images, p = {result['p']:.2g})"
    ]
    if "mcnemar_p" in result:
        lines.append(
            f"only {names[0]} right: {result['only_a']}, only {names[1]} right: {result['only_b']}; McNemar's exact "
            f"p = {result['mcnemar_p']:.2g}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if "-h" in arguments or "--help" in arguments:
        print(__doc__)
        return 0
    unknown = [a for a in arguments if a.split("=")[0] not in ("a", "b", "task")]
    if unknown or not {"a", "b"} <= given.keys():
        wrong = f"{unknown[0]} is not one of a=, b=, task=" if unknown else "a=<run> and b=<run> must be given"
        print(f"error: {wrong}; such as a=runs/one b=runs/two task=vqav2", file=sys.stderr)
        return 2
    try:
        task = given.get("task", "vqav2")
        rows = [read_scores(given[key], task) for key in ("a", "b")]
        print(describe(compare(*rows), names=(f"a={given['a']}", f"b={given['b']}")))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
