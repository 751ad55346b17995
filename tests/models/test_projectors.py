"""Projectors: each form of attention against a masked float64 reference, its cost, and the stock classes."""

import pytest
import torch
import torch.nn.functional as F
from part_options import PROJECTORS, build_projector, relative_error
from safetensors.torch import load_model, save_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from fastvlm.models.projectors.cross_modal import FORMS, CrossModalAdapter
from fastvlm.models.projectors.linear import LinearProjector
from fastvlm.models.projectors.mlp import MLPProjector

EXACT = 1e-5


def visible(form: str, count: int, *, num_queries: int, window: int, stride: int) -> torch.Tensor:
    """Which of the tokens, and the learned queries behind them, each token sees: (count, count + num_queries)."""
    i, j = torch.arange(count)[:, None], torch.arange(count)[None]
    own = {
        "full": torch.ones(count, count, dtype=torch.bool),
        "linear": torch.ones(count, count, dtype=torch.bool),
        "sparse": (i - j).abs() <= window,
        "strided": (i - j) % stride == 0,
    }[form]
    return torch.cat([own, torch.ones(count, num_queries, dtype=torch.bool)], dim=1)


def reference(part: CrossModalAdapter, tokens: torch.Tensor, form: str, heads: int, mask: torch.Tensor) -> torch.Tensor:
    """Dense attention in float64, one head at a time."""
    weights = {k: v.double() for k, v in part.state_dict().items()}
    x = tokens.double()
    dim = x.shape[-1] // heads
    for b in range(len(part.blocks)):
        w = lambda name, b=b: weights[f"blocks.{b}.{name}"]
        norm = lambda x, name, w=w: F.layer_norm(x, x.shape[-1:], w(f"{name}.weight"), w(f"{name}.bias"))
        normed = norm(x, "norm")
        shared = w("queries").expand(len(x), -1, -1) if f"blocks.{b}.queries" in weights else normed[:, :0]
        context = torch.cat([normed, shared], 1)
        out = []
        for h in range(heads):
            rows = slice(h * dim, (h + 1) * dim)
            q, k, v = (
                normed @ w("to_q.weight")[rows].T,
                context @ w("to_k.weight")[rows].T,
                context @ w("to_v.weight")[rows].T,
            )
            if form == "linear":
                pairs = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
            else:
                pairs = (q @ k.mT / dim**0.5).exp() * mask
            out.append(pairs / pairs.sum(-1, keepdim=True) @ v)
        x = x + torch.cat(out, -1) @ w("to_out.weight").T
        hidden = F.gelu(norm(x, "norm_mlp") @ w("mlp.0.weight").T + w("mlp.0.bias"))
        x = x + hidden @ w("mlp.2.weight").T + w("mlp.2.bias")
    x = x @ weights["project.weight"].T + weights["project.bias"]
    return F.layer_norm(x, x.shape[-1:], weights["norm.weight"], weights["norm.bias"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_queries", [0, 3])
@pytest.mark.parametrize(("count", "window", "stride"), [(12, 3, 4), (13, 4, 5), (5, 8, 8), (1, 1, 1), (20, 1, 3)])
def test_a_form_of_attention_is_the_masked_dense_one(form, num_queries, count, window, stride):
    torch.manual_seed(0)
    sizes = {"num_queries": num_queries, "window": window, "stride": stride}
    part = CrossModalAdapter(in_dim=16, out_dim=12, attention=form, depth=2, heads=4, **sizes)
    for block in part.blocks:  # sharp attention, so that a wrong neighbour shows
        block.to_q.weight.data *= 3
        block.to_k.weight.data *= 3
    tokens = torch.randn(2, count, 16)
    expected = reference(part, tokens, form, 4, visible(form, count, **sizes))
    assert relative_error(part(tokens), expected) <= EXACT


@pytest.mark.parametrize("form", FORMS)
def test_no_gradient_is_lost_or_nan_where_the_last_block_is_not_full(form):
    torch.manual_seed(0)
    part = CrossModalAdapter(in_dim=16, out_dim=12, attention=form, heads=4, num_queries=0, window=4, stride=5)
    tokens = torch.randn(2, 13, 16, requires_grad=True)
    out = part(tokens)
    (out * torch.randn_like(out)).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in [tokens, *part.parameters()])


def attention_flops(form: str, count: int) -> int:
    with torch.device("meta"):
        part = CrossModalAdapter(in_dim=64, out_dim=64, attention=form, heads=4, window=8, stride=count // 8)
        with FlopCounterMode(display=False) as counter:
            part(torch.zeros(1, count, 64))
        linear = sum(2 * m.in_features * m.out_features for m in part.modules() if isinstance(m, torch.nn.Linear))
        shared = 16 * 2 * 2 * 64 * 64  # keys and values of the 16 learned queries
    return counter.get_total_flops() - linear * count - shared


@pytest.mark.parametrize(("form", "growth"), [("full", 4), ("linear", 2), ("sparse", 2)])
def test_doubling_the_tokens_doubles_the_attention_of_all_but_the_full_form(form, growth):
    ratio = attention_flops(form, 1024) / attention_flops(form, 512)
    assert abs(ratio - growth) < 0.1
    assert form == "full" or attention_flops(form, 1024) < attention_flops("full", 1024) / 8


def test_strided_attention_costs_its_share_of_the_pairs():
    assert attention_flops("strided", 1024) < attention_flops("full", 1024) / 30  # 8 tokens and 16 queries of 1040


def test_the_mlp_without_norm_is_llavas_projector():
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "hidden_size": 8, "num_attention_heads": 2},
        text_config={"model_type": "llama", "hidden_size": 12, "num_attention_heads": 2},
    )
    theirs = LlavaMultiModalProjector(config)
    ours = MLPProjector(in_dim=8, out_dim=12, norm=False)
    weights = theirs.state_dict()
    names = {"0": "linear_1", "2": "linear_2"}
    ours.load_state_dict({k: weights[f"{names[k[0]]}.{k[2:]}"] for k in ours.state_dict()})
    tokens = torch.randn(2, 5, 8)
    assert relative_error(ours(tokens), theirs(tokens)) <= EXACT


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_the_mlps_readout_is_honeybees(depth, activation):
    part = MLPProjector(in_dim=8, out_dim=12, depth=depth, activation=activation, norm=False)
    x = tokens = torch.randn(2, 5, 8)
    x = x.double()
    for i in range(depth):
        x = x @ part[2 * i].weight.double().T + part[2 * i].bias.double()
        if i < depth - 1:
            x = x * torch.sigmoid(x) if activation == "silu" else F.gelu(x)
    assert relative_error(part(tokens), x) <= EXACT


