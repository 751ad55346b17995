"""From rows to what they say of a claim: which cells are a pair, on which basis, and the verdict."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from fastvlm.study.cells import Cell, mean_cost
from fastvlm.study.claims import Claim
from fastvlm.study.metrics import HIGHER, LOWER, metric_of
from fastvlm.study.verdicts import Verdict, decide, decide_same, describe_only

# Within these shares of each other steps and operations count as equal.
EQUAL_STEPS = 0.02
EQUAL_COMPUTE = 0.05


@dataclass(frozen=True)
class Decided:
    """A claim, one of its metrics, on one basis, and what the seeds say.

    Args:
        basis: steps or compute, where they are equal; planned, where the arms take what they take.
        steps: optimiser steps of the two arms, means over seeds; None where one has not run.
        verdict: None where nothing can be said; `why` then says why, `short` in few words.
        as_factor: the verdict's numbers are natural logarithms of a factor.
        below: parts, in words, that differ between the arms and of which each arm has one training for all seeds.
        other: cells of these arms are of another configuration than theirs is now.
    """

    claim: Claim
    metric: str
    basis: str
    pair: tuple[str, str]
    steps: tuple[float, float] | None
    verdict: Verdict | None
    why: str = ""
    short: str = ""
    as_factor: bool = False
    below: tuple[str, ...] = ()
    other: bool = False

    @property
    def compared(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The arms on either side."""
        first, second = self.claim.optimum or [[arm] for arm in self.pair]
        return tuple(first), tuple(second)

    @property
    def on(self) -> str:
        """The basis in words that may follow a verdict; unequal steps are told."""
        if self.basis != "planned":
            return f"at equal {self.basis}"
        if self.steps is None:
            return "as planned"
        return f"as planned ({self.steps[0]:.0f} against {self.steps[1]:.0f} steps)"


def by_seed(cells: list[Cell], arm: str, metric: str) -> dict[int, float]:
    return {cell.seed: cell.metrics[metric] for cell in cells if cell.arm == arm and metric in cell.metrics}


def best_values(cells: list[Cell], values: dict[str, float], metric: str) -> dict[int, float]:
    """Seed -> log2 of the value at which the metric is best: the vertex of the parabola through the best arm and its
    neighbours on a log scale, the arm itself at an end of the range."""
    arms = sorted(values, key=values.__getitem__)
    sign = -1.0 if metric_of(metric).better == HIGHER else 1.0
    scores = [by_seed(cells, arm, metric) for arm in arms]
    found = {}
    for seed in sorted(set.intersection(*(set(score) for score in scores))):
        y = [sign * score[seed] for score in scores]
        x = [math.log2(values[arm]) for arm in arms]
        best = y.index(min(y))
        found[seed] = x[best]
        if 0 < best < len(arms) - 1:
            a, b, _ = np.polyfit(x[best - 1 : best + 2], y[best - 1 : best + 2], 2)
            found[seed] = float(-b / (2 * a)) if a > 0 else x[best]
    return found


def decide_claim(claim: Claim, cells: list[Cell], *, arms: Collection[str] | None = None) -> list[Decided]:
    """Every metric of a claim on every basis; the deciding metric first. A claim about a cost, and a law over sizes,
    have no equal compute.

    Args:
        arms: those that the cells' scale has; None: all.

    Raises:
        ValueError: cells of the claim's arms, none of which has the metric that decides.
    """
    mine = [cell for cell in cells if cell.arm in claim.arms]
    known = sorted({name for cell in mine for name in cell.metrics})
    if mine and claim.metric not in known:
        near = difflib.get_close_matches(claim.metric, known, 1, 0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"the claim '{claim.claim}' is decided on {claim.metric}, which no task yielded{hint}")
    pairs = {"planned": claim.planned, "steps": claim.steps}
    if not metric_of(claim.metric).cost and not claim.optimum:
        pairs["compute"] = claim.compute or claim.pair
    return [
        decide_pair(claim, metric, basis, tuple(pair), cells, arms=arms)
        for metric in (claim.metric, *claim.beside)
        for basis, pair in pairs.items()
        if pair
    ]


