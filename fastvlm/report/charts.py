"""Charts as inline SVG and CSS, with colours that follow the reader's light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

NUM_COLOURS = 10
WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 34


@dataclass
class Line:
    """One series; `style` is `line`, `faint` (raw values behind a smoothed line) or `points` (with a dashed line)."""

    name: str
    xs: Sequence
    ys: Sequence
    colour: int = 0
    style: str = "line"
    legend: bool = True


def thin(xs: Sequence, ys: Sequence, *, most: int = 300) -> tuple[list, list]:
    """Reduce a series to at most `most` points by means over equal bins; values that are not finite are dropped."""
    pairs = [(x, y) for x, y in zip(xs, ys) if y is not None and math.isfinite(y)]
    size = math.ceil(len(pairs) / most) or 1
    bins = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    return [sum(x for x, _ in b) / len(b) for b in bins], [sum(y for _, y in b) / len(b) for b in bins]


def smooth(ys: Sequence) -> list[float]:
    """Return an exponential moving average over about a twelfth of the points, bias-corrected at its start."""
    weight = min(0.92, max(0.0, 1 - 12 / max(1, len(ys))))
    out, total, mass = [], 0.0, 0.0
    for y in ys:
        total, mass = weight * total + (1 - weight) * y, weight * mass + (1 - weight)
        out.append(total / mass)
    return out


def ticks(low: float | int, high: float | int, *, log: bool = False, most: int = 5) -> list:
    """Return round numbers inside [low, high]."""
    if log:
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factors in ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
            found = [f * 10.0**e for e in exponents for f in factors if low <= f * 10.0**e <= high]
            if len(found) <= most + 1:
                break
        return found
    span = max(high - low, 1e-12)
    step = 10 ** math.floor(math.log10(span / most))
    step *= next((f for f in (1, 2, 5) if span / (f * step) <= most), 10)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float | int) -> str:
    """Format a tick's label."""
    if value and abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"


def line_chart(lines: Sequence[Line], *, title: str, x: str = "optimiser step", y: str = "", zero: bool = False) -> str:
    """Render a chart with a legend; values that span more than a factor of 8 get a logarithmic axis, unless `zero`."""
    drawn = [(line, *thin(line.xs, line.ys)) for line in lines]
    drawn = [(line, xs, ys) for line, xs, ys in drawn if xs]
    if not drawn:
        return f'<figure><figcaption>{escape(title)}</figcaption><p class="none">Nothing was recorded.</p></figure>'
    all_x, all_y = [v for _, xs, _ in drawn for v in xs], [v for _, _, ys in drawn for v in ys]
    x0, x1, y0, y1 = min(all_x), max(all_x), min(all_y), max(all_y)
    log = not zero and y0 > 0 and y1 / y0 > 8
    if zero:
        y0 = min(0.0, y0)
    elif not log:
        y0, y1 = y0 - 0.05 * (y1 - y0), y1 + 0.05 * (y1 - y0)
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + abs(y0 or 1) * 0.1)
    scale = math.log10 if log else float

    def px(v: float | int) -> float:
        return round(LEFT + (v - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT), 1)

    def py(v: float | int) -> float:
        part = (scale(v) - scale(y0)) / (scale(y1) - scale(y0))
        return round(TOP + (1 - part) * (HEIGHT - TOP - BOTTOM), 1)

    svg = []
    for v in ticks(y0, y1, log=log):
        svg.append(f'<path class="grid" d="M{LEFT} {py(v)}H{WIDTH - RIGHT}"/>')
        svg.append(f'<text x="{LEFT - 6}" y="{py(v) + 3.5}" text-anchor="end">{short(v)}</text>')
    for v in ticks(x0, x1):
        svg.append(f'<text x="{px(v)}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{short(v)}</text>')
    axis = escape(x) + (" · logarithmic" if log else "")
    svg.append(
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{axis}</text>'
    )
    for line, xs, ys in drawn:
        path = "M" + "L".join(f"{px(a)} {py(b)}" for a, b in zip(xs, ys))
        colour = f"var(--c{line.colour % NUM_COLOURS})"
        svg.append(f'<path class="{line.style}" style="stroke:{colour}" d="{path}"/>')
        if line.style == "points" or len(xs) == 1:
            for a, b in zip(xs, ys):
                tip = f"{escape(line.name)}, step {a:g}: {b:.4g}"
                svg.append(
                    f'<circle r="3" cx="{px(a)}" cy="{py(b)}" style="fill:{colour}"><title>{tip}</title></circle>'
                )
    legend = "".join(
        f'<span><i class="key {line.style}" style="--c:var(--c{line.colour % NUM_COLOURS})"></i>'
        f"{escape(line.name)} <b>{ys[-1]:.3g}</b></span>"
        for line, _, ys in drawn
        if line.legend
    )
    return (
        f"<figure><figcaption>{escape(title)}{f' <em>{escape(y)}</em>' if y else ''}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(svg)}</svg>'
        f'<div class="legend">{legend}</div></figure>'
    )


def bar(
    value: float | int | None,
    *,
    interval: tuple | None = None,
    marks: dict | None = None,
    colour: int = 0,
) -> str:
    """Render a share in [0, 1] as a bar, its interval as a whisker, other shares as marks (`{css class: value}`)."""

    def percent(v: float | int) -> float:
        return round(100 * min(1.0, max(0.0, v)), 2)

    inside = ""
    if is_number(value):
        inside += f'<i class="fill" style="width:{percent(value)}%;--c:var(--c{colour % NUM_COLOURS})"></i>'
    if interval and all(is_number(v) for v in interval):
        low, high = (percent(v) for v in interval)
        inside += f'<i class="whisker" style="left:{low}%;width:{round(high - low, 2)}%"></i>'
    for name, mark in (marks or {}).items():
        if is_number(mark):
            inside += (
                f'<i class="mark {name}" style="left:{percent(mark)}%" title="{escape(name)} {100 * mark:.1f} %"></i>'
            )
    return f'<div class="bar">{inside}</div>'


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
