"""The metrics that a claim may name: which direction is better, whether it is a cost, and its label on a page."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

HIGHER, LOWER = "higher", "lower"


@dataclass(frozen=True)
class Metric:
    """One row of the table.

    Args:
        better: higher, lower, or None if neither is: a claim then says which it favours, and the metric gets no verdict
            if it is only shown beside another.
        label: its name on a page; "" for the metric's own name.
        cost: it measures what an arm takes, not what it reaches. Claims about it are not decided at equal compute.
        timed: it depends on the machine.
    """

    better: str | None
    label: str = ""
    cost: bool = False
    timed: bool = False


# `*` stands for question types, sources, benchmarks. An exact name counts first, then the first pattern that matches.
METRICS = {
    "test/answer_nll": Metric(LOWER, "answer NLL"),
    "test/exact_match/mean": Metric(HIGHER, "exact match"),
    "test/text_perplexity": Metric(LOWER, "prose perplexity"),
    "test/nll/captions": Metric(LOWER, "captions NLL"),
    "test/nll/interleaved/1": Metric(LOWER, "second image NLL"),
    "test/nll/long_form": Metric(LOWER, "long answers NLL"),
    "test/answer_nll/shots/0": Metric(LOWER, "answer NLL, no example"),
    "test/answer_nll/shots/2": Metric(LOWER, "answer NLL, 2 examples"),
    "test/answer_nll/shots/4": Metric(LOWER, "answer NLL, 4 examples"),
    # How much lower the NLL is than without examples.
    "test/answer_nll_gain/4": Metric(HIGHER, "gain of 4 examples"),
    "test/answer_nll_gain/*": Metric(HIGHER),
    "test/exact_match/shots/4": Metric(HIGHER, "exact match, 4 examples"),
    "test/answer_length": Metric(None, "answer length"),
    "test/ttft_ms": Metric(LOWER, "first token, ms", cost=True, timed=True),
    "test/ttft_ms/image": Metric(LOWER, "first token's image, ms", cost=True, timed=True),
    "test/ttft_ms/prefill": Metric(LOWER, "first token's prefill, ms", cost=True, timed=True),
    "test/speed/ttft_ms": Metric(LOWER, "first token (speed), ms", cost=True, timed=True),
    "test/speed/image_ms": Metric(LOWER, "image (speed), ms", cost=True, timed=True),
    "test/speed/prefill_ms": Metric(LOWER, "prefill (speed), ms", cost=True, timed=True),
    "test/speed/tokens_per_second": Metric(HIGHER, "tokens a second", cost=True, timed=True),
    "test/speed/weights_mib": Metric(LOWER, "weights, MiB", cost=True),
    "train/memory_mib": Metric(LOWER, "held from step to step, MiB", cost=True),
    "train/step_ms": Metric(LOWER, "training step, ms", cost=True, timed=True),
    "train/learned": Metric(LOWER, "parameters that learn", cost=True),
    "test/answer_nll/*": Metric(LOWER),
    # How much worse the NLL is with another image, which shows how much the image is used.
    "test/answer_nll_gap": Metric(HIGHER),
    "test/answer_nll_swapped": Metric(None),
    "test/answer_length_reference": Metric(None),
    "test/exact_match/*": Metric(HIGHER),
    "test/exact_match_removed/mean": Metric(None),
    "test/exact_match_swapped/mean": Metric(None),
    "test/exact_match_majority/mean": Metric(None),
    "test/text_bits_per_byte": Metric(LOWER),
    "test/nll/*": Metric(LOWER),
    # Mean of the main figures of several benchmarks with this many examples.
    "test/benchmarks/shots/*": Metric(HIGHER),
    # Benchmarks: test/<task>/<metric>[/<group>]; after examples test/<task>/shots/<k>/<metric>[/<group>].
    "test/*/answer_length": Metric(None),
    "test/*/num_questions": Metric(None),
    "test/*/yes_share*": Metric(None),
    **{
        f"test/*/{name}{group}": Metric(HIGHER)
        for name in (
            *("accuracy", "accuracy_at_*", "centre_accuracy", "iou", "anls", "relaxed_accuracy", "vqa_accuracy"),
            *("direct_answer", "multiple_choice", "exact_match", "exact_match_strict", "cider", "bleu_?", "rouge_l"),
            *("f1", "f1_mean", "precision", "recall", "acc", "acc_norm", "pass*"),
        )
        for group in ("", "/*")
    },
}


def metric_of(name: str) -> Metric:
    """Return a metric's row of the table.

    Raises:
        ValueError: there is no such metric; names the nearest one.
    """
    found = _find(name)
    if found is None:
        near = difflib.get_close_matches(name, [known for known in METRICS if "*" not in known], 1, 0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"metric {name} is not in the table of fastvlm/study/metrics.py{hint}")
    return found


@cache
def _find(name: str) -> Metric | None:
    if name in METRICS:
        return METRICS[name]
    return next((metric for pattern, metric in METRICS.items() if fnmatchcase(name, pattern)), None)


def label_of(name: str) -> str:
    return metric_of(name).label or name.removeprefix("test/")
