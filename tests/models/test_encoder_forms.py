"""Encoders made of encoders: multi-scale, multi-granularity, early exit."""

import pytest
import timm
import torch
from part_options import relative_error
from small_parts import IMAGE_ID, make_batch, random_ids, small_encoder, small_llm
from torch import nn

from fastvlm.data.collate import tiles_among
from fastvlm.models.encoders.early_exit import EarlyExitEncoder, exit_probabilities
from fastvlm.models.encoders.fastvit import FastViT
from fastvlm.models.encoders.multi_granularity import MultiGranularityEncoder
from fastvlm.models.encoders.multi_scale import MultiScaleEncoder
from fastvlm.models.encoders.timm_encoder import TimmEncoder
from fastvlm.models.encoders.transformers_encoder import from_config
from fastvlm.models.flops import count_flops
from fastvlm.models.projectors.mlp import MLPProjector
from fastvlm.models.resamplers.avgpool import AvgPoolResampler
from fastvlm.models.resamplers.identity import IdentityResampler
from fastvlm.models.vlm import VLM, tiles_of
from fastvlm.stages import LanguageStage

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def three_stages(**options) -> FastViT:
    stages = {"dims": [8, 16, 32], "depths": [1, 1, 1], "attention": [False, False, True], "stem_stride": 2}
    return small_encoder(**(stages | options))


def vit(model_type="clip_vision_model", *, seed=0, **options):
    torch.manual_seed(seed)
    more = {"mlp_ratio": 2} if model_type == "dinov2" else {"intermediate_size": 32}
    stats = {"mean": [0.1 + seed, 0.2, 0.3], "std": [0.5 + seed, 0.6, 0.7]}
    return from_config(model_type, config=SIZE | more, **(stats | options))


def warm(encoder: nn.Module, size: int = 32) -> nn.Module:
    """Norm statistics as training could have left them."""
    with torch.no_grad():
        for _ in range(20):
            encoder.train()(torch.randn(8, 3, size, size))
    return encoder.eval()


# ------------------------------------------------------------------------------------------------------- multi-scale


@pytest.mark.parametrize("name", ["fastvit_t8", "test_convnext"])
def test_multi_scale_average_is_timms_intermediates_pooled_and_concatenated(name):
    torch.manual_seed(0)
    encoder = MultiScaleEncoder(TimmEncoder(name), pool="average").double().eval()
    model = encoder.encoder.model
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        final, maps = model.forward_intermediates(images)
        side = 64 // encoder.stride
        pooled = [nn.functional.adaptive_avg_pool2d(m, side) for m in maps[:-1]]
        expected = torch.cat([final, *pooled], dim=1).flatten(2).mT
        assert relative_error(encoder(images), expected) < 1e-10
    assert encoder.out_dim == expected.shape[2] and encoder.num_patches(64) == side**2


def test_the_depthwise_pool_is_a_convolution_of_one_cell_that_begins_as_the_average():
    images = torch.randn(2, 3, 32, 32)
    encoder, average = (MultiScaleEncoder(three_stages(), pool=pool).eval() for pool in ("depthwise", "average"))
    torch.testing.assert_close(encoder(images), average(images))
    conv = encoder.pools["0"]
    assert (conv.kernel_size, conv.stride, conv.groups) == ((4, 4), (4, 4), 8)
    nn.init.normal_(conv.weight)
    assert relative_error(encoder(images), average(images)) > 0.1


def test_some_stages_only():
    encoder = MultiScaleEncoder(three_stages(), stages=[1])
    assert encoder.out_dim == 32 + 16 and encoder(torch.randn(1, 3, 32, 32)).shape == (1, 16, 48)


@pytest.mark.parametrize("form", [MultiScaleEncoder, lambda e: EarlyExitEncoder(e, exits=[0], threshold=1.0)])
def test_reparameterising_below_changes_no_output(form):
    encoder = warm(form(three_stages()))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = encoder(images)
        torch.testing.assert_close(encoder.reparameterize()(images), before, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in encoder.modules())


