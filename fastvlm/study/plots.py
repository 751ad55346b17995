"""Plots of a study: each arm's seeds and mean, and accuracy against time to first token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean

from fastvlm.files import replacing
from fastvlm.study.arms import Study
from fastvlm.study.cells import Cell, mean_cost
from fastvlm.study.claims import Claim
from fastvlm.study.decisions import EQUAL_STEPS, near
from fastvlm.study.metrics import metric_of
from fastvlm.study.readme import shown_metrics
from fastvlm.study.verdicts import mean_interval


def make_plots(study: Study, cells: Sequence[Cell], claims: Sequence[Claim], *, folder: Path, scale: str) -> list[str]:
    """Write `<scale>.svg`, and `<scale>_pareto.svg` if a claim is about time to first token; return the names."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # The same numbers give the same bytes.
    style = {"svg.hashsalt": study.name, "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False}
    style |= {"axes.spines.right": False}
    arms = [arm for arm in study.arms[scale] if any(cell.arm == arm for cell in cells)]
    names = []
    with plt.rc_context(style):
        names.append(_save(_arms(plt, arms, cells, claims), folder / f"{scale}.svg", plt))
        about_time = any("ttft" in metric for claim in claims for metric in (claim.metric, *claim.beside))
        if about_time and (figure := _pareto(plt, arms, cells)) is not None:
            names.append(_save(figure, folder / f"{scale}_pareto.svg", plt))
    return names


def _save(figure, path: Path, plt) -> str:
    with replacing(path) as part:
        figure.savefig(part, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    plt.close(figure)
    return path.name


def _arms(plt, arms: list[str], cells: Sequence[Cell], claims: Sequence[Claim]):
    deciding = list(dict.fromkeys(claim.metric for claim in claims))
    always = {*deciding, "test/answer_nll", "test/exact_match/mean"}
    wanted = [metric for metric, _ in shown_metrics(cells, claims) if metric in always]
    labels = dict(shown_metrics(cells, claims))
    figure, axes = plt.subplots(
        1, len(wanted), figsize=(1.6 + 2.4 * len(wanted), 0.8 + 0.32 * len(arms)), sharey=True, squeeze=False
    )
    for axis, metric in zip(axes[0], wanted):
        for place, arm in enumerate(arms):
            values = finite(cell.metrics.get(metric, math.nan) for cell in cells if cell.arm == arm)
            if not values:
                continue
            axis.plot(values, [place] * len(values), "o", color="#9aa4b2", markersize=3.5, zorder=1)
            low, high = mean_interval(values)
            if len(values) > 1:
                axis.plot([low, high], [place, place], color="#2f5fc4", linewidth=1.6, zorder=2)
            axis.plot([mean(values)], [place], "D", color="#2f5fc4", markersize=4.5, zorder=3)
        better = metric_of(metric).better
        axis.set_xlabel(f"{labels[metric]}\n({better} is better)" if better else labels[metric])
        axis.set_yticks(range(len(arms)), arms)
        axis.grid(axis="x", color="#e2e4e8", linewidth=0.6)
        axis.margins(y=0.15)
    axes[0][0].invert_yaxis()
    figure.tight_layout()
    return figure


def _pareto(plt, arms: list[str], cells: Sequence[Cell]):
    """Plot exact match against time to first token (ms) with intervals, and join the Pareto front of the means.

    The front is one of arms that took as many steps, the most that did: longer training is no dearer for a user.
    """
    points, shown = {}, ("test/ttft_ms", "test/exact_match/mean")
    for arm in arms:
        both = [[c.metrics.get(m, math.nan) for m in shown] for c in cells if c.arm == arm]
        if mine := [pair for pair in both if len(finite(pair)) == 2]:
            points[arm] = [list(values) for values in zip(*mine)]
    if len(points) < 2:
        return None
    figure, axis = plt.subplots(figsize=(5.2, 3.4))
    means = {arm: tuple(map(mean, both)) for arm, both in points.items()}
    alike = most_alike({arm: mean_cost(list(cells), arm, "steps") for arm in points})
    for arm, (times, scores) in points.items():
        time, score = means[arm]
        if len(times) > 1:
            bars = "#9db4e4"
            axis.plot(mean_interval(times), [score] * 2, color=bars, linewidth=1.2, zorder=1)
            axis.plot([time] * 2, mean_interval(scores), color=bars, linewidth=1.2, zorder=1)
        fill = "#2f5fc4" if arm in alike else "white"
        axis.plot(time, score, "D", color="#2f5fc4", markerfacecolor=fill, markersize=5, zorder=3)
    front = pareto_front([means[arm] for arm in alike])
    axis.plot(*zip(*front), color="#d9680f", linewidth=1, zorder=2)
    axis.set_xlabel("time to first token, ms (lower is better)")
    axis.set_ylabel("exact match (higher is better)")
    axis.grid(color="#e2e4e8", linewidth=0.6)
    axis.margins(0.12)
    axis.autoscale_view()
    places = {arm: axis.transData.transform(point) for arm, point in means.items()}
    for arm, (x, y) in places.items():
        others = [place for other, place in places.items() if other != arm]
        crowded = any(0 <= right - x < 60 and -6 < up - y < 14 for right, up in others)  # pixels; label goes below
        offset = (5, -10) if crowded else (5, 4)
        axis.annotate(arm, means[arm], textcoords="offset points", xytext=offset, fontsize=8, zorder=4)
    return figure


def finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def most_alike(steps: dict[str, float]) -> list[str]:
    """Return the largest group of arms whose steps are equal to those of one of them; the first one's, if in doubt."""
    groups = [[arm for arm, other in steps.items() if near(one, other, EQUAL_STEPS)] for one in steps.values()]
    return max(groups, key=len)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the Pareto front of (cost, worth) by rising cost: every other point costs more or is worth less."""
    front: list[tuple[float, float]] = []
    for cost, worth in sorted(set(points), key=lambda p: (p[0], -p[1])):
        if not front or worth > front[-1][1]:
            front.append((cost, worth))
    return front
