"""The panel for studies of few-shot models: answers after solved examples, and benchmarks with shots."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastvlm.data.transforms import ImageTransform
from fastvlm.evaluation.benchmark import Benchmark
from fastvlm.evaluation.few_shot import draw_examples, score_after
from fastvlm.evaluation.panel import Panel
from fastvlm.evaluation.prompts import Prompt
from fastvlm.evaluation.questions import Question
from fastvlm.inference.engine import Engine
from fastvlm.models.vlm import VLM
from fastvlm.tokens import Tokenizer


class FewShotPanel(Panel):
    """`Panel` plus the same questions after k solved examples of their type about other held-out images.

    Metrics: `test/answer_nll/shots/<k>`, in nats per token of the answer and its end; `test/exact_match/shots/<k>`, the
    share of answers that greedy decoding produces exactly; `test/answer_nll_gain/<k>`, how much lower the NLL is than
    without examples.

    Args:
        shots: the values of k.
        form, template: see `Prompt`. form=chat with 0 shots gives `test/answer_nll`.
        benchmarks: public benchmarks by name, run with every k of `benchmark_shots`: `test/<name>/shots/<k>/<metric>`,
            and `test/benchmarks/shots/<k>`, the mean of their main figures (MM1 reports it times 100).
        options: those of `Panel`.

    Raises:
        ValueError: a number of shots is negative, or none is given.
    """

    def __init__(
        self,
        sources: dict,
        *,
        shots: Sequence[int] = (0, 1, 2, 4),
        form: str = "chat",
        template: str = Prompt.template,
        benchmarks: dict[str, Benchmark] | None = None,
        benchmark_shots: Sequence[int] = (0, 4, 8),
        **options,
    ):
        super().__init__(sources, **options)
        for key, counts in (("shots", shots), ("benchmark_shots", benchmark_shots)):
            if not counts or min(counts) < 0:
                raise ValueError(f"task.{key}={list(counts)} needs at least one number, none below 0")
        self.shots, self.prompt = tuple(shots), Prompt(form=form, template=template)
        self.benchmarks, self.benchmark_shots = benchmarks or {}, tuple(benchmark_shots)

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
        options = {"image_size": image_size, "transform": transform, "device": device}
        result = super().run(model, tokenizer, **options, out=out)
        for count in self.benchmark_shots if self.benchmarks else ():
            figures = []
            for name, benchmark in self.benchmarks.items():
                asked = copy.copy(benchmark)
                asked.shots = count
                folder = None if out is None else Path(out) / "shots" / str(count)
                given = asked.run(model, tokenizer, **options, out=folder)
                under = f"test/{benchmark.name}/"
                for key, value in given["metrics"].items():
                    result["metrics"][f"test/{name}/shots/{count}/{key.removeprefix(under)}"] = value
                figures.append(given["table"][-1][benchmark.protocol.metric])
            result["metrics"][f"test/benchmarks/shots/{count}"] = sum(figures) / len(figures)
        return result

    def require_shards(self) -> None:
        super().require_shards()
        for benchmark in self.benchmarks.values():
            asked = copy.copy(benchmark)
            asked.shots = max(self.benchmark_shots)
            asked.require_shards()

    def measure(
        self, engine: Engine, questions: Sequence[Question], visual: Sequence[Sequence[Tensor]]
    ) -> dict[str, float]:
        return super().measure(engine, questions, visual) | self.score_shots(engine, questions, visual)

    def score_shots(
        self, engine: Engine, questions: Sequence[Question], visual: Sequence[Sequence[Tensor]]
    ) -> dict[str, float]:
        """Return the metrics of every k."""
        drawn = draw_examples(questions, count=max(self.shots))
        metrics = {}
        for count in self.shots:
            scores = score_after(
                engine,
                questions,
                [places[:count] for places in drawn],
                visual,
                prompt=self.prompt,
                batch_size=self.batch_size,
            )
            nats, tokens, right = (sum(column) for column in zip(*scores))
            metrics[f"test/answer_nll/shots/{count}"] = nats / tokens
            metrics[f"test/exact_match/shots/{count}"] = right / len(scores)
        for count in self.shots if 0 in self.shots else ():
            if count:
                gain = metrics["test/answer_nll/shots/0"] - metrics[f"test/answer_nll/shots/{count}"]
                metrics[f"test/answer_nll_gain/{count}"] = gain
        return metrics
