import pytest
import torch
import torch.nn.functional as F

from fastvlm.models.projectors.mlp import MLPProjector
from fastvlm.models.resamplers.avgpool import AvgPoolResampler
from fastvlm.models.resamplers.identity import IdentityResampler
from fastvlm.models.resamplers.perceiver import PerceiverResampler

BOTH = pytest.mark.parametrize("resampler", [AvgPoolResampler, PerceiverResampler])


@BOTH
@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("num_patches", [16, 64, 49])
def test_a_resampler_yields_what_it_says(resampler, positions, num_patches):
    part = resampler(in_dim=16, num_tokens=16, positions=positions)
    patches = torch.randn(3, num_patches, 16, requires_grad=True)
    out = part(patches)
    assert out.shape == (3, part.num_tokens_out(num_patches), part.out_dim) == (3, 16, 16)
    out.square().sum().backward()
    assert all(p.grad.any() for p in [patches, *part.parameters()])


def test_identity_passes_every_patch():
    part = IdentityResampler(in_dim=8)
    patches = torch.randn(2, 12, 8)
    assert part(patches) is patches and part.num_tokens_out(12) == 12 and part.out_dim == 8


def test_avgpool_is_the_mean_of_each_cell_in_reading_order():
    patches = torch.arange(16.0).view(1, 16, 1)
    out = AvgPoolResampler(in_dim=1, num_tokens=4, positions=False)(patches)
    assert out.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_positions_make_tokens_differ_that_show_the_same():
    patches = torch.ones(1, 16, 8)
    plain = AvgPoolResampler(in_dim=8, num_tokens=4, positions=False)(patches)
    placed = AvgPoolResampler(in_dim=8, num_tokens=4)(patches)
    assert (plain[0] == plain[0, 0]).all() and not (placed[0] == placed[0, 0]).all()


def test_a_perceiver_does_not_depend_on_the_order_of_patches_and_its_attention_is_softmax():
    part = PerceiverResampler(in_dim=16, num_tokens=4, depth=1, heads=2).double()
    patches = torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(part(patches), part(patches[:, torch.randperm(9)]))
    block, queries = part.blocks[0], part.queries.expand(2, -1, -1)
    reference = torch.nn.MultiheadAttention(16, 2, bias=False, batch_first=True).double()
    reference.in_proj_weight.data = torch.cat([block.to_q.weight, block.to_kv.weight])
    reference.out_proj.weight.data = block.to_out.weight
    normed = block.norm_queries(queries)
    context = torch.cat([block.norm_patches(patches), normed], dim=1)
    attended = queries + reference(normed, context, context)[0]
    expected = part.norm(attended + block.mlp(block.norm_mlp(attended))) + part.positions
    torch.testing.assert_close(part(patches), expected)


@BOTH
def test_more_tokens_than_patches_are_refused_with_both_counts_and_the_key(resampler):
    with pytest.raises(ValueError, match="resampler.num_tokens=25 is more than the 16 patches") as error:
        resampler(in_dim=16, num_tokens=25).num_tokens_out(16)
    assert "image_size" in str(error.value)


def test_impossible_resamplers_are_refused_by_key():
    with pytest.raises(ValueError, match="resampler.num_tokens=12 is not a square"):
        AvgPoolResampler(in_dim=8, num_tokens=12)
    with pytest.raises(ValueError, match="12 patches, no square grid; use resampler=perceiver"):
        AvgPoolResampler(in_dim=8, num_tokens=4).num_tokens_out(12)
    with pytest.raises(ValueError, match="resampler.heads=3 does not divide the encoder's width 8"):
        PerceiverResampler(in_dim=8, num_tokens=4, heads=3)


@pytest.mark.parametrize("norm", [True, False])
def test_the_projector_is_two_linear_layers_with_gelu_between(norm):
    part = MLPProjector(in_dim=8, out_dim=12, norm=norm)
    tokens = torch.randn(2, 4, 8)
    expected = part[2](F.gelu(part[0](tokens)))
    expected = F.layer_norm(expected, (12,)) if norm else expected
    torch.testing.assert_close(part(tokens), expected)