# ------------------------------------------------------------------------------------------------ multi-granularity


def test_views_are_ferret_v2s_equations():
    encoder = MultiGranularityEncoder(vit(), vit("dinov2", seed=1), dim=24).double().eval()
    images = torch.rand(5, 3, 32, 32, dtype=torch.float64)
    is_tile = torch.tensor([False, True, True, False, True])
    expected = []
    for image, tile in zip(images, is_tile):
        part = encoder.fine if tile else encoder.coarse
        first, _, last = encoder.fine_mlp if tile else encoder.coarse_mlp
        mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (part.mean, part.std))
        patches = part(((image - mean) / std)[None])[0]
        hidden = patches @ first.weight.T + first.bias
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        expected.append(hidden @ last.weight.T + last.bias)
    assert relative_error(encoder(images, is_tile), torch.stack(expected)) < 1e-6  # statistics are stored in float32


@pytest.mark.parametrize("fusion", ["concat", "sum", "attention"])
def test_a_fusion_reads_both_encoders_on_every_view(fusion):
    encoder = MultiGranularityEncoder(vit(), vit("dinov2", seed=1), fusion=fusion, heads=2)
    images = torch.rand(2, 3, 32, 32)
    encoder(images).square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] in ([], KEY_BIASES)
    assert not encoder.reads_views


# Attention does not depend on what is added to all keys, so its key biases have no gradient in exact arithmetic.
KEY_BIASES = []


def test_a_fine_map_of_another_grid_is_laid_on_the_coarse_one():
    fine = small_encoder(depths=[1, 1], stem_stride=2)
    encoder = MultiGranularityEncoder(vit(), fine, fusion="concat").eval()
    assert fine.num_patches(32) == 64 and encoder(torch.rand(1, 3, 32, 32)).shape == (1, 16, 16)
    with pytest.raises(ValueError, match="a global view has 16 patches and a tile 64 .* encoder.fusion=attention"):
        MultiGranularityEncoder(vit(), fine).num_patches(32)
    with pytest.raises(ValueError, match="encoder.coarse yields 17 patches, 4 x 4 and a class token"):
        MultiGranularityEncoder(vit(class_token=True), fine, fusion="sum").num_patches(32)


@pytest.mark.parametrize("tiles", [None, [False, True], [True, True]])
def test_every_parameter_is_touched_whatever_views_a_step_has(tiles):
    encoder = MultiGranularityEncoder(vit(), small_encoder()).train()
    before = encoder.fine.stages[2].token_mixer.norm.identity.running_mean.clone() if tiles is None else None
    encoder(torch.rand(2, 3, 32, 32), None if tiles is None else torch.tensor(tiles)).sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []
    if before is not None:  # nor do norm statistics see the blank image
        assert torch.equal(before, encoder.fine.stages[2].token_mixer.norm.identity.running_mean)


def test_a_vlm_hands_on_which_views_are_tiles():
    encoder, llm = MultiGranularityEncoder(vit(), vit("dinov2", seed=1)).eval(), small_llm()
    model = VLM(
        encoder, IdentityResampler(in_dim=16), MLPProjector(in_dim=16, out_dim=32), llm, image_token_id=IMAGE_ID
    )
    slots = [IMAGE_ID] * 48
    batch = make_batch([[slots + random_ids(3)[0]]], images=3, image_size=32)
    batch.layouts = torch.tensor([[1, 2, 32, 64]])
    is_tile = tiles_of(batch.layouts)
    assert is_tile.tolist() == tiles_among([3]).tolist() == [False, True, True] and tiles_among([1, 1]) is None
    assert (
        tiles_of(torch.tensor([[2, 2, 9, 9], [1, 1, 9, 9], [1, 3, 9, 9]])).tolist() == tiles_among([5, 1, 4]).tolist()
    )
    seen = model.patches(batch)
    images = model.normalise(batch.pixel_values)
    torch.testing.assert_close(seen, encoder(images, is_tile))
    assert relative_error(seen, encoder(images)) > 0.1


