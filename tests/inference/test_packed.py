import copy
import io

import pytest
import torch
from test_engine import draw_prompts
from tiny_vlm import IMAGE_SIZE
from torch import nn

from fastvlm.inference import packed
from fastvlm.inference.engine import Engine
from fastvlm.inference.levers import apply_levers, count_bytes
from fastvlm.inference.packed import PackedLinear


@pytest.fixture
def small_layers_too(monkeypatch):
    monkeypatch.setattr(packed, "SMALLEST", 1)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_multiplies_as_the_formula_in_float64(dtype, bound, bias):
    torch.manual_seed(0)
    linear = nn.Linear(300, 130, bias=bias).to(dtype)
    layer = PackedLinear(linear)
    add = linear.bias.double() if bias else 0
    for rows in (torch.randn(300), torch.randn(1, 1, 300), torch.randn(3, 7, 300), torch.randn(5, 600)[:, ::2]):
        rows = rows.to(dtype)
        expected = rows.double() @ linear.weight.double().T + add
        with torch.inference_mode():
            got = layer(rows)
        assert got.dtype == dtype and got.shape == expected.shape
        assert (got.double() - expected).norm() / expected.norm() < bound
    assert layer(torch.randn(0, 300).to(dtype)).shape == (0, 130)


def test_packed_layers_hand_gradients_on(small_layers_too):
    torch.manual_seed(0)
    linear = nn.Linear(30, 20)
    rows = torch.randn(3, 30, requires_grad=True)
    gradients = [torch.autograd.grad(layer(rows).square().sum(), rows)[0] for layer in (PackedLinear(linear), linear)]
    torch.testing.assert_close(*gradients)


def test_greedy_answers_stay_as_they_were(tiny_model, tiny_tokenizer, small_layers_too):
    records, images = draw_prompts(10, seed=12)
    options = {"image_size": IMAGE_SIZE, "max_new_tokens": 8}
    expected = Engine(copy.deepcopy(tiny_model), tiny_tokenizer, **options).generate(records, images)
    model = copy.deepcopy(tiny_model)
    assert apply_levers(model, "packed") == ("packed",)
    assert sum(isinstance(m, PackedLinear) for m in model.llm.modules()) == 2 * 7 + 1
    assert not any(type(m) is nn.Linear for m in model.modules())
    engine = Engine(model, tiny_tokenizer, **options)
    assert engine.fast is not None
    answers = engine.generate(records, images)
    assert [a.token_ids for a in answers] == [e.token_ids for e in expected]
    stock = Engine(model, tiny_tokenizer, fast=False, **options).generate(records, images)
    assert [a.token_ids for a in stock] == [e.token_ids for e in expected]


def test_weights_are_saved_bit_by_bit_and_other_ones_loaded(tiny_model, small_layers_too):
    model, plain = copy.deepcopy(tiny_model), tiny_model.state_dict()
    apply_levers(model, "packed")
    saved = model.state_dict()
    assert saved.keys() == plain.keys() and all(torch.equal(saved[key], plain[key]) for key in plain)
    file = io.BytesIO()
    torch.save(model.llm, file)
    file.seek(0)
    pixels = torch.stack(draw_prompts(4)[1][0])
    ids = torch.arange(9)[None]
    read = lambda llm: llm.prefill(llm.embed(ids), torch.ones_like(ids))[0]
    with torch.inference_mode():
        for twin in (copy.deepcopy(model.llm), torch.load(file, weights_only=False)):
            assert torch.equal(read(twin), read(model.llm))
    other = {key: value + 0.01 if value.is_floating_point() else value for key, value in plain.items()}
    model.load_state_dict(other)
    fresh = copy.deepcopy(tiny_model)
    fresh.load_state_dict(other)
    with torch.inference_mode():
        torch.testing.assert_close(model.encode_images(pixels), fresh.encode_images(pixels), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(read(model.llm), read(fresh.llm), atol=1e-4, rtol=1e-4)
    name = "llm.hf.model.layers.0.mlp.up_proj.weight"
    with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
        model.load_state_dict({key: value for key, value in plain.items() if key != name})
    with pytest.raises(RuntimeError, match=rf"{name}: \(2, 2\) in the checkpoint, \(64, 32\) in the model"):
        model.load_state_dict({**plain, name: torch.zeros(2, 2)})


def test_a_weight_is_held_once_and_changes_in_place_are_refused(small_layers_too):
    layer = nn.Linear(64, 32)
    box = nn.Sequential(layer)
    before = count_bytes(box)
    packed.pack_linears(box)
    assert count_bytes(box) == before and sum(p.numel() for p in box.parameters()) == 32
    assert (box[0].weight.dtype, box[0].weight.device, box[0].weight.shape) == (
        layer.weight.dtype,
        layer.weight.device,
        layer.weight.shape,
    )
    with pytest.raises(RuntimeError):  # a change in place would be lost in silence
        box[0].weight.data += torch.ones(32, 64)
    with pytest.raises(ValueError, match="packed weights stay on the CPU"):
        box.to("meta")
    rows = torch.randn(4, 64)
    expected = layer(rows)
    box.to(torch.bfloat16)
    assert box[0].packed.dtype == torch.bfloat16
    assert (box(rows.bfloat16()).float() - expected).norm() / expected.norm() < 0.02
    assert torch.equal(box.float()[0].state_dict()["weight"], layer.weight.bfloat16().float())


def test_a_model_of_small_layers_has_no_use_for_it(tiny_model):
    with pytest.raises(ValueError, match="levers=packed: the model has no linear layers of 65,536 weights or more"):
        apply_levers(copy.deepcopy(tiny_model), "packed")
