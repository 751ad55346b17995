"""Token selection: what is chosen, how the scores learn, and images that keep fewer tokens than they have slots."""

import pytest
import torch
import torch.nn.functional as F
from small_parts import IMAGE_ID, make_batch, random_ids, small_encoder, small_llm

from fastvlm.models.projectors.mlp import MLPProjector
from fastvlm.models.resamplers.token_select import TokenSelectResampler, soft_top_k
from fastvlm.models.slots import hide, take_out
from fastvlm.models.vlm import VLM

GRADIENTS = pytest.mark.parametrize("gradient", ["straight_through", "soft"])


def selector(**options) -> TokenSelectResampler:
    torch.manual_seed(0)
    return TokenSelectResampler(**({"in_dim": 8, "num_tokens": 5, "positions": 0} | options))


# --------------------------------------------------------------------------------------------------------- soft top k


def test_the_soft_mask_sums_to_k_and_is_the_optimum_of_scores_plus_entropy():
    torch.manual_seed(0)
    scores, counts = torch.randn(3, 20, dtype=torch.float64) * 3, torch.tensor([1, 7, 19])
    for temperature in (0.5, 1.0, 5.0):
        mask = soft_top_k(scores, counts, temperature=temperature)
        torch.testing.assert_close(mask.sum(1), counts.double())
        # The value is concave, so it is largest where its derivative is one number (the multiplier of the sum).
        derivative = scores - temperature * torch.log(mask / (1 - mask))
        torch.testing.assert_close(derivative, derivative[:, :1].expand_as(derivative), rtol=1e-4, atol=1e-4)


def test_the_soft_mask_becomes_the_hard_one_as_it_cools():
    torch.manual_seed(0)
    scores = torch.randn(4, 30)
    hard = torch.zeros(4, 30).scatter(1, scores.topk(6).indices, 1.0)
    gap = scores.topk(7).values[:, 5:].diff(dim=1).abs().min()
    torch.testing.assert_close(soft_top_k(scores, torch.full((4,), 6), temperature=float(gap) / 40), hard)


def test_the_soft_masks_gradient_is_the_derivative():
    torch.manual_seed(0)
    scores = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: soft_top_k(s, torch.tensor([2, 8]), temperature=0.7), scores)


def test_keeping_every_patch_is_a_mask_of_ones_without_a_gradient():
    scores = torch.randn(2, 5, requires_grad=True)
    mask = soft_top_k(scores, torch.tensor([5, 5]), temperature=1.0)
    mask.sum().backward()
    torch.testing.assert_close(mask, torch.ones(2, 5))
    assert scores.grad.abs().max() < 1e-6


# --------------------------------------------------------------------------------------------------------- the choice


@GRADIENTS
@pytest.mark.parametrize("num_tokens", [1, 49, 100, 256, 575, 576])
def test_the_highest_scores_are_kept_in_reading_order_from_576_to_any_number(gradient, num_tokens):
    part = selector(num_tokens=num_tokens, gradient=gradient)
    patches = torch.randn(2, 576, 8)
    scores = part.scores(patches)
    index = scores.topk(num_tokens).indices.sort(dim=1).values
    expected = torch.stack([row[i] for row, i in zip(patches, index)])
    if gradient == "soft":
        weights = soft_top_k(scores, torch.full((2,), num_tokens), temperature=1.0).gather(1, index)
        expected = expected * weights[..., None]
    torch.testing.assert_close(part(patches), expected)
    assert part.mean_kept == num_tokens


