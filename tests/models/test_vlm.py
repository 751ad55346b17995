from dataclasses import replace

import pytest
import torch
from small_parts import IMAGE_ID, make_batch, random_ids, small_vlm

from fastvlm.models.encoders.transformers_encoder import from_config
from fastvlm.models.loss import answer_loss
from fastvlm.models.resamplers.identity import IdentityResampler
from fastvlm.models.vlm import VLM

IMAGE = [IMAGE_ID] * 4  # the small VLM has 4 visual tokens an image
a, b, c, d = random_ids(3, 4, 5, 2)


def logits_of(model, batch):
    with torch.no_grad():
        return model.eval()(batch)


def test_sizes_go_from_neighbour_to_neighbour_and_names_start_with_their_part():
    model = small_vlm()
    assert model.num_visual_tokens(32) == 4
    assert model.encode_images(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 4, model.llm.dim)
    assert model.encode_patches(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 16, model.encoder.out_dim)
    assert {name.split(".")[0] for name in model.state_dict()} == set(model.parts)
    assert all(model.parts[name] is getattr(model, name) for name in model.parts)


def test_bytes_are_normalised_by_the_encoders_mean_and_std():
    model = small_vlm()
    model.encoder.mean, model.encoder.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    model = type(model)(**model.parts, image_token_id=IMAGE_ID)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.encoder.mean, model.encoder.std))
    torch.testing.assert_close(model.normalise(images), (images / 255 - mean) / std)


@pytest.mark.parametrize("class_token", [None, False, True])
def test_an_image_is_a_sequence_and_a_map_whether_or_not_a_class_token_is_kept(class_token):
    model = small_vlm()
    if class_token is not None:
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        clip = {"config": {**sizes, "image_size": 32, "patch_size": 8}, "mean": [0.5] * 3, "std": [0.5] * 3}
        encoder = from_config("clip_vision_model", class_token=class_token, **clip)
        parts = {**model.parts, "encoder": encoder, "resampler": IdentityResampler(in_dim=encoder.out_dim)}
        model = VLM(**parts, image_token_id=IMAGE_ID)
    model.eval()
    views = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    views[1] = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        encoding, patches = model.encode_image(views), model.encode_patches(views)
        assert torch.equal(encoding.sequence, model.encode_images(views))
    height, width = model.encoder.grid(32)
    assert patches.shape[1] == height * width + bool(class_token)
    assert torch.equal(encoding.spatial[1, :, 1, 2], patches[1, bool(class_token) + width + 2])
    ids = torch.tensor([[7, 8]])
    assert torch.equal(model.encode_text(ids), model.llm.embed(ids))


@pytest.mark.parametrize(
    ("row", "images"),
    [
        ([IMAGE + a], 1),
        ([a + IMAGE + b], 1),
        ([a + IMAGE + b + IMAGE + c], 2),
        ([IMAGE + IMAGE + a], 2),
        ([a + IMAGE, IMAGE + b, c], 2),
        ([a, b], 0),
    ],
    ids=["first", "within", "interleaved", "two in a row", "packed", "none"],
)
def test_images_may_stand_anywhere(row, images):
    model = small_vlm()
    batch = make_batch([row, [c]], images=images)
    logits = model(batch)
    assert logits.shape == (*batch.input_ids.shape, model.llm.vocab_size)
    loss = answer_loss(model.hidden(batch), batch.labels, model.llm.head, segment_ids=batch.segment_ids)
    loss.sum.backward()
    assert loss.sum.isfinite()
    assert images == 0 or all(p.grad is not None for p in model.parameters())


def test_an_image_changes_what_comes_after_it_in_its_sample_and_nothing_else():
    model = small_vlm()
    batch = make_batch([[a + IMAGE + b, c], [d]], images=1)
    before = logits_of(model, batch)
    batch.pixel_values = 255 - batch.pixel_values
    changed = (logits_of(model, batch) - before).abs().amax(-1) > 1e-6
    after_image = slice(len(a), len(a + IMAGE + b))
    assert changed[0, after_image].all()
    assert not changed[0, : len(a)].any() and not changed[0, after_image.stop :].any() and not changed[1].any()


