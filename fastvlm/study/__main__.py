"""Studies: make their pages again, or look at one.

python -m fastvlm.study                          the studies there are; how many cells ran here, how many are published
python -m fastvlm.study report=llava_align       results.csv, plots, README.md, verdicts (from=runs|csv|mlflow)
python -m fastvlm.study report=all               all of them, and experiments/README.md
python -m fastvlm.study cells=llava_align        a line a cell: done, or the command that runs it alone
"""

from __future__ import annotations

import sys

from fastvlm.study.arms import load_study, study_names
from fastvlm.study.cells import planned, read_csv, read_runs
from fastvlm.study.report import report, report_all, runs_folder


def main(arguments: list[str]) -> None:
    given = dict(a.split("=", 1) for a in arguments if "=" in a)
    unknown = [a for a in arguments if a.split("=")[0] not in ("report", "from", "uri", "cells", "scale")]
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    if unknown:
        raise ValueError(f"{unknown[0]} is none of report=, cells=, from=, uri=, scale=; see --help")
    source = given.get("from", "auto")
    if given.get("report") == "all":
        report_all(source=source)
        print("experiments/README.md")
    elif "report" in given:
        made = report(given["report"], source=source, uri=given.get("uri"))
        for line in made["verdicts"] or ["no cell has run"]:
            print(line)
        for line in (*made["missing"], *made["remarks"]):
            print(line)
        print(made["files"][0])
    elif "cells" in given:
        list_cells(given["cells"], scale=given.get("scale", "micro"))
    else:
        for name in study_names():
            study = load_study(name)
            cells, missing = read_runs(study, runs_folder(), scale="micro")
            published = len(read_csv(study.folder / "results.csv", scale="micro"))
            count = f"{len(cells):3} of {len(cells) + len(missing):3}, {published:3} published"
            print(f"{name:28} {count}  {study.question}")


def list_cells(name: str, *, scale: str) -> None:
    study = load_study(name)
    _, missing = read_runs(study, runs_folder(), scale=scale)
    todo = {line.split(" ")[0].removeprefix("arm=") + line.split(" ")[1] for line in missing}
    for arm, seed in planned(study, scale=scale):
        again = f"python train.py experiment={name} scale={scale} arm={arm} seed={seed}"
        print(f"{arm:24} seed={seed}  {again if f'{arm}seed={seed}' in todo else 'done'}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
