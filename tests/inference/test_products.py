import copy

import pytest
import timm
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from fastvlm.inference import products
from fastvlm.inference.fast_decoder import FastDecoder
from fastvlm.inference.kv_cache import KVCache
from fastvlm.inference.levers import apply_levers
from fastvlm.models.llms.language_model import from_config


def in_float64(q, k, v, *, scale, bias=None):
    """The formula, every query head with keys of its own."""
    repeat = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(repeat, dim=1), v.double().repeat_interleave(repeat, dim=1)
    scores = q @ k.transpose(-2, -1) * scale
    return (scores if bias is None else scores + bias.double()).softmax(-1) @ v


@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2), (14, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_by_products_is_the_formula(heads, groups, masked):
    torch.manual_seed(0)
    q = torch.randn(2, heads, 9, 16).bfloat16()
    k, v = torch.randn(2, 2, groups, 13, 16).bfloat16()
    bias = None
    if masked:
        hidden = torch.rand(2, 1, 9, 13) < 0.4
        hidden[..., 0] = False
        bias = torch.zeros(hidden.shape, dtype=torch.bfloat16).masked_fill(hidden, -torch.inf)
    out, expected = products.attend(q, k, v, scale=0.25, bias=bias), in_float64(q, k, v, scale=0.25, bias=bias)
    assert out.shape == expected.shape
    assert (out.double() - expected).norm() / expected.norm() < 0.01


@pytest.fixture(scope="module")
def grouped_llm():
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 6}
    return from_config("qwen2", vocab_size=200, num_key_value_heads=2, initializer_range=0.15, **sizes).eval()


@torch.inference_mode()
def read(llm, *, mask=None, turns=(11, 7)):
    """Hidden states after two turns, the second on the first one's cache."""
    torch.manual_seed(1)
    fast, cache, hidden, done = FastDecoder(llm), KVCache(), [], 0
    for turn in turns:
        embeds = llm.embed(torch.randint(0, 200, (2, turn)))
        positions = torch.arange(done, done + turn).expand(2, -1)
        done += turn
        hidden.append(fast.decode(embeds, positions, None if mask is None else mask[:, :done], cache)[0])
    return torch.cat(hidden, dim=1).float()


@pytest.mark.parametrize("padded", [False, True])
def test_a_decoder_that_attends_in_bfloat16_reads_as_the_fused_kernel_does(grouped_llm, padded):
    mask = None
    if padded:
        mask = torch.ones(2, 18, dtype=torch.long)
        mask[0, :4] = 0
    expected = read(grouped_llm, mask=mask)
    llm = copy.deepcopy(grouped_llm)
    llm.attention_dtype = torch.bfloat16
    assert FastDecoder(llm)._bias(None, 0, torch.zeros(1, 5, 96)) is not None
    got = read(llm, mask=mask)
    assert 0 < (got - expected).norm() / expected.norm() < 0.02
    llm = llm.bfloat16()
    by_products = read(llm, mask=mask)
    products_pay, products.pays = products.pays, lambda *args, **kwargs: False
    try:
        fused = read(llm, mask=mask)
    finally:
        products.pays = products_pay
    error = lambda x: (x - expected).norm() / expected.norm()
    assert error(by_products) < 1.5 * error(fused) and not torch.equal(by_products, fused)


def test_many_positions_are_left_to_the_fused_kernel():
    pays = lambda length: products.pays(1, 14, length, length, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert pays(2000) and not pays(7000)
    assert not products.pays(1, 14, 9, 9, dtype=torch.float32, device=torch.device("cpu"))


def test_encoders_of_timm_and_transformers_are_switched_and_see_the_same():
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    clip = CLIPVisionModel(CLIPVisionConfig(**small, image_size=32, patch_size=8))
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2, num_classes=0)
    for model, see in ((clip, lambda m, x: m(x).last_hidden_state), (vit, lambda m, x: m.forward_features(x))):
        images = torch.randn(2, 3, 32, 32)
        model = model.eval().requires_grad_(False)
        exact = see(model, images)
        model = model.bfloat16()
        fused = see(model, images.bfloat16())
        products.use_products(model)
        by_products = see(model, images.bfloat16())
        assert (by_products.float() - exact).norm() / exact.norm() < 0.02 and not torch.equal(by_products, fused)
    assert clip.config._attn_implementation == products.NAME


def fastvit_of_timm():
    """The attention of FastViT, channels first."""
    return timm.models.fastvit.Attention(32, head_dim=8)


@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda: timm.layers.Attention(32, num_heads=4, qkv_bias=True), lambda n: (2, n * n, 32)),
        (
            lambda: timm.models.eva.EvaAttention(32, num_heads=4, qkv_fused=False, scale_norm=False, qk_norm=False),
            lambda n: (2, n * n, 32),
        ),
        (fastvit_of_timm, lambda n: (2, 32, n, n)),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_attention_of_timm_writes_few_weights_down_and_leaves_many_to_the_fused_kernel(
    make, shape, compiled, monkeypatch
):
    monkeypatch.setattr(products, "LARGEST", 2 * 4 * 16 * 16)  # two rows, four heads, a map of 4 x 4
    layer = make().eval().requires_grad_(False)
    exact = copy.deepcopy(layer).double()
    products.use_products(layer.bfloat16())
    products.use_products(layer)  # twice is as once
    assert len(layer._forward_pre_hooks) == 1
    layer = copy.deepcopy(layer)
    call, fused = layer, []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, **kwargs):
        fused.append(1)
        return kernel(*args, **kwargs)

    if compiled:
        torch._dynamo.reset()
        graphs = []
        backend = lambda graph, _: graphs.append(graph) or graph.forward
        call = torch.compile(layer, dynamic=False, fullgraph=True, backend=backend)
    else:
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    for side, expected in ((4, False), (5, True), (4, False)):
        x = torch.randn(shape(side))
        reference = exact(x.double())
        fused.clear()
        out = call(x.bfloat16())
        assert (out.double() - reference).norm() / reference.norm() < 0.02
        if compiled:
            graph = graphs[0 if side == 4 else 1]
            fused += [n for n in graph.graph.nodes if "scaled_dot_product_attention" in str(n.target)]
        assert bool(fused) == expected
    if compiled:
        assert len(graphs) == 2, "a graph for each size, and none for the choice"


def test_attention_of_timm_in_float32_stays_fused():
    layer = timm.layers.Attention(32, num_heads=4).eval()
    products.use_products(layer)
    layer(torch.randn(1, 4, 32))
    assert layer.fused_attn


def test_the_lever_bf16_pulls_it(tiny_model):
    model = copy.deepcopy(tiny_model)
    apply_levers(model, "bf16")
    assert FastDecoder(model.llm).attention_dtype == torch.bfloat16
    assert FastDecoder(tiny_model.llm).attention_dtype is None
