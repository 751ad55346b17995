"""Render a study's README.md and the catalogue of all studies from cells and verdicts."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from statistics import mean, stdev
from typing import Any

from fastvlm.study.arms import Study
from fastvlm.study.cells import Cell, Missing, mean_cost, planned
from fastvlm.study.claims import Claim, Figure
from fastvlm.study.decisions import EQUAL_COMPUTE, EQUAL_STEPS, Decided
from fastvlm.study.grid import Sweep, say_grid
from fastvlm.study.metrics import label_of
from fastvlm.study.verdicts import AGREES, ALPHA, DISAGREES, MOST_SEEDS, OPEN, POWER, SHOWN, Verdict, fewest_seeds

# Columns of every table of arms, if the task yields them.
EVERYWHERE = (
    *("test/answer_nll", "test/exact_match/mean", "test/text_perplexity", "test/nll/captions"),
    *("test/nll/interleaved/1", "test/nll/long_form", "test/answer_length", "test/ttft_ms"),
)


def number(value: float, *, digits: int = 3) -> str:
    """Format with three significant digits, without an exponent where none is needed."""
    if not math.isfinite(value):
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        decimals = max(0, digits - 1 - (math.floor(math.log10(abs(value))) if value else 0))
        return f"{value:.{min(decimals, 4)}f}"
    return f"{value:.{digits - 1}e}"


def spread(values: Sequence[float]) -> str:
    """Format the mean and standard deviation over seeds, and say of how many if some have no finite value."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "-"
    said = number(mean(finite)) + (f" ± {number(stdev(finite), digits=2)}" if len(finite) > 1 else "")
    return said if len(finite) == len(values) else f"{said} ({len(finite)} of {len(values)} are finite)"


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [row(header), "|" + "---|" * len(header), *(row(cells) for cells in rows)]


def shown_metrics(cells: Sequence[Cell], claims: Sequence[Claim]) -> list[tuple[str, str]]:
    """Return (metric, label) for the table of arms: what every study shows, and the metrics of this one's claims."""
    named = [m for claim in claims for m in (claim.metric, *claim.beside)]
    have = {name for cell in cells for name in cell.metrics}
    return [(m, label_of(m)) for m in dict.fromkeys((*EVERYWHERE, *named)) if m in have]


def arms_table(
    study: Study, cells: Sequence[Cell], claims: Sequence[Claim], *, scale: str, sweeps: Sequence[Sweep] = ()
) -> list[str]:
    """Return the table of arms and their cost; a star marks seconds of arms that the longest sweep did not train."""
    metrics = shown_metrics(cells, claims)
    together = max((set(sweep.cells) for sweep in sweeps if sweep.scale == scale), key=len, default=None)
    rows, apart = [], False
    for arm in study.arms[scale]:
        mine = [cell for cell in cells if cell.arm == arm]
        if not mine:
            continue
        cost = [f"{mean_cost(mine, arm, 'views'):,.0f}", f"{mean_cost(mine, arm, 'tokens'):,.0f}"]
        cost.append(number(mean_cost(mine, arm, "flops") / 1e12))
        star = "" if together is None or together >= {f"{arm}-seed{cell.seed}" for cell in mine} else "*"
        apart = apart or bool(star)
        cost.append(f"{mean_cost(mine, arm, 'seconds'):.0f}{star}")
        values = [spread([cell.metrics[m] for cell in mine if m in cell.metrics]) for m, _ in metrics]
        rows.append([f"`{arm}`", str(len(mine)), *values, *cost])
    header = ["arm", "seeds", *(label for _, label in metrics), "images", "tokens", "TFLOP", "seconds"]
    lines = table(header, rows)
    if apart:
        lines += ["", "\\* Not trained in the same sweep as most arms: compare these seconds with no others."]
    return lines


def say_verdict(decided: Decided) -> str:
    """Format one cell of the table of verdicts."""
    if decided.verdict is None:
        return f"- ({decided.why})"
    v = decided.verdict
    if exact(v):
        numbers = f"{amount(decided) if v.mean else 'equal'} in all {v.num_seeds} seeds"
        if v.outcome == SHOWN:
            return f"{numbers} (no verdict)"
        return numbers if v.outcome == OPEN and not v.mean else f"**{v.outcome}** {numbers}"
    numbers = f"{amount(decided)}, p = {number(v.p, digits=2)}, n = {v.num_seeds}"
    if v.outcome == SHOWN:
        return f"{numbers} (no verdict)"
    if v.outcome == OPEN:
        return f"**{OPEN}** {numbers}; {say_needed(v)}" if v.num_seeds > 1 else f"**{OPEN}**: {say_needed(v)}"
    return f"**{v.outcome}** {numbers}"


