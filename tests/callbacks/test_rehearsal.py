"""The longest batch is tried early, and changes nothing."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from fastvlm.callbacks.rehearsal import LongestFirst, longest_steps
from tests.conftest import TINY


def test_trying_the_longest_batch_leaves_every_weight_as_it_would_be(cli, tmp_path):
    # The encoder learns, so that BatchNorm statistics would tell.
    arguments = [*TINY, "pipeline=dense", "stages.dense.steps=4", "stages.dense.batch_size=4"]
    for name in ("without", "with"):
        done = cli("train.py", *arguments, f"data.longest_first={name == 'with'}", f"name={name}")
        assert ("tried first: 4 rows of" in done.stdout) == (name == "with")
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


@given(st.lists(st.lists(st.tuples(st.integers(1, 99), st.integers(0, 9)), min_size=3, max_size=3), min_size=1))
def test_no_step_takes_more_memory_than_those_that_are_tried(steps):
    tokens, images = np.moveaxis(np.array(steps), 2, 0)  # (steps, rows) each
    tried = longest_steps(SimpleNamespace(row_sizes=lambda: (tokens, images)))
    assert 1 <= len(tried) <= 2
    # A batch is as wide as its longest row, and its images lie one behind the other.
    width, stack = [3 * max(t for t, _ in rows) for rows in steps], [sum(i for _, i in rows) for rows in steps]
    assert max(width[i] for i in tried) == max(width) and max(stack[i] for i in tried) == max(stack)