@GRADIENTS
def test_scores_learn_which_patches_the_target_needs(gradient):
    """A quarter of the patches carry a mark; only what they hold makes up the target."""
    torch.manual_seed(0)
    part = selector(in_dim=16, num_tokens=9, gradient=gradient)
    readout = torch.nn.Linear(16, 4)
    optimizer = torch.optim.Adam([*part.parameters(), *readout.parameters()], lr=1e-2)
    mark = torch.randn(12)

    def draw(count):
        patches = torch.randn(count, 36, 16)
        marked = torch.zeros(count, 36).scatter(1, torch.rand(count, 36).topk(9).indices, 1.0)
        patches[..., 4:] = 0.3 * patches[..., 4:] + marked[..., None] * mark
        target = (patches[..., :4] * marked[..., None]).sum(1)
        return patches, marked, target

    def precision():
        patches, marked, _ = draw(200)
        return float(marked.gather(1, part.scores(patches).topk(9).indices).mean())

    before = precision()
    for _ in range(150):
        patches, _, target = draw(32)
        loss = F.mse_loss(readout(part(patches)).sum(1), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before < 0.6 and precision() > 0.95


# ----------------------------------------------------------------------------------------------- a number per image


def test_an_image_keeps_the_fewest_patches_that_hold_the_coverage():
    part = selector(num_tokens=10, min_tokens=2, coverage=0.8)
    shares = torch.tensor([[0.5, 0.3, 0.1, 0.05, 0.05] + [0.0] * 15, [0.05] * 20, [0.97] + [0.03 / 19] * 19])
    shares = shares.clamp(min=1e-9)
    assert part.counts(shares.log()).tolist() == [2, 10, 2]  # enough; the budget; at least two
    assert selector(num_tokens=10).counts(shares.log()).tolist() == [10, 10, 10]


def test_kept_tokens_stand_in_the_last_slots_in_reading_order_and_the_others_are_zero():
    part = selector(num_tokens=12, min_tokens=1, coverage=0.5, temperature=0.02)
    patches = torch.randn(6, 36, 8)
    scores = part.scores(patches)
    counts, out = part.counts(scores), part(patches)
    assert len(set(counts.tolist())) > 1 and part.mean_kept == counts.float().mean()
    for i, count in enumerate(counts.tolist()):
        index = scores[i].topk(count).indices.sort().values
        torch.testing.assert_close(out[i, 12 - count :], patches[i, index])
        assert not out[i, : 12 - count].any()


def selecting_vlm(**options) -> VLM:
    encoder, llm = small_encoder(), small_llm()
    torch.manual_seed(3)
    resampler = TokenSelectResampler(
        in_dim=encoder.out_dim, num_tokens=6, min_tokens=1, coverage=0.4, temperature=0.02, positions=4, **options
    )
    projector = MLPProjector(in_dim=resampler.out_dim, out_dim=llm.dim)
    return VLM(encoder, resampler, projector, llm, image_token_id=IMAGE_ID)


SLOTS = [IMAGE_ID] * 6
a, b, c, d = random_ids(3, 4, 5, 2)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_empty_slots_change_no_logit_of_the_row_without_them(attention):
    model = selecting_vlm().eval()
    model.llm.attention = attention
    batch = make_batch([[a + SLOTS + b + SLOTS + c, d], [SLOTS + b]], images=3, image_size=32)
    with torch.no_grad():
        logits = model(batch)
        visual = model.encode_images(batch.pixel_values)
        kept = [image[(image != 0).any(-1)] for image in visual]
        assert 3 <= sum(map(len, kept)) < 18 and all(map(len, kept))
        embed = lambda ids: model.llm.embed(torch.tensor(ids))
        samples = [[embed(a), kept[0], embed(b), kept[1], embed(c)], [embed(d)], [kept[2], embed(b)]]
        alone = []
        for sample in samples:
            embeds = torch.cat(sample)[None]
            positions, segments = torch.arange(embeds.shape[1])[None], torch.ones(1, embeds.shape[1]).long()
            alone.append(model.llm.head(model.llm.hidden(embeds, positions, segments))[0])
    full = [logits[0, : 3 + 6 + 4 + 6 + 5], logits[0, 24 : 24 + 2], logits[1, : 6 + 4]]
    holds = [
        [True] * 3 + slots(kept[0]) + [True] * 4 + slots(kept[1]) + [True] * 5,
        [True] * 2,
        slots(kept[2]) + [True] * 4,
    ]
    for ours, expected, at in zip(full, alone, holds):
        torch.testing.assert_close(ours[torch.tensor(at)], expected, rtol=1e-4, atol=1e-5)


def slots(kept) -> list[bool]:
    return [False] * (6 - len(kept)) + [True] * len(kept)


def test_hidden_slots_move_what_follows_up_within_its_own_sample():
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0]])
    segment_ids = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2, 0]])
    empty = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 0, 0]]).bool()
    position_ids, segment_ids = hide(empty, position_ids, segment_ids)
    assert position_ids.tolist() == [[0, 0, 0, 1, 2, 0, 0, 1, 0]]
    assert segment_ids.tolist() == [[1, 0, 0, 1, 1, 0, 2, 2, 0]]


def test_taking_out_slots_keeps_rows_padded_on_the_left_and_no_longer_than_the_longest():
    embeds = torch.arange(1.0, 11.0).view(2, 5, 1)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    empty = torch.tensor([[0, 0, 1, 0, 0], [0, 1, 1, 0, 0]]).bool()
    embeds, mask = take_out(empty, embeds, mask)
    assert mask.tolist() == [[1, 1, 1], [1, 1, 1]] and embeds[..., 0].tolist() == [[2, 4, 5], [6, 9, 10]]
    embeds, mask = take_out(torch.tensor([[False] * 3, [True, False, False]]), embeds, mask)
    assert mask.tolist() == [[1, 1, 1], [0, 1, 1]] and embeds[1, 1:, 0].tolist() == [9, 10]


def test_a_step_with_images_that_keep_different_numbers_reaches_every_parameter():
    model = selecting_vlm().train()
    batch = make_batch([[a + SLOTS + b, SLOTS + c]], images=2, image_size=32)
    model(batch).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert model.resampler.score[2].weight.grad.any()
