"""Check that the shards of every stage and of the task exist, before a model is loaded or a stage trained."""

from __future__ import annotations

from collections.abc import Iterator

from omegaconf import DictConfig, ListConfig

from fastvlm.build import instantiate
from fastvlm.data.source import Source
from fastvlm.pipeline.stage_data import in_stage

SPLITS = ("train", "val", "test")


def check_shards(config: DictConfig) -> None:
    """Check that the shards of every source exist.

    Raises:
        ValueError: a stage's source has no train shards, or a source of the task has none at all.
    """
    for name, stage in config.stages.items():
        with in_stage(name):
            for source in instantiate(stage.mixture, key=f"stages.{name}.mixture").sources.values():
                source.require("train")
    for key, source in sources_of(config.task, key="task"):
        if not any(source.has_split(split) for split in SPLITS):
            raise ValueError(
                f"{key}: no shards in {source.path}; write them with `python data/prepare.py` (a file of conf/source/ "
                "begins with its command), or choose another task (~task for none)"
            )


def sources_of(config: DictConfig | ListConfig | None, *, key: str) -> Iterator[tuple[str, Source]]:
    """Yield every source in a configuration with its key."""
    if not isinstance(config, DictConfig):
        return
    if str(config.get("_target_", "")).endswith(".Source"):
        yield key, instantiate(config, key=key)
        return
    for name in config:
        yield from sources_of(config[name], key=f"{key}.{name}")
