"""A Hydra launcher that runs every cell of a sweep in its own process.

Lightning's DDP starts its other ranks by running the command line again. Under `-m` each of them would repeat the whole
sweep, and with a sampling sweeper would silently train with other values. A cell in its own process is a plain single
run: its ranks agree, its memory is separate, and its failure does not affect other cells.
"""

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from fastvlm.warm import WarmProcess, WarmPython

RESULT = "FASTVLM_CELL_RESULT"
log = logging.getLogger(__name__)


@dataclass
class ProcessLauncherConfig:
    """`hydra.launcher.parallel`: cells run at once; null: one, or for a study as many as GPUs (else cores) allow.

    `hydra.launcher.warm`: fork cells from a process that has imported the libraries, which saves seconds per cell;
    null: if there is more than one cell, on Linux without a GPU (whose driver must not be forked).
    """

    _target_: str = "hydra_plugins.fastvlm_process_launcher.process_launcher.ProcessLauncher"
    parallel: Any = None
    warm: Any = None


ConfigStore.instance().store(group="hydra/launcher", name="process", node=ProcessLauncherConfig, provider="fastvlm")


class ProcessLauncher(Launcher):
    """Runs each cell as `python <script> <overrides>`; its objective comes back through a file.

    One at a time, cells share this terminal. In parallel, each gets a log file, an equal share of the cores (or its own
    GPUs), and a line here when it begins and ends.
    """

    def __init__(self, parallel: int | None = None, warm: bool | None = None):
        if parallel is not None and (not isinstance(parallel, int) or parallel < 1):
            raise ValueError(f"hydra.launcher.parallel={parallel} must be a number of 1 or more, or null")
        if warm not in (None, True, False):
            raise ValueError(f"hydra.launcher.warm={warm} must be true, false or null")
        self.parallel, self.warm = parallel, warm
        self.raise_failed = True  # False: the sweeper handles failures itself
        self.running: set[subprocess.Popen | WarmProcess] = set()
        self.stopping = False  # interrupted: cells that start after that end at once
        self.python: WarmPython | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        study, begun = self.config.get("study"), time.time()
        if study is not None:
            from fastvlm.study.sweep import prepare, time_grid

            prepare(self.config, [list(overrides) for overrides in job_overrides])
        slots = self.slots(len(job_overrides))
        free: queue.Queue = queue.Queue()
        for slot in slots:
            free.put(slot)
        jobs = [(initial_job_idx + i, list(overrides)) for i, overrides in enumerate(job_overrides)]
        if study is not None:
            jobs = in_turns(jobs, at_once=len(slots))
        warm = self.warm if self.warm is not None else len(jobs) > 1 and sys.platform == "linux" and not visible_gpus()
        changes = [override for _, overrides in jobs for override in overrides]
        try:
            with interruptible():
                self.python = WarmPython() if warm else None
                if len(slots) == 1:
                    cells = [self.cell(index, overrides, slots[0], quiet=False) for index, overrides in jobs]
                else:
                    cells = self.side_by_side(jobs, free, len(slots))
        except (KeyboardInterrupt, ValueError) as error:
            if study is not None:
                from fastvlm.study.sweep import end

                time_grid(self.config, changes, begun=begun, at_once=len(slots), jobs=[job for _, job in jobs])
                end(self.config, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        finally:
            if self.python is not None:
                self.python.close()
        cells.sort(key=lambda cell: cell.hydra_cfg)
        failed = [f"#{c.hydra_cfg} {' '.join(c.overrides)}" for c in cells if c.status is JobStatus.FAILED]
        faults = []
        if failed and self.raise_failed:
            faults.append(f"{len(failed)} of {len(cells)} cells failed: {'; '.join(failed)}")
        if study is not None and not self.config.dry_run:
            from fastvlm.study.sweep import conclude

            time_grid(self.config, changes, begun=begun, at_once=len(slots), jobs=[job for _, job in jobs])
            try:
                conclude(self.config, changes)
            except ValueError as error:
                faults.append(f"the study has no new page: {error}")
        if faults:
            # Raised once all cells have run; the same command again runs only the failed ones.
            raise ValueError("; ".join(faults))
        return cells

    def slots(self, num_jobs: int) -> list[dict[str, str]]:
        """Return the environment of each of the cells that run in parallel: its threads and GPUs."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        devices = self.config.get("hardware", {}).get("devices", "auto")
        ranks = devices if isinstance(devices, int) else 1
        gpus = visible_gpus() if self.config.get("hardware", {}).get("accelerator", "auto") != "cpu" else []
        number = self.parallel
        if number is None:
            room = len(gpus) // ranks if gpus else cores // ranks
            number = max(1, room) if self.config.get("study") is not None else 1
        number = max(1, min(number, num_jobs))
        if number == 1:
            return [{}]
        # On GPUs this is per rank; on a CPU a cell divides its threads among its ranks itself.
        share = cores // (number * ranks) if gpus else cores // number
        threads = int(os.environ.get("OMP_NUM_THREADS", max(1, share)))
        slots = [{"OMP_NUM_THREADS": str(threads)} for _ in range(number)]
        for place, slot in enumerate(slots if gpus else []):
            own = [gpus[(place * ranks + rank) % len(gpus)] for rank in range(ranks)]
            slot["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        return slots

    def side_by_side(self, jobs: list, free: queue.Queue, number: int) -> list:
        def run(job) -> JobReturn:
            slot = free.get()
            try:
                return self.cell(*job, slot, quiet=True)
            finally:
                free.put(slot)

        pool = ThreadPoolExecutor(number)
        futures = [pool.submit(run, job) for job in jobs]
        try:
            return [future.result() for future in futures]
        except KeyboardInterrupt:
            for future in futures:
                future.cancel()
            self.stopping = True
            for process in list(self.running):  # a terminal signals them, too; a `kill` of this process does not
                process.send_signal(signal.SIGINT)
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def cell(self, index: int, overrides: list[str], environment: dict[str, str], *, quiet: bool) -> JobReturn:
        # Hydra passes `~group` on as `~group=null`, which matches only a group whose choice is null.
        overrides = [o.removesuffix("=null") if o.startswith("~") else o for o in overrides]
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = f"cell_{index}", index
        title = f"#{index} {' '.join(filter_overrides(overrides)) or '(defaults)'}"
        begun = time.time()
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            output = self.log_file(index, overrides) if quiet else None
            print(f"{title}  -> {output}" if quiet else f"\n{title}", flush=True)
            status = self.run_process(overrides, os.environ | environment | {RESULT: str(result)}, output)
            value = json.loads(result.read_text())["value"] if result.exists() else None
        cell = JobReturn(overrides=overrides, cfg=config, hydra_cfg=index, working_dir=os.getcwd(), task_name="train")
        if status == 0:
            if self.config.get("study") is not None:
                from fastvlm.study.sweep import check_yield

                check_yield(self.config, overrides)
            cell.status, cell.return_value = JobStatus.COMPLETED, value
            if quiet:
                print(f"{title}  done in {time.time() - begun:.0f} s: {value}", flush=True)
            return cell
        if status in (130, -2):
            raise KeyboardInterrupt
        why = f": {last_line(output)}" if output else ""
        print(f"#{index} failed (status {status}){why}; the other cells go on", file=sys.stderr, flush=True)
        cell.status = JobStatus.FAILED
        return cell

    def run_process(self, overrides: list[str], environment: dict[str, str], output: Path | None) -> int:
        command = [str(Path(sys.argv[0]).resolve()), *overrides]
        with open(output, "w") if output else open(os.devnull) as stream:
            to_file = {"stdout": stream, "stderr": stream} if output else {}
            if self.python is not None:
                process = self.python.start(command, env=environment, **to_file)
            else:
                process = subprocess.Popen([sys.executable, *command], env=environment, **to_file)
            self.running.add(process)
            if self.stopping:  # it waited for the warm process's imports
                process.send_signal(signal.SIGINT)
            try:
                return process.wait()
            except KeyboardInterrupt:
                process.send_signal(signal.SIGINT)
                process.wait()
                raise
            finally:
                self.running.discard(process)

    def log_file(self, index: int, overrides: list[str]) -> Path:
        folder = Path(self.config.paths.runs) / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        label = "".join(c if c.isalnum() or c in "=.,-" else "_" for c in ",".join(filter_overrides(overrides)))
        return folder / f"{label[:120] or 'defaults'}-{index}.log"


@contextmanager
def interruptible() -> Iterator[None]:
    """End the block by KeyboardInterrupt on SIGTERM and SIGINT, so that `kill` ends the running cells as Ctrl-C does.

    A shell script starts its background commands with SIGINT ignored, and cells would ignore it, too.
    """
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def in_turns(jobs: list[tuple[int, list[str]]], *, at_once: int) -> list[tuple[int, list[str]]]:
    """Order a study's cells by groups of at least `at_once` seeds, and by arm within each group.

    Paired arms then run close together, so that a slow hour of the machine affects all of them. Parallel cells have
    different seeds, so they do not wait for each other's stages; a smaller last group would have cells of one seed side
    by side, so the last seeds join the group before.
    """
    from fastvlm.study.arms import value_of

    seeds = list(dict.fromkeys(value_of(overrides, "seed") for _, overrides in jobs))
    last = max(1, len(seeds) // at_once) - 1
    return sorted(jobs, key=lambda job: (min(seeds.index(value_of(job[1], "seed")) // at_once, last), job[0]))


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that cells may use, without importing torch."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in given.split(",") if name.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(i) for i, line in enumerate(listed.splitlines()) if line.startswith("GPU")]


def last_line(file: Path) -> str:
    lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else "it said nothing"
