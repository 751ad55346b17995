"""Every trainable parameter learns and nothing else does; the loss counts tokens; a step repeats from (seed, step)."""

import math
from functools import partial

import pytest
import torch

from fastvlm.batch import NO_LABEL
from fastvlm.models.encoders.early_exit import MEASURED, EarlyExitEncoder
from fastvlm.models.trainable import apply_trainable, select_trainable
from fastvlm.stages import ContrastiveStage, DenseLabelStage, LanguageStage, MuonAdamW
from fastvlm.stages.stage import learning_rate_factor
from tests.models.small_parts import IMAGE_ID, make_batch, small_vlm

SLOTS = [IMAGE_ID] * 4


def make_stage(kind=LanguageStage, patterns=None, *, optimizer=torch.optim.AdamW, **options):
    stage = kind(small_vlm(), name="test", num_steps=10, optimizer=partial(optimizer, lr=1e-3), **options)
    patterns = patterns or {"encoder": 1e-3, "resampler": 1e-3, "projector": 2e-3, "llm": 1e-3}
    stage.learning_rates = select_trainable(stage.model, patterns)
    apply_trainable(stage.model, stage.learning_rates)
    return stage.train()


def image_batch():
    return make_batch([[[1, *SLOTS, 7, 8, 9], [10, 11]], [[12, *SLOTS, 13, 14]]], images=2)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, MuonAdamW])
def test_the_optimiser_holds_exactly_what_learns_and_all_of_it_gets_a_gradient(optimizer):
    stage = make_stage(patterns={"projector": 1e-3, "llm.hf.model.layers.1": 2e-3}, optimizer=optimizer)
    groups = stage.configure_optimizers()["optimizer"].param_groups
    held = [id(p) for g in groups for p in g["params"]]
    learns = {id(p) for n, p in stage.model.named_parameters() if n in stage.learning_rates}
    assert len(held) == len(set(held)) and set(held) == learns
    stage.training_step(image_batch())["loss"].backward()
    for name, parameter in stage.model.named_parameters():
        assert (parameter.grad is not None) == (name in stage.learning_rates), name


def test_a_batch_without_images_still_gives_every_trainable_parameter_a_gradient():
    stage = make_stage()
    stage.training_step(make_batch([[[1, 7, 8, 9]]]))["loss"].backward()
    assert all(p.grad is not None for p in stage.model.parameters())


def test_ranks_with_and_without_images_measure_the_same_names():
    stage = make_stage(patterns={"llm": 1e-3})
    stage.model.encoder = EarlyExitEncoder(stage.model.encoder, exits=[0]).requires_grad_(False).eval()
    text, images = stage.measure(make_batch([[[1, 7, 8, 9]]])), stage.measure(image_batch())
    assert text.keys() == images.keys() >= set(MEASURED)
    assert all(text[name].isnan() and images[name].isfinite() for name in MEASURED)


def test_without_the_freezing_callback_there_is_no_optimiser():
    stage = make_stage()
    stage.learning_rates = {}
    with pytest.raises(RuntimeError, match="StageFreezing"):
        stage.configure_optimizers()


def test_vectors_are_not_decayed_and_every_part_has_its_rate():
    groups = make_stage().configure_optimizers()["optimizer"].param_groups
    for group in groups:
        assert group["initial_lr"] == (2e-3 if group["name"] == "projector" else 1e-3)
        assert all((p.ndim < 2) == (group["weight_decay"] == 0.0) for p in group["params"])


def test_two_micro_batches_over_their_common_tokens_are_one_batch():
    rows = [[[1, 7, 8, 9, 10, 11, 12]], [[1, 13, 14]]]
    whole, stage = make_batch(rows), make_stage()
    total = whole.num_answer_tokens
    stage.training_step(whole)["loss"].backward()
    expected = {n: p.grad.clone() for n, p in stage.model.named_parameters()}
    stage.zero_grad()
    for row in rows:
        half = make_batch([row])
        half.num_answer_tokens = total
        stage.training_step(half)["loss"].backward()
    for name, parameter in stage.model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_per_source_sums_add_up_to_the_loss():
    batch = image_batch()
    batch.sources, batch.source_ids = ("a", "b"), torch.where(batch.segment_ids > 1, 1, 0)
    out = make_stage().training_step(batch)
    torch.testing.assert_close(out["source_loss"].sum(), out["loss_sum"], rtol=1e-5, atol=1e-5)
    # The first token of each of the three samples is predicted by nothing.
    assert out["source_tokens"].sum() == (batch.labels != -100).sum() - 3


def test_the_schedule_warms_up_decays_and_ends_where_it_should():
    factor = partial(learning_rate_factor, num_steps=110, warmup_steps=10, final=0.1)
    assert factor(0, decay="cosine") == pytest.approx(0.1) and factor(9, decay="cosine") == pytest.approx(1.0)
    assert factor(60, decay="cosine") == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert factor(110, decay="cosine") == factor(110, decay="linear") == pytest.approx(0.1)
    assert factor(60, decay="constant") == 1.0


