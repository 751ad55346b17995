"""The command line of train.py, eval.py and similar scripts."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fastvlm.commands import format_warning
from fastvlm.config.composition import CONF, quote_path, register, relax, with_arm
from fastvlm.config.mistakes import explain, interrupted, loader_died, refuse
from fastvlm.config.rules import check
from fastvlm.files import refusal
from fastvlm.hardware import is_first_rank


def command(config_name: str, task: Callable[[DictConfig], Any]) -> None:
    """Run `task` under Hydra's command line; a user's mistake is one line on stderr and exit status 2."""
    import hydra

    from fastvlm.study.arms import expand

    warnings.formatwarning = format_warning
    register()
    typed = shlex.join(["python", *sys.argv])
    if {"--help", "-h", "--cfg", "-c", "--info", "-i"}.intersection(sys.argv):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `| head` ends the listing quietly
    try:
        sys.argv[1:] = relax(expand([quote_path(word) for word in sys.argv[1:]]))
    except ValueError as error:
        refuse(str(error))
    # Hydra then raises its exceptions, which we explain; cells and ranks inherit both variables.
    show_traceback = "HYDRA_FULL_ERROR" in os.environ and "FASTVLM_ONE_LINE" not in os.environ
    if not show_traceback:
        os.environ |= {"HYDRA_FULL_ERROR": "1", "FASTVLM_ONE_LINE": "1"}
        sys.unraisablehook = ignore_dead_loader

    def checked(config: DictConfig):
        value = run_task(task, config, name=config_name, typed=typed, show_traceback=show_traceback)
        if (result := os.environ.get("FASTVLM_CELL_RESULT")) and is_first_rank():
            Path(result).write_text(json.dumps({"value": value}))
        return value

    try:
        hydra.main(config_path=str(CONF), config_name=config_name, version_base="1.3")(checked)()
    except KeyboardInterrupt:  # a sweep, whose cells print nothing about it
        interrupted(f"finished cells are kept, the same command goes on: {typed}")
    except Exception as error:
        if show_traceback:
            raise
        of_hydra = "Config group override must be" in str(error)  # Hydra raises a plain ValueError here
        if of_hydra or type(error).__module__.startswith(("hydra", "omegaconf")):
            refuse(explain(error, config_name))
        if isinstance(error, ValueError):  # a sweep whose cells failed
            refuse(str(error))
        if reason := refusal(error):  # Hydra makes the run's folder
            refuse(reason)
        raise


def ignore_dead_loader(unraisable: Any) -> None:
    """Print what Python cannot raise, except torch's word of a killed loader process.

    Its signal handler raises that wherever the run happens to be, in a finaliser, too; the next batch says it again.
    """
    if unraisable.exc_value is None or not loader_died(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def run_task(
    task: Callable[[DictConfig], Any], config: DictConfig, *, name: str, typed: str, show_traceback: bool
) -> Any:
    """Check a configuration and run `task` on it; print a user's mistake in one line and exit."""
    try:
        config = with_arm(config)
        check(config)
        return task(config)
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        if show_traceback:
            raise
        refuse(explain(error, name) if isinstance(error, (HydraException, OmegaConfBaseException)) else str(error))
    except (RuntimeError, EOFError, OSError) as error:
        reason = refusal(error)
        if show_traceback or not (reason or loader_died(error)):
            raise
        if reason:
            refuse(reason)
        what = str(error).splitlines()[0].strip() if str(error) else type(error).__name__
        refuse(
            f"a loader process was killed ({what}); out of memory? The same command goes on from the last "
            f"checkpoint: {typed}"
        )
    except KeyboardInterrupt:
        where = "here"
        if "checkpoint_every" in config:
            where = f"the last checkpoint (one every checkpoint_every={config.checkpoint_every} steps)"
        interrupted(f"the same command goes on from {where}: {typed}")
