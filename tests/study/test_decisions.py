"""From rows to verdicts: what is a pair on which basis, whose good side counts, and what gets no verdict."""

import numpy as np
import pytest

from fastvlm.study.cells import Cell
from fastvlm.study.claims import Claim
from fastvlm.study.decisions import decide_claim
from fastvlm.study.grid import Sweep
from fastvlm.study.metrics import METRICS, metric_of
from fastvlm.study.readme import amount, claim_section, headline
from tests.study.made_cells import cell, grid


def test_a_metric_that_no_task_yields_is_named_with_the_nearest():
    claim = Claim("x", "p", "t", "test/answer_nll/nth", "lower", ["align", "skip"])
    with pytest.raises(ValueError, match="test/answer_nll/nth, which no task yielded; did you mean test/answer_nll"):
        decide_claim(claim, grid())


def test_a_metric_beside_that_no_task_yields_is_a_line_and_the_claim_is_decided_all_the_same():
    claim = Claim("x", "p", "t", "test/answer_nll", "lower", ["align", "skip"], ["test/answer_nll/list"])
    decided = decide_claim(claim, grid())
    assert headline(decided) == "agrees at equal steps; no such arm at equal compute"
    row = next(line for line in claim_section(claim, decided, {}) if line.startswith("| answer_nll/list"))
    assert "`align` against `skip`: - (not yielded)" in row


def test_an_arm_that_has_not_run_is_not_told_as_one_that_does_not_exist():
    pairs = {"planned": ["align", "skip"], "steps": ["align", "skip_long"], "compute": ["align", "skip_long"]}
    claim = Claim("x", "p", "t", "test/answer_nll", "lower", **pairs)
    cells = [one for one in grid(steps=STEPS) if one.arm != "skip_long"]
    planned, steps, compute = decide_claim(claim, cells)
    assert (steps.basis, steps.why, compute.why) == ("steps", *["skip_long has not run"] * 2)
    words = "agrees as planned (210 against 150 steps); not run at equal steps; not run at equal compute"
    assert headline([planned, steps, compute]) == words
    planned, steps, compute = decide_claim(claim, [one for one in cells if one.arm != "align"])
    assert planned.on == "as planned" and planned.why == "align has not run"
    assert steps.why == "align and skip_long have not run" and headline([planned, steps, compute]) == "not run"


def test_an_arm_that_only_another_scale_has_takes_its_basis_alone():
    claim = Claim("x", "p", "t", "test/answer_nll", "lower", ["align", "skip"], compute=["align", "skip_long"])
    cells = [one for one in grid() if one.arm != "skip_long"]
    steps, compute = decide_claim(claim, cells, arms={"align", "skip"})
    assert compute.pair == ("align", "skip")
    assert compute.why.endswith("no arm has as many: skip with 1.43 times the steps in all its stages would")
    assert headline([steps, compute]) == "agrees at equal steps; no such arm at equal compute"
    for one in cells:
        one.cost["flops"] = 1e12  # as many at this scale: nothing else is needed
    steps, compute = decide_claim(claim, cells, arms={"align", "skip"})
    assert headline([steps, compute]) == "agrees"


def test_equal_compute_is_said_only_of_arms_with_about_as_many_operations():
    lower = Claim("x", "p", "t", "test/answer_nll", "lower", ["align", "skip"])
    steps, compute = decide_claim(lower, grid())
    assert steps.verdict.outcome == "agrees" and compute.verdict is None
    assert "1.43 times the operations" in compute.why
    assert headline([steps, compute]) == "agrees at equal steps; no such arm at equal compute"
    with_arm = Claim("x", "p", "t", "test/answer_nll", "lower", ["align", "skip"], compute=["align", "skip_long"])
    assert decide_claim(with_arm, grid())[1].verdict.outcome == "disagrees"


