import copy

import pytest
import timm.models.fastvit as reference
import torch
from small_parts import small_encoder
from torch import nn

from fastvlm.models.encoders.fastvit import FastViT
from fastvlm.models.encoders.fastvit_blocks import AttentionBlock, RepMixerBlock


def randomise(model: nn.Module) -> None:
    """Weights, scales and norm statistics as training could have left them."""
    generator = torch.Generator().manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.1, 0.9, generator=generator)


def copy_in_order(source: nn.Module, target: nn.Module) -> None:
    ours, theirs = target.state_dict(), source.state_dict()
    assert len(ours) == len(theirs)
    target.load_state_dict({key: value.view_as(ours[key]) for key, value in zip(ours, theirs.values())})


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [(reference.RepMixerBlock, RepMixerBlock), (reference.AttentionBlock, AttentionBlock)],
    ids=["repmixer", "attention"],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_block_equals_timms(theirs, ours, training):
    a, b = theirs(64, mlp_ratio=2.0).double(), ours(64, mlp_ratio=2.0, layer_scale=1e-5).double()
    randomise(a)
    copy_in_order(a, b)
    x = torch.randn(2, 64, 6, 6, dtype=torch.float64)
    a.train(training), b.train(training)
    torch.testing.assert_close(b(x), a(x), rtol=1e-10, atol=1e-10)


def test_the_whole_encoder_equals_timms():
    a = reference.FastVit(
        layers=(1, 2),
        token_mixers=("repmixer", "attention"),
        embed_dims=(16, 32),
        mlp_ratios=(3.0, 3.0),
        downsamples=(False, True),
        se_downsamples=(False, False),
        pos_embs=(None, reference.RepConditionalPosEnc),
        lkc_use_act=True,
        stem_use_scale_branch=False,
        num_classes=0,
    ).double()
    b = FastViT(dims=[16, 32], depths=[1, 2], attention=[False, True], mlp_ratio=3.0, out_dim=64).double()
    randomise(a)
    copy_in_order(a, b)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = a.eval().forward_features(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(b.eval()(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stem_stride", [2, 4])
def test_reparameterising_changes_no_output(stem_stride):
    encoder = small_encoder(dims=[8, 16, 32], depths=[1, 1, 2], attention=[False, False, True], stem_stride=stem_stride)
    encoder = encoder.double()
    randomise(encoder)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = encoder.eval()(x)
    folded = copy.deepcopy(encoder).reparameterize()
    torch.testing.assert_close(folded(x), expected, rtol=1e-10, atol=1e-10)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert sum(p.numel() for p in folded.parameters()) < sum(p.numel() for p in encoder.parameters())
    assert folded.reparameterize() is folded


@pytest.mark.parametrize("stem_stride", [2, 4])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_the_stride_is_the_stems_times_two_a_stage(stem_stride, stages):
    encoder = small_encoder(
        dims=[8] * stages, depths=[1] * stages, attention=[False] * stages, stem_stride=stem_stride
    ).eval()
    assert encoder.stride == stem_stride * 2 ** (stages - 1)
    images = torch.randn(1, 3, 32, 32)
    assert encoder(images).shape == (1, encoder.num_patches(32), encoder.out_dim)
    assert encoder.num_patches(32) == (32 // encoder.stride) ** 2


def test_patches_are_in_row_major_order():
    encoder = small_encoder(depths=[0, 0], attention=[False, False], kernel=3).eval()
    image = torch.zeros(1, 3, 64, 64)
    changed = image.clone()
    changed[..., 8 * 2 + 3, 8 * 5 + 3] = 100.0  # a pixel inside row 2, column 5 of the 8 x 8 grid
    with torch.no_grad():
        distance = (encoder(changed) - encoder(image)).norm(dim=-1)[0]
    assert distance.argmax() == 2 * 8 + 5


def test_an_image_that_is_no_multiple_of_the_stride_is_refused():
    with pytest.raises(ValueError, match="image_size=20 is not a multiple of the encoder's stride 8"):
        small_encoder()(torch.zeros(1, 3, 20, 20))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": [1]}, "have 2, 1, 2 stages"),
        ({"stem_stride": 3}, "neither 2 nor 4"),
        ({"out_dim": 33}, "not a multiple of the last width 32"),
        ({"dims": [8, 48]}, "not a multiple of head_dim"),
    ],
)
def test_an_impossible_encoder_is_refused_by_key(options, message):
    with pytest.raises(ValueError, match=message):
        small_encoder(**options)


def test_bf16_autocast_stays_near_float32_and_reaches_every_parameter():
    encoder = small_encoder()
    images = torch.randn(8, 3, 32, 32)
    exact = encoder(images)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = encoder(images)
    assert (rounded - exact).norm() / exact.norm() < 0.05
    rounded.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
