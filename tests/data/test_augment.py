"""Augmentation: drawn from (seed, step, key) alone, for training alone, and only what a source's answers bear."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_world import draw_png, make_record

from fastvlm.data.augment import Augmentation, jitter_colours, mean_grey
from fastvlm.data.datamodule import MixtureDataModule
from fastvlm.data.dataset import PlannedDataset
from fastvlm.data.plan import Plan
from fastvlm.data.shards import ShardWriter
from fastvlm.data.source import Mixture, Source
from fastvlm.data.transforms import ImageTransform

ALL = Augmentation(crop=(0.3, 0.9), jitter=0.4, mirror=True)
DATA = draw_png(0, (48, 40))


def test_the_same_seed_draws_the_same_and_another_another():
    transform = ImageTransform(image_size=32, augment=ALL)
    assert torch.equal(transform(DATA, seed="1/2/a"), transform(DATA, seed="1/2/a"))
    assert len({transform(DATA, seed=i).numpy().tobytes() for i in range(20)}) == 20
    assert torch.equal(transform(DATA), ImageTransform(image_size=32)(DATA)), "without a seed nothing is drawn"


@given(seed=st.integers(), width=st.integers(1, 500), height=st.integers(1, 500))
def test_a_crop_lies_in_the_image_and_has_its_share_of_it(seed, width, height):
    left, top, right, bottom = ALL.draw(seed).crop(width, height)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    share = (right - left) * (bottom - top) / (width * height)
    assert share <= 0.9 + 1.5 / min(width, height) and (min(width, height) < 50 or share >= 0.3 - 0.05)


def test_one_kind_does_not_change_the_draws_of_another():
    alone, together = Augmentation(mirror=True), ALL
    assert [alone.draw(i).mirrored for i in range(50)] == [together.draw(i).mirrored for i in range(50)]
    assert 10 < sum(alone.draw(i).mirrored for i in range(50)) < 40
    only_mirror = ImageTransform(image_size=40, fit="squash", augment=alone)
    plain = ImageTransform(image_size=40, fit="squash")(DATA)
    for i in range(6):
        assert torch.equal(only_mirror(DATA, seed=i), plain.flip(-1) if alone.draw(i).mirrored else plain)


def test_colours_change_as_torchvision_changes_them():
    from torchvision.transforms.v2 import functional as reference

    image = ImageTransform(image_size=40)(DATA)[0]
    mean = mean_grey(image)
    for gains, theirs in (
        ((1.3, 1.0, 1.0), reference.adjust_brightness(image, 1.3)),
        ((1.0, 0.7, 1.0), reference.adjust_contrast(image, 0.7)),
        ((1.0, 1.0, 0.5), reference.adjust_saturation(image, 0.5)),
    ):
        assert (jitter_colours(image, gains, mean=mean).int() - theirs.int()).abs().max() <= 2
    assert torch.equal(jitter_colours(image, (1.0, 1.0, 1.0), mean=mean), image)


def mixture_of(sources, **allowed):
    names = allowed or {"caption": ("jitter",)}
    return Mixture(
        {k: Source(k, path=sources[k], augment=kinds) for k, kinds in names.items()},
        weights=dict.fromkeys(names, 1),
        unit="samples",
    )


def plan_of(mixture, tokenizer, **options):
    return Plan(
        mixture, tokenizer, **({"tokens_per_image": 1, "batch_size": 4, "max_tokens": 96, "num_steps": 60} | options)
    )


def test_a_batch_is_the_same_for_any_process_and_differs_when_its_samples_come_again(sources, tokenizer):
    plan = plan_of(mixture_of(sources, caption=("crop", "jitter", "mirror")), tokenizer)
    transform = ImageTransform(image_size=8, augment=ALL)
    fresh = lambda seed=3: PlannedDataset(
        plan, tokenizer=tokenizer, image_size=8, transform=transform, augment_seed=seed
    )
    one, other = fresh(), fresh()
    for i in (0, 7, 40):  # `one` has read what comes before, as a run that was not killed
        assert torch.equal(one[i].pixel_values, other[i].pixel_values)
    seen: dict[str, set] = {}
    for i in range(plan.num_steps):
        batch = one[i]
        for key, image in zip(batch.keys, batch.pixel_values):
            seen.setdefault(key, set()).add(image.numpy().tobytes())
    assert max(map(len, seen.values())) > 1, "no pixels of yesterday from the cache"
    assert not torch.equal(fresh(4)[0].pixel_values, one[0].pixel_values)


def test_a_source_gets_what_it_allows_and_validation_nothing(sources, tokenizer):
    mixture = mixture_of(sources, caption=(), chat=("jitter", "mirror"))
    options = {"tokenizer": tokenizer, "image_size": 8, "tokens_per_image": 1, "batch_size": 4, "max_tokens": 96}
    transform = ImageTransform(image_size=8, augment=Augmentation(jitter=0.5, mirror=True))
    data = MixtureDataModule(mixture, transform=transform, num_steps=10, val_samples=8, **options)
    plain = MixtureDataModule(mixture, num_steps=10, val_samples=8, **options)
    data.setup(), plain.setup()
    differ = {"caption": False, "chat": False}
    for ours, theirs in zip(data.train_dataloader(), plain.train_dataloader()):
        assert ours.keys == theirs.keys
        for key, a, b in zip(ours.keys, ours.pixel_values, theirs.pixel_values):
            differ[key.split("-")[0]] |= not torch.equal(a, b)
    assert differ == {"caption": False, "chat": True}
    for ours, theirs in zip(data.val_dataloader(), plain.val_dataloader()):
        assert torch.equal(ours.pixel_values, theirs.pixel_values)


def test_what_no_source_allows_and_what_would_part_labels_from_images_is_refused(sources, tokenizer, tmp_path):
    options = {"tokenizer": tokenizer, "image_size": 8, "augment_seed": 0}
    plan = plan_of(mixture_of(sources), tokenizer)
    with pytest.raises(
        ValueError, match=r"image.augment.mirror: no source .* mixture.sources.caption.augment=\[mirror\]"
    ):
        PlannedDataset(plan, transform=ImageTransform(image_size=8, augment=Augmentation(mirror=True)), **options)
    with ShardWriter(tmp_path, "train") as writer:
        for i in range(4):
            record, images = make_record("caption", i)
            writer.write(f"k{i}", record, images, label_maps=[draw_png(i, (2, 2))])
    mixture = Mixture({"x": Source("x", path=tmp_path, augment=["crop", "jitter"])}, weights={"x": 1}, unit="samples")
    plan = plan_of(mixture, tokenizer, num_steps=1)
    with pytest.raises(ValueError, match="image.augment.crop would part the images of source x from their dense"):
        PlannedDataset(plan, transform=ImageTransform(image_size=8, augment=Augmentation(crop=(0.5, 1.0))), **options)
    with pytest.raises(ValueError, match="image.tiles would part"):
        PlannedDataset(plan, transform=ImageTransform(image_size=8, tiles=[[1, 2]]), **options)
    PlannedDataset(plan, transform=ImageTransform(image_size=8, augment=Augmentation(jitter=0.1)), **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Augmentation(crop=(0.5, 1.5)), "image.augment.crop"),
        (lambda: Augmentation(crop=(0.9, 0.5)), "image.augment.crop"),
        (lambda: Augmentation(jitter=2.0), "image.augment.jitter=2.0"),
        (lambda: Source("x", path="nowhere", augment=["miror"]), "source x: augment: miror .*did you mean mirror?"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