def test_a_claim_about_a_factor_does_not_depend_on_how_fast_the_machine_is():
    claim = Claim("x", "p", "t", "test/ttft_ms", "lower", ["align", "skip"], factor=2.0)

    def timed(speed: float, times: float) -> list[Cell]:
        cells = [cell(arm, seed, nll=0.5) for arm in ("align", "skip") for seed in range(5)]
        for one in cells:
            one.metrics["test/ttft_ms"] = speed * (1 + 0.02 * one.seed) * (times if one.arm == "skip" else 1)
        return cells

    for speed in (1.0, 1000.0):
        (more,) = decide_claim(claim, timed(speed, 2.5))  # at equal steps alone: a cost has no equal compute
        (less,) = decide_claim(claim, timed(speed, 1.5))
        assert headline([more]) == "agrees" and headline([less]) == "disagrees"
        assert amount(more) == "2.50 times"
    assert decide_claim(claim, timed(1.0, 0.5))[0].verdict.outcome == "disagrees"
    with pytest.raises(ValueError, match="is about a factor, but test/ttft_ms is 0 in a cell"):
        decide_claim(claim, timed(0.0, 2.0))


def test_times_of_training_are_compared_within_one_sweep_only():
    claim = Claim("x", "p", "t", "train/step_ms", "lower", ["align", "skip"], ["test/ttft_ms"], factor=1.0)
    cells = [cell(arm, seed, nll=0.5) for arm in ("align", "skip") for seed in range(6)]
    for one in cells:
        one.metrics["train/step_ms"] = (9.0 if one.arm == "align" else 10.0) + 0.01 * one.seed
    names = {arm: tuple(f"{arm}-seed{seed}" for seed in range(6)) for arm in ("align", "skip")}
    together = [Sweep("micro", 1.0, 2, names["align"] + names["skip"][:5])]
    step, first_token = decide_claim(claim, cells, sweeps=together)
    assert headline([step]) == "agrees" and step.verdict.num_seeds == 5 and first_token.verdict.num_seeds == 6
    step, first_token = decide_claim(claim, cells, sweeps=[Sweep("micro", 1.0, 2, names[arm]) for arm in names])
    assert headline([step]) == "not comparable" and first_token.verdict is not None
    assert step.why == "no seed has both arms trained in one sweep, and times of two say nothing"


def test_a_metric_beside_speaks_for_the_claim_on_its_own_good_side():
    claim = Claim("x", "p", "t", "test/answer_nll", "lower", ["align", "skip"], beside=["test/exact_match/mean"])
    beside = decide_claim(claim, grid())[2]
    assert beside.metric == "test/exact_match/mean" and beside.verdict.mean > 0


def test_a_law_is_decided_on_where_the_metric_is_best_not_on_how_good_it_is():
    rates = {1: 1e-3, 2: 2e-3, 4: 4e-3, 8: 8e-3}
    sets = [{f"{size}_{n}": rate for n, rate in rates.items()} for size in ("wide", "narrow")]

    def bowl(n: int, best: float) -> float:
        return 1 + (np.log2(n) - best) ** 2

    cells = [cell(f"wide_{n}", s, nll=bowl(n, 1.0 + 0.01 * s)) for n in rates for s in range(5)]
    cells += [cell(f"narrow_{n}", s, nll=2 + bowl(n, 2.0 - 0.01 * s)) for n in rates for s in range(5)]
    claim = Claim("x", "p", "t", "test/answer_nll", "lower", ["wide_1", "narrow_1"], optimum=sets)
    (steps,) = decide_claim(claim, cells)  # over sizes there is no equal compute
    assert steps.verdict.outcome == "agrees" and steps.verdict.mean == pytest.approx(1 - 0.04)
    assert headline([steps]) == "agrees"


STEPS = {"align": 210.0, "skip": 150.0, "skip_long": 217.0}


def test_steps_that_are_not_equal_are_told_wherever_the_verdict_is():
    claim = Claim("x", "p", "t", "test/answer_nll", "lower", ["align", "skip"], compute=["align", "skip_long"])
    decided = decide_claim(claim, grid(steps=STEPS))
    assert headline(decided) == "agrees as planned (210 against 150 steps); disagrees at equal compute"
    page = "\n".join(claim_section(claim, decided, {}))
    assert "| as planned (210 against 150 steps) | equal compute |" in page and "equal steps" not in page
    # Within 2 % they are equal; the same verdict on both bases still says on which it rests.
    near = grid(steps={"align": 210.0, "skip": 207.0})
    assert headline(decide_claim(claim, near)) == "agrees at equal steps; disagrees at equal compute"
    same = [c for c in grid(steps=STEPS) if c.arm != "skip_long"]
    same += [cell("skip_long", s, nll=0.7 + 0.001 * s, flops=1e12, steps=217.0) for s in range(5)]
    assert headline(decide_claim(claim, same)) == "agrees as planned (210 against 150 steps) and at equal compute"