@pytest.mark.parametrize("name", PROJECTORS)
def test_a_projector_yields_the_texts_width_learns_whole_and_survives_saving(name, tmp_path):
    torch.manual_seed(0)
    one = build_projector(name, in_dim=16, out_dim=12)
    torch.manual_seed(1)
    other = build_projector(name, in_dim=16, out_dim=12)
    tokens = torch.randn(2, 9, 16, requires_grad=True)
    out = one(tokens)
    assert out.shape == (2, 9, 12) and one(tokens[:0]).shape == (0, 9, 12)
    (out * torch.randn_like(out)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in [tokens, *one.parameters()])
    save_model(one, str(tmp_path / "part.safetensors"))
    load_model(other, str(tmp_path / "part.safetensors"))
    assert torch.equal(one(tokens), other(tokens))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert one(tokens).isfinite().all()


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (LinearProjector, {"norm": "batch"}, ["projector.norm=batch", "layer, rms"]),
        (MLPProjector, {"depth": 0}, ["projector.depth=0"]),
        (MLPProjector, {"activation": "relu"}, ["projector.activation=relu", "gelu, silu"]),
        (CrossModalAdapter, {"attention": "dense"}, ["projector.attention=dense", "full, linear, sparse, strided"]),
        (CrossModalAdapter, {"heads": 3}, ["projector.heads=3", "16"]),
        (CrossModalAdapter, {"window": 0}, ["projector.window=0"]),
        (CrossModalAdapter, {"stride": 0}, ["projector.stride=0"]),
        (CrossModalAdapter, {"num_queries": -1}, ["projector.num_queries=-1"]),
    ],
)
def test_an_impossible_projector_is_refused_by_key(cls, options, words):
    with pytest.raises(ValueError, match="projector") as error:
        cls(in_dim=16, out_dim=12, **options)
    assert [word for word in words if word not in str(error.value)] == []
