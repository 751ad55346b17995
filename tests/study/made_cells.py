"""Rows of a study that no run made: three arms whose differences are known."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastvlm.study.arms import Study
from fastvlm.study.cells import ABOUT, COST, Cell
from fastvlm.study.composed import composed
from tests.conftest import ROOT


def put_study(root: Path) -> Path:
    """llava_align with three of its arms, in a folder of its own, without results; what `grid` below fills."""
    folder = root / "llava_align"
    shutil.copytree(Path(__file__).with_name("three_arms"), folder)
    shutil.copyfile(ROOT / "experiments" / "llava_align" / "paper.csv", folder / "paper.csv")
    return folder


def cell(arm: str, seed: int, *, nll: float, flops: float = 1e12, steps: float = 10.0, **own: str) -> Cell:
    about = dict.fromkeys(ABOUT, "1") | {"scale": "micro", "arm": arm, "seed": str(seed)}
    about |= {"code": "c0de", "commit": "abc123456", "cpu": "a CPU", "accelerator": "cpu", "precision": "32-true"} | own
    metrics = {"test/answer_nll": nll, "test/exact_match/mean": 1 - nll, "test/text_perplexity": 40.0}
    return Cell(about, dict.fromkeys(COST, 10.0) | {"flops": flops, "steps": steps}, metrics | {"test/ttft_ms": 9.0})


def configured(study: Study, cells: list[Cell]) -> list[Cell]:
    """The cells as runs of the configuration that their arms have now."""

    def config(one: Cell) -> str:
        return composed(study, scale=one.about["scale"], arm=one.arm).hash(one.seed)

    return [replace(one, about=one.about | {"config": config(one)}) for one in cells]


def grid(*, seeds: int = 5, steps: dict[str, float] | None = None) -> list[Cell]:
    noise = np.random.default_rng(0).normal(0, 0.005, (3, seeds))
    levels = {"align": (0.6, 1e12), "skip": (0.7, 0.7e12), "skip_long": (0.55, 1.01e12)}
    return [
        cell(arm, seed, nll=level + noise[row, seed], flops=flops, steps=(steps or {}).get(arm, 10.0))
        for row, (arm, (level, flops)) in enumerate(levels.items())
        for seed in range(seeds)
    ]
