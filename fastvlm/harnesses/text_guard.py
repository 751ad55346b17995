"""The text guard: MMLU, GSM8K, HumanEval and MBPP through lm-eval, before and after training on images."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from fastvlm.data.transforms import ImageTransform
from fastvlm.models.vlm import VLM
from fastvlm.tokens import Tokenizer


class TextGuard:
    """lm-eval tasks over the language model alone.

    Args:
        tasks: names of lm-eval tasks or groups.
        shots: number of examples; None keeps the task's default.
        limit: number of samples per task; None takes all.
        include: folder with further task files.
        chat: format questions as turns of the model's chat template.
        batch_size: rows scored or answered at once.
        run_code: run the programs a model writes; without it, tasks that need this are refused.
        seconds: wall-time limit of a program.
        memory_mb: limit on the address space of each of its processes, and on the resident memory of all of them.

    Raises:
        ValueError: no task is named, or lm-eval is not installed.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        shots: int | None = None,
        limit: int | None = None,
        include: str | None = None,
        chat: bool = False,
        batch_size: int = 16,
        run_code: bool = False,
        seconds: float | int = 5,
        memory_mb: int = 1024,
    ):
        if not tasks:
            raise ValueError("task.tasks is empty; name lm-eval's tasks, such as [mmlu]")
        if importlib.util.find_spec("lm_eval") is None:
            raise ValueError(f"task {', '.join(tasks)} is run by lm-eval; pip install '.[eval]'")
        self.tasks, self.shots, self.limit, self.include, self.chat = list(tasks), shots, limit, include, chat
        self.batch_size, self.run_code, self.seconds, self.memory_mb = batch_size, run_code, seconds, memory_mb

    def run(
        self,
        model: VLM,
        tokenizer: Tokenizer,
        *,
        image_size: int,
        transform: ImageTransform | None = None,
        device: str | torch.device = "cpu",
        out: str | Path | None = None,
    ) -> dict:
        """Run the tasks; `transform` is not used.

        Returns:
            `metrics`: `test/<task>/<metric>` and its standard error. With `out`, `predictions/<task>.jsonl` is written.

        Raises:
            ValueError: a task is unknown, its data is not available, or it runs code and this is not allowed.
        """
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from fastvlm.harnesses.code_eval import CodeEval, sandboxed
        from fastvlm.harnesses.text import TextModel

        metric = CodeEval(seconds=self.seconds, memory_mb=self.memory_mb)
        # Code tasks load the metric when they are parsed, so it must be replaced or refused before.
        box = sandboxed(metric) if self.run_code else refused()
        with box, contextlib.redirect_stdout(io.StringIO()):
            manager = TaskManager(include_path=self.include)
            if unknown := [task for task in self.tasks if task not in manager.all_tasks]:
                raise ValueError(f"task.tasks: lm-eval has no task {unknown[0]}")
            try:
                found = simple_evaluate(
                    model=TextModel(model, tokenizer, image_size=image_size, device=device, batch_size=self.batch_size),
                    tasks=self.tasks,
                    num_fewshot=self.shots,
                    limit=self.limit,
                    apply_chat_template=self.chat,
                    bootstrap_iters=1000,
                    task_manager=manager,
                    log_samples=out is not None,
                    confirm_run_unsafe_code=self.run_code,
                )
            except (ConnectionError, FileNotFoundError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise ValueError(f"task {', '.join(self.tasks)}: its data cannot be had ({reason[:160]})") from None
        if out is not None:
            write_samples(Path(out) / "predictions", found["samples"])
        metrics = {}
        for task, scores in {**found["results"], **(found.get("groups") or {})}.items():
            for name, value in scores.items():
                if isinstance(value, (int, float)) and "," in name:
                    measure, _, how = name.partition(",")
                    metrics[f"test/{task}/{measure}" + ("" if how == "none" else f"/{how}")] = float(value)
        return {"metrics": metrics, "shots": found.get("n-shot"), "samples": found.get("n-samples"), "table": []}

    def render(self, result: dict) -> str:
        """Return one line per metric, without standard errors."""
        lines = [f"{name}: {value:.4f}" for name, value in result["metrics"].items() if "_stderr" not in name]
        return "\n".join(lines)


@contextlib.contextmanager
def refused():
    """Refuse tasks that load the `code_eval` metric inside the context."""
    import evaluate

    load = evaluate.load

    def no(name: str, *rest, **more):
        if name == "code_eval":
            raise ValueError("this task runs code that the model wrote; allow it with task.run_code=true (sandboxed)")
        return load(name, *rest, **more)

    evaluate.load = no
    try:
        yield
    finally:
        evaluate.load = load


def write_samples(folder: Path, samples: dict[str, list[dict]]) -> None:
    """Write requests and answers as JSON lines, one file per task."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, rows in samples.items():
        lines = [json.dumps(row, ensure_ascii=False, default=str) for row in rows]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
