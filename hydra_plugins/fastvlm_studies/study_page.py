"""Make a study's page after a sweep with a third-party launcher (joblib, submitit)."""

from __future__ import annotations

import atexit
import functools
import sys
import time
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf


class StudyPage(Callback):
    """Checks a study and creates its MLflow run before the cells, and makes its page after them.

    A failed cell ends the sweep, and Hydra does not come back here: the study's run is then ended at exit.
    `python -m fastvlm.study report=<study>` makes the page of what has run.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if not ours(config):
            return
        self.begun = time.time()
        from fastvlm.study.arms import swept, value_of
        from fastvlm.study.sweep import prepare

        arms = value_of(list(config.hydra.overrides.task), "arm") or grid(config).get("arm", "")
        told(prepare, config, [[f"arm={arm}"] for arm in swept(arms)])
        if not config.dry_run:
            atexit.register(self.fail, config)

    def fail(self, config: DictConfig) -> None:
        from fastvlm.study.sweep import end

        end(config, "FAILED")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if ours(config) and not config.dry_run:
            from fastvlm.study.sweep import conclude, time_grid

            atexit.unregister(self.fail)
            changes = [*config.hydra.overrides.task, *(f"{key}=" for key in grid(config))]
            jobs = config.hydra.launcher.get("n_jobs")
            at_once = jobs if isinstance(jobs, int) and jobs > 0 else None
            told(functools.partial(time_grid, begun=self.begun, at_once=at_once), config, changes)
            told(conclude, config, changes)


def ours(config: DictConfig) -> bool:
    """Return whether this is a study's sweep with a launcher that does not know about studies."""
    return config.get("study") is not None and "ProcessLauncher" not in config.hydra.launcher._target_


def grid(config: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(config.hydra.sweeper.get("params") or OmegaConf.create({}))


def told(step, *arguments: Any) -> None:
    """Run a step and exit with one line on a mistake; Hydra would turn what a callback raises into a warning."""
    try:
        step(*arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