def decide_pair(
    claim: Claim,
    metric: str,
    basis: str,
    pair: tuple[str, str],
    cells: list[Cell],
    *,
    arms: Collection[str] | None = None,
) -> Decided:
    def none(why: str, short: str) -> Decided:
        return Decided(claim, metric, basis, pair, steps, None, why, short)

    first, second = pair
    steps = None
    ran = {cell.arm for cell in cells}
    compared = [arm for one in claim.optimum for arm in one] or list(pair)
    needed = dict.fromkeys((*pair, *compared))
    if lacks := [arm for arm in needed if arms is not None and arm not in arms]:
        why = f"{' and '.join(lacks)} {'are' if lacks[1:] else 'is'} no arm at this scale"
        return none(why, "no arm at this scale")
    if idle := [arm for arm in needed if arm not in ran]:
        return none(f"{' and '.join(idle)} {'have' if idle[1:] else 'has'} not run", "not run")
    steps = (mean_cost(cells, first, "steps"), mean_cost(cells, second, "steps"))
    if basis == "steps" and not near(*steps, EQUAL_STEPS):
        if claim.planned:
            why = f"{first} takes {steps[0]:.0f} steps, {second} {steps[1]:.0f}; no arm has as many"
            return none(why, "no such arm")
        basis = "planned"
    if basis == "compute":
        flops = (mean_cost(cells, first, "flops"), mean_cost(cells, second, "flops"))
        if not all(flops):
            return none("operations were not counted", "operations not counted")
        if not near(*flops, EQUAL_COMPUTE):
            why = f"{first} takes {flops[0] / flops[1]:.2f} times the operations of {second}; no arm has as many"
            return none(why, "no such arm")
    if not all(by_seed(cells, arm, metric) for arm in compared):
        return none("not yielded", "not yielded")
    if claim.optimum:
        ours, theirs = (best_values(cells, values, metric) for values in claim.optimum)
    else:
        ours, theirs = by_seed(cells, first, metric), by_seed(cells, second, metric)
    paired = sorted(ours.keys() & theirs.keys())
    if not paired:
        return none("no seed has both arms", "no seed has both arms")
    if metric_of(metric).timed and not claim.optimum:
        paired = [seed for seed in paired if machine(cells, first, seed) == machine(cells, second, seed)]
        if not paired:
            why = "no seed has both arms on one machine, and times of two say nothing"
            return none(why, "no pair on one machine")
    verdict = judge(claim, metric, [ours[s] for s in paired], [theirs[s] for s in paired])
    as_factor = bool(claim.factor) and metric == claim.metric
    return Decided(claim, metric, basis, pair, steps, verdict, as_factor=as_factor)


def near(one: float, other: float, share: float) -> bool:
    """Whether two counts are within this share of each other; 0 is a count that nobody made."""
    return bool(one and other) and abs(one / other - 1) <= share


def machine(cells: list[Cell], arm: str, seed: int) -> tuple[str, ...]:
    (cell,) = [cell for cell in cells if cell.arm == arm and cell.seed == seed]
    return tuple(cell.about[key] for key in ("cpu", "accelerator", "threads"))


def judge(claim: Claim, metric: str, ours: list[float], theirs: list[float]) -> Verdict:
    """What paired values say; a difference is counted so that above 0 speaks for the claim, as first minus second where
    the claim is that two arms are the same, or the metric has no good side.

    A metric beside the one that decides has its own good side. It gets no verdict where it has none, or where the claim
    says how large a difference is: that size is not one in its units.
    """
    decides, better = metric == claim.metric, metric_of(metric).better
    side = claim.direction
    if not decides and not claim.optimum and claim.direction != "same":
        claimed = metric_of(claim.metric).better
        # Of two metrics with a good side: does the claim favour that of the deciding one, or speak against it?
        against = claimed is not None and claim.direction != claimed
        side = {HIGHER: LOWER, LOWER: HIGHER}.get(better) if against else better
    sign = -1.0 if side == LOWER else 1.0
    if claim.factor and decides:
        if bad := [value for value in (*ours, *theirs) if value <= 0]:
            raise ValueError(f"the claim '{claim.claim}' is about a factor, but {metric} is {bad[0]:g} in a cell")
        # A smaller factor than the claimed one speaks against the claim, not only the wrong sign.
        factor = math.log(claim.factor)
        v = decide([sign * math.log(a / b) - factor for a, b in zip(ours, theirs)])
        return replace(v, mean=v.mean + factor, low=v.low + factor, high=v.high + factor)
    differences = [sign * (a - b) for a, b in zip(ours, theirs)]
    if not decides and (claim.sized or better is None):
        return describe_only(differences)
    if claim.direction == "same":
        return decide_same(differences, margin=claim.margin)
    return decide(differences, margin=claim.margin if decides else 0.0)
