"""Optimisers and schedules against torch, transformers and their formulas in float64."""

import math

import pytest
import torch
from torch import nn

from fastvlm.build import instantiate
from fastvlm.config import CONF
from fastvlm.config.rules import DECAYS
from fastvlm.stages import adamw_8bit
from fastvlm.stages.stage import learning_rate_factor


def factors(decay: str, *, final: float, warmup: int = 10, steps: int = 100, decay_steps: int | None = None):
    options = dict(num_steps=steps, warmup_steps=warmup, decay=decay, final=final, decay_steps=decay_steps)
    return [learning_rate_factor(step, **options) for step in range(steps + 1)]


def transformers_factors(name: str, steps: int = 100, **options):
    from transformers.optimization import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    schedule = get_scheduler(
        name, optimizer, num_warmup_steps=10, num_training_steps=steps, scheduler_specific_kwargs=options
    )
    out = []
    for _ in range(steps + 1):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return out


@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize("decay, theirs", [("wsd", "linear"), ("wsd_sqrt", "1-sqrt")])
def test_wsd_is_transformers(decay, theirs, final):
    expected = transformers_factors(
        "warmup_stable_decay", num_decay_steps=25, decay_type=theirs, min_lr_ratio=final, num_stable_steps=65
    )
    ours = factors(decay, final=final, decay_steps=25)
    # They count the warm-up from 0, we from 1: a first step at rate 0 would learn nothing.
    assert ours[10:] == pytest.approx(expected[10:], abs=1e-12)
    assert ours[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert ours[10:76] == [1.0] * 66 and ours[100] == pytest.approx(final)


def test_cosine_linear_and_constant_are_transformers():
    cosine = transformers_factors("cosine_with_min_lr", min_lr_rate=0.1)
    assert factors("cosine", final=0.1)[10:] == pytest.approx(cosine[10:], abs=1e-12)
    linear = transformers_factors("linear")
    assert factors("linear", final=0.0)[10:] == pytest.approx(linear[10:], abs=1e-12)
    assert factors("constant", final=0.1)[10:] == [1.0] * 91


@pytest.mark.parametrize("decay", DECAYS)
def test_a_schedule_stays_between_its_end_and_the_peak_also_when_all_of_it_is_warm_up(decay):
    for warmup, steps in ((0, 1), (10, 10), (50, 20)):
        values = factors(decay, final=0.1, warmup=warmup, steps=steps)
        assert all(0 < value <= 1 for value in values)


def test_an_unknown_schedule_is_refused_and_not_taken_for_another():
    with pytest.raises(ValueError, match="decay=cosin is not one of cosine, linear, constant, wsd, wsd_sqrt"):
        factors("cosin", final=0.1)


def test_without_decay_steps_wsd_decays_over_the_last_fifth():
    values = factors("wsd", final=0.0, warmup=0)
    assert values[80] == 1.0 and values[90] == pytest.approx(0.5) and values[100] == 0.0


def steps_of(optimizer, parameter, gradients):
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def test_adafactor_is_its_equations_in_float64():
    torch.manual_seed(0)
    start, gradients = torch.randn(6, 4, dtype=torch.float64), torch.randn(5, 6, 4, dtype=torch.float64)
    make = instantiate({"_target_": "torch.optim.Adafactor", "_partial_": True, "weight_decay": 0.05}, key="optimizer")
    parameter = nn.Parameter(start.clone())
    ours = steps_of(make([{"params": [parameter], "lr": 1e-2, "name": "llm", "kind": "matrix"}]), parameter, gradients)
    # arXiv:1804.04235, algorithms 4 and 5; decoupled weight decay before the step, as torch has it.
    weight, rows, columns = start.clone(), torch.zeros(6, 1).double(), torch.zeros(1, 4).double()
    for t, g in enumerate(gradients, 1):
        beta = 1 - t**-0.8
        rate = max(1e-3, float(weight.norm() / weight.numel() ** 0.5)) * min(1e-2, t**-0.5)
        weight = weight * (1 - 1e-2 * 0.05)
        rows = beta * rows + (1 - beta) * g.square().mean(1, keepdim=True)
        columns = beta * columns + (1 - beta) * g.square().mean(0, keepdim=True)
        estimate = rows @ columns / rows.mean()
        update = g / estimate.sqrt()
        weight = weight - rate * update / max(1.0, float(update.norm() / update.numel() ** 0.5))
    torch.testing.assert_close(ours, weight, rtol=1e-6, atol=1e-8)


def test_adamw_in_eight_bits_is_adamw_to_two_percent_in_a_quarter_of_the_state():
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    start, gradients = torch.randn(128, 64), torch.randn(20, 128, 64)
    ours, theirs, small = (nn.Parameter(start.clone()) for _ in range(3))
    settings = dict(lr=1e-2, betas=(0.9, 0.98), weight_decay=0.05)
    optimizer = adamw_8bit([{"params": [ours], "name": "llm", "kind": "matrix"}], lr=1e-2)
    a = steps_of(optimizer, ours, gradients)
    b = steps_of(torch.optim.AdamW([theirs], **settings), theirs, gradients)
    assert (a - b).norm() < 0.02 * (b - start).norm()
    held = sum(v.numel() * v.element_size() for v in optimizer.state[ours].values() if torch.is_tensor(v))
    assert held < 0.3 * 2 * 4 * start.numel()
    # A small tensor keeps moments of 32 bits, and is AdamW.
    c = steps_of(adamw_8bit([{"params": [small]}], lr=1e-2, min_8bit_size=10**6), small, gradients)
    torch.testing.assert_close(c, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "optimizer").glob("*.yaml")))
def test_every_optimiser_learns_saves_and_goes_on_as_if_nothing_had_been(name):
    from omegaconf import OmegaConf

    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    start, x = torch.randn(64, 64) * 0.1, torch.randn(256, 64)
    target = x @ torch.randn(64, 64) * 0.1

    def run(break_at: int | None):
        weight, bias = nn.Parameter(start.clone()), nn.Parameter(torch.zeros(64))
        make = instantiate(OmegaConf.load(CONF / "optimizer" / f"{name}.yaml"), key="optimizer")
        groups = lambda: [
            {"params": [bias], "lr": 1e-2, "kind": "vector", "name": "llm", "weight_decay": 0.0},
            {"params": [weight], "lr": 1e-2, "kind": "matrix", "name": "llm"},
        ]
        optimizer, losses = make(groups()), []
        for step in range(12):
            if step == break_at:
                state = optimizer.state_dict()
                optimizer = make(groups())
                optimizer.load_state_dict(state)
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * (1 - step / 20)
            loss = (x @ weight + bias - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    whole = run(None)
    assert whole[-1] < 0.9 * whole[0] and not math.isnan(whole[-1])
    assert run(6) == whole
