"""Decide claims from cells: which cells form a pair, on which basis they are compared, and the verdict."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fastvlm.study.cells import Cell, mean_cost
from fastvlm.study.claims import Claim
from fastvlm.study.grid import Sweep
from fastvlm.study.metrics import HIGHER, LOWER, metric_of
from fastvlm.study.verdicts import Verdict, decide, decide_same, describe_only

# Steps and operations count as equal if they differ by no more than these shares.
EQUAL_STEPS = 0.02
EQUAL_COMPUTE = 0.05


@dataclass(frozen=True)
class Decided:
    """The verdict on one metric of a claim on one basis.

    Args:
        basis: `steps` or `compute` if these are equal; `planned` if the arms are compared as they are.
        steps: optimiser steps of the two arms, means over seeds; None if one has not run.
        verdict: None if there is none; `why` then says why, `short` in a few words.
        as_factor: the verdict's numbers are natural logarithms of a factor.
        below: names of parts that differ between the arms and were trained once for all seeds of an arm.
        other: some cells of these arms have another configuration than their arm has now.
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
        """The arms on each side."""
        first, second = self.claim.optimum or [[arm] for arm in self.pair]
        return tuple(first), tuple(second)

    @property
    def on(self) -> str:
        """The basis in words that can follow a verdict, with the steps if they are unequal."""
        if self.basis != "planned":
            return f"at equal {self.basis}"
        if self.steps is None:
            return "as planned"
        return f"as planned ({self.steps[0]:.0f} against {self.steps[1]:.0f} steps)"


def by_seed(cells: list[Cell], arm: str, metric: str) -> dict[int, float]:
    return {cell.seed: cell.metrics[metric] for cell in cells if cell.arm == arm and metric in cell.metrics}


def best_values(cells: list[Cell], values: dict[str, float], metric: str) -> dict[int, float]:
    """Map each seed to log2 of the value at which the metric is best.

    This is the vertex of the parabola through the best arm and its neighbours; at an end of the range, the best arm.
    """
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


def decide_claim(
    claim: Claim, cells: list[Cell], *, arms: Collection[str] | None = None, sweeps: Sequence[Sweep] | None = None
) -> list[Decided]:
    """Decide every metric of a claim on every basis, the deciding metric first.

    A claim about a cost or an optimum is not decided at equal compute. Where the scale lacks an arm of `compute`, the
    first pair takes its place: its operations may be equal at this scale, and if not, it is told how many steps are.

    Args:
        arms: those that the cells' scale has; None: all.
        sweeps: those that trained the cells; times of training are paired within one. None: all cells in one.

    Raises:
        ValueError: the claim's arms have run, but no cell has the deciding metric.
    """
    mine = [cell for cell in cells if cell.arm in claim.arms]
    known = sorted({name for cell in mine for name in cell.metrics})
    if mine and claim.metric not in known:
        near = difflib.get_close_matches(claim.metric, known, 1, 0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"the claim '{claim.claim}' is decided on {claim.metric}, which no task yielded{hint}")
    pairs = {"planned": claim.planned, "steps": claim.steps}
    if not metric_of(claim.metric).cost and not claim.optimum:
        there = claim.compute and (arms is None or all(arm in arms for arm in claim.compute))
        pairs["compute"] = claim.compute if there else claim.pair
    return [
        decide_pair(claim, metric, basis, tuple(pair), cells, arms=arms, sweeps=sweeps)
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
    sweeps: Sequence[Sweep] | None = None,
) -> Decided:
    def none(why: str, short: str) -> Decided:
        return Decided(claim, metric, basis, pair, steps, None, why, short)

    first, second = pair
    steps = None
    ran = {cell.arm for cell in cells}
    compared = [arm for one in claim.optimum for arm in one] or list(pair)
    needed = dict.fromkeys((*pair, *compared))
    if lacks := [arm for arm in needed if arms is not None and arm not in arms]:
        why = f"{' and '.join(lacks)} {'are not arms' if lacks[1:] else 'is not an arm'} at this scale"
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
            ratio, cheap = flops[0] / flops[1], first if flops[0] < flops[1] else second
            why = (
                f"{first} takes {ratio:.2f} times the operations of {second}; no arm has as many: "
                f"{cheap} with {max(ratio, 1 / ratio):.2f} times the steps in all its stages would"
            )
            return none(why, "no such arm")
    if not all(by_seed(cells, arm, metric) for arm in compared):
        return none("not yielded", "not yielded")
    for arm, values in ((arm, by_seed(cells, arm, metric)) for arm in compared):
        if lost := [seed for seed, value in values.items() if not math.isfinite(value)]:
            why = f"{metric} of arm={arm} seed={lost[0]} is {values[lost[0]]:g}"
            return none(why, "not a finite number")
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
    if metric == "train/step_ms" and sweeps is not None:  # answers can be timed again (`eval.py`), training cannot
        names = {seed: {f"{arm}-seed{seed}" for arm in pair} for seed in paired}
        paired = [seed for seed in paired if any(names[seed] <= {*sweep.cells} for sweep in sweeps)]
        if not paired:
            why = "no seed has both arms trained in one sweep, and times of two say nothing"
            return none(why, "not comparable")
    verdict = judge(claim, metric, [ours[s] for s in paired], [theirs[s] for s in paired])
    as_factor = bool(claim.factor) and metric == claim.metric
    return Decided(claim, metric, basis, pair, steps, verdict, as_factor=as_factor)


