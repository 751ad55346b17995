"""What a study decides: experiments/<study>/claims.yaml, one entry per claim."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fastvlm.study.arms import Study
from fastvlm.study.metrics import metric_of
from fastvlm.study.yaml_file import read_yaml

DIRECTIONS = ("higher", "lower", "same")
STATUSES = ("paper", "official-repository", "secondary", "derived", "unverified")


@dataclass
class Claim:
    """One sentence that runs can contradict.

    Args:
        claim: the sentence.
        paper, table: its source.
        metric: the metric that decides; those in `beside` are only shown. Rows of fastvlm/study/metrics.py.
        direction: the metric of the first arm compared with the second: higher, lower or same.
        steps: [first, second] arm at equal optimiser steps, summed over the stages that an arm trains itself. If the
            steps are not equal, the verdict is one of the arms as planned and is shown with both numbers.
        planned: the pair as the paper runs it, if its arms take unequal steps on purpose; `steps` or `compute` then
            name other arms.
        compute: the pair at equal operations; may be omitted if `planned`, else `steps`, has about equal operations.
        margin: for `same`, the largest difference allowed (above 0, required); for higher or lower, what the
            difference must exceed, below 0 for "no worse than".
        factor: replaces `margin`: by what factor the metric must at least be higher or lower. For times and sizes,
            whose differences mean nothing on another machine. Decided on logarithms.
        size: the paper's difference in words.
        optimum: [first, second], each arm -> the value it was given. The claim is then about the value at which the
            metric is best, on a log scale, not about the metric; `steps` names an arm of each for the cost.
        figures: the paper's numbers: values of `key` in paper.csv.
    """

    claim: str
    paper: str
    table: str
    metric: str
    direction: str
    steps: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    planned: list[str] = field(default_factory=list)
    compute: list[str] = field(default_factory=list)
    margin: float = 0.0
    factor: float | None = None
    size: str = ""
    figures: list[str] = field(default_factory=list)
    optimum: list[dict[str, float]] = field(default_factory=list)

    @property
    def pair(self) -> tuple[str, str]:
        """The first pair: the one that the claim is about before steps or operations are made equal."""
        first, second = self.planned or self.steps
        return first, second

    @property
    def arms(self) -> set[str]:
        """All arms that decide it."""
        return {*self.planned, *self.steps, *self.compute, *(arm for one in self.optimum for arm in one)}

    def lacks(self, arms: Collection[str]) -> list[str]:
        """Return the arms of its first pair or optimum that are not in `arms`; without them it cannot be decided."""
        first = dict.fromkeys((*self.pair, *(arm for one in self.optimum for arm in one)))
        return [arm for arm in first if arm not in arms]

    @property
    def sized(self) -> bool:
        """Whether it says how large the difference is, in units of `metric`; this does not apply to other metrics."""
        return self.direction == "same" or self.margin != 0 or self.factor not in (None, 1)


def load_claims(study: Study, *, scale: str = "micro") -> list[Claim]:
    """Return a study's claims whose first pair exists at this scale."""
    return [claim for claim in all_claims(study) if not claim.lacks(study.arms.get(scale, {}))]


def all_claims(study: Study) -> list[Claim]:
    """Read and check a study's claims, of all scales.

    Raises:
        ValueError: no file or no claim in it, an unknown key, metric or direction, an arm that exists at no scale.
    """
    file = study.folder / "claims.yaml"
    if not file.is_file():
        raise ValueError(f"{file} is missing: a study without a claim decides nothing")
    entries, claims = read_yaml(file), []
    if not entries:
        raise ValueError(f"{file} is empty: a study without a claim decides nothing")
    if not isinstance(entries, list):
        raise ValueError(f"{file} is not a list; a claim begins with `- claim: `")
    for number, entry in enumerate(entries, 1):
        where = f"{file}, claim {number}"
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: {entry} has no keys; a claim begins with `- claim: `")
        try:
            merged = OmegaConf.merge(OmegaConf.structured(Claim), entry)
            claim = Claim(**OmegaConf.to_container(merged, throw_on_missing=True))
        except (OmegaConfBaseException, TypeError) as error:
            raise ValueError(f"{where}: {str(error).splitlines()[0]}") from None
        check(claim, study, where=where)
        claims.append(claim)
    return claims


def check(claim: Claim, study: Study, *, where: str) -> None:
    if claim.direction not in DIRECTIONS:
        raise ValueError(f"{where}: direction={claim.direction} is not one of {', '.join(DIRECTIONS)}")
    if claim.direction == "same" and claim.margin <= 0:
        raise ValueError(f"{where}: direction=same needs a margin above 0")
    if claim.factor is not None and (claim.factor <= 0 or claim.margin or claim.optimum or claim.direction == "same"):
        raise ValueError(f"{where}: factor={claim.factor:g} must be above 0, with direction higher or lower, no margin")
    for metric in (claim.metric, *claim.beside):
        try:
            metric_of(metric)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    arms = sorted({arm for at in study.arms.values() for arm in at})
    if claim.optimum and (len(claim.optimum) != 2 or min(map(len, claim.optimum)) < 3):
        raise ValueError(f"{where}: optimum names two sets of three arms or more, each with its value")
    if not claim.planned and not claim.steps:
        raise ValueError(f"{where}: steps names two arms, the one that the claim favours first (or planned does)")
    for basis in ("planned", "steps", "compute"):
        pair = getattr(claim, basis)
        if len(pair) not in (0, 2):
            raise ValueError(f"{where}: {basis} names two arms, the one that the claim favours first")
        for arm in (*pair, *(arm for one in claim.optimum for arm in one)):
            if arm not in arms:
                near = difflib.get_close_matches(arm, arms, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                have = ", ".join(arms)
                raise ValueError(f"{where}: {basis}: there is no arm {arm}, only {have}{hint}")


@dataclass(frozen=True)
class Figure:
    """One number of a paper; `status` says how reliable it is."""

    key: str
    table: str
    setting: str
    metric: str
    value: str
    status: str


def figures_of(study: Study, claims: Sequence[Claim]) -> dict[str, Figure]:
    """Read a study's paper.csv and check that it has the figures that its claims name."""
    figures = load_figures(study.folder)
    for key in (key for claim in claims for key in claim.figures):
        if key not in figures:
            near = difflib.get_close_matches(key, figures, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{study.folder}/claims.yaml: figures names {key}, which paper.csv has not{hint}")
    return figures


def load_figures(folder: Path) -> dict[str, Figure]:
    """Read a study's paper.csv (key, table, setting, metric, value, status) into key -> figure; empty without a file.

    Raises:
        ValueError: other columns than these, an unknown status, or a duplicate key.
    """
    file = folder / "paper.csv"
    figures: dict[str, Figure] = {}
    if not file.is_file():
        return figures
    with open(file, newline="", encoding="utf-8") as stream:
        reader, columns = csv.DictReader(stream), [one.name for one in fields(Figure)]
        if sorted(reader.fieldnames or ()) != sorted(columns):
            raise ValueError(f"{file}: its columns are {', '.join(reader.fieldnames or ())}, not {', '.join(columns)}")
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"{file}, line {reader.line_num}: not {len(columns)} values; quote those with commas")
            figure = Figure(**row)
            if figure.status not in STATUSES:
                raise ValueError(f"{file}: {figure.key}: status={figure.status} is not one of {', '.join(STATUSES)}")
            if figure.key in figures:
                raise ValueError(f"{file}: {figure.key} stands twice")
            figures[figure.key] = figure
    return figures
