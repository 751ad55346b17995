"""`num_tokens` means the same in every resampler; shapes, refusals, gradients, save and load."""

from itertools import product

import pytest
import torch
from part_options import RESAMPLERS, VARIANTS, build_resampler
from safetensors.torch import load_model, save_model

from fastvlm.models.resamplers.adaptive_pool import AdaptivePoolResampler
from fastvlm.models.resamplers.avgpool import AvgPoolResampler
from fastvlm.models.resamplers.c_abstractor import CAbstractorResampler
from fastvlm.models.resamplers.identity import IdentityResampler
from fastvlm.models.resamplers.pixel_shuffle import PixelShuffleResampler
from fastvlm.models.resamplers.token_select import TokenSelectResampler

NAMES = [*RESAMPLERS, *VARIANTS]
EVERY = pytest.mark.parametrize("name", NAMES)
# Mathematically without effect: the same number added to all logits of a softmax.
NO_GRADIENT = ("key.bias", "k_proj.bias")


@EVERY
def test_what_is_announced_is_what_comes_out_or_both_refuse_for_any_patches_and_tokens(name):
    follows = {"identity", "pixel_shuffle"}
    counts = set()
    for num_patches, num_tokens in product([4, 9, 16, 36, 49, 50, 64, 144], [None, 1, 2, 4, 7, 9, 12, 16, 36, 49, 64]):
        patches = torch.randn(2, num_patches, 16)
        if num_tokens is None and name not in follows:
            continue
        try:
            part = build_resampler(name, in_dim=16, num_tokens=num_tokens)
        except ValueError as error:
            assert f"resampler.num_tokens={num_tokens} " in str(error)
            continue
        try:
            count = part.num_tokens_out(num_patches)
        except ValueError as error:
            assert str(num_patches) in str(error) or f"{int(num_patches**0.5)} x " in str(error)
            assert "resampler" in str(error) and "\n" not in str(error)
            with pytest.raises(ValueError, match="resampler"):
                part(patches)
            continue
        assert num_tokens in (None, count)
        with torch.no_grad():
            assert part(patches).shape == (2, count, part.out_dim)
        counts.add((num_patches, count))
    assert len(counts) >= (5 if name == "pixel_shuffle" else 8)


@EVERY
def test_gradients_reach_every_parameter_and_the_patches(name):
    torch.manual_seed(0)
    part = build_resampler(name, in_dim=16, num_tokens=9 if "pixel" not in name and name != "identity" else None)
    patches = torch.randn(3, 36, 16, requires_grad=True)
    out = part(patches)
    (out * torch.randn_like(out)).sum().backward()
    missing = [n for n, p in part.named_parameters() if p.grad is None or not p.grad.any()]
    assert [n for n in missing if not n.endswith(NO_GRADIENT)] == []
    assert patches.grad.any() and all(p.grad.isfinite().all() for p in [patches, *part.parameters()])


@EVERY
def test_a_resampler_reads_the_patches_of_its_own_image_only(name):
    part = build_resampler(name, in_dim=16, num_tokens=9 if "pixel" not in name and name != "identity" else None).eval()
    patches = torch.randn(3, 36, 16)
    with torch.no_grad():
        torch.testing.assert_close(part(patches)[1:2], part(patches[1:2]))


@EVERY
def test_a_resampler_is_the_same_after_saving_and_loading(name, tmp_path):
    options = {"in_dim": 16, "num_tokens": 9 if "pixel" not in name and name != "identity" else None}
    torch.manual_seed(0)
    one = build_resampler(name, **options).eval()
    torch.manual_seed(1)
    other = build_resampler(name, **options).eval()
    patches = torch.randn(2, 36, 16)
    save_model(one, str(tmp_path / "part.safetensors"))
    load_model(other, str(tmp_path / "part.safetensors"))
    with torch.no_grad():
        assert torch.equal(one(patches), other(patches))


@EVERY
def test_a_resampler_runs_in_half_precision_and_under_autocast(name):
    part = build_resampler(name, in_dim=16, num_tokens=9 if "pixel" not in name and name != "identity" else None)
    patches = torch.randn(2, 36, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        part(patches).float().sum().backward()
    with torch.no_grad():
        out = part.to(torch.bfloat16)(patches.to(torch.bfloat16))
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


@pytest.mark.parametrize(
    ("part", "num_patches", "words"),
    [
        (lambda: AvgPoolResampler(in_dim=8, num_tokens=40), None, ["num_tokens=40", "not a square", "36 and 49"]),
        (lambda: CAbstractorResampler(in_dim=8, num_tokens=2), None, ["num_tokens=2", "1 and 4"]),
        (lambda: AdaptivePoolResampler(in_dim=8, num_tokens=53), None, ["num_tokens=53", "50 and 54"]),
        (lambda: AdaptivePoolResampler(in_dim=8, num_tokens=0), None, ["num_tokens=0", "the nearest: 1"]),
        (lambda: AdaptivePoolResampler(in_dim=8, num_tokens=15), 16, ["3 x 5 cells", "4 x 4 patches", "12 and 16"]),
        (lambda: IdentityResampler(in_dim=8, num_tokens=9), 16, ["num_tokens=9", "16 patches", "image_size"]),
        (
            lambda: PixelShuffleResampler(in_dim=8, num_tokens=50),
            1024,
            ["num_tokens=50", "1024 patches", "256 visual tokens", "nearest that fits is 64, with resampler.factor=4"],
        ),
        (lambda: PixelShuffleResampler(in_dim=8, factor=3), 16, ["factor=3", "4 x 4 patches", "1, 2, 4"]),
        (lambda: TokenSelectResampler(in_dim=8, num_tokens=4, min_tokens=5), None, ["min_tokens=5", "num_tokens=4"]),
        (lambda: TokenSelectResampler(in_dim=8, num_tokens=0), None, ["num_tokens=0 must be at least 1"]),
        (lambda: TokenSelectResampler(in_dim=8, num_tokens=4, gradient="hard"), None, ["gradient=hard", "soft"]),
    ],
)
def test_a_number_that_does_not_fit_is_refused_with_both_numbers_and_the_nearest_that_do(part, num_patches, words):
    with pytest.raises(ValueError, match="resampler") as error:
        part().num_tokens_out(num_patches)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize("name", ["avgpool", "adaptive_pool", "c_abstractor", "d_abstractor", "pixel_shuffle"])
def test_a_grid_that_is_no_square_is_refused_by_what_needs_one(name):
    part = build_resampler(name, in_dim=16, num_tokens=4 if name != "pixel_shuffle" else None)
    with pytest.raises(ValueError, match="50 patches, no square grid; use resampler=perceiver"):
        part(torch.randn(1, 50, 16))
