"""Compose conf/ into one configuration, with or without a command line."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from fastvlm.config.schema import EvalConfig, TrainConfig

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"


def register() -> None:
    """Register schemas and resolvers with Hydra. Safe to call twice."""
    from hydra.core.config_store import ConfigStore

    OmegaConf.register_new_resolver("project_root", lambda: str(ROOT), replace=True)
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(name="eval_schema", node=EvalConfig)


def compose(config_name: str = "train", overrides: list[str] = ()) -> DictConfig:
    """Compose without a command line (tests, notebooks, tools)."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from fastvlm.study.arms import expand

    register()
    around = GlobalHydra.instance().hydra  # of the running command, or None
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            overrides = relax(expand(list(overrides)))
            if config_name == "train" and not any(o.startswith("name=") for o in overrides):
                overrides.append("name=composed")
            return hydra_compose(config_name, overrides)
    finally:
        GlobalHydra.instance().hydra = around


# Overrides that do not change a run's name, such as `data.on_change=replan`, with which a refused run continues. Of the
# hardware only what no number depends on is among them.
SILENT = (
    r"\+*(name|hardware(?!\.(?:precision|quantise)\b)|logger|overwrite|pipeline|paths|data|log_every|"
    r"checkpoint_every|num_samples|speed_images|stages\.\w+\.cache_features)\b"
)


def run_name() -> str:
    """Return a run directory's default name: the pipeline, and what was changed on the command line.

    The same command gives the same name, and so finds its own run again.
    """
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    changed = [o for o in hydra.overrides.task if not re.match(SILENT, o)]
    label = ",".join([hydra.runtime.choices.get("pipeline", "run"), *sorted(o.lstrip("+") for o in changed)])
    label = re.sub(r"[^A-Za-z0-9_.,=@-]+", "_", label)
    if len(label) <= 80:
        return label
    return f"{label[:70]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"


# Keys that hold a constructor call: any of its arguments can be set, whether or not the YAML file has it.
PARTS = "encoder|resampler|projector|llm|vlm|tokenizer|task|hardware|logger|mixture"

CALLS = rf"({PARTS}|stages\.\w+\.(objective|mixture|optimizer|trainable|adapt))\."


def relax(overrides: list[str]) -> list[str]:
    """Let `hardware.num_workers=0` work without a plus; `build.instantiate` refuses unknown constructor arguments."""
    return [f"++{o}" if re.match(CALLS + r"[\w.*]+=|stages\.\w+\.(trainable|adapt)=", o) else o for o in overrides]


def quote_path(word: str) -> str:
    """Return `key=value` with the value in quotes if it is an existing path that Hydra could not read unquoted.

    Such as the folder `runs/embedded,resampler=perceiver`, a letter outside ASCII, or ~, which the shell leaves alone
    behind a dotted key.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Quote, QuotedString
    from hydra.errors import HydraException

    key, _, value = word.partition("=")
    path = os.path.expanduser(value)
    if not value or word.startswith("-") or not os.path.exists(path):
        return word
    try:
        if not OverridesParser.create().parse_override(word).is_sweep_override():
            return word
    except HydraException:
        pass
    return f"{key}={QuotedString(path, Quote.single).with_quotes()}"


def typed_overrides() -> list[str]:
    """Return the overrides of the running command, without Hydra's own; empty if no command is running."""
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def numbered_job() -> bool:
    """Return whether this run is a cell of a sweep by joblib or submitit, which number their jobs."""
    from hydra.core.hydra_config import HydraConfig

    return HydraConfig.initialized() and not OmegaConf.is_missing(HydraConfig.get().job, "num")


def with_arm(config: DictConfig) -> DictConfig:
    """Apply a study's arm to a configuration that was composed without it.

    Launchers that run cells in their own processes (joblib, submitit) pass on such configurations.

    Raises:
        ValueError: a study without an arm.
    """
    study = config.get("study")
    if study is None or study.get("applied"):
        return config
    if config.arm is None:
        if config.dry_run:
            return config
        have = ", ".join(study.get(config.scale, {}).get("arms", {}))
        raise ValueError(f"experiment={study.name} is a grid: add -m for all its cells, or arm=<one of {have}>")
    return compose("train", typed_overrides())


def take_list(group: str) -> list[str]:
    """Return the choices of a group given as a list, `task=[vqav2,textvqa]`; leave the first one on the command line.

    Hydra itself would merge them into one configuration; `compose_each` makes one of each.
    """
    for i, argument in enumerate(sys.argv):
        if match := re.fullmatch(rf"{group}=\[([\w\s,/-]*)\]", argument):
            names = [name.strip() for name in match[1].split(",") if name.strip()]
            if names:
                sys.argv[i] = f"{group}={names[0]}"
                return list(dict.fromkeys(names))
    return []


def compose_each(config: DictConfig, group: str, names: list[str]) -> dict[str, DictConfig]:
    """Compose the configuration once for every choice of a group, with the same other overrides; choice -> config."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    if len(names) < 2:
        return {str(hydra.runtime.choices.get(group)): config}
    others = [o for o in hydra.overrides.task if not re.match(rf"\+*{group}=", o)]
    return {name: compose(hydra.job.config_name, [*others, f"{group}={name}"]) for name in names}
