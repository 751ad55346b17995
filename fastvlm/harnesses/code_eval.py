"""The metric `code_eval` for lm-eval's code tasks, with every program run in the sandbox."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from fastvlm.harnesses.sandbox import Outcome, check_sandbox, run_python


class CodeEval:
    """A drop-in replacement for `evaluate.load("code_eval")`, with the same arguments and results.

    Args:
        seconds: wall-time limit of a program.
        memory_mb: limit on the address space of each of its processes, and on the resident memory of all of them.
        num_workers: programs run at once.
    """

    def __init__(self, *, seconds: float | int = 5, memory_mb: int = 1024, num_workers: int = 2):
        self.seconds, self.memory_mb, self.num_workers = seconds, memory_mb, num_workers

    def compute(
        self, *, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1, 10, 100)
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict]]]]:
        """Return pass@k over tasks (Chen et al., arXiv:2107.03374, eq. 1), and every program's outcome by task."""
        jobs = [(task, n, code) for task, codes in enumerate(predictions) for n, code in enumerate(codes)]
        with ThreadPoolExecutor(self.num_workers) as pool:
            outcomes = pool.map(lambda job: self._run(job[2], references[job[0]]), jobs)
        results: dict[int, list[tuple[int, dict]]] = defaultdict(list)
        for (task, n, _), outcome in zip(jobs, outcomes):
            words = (
                "passed" if outcome.passed else "timed out" if outcome.timed_out else f"failed: {outcome.said[-300:]}"
            )
            results[task].append((n, {"task_id": task, "passed": outcome.passed, "result": words, "completion_id": n}))
        counts = [(len(of), sum(found["passed"] for _, found in of)) for of in results.values()]
        most = min((n for n, _ in counts), default=0)
        return {f"pass@{j}": pass_at_k(counts, j) for j in k if j <= most}, dict(results)

    def _run(self, code: str, test: str) -> Outcome:
        return run_python(f"{code}\n{test}", seconds=self.seconds, memory_mb=self.memory_mb)


def pass_at_k(counts: Sequence[tuple[int, int]], k: int) -> float:
    """Return the mean over tasks of 1 - C(n - c, k) / C(n, k), where c of n programs pass."""
    return sum(1 - math.comb(n - c, k) / math.comb(n, k) for n, c in counts) / len(counts)


@contextlib.contextmanager
def sandboxed(metric: CodeEval) -> Iterator[None]:
    """Make `evaluate.load("code_eval")` return this metric: the original is downloaded and has no sandbox.

    Raises:
        ValueError: the sandbox does not work on this machine.
    """
    import evaluate

    check_sandbox()
    load = evaluate.load
    evaluate.load = lambda name, *rest, **more: metric if name == "code_eval" else load(name, *rest, **more)
    try:
        yield
    finally:
        evaluate.load = load
