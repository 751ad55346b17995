"""Report of a plan: shares and their errors, packing and samples left out, as numbers for JSON and in words."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fastvlm.data.lengths import Measured
from fastvlm.data.plan import Plan
from fastvlm.data.source import UNITS

PREFIXES = (100, 1000, 10000)


def report(plan: Plan, prefixes: tuple[int, ...] = PREFIXES) -> dict:
    """Return what the plan will do, in plain numbers ready for JSON.

    Per source: target share, realised shares in all units after each prefix of samples, samples it holds, passes over
    it (`epochs`) in all steps, samples left out by reason (with up to ten keys), truncated samples.
    """
    planned = plan.num_samples
    errors = largest_error(plan, max(planned, 1))
    seen = samples_served(plan)
    realised = {unit: {n: shares(plan, n, unit) for n in (*prefixes, planned)} for unit in UNITS}
    sources = {
        source.name: {
            "target": float(weight),
            "share": {unit: {str(n): at[source.name] for n, at in realised[unit].items()} for unit in UNITS},
            "largest_error": errors[source.name],
            "samples": len(source.rows),
            "planned": int(served),
            "epochs": float(served / len(source.rows)),
            "truncated": source.num_truncated,
            "excluded": left_out(source),
            "broken_shards": source.index.broken,
        }
        for source, weight, served in zip(plan.sources, plan.weights, seen)
    }
    return {
        "fingerprint": plan.fingerprint,
        "unit": plan.unit,
        "num_steps": plan.num_steps,
        "samples": planned,
        "epochs": planned / plan.epoch_samples,
        "packing": packing_efficiency(plan),
        "largest_step_error": largest_step_error(plan),
        "segments": [[first, [float(w) for w in weights]] for first, weights in plan.segments()],
        "sources": sources,
    }


def left_out(source: Measured) -> dict[str, dict]:
    """Return reason -> how many samples of a source are left out, and the keys of the first ten."""
    return {
        reason: {"count": len(gone), "keys": [source.index.key(row) for row in gone[:10].tolist()]}
        for reason, gone in source.excluded.items()
    }


def notes(plan: Plan) -> list[str]:
    """Return remarks for the user before the first step, one line each.

    They name what is left out, truncated or broken, and the effect of caps, repeats and `max_epochs`.
    """
    lines = limits(plan)
    for s in plan.sources:
        for shard, where in s.index.broken.items():
            lines.append(f"{s.name}: {shard} {where}; the samples before are used, write the shard again")
        for reason, gone in s.excluded.items():
            keys = [s.index.key(row) for row in gone[:3].tolist()] + ["..."] * (len(gone) > 3)
            lines.append(f"{s.name}: {len(gone)} samples left out, {reason} ({', '.join(keys)})")
        if s.num_truncated:
            lines.append(f"{s.name}: {s.num_truncated} samples cut to max_tokens={plan.max_tokens}")
    for first, weights in plan.segments()[1:]:
        gone = ", ".join(name for name, w in zip(plan.names, weights) if not w)
        rest = ", ".join(f"{name} {float(w):.1%}" for name, w in zip(plan.names, weights) if w)
        lines.append(f"{gone} used up (max_epochs) after {first} samples; from there on the shares are {rest}")
    return lines


def limits(plan: Plan) -> list[str]:
    """Return a line for every source that is capped, repeated or used up by `max_epochs`.

    It gives the source's share of all steps, that share without limits, and the passes over its samples.
    """
    if all(s.source.max_samples is None and s.repeat == 1 and s.max_epochs is None for s in plan.sources):
        return []
    planned, seen = plan.num_samples, samples_served(plan).tolist()
    asked = [", ".join(limits_of(source, served)) for source, served in zip(plan.sources, seen)]
    if not any(asked):
        return []
    lines, realised, plain = [], shares(plan, planned), plain_shares(plan)
    for s, what, served in zip(plan.sources, asked, seen):
        if what:
            now, before = f"{realised[s.name]:.1%}", f"{plain[s.name]:.1%}"
            instead = "" if now == before else f" in place of {before}"
            passes = f"{served / len(s.rows):.2f} passes over {len(s.rows)} samples"
            lines.append(f"{s.name}: {what}: {now} of {plan.unit}{instead}, {passes}")
    return lines


def limits_of(source: Measured, served: int) -> list[str]:
    """Return which of a source's caps, repeats and bounds take effect in a plan with `served` samples of it."""
    cap, words = source.source.max_samples, []
    if cap is not None and cap < (there := len(uncapped(source))):
        words.append(f"max_samples={cap} of {there}")
    if source.repeat != 1:
        words.append(f"repeat={float(source.repeat):g}")
    if source.num_served is not None and served >= source.num_served:
        words.append(f"max_epochs={float(source.max_epochs):g}")
    return words


def uncapped(source: Measured) -> np.ndarray:
    """Return the index rows that would be chosen without `max_samples` and have learned tokens."""
    rows, _ = source.source.select(source.index, capped=False)
    return rows[source.index.answer_tokens[rows] > 0]


