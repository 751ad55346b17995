"""A quantised layer is its library's layer, has the gradient of the weight it computes with, and comes back plain."""

import copy

import pytest
import torch
from torch import nn

from fastvlm.models.quantised import KINDS, QuantisedLinear, frozen_linears, quantise

# The share of a weight that is lost: half a step of 255, of 16 levels by quantile, of three bits of mantissa.
LOST = {"int8": 0.006, "torchao_int8": 0.006, "nf4": 0.10, "fp4": 0.12, "torchao_fp8": 0.03, "torchao_int4": 0.11}


def make(kind: str, *, bias: bool = True) -> tuple[nn.Linear, QuantisedLinear, torch.Tensor]:
    pytest.importorskip(KINDS[kind][0])
    torch.manual_seed(0)
    linear = nn.Linear(128, 64, bias=bias)
    for p in linear.parameters():
        p.requires_grad_(False)
    return linear, QuantisedLinear(linear, kind), torch.randn(3, 5, 128)


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", LOST)
def test_it_computes_with_a_weight_near_the_one_it_was_made_from(kind):
    linear, layer, x = make(kind)
    assert relative(layer.weight, linear.weight) < LOST[kind]
    assert relative(layer(x), nn.functional.linear(x, layer.weight, layer.bias)) < 0.003
    plain = layer.restore()
    assert type(plain) is nn.Linear and plain.weight.dtype == torch.float32
    assert relative(plain(x), layer(x)) < 0.003
    assert layer.codes.dtype.itemsize == 1 or kind.startswith("torchao")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", LOST)
def test_its_input_has_a_gradient_also_after_a_forward_pass_in_eval(kind, bias):
    _, layer, x = make(kind, bias=bias)
    with torch.no_grad():
        layer.eval()(x)
    x = x.requires_grad_()
    out = layer.train()(x)
    up = torch.randn_like(out)
    out.backward(up)
    assert relative(x.grad, up @ layer.weight) < 0.003


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])
def test_it_is_bitsandbytes_own_layer(kind):
    bnb = pytest.importorskip("bitsandbytes")
    linear, layer, x = make(kind)
    if kind == "int8":
        theirs = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False, threshold=6.0)
    else:
        theirs = bnb.nn.Linear4bit(128, 64, quant_type=kind)
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cpu").train()
    x = x.requires_grad_()
    torch.testing.assert_close(layer(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["torchao_int8", "torchao_int4"])
def test_torchao_is_torchaos_own_weight(kind):
    torchao = pytest.importorskip("torchao.quantization")
    linear, layer, x = make(kind)
    theirs = nn.Sequential(copy.deepcopy(linear))
    if kind == "torchao_int8":
        config = torchao.Int8WeightOnlyConfig()
    else:
        config = pytest.importorskip("torchao.prototype.quantization.int4").PrototypeInt4WeightOnlyConfig(group_size=64)
    torchao.quantize_(theirs, config)
    torch.testing.assert_close(layer(x), theirs(x), rtol=0, atol=0)


def test_four_bits_packed_anew_from_their_own_weight_are_the_same_bits():
    _, layer, _ = make("torchao_int4")
    again = QuantisedLinear(layer.restore(), "torchao_int4")
    assert relative(again.weight, layer.weight) < 1e-6
    assert (again.codes.qdata != layer.codes.qdata).float().mean() < 0.01  # a value between two codes


def test_layers_that_four_bit_kernels_do_not_take_are_left_alone():
    pytest.importorskip("torchao")
    net = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 72), nn.Linear(72, 64)).requires_grad_(False)
    assert quantise(net, "torchao_int4") == 128 * 64
    assert [type(layer) for layer in net] == [QuantisedLinear, nn.Linear, nn.Linear]
    with pytest.raises(ValueError, match="there is no frozen linear layer of 64 inputs or a multiple"):
        quantise(net[1:], "torchao_int4")


def test_it_leaves_no_codes_in_a_state_dict_and_loads_without_them():
    _, layer, _ = make("nf4")
    state = layer.state_dict()
    assert set(state) == {"bias"}
    layer.load_state_dict({"bias": torch.ones(64)})
    assert torch.equal(layer.bias, torch.ones(64))


def test_under_autocast_the_matrix_product_is_in_bf16():
    for kind in ("int8", "nf4"):
        _, layer, x = make(kind)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16


def test_what_learns_shares_its_weight_or_is_read_past_its_forward_is_left_alone():
    pytest.importorskip("bitsandbytes")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.learns, self.frozen = nn.Linear(64, 64), nn.Linear(64, 64)
            self.embed, self.head, self.attend = nn.Embedding(8, 64), nn.Linear(64, 8), nn.MultiheadAttention(64, 2)
            self.head.weight = self.embed.weight

    net = Net().requires_grad_(False)
    net.learns.requires_grad_(True)
    assert [name for _, name, _ in frozen_linears(net)] == ["frozen"]
    assert quantise(net, "nf4") == 64 * 64
    with pytest.raises(ValueError, match="here=nf4: there is no frozen linear layer"):
        quantise(net, "nf4", where="here")


def test_a_missing_library_is_one_line_with_the_extra(monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *args, **options):
        if name.split(".")[0] in ("bitsandbytes", "torchao"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    for kind in ("nf4", "torchao_int8"):
        with pytest.raises(ValueError, match=rf"here={kind} needs {KINDS[kind][0]}: pip install '\.\[quant\]'"):
            quantise(nn.Linear(2, 2), kind, where="here")
    from fastvlm.stages import adamw_8bit

    with pytest.raises(ValueError, match=r"optimizer=adamw8bit needs bitsandbytes: pip install '\.\[quant\]'"):
        adamw_8bit([])
