"""Each resampler against the implementation or the equations it is named after; relative error <= 1e-5 in float32."""

import math

import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import AttentionalPooler
from part_options import relative_error
from torch import nn
from transformers import (
    Blip2Config,
    Blip2Model,
    DeformableDetrConfig,
    Gemma3Config,
    Idefics3Config,
    InternVLConfig,
    InternVLModel,
    SmolVLMConfig,
)
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrDecoderLayer
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector

from fastvlm.models.projectors.linear import LinearProjector
from fastvlm.models.projectors.mlp import MLPProjector
from fastvlm.models.resamplers.adaptive_pool import AdaptivePoolResampler
from fastvlm.models.resamplers.attention_pool import AttentionPoolResampler
from fastvlm.models.resamplers.avgpool import AvgPoolResampler
from fastvlm.models.resamplers.c_abstractor import CAbstractorResampler
from fastvlm.models.resamplers.d_abstractor import DAbstractorResampler, DeformableAttention
from fastvlm.models.resamplers.pixel_shuffle import PixelShuffleResampler
from fastvlm.models.resamplers.positions import GridPositions
from fastvlm.models.resamplers.qformer import QFormerResampler
from fastvlm.models.resamplers.token_merge import TokenMergeResampler, merge

EXACT = 1e-5
TEXT = {"hidden_size": 12, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def perturb(module: nn.Module, scale: float = 0.3) -> nn.Module:
    """Zeros and ones of a fresh module would hide a wrong bias or norm."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * scale)
    return module.eval()


# ------------------------------------------------------------------------------------------------------ pixel shuffle


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize(
    ("connector", "config"), [(Idefics3Connector, Idefics3Config), (SmolVLMConnector, SmolVLMConfig)]
)
def test_pixel_shuffle_and_linear_are_idefics3s_and_smolvlms_connector(connector, config, factor):
    sizes = {"vision_config": {"hidden_size": 8}, "text_config": TEXT, "scale_factor": factor}
    theirs = connector(config(**sizes))
    resampler = PixelShuffleResampler(in_dim=8, factor=factor)
    projector = LinearProjector(in_dim=resampler.out_dim, out_dim=12, bias=False)
    projector[1].weight.data = theirs.modality_projection.proj.weight.data
    patches = torch.randn(2, 36, 8)
    assert torch.equal(resampler(patches), theirs.pixel_shuffle(patches, factor))
    assert relative_error(projector(resampler(patches)), theirs(patches)) <= EXACT


def test_pixel_shuffle_and_the_mlp_with_input_norm_are_internvls_projector():
    config = InternVLConfig(vision_config={"hidden_size": 8}, text_config=TEXT, downsample_ratio=0.5)
    theirs = perturb(InternVLMultiModalProjector(config))
    resampler = PixelShuffleResampler(in_dim=8)
    projector = MLPProjector(in_dim=resampler.out_dim, out_dim=12, input_norm=True, norm=False)
    names = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}
    weights = theirs.state_dict()
    projector.load_state_dict({k: weights[f"{names[k[0]]}.{k[2:]}"] for k in projector.state_dict()})
    patches = torch.randn(2, 16, 8)
    shuffled = InternVLModel.pixel_shuffle(None, patches.view(2, 4, 4, 8), 0.5).reshape(2, 4, 32)
    assert torch.equal(resampler(patches), shuffled)
    assert relative_error(projector(resampler(patches)), theirs(shuffled)) <= EXACT


# ------------------------------------------------------------------------------------------------------------ pooling


@pytest.mark.parametrize("resampler", [AdaptivePoolResampler, AvgPoolResampler])
def test_pooling_and_linear_with_rms_norm_are_gemma3s_projector(resampler):
    config = Gemma3Config(
        vision_config={"hidden_size": 8, "image_size": 96, "patch_size": 8},
        text_config=TEXT,
        mm_tokens_per_image=16,
    )
    theirs = perturb(Gemma3MultiModalProjector(config))
    pool = resampler(in_dim=8, num_tokens=16, **({"positions": False} if resampler is AvgPoolResampler else {}))
    projector = LinearProjector(in_dim=8, out_dim=12, bias=False, norm="rms")
    projector[0].weight.data = theirs.mm_soft_emb_norm.weight.data + 1  # Gemma keeps its norms' weights less 1
    projector[1].weight.data = theirs.mm_input_projection_weight.data.T
    patches = torch.randn(2, 144, 8)
    assert relative_error(projector(pool(patches)), theirs(patches)) <= EXACT


@pytest.mark.parametrize(("side", "rows", "columns"), [(24, 8, 8), (7, 4, 4), (9, 3, 4), (16, 5, 10), (4, 1, 2)])
def test_an_adaptive_cell_is_the_mean_of_the_patches_it_touches(side, rows, columns):
    patches = torch.randn(2, side * side, 3)
    grid = patches.double().view(2, side, side, 3)
    expected = []
    for r in range(rows):
        for c in range(columns):
            top, bottom = r * side // rows, -(-(r + 1) * side // rows)
            left, right = c * side // columns, -(-(c + 1) * side // columns)
            expected.append(grid[:, top:bottom, left:right].mean((1, 2)))
    ours = AdaptivePoolResampler(in_dim=3, num_tokens=rows * columns)
    assert (ours.rows, ours.columns) == (rows, columns)
    assert relative_error(ours(patches), torch.stack(expected, 1)) <= EXACT


# ---------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize(("in_dim", "dim"), [(16, 16), (12, 16)])
def test_attention_pooling_is_open_clips_attentional_pooler(in_dim, dim):
    theirs = perturb(AttentionalPooler(dim, in_dim, n_head=4, n_queries=6))
    ours = AttentionPoolResampler(in_dim=in_dim, num_tokens=6, dim=dim, heads=4)
    names = {"ln_q": "norm_queries", "ln_k": "norm_patches", "attn": "attention"}
    weights = {names.get(k.split(".")[0], k) + k[len(k.split(".")[0]) :]: v for k, v in theirs.state_dict().items()}
    weights["queries"] = weights.pop("query")[None]
    ours.load_state_dict(weights)
    patches = torch.randn(3, 25, in_dim)
    assert relative_error(ours(patches), theirs(patches)) <= EXACT


@pytest.mark.parametrize("cross_every", [1, 2])
def test_the_q_former_is_blip2s(cross_every):
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config=vision | {"image_size": 32, "patch_size": 8},
        qformer_config={
            "hidden_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 96,
            "encoder_hidden_size": 16,
            "cross_attention_frequency": cross_every,
        },
        text_config={"model_type": "opt", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"ffn_dim": 16, "vocab_size": 50, "word_embed_proj_dim": 16},
        num_query_tokens=5,
    )
    theirs = perturb(Blip2Model(config), 0.1)
    ours = QFormerResampler(in_dim=16, num_tokens=5, dim=24, depth=3, heads=2, cross_every=cross_every).eval()
    ours.qformer.load_state_dict(theirs.qformer.state_dict())
    ours.queries.data = theirs.query_tokens.data
    pixels = torch.randn(2, 3, 32, 32)
    features = theirs.vision_model(pixels).last_hidden_state
    assert relative_error(ours(features), theirs.get_qformer_features(pixels)) <= EXACT


# ------------------------------------------------------------------------------------------------------- C-Abstractor


def honeybee_block(weights: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    """Honeybee's bottleneck: act(shortcut + 1x1(squeeze-excite(3x3 depthwise(1x1)))), a LayerNorm at every place."""
    get = lambda key: weights[f"{name}.{key}"]

    def conv_norm(x, key, *, groups=1, act=True):
        kernel = get(f"{key}.conv.weight")
        x = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2, groups=groups)
        mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        scale, shift = (get(f"{key}.bn.{end}")[:, None, None] for end in ("weight", "bias"))
        x = (x - mean) / (var + 1e-5).sqrt() * scale + shift  # timm's norm with activation takes 1e-5, not 1e-6
        return x * torch.sigmoid(x) if act else x

    y = conv_norm(conv_norm(x, "conv1"), "conv2", groups=get("conv2.conv.weight").shape[0])
    squeezed = y.mean((2, 3), keepdim=True)
    squeezed = F.conv2d(squeezed, get("se.fc1.weight"), get("se.fc1.bias"))
    squeezed = F.conv2d(squeezed * torch.sigmoid(squeezed), get("se.fc2.weight"), get("se.fc2.bias"))
    y = conv_norm(y * torch.sigmoid(squeezed), "conv3", act=False)
    y = y + (conv_norm(x, "downsample", act=False) if f"{name}.downsample.conv.weight" in weights else x)
    return y * torch.sigmoid(y)