def test_images_go_to_their_slots_in_order():
    model = small_vlm()
    both = make_batch([[IMAGE + a], [IMAGE + a]], images=2)
    logits = logits_of(model, both)
    for i in range(2):
        alone = make_batch([[IMAGE + a]], images=2)
        alone.pixel_values = both.pixel_values[i : i + 1]
        torch.testing.assert_close(logits_of(model, alone)[0], logits[i], rtol=1e-5, atol=1e-5)


def test_a_miscount_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="4 image slots in the text but 8 visual tokens"):
        small_vlm()(make_batch([[IMAGE + a]], images=2))


def test_a_batch_without_images_touches_every_trainable_parameter_and_no_statistic():
    model = small_vlm().train()
    batch = make_batch([[a, b]])
    statistics = {name: value.clone() for name, value in model.encoder.named_buffers()}
    model(batch).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    vision = [p for name, p in model.named_parameters() if not name.startswith("llm.")]
    assert not any(p.grad.any() for p in vision)
    assert all(torch.equal(value, statistics[name]) for name, value in model.encoder.named_buffers())
    assert all(m.training for m in model.encoder.modules())


def test_the_touch_changes_no_logit():
    model = small_vlm().train()
    batch = make_batch([[a, b]])
    model.llm.eval()
    torch.testing.assert_close(model(batch), logits_of(model, batch), rtol=0, atol=0)


def cached(model, batch):
    """The same batch as the feature cache gives it."""
    with torch.no_grad():
        features = model.eval().encode_patches(batch.pixel_values)
    return replace(batch, pixel_values=batch.pixel_values[:0], features=features)


def test_cached_patches_give_the_logits_of_the_images(monkeypatch):
    model = small_vlm()
    batch = make_batch([[a + IMAGE + b, c], [IMAGE + d]], images=2)
    stored, expected = cached(model, batch), logits_of(model, batch)
    monkeypatch.setattr(model.encoder, "forward", lambda images: pytest.fail("the encoder ran"))
    assert stored.num_images == 2
    torch.testing.assert_close(logits_of(model, stored), expected, rtol=0, atol=0)
    half = replace(stored, features=stored.features.bfloat16())
    torch.testing.assert_close(logits_of(model, half), expected, rtol=0.05, atol=0.05)


def test_a_cached_batch_without_images_touches_what_learns_and_runs_no_encoder(monkeypatch):
    model = small_vlm().train()
    model.encoder.requires_grad_(False)
    batch = make_batch([[a, b]])
    batch = replace(batch, features=torch.empty(0, 4, model.encoder.out_dim))
    monkeypatch.setattr(model.encoder, "forward", lambda images: pytest.fail("the encoder ran"))
    model(batch).sum().backward()
    vision = [*model.resampler.parameters(), *model.projector.parameters()]
    assert all(p.grad is not None and not p.grad.any() for p in vision)


def test_a_frozen_vision_path_costs_nothing(monkeypatch):
    model = small_vlm().train()
    for name in ("encoder", "resampler", "projector"):
        model.parts[name].requires_grad_(False)
    visual = model.encode_images(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    assert not visual.requires_grad
    monkeypatch.setattr(model.encoder, "forward", lambda images: pytest.fail("the encoder ran without an image"))
    model(make_batch([[a, b]])).sum().backward()


def test_only_the_trainable_end_of_the_vision_path_has_a_graph():
    model = small_vlm().train()
    model.encoder.requires_grad_(False)
    seen = []
    model.resampler.register_forward_pre_hook(lambda part, inputs: seen.append(inputs[0].requires_grad))
    model(make_batch([[IMAGE + a]], images=1)).sum().backward()
    assert seen == [False]
    assert all(p.grad is not None for p in [*model.resampler.parameters(), *model.projector.parameters()])
    model.encoder.requires_grad_(True)
    model.resampler.requires_grad_(False), model.projector.requires_grad_(False)
    model(make_batch([[IMAGE + a]], images=1)).sum().backward()  # gradients pass frozen parts on their way down
    assert all(p.grad is not None for p in model.encoder.parameters())
