"""A Hydra sweeper that searches: Optuna proposes values, and cells report their objective.

`hydra-optuna-sweeper` requires Optuna 2, whose storage does not work with the SQLAlchemy that MLflow needs, and without
storage a search cannot be continued. This sweeper stores its trials in a file, supports several objectives, and works
with any launcher.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

SAMPLERS = ("tpe", "random", "nsga2", "gp")


@dataclass
class OptunaSweeperConfig:
    """Configuration of `hydra/sweeper=optuna`.

    Ranges are given in `params` or on the command line, in Hydra's syntax: `choice(4,16)`, `range(1,5)`,
    `interval(1e-4,1e-2)`, `tag(log,interval(1e-4,1e-2))`.
    """

    _target_: str = "hydra_plugins.fastvlm_optuna_sweeper.optuna_sweeper.OptunaSweeper"
    directions: list[str] = field(default_factory=lambda: ["maximize"])  # of the run's `objective`, one each
    n_trials: int = 20
    batch: int = 1  # trials proposed at once, which the launcher may run in parallel
    sampler: str = "tpe"
    seed: int = 0
    study: str | None = None  # name of the search; null: the searched keys. A hash of the other settings is appended
    params: dict[str, Any] = field(default_factory=dict)


ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=OptunaSweeperConfig, provider="fastvlm")


class OptunaSweeper(Sweeper):
    """Proposes and launches trials and reports their results; the same command continues until `n_trials` are done."""

    def __init__(
        self,
        directions: Sequence[str] = ("maximize",),
        n_trials: int = 20,
        batch: int = 1,
        sampler: str = "tpe",
        seed: int = 0,
        study: str | None = None,
        params: DictConfig | None = None,
    ):
        if wrong := [d for d in directions if d not in ("maximize", "minimize")]:
            raise ValueError(f"hydra.sweeper.directions: {wrong[0]} is neither maximize nor minimize")
        if sampler not in SAMPLERS:
            raise ValueError(f"hydra.sweeper.sampler={sampler} is not one of {', '.join(SAMPLERS)}")
        if n_trials < 1 or batch < 1:
            raise ValueError(f"hydra.sweeper.n_trials={n_trials} and batch={batch} must be 1 or more")
        self.directions, self.n_trials, self.batch = list(directions), n_trials, batch
        self.sampler, self.seed, self.study = sampler, seed, study
        self.num_failed = 0
        self.params = {} if params is None else OmegaConf.to_container(params)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        try:
            import optuna
        except ImportError:
            raise ValueError("hydra/sweeper=optuna needs Optuna: pip install '.[sweep]'") from None
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        logging.getLogger("optuna").setLevel(logging.WARNING)
        fixed, searched = self.ranges(arguments, optuna.distributions)
        if not searched:
            raise ValueError("nothing to search: give a range, such as resampler.num_tokens=choice(4,16)")
        name = f"{self.study or ','.join(sorted(searched))}-{self.settings(fixed, searched)}"
        folder = Path(self.config.paths.runs) / "searches"
        folder.mkdir(parents=True, exist_ok=True)
        label = "".join(c if c.isalnum() or c in ".,-" else "_" for c in name)[:100]
        study = optuna.create_study(
            study_name=name,
            storage=JournalStorage(JournalFileBackend(str(folder / f"{label}.log"))),
            sampler=self.make_sampler(optuna.samplers, folder / f"{label}.log"),
            directions=self.directions,
            load_if_exists=True,
        )
        self.launcher.raise_failed = False  # a failed trial is reported to the search, which continues
        while (left := self.n_trials - self.ended(study, optuna)) > 0:
            trials = [study.ask(searched) for _ in range(min(self.batch, left))]
            jobs = [[*fixed, *(f"{key}={trial.params[key]}" for key in searched)] for trial in trials]
            try:
                cells = self.launcher.launch(jobs, initial_job_idx=trials[0].number)
            except BaseException:
                for trial in trials:  # they did not end; the next run proposes new ones
                    study.tell(trial, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)
                raise
            for trial, cell in zip(trials, cells):
                self.tell(study, trial, cell, optuna)
        self.conclude(study, folder / f"{label}.json")

    def settings(self, fixed: list[str], searched: dict[str, Any]) -> str:
        """Return a hash of configuration, ranges and objectives; if one of them differs, it is another search."""
        from fastvlm.identity import hash_of, portable_hash
        from fastvlm.study.arms import is_silent

        kept = sorted(o for o in fixed if not is_silent(o) or o.startswith(("seed=", "experiment=")))
        ranges = {key: repr(distribution) for key, distribution in searched.items()}
        config = self.hydra_context.config_loader.load_sweep_config(self.config, self.first_trial(fixed, searched))
        with open_dict(config):
            del config["hydra"], config["name"]  # where it runs
        composed = portable_hash(OmegaConf.to_container(config, resolve=True, throw_on_missing=False))
        return hash_of([composed, kept, ranges, self.directions, str(self.config.get("objective"))])[:8]

    @staticmethod
    def first_trial(fixed: list[str], searched: dict[str, Any]) -> list[str]:
        """Return the overrides of a trial with the first value of every range."""
        first = {key: one.choices[0] if hasattr(one, "choices") else one.low for key, one in searched.items()}
        return [*fixed, *(f"{key}={value}" for key, value in first.items())]

    def ranges(self, arguments: list[str], distributions) -> tuple[list[str], dict[str, Any]]:
        """Split overrides into (those that every trial has, key -> distribution to search)."""
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        # `params` are parsed like the command line; a number or list there is a single value.
        given = [f"{key}={value}" for key, value in self.params.items()]
        overrides: list[Override] = parser.parse_overrides([*given, *arguments])
        parsed = {o.get_key_element().lstrip("+"): o for o in overrides}
        fixed, searched = [], {}
        for key, override in parsed.items():
            value = override.value()
            if not override.is_sweep_override():
                fixed.append(override.input_line)
            elif isinstance(value, ChoiceSweep):
                choices = [str(v) if not isinstance(v, bool | int | float | str) else v for v in value.list]
                searched[key] = distributions.CategoricalDistribution(choices)
            elif isinstance(value, RangeSweep):
                whole = all(float(v).is_integer() for v in (value.start, value.stop, value.step))
                kind = distributions.IntDistribution if whole else distributions.FloatDistribution
                # Hydra's range excludes its stop.
                steps = math.ceil(round((value.stop - value.start) / value.step, 9)) - 1
                low, high = sorted((value.start, round(value.start + value.step * steps, 12)))
                searched[key] = kind(low, high, step=abs(value.step))
            elif isinstance(value, IntervalSweep):
                log = "log" in value.tags
                whole = isinstance(value.start, int) and isinstance(value.end, int)
                kind = distributions.IntDistribution if whole else distributions.FloatDistribution
                searched[key] = kind(value.start, value.end, log=log)
            else:
                raise ValueError(f"{override.input_line}: write choice(...), range(...) or interval(...)")
        return fixed, searched

    def make_sampler(self, samplers, journal: Path):
        # A continued search must not draw its first proposals again, so its seed depends on the journal's length.
        seed = self.seed + (len(journal.read_bytes().splitlines()) if journal.exists() else 0)
        return {
            "tpe": lambda: samplers.TPESampler(seed=seed, n_startup_trials=min(10, max(2, self.n_trials // 3))),
            "random": lambda: samplers.RandomSampler(seed=seed),
            "nsga2": lambda: samplers.NSGAIISampler(seed=seed),
            "gp": lambda: samplers.GPSampler(seed=seed),
        }[self.sampler]()

    @staticmethod
    def ended(study, optuna) -> int:
        return len(study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE]))

    def tell(self, study, trial, cell, optuna) -> None:
        """Report a cell's result to the search.

        Raises:
            ValueError: `objective` and `directions` differ in number, a trial that ended has no such metric, or more
                than `n_trials` trials of this command have failed: by their status, or because a metric is no number.
        """
        if cell.status is JobStatus.COMPLETED and cell.return_value is None:
            names = ", ".join(self.config.get("objective", ["objective"]))
            raise ValueError(f"objective=[{names}]: the task yields no such metric; name one of its own")
        values = cell.return_value if cell.status is JobStatus.COMPLETED else math.nan
        values = values if isinstance(values, list | tuple) else [values]
        if any(math.isnan(value) for value in values):
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            self.num_failed += 1
            if self.num_failed > self.n_trials:
                raise ValueError(f"{self.num_failed} trials have failed or have a metric that is NaN; the search ends")
            return
        if len(values) != len(self.directions):
            raise ValueError(
                f"objective has {len(values)} metrics, hydra.sweeper.directions {len(self.directions)}; give one each"
            )
        study.tell(trial, [float(value) for value in values])

    def conclude(self, study, file: Path) -> None:
        """Print and write the best trial, or with several objectives the Pareto front."""
        best = study.best_trials if len(self.directions) > 1 else [study.best_trial]
        best = sorted(best, key=lambda trial: trial.values)
        names = list(self.config.get("objective", ["objective"]))
        rows = [{"trial": t.number, "params": t.params, "values": dict(zip(names, t.values))} for t in best]
        file.write_text(json.dumps({"directions": self.directions, "best": rows}, indent=1))
        print(f"\nbest of {len(study.trials)} trials ({file})")
        for row in rows:
            values = ", ".join(f"{name} {value:.4g}" for name, value in row["values"].items())
            print(f"  #{row['trial']} {values}: {' '.join(f'{k}={v}' for k, v in row['params'].items())}", flush=True)
