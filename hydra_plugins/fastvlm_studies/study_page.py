"""A study's page under launchers of other hands (joblib, submitit), made when the sweep has ended."""

from __future__ import annotations

import functools
import sys
import time
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf


class StudyPage(Callback):
    """Checks a study and makes its MLflow run before the cells, its page after them; a cell that fails ends the sweep
    there, and `python -m fastvlm.study report=<study>` makes the page of what has run."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if not ours(config):
            return
        self.begun = time.time()
        from fastvlm.study.arms import value_of
        from fastvlm.study.sweep import prepare

        arms = value_of(list(config.hydra.overrides.task), "arm") or grid(config).get("arm", "")
        told(prepare, config, [[f"arm={arm.strip()}"] for arm in arms.split(",") if arm.strip()])

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if ours(config) and not config.dry_run:
            from fastvlm.study.sweep import conclude, time_grid

            changes = [*config.hydra.overrides.task, *(f"{key}=" for key in grid(config))]
            jobs = config.hydra.launcher.get("n_jobs")
            at_once = jobs if isinstance(jobs, int) and jobs > 0 else None
            told(functools.partial(time_grid, begun=self.begun, at_once=at_once), config, changes)
            told(conclude, config, changes)


def ours(config: DictConfig) -> bool:
    """Whether this is the sweep of a study whose launcher knows nothing of studies."""
    return config.get("study") is not None and "ProcessLauncher" not in config.hydra.launcher._target_


def grid(config: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(config.hydra.sweeper.get("params") or OmegaConf.create({}))


def told(step, *arguments: Any) -> None:
    """Hydra makes a warning of what a callback raises; a mistake is to end the command in one line."""
    try:
        step(*arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
