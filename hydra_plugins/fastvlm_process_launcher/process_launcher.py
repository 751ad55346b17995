"""A launcher that gives every cell of a sweep a process of its own.

Lightning's DDP starts its other ranks by running the command line again; under `-m` each of them would replay the whole
sweep, and with a sampling sweeper train with other values in silence. A cell in its own process is a plain single run:
its ranks agree, its memory is its own, and its failure leaves the other cells alone.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

RESULT = "FASTVLM_CELL_RESULT"
log = logging.getLogger(__name__)


@dataclass
class ProcessLauncherConfig:
    _target_: str = "hydra_plugins.fastvlm_process_launcher.process_launcher.ProcessLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="process", node=ProcessLauncherConfig, provider="fastvlm")


class ProcessLauncher(Launcher):
    """Cells run one after another, each as `python <script> <overrides>`; its objective comes back through a file."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        cells = [self.cell(initial_job_idx + i, list(overrides)) for i, overrides in enumerate(job_overrides)]
        if failed := [f"#{c.hydra_cfg} {' '.join(c.overrides)}" for c in cells if c.status is JobStatus.FAILED]:
            # Raised once all have had their turn; the same command again runs the failed ones alone.
            raise ValueError(f"{len(failed)} of {len(cells)} cells failed: {'; '.join(failed)}")
        return cells

    def cell(self, index: int, overrides: list[str]) -> JobReturn:
        # Hydra hands `~group` on as `~group=null`, which asks for a group whose choice is null.
        overrides = [o.removesuffix("=null") if o.startswith("~") else o for o in overrides]
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = f"cell_{index}", index
        print(f"\n#{index} {' '.join(filter_overrides(overrides)) or '(defaults)'}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            done = subprocess.run(
                [sys.executable, str(Path(sys.argv[0]).resolve()), *overrides],
                env=os.environ | {RESULT: str(result)},
                check=False,
            )
            value = json.loads(result.read_text())["value"] if result.exists() else None
        cell = JobReturn(overrides=overrides, cfg=config, hydra_cfg=index, working_dir=os.getcwd(), task_name="train")
        if done.returncode == 0:
            cell.status, cell.return_value = JobStatus.COMPLETED, value
        else:
            if done.returncode in (130, -2):
                raise KeyboardInterrupt
            print(f"#{index} failed (status {done.returncode}); the other cells go on", file=sys.stderr, flush=True)
            cell.status = JobStatus.FAILED
        return cell