def say_needed(verdict: Verdict) -> str:
    """Say how many seeds an open question would need."""
    if verdict.num_seeds == 1:
        return f"one seed has no spread; {fewest_seeds()} are the fewest that can decide"
    return f"about {verdict.needed} seeds would tell" if verdict.needed else f"{MOST_SEEDS:,} seeds would not tell"


def amount(decided: Decided) -> str:
    """Format the mean and interval of what was decided: a difference, or a factor."""
    v = decided.verdict
    values = [math.exp(min(x, 700.0)) if decided.as_factor else x for x in (v.mean, v.low, v.high)]
    mean, low, high = map(number, values)
    interval = "" if exact(v) else f" [{low}, {high}]"
    return f"{mean}{' times' if decided.as_factor else ''}{interval}"


def exact(verdict: Verdict) -> bool:
    """Return whether all seeds have the same difference, as counts have; a test would say nothing of these."""
    return verdict.high - verdict.low <= 1e-6 * abs(verdict.mean)


def headline(decided: Sequence[Decided]) -> str:
    """Summarise a claim's verdict, that of its deciding metric, in a few words.

    The basis is given if verdicts differ between bases or steps are unequal. In parentheses follow the seeds that an
    open question needs, parts that an arm trained only once, and whether cells have another configuration.
    """

    def outcome(one: Decided) -> str:
        if one.verdict is None:
            return one.short
        return one.verdict.outcome + (f" ({say_needed(one.verdict)})" if one.verdict.outcome == OPEN else "")

    deciding = [d for d in decided if d.metric == d.claim.metric]
    said = list(dict.fromkeys(map(outcome, deciding)))
    below = dict.fromkeys(part for d in deciding if d.verdict for part in d.below)
    riders = [f"one {' and one '.join(below)} per arm"] if below else []
    riders += ["cells of another configuration"] if any(d.verdict and d.other for d in deciding) else []
    rider = f" ({'; '.join(riders)})" if riders else ""
    if len(said) > 1:
        return "; ".join(f"{outcome(d)} {d.on}" for d in deciding) + rider
    if all(d.basis != "planned" or d.steps is None for d in deciding):
        return said[0] + rider
    return f"{said[0]} {' and '.join(d.on for d in deciding)}{rider}"


def say_ours(deciding: Sequence[Decided]) -> str:
    """Format the amounts of a claim's deciding metric, for each basis unless they are the same on all."""
    known = [d for d in deciding if d.verdict]
    if not known:
        return deciding[0].why
    same = len(known) == len(deciding) and len(set(map(amount, known))) == 1
    said = amount(known[0]) if same else "; ".join(f"{amount(d)} {d.on}" for d in known)
    return f"{known[0].metric.removeprefix('test/')} {said}"


def say_below(decided: Sequence[Decided]) -> list[str]:
    """Say which parts an arm trained only once for all seeds, pair by pair unless it holds for all pairs."""
    told = list(dict.fromkeys((d.pair, d.below) for d in decided if d.verdict))
    lines = []
    for parts in dict.fromkeys(below for _, below in told if below):
        pairs = [f"`{first}` against `{second}`" for (first, second), below in told if below == parts]
        where = "" if len(pairs) == len(told) else f"{', '.join(pairs)}: "
        words = f"each arm's {' and '.join(parts)} {'were' if parts[1:] else 'was'} trained once for all seeds"
        words = f"{where}{words}" if where else f"{words[0].upper()}{words[1:]}"
        lines += [f"{words}, so the interval does not include what another training would change.", ""]
    return lines