def test_a_claim_may_name_the_planned_pair_beside_the_one_at_equal_steps():
    pairs = {"planned": ["align", "skip"], "steps": ["align", "skip_long"], "compute": ["align", "skip_long"]}
    claim = Claim("x", "p", "t", "test/answer_nll", "lower", **pairs)
    equal = decide_claim(claim, grid(steps=STEPS | {"skip_long": 210.0}))
    assert [d.basis for d in equal] == ["planned", "steps", "compute"]
    words = "agrees as planned (210 against 150 steps); disagrees at equal steps; disagrees at equal compute"
    assert headline(equal) == words
    unequal = decide_claim(claim, grid(steps=STEPS))[1]
    assert unequal.verdict is None and unequal.why == "align takes 210 steps, skip_long 217; no arm has as many"


def test_operations_that_nobody_counted_are_not_called_equal():
    claim = Claim("x", "p", "t", "test/answer_nll", "lower", ["align", "skip"])
    cells = [cell(arm, seed, nll=0.5, flops=0.0) for arm in ("align", "skip") for seed in range(5)]
    compute = decide_claim(claim, cells)[1]
    assert compute.verdict is None and compute.why == "operations were not counted"


def speed_cells(**of_second: float) -> list[Cell]:
    cells = [cell(arm, seed, nll=0.5) for arm in ("align", "skip") for seed in range(5)]
    for one in cells:
        fast = {"test/speed/ttft_ms": 1.0, "test/speed/weights_mib": 6.0, "test/speed/tokens_per_second": 100.0}
        slow = {"test/speed/ttft_ms": 2.0, "test/speed/weights_mib": 9.64, "test/speed/tokens_per_second": 80.0}
        one.metrics.update({k: v * (1 + 0.001 * one.seed) for k, v in (slow if one.arm == "skip" else fast).items()})
    return cells


def test_less_memory_and_more_tokens_a_second_speak_for_the_arm_that_has_them():
    beside = ["test/speed/weights_mib", "test/speed/tokens_per_second"]
    claim = Claim("x", "p", "t", "test/speed/ttft_ms", "lower", ["align", "skip"], beside, factor=1.0)
    for decided in decide_claim(claim, speed_cells()):
        assert decided.verdict.outcome == "agrees" and decided.verdict.mean > 0, decided.metric


def test_a_name_that_the_table_of_metrics_lacks_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="test/speed/weight_mib is not in the table.*mean test/speed/weights_mib"):
        metric_of("test/speed/weight_mib")
    assert metric_of("test/vqav2/vqa_accuracy/yes_no").better == "higher" and not metric_of("test/answer_nll/nth").cost
    for name, metric in METRICS.items():
        assert metric.better in ("higher", "lower", None) and (metric.cost or not metric.timed), name


@pytest.mark.parametrize("sized", [{"direction": "same", "margin": 0.05}, {"direction": "lower", "margin": -0.02}])
def test_a_metric_beside_a_claim_with_a_size_gets_no_verdict_only_its_difference(sized):
    cells = [cell(arm, s, nll=0.5 + 0.001 * s) for arm in ("align", "skip") for s in range(5)]
    for one in cells:
        one.metrics["test/exact_match/mean"] = 0.6 + 0.107 * (one.arm == "align") + 0.001 * one.seed
    claim = Claim("matters little", "p", "t", "test/answer_nll", steps=["align", "skip"], **sized)
    claim.beside.append("test/exact_match/mean")
    decided = decide_claim(claim, cells)
    beside = [d for d in decided if d.metric == "test/exact_match/mean"]
    assert {d.verdict.outcome for d in decided if d not in beside} == {"agrees"}
    assert {d.verdict.outcome for d in beside} == {"difference"}
    page = "\n".join(claim_section(claim, decided, {}))
    assert "0.107 in all 5 seeds (no verdict)" in page and page.count("**agrees**") == 2


