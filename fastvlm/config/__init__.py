"""Compose conf/ and a command line into one checked configuration; a user's mistake is reported in one line.

Only this package and `build.py` know Hydra.
"""

from fastvlm.config.command_line import command
from fastvlm.config.composition import CONF, ROOT, compose, compose_each, take_list, typed_overrides
from fastvlm.config.mistakes import explain
from fastvlm.config.rules import check
from fastvlm.config.schema import Adapt, EvalConfig, ImageConfig, StageConfig, TrainConfig

__all__ = [
    "CONF",
    "ROOT",
    "Adapt",
    "EvalConfig",
    "ImageConfig",
    "StageConfig",
    "TrainConfig",
    "check",
    "command",
    "compose",
    "compose_each",
    "explain",
    "take_list",
    "typed_overrides",
]
