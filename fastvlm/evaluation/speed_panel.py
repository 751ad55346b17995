"""The panel for studies of speed: scores and answer times under one setting of the engine."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastvlm.data.transforms import ImageTransform
from fastvlm.evaluation.answer_speed import answer_speed, one_thread
from fastvlm.evaluation.panel import Panel
from fastvlm.evaluation.questions import Question, first_of_types
from fastvlm.inference.engine import Engine
from fastvlm.inference.levers import apply_levers
from fastvlm.models.vlm import VLM
from fastvlm.tokens import Tokenizer


class SpeedPanel(Panel):
    """`Panel` plus the times of `answer_speed`; both are measured on the same weights, with the levers applied.

    Args:
        levers: names from `fastvlm.inference.levers`, applied to a copy of the model; None applies none.
        fast_decoder: False decodes through the layers of `transformers`.
        second: time a second question about each image instead of the first.
        timed: number of timed questions.
        tokens: length of their answers.
        options: those of `Panel`.
    """

    def __init__(
        self,
        sources: dict,
        *,
        levers: str | None = None,
        fast_decoder: bool = True,
        second: bool = False,
        timed: int = 8,
        tokens: int = 32,
        **options,
    ):
        super().__init__(sources, **options)
        self.levers, self.fast_decoder, self.second = levers, fast_decoder, second
        self.timed, self.tokens = timed, tokens

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
        # Around everything: torch.compile runs at the first question, for the number of threads set at that time.
        with one_thread(device):
            if self.levers:
                model = copy.deepcopy(model).to(device)
                apply_levers(model, self.levers)
            return super().run(model, tokenizer, image_size=image_size, transform=transform, device=device, out=out)

    def measure(
        self, engine: Engine, questions: Sequence[Question], visual: Sequence[Sequence[Tensor]]
    ) -> dict[str, float]:
        metrics = super().measure(engine, questions, visual)
        asked = first_of_types(questions, source=next(iter(self.sources)), count=2)
        asked = [question for question in asked if question.files][: self.timed]
        timed = Engine(
            engine.model,
            engine.tokenizer,
            image_size=engine.image_size,
            transform=engine.transform,
            device=engine.device,
            fast=self.fast_decoder,
        )
        return metrics | answer_speed(timed, asked, second=self.second, tokens=self.tokens)
