import copy

import pytest
import torch
from test_engine import draw_prompts
from tiny_vlm import IMAGE_SIZE
from torch import nn

from fastvlm.inference.depthwise import split_depthwise
from fastvlm.inference.engine import Engine
from fastvlm.inference.int8 import DynamicInt8Linear, WeightOnlyInt8Linear, quantise_linears, round_weight
from fastvlm.inference.levers import FAST, apply_levers, compile_encoder, count_bytes, parse_levers
from fastvlm.models.llms.language_model import from_config


@pytest.fixture(scope="module")
def wide_llm():
    """A language model with layers wide enough for 8 bits, and rows it reads."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    llm = from_config("qwen2", vocab_size=300, num_key_value_heads=2, initializer_range=0.1, **sizes).eval()
    return llm, torch.randn(2, 9, 128)


def read(llm, embeds):
    with torch.inference_mode():
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        return llm.prefill(embeds, mask)[0].float()


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("form", [DynamicInt8Linear, WeightOnlyInt8Linear])
def test_8_bit_products_are_those_of_the_rounded_weights(has_bias, form):
    """Reference: the rounded weights in float64, with rows as they are."""
    torch.manual_seed(3)
    linear = nn.Linear(96, 80, bias=has_bias)
    weight, scale = round_weight(linear.weight.detach())
    exact = weight.double() * scale.double()[:, None]
    assert (exact - linear.weight.double()).abs().max() <= scale.max() / 2 + 1e-9
    rows = torch.randn(5, 7, 96) * torch.logspace(-4, 3, 7)[:, None]  # no row may coarsen another's steps
    bias = 0 if linear.bias is None else linear.bias.detach().double()
    expected = rows.double() @ exact.T + bias
    alone = [(rows[:1, [column]], expected[:1, [column]]) for column in range(7)]
    for given, wanted in ((rows, expected), *alone):
        with torch.inference_mode():
            error = (form(linear)(given).double() - wanted).norm(dim=-1) / (wanted - bias).norm(dim=-1)
        assert error.max() < 0.012


@pytest.mark.parametrize("form", [DynamicInt8Linear, WeightOnlyInt8Linear])
def test_an_8_bit_row_is_the_same_alone_and_beside_others(form):
    torch.manual_seed(4)
    layer, usual = form(nn.Linear(96, 80, bias=False)), torch.randn(4, 96)
    scales = torch.tensor([1e-25, 1e-9, 1e3, 1e20])[:, None]
    # Large and tiny ones, those of one sign, zeros, and one value alone.
    rows = torch.cat([usual, usual * scales, usual.abs(), -usual.abs() * scales, torch.zeros(1, 96), torch.eye(96)[:2]])
    with torch.inference_mode():
        together = layer(rows)
        for i, row in enumerate(rows):
            for alone in (rows[i : i + 1], rows[None, i : i + 1], torch.stack([row, -row, row.abs()])):
                assert torch.equal(layer(alone).reshape(-1, 80)[0], together[i]), i
            assert torch.equal(layer(rows[: i + 1])[i], together[i])
    assert not together[16].any() and together[:16].abs().amax(dim=1).min() > 0, "the smallest are not rounded away"


@pytest.mark.parametrize("kind, bound", [("dynamic", 0.05), ("weight_only", 0.05)])
def test_a_language_model_of_8_bits_gives_nearly_the_same_logits_with_fewer_bytes(wide_llm, kind, bound):
    llm, embeds = wide_llm
    expected, quantised = read(llm, embeds), copy.deepcopy(llm)
    assert quantise_linears(quantised, kind=kind) == 2 * 7 + 1
    logits = read(quantised, embeds)
    error = (logits - expected).norm() / expected.norm()
    assert 0 < error < bound
    assert count_bytes(quantised) < 0.45 * count_bytes(llm)
    with pytest.raises(ValueError, match="int8 of kind static is not one of dynamic, weight_only"):
        quantise_linears(quantised, kind="static")


def test_exact_levers_change_no_answer(tiny_model, tiny_tokenizer):
    records, images = draw_prompts(10, seed=12)
    options = {"image_size": IMAGE_SIZE, "max_new_tokens": 8}
    expected = Engine(copy.deepcopy(tiny_model), tiny_tokenizer, **options).generate(records, images)
    model = copy.deepcopy(tiny_model)
    levers = ("reparameterize", "channels_last", "depthwise")
    assert apply_levers(model, levers) == levers
    assert count_bytes(model.encoder) < count_bytes(tiny_model.encoder)
    answers = Engine(model, tiny_tokenizer, **options).generate(records, images)
    assert [a.token_ids for a in answers] == [e.token_ids for e in expected]


@pytest.mark.parametrize("several, stride, bias", [(2, 2, True), (3, 1, False)])
def test_a_convolution_that_widens_channels_is_the_same_split(several, stride, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6 * several, 5, stride=stride, padding=2, groups=6, bias=bias)
    box = nn.Sequential(copy.deepcopy(conv), nn.Conv2d(6 * several, 6 * several, 3, groups=6 * several))
    assert split_depthwise(box) == 1  # a convolution of one map a channel stays
    assert box.state_dict().keys() - {"1.weight", "1.bias"} == {f"0.{key}" for key in conv.state_dict()}
    maps = torch.randn(2, 6, 12, 10)
    for given in (maps, maps.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(box[0](given), conv(given), atol=1e-5, rtol=1e-5)


def test_bf16_changes_logits_a_little_and_halves_the_weights(tiny_model, tiny_tokenizer):
    model = copy.deepcopy(tiny_model)
    apply_levers(model, "bf16")
    pixels = torch.stack([image for images in draw_prompts(4)[1] for image in images])
    with torch.inference_mode():
        expected, tokens = tiny_model.encode_images(pixels), model.encode_images(pixels).float()
    assert 0 < (tokens - expected).norm() / expected.norm() < 0.05
    assert count_bytes(model.llm) == count_bytes(tiny_model.llm) / 2 or count_bytes(model.llm) < 0.6 * count_bytes(
        tiny_model.llm
    )
    engine = Engine(model, tiny_tokenizer, image_size=IMAGE_SIZE, max_new_tokens=6)
    records, images = draw_prompts(6, seed=1)
    assert all(len(g.token_ids) == 6 for g in engine.generate(records, images))


@pytest.mark.slow
def test_a_compiled_encoder_gives_the_same_tokens(tiny_model):
    model = copy.deepcopy(tiny_model)
    apply_levers(model, "reparameterize,channels_last,compile")
    pixels = torch.stack([image for images in draw_prompts(4)[1] for image in images])
    with torch.inference_mode():
        torch.testing.assert_close(model.encode_images(pixels), tiny_model.encode_images(pixels), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_compiled_encoder_has_its_weights_laid_out_for_the_kernels(tiny_model):
    """torch.compile(options={"freezing": True}) says nothing and freezes nothing; the kernels called tell."""
    model = copy.deepcopy(tiny_model).eval().requires_grad_(False)
    compile_encoder(model)
    pixels = torch.stack(draw_prompts(4)[1][0])
    with torch.inference_mode():
        model.encode_images(pixels)
        with torch.profiler.profile() as profile:
            model.encode_images(pixels)
    assert "mkldnn::_convolution_pointwise" in {event.key for event in profile.key_averages()}
    with pytest.raises(ValueError, match="levers=compile: the encoder's weights are constants"):
        model.load_state_dict(tiny_model.state_dict())


def test_levers_are_named_and_mistakes_are_one_line():
    assert parse_levers("reparameterize, bf16,reparameterize") == ("reparameterize", "bf16")
    assert parse_levers("fast") == FAST["cpu"] and parse_levers("fast", device="cuda:1") == FAST["cuda"]
    assert parse_levers(None) == parse_levers("none") == parse_levers("") == ()
    mistakes = {
        "bf61": "levers=bf61 is not a lever: did you mean bf16",
        "int8_dynamic,int8_weight_only": "exclude each other",
    }
    for text, message in mistakes.items():
        with pytest.raises(ValueError, match=message):
            parse_levers(text)


def test_a_lever_that_finds_nothing_to_do_is_refused(tiny_model):
    with pytest.raises(ValueError, match="no linear layers of 64 or wider"):
        apply_levers(copy.deepcopy(tiny_model), ["int8_weight_only"])
    model = copy.deepcopy(tiny_model)
    model.encoder = nn.Flatten()
    with pytest.raises(ValueError, match="Flatten has no branches to fold"):
        apply_levers(model, ["reparameterize"])
    assert apply_levers(copy.deepcopy(tiny_model), "fast") == tuple(
        lever for lever in FAST["cpu"] if lever != "int8_dynamic"
    )