def claim_section(claim: Claim, decided: Sequence[Decided], figures: dict[str, Figure]) -> list[str]:
    lines = [f"### {claim.claim}", "", f"{claim.paper}, {claim.table}. {claim.size}".strip(), ""]
    if claim.figures:
        theirs = [figures[key] for key in claim.figures]
        lines += table(
            ["the paper's", "metric", "value", "status"],
            [[f.setting.replace("|", "/"), f.metric, f.value, f.status] for f in theirs],
        )
        lines.append("")
    rows = []
    for metric in dict.fromkeys(d.metric for d in decided):
        name = f"{metric.removeprefix('test/')}{' (decides)' if metric == claim.metric else ''}"
        mine = [d for d in decided if d.metric == metric]
        rows.append([name, *(f"`{d.pair[0]}` against `{d.pair[1]}`: {say_verdict(d)}" for d in mine)])
    wanted = {"higher": "is higher", "lower": "is lower", "same": f"is the same within {claim.margin:g}"}
    lines += table(["metric", *dict.fromkeys(d.on.removeprefix("at ") for d in decided)], rows)
    if claim.optimum:
        words = "The difference is in log2 of the value at which the metric is best in each set of arms."
        return [*lines, "", words, "", *say_below(decided)]
    said = wanted[claim.direction]
    if claim.factor:
        said += f" at least {claim.factor:g} times" if claim.factor != 1 else ", by the factor shown"
        said += "; decided on logarithms, so the speed of the machine does not matter"
    elif claim.margin and claim.direction != "same":
        by = f"by more than {claim.margin:g}" if claim.margin > 0 else f"or worse by no more than {-claim.margin:g}"
        said += f" {by}"
    said = f"Claimed: the first arm's {claim.metric.removeprefix('test/')} {said}."
    if any(d.verdict and d.verdict.outcome == SHOWN for d in decided):
        said += (
            " Metrics without a verdict are costs, or have no better side, or none of the size that the claim states."
        )
    return [*lines, "", said, "", *say_below(decided)]


def readme(
    study: Study,
    *,
    claims: dict[str, list[Claim]],
    figures: dict[str, Figure],
    results: dict[str, tuple[list[Cell], list[list[Decided]]]],
    plots: dict[str, list[str]],
    notes: str = "",
    left_out: dict[str, list[str]],
    missing: dict[str, list[Missing]],
    remarks: dict[str, list[str]],
    sweeps: Sequence[Sweep] = (),
) -> str:
    """Render a study's README.md: question, verdicts beside the paper's figures, arms with their cost, where it ran."""
    lines = [f"# {study.name}", "", study.question, ""]
    lines += ["```sh", f"python train.py -m experiment={study.name}   # the grid; done cells are not run again"]
    arm = next(iter(study.arms["micro"] if "micro" in study.arms else study.arms["paper"]))
    lines += [f"python train.py experiment={study.name} arm={arm} seed=0   # one cell"]
    if "paper" in study.arms:
        lines += [f"python train.py experiment={study.name} scale=paper dry_run=true"]
    lines += [f"python -m fastvlm.study report={study.name}   # this page again", "```", ""]
    for scale, (cells, decided) in results.items():
        lines += [f"## Scale: {scale}", ""]
        if not cells:
            lines += [f"Not run: {len(planned(study, scale=scale))} cells are planned.", ""]
            lines += [f"- {claim.claim} ({claim.paper}, {claim.table}): not run" for claim in claims[scale]]
            lines += [*left_out[scale], ""] + paper_table(figures)
            continue
        for claim, of_claim in zip(claims[scale], decided):
            lines += claim_section(claim, of_claim, figures)
        lines += [*left_out[scale], ""] if left_out[scale] else []
        lines += [f"![{study.name}]({name})" for name in plots.get(scale, [])]
        lines += ["", *caption(plots.get(scale, []))]
        lines += ["", *arms_table(study, cells, claims[scale], scale=scale, sweeps=sweeps), ""]
        lines += [" ".join(filter(None, (origin(cells), say_grid(sweeps, cells, scale=scale)))), ""]
        lines += [line for remark in remarks[scale] for line in (f"{remark[0].upper()}{remark[1:]}.", "")]
        if lacks := missing[scale]:
            named = "; ".join(map(str, lacks[:6])) + (" ..." if len(lacks) > 6 else "")
            lines += [f"{len(lacks)} planned cells have not run: {named}.", ""]
    if notes:
        lines += ["## Notes", "", notes.strip(), ""]
    return "\n".join([*lines, RULES, ""])


RULES = f"""## How to read this page

- A difference is the first arm's value minus the second's, with the sign chosen so that positive favours the claim
  (unchanged for claims that two arms are the same, and for metrics without a better side). It is a mean over paired
  seeds with its {1 - ALPHA:.0%} interval.
- A verdict requires an exact sign-flip test with p of at most {ALPHA} and the whole interval on one side. There is no
  correction for the number of claims: two equal arms get a verdict in about {ALPHA:.0%} of cases.
- The number of seeds an open claim would need is for a power of {POWER:.0%}, given the mean and deviation seen here.
- Equal steps are equal within {EQUAL_STEPS:.0%}, equal compute means operations within {EQUAL_COMPUTE:.0%}.
  Steps, operations and cost count the stages that an arm trains itself, not those that stand in for pretrained parts,
  which are trained once and shared by all seeds unless the study says otherwise: an encoder of a higher resolution
  costs more than is counted here.
- ± is the standard deviation over seeds. Seconds and times to first token are those of a shared machine."""


