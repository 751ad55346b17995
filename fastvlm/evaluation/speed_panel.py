"""The panel of a study about speed: what a model answers, and how fast, under one setting of the engine."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from fastvlm.data.transforms import ImageTransform
from fastvlm.evaluation.answer_speed import answer_speed, one_thread
from fastvlm.evaluation.panel import Panel
from fastvlm.evaluation.questions import read_questions
from fastvlm.inference.engine import Engine
from fastvlm.inference.levers import apply_levers
from fastvlm.models.vlm import VLM
from fastvlm.tokens import Tokenizer


class SpeedPanel(Panel):
    """`Panel`, and the times of `answer_speed`. Scores and times are those of the same weights, levers pulled.

    Args:
        levers: names from `fastvlm.inference.levers`; they change a copy of the model.
        fast_decoder: False decodes through the layers of `transformers`.
        second: times are those of a second question about each image.
        timed: questions that are timed.
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
        # All of it: a lever that compiles does so at the first question, for the threads it finds.
        with one_thread(device):
            if self.levers:
                model = copy.deepcopy(model).to(device)
                apply_levers(model, self.levers)
            result = super().run(model, tokenizer, image_size=image_size, transform=transform, device=device, out=out)
            options = {"image_size": image_size, "transform": transform, "device": device}
            engine = Engine(model, tokenizer, **options, fast=self.fast_decoder)
            name, source = next(iter(self.sources.items()))
            asked = read_questions(source.load(self.split, tokenizer), source=name, limit=2, transform=engine.transform)
            asked = [question for question in asked if question.images][: self.timed]
            result["metrics"] |= answer_speed(engine, asked, second=self.second, tokens=self.tokens)
            return result
