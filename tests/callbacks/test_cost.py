"""Operations of a stage against torch's counter on a real step, forward and backward."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastvlm.build import build_model, build_tokenizer
from fastvlm.callbacks.cost import count_forward, learned_shares, training_flops

ROWS, LENGTH, VIEWS = 2, 64, 3


@pytest.fixture(scope="module")
def model(embedded):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTVLM_DATA", str(embedded))
        from fastvlm.config import compose

        config = compose("train", ["encoder.dims=[8,16]", "llm.hidden_size=32", "llm.num_hidden_layers=2"])
        yield build_model(config, build_tokenizer(config))


def counted(model, learns: set[str]) -> float:
    """FlopCounterMode over a step that reads VIEWS images and ROWS rows and asks for logits everywhere."""
    for name, part in model.parts.items():
        part.requires_grad_(name in learns)
    model.train()
    model.zero_grad()
    images = torch.zeros(VIEWS, 3, 64, 64)
    positions = torch.arange(LENGTH).expand(ROWS, LENGTH)
    with FlopCounterMode(display=False) as counter:
        visual = model.projector(model.resampler(model.encoder(images)))
        embeds = torch.zeros(ROWS, LENGTH, model.llm.dim)
        embeds[:, : visual.shape[1]] = embeds[:, : visual.shape[1]] + visual.mean(0)
        hidden = model.llm.hidden(embeds, positions, torch.ones_like(positions))
        model.llm.head(hidden).sum().backward()
    return float(counter.get_total_flops())


# The first layer of what learns needs no gradient of its input: a tenth. Of a depthwise convolution torch counts the
# weights' gradient as if it were dense (17 times its forward pass, not 2), which is the encoder's: a fifth.
@pytest.mark.parametrize(
    ("learns", "within"),
    [({"projector"}, 0.1), ({"resampler", "projector", "llm"}, 0.1), ({"encoder", "projector", "llm"}, 0.2)],
)
def test_a_steps_operations_are_those_that_torch_counts(model, learns, within):
    theirs = counted(model, learns)
    forward = count_forward(model, parts=list(model.parts), image_size=64, length=LENGTH)
    ours = training_flops(
        forward, learned_shares(model), lengths=np.array([LENGTH]), rows=ROWS, views=VIEWS, logits=ROWS * LENGTH
    )
    assert ours == pytest.approx(theirs, rel=within)


def test_counting_leaves_the_model_as_it_was(model):
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    count_forward(model, parts=list(model.parts), image_size=64, length=32)
    assert model.encoder.training and model.llm.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_row_costs_what_its_length_and_its_square_say(model):
    forward = count_forward(model, parts=["llm"], image_size=64, length=64)
    longer = count_forward(model, parts=["llm"], image_size=64, length=96)
    one = forward.rows(np.array([96]), 1)
    assert one == pytest.approx(longer.linear * 96 + longer.square * 96**2, rel=1e-6)
    assert not forward.view
