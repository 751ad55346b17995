"""Tiles: an image's slots follow from its size, in the plan as in the batch, in training as in evaluation."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_world import draw_png, train_tokenizer
from transformers.image_processing_utils import select_best_resolution

from fastvlm.config import check, compose
from fastvlm.data.conversation import encode_record
from fastvlm.data.dataset import PlannedDataset
from fastvlm.data.lengths import measure_source
from fastvlm.data.plan import Plan
from fastvlm.data.shards import ShardWriter
from fastvlm.data.source import Mixture, Source
from fastvlm.data.transforms import ImageTransform
from fastvlm.data.validation import ValidationPlan
from fastvlm.evaluation.questions import read_questions
from fastvlm.evaluation.short_answers import evaluate_answers
from fastvlm.inference.engine import Engine
from fastvlm.models.encoders.multi_granularity import MultiGranularityEncoder
from fastvlm.models.vlm import VLM, tiles_of

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))
from tiny_vlm import IMAGE_SIZE, TOKENS_PER_IMAGE, build_model  # noqa: E402

from tests.conftest import TINY  # noqa: E402

GRIDS = [[1, 2], [2, 1], [2, 2], [1, 3], [3, 1], [1, 1]]
side, pair = st.integers(1, 3000), st.tuples(st.integers(1, 4), st.integers(1, 4))
quick = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(max_examples=400, deadline=None)
@given(width=side, height=side, grids=st.lists(pair, min_size=1, max_size=6), size=st.integers(8, 400))
def test_the_best_grid_is_that_of_transformers(width, height, grids, size):
    theirs = select_best_resolution((height, width), [(rows * size, columns * size) for rows, columns in grids])
    if theirs is None:  # an image thinner than a pixel of every grid
        return
    transform = ImageTransform(image_size=size, tiles=grids)
    rows, columns = transform.grid(width, height)
    assert (rows * size, columns * size) == theirs
    assert transform.num_views(width, height) == (1 if (rows, columns) == (1, 1) else 1 + rows * columns)


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.tuples(side, side), min_size=1, max_size=50))
def test_many_sizes_at_once_give_what_each_gives(sizes):
    transform = ImageTransform(image_size=336, tiles=GRIDS)
    together = transform.count_views(*(np.array(column) for column in zip(*sizes)))
    assert together.tolist() == [transform.num_views(w, h) for w, h in sizes]


def test_tiles_put_together_are_the_image_and_the_first_view_is_all_of_it():
    data = draw_png(0, (64, 32))
    views = ImageTransform(image_size=32, tiles=[[1, 2]])(data)
    assert views.shape == (3, 3, 32, 32)
    whole = torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1)
    assert torch.equal(torch.cat([views[1], views[2]], dim=-1), whole)
    assert torch.equal(views[0], ImageTransform(image_size=32)(data)[0])
    rows = ImageTransform(image_size=16, tiles=[[2, 4]])(data)
    assert torch.equal(rows[1 + 4 * 1 + 2], whole[:, 16:32, 32:48]), "row by row"


def write(folder, sizes_of_samples, *, split="train", orientation=1):
    """Documents of images of these sizes with words between, one sample an entry."""
    with ShardWriter(folder, split) as writer:
        for i, sizes in enumerate(sizes_of_samples):
            parts, images = [], []
            for k, (width, height) in enumerate(sizes):
                exif = Image.Exif()
                exif[0x0112] = orientation
                file = io.BytesIO()
                pixels = np.random.default_rng([i, k]).integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(file, "jpeg", exif=exif)
                images.append(file.getvalue())
                parts += [{"type": "text", "text": "a small digit" * (1 + k % 2)}, {"type": "image"}]
            parts.append({"type": "text", "text": f"seven and {i}"})
            writer.write(f"s-{i}", {"document": parts}, images, image_ext="jpg")
    return folder


def mixture_of(folder, **options):
    return Mixture({"x": Source("x", path=folder, **options)}, weights={"x": 1}, unit="tokens")


small = st.tuples(st.integers(1, 60), st.integers(1, 60))


@quick
@given(
    samples=st.lists(st.lists(small, max_size=3), min_size=1, max_size=6),
    grids=st.lists(pair, min_size=1, max_size=4),
    max_tokens=st.integers(12, 150),
    orientation=st.sampled_from((1, 6)),
)
def test_planned_lengths_and_views_are_those_of_what_is_read(
    tmp_path_factory, tokenizer, samples, grids, max_tokens, orientation
):
    folder = write(tmp_path_factory.mktemp("tiles"), samples, orientation=orientation)
    transform = ImageTransform(image_size=16, tiles=grids)
    budget = {"tokens_per_image": 3, "max_tokens": max_tokens, "max_images": 100, "transform": transform}
    try:
        plan = Plan(mixture_of(folder), tokenizer, batch_size=1, num_steps=2, **budget)
    except ValueError as error:
        assert "no sample is left" in str(error)
        return
    (source,) = plan.sources
    dataset = PlannedDataset(plan, tokenizer=tokenizer, image_size=16, transform=transform, max_skipped_share=0.0)
    for row in source.rows.tolist():
        sample = dataset.read(0, row)
        assert len(sample.input_ids) == source.length[row] <= max_tokens
        assert len(sample.images) == source.images[row]
        assert (sample.input_ids == tokenizer.image_id).sum() == 3 * len(sample.images)
        assert sum(label != -100 for label in sample.labels) == source.answer[row]
    batch = dataset[0]
    assert not batch.skipped and int((batch.input_ids == tokenizer.image_id).sum()) == 3 * batch.num_images


def test_truncation_takes_all_views_of_an_image_or_none(tokenizer):
    text = {"type": "text", "text": "a"}
    record = {"document": [text, {"type": "image"}, text, {"type": "image"}, {"type": "image"}, text]}
    slots = [6, 2, 10]
    whole = encode_record(record, tokenizer, tokens_per_image=slots)
    assert whole.input_ids.count(tokenizer.image_id) == 18
    for limit in range(1, len(whole.input_ids) + 1):
        cut = encode_record(record, tokenizer, tokens_per_image=slots, max_tokens=limit)
        assert cut.input_ids == whole.input_ids[: len(cut.input_ids)] and len(cut.input_ids) <= limit
        assert cut.input_ids.count(tokenizer.image_id) == sum(slots[: cut.num_images])
    with pytest.raises(ValueError, match="3 image parts and slots for 2"):
        encode_record(record, tokenizer, tokens_per_image=[1, 2])


def test_the_image_budget_counts_views(tmp_path, tokenizer):
    folder = write(tmp_path, [[(64, 32)], [(32, 32)], [(64, 32), (64, 32)]])
    transform = ImageTransform(image_size=32, tiles=[[1, 2], [1, 1]])
    budget = {"tokens_per_image": 1, "max_tokens": 200, "transform": transform}
    source = Source("x", path=folder)
    found = measure_source(source, tokenizer, name="x", split="train", max_images=3, **budget)
    assert found.images.tolist() == [3, 1, 6] and found.rows.tolist() == [0, 1]
    plans = [
        Plan(mixture_of(folder), tokenizer, batch_size=1, num_steps=1, max_images=6, tokens_per_image=1, max_tokens=200,
             transform=t)
        for t in (transform, ImageTransform(image_size=32, tiles=[[2, 2]]), None)
    ]  # fmt: skip
    assert len({plan.fingerprint for plan in plans}) == 3


@pytest.fixture(scope="module", params=["one encoder", "one for the global view and one for tiles"])
def world(request, tmp_path_factory):
    tokenizer = train_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    model = build_model(tokenizer)
    if request.param != "one encoder":
        encoder = MultiGranularityEncoder(model.encoder, build_model(tokenizer, seed=1).encoder).eval()
        model = VLM(encoder, model.resampler, model.projector, model.llm, image_token_id=tokenizer.image_id).eval()
    return tokenizer, model


def test_a_packed_batch_with_tiles_has_a_visual_token_for_every_slot(tmp_path, world):
    tokenizer, model = world
    sizes = [[(64, 32)], [(20, 60), (32, 32)], [], [(64, 64)], [(90, 30)], [(32, 33)]]
    write(tmp_path, sizes)
    write(tmp_path, sizes, split="val")
    transform = ImageTransform(image_size=IMAGE_SIZE, tiles=GRIDS)
    options = {"tokens_per_image": TOKENS_PER_IMAGE, "max_tokens": 120, "max_images": 12, "batch_size": 2}
    plan = Plan(mixture_of(tmp_path), tokenizer, num_steps=4, transform=transform, **options)
    val = ValidationPlan(mixture_of(tmp_path), tokenizer, transform=transform, **options)
    for p in (plan, val):
        dataset = PlannedDataset(p, tokenizer=tokenizer, image_size=IMAGE_SIZE, transform=transform)
        for batch in (dataset[i] for i in range(p.num_steps)):
            assert batch.num_images > len(batch.keys) or p is val
            counts = [transform.num_views(*size) for key in batch.keys for size in sizes[int(key.split("-")[-1])]]
            tiles = [number > 0 for count in counts for number in range(count)]
            assert tiles == ([] if batch.layouts is None else tiles_of(batch.layouts).tolist())
            with torch.no_grad():
                assert model(batch).isfinite().all()  # splice counts slots and visual tokens


def test_the_engine_scores_a_tiled_question_as_training_saw_it(tmp_path, world):
    """The likelihood of an answer, through evaluation, is that of the batch the data pipeline makes of the record."""
    tokenizer, model = world
    with ShardWriter(tmp_path, "test") as writer:
        for i, size in enumerate([(64, 32), (30, 96), (32, 32), (64, 64)]):
            content = [{"type": "image"}, {"type": "text", "text": "what digit"}, {"type": "image"}]
            turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "seven"}]
            writer.write(f"q-{i}", {"messages": turns}, [draw_png(i, size), draw_png(50 + i, size[::-1])])
    source, transform = Source("x", path=tmp_path), ImageTransform(image_size=IMAGE_SIZE, tiles=GRIDS)
    questions = read_questions(source.load("test", tokenizer), source="x", limit=None, transform=transform)
    engine = Engine(model, tokenizer, image_size=IMAGE_SIZE, transform=transform, max_new_tokens=4)
    rows = evaluate_answers(engine, questions, batch_size=3, max_new_tokens=4)["predictions"]
    options = {"tokens_per_image": TOKENS_PER_IMAGE, "max_tokens": 250, "max_images": 40, "batch_size": 1}
    plan = Plan(
        mixture_of(tmp_path), tokenizer, split="test", packing=False, num_steps=4, transform=transform, **options
    )
    dataset = PlannedDataset(plan, tokenizer=tokenizer, image_size=IMAGE_SIZE, transform=transform)
    scores = {}
    for batch in (dataset[i] for i in range(4)):
        with torch.no_grad():
            logits = model(batch)[0, :-1].log_softmax(-1)
        targets = batch.labels[0, 1:]
        at = (targets != -100).nonzero()[:, 0]
        scores[batch.keys[0]] = -float(logits[at, targets[at]].sum())
    for row, question in zip(rows, questions):
        assert row["nats"] == pytest.approx(scores[row["key"]], rel=1e-4)
        alone = engine.generate([question.prompt], [question.images])[0]
        assert alone.text == row["prediction"]
        assert alone.num_image_tokens == TOKENS_PER_IMAGE * sum(len(image) for image in question.images)
    assert len({len(q.images[0]) for q in questions}) > 1


def test_a_stage_with_tiles_and_augmentation_trains_and_evaluates_by_the_command_line(cli, tmp_path):
    arguments = [a for a in TINY if a not in ("~task", "num_samples=0")]
    arguments += ["pipeline=dense", "stages.dense.steps=2", "stages.dense.batch_size=2", "stages.dense.image_size=32"]
    arguments += ["stages.dense.val_samples=4", "num_samples=2", "task.limit=1", "task.text=null", "task.formed=[]"]
    arguments += ["stages.dense.image.tiles=[[1,2],[2,2]]", "stages.dense.image.augment.jitter=0.2", "name=tiles"]
    arguments += ["stages.dense.max_tokens=512"]
    done = cli("train.py", *arguments)
    assert "report:" in done.stdout
    results = json.loads((tmp_path / "runs" / "tiles" / "results.json").read_text())
    again = cli("eval.py", f"checkpoint={tmp_path}/runs/tiles", "hardware=cpu", "task.limit=1", "task.text=null",
                "task.formed=[]")  # fmt: skip
    assert "results:" in again.stdout
    evaluated = json.loads((tmp_path / "runs" / "tiles" / "eval" / "results.json").read_text())
    assert evaluated["metrics"]["test/answer_nll"] == pytest.approx(results["metrics"]["test/answer_nll"], rel=1e-4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("image.tiles=[[0,2]]", r"stages.dense.image.tiles: \[0, 2\] is not a pair"),
        ("image.fit=sqash", "stages.dense.image.fit=sqash is not one of pad, crop, squash; did you mean squash"),
        ("image.augment.crop=[0.5,2.0]", "stages.dense.image.augment.crop"),
    ],
)
def test_mistakes_in_a_stage_are_named_with_their_key(override, message):
    with pytest.raises(ValueError, match=message):
        check(compose("train", ["pipeline=dense", f"stages.dense.{override}"]))