def near(one: float, other: float, share: float) -> bool:
    """Return whether two counts differ by at most this share; a count of 0 is unknown and equals nothing."""
    return bool(one and other) and abs(one / other - 1) <= share


def machine(cells: list[Cell], arm: str, seed: int) -> tuple[str, ...]:
    (cell,) = [cell for cell in cells if cell.arm == arm and cell.seed == seed]
    return tuple(cell.about[key] for key in ("cpu", "accelerator", "threads"))


def judge(claim: Claim, metric: str, ours: list[float], theirs: list[float]) -> Verdict:
    """Decide on paired values of two arms.

    Differences above 0 support the claim; if it says that the arms are the same, or the metric has no better direction,
    they are first minus second. A metric shown beside the deciding one is judged by its own better direction. It gets
    no verdict if it has none, if it is a cost and the claim is not about costs (that more costs more contradicts
    nothing), or if the claim gives a size, which is not in its units.
    """
    decides, better = metric == claim.metric, metric_of(metric).better
    side = claim.direction
    if not decides and not claim.optimum and claim.direction != "same":
        claimed = metric_of(claim.metric).better
        # A claim that its first arm is worse on the deciding metric favours the worse direction here, too.
        against = claimed is not None and claim.direction != claimed
        side = {HIGHER: LOWER, LOWER: HIGHER}.get(better) if against else better
    sign = -1.0 if side == LOWER else 1.0
    if claim.factor and decides:
        if bad := [value for value in (*ours, *theirs) if value <= 0]:
            raise ValueError(f"the claim '{claim.claim}' is about a factor, but {metric} is {bad[0]:g} in a cell")
        # A factor smaller than claimed counts against the claim, not only one in the other direction.
        factor = math.log(claim.factor)
        v = decide([sign * math.log(a / b) - factor for a, b in zip(ours, theirs)])
        return replace(v, mean=v.mean + factor, low=v.low + factor, high=v.high + factor)
    differences = [sign * (a - b) for a, b in zip(ours, theirs)]
    price = metric_of(metric).cost and not metric_of(claim.metric).cost
    if not decides and (claim.sized or price or better is None):
        return describe_only(differences)
    if claim.direction == "same":
        return decide_same(differences, margin=claim.margin)
    return decide(differences, margin=claim.margin if decides else 0.0)