def test_muon_steps_matrices_as_torch_does_and_the_rest_as_adamw_does_and_survives_saving():
    torch.manual_seed(0)
    start = [torch.randn(6, 4), torch.randn(5)]
    gradients = [[torch.randn(6, 4), torch.randn(5)] for _ in range(4)]

    def groups(matrix, vector):
        return [
            {"params": [matrix], "lr": 0.01, "kind": "matrix"},
            {"params": [vector], "lr": 0.02, "kind": "vector", "weight_decay": 0.0},
        ]

    ours, theirs = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    optimizer = MuonAdamW(groups(*ours), weight_decay=0.1)
    reference = [
        torch.optim.Muon([theirs[0]], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([theirs[1]], lr=0.02, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    for i, step in enumerate(gradients):
        for parameters in (ours, theirs):
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
        if i == 2:  # saved and loaded into a new optimiser in the middle, the schedule still in reach
            state = optimizer.state_dict()
            optimizer = MuonAdamW(groups(*ours), weight_decay=0.1)
            optimizer.load_state_dict(state)
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
            for other in reference:
                other.param_groups[0]["lr"] *= 0.5
        optimizer.step()
        [other.step() for other in reference]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_dense_label_stage_needs_label_maps_and_learns_them():
    stage = make_stage(DenseLabelStage, {"encoder": 1e-2}, num_classes=[4, 3])
    batch = image_batch()
    with pytest.raises(ValueError, match="needs label maps with 2 channels"):
        stage.training_step(batch)
    batch.label_maps = torch.randint(0, 3, (2, 3, 2, 2), dtype=torch.uint8)
    optimizer = stage.configure_optimizers()["optimizer"]
    losses = []
    for _ in range(80):
        out = stage.training_step(batch)
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(out["loss"]))
    assert losses[-1] < 0.5 * losses[0]


def test_cells_without_a_label_teach_nothing():
    whole, alone = image_batch(), make_batch([[[1, *SLOTS, 7, 8, 9], [10, 11]]], images=1)
    whole.pixel_values[0] = alone.pixel_values[0]
    whole.label_maps = torch.randint(0, 3, (2, 2, 2, 2), dtype=torch.uint8)
    whole.label_maps[1] = NO_LABEL
    alone.label_maps, alone.num_planned_images = whole.label_maps[:1], 2
    stage = make_stage(DenseLabelStage, {"encoder": 1e-2}, num_classes=[4, 3]).eval()  # its norms take no batch means
    measured = [stage.training_step(batch) for batch in (whole, alone)]
    for key in ("loss", "cell_accuracy/0", "cell_accuracy/1"):
        torch.testing.assert_close(measured[0][key], measured[1][key])


def test_a_label_beyond_the_classes_is_refused_with_its_channel_before_it_is_on_the_device():
    stage, batch = make_stage(DenseLabelStage, {"encoder": 1e-2}, num_classes=[4, 3]), image_batch()
    batch.label_maps = torch.full((2, 3, 2, 2), NO_LABEL, dtype=torch.uint8)
    assert stage.transfer_batch_to_device(batch, torch.device("cpu"), 0).label_maps is not None
    batch.label_maps[1, 1, 0, 0] = 3
    with pytest.raises(ValueError, match=r"stages.test.objective.num_classes=\[4, 3\], but channel 1 .* has label 3: "):
        stage.transfer_batch_to_device(batch, torch.device("cpu"), 0)


def test_micro_batches_with_unequal_numbers_of_images_learn_dense_labels_like_one_batch():
    rows = [[[*SLOTS, 7, 8], [9, *SLOTS, 10]], [[11, *SLOTS, 12]]]
    whole = make_batch(rows, images=3)
    whole.label_maps = torch.randint(0, 3, (3, 2, 2, 2), dtype=torch.uint8)
    whole.sources, whole.source_ids = ("a", "b"), torch.where(whole.segment_ids > 1, 1, 0)
    stage = make_stage(DenseLabelStage, {"encoder": 1e-2}, num_classes=[4, 3]).eval()  # its norms take no batch means
    out = stage.training_step(whole)
    out["loss"].backward()
    assert out["source_tokens"].tolist() == [2, 1]
    expected = [p.grad.clone() for p in stage.model.encoder.parameters()]
    stage.zero_grad()
    for row, images in zip(rows, (slice(0, 2), slice(2, 3))):
        part = make_batch([row])
        part.pixel_values, part.label_maps = whole.pixel_values[images], whole.label_maps[images]
        part.num_planned_images = 3
        stage.training_step(part)["loss"].backward()
    for parameter, gradient in zip(stage.model.encoder.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [partial(DenseLabelStage, num_classes=[4, 3]), ContrastiveStage])
def test_rows_without_images_teach_an_encoder_nothing_and_keep_no_rank_waiting(kind):
    stage = make_stage(kind, {"encoder": 1e-2})
    statistics = {name: b.clone() for name, b in stage.model.named_buffers()}
    empty = make_batch([[], []], length=4)
    empty.num_planned_images = 3
    out = stage.training_step(empty)
    out["loss"].backward()
    assert float(out["loss"].detach()) == 0 and out["source_tokens"].tolist() == [0]
    assert all(p.grad is not None and not p.grad.any() for p in stage.model.encoder.parameters())
    assert all(torch.equal(b, statistics[name]) for name, b in stage.model.named_buffers())


def test_an_encoder_with_a_branch_for_tiles_learns_dense_labels_in_both_branches():
    from fastvlm.models.encoders.multi_granularity import MultiGranularityEncoder

    stage = make_stage(DenseLabelStage, {"encoder": 1e-2}, num_classes=[4, 3])
    coarse, fine = (small_vlm().encoder for _ in range(2))
    stage.model.encoder = MultiGranularityEncoder(coarse, fine)
    batch = image_batch()
    batch.label_maps = torch.randint(0, 3, (2, 3, 2, 2), dtype=torch.uint8)
    out = stage.training_step(batch)
    out["loss"].backward()
    for branch in ("coarse", "fine", "coarse_mlp", "fine_mlp"):
        gradients = [p.grad for p in getattr(stage.model.encoder, branch).parameters()]
        assert any(g is not None and g.abs().sum() > 0 for g in gradients), branch
    # The mean of what each branch loses alone.
    alone = []
    for tile in (False, True):
        stage.patches = lambda batch, tile=tile: stage.model.encode_patches(batch.pixel_values, torch.full((2,), tile))
        alone.append(float(stage.training_step(batch)["loss"]))
    assert float(out["loss"]) == pytest.approx(sum(alone) / 2, rel=1e-4)


def test_a_head_that_the_contrastive_loss_does_not_read_neither_learns_nor_keeps_ranks_waiting():
    batch, losses = make_batch([[[*SLOTS, 7, 8, 9]], [[*SLOTS, 10, 11]]], images=2), []
    for tied in (True, False):
        stage = make_stage(ContrastiveStage, {"encoder": 1e-3, "llm": 1e-3}, dim=8)
        head = stage.model.llm.hf.get_output_embeddings()
        table = stage.model.llm.hf.get_input_embeddings().weight
        head.weight = table if tied else torch.nn.Parameter(table.detach().clone())
        stage.learning_rates = select_trainable(stage.model, {"encoder": 1e-3, "llm": 1e-3})
        stage.setup("fit")
        assert head.weight.requires_grad == tied
        optimizer = stage.configure_optimizers()["optimizer"]
        losses.append(stage.training_step(batch)["loss"])
        losses[-1].backward()
        assert all(p.grad is not None for group in optimizer.param_groups for p in group["params"])
        assert all(p.grad is not None for p in stage.parameters() if p.requires_grad)
    assert torch.equal(*losses)


def test_the_contrastive_loss_is_open_clips_and_cannot_see_through_the_caption():
    from open_clip.loss import ClipLoss

    stage = make_stage(ContrastiveStage, {"encoder": 1e-3, "llm": 1e-3}, dim=8)
    batch = make_batch([[[*SLOTS, 7, 8, 9]], [[*SLOTS, 10, 11]]], images=2)
    out = stage.training_step(batch)
    model = stage.model
    image = stage.image_projection(model.encode_patches(batch.pixel_values).mean(1))
    words = [[7, 8, 9], [10, 11]]
    text = []
    for ids in words:
        # The same words without any slot before them, at the same positions.
        ids = torch.tensor([ids])
        positions = torch.arange(4, 4 + ids.shape[1])[None]
        hidden = model.llm.hidden(model.llm.embed(ids), positions, torch.ones_like(ids))
        text.append(stage.text_projection(hidden.mean(1)))
    normalise = torch.nn.functional.normalize
    expected = ClipLoss()(normalise(image), normalise(torch.cat(text)), stage.logit_scale.exp())
    torch.testing.assert_close(out["loss"], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="one image and one caption a row"):
        stage.training_step(make_batch([[[*SLOTS, 7], [*SLOTS, 8]]], images=2))


def test_a_row_without_a_sample_is_compared_with_none():
    rows = [[[*SLOTS, 7, 8, 9]], [[*SLOTS, 10, 11]]]
    stage = make_stage(ContrastiveStage, {"encoder": 1e-3, "llm": 1e-3}, dim=8).eval()  # its norms take no batch means
    stage.setup("fit")
    measured, gradients = [], []
    for batch in (make_batch(rows, images=2), make_batch([rows[0], [], rows[1], []], images=2)):
        measured.append(stage.training_step(batch))
        measured[-1]["loss"].backward()
        gradients.append([p.grad.clone() for p in stage.parameters() if p.requires_grad])
        stage.zero_grad()
    for left, right in zip(*(one.values() for one in measured), strict=True):
        torch.testing.assert_close(left, right)
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
    none = stage.training_step(make_batch([[], []], length=4))
    none["loss"].backward()
    assert none["loss"] == none["source_tokens"].sum() == 0 and none["retrieval"].isnan()
    assert not any(p.grad.any() for p in stage.parameters() if p.requires_grad)
