"""Check that the shards of every stage and of the task exist, before a model is loaded or a stage trained."""

from __future__ import annotations

from omegaconf import DictConfig

from fastvlm.build import build_task, instantiate
from fastvlm.pipeline.stage_data import in_stage


def check_shards(config: DictConfig) -> None:
    """Check that the shards of every source exist.

    Raises:
        ValueError: a stage's source has no train shards, or a source of the task none of a split that the task reads.
    """
    for name, stage in config.stages.items():
        with in_stage(name):
            for source in instantiate(stage.mixture, key=f"stages.{name}.mixture").sources.values():
                source.require("train")
    task = build_task(config.task) if config.task else None
    if hasattr(task, "require_shards"):
        try:
            task.require_shards()
        except ValueError as error:
            raise ValueError(f"{error}; or choose another task (~task for none)") from None