def test_under_a_claim_of_sameness_every_difference_is_the_first_arm_less_the_second():
    claim = Claim("x", "p", "t", "test/answer_nll", "same", ["align", "skip"], ["test/text_perplexity"], margin=0.5)
    cells = [cell(arm, s, nll=0.6 + 0.1 * (arm == "skip")) for arm in ("align", "skip") for s in range(5)]
    for one in cells:
        one.metrics["test/text_perplexity"] = 40.0 + (one.arm == "align")
    means = {d.metric: d.verdict.mean for d in decide_claim(claim, cells)}
    assert means["test/answer_nll"] == pytest.approx(-0.1) and means["test/text_perplexity"] == 1.0


def test_a_metric_without_a_good_side_gets_no_verdict_beside_another():
    cells = grid()
    for one in cells:
        one.metrics["test/answer_length"] = 2.0 if one.arm == "align" else 3.0
    claim = Claim("x", "p", "t", "test/answer_nll", "lower", ["align", "skip"], ["test/answer_length"])
    beside = [d for d in decide_claim(claim, cells) if d.metric == "test/answer_length"]
    assert beside[0].verdict.outcome == "difference" and beside[0].verdict.mean == -1.0


def test_a_cost_gets_no_verdict_beside_a_claim_about_worth_and_one_beside_a_claim_about_costs():
    beside = ["test/speed/ttft_ms"]
    for deciding, outcome in (("test/answer_nll", "difference"), ("test/speed/weights_mib", "disagrees")):
        claim = Claim("x", "p", "t", deciding, "lower", ["skip", "align"], beside)
        (cost, *_) = [d for d in decide_claim(claim, speed_cells()) if d.metric in beside]
        assert cost.verdict.outcome == outcome and cost.verdict.mean < 0


def test_a_difference_that_no_seed_changes_is_told_without_a_test():
    claim = Claim("x", "p", "t", "train/memory_mib", "lower", ["align", "skip"], ["train/learned"], factor=1.0)
    cells = [cell(arm, s, nll=0.5) for arm in ("align", "skip") for s in range(5)]
    for one in cells:
        one.metrics.update({"train/memory_mib": 10.1 if one.arm == "align" else 21.3, "train/learned": 640.0})
    page = "\n".join(claim_section(claim, decide_claim(claim, cells), {}))
    assert "**agrees** 2.11 times in all 5 seeds |" in page and "equal in all 5 seeds" in page and "p = " not in page


def test_times_of_two_machines_are_not_compared():
    claim = Claim("x", "p", "t", "test/ttft_ms", "lower", ["align", "skip"], factor=1.0)
    other = [cell("align", s, nll=0.5) for s in range(6)] + [cell("skip", s, nll=0.5, cpu="another") for s in range(6)]
    (decided,) = decide_claim(claim, other)
    assert decided.verdict is None and "times of two" in decided.why
    (some,) = decide_claim(claim, other + [cell(arm, 9, nll=0.5) for arm in ("align", "skip")])
    assert some.verdict.num_seeds == 1


def test_an_open_question_says_how_many_seeds_it_needs_or_that_it_needs_too_many():
    claim = Claim("x", "p", "t", "test/answer_nll", "lower", ["align", "skip"])

    def noisy(gap: float) -> list[Cell]:
        noise = [0.3, -0.2, 0.25, -0.3, 0.1]
        cells = [cell("align", s, nll=1.0 - gap + noise[s]) for s in range(5)]
        return cells + [cell("skip", s, nll=1.03) for s in range(5)]

    assert headline(decide_claim(claim, noisy(0.1))).startswith("not resolved (about ")
    words = "not resolved (1,000 seeds would not tell)"
    assert headline(decide_claim(claim, noisy(0.001))) == words
    one = [c for c in noisy(0.1) if c.seed == 0]
    assert headline(decide_claim(claim, one)).startswith("not resolved (one seed has no spread; 5 are the fewest")
