"""Studies: list them, write their reports again, or list the cells of one.

python -m fastvlm.study                          list the studies; how many cells ran here, how many are published
python -m fastvlm.study report=llava_align       write results.csv, plots, README.md; verdicts at every scale that ran
    from=runs|csv|mlflow|auto                    where to read cells; auto: run directories, else results.csv
    uri=sqlite:////path/to/mlflow.db             with from=mlflow: the store, if not the one among the run directories
python -m fastvlm.study report=all               report all studies and write experiments/README.md (from=runs|csv|auto)
python -m fastvlm.study cells=llava_align        one line per cell: done, or the command that runs it (scale=paper)
"""

from __future__ import annotations

import difflib
import sys

from fastvlm.study.arms import SCALES, Study, load_study, study_names, unreadable
from fastvlm.study.cells import num_ran, planned, read_csv, read_runs, wanted
from fastvlm.study.report import SOURCES, report, report_all, runs_folder, say

KEYS = ("report", "from", "uri", "cells", "scale")


def main(arguments: list[str]) -> None:
    """Run the command that the arguments give.

    Raises:
        ValueError: an unknown key, or one that the command does not use.
    """
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    given = read(arguments)
    source = given.get("from", "auto")
    if given.get("report") == "all":
        report_all(source=source)
        print("experiments/README.md")
    elif "report" in given:
        made = report(given["report"], source=source, uri=given.get("uri"))
        print("\n".join([*say(made), str(made["files"][0])]))
    elif "cells" in given:
        list_cells(given["cells"], scale=given.get("scale", "micro"))
    else:
        list_studies()


def read(arguments: list[str]) -> dict[str, str]:
    """Parse `key=value` arguments; a key that the command does not use is a ValueError."""
    given: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in KEYS or not value:
            near = difflib.get_close_matches(key, KEYS, 1)
            hint = f"; did you mean {near[0]}=?" if near and key not in KEYS else ""
            raise ValueError(f"{argument} is not one of {', '.join(f'{k}=...' for k in KEYS)}{hint}; see --help")
        if key in given:
            raise ValueError(f"{key}= stands twice; give one")
        given[key] = value
    if {"report", "cells"} <= given.keys():
        raise ValueError("report= and cells= are two commands; give one")
    needs = {"from": "report", "uri": "report", "scale": "cells"}
    for key, command in needs.items():
        if key in given and command not in given:
            all_scales = "; a report has every scale that ran" if key == "scale" and "report" in given else ""
            raise ValueError(f"{key}= goes with {command}=...{all_scales}")
    source = given.get("from", "auto")
    if source not in SOURCES:
        raise ValueError(f"from={source} is not one of {', '.join(SOURCES)}")
    if "uri" in given and source != "mlflow":
        raise ValueError("uri= names an MLflow store and goes with from=mlflow")
    if given.get("report") == "all" and source == "mlflow":
        raise ValueError("report=all reads run directories or results.csv; name one study with from=mlflow")
    if given.get("scale", "micro") not in SCALES:
        raise ValueError(f"scale={given['scale']} is not one of {', '.join(SCALES)}")
    return given


def list_studies() -> None:
    """Print one line per study.

    Raises:
        ValueError: studies that cannot be read, once the others are listed.
    """
    faults = unreadable()
    for name in study_names():
        try:
            print(line_of(load_study(name)))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("; ".join(faults))


def line_of(study: Study) -> str:
    here, grid = num_ran(study, runs_folder(), scale="micro"), len(planned(study, scale="micro"))
    published = len(read_csv(study.folder / "results.csv", scale="micro"))
    return f"{study.name:28} {here:3} of {grid:3}, {published:3} published  {study.question}"


def list_cells(name: str, *, scale: str) -> None:
    study = load_study(name)
    if scale not in study.arms:
        raise ValueError(f"scale={scale}: experiment={name} has {', '.join(study.arms)}")
    cells, missing = read_runs(study, runs_folder(), scale=scale)
    done = {(cell.arm, cell.seed): "done" for cell in cells}
    todo = {(one.arm, one.seed): f"{again(name, scale, one.arm, one.seed)}   # {one.reason}" for one in missing}
    for arm, seed in wanted(study, [*done, *todo], scale=scale):
        print(f"{arm:24} seed={seed}  {(done | todo)[arm, seed]}")


def again(name: str, scale: str, arm: str, seed: int) -> str:
    return f"python train.py experiment={name} scale={scale} arm={arm} seed={seed}"


def command(arguments: list[str]) -> int:
    """Run `main`, print an error as one line, and return the exit status."""
    try:
        main(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\ninterrupted: every file is as it was or as it is to be; the same command makes the rest", file=sys.stderr
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
