"""What a study's sweep does before its first cell and after its last; the launcher calls both."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from fastvlm.study.arms import is_silent, key_of, load_study, value_of
from fastvlm.study.claims import load_claims
from fastvlm.study.recorded import log_report
from fastvlm.study.report import report, runs_folder


def prepare(config: DictConfig, jobs: list[list[str]]) -> None:
    """Check arms and claims, and make the MLflow store and the study's run once, before cells open it side by side.

    Raises:
        ValueError: an arm or a claim that is wrong, told before anything has run.
    """
    study = load_study(config.study.name)
    for arm in dict.fromkeys(value_of(job, "arm") for job in jobs):
        if arm is None:
            raise ValueError(f"experiment={study.name}: its grid has no arm; add arm=... to hydra.sweeper.params")
        study.overrides(arm, config.scale)
    load_claims(study, scale=config.scale)
    tracking(config).study_run(study.name, scale=config.scale)


def conclude(config: DictConfig, jobs: list[list[str]]) -> None:
    """Table, plots, page and verdicts of the study, here and in MLflow. A grid with other settings than the study's
    own leaves its page alone."""
    study = load_study(config.study.name)
    changed = sorted({key_of(o) for job in jobs for o in job if not is_silent(o)})
    if changed:
        print(f"\n{study.name}: run with {', '.join(changed)} changed, so its page stays as it is", flush=True)
        tracking(config).finish(tracking(config).study_run(study.name, scale=config.scale))
        return
    if Path(config.paths.runs).resolve() != runs_folder():
        print(f"\n{study.name}: for its report set FASTVLM_RUNS={config.paths.runs}", flush=True)
        return
    made = report(study.name)
    print(f"\n{study.name}")
    for line in made["verdicts"]:
        print(f"  {line}")
    for line in (*made["missing"], *made["remarks"]):
        print(f"  {line}")
    print(f"  {made['files'][0]}", flush=True)
    log_report(tracking(config), study, scale=config.scale, files=made["files"], verdicts=made["verdicts"])


def tracking(config: DictConfig):
    from fastvlm.build import instantiate

    return instantiate(config.logger, key="logger")