# -------------------------------------------------------------------------------------------------------- early exit


def test_exit_probabilities_are_ponder_nets_in_float64():
    logits = torch.randn(50, 3, dtype=torch.float64) * 5
    leave = logits.sigmoid()
    stay = torch.cat([torch.ones(50, 1), (1 - leave).cumprod(1)], dim=1)
    expected = stay * torch.cat([leave, torch.ones(50, 1)], dim=1)
    torch.testing.assert_close(exit_probabilities(logits), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(expected.sum(1), torch.ones(50, dtype=torch.float64))


def test_at_first_every_exit_is_as_likely_as_any_other():
    encoder = EarlyExitEncoder(three_stages(), exits=[0, 1])
    logits = torch.cat([gate(torch.randn(4, dim)) for gate, dim in zip(encoder.gates, (8, 16))], dim=1)
    torch.testing.assert_close(exit_probabilities(logits), torch.full((4, 3), 1 / 3))


def leaving(encoder: EarlyExitEncoder, seed: int = 1) -> EarlyExitEncoder:
    """Gates that let different images leave at different exits."""
    warm(encoder)
    generator, x = torch.Generator().manual_seed(seed), IMAGES
    with torch.no_grad():
        for stage, gate in enumerate(encoder.gates):
            x = encoder.encoder.advance(stage, x)
            gate[1].weight.normal_(std=30.0, generator=generator)
            gate[1].bias -= gate(x.mean((2, 3))).median()
    return encoder


IMAGES = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("num_tokens", [None, [1, 4]])
def test_an_image_that_leaves_has_what_its_exits_head_says_whatever_stands_beside_it(num_tokens):
    encoder = leaving(EarlyExitEncoder(three_stages(), exits=[0, 1], num_tokens=num_tokens))
    images, maps, x = IMAGES, [], IMAGES
    with torch.no_grad():
        patches, taken = encoder._leave(images)
        for stage in range(3):
            x = encoder.encoder.advance(stage, x)
            maps.append(x)
        ends = encoder.encoder(images)
        for i, exit in enumerate(taken.tolist()):
            gates = [float(encoder.gates[k](maps[k][i : i + 1].mean((2, 3))).sigmoid()) for k in (0, 1)]
            assert exit == next((k for k in (0, 1) if gates[k] > 0.5), 2)
            number = encoder.tokens_at(32)[exit]
            own = ends[i]
            if exit < 2:
                side = int(number**0.5)
                pooled = nn.functional.adaptive_avg_pool2d(maps[exit][i], side).flatten(1).T
                own = encoder.heads[exit](pooled)
            assert not patches[i, : 16 - number].any()
            torch.testing.assert_close(patches[i, 16 - number :], own, rtol=1e-4, atol=1e-5)
    assert set(taken.tolist()) == {0, 1, 2}
    _, measured = encoder.take_auxiliary() if encoder(images) is not None else None
    tokens = torch.tensor(encoder.tokens_at(32), dtype=torch.float32)[taken].mean()
    torch.testing.assert_close(measured["vision_tokens"], tokens)


def test_ranks_that_share_the_weights_run_every_stage_also_when_no_image_is_left():
    torch.manual_seed(0)
    encoder = EarlyExitEncoder(three_stages(), exits=[0, 1], num_tokens=[1, 4], threshold=0.0).eval()
    images, ran, advance = torch.randn(3, 3, 32, 32), [], encoder.encoder.advance
    encoder.encoder.advance = lambda stage, x: ran.append(stage) or advance(stage, x)
    with torch.no_grad():
        alone = encoder(images)
        next(encoder.encoder.parameters()).ds_id = 0  # as of a parameter that ranks share
        together = encoder(images)
    assert ran == [0, 0, 1, 2] and torch.equal(together, alone)


def test_training_takes_one_exit_an_image_in_value_and_reaches_every_gate_and_head():
    torch.manual_seed(0)
    encoder = EarlyExitEncoder(three_stages(), exits=[0, 1], num_tokens=[1, 4]).train()
    patches = encoder(torch.randn(32, 3, 32, 32))
    assert set((patches != 0).any(-1).sum(1).tolist()) == {1, 4, 16}
    cost, measured = encoder.take_auxiliary()
    share = torch.tensor(encoder.flops_at(32)).double()
    assert float(cost) == pytest.approx(0.05 * float((share / share[-1]).mean()), rel=1e-5)
    assert 1 < measured["vision_tokens"] < 16
    again, missing = encoder.take_auxiliary()
    assert again is None and missing.keys() == measured.keys() and all(value.isnan() for value in missing.values())
    (patches.square().sum() + cost).backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_flops_of_an_exit_are_those_of_what_stands_before_it():
    encoder = EarlyExitEncoder(three_stages(), exits=[0, 1], num_tokens=[1, 4])
    first, second, end = encoder.flops_at(32)
    assert first < second < end and encoder.flops_at(64)[2] > 3.9 * end
    whole = count_flops(encoder.encoder, (1, 3, 32, 32))
    assert end == whole + 2 * (8 + 16)  # two gates, a product each of their stage's width
    head = lambda tokens, dim: 2 * tokens * (dim * 32 + 32 * 32)
    only_first = count_flops(three_stages(dims=[8], depths=[1], attention=[False]), (1, 3, 32, 32))
    only_first -= 2 * (16 * 16 * 8 * (9 + 1) + 8 * 1 + 1 * 8)  # its end: 3 x 3, 1 x 1, squeeze and excite
    assert first == only_first + 2 * 8 + head(1, 8)


def exits_model(**options) -> VLM:
    encoder, llm = EarlyExitEncoder(three_stages(), exits=[0, 1], **options), small_llm()
    projector = MLPProjector(in_dim=32, out_dim=llm.dim)
    return VLM(encoder, IdentityResampler(in_dim=32), projector, llm, image_token_id=IMAGE_ID)


def stage_of(model) -> LanguageStage:
    return LanguageStage(model, name="exits", num_steps=1, optimizer=torch.optim.SGD)


def test_the_expected_cost_is_in_the_loss_of_a_stage_and_its_measure_beside_it():
    model = exits_model(num_tokens=[1, 4]).train()
    batch = make_batch([[[IMAGE_ID] * 16 + random_ids(4)[0]] * 2], images=2, image_size=32)
    losses = []
    for weight in (0.0, 1.0):
        model.encoder.cost_weight = weight
        torch.manual_seed(0)
        out = stage_of(model).measure(batch)
        losses.append(float(out["loss"]))
    assert out["vision_gflops"] > 0 and 1 <= out["vision_tokens"] <= 16
    share = torch.tensor(model.encoder.flops_at(32)).double()
    expected = float((share / share[-1]).mean()) * batch.num_learned / batch.num_answer_tokens
    assert losses[1] - losses[0] == pytest.approx(expected, rel=1e-4)
    empty = make_batch([random_ids(4)], image_size=32)
    out = stage_of(model).measure(empty)
    out["loss"].backward()
    assert out["vision_gflops"].isnan() and all(p.grad is not None for p in model.encoder.parameters())


def test_a_price_on_flops_teaches_the_gates_to_let_images_leave_earlier():
    torch.manual_seed(0)
    model = exits_model(num_tokens=[1, 4], cost_weight=20.0).train()
    batch = make_batch([[[IMAGE_ID] * 16 + random_ids(4)[0]] * 2], images=2, image_size=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    gflops = []
    for _ in range(40):
        out = stage_of(model).measure(batch)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        gflops.append(float(out["vision_gflops"]))
    assert sum(gflops[-10:]) < 0.8 * sum(gflops[:10])
    stage_of(model.eval()).measure(batch)


def test_slots_an_early_exit_leaves_empty_are_as_good_as_not_there():
    model = exits_model(num_tokens=[1, 4]).eval()
    leaving(model.encoder)
    ids = random_ids(5)[0]
    batch = make_batch([[[IMAGE_ID] * 16 + ids]], images=1, image_size=32)
    model.encoder.threshold = 0.0  # everybody leaves at the first
    with torch.no_grad():
        visual = model.encode_images(batch.pixel_values)[0, -1:]
        embeds = torch.cat([visual, model.llm.embed(torch.tensor(ids))])[None]
        short = model.llm.hidden(embeds, torch.arange(6)[None], torch.ones(1, 6, dtype=torch.long))
        torch.testing.assert_close(model.hidden(batch)[:, -5:], short[:, -5:], rtol=1e-5, atol=1e-5)


def test_exits_of_fewer_tokens_need_a_resampler_that_leaves_slots_empty():
    encoder, llm = EarlyExitEncoder(three_stages(), exits=[0], num_tokens=[4]), small_llm()
    pool, projector = AvgPoolResampler(in_dim=32, num_tokens=4), MLPProjector(in_dim=32, out_dim=llm.dim)
    with pytest.raises(ValueError, match="encoder.num_tokens=null, or resampler=identity"):
        VLM(encoder, pool, projector, llm, image_token_id=IMAGE_ID)
    VLM(EarlyExitEncoder(three_stages(), exits=[0]), pool, projector, llm, image_token_id=IMAGE_ID)


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MultiScaleEncoder(vit()), "TransformersEncoder has no stages; choose one that has"),
        (lambda: MultiScaleEncoder(TimmEncoder("test_vit")), "encoder.name=test_vit has no stages"),
        (lambda: MultiScaleEncoder(three_stages(), stages=[2]), "2 is not one of the earlier stages 0 to 1"),
        (lambda: MultiScaleEncoder(three_stages(), pool="max"), "encoder.pool=max is not one of depthwise, average"),
        (lambda: EarlyExitEncoder(three_stages(), exits=[1, 0]), r"exits=\[1, 0\] must be some of the stages 0 to 1"),
        (lambda: EarlyExitEncoder(three_stages(), exits=[0], num_tokens=[1, 4]), "2 numbers for 1 exits"),
        (lambda: EarlyExitEncoder(three_stages(), exits=[0], num_tokens=[3]), "3 is not a square number"),
        (lambda: EarlyExitEncoder(three_stages(), exits=[0], num_tokens=[25]).num_patches(32), "end has 16 tokens"),
        (lambda: MultiGranularityEncoder(vit(), vit(), fusion="add"), "encoder.fusion=add is not one of views, concat"),
        (lambda: MultiGranularityEncoder(vit(), vit(), fusion="attention", heads=3), "encoder.heads=3 does not divide"),
    ],
)
def test_what_does_not_fit_is_refused_by_key(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_fastvithd_has_16_to_576_tokens_from_256_to_1536_pixels():
    with torch.device("meta"):
        encoder = TimmEncoder("fastvit_mci3")
        for size, tokens in ((256, 16), (512, 64), (768, 144), (1024, 256), (1536, 576)):
            assert encoder.num_patches(size) == tokens
        assert encoder(torch.zeros(1, 3, 1536, 1536)).shape == (1, 576, 3072)


def test_timms_reparameterised_fastvit_computes_the_same():
    torch.manual_seed(0)
    encoder = warm(TimmEncoder("fastvit_t8"), 64)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before, number = encoder(images), sum(p.numel() for p in encoder.parameters())
        assert relative_error(encoder.reparameterize()(images), before) < 1e-4
    assert sum(p.numel() for p in encoder.parameters()) < number
    assert timm.create_model("fastvit_t8").stem[0].conv_kxk is not None and not hasattr(
        encoder.model.stem[0], "conv_kxk"
    )