def plain_shares(plan: Plan) -> dict[str, float]:
    """Return the shares without caps, repeats and `max_epochs`: the weights, or what each source would hold."""
    if plan.mixture.shares is not None:
        return {name: float(weight) for name, weight in zip(plan.names, plan.mixture.shares)}
    held = {}
    for s in plan.sources:
        costs = s.costs(plan.unit)[uncapped(s)]
        # Rows that were not chosen have not been truncated.
        held[s.name] = int((np.minimum(costs, plan.max_tokens) if plan.unit == "tokens" else costs).sum())
    return {name: cost / sum(held.values()) for name, cost in held.items()}


def shares(plan: Plan, n: int, unit: str | None = None) -> dict[str, float]:
    """Return every source's realised share after n planned samples, in `unit` (None: the mixture's)."""
    served = np.zeros(len(plan.sources))
    for sources, costs in plan.pieces(n, unit or plan.unit):
        served += np.bincount(sources, weights=costs, minlength=len(plan.sources))
    return {s.name: float(x) for s, x in zip(plan.sources, served / served.sum())}


def samples_served(plan: Plan) -> np.ndarray:
    """Return the number of samples of every source in all steps: int64 (sources,)."""
    pieces = plan.pieces(plan.num_samples, "samples", in_rows=True)
    return sum(np.bincount(sources, minlength=len(plan.sources)) for sources, _ in pieces)


def largest_error(plan: Plan, n: int) -> dict[str, float]:
    """Return each source's largest error over all prefixes of n samples, in units of the largest cost."""
    largest = np.zeros(len(plan.sources))
    for _, errors in prefix_errors(plan, n):
        np.maximum(largest, np.abs(errors).max(axis=1), out=largest)
    return {s.name: float(x) / largest_cost(plan) for s, x in zip(plan.sources, largest)}


def largest_step_error(plan: Plan) -> float:
    """Return the largest error of any source at the ends of steps, in row order, as the optimiser sees it.

    Units are those of `largest_error`. Packing reorders samples within a window, so this is several samples' worth; at
    the end of a window it is one.
    """
    planned = plan.num_samples  # before using the order: this plans all steps, which extends it
    rows, largest = plan.num_steps * plan.batch_size, 0.0
    ends = plan.order.columns.end[plan.batch_size : rows + 1 : plan.batch_size] - 1
    for first, errors in prefix_errors(plan, planned, in_rows=True):
        a, b = np.searchsorted(ends, [first, first + errors.shape[1]])
        largest = max(largest, float(np.abs(errors[:, ends[a:b] - first]).max(initial=0.0)))
    return largest / largest_cost(plan)


def prefix_errors(plan: Plan, n: int, *, in_rows: bool = False) -> Iterator[tuple[int, np.ndarray]]:
    """Yield `prefix_error` of every source over n samples, in pieces: (first sample, float64 (sources, samples)).

    The count restarts when a source is used up. In pieces, because ten million samples at once take a gigabyte.

    Args:
        in_rows: in the order in which rows hold the samples; False: in scheduled order.
    """
    n = len(plan.arrivals(n)[0])
    segments = [(first, weights) for first, weights in plan.order.segments if first < n]
    for (first, weights), end in zip(segments, [*(first for first, _ in segments[1:]), n]):
        weights = np.array([[float(w)] for w in weights])
        served, total = np.zeros((len(plan.sources), 1), dtype=np.int64), 0
        for sources, costs in plan.pieces(end, plan.unit, start=first, in_rows=in_rows):
            numbers = np.arange(len(plan.sources), dtype=sources.dtype)[:, None]
            by_source = np.where(sources == numbers, costs, 0).cumsum(axis=1) + served
            whole = costs.cumsum() + total
            yield first, by_source - weights * whole
            served, total, first = by_source[:, -1:], whole[-1], first + len(costs)


def largest_cost(plan: Plan) -> int:
    """Return the largest cost of a planned sample, in the mixture's unit."""
    return max(int(s.costs(plan.unit)[s.rows].max()) for s in plan.sources)


def packing_efficiency(plan: Plan) -> dict[str, float]:
    """Return how full the rows of the planned steps are.

    `filled_tokens` and `filled_images` are the used shares of the budgets, `samples_per_row` an average, `padding` the
    share of positions that are padding if every row is as long as the longest of its step.
    """
    tokens, images = plan.row_sizes()
    skipped = 0 if plan.after is None else plan.after.step
    tokens, images = tokens[skipped:], images[skipped:]
    return {
        "filled_tokens": float(tokens.sum() / (tokens.size * plan.max_tokens)),
        "filled_images": float(images.sum() / (images.size * plan.max_images)),
        "samples_per_row": float(plan.num_samples / tokens.size),
        "padding": float(1 - tokens.sum() / (tokens.max(axis=1) * plan.batch_size).sum()),
    }