@pytest.mark.parametrize(("in_dim", "dim", "depth"), [(12, 12, 3), (12, 20, 2)])
def test_the_c_abstractor_is_honeybees_equations(in_dim, dim, depth):
    ours = perturb(CAbstractorResampler(in_dim=in_dim, num_tokens=9, dim=dim, depth=depth, positions=7))
    patches = torch.randn(2, 49, in_dim)
    weights = {k: v.double() for k, v in ours.state_dict().items()}
    x = (patches.double() + weights["positions.grid"].reshape(49, in_dim)).mT.reshape(2, in_dim, 7, 7)
    for i in range(depth):
        x = honeybee_block(weights, f"net.0.b{i + 1}", x)
    x = F.adaptive_avg_pool2d(x, 3)
    for i in range(depth):
        x = honeybee_block(weights, f"net.2.b{i + 1}", x)
    assert relative_error(ours(patches), x.flatten(2).mT) <= EXACT


# ------------------------------------------------------------------------------------------------------- D-Abstractor


def bilinear(grid: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """Value at pixel coordinates (centres at whole numbers) of grid (d, H, W); zero outside."""
    out = torch.zeros(grid.shape[0], dtype=grid.dtype)
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < grid.shape[1] and 0 <= column < grid.shape[2]:
                out += (1 - abs(x - column)) * (1 - abs(y - row)) * grid[:, row, column]
    return out


def test_deformable_attention_is_equation_2_of_deformable_detr():
    dim, heads, points, side, count = 8, 2, 3, 4, 5
    part = perturb(DeformableAttention(dim, heads=heads, points=points), 0.5)
    queries, references, patches = torch.randn(2, count, dim), torch.rand(count, 2), torch.randn(2, side * side, dim)
    ours = part(queries, references, patches)
    exact = {k: v.double() for k, v in part.state_dict().items()}
    linear = lambda name, x: x.double() @ exact[f"{name}.weight"].T + exact[f"{name}.bias"]
    for i in range(2):
        value = linear("value", patches[i]).T.reshape(heads, dim // heads, side, side)
        offsets = linear("offsets", queries[i]).view(count, heads, points, 2)
        weights = linear("weights", queries[i]).view(count, heads, points).softmax(-1)
        for m in range(count):
            read = []
            for h in range(heads):
                at = [references[m].double() * side + offsets[m, h, p] - 0.5 for p in range(points)]
                read.append(sum(weights[m, h, p] * bilinear(value[h], *at[p].tolist()) for p in range(points)))
            assert relative_error(ours[i, m], linear("out", torch.cat(read))) <= EXACT


def test_the_d_abstractor_is_honeybees_stack_of_deformable_detr_decoder_layers():
    dim, side, count, depth = 16, 6, 9, 2
    config = DeformableDetrConfig(
        d_model=dim,
        decoder_attention_heads=4,
        decoder_ffn_dim=dim,
        num_feature_levels=1,
        decoder_n_points=4,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
    )
    layers = [perturb(DeformableDetrDecoderLayer(config)) for _ in range(depth)]
    ours = perturb(DAbstractorResampler(in_dim=10, num_tokens=count, dim=dim, depth=depth, heads=4, positions=side))
    names = {
        "self_attn.o_proj": "attention.out_proj",
        "encoder_attn.sampling_offsets": "deformable.offsets",
        "encoder_attn.attention_weights": "deformable.weights",
        "encoder_attn.value_proj": "deformable.value",
        "encoder_attn.output_proj": "deformable.out",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.2",
        "self_attn_layer_norm": "norm_attention",
        "encoder_attn_layer_norm": "norm_deformable",
        "final_layer_norm": "norm_mlp",
    }
    for block, layer in zip(ours.blocks, layers):
        weights = layer.state_dict()
        mapped = {f"{to}.{end}": weights[f"{of}.{end}"] for of, to in names.items() for end in ("weight", "bias")}
        for end in ("weight", "bias"):
            mapped[f"attention.in_proj_{end}"] = torch.cat([weights[f"self_attn.{x}_proj.{end}"] for x in "qkv"])
        block.load_state_dict(mapped)
    patches = torch.randn(2, side * side, 10)
    # Honeybee, D-Abstractor with pooled queries and learned reference points.
    visual = ours.project(patches) + ours.positions.grid.reshape(side * side, dim)
    where = F.adaptive_avg_pool2d(visual.mT.reshape(2, dim, side, side), 3).flatten(2).mT
    hidden = ours.tokens.expand(2, -1, -1)
    references = ours.references.view(1, count, 1, 2).expand(2, -1, -1, -1)
    for layer in layers:
        hidden = layer(
            hidden,
            object_queries_position_embeddings=where,
            reference_points=references,
            spatial_shapes=torch.tensor([[side, side]]),
            spatial_shapes_list=[(side, side)],
            level_start_index=torch.tensor([0]),
            encoder_hidden_states=visual,
        )
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    assert relative_error(ours(patches), hidden) <= EXACT


def test_the_d_abstractors_references_begin_where_honeybees_do():
    """linspace(0.5, side - 0.5) / side in x and y, x the faster."""
    ours = DAbstractorResampler(in_dim=8, num_tokens=9, depth=1, positions=24)
    line = torch.linspace(0.5, 23.5, 3) / 24
    expected = torch.stack([line.repeat(3), line.repeat_interleave(3)], -1)
    torch.testing.assert_close(ours.references.view(9, 2).detach(), expected)


# -------------------------------------------------------------------------------------------------------------- ToMe


def tome_step(tokens: list, sizes: list, num: int) -> tuple[list, list]:
    """ToMe, section 3 (bipartite soft matching) and equation of the weighted mean, with loops, in float64.

    1. alternate tokens into A and B; 2. each of A draws one edge to its most similar of B (cosine); 3. keep the `num`
    most similar edges; 4. merge what they connect, weighted by size; 5. put both sets together.
    """
    unit = [t / t.norm() for t in tokens]
    a, b = range(0, len(tokens), 2), range(1, len(tokens), 2)
    edges = []
    for i in a:
        similarities = [(float(unit[i] @ unit[j]), j) for j in b]
        edges.append((*max(similarities), i))
    edges.sort(reverse=True)
    groups = {i: [i] for i in range(len(tokens))}
    for _, j, i in edges[:num]:
        groups[j] += groups.pop(i)
    merged, counts = [], []
    for members in groups.values():
        counts.append(sum(sizes[m] for m in members))
        merged.append(sum(sizes[m] * tokens[m] for m in members) / counts[-1])
    return merged, counts


@pytest.mark.parametrize(("count", "num"), [(9, 1), (9, 4), (16, 8), (25, 7)])
def test_a_merge_is_one_step_of_tomes_matching(count, num):
    tokens, sizes = torch.randn(3, count, 6), torch.randint(1, 5, (3, count, 1)).float()
    ours, our_sizes = merge(tokens, sizes, num=num)
    for i in range(3):
        expected, counts = tome_step(list(tokens[i].double()), sizes[i, :, 0].tolist(), num)
        assert our_sizes[i, :, 0].tolist() == counts
        assert relative_error(ours[i], torch.stack(expected)) <= EXACT


@pytest.mark.parametrize(("num_patches", "num_tokens", "share"), [(36, 9, 0.5), (36, 5, 0.5), (30, 7, 0.25)])
def test_token_merging_repeats_tomes_step_until_enough_are_gone(num_patches, num_tokens, share):
    patches = torch.randn(2, num_patches, 6)
    ours = TokenMergeResampler(in_dim=6, num_tokens=num_tokens, share=share)(patches)
    for i in range(2):
        tokens, sizes = list(patches[i].double()), [1] * num_patches
        while len(tokens) > num_tokens:
            tokens, sizes = tome_step(tokens, sizes, min(len(tokens) - num_tokens, max(1, int(len(tokens) * share))))
        assert relative_error(ours[i], torch.stack(tokens)) <= EXACT
        # A mean of means weighted by size is the mean of the patches: nothing is counted twice.
        total = sum(s * t for s, t in zip(sizes, tokens))
        torch.testing.assert_close(total, patches[i].double().sum(0))


# ---------------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("side", [2, 4, 5, 8, 13])
def test_positions_of_another_grid_are_interpolated_as_torch_does(side):
    part = GridPositions(5, 6)
    expected = part.grid.permute(2, 0, 1)[None]
    if side != 5:
        expected = F.interpolate(expected, size=(side, side), mode="bilinear", antialias=True)
    torch.testing.assert_close(part(torch.zeros(1, side * side, 6)), expected.flatten(2).mT)
