"""Operations of a stage against torch's counter on a real step, forward and backward."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastvlm.build import build_model, build_tokenizer
from fastvlm.callbacks.cost import StepClock, count_forward, held_bytes, learned_shares, training_flops
from fastvlm.models.quantised import quantise

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


@pytest.mark.parametrize("llm", ["smollm2_micro", "opt_micro", "qwen3_micro"])
def test_a_language_models_operations_are_counted_on_shapes_and_are_those_of_a_real_row(embedded, monkeypatch, llm):
    monkeypatch.setenv("FASTVLM_DATA", str(embedded))
    from fastvlm.callbacks.cost import _count_row
    from fastvlm.config import compose

    config = compose("train", [f"llm={llm}"])
    model, devices = build_model(config, build_tokenizer(config)).requires_grad_(False).eval(), set()
    for layer in model.llm.modules():
        layer.register_forward_pre_hook(lambda one, _: devices.update(p.device.type for p in one.parameters()))
    forward = count_forward(model, parts=["llm"], image_size=64, length=600)  # rows of both sides of EAGER_UP_TO
    assert devices == {"meta"}
    for length in (300, 600):
        with torch.no_grad():
            real = _count_row(model.llm, length)
        assert forward.linear * length + forward.square * length**2 == pytest.approx(real, rel=1e-12)


def test_a_row_costs_what_its_length_and_its_square_say(model):
    forward = count_forward(model, parts=["llm"], image_size=64, length=64)
    longer = count_forward(model, parts=["llm"], image_size=64, length=96)
    one = forward.rows(np.array([96]), 1)
    assert one == pytest.approx(longer.linear * 96 + longer.square * 96**2, rel=1e-6)
    assert not forward.view


def test_a_stage_holds_weights_gradients_of_what_learns_and_the_optimisers_states():
    layer = torch.nn.Linear(64, 128, bias=False)
    tied = torch.nn.ModuleList([layer, layer])
    size = 64 * 128 * 4
    assert held_bytes(tied) == 2 * size  # the weight, once, and its gradient
    optimizer = torch.optim.AdamW(tied.parameters())
    layer(torch.zeros(1, 64)).sum().backward()
    optimizer.step()
    assert held_bytes(tied, [optimizer]) == 4 * size + 4  # two moments, and the count of steps
    layer.requires_grad_(False)
    assert held_bytes(tied) == size


def test_four_bits_take_an_eighth_and_their_scales_are_counted():
    pytest.importorskip("bitsandbytes")
    model = torch.nn.Sequential(torch.nn.Linear(256, 256, bias=False)).requires_grad_(False)
    whole = held_bytes(model)
    quantise(model, "nf4")
    # Half a byte a weight; a byte for every block of 64; two code books and the scales' scales.
    codes, blocks = 256 * 256 // 2, 256 * 256 // 64
    assert whole == 256 * 256 * 4 and codes + blocks < held_bytes(model) <= codes + blocks + 16 * 4 + 256 * 4 + 64


def test_the_step_clock_leaves_out_the_first_step_and_adds_up_micro_batches(monkeypatch):
    clock, now = StepClock(), iter([0.0, 9.0, 9.0, 9.1, 9.1, 9.3, 10.0, 10.2, 10.2, 10.3])
    monkeypatch.setattr(StepClock, "_now", staticmethod(lambda stage: next(now)))
    loop = type("Loop", (), {"turns": iter([False, True, False, True, False])})
    loop._should_accumulate = lambda: next(loop.turns)
    trainer = type("T", (), {"fit_loop": type("F", (), {"epoch_loop": loop})})
    for _ in range(5):
        clock.on_train_batch_start(trainer, None, None, 0)
        clock.on_train_batch_end(trainer, None, None, None, 0)
    assert len(clock.steps) == 3 and clock.step_ms == pytest.approx(300)
