"""The longest batch is tried early, and changes nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from fastvlm.batch import Sample
from fastvlm.callbacks.rehearsal import MOST, PADDING, LongestFirst, largest_slices, widened
from fastvlm.data.collate import collate
from fastvlm.tokens import IGNORE_INDEX
from tests.conftest import TINY


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_trying_the_longest_batch_leaves_every_weight_as_it_would_be(cli, tmp_path, devices):
    # The encoder learns, so that BatchNorm statistics would tell.
    arguments = [*TINY, "pipeline=dense", "stages.dense.steps=4", "stages.dense.batch_size=4"]
    arguments += [f"hardware.devices={devices}", "hardware.accumulate=2"]
    for name in ("without", "with"):
        done = cli("train.py", *arguments, f"data.longest_first={name == 'with'}", f"name={name}")
        assert (f"tried first: {2 // devices} rows of" in done.stdout) == (name == "with")
        stage = (tmp_path / "runs" / name / "stages" / "dense").resolve()
        stage.rename(tmp_path / name)
    for part in ("encoder", "resampler", "projector"):
        ours, theirs = (load_file(tmp_path / n / "handoff" / f"{part}.safetensors") for n in ("with", "without"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), part


def test_a_batch_that_does_not_fit_is_one_line_with_the_keys_that_make_it_smaller():
    class Strategy:
        batch_to_device = staticmethod(lambda batch: batch)

        @staticmethod
        def training_step(batch, index):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore lines")

    class Trainer:
        strategy = Strategy

        class precision_plugin:
            train_step_context = staticmethod(torch.enable_grad)

    class Stage:
        name = "dense"

    class Batch:
        input_ids, num_images, step = torch.zeros(4, 96), 12, 7

    message = r"stage dense: the longest batch \(step 7: 4 rows of 96 positions, 12 images\) .*stages.dense.max_tokens"
    with pytest.raises(ValueError, match=message) as caught:
        LongestFirst.rehearse(None, Trainer, Stage, Batch)
    assert "\n" not in str(caught.value)


def slices_of(plan, ranks, accumulate):
    """(positions of the widest row, images) of what each rank holds at a time, cut as `PlannedDataset` cuts."""
    for rows in plan:
        for rank in range(ranks):
            for micro in range(accumulate):
                mine = rows[rank::ranks][micro::accumulate]
                yield max(t for t, _ in mine), sum(i for _, i in mine)


def tried_of(plan, ranks=1, accumulate=1):
    tokens, images = np.moveaxis(np.array(plan), 2, 0)  # (steps, rows) each
    return largest_slices(tokens, images, ranks=ranks, accumulate=accumulate)


@given(st.data(), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2))
def test_no_micro_batch_of_a_rank_takes_more_memory_than_one_that_is_tried(data, ranks, accumulate, each):
    count, row = ranks * accumulate * each, st.tuples(st.integers(0, 40), st.integers(0, 40))
    plan = data.draw(st.lists(st.lists(row, min_size=count, max_size=count), min_size=1, max_size=30))
    tried, there = tried_of(plan, ranks, accumulate), list(slices_of(plan, ranks, accumulate))
    assert 1 <= len(tried) <= MOST
    for width, images in there:
        assert any(width <= t.width and images <= t.images for t in tried)
    for t in tried:
        mine = plan[t.step][t.rank :: ranks][t.micro :: accumulate]
        assert t.images == sum(i for _, i in mine) and t.width >= max(w for w, _ in mine)
    larger = {a for a in there if not any(a != b and a[0] <= b[0] and a[1] <= b[1] for b in there)}
    if len(larger) <= MOST:
        assert {(t.width, t.images) for t in tried} == larger, "nothing is tried that the plan does not hold"


def test_a_batch_high_in_both_is_tried_though_it_is_the_first_in_neither():
    assert [t.step for t in tried_of([[(99, 0)], [(1, 27)], [(98, 26)]])] == [0, 2, 1]


def test_many_shapes_are_put_together_with_those_beside_them():
    tried = tried_of([[(100 - i, i)] for i in range(100)])
    assert len(tried) == MOST and all(t.width + t.images <= 100 + 2 * 100 / MOST for t in tried)


def test_a_widened_batch_has_more_padding_and_nothing_else():
    sample = Sample("a", "captions", np.arange(3, 8), np.arange(3, 8))
    batch = collate([[sample], [sample, sample]], sources=["captions"], pad_id=0, image_size=8, num_answer_tokens=9)
    longer = collate(
        [[sample], [sample, sample, replace(sample, labels=np.full(5, IGNORE_INDEX))]],
        **{"sources": ["captions"], "pad_id": 0, "image_size": 8, "num_answer_tokens": 9},
    )
    wide = widened(batch, 15)
    for name in PADDING:
        ours, theirs = getattr(wide, name), getattr(longer, name)
        assert torch.equal(ours[0], theirs[0]), name
    assert wide.num_tokens == batch.num_tokens and wide.num_learned == batch.num_learned
    assert torch.equal(widened(batch, 3).input_ids, batch.input_ids)