def caption(plots: Sequence[str]) -> list[str]:
    """Explain what the plots of a page show."""
    if not plots:
        return []
    said = (
        f"Dots are seeds, diamonds their means, bars the {1 - ALPHA:.0%} interval of each mean. Verdicts use paired "
        "differences, which exclude what a seed changes in all arms alike."
    )
    if any("pareto" in name for name in plots):
        said += (
            " The line joins the arms that no other of as many steps beats on both axes, by their means; hollow "
            "diamonds took other steps. Arms whose bars overlap are not told apart."
        )
    return [said]


def say_left_out(claim: Claim, lacks: Sequence[str]) -> str:
    """Format the line of a claim whose first pair a scale does not have."""
    arms = " and ".join(f"`{arm}`" for arm in lacks)
    are = "are not arms" if lacks[1:] else "is not an arm"
    return f"- {claim.claim} ({claim.paper}, {claim.table}): {arms} {are} at this scale"


def paper_table(figures: dict[str, Figure]) -> list[str]:
    if not figures:
        return []
    rows = [[f.table, f.setting.replace("|", "/"), f.metric, f.value, f.status] for f in figures.values()]
    return [*table(["the paper's", "setting", "metric", "value", "status"], rows), ""]


def origin(cells: Sequence[Cell]) -> str:
    """Say in one line at which commits and on which machines the cells ran."""
    commits = {c.about["commit"][:9] + ("-dirty" if "dirty" in c.about["commit"] else "") for c in cells}
    keys = ("accelerator", "cpu", "threads", "precision")
    machines = {"{}: {}, {} thread(s), {}".format(*(c.about[k] for k in keys)) for c in cells}
    return f"{len(cells)} cells, commit {', '.join(sorted(commits))}; {'; '.join(sorted(machines))}."


def catalogue(entries: Sequence[dict[str, Any]]) -> str:
    """Render experiments/README.md: one line per claim, over all studies."""
    lines = [
        "# Studies",
        "",
        "Generated by `python -m fastvlm.study report=all`; edit the studies, not this page. A study is a folder with",
        "`study.yaml` (arms and grid), `claims.yaml` (which arms and metric decide each claim), `paper.csv` (figures",
        "of the paper, how far to trust them), `results.csv`, `README.md` and plots.",
        "`python train.py -m experiment=<study>` runs it; `scale=paper` uses the paper's sizes and steps, and public",
        "weights and data where its own are not. `LOG.md` records what was tried, including what failed.",
        "",
        *([tally([entry["outcomes"] for entry in entries]), ""] if entries else []),
        "The cost is the mean of the claim's two arms: operations of the stages that an arm trains itself, not of the",
        "encoder and language model that stand in for pretrained ones. Times are on each study's page.",
        "",
    ]
    header = ["study", "scale", "claim", "paper's figure", "ours (in favour of the claim)", "verdict", "cost of a cell"]
    keys = ("study", "scale", "claim", "paper", "ours", "verdict", "cost")
    return "\n".join([*lines, *table(header, [[entry[k] for k in keys] for entry in entries]), ""])


def tally(outcomes: Sequence[Collection[str]]) -> str:
    """Count the claims by their outcomes on all bases, and say how many verdicts chance alone would give."""
    kinds = [
        ("agree", lambda found: found == {AGREES}),
        ("disagree", lambda found: found == {DISAGREES}),
        ("are not resolved", lambda found: found == {OPEN}),
        ("agree on one basis and are not resolved on another", lambda found: found == {AGREES, OPEN}),
        ("disagree on one basis and are not resolved on another", lambda found: found == {DISAGREES, OPEN}),
        ("agree on one basis and disagree on another", lambda found: {AGREES, DISAGREES} <= found),
        ("have no verdict", lambda found: not found),
    ]
    counts = [(sum(is_one(set(found)) for found in outcomes), words) for words, is_one in kinds]
    chance = max(1, round(ALPHA * len(outcomes)))
    return (
        f"Of {len(outcomes)} claims, each on all its bases (arms as planned, at equal steps, at equal compute), "
        f"{', '.join(f'{count} {words}' for count, words in counts if count)}. A verdict "
        f"requires an exact sign-flip test over paired seeds with p of at most {ALPHA} and the whole {1 - ALPHA:.0%} "
        f"interval on one side. There is no correction for the number of claims: two equal arms get a verdict in about "
        f"{ALPHA:.0%} of cases, which is {chance} of this many claims."
    )
