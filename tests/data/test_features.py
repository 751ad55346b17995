"""The feature cache: exactly the planned images, once, never stale, whatever kills or breaks on the way."""

import json
import os
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_world import draw_png, make_record, write_source

from fastvlm.data import features
from fastvlm.data.augment import Augmentation
from fastvlm.data.datamodule import MixtureDataModule
from fastvlm.data.dataset import PlannedDataset
from fastvlm.data.feature_pass import fill, planned_samples
from fastvlm.data.features import FeatureStore, FeatureWriter, image_key
from fastvlm.data.plan import Plan
from fastvlm.data.shards import ShardReader, ShardWriter
from fastvlm.data.source import Mixture, Source
from fastvlm.data.transforms import ImageTransform
from fastvlm.data.validation import ValidationPlan

SIZE, SHAPE = 8, (4, 6)
SQUARE = ImageTransform(image_size=SIZE)
BUDGET = {"tokens_per_image": 4, "batch_size": 4, "max_tokens": 64, "max_images": 4}


def encode(pixels: torch.Tensor, is_tile=None) -> torch.Tensor:
    """Stands in for an encoder: (I, 3, 8, 8) -> (I, 4, 6), another value for another image."""
    mix = torch.randn(3 * SIZE * SIZE, 24, generator=torch.Generator().manual_seed(0))
    return (pixels.float().flatten(1) @ mix / 1000).unflatten(1, SHAPE)


def make_plan(folders, tokenizer, *, num_steps=10, **options):
    sources = {kind: Source(kind, path=folder) for kind, folder in folders.items()}
    mixture = Mixture(sources, weights=dict.fromkeys(sources, 1), unit="samples")
    return Plan(mixture, tokenizer, num_steps=num_steps, seed=1, **(BUDGET | options))


def make_store(root, **description) -> FeatureStore:
    return FeatureStore(description, shape=SHAPE, dtype=torch.float32, root=root)


def run_fill(store, *plans, **options):
    options = {
        "encode": encode,
        "transform": SQUARE,
        "batch_size": 8,
        "where": "stages.x.cache_features",
    } | options
    return fill(store, plans, **options)


def planned_keys(plan) -> set[bytes]:
    reader = ShardReader()
    return {
        image_key(data)
        for source, row, views in planned_samples(plan, SQUARE)
        for data in plan.sources[source].index.read(row, reader).images[: len(views)]
    }


# -- the store --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_is_read_to_the_bit_in_any_order_and_process(tmp_path, dtype):
    store = FeatureStore({"a": 1}, shape=(3, 5), dtype=dtype, root=tmp_path)
    store.prepare()
    views = [1, 3, 2, 1, 1, 4]
    values = torch.randn(sum(views), 3, 5).to(dtype).split(views)
    keys = [image_key(bytes([i])) for i in range(6)]
    writer = FeatureWriter(store, chunk_bytes=1)  # each write becomes a chunk
    writer.write(keys[:2], views[:2], torch.cat(values[:2]))
    writer.write(keys[2:], views[2:], torch.cat(values[2:]))
    writer.close()
    fresh = FeatureStore({"a": 1}, shape=(3, 5), dtype=dtype, root=tmp_path)
    fresh.refresh()
    assert len(fresh) == 6 and len(list(store.folder.glob("*.safetensors"))) == 2
    for i in (5, 0, 3, 1, 2, 4, 0):
        assert torch.equal(fresh.read(keys[i]), values[i])
    with pytest.raises(KeyError):
        fresh.read(image_key(b"another"))


def test_keys_that_begin_alike_are_told_apart(tmp_path):
    store = make_store(tmp_path)
    store.prepare()
    keys = [b"\x01" * 8 + bytes([i]) * 24 for i in range(5)]
    writer = FeatureWriter(store)
    values = torch.randn(5, *SHAPE)
    writer.write(keys, [1] * 5, values)
    writer.close()
    store.refresh()
    assert all(torch.equal(store.read(key)[0], value) for key, value in zip(keys, values))
    assert b"\x01" * 8 + b"\x09" * 24 not in store


def test_anything_the_features_depend_on_makes_another_store(tmp_path):
    one = make_store(tmp_path, weights="a", image_size=8)
    assert make_store(tmp_path, image_size=8, weights="a").folder == one.folder
    others = [make_store(tmp_path, weights="b", image_size=8), make_store(tmp_path, weights="a", image_size=16)]
    others.append(FeatureStore({"weights": "a", "image_size": 8}, shape=(4, 7), dtype=torch.float32, root=tmp_path))
    others.append(FeatureStore({"weights": "a", "image_size": 8}, shape=SHAPE, dtype=torch.float16, root=tmp_path))
    assert len({store.key for store in [one, *others]}) == 5


def test_a_chunk_that_is_not_whole_is_no_chunk(tmp_path, sources, tokenizer):
    plan = make_plan({"caption": sources["caption"]}, tokenizer)
    store = make_store(tmp_path)
    run_fill(store, plan)
    (chunk,) = store.folder.glob("*.safetensors")
    whole = chunk.read_bytes()
    other = [b"\xff" * 7 + b"\x7f" + whole[8:], (2).to_bytes(8, "little") + b"[]"]
    for damaged in (whole[:-100], whole[:5], b"", b"\0" * 1000, *other):
        chunk.write_bytes(damaged)
        (store.folder / ".x.1.part").write_bytes(b"left by a killed writer")
        fresh = make_store(tmp_path)
        assert run_fill(fresh, plan)["written"] == len(planned_keys(plan))
        assert chunk.read_bytes() == whole and not list(store.folder.glob(".*.part"))


# -- the pass ---------------------------------------------------------------------------------------------------------


def test_exactly_the_planned_images_are_written_and_each_once(tmp_path, sources, tokenizer):
    plan = make_plan(sources, tokenizer, num_steps=6)  # not all of the sources
    val = ValidationPlan(plan.mixture, tokenizer, num_samples=12, **BUDGET)
    wanted = planned_keys(plan) | planned_keys(val)
    store = make_store(tmp_path)
    about = run_fill(store, plan, val)
    assert store.keys() == wanted and about["written"] == about["distinct"] == len(wanted) == len(store)
    every = planned_keys(make_plan(sources, tokenizer, num_steps=100))
    assert not every <= wanted
    longer = make_plan(sources, tokenizer, num_steps=100)
    assert run_fill(store, longer)["written"] == len(every - wanted)


def test_a_second_pass_writes_nothing_and_opens_no_image(tmp_path, sources, tokenizer, monkeypatch):
    plan = make_plan(sources, tokenizer)
    run_fill(make_store(tmp_path), plan)
    monkeypatch.setattr(ShardReader, "read", lambda *_: pytest.fail("a shard was read"))
    lines = []
    assert run_fill(make_store(tmp_path), plan, say=lines.append)["written"] == 0
    assert "no image is decoded" in lines[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_holds_what_the_encoder_says_of_its_images_and_nothing_is_decoded(
    tmp_path, sources, tokenizer, monkeypatch, workers
):
    plan = make_plan(sources, tokenizer)
    store = make_store(tmp_path)
    run_fill(store, plan, num_workers=workers)
    plain = [PlannedDataset(plan, tokenizer=tokenizer, image_size=SIZE)[i] for i in range(plan.num_steps)]
    monkeypatch.setattr(ImageTransform, "__call__", lambda *_, **__: pytest.fail("an image was decoded"))
    cached = PlannedDataset(plan, tokenizer=tokenizer, image_size=SIZE, features=store)
    loader = torch.utils.data.DataLoader(cached, batch_size=None, num_workers=workers)
    for theirs, batch in zip(plain, loader, strict=True):
        assert batch.num_images == theirs.num_images and batch.pixel_values.shape == (0, 3, SIZE, SIZE)
        torch.testing.assert_close(batch.features, encode(theirs.pixel_values), rtol=1e-5, atol=1e-5)
        assert torch.equal(batch.input_ids, theirs.input_ids) and batch.keys == theirs.keys
    first, again = ([cached[i] for i in range(plan.num_steps)] for _ in range(2))
    assert all(torch.equal(a.features, b.features) for a, b in zip(first, again))
    kept = [key for _, _, _, images, *_ in cached._cache.values() for key, _ in images]
    assert kept and all(isinstance(key, bytes) and len(key) == 32 for key in kept)  # the sample cache holds no features


def test_a_step_of_text_alone_carries_the_shape_of_features(tmp_path, sources, tokenizer):
    plan = make_plan({"text": sources["text"]}, tokenizer)
    batch = PlannedDataset(plan, tokenizer=tokenizer, image_size=SIZE, features=make_store(tmp_path))[0]
    assert batch.features.shape == (0, *SHAPE) and batch.num_images == 0


def test_an_image_that_changed_under_its_old_name_is_encoded_anew(tmp_path, tokenizer):
    folder, store = tmp_path / "shards", make_store(tmp_path / "cache")
    write_source(folder, "caption", 20)
    run_fill(store, make_plan({"caption": folder}, tokenizer))
    with ShardWriter(folder, "train", max_samples=20) as writer:
        for i in range(20):
            record, images = make_record("caption", i)
            writer.write(f"caption-{i:05d}", record, [draw_png(77)] if i == 7 else images)
    plan = make_plan({"caption": folder}, tokenizer)
    with pytest.raises(RuntimeError, match="has lost features"):  # never the old picture's
        every = PlannedDataset(plan, tokenizer=tokenizer, image_size=SIZE, features=store)
        [every[i] for i in range(plan.num_steps)]
    assert run_fill(store, plan)["written"] == 1
    dataset = PlannedDataset(plan, tokenizer=tokenizer, image_size=SIZE, features=store)
    (row,) = [i for i in range(20) if plan.sources[0].index.key(i) == "caption-00007"]
    torch.testing.assert_close(dataset.read(0, row).images[0], encode(SQUARE(draw_png(77)))[0], rtol=1e-5, atol=1e-5)


def test_a_broken_image_is_skipped_as_without_the_cache(tmp_path, tokenizer):
    folder = tmp_path / "shards"
    with ShardWriter(folder, "train") as writer:
        for i in range(30):
            record, images = make_record("caption", i)
            broken = images[0][:-30] if i in (3, 11) else images[0]  # its header is sound: the index takes it
            writer.write(f"caption-{i:05d}", record, [broken])
    plan = make_plan({"caption": folder}, tokenizer, num_steps=8)
    store, lines = make_store(tmp_path / "cache"), []
    assert run_fill(store, plan, say=lines.append)["unreadable"] == 2
    assert "2 cannot be decoded and will be skipped" in lines[-1]
    options = {"tokenizer": tokenizer, "image_size": SIZE, "max_skipped_share": 0.1}
    without, cached = PlannedDataset(plan, **options), PlannedDataset(plan, features=store, **options)
    skipped = [without[i].skipped for i in range(8)]
    assert [cached[i].skipped for i in range(8)] == skipped and len({k for keys in skipped for k in keys}) == 2
    assert run_fill(make_store(tmp_path / "cache"), plan)["written"] == 0


def test_features_that_were_lost_stop_the_run_and_come_back_with_the_same_command(tmp_path, sources, tokenizer):
    plan = make_plan({"chat": sources["chat"]}, tokenizer)
    store = make_store(tmp_path)
    run_fill(store, plan)
    for chunk in store.folder.glob("*.safetensors"):
        chunk.unlink()
    with pytest.raises(RuntimeError, match="lost features"):
        PlannedDataset(plan, tokenizer=tokenizer, image_size=SIZE, features=make_store(tmp_path))[0]
    assert run_fill(make_store(tmp_path), plan)["written"] == len(planned_keys(plan))


@pytest.mark.parametrize("damage", ["one bit", "the end"])
def test_features_that_were_damaged_are_never_used_and_come_back_with_the_same_command(
    damage, tmp_path, sources, tokenizer
):
    plan = make_plan({"chat": sources["chat"]}, tokenizer)
    store = make_store(tmp_path)
    run_fill(store, plan)
    (chunk,) = store.folder.glob("*.safetensors")
    whole, opened = chunk.read_bytes(), make_store(tmp_path)
    opened.refresh()
    at = whole.index(opened.read(next(iter(opened.keys()))).numpy().tobytes())
    changed = bytearray(whole)
    changed[at + 5] ^= 1
    chunk.write_bytes(changed if damage == "one bit" else whole[: at + 5])
    dataset = PlannedDataset(plan, tokenizer=tokenizer, image_size=SIZE, features=opened)
    with pytest.raises(RuntimeError, match="has lost features .* was damaged and is deleted"):
        [dataset[i] for i in range(len(dataset))]
    assert run_fill(make_store(tmp_path), plan)["written"] == len(planned_keys(plan))
    assert chunk.read_bytes() == whole


def test_too_full_a_disk_is_refused_before_the_first_byte(tmp_path, sources, tokenizer, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 5000))
    lines = []
    with pytest.raises(ValueError, match=r"stages\.x\.cache_features=true would write 0\.00 GB .* 0\.00 GB are free"):
        run_fill(make_store(tmp_path), make_plan(sources, tokenizer), say=lines.append)
    assert "GB to" in lines[-1] and not list(tmp_path.rglob("*.safetensors"))


CHILD = """
import os, resource, signal, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
import test_features as t
from fastvlm.data import feature_pass
from fastvlm.data.features import FeatureWriter
from fastvlm.tokens import Tokenizer
plan = t.make_plan({{"caption": Path({folder!r})}}, Tokenizer({tokenizer!r}, template="roles"), num_steps=20)
feature_pass.FeatureWriter = lambda store: FeatureWriter(store, chunk_bytes=1)  # every batch is a chunk
calls = 0
def encode(pixels, is_tile=None):
    global calls
    calls += 1
    {then}
    return t.encode(pixels)
about = t.run_fill(t.make_store(Path({root_of_store!r})), plan, encode=encode, say=lambda line: print(line, flush=True))
print("WRITTEN", about["written"])
"""


@pytest.fixture
def child(tmp_path, sources, tokenizer):
    """Start a pass in a process of its own; `then` runs in each call of the encoder."""

    def start(then: str = "pass", before: str = "") -> subprocess.Popen:
        here = Path(__file__).resolve().parent
        code = before + CHILD.format(
            tests=str(here),
            root=str(here.parent.parent),
            folder=str(sources["caption"]),
            tokenizer=tokenizer.path,
            root_of_store=str(tmp_path / "cache"),
            then=then,
        )
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True)

    return start


def test_a_pass_killed_in_the_middle_goes_on_where_it_was(tmp_path, sources, tokenizer, child):
    plan = make_plan({"caption": sources["caption"]}, tokenizer, num_steps=20)
    total = len(planned_keys(plan))
    killed = child("if calls == 5: os.kill(os.getpid(), signal.SIGKILL)")
    killed.communicate(timeout=250)
    assert killed.returncode == -signal.SIGKILL
    there = make_store(tmp_path / "cache")
    there.refresh()
    assert len(there) == 32 < total  # four batches of eight
    out, err = child().communicate(timeout=250)
    assert f"{total:,} distinct, 32 in the cache" in out and f"WRITTEN {total - 32}" in out, err
    for chunk in there.folder.glob("*.safetensors"):
        assert torch.isfinite(load_file(chunk)["features"]).all()
    there.refresh()
    assert there.keys() == planned_keys(plan)


def test_two_passes_at_once_write_every_image_once(tmp_path, sources, tokenizer, child):
    both = [child("import time; time.sleep(0.1)") for _ in range(2)]
    outs = [process.communicate(timeout=250) for process in both]
    written = sorted(int(out.split("WRITTEN ")[1]) for out, _ in outs)
    total = len(planned_keys(make_plan({"caption": sources["caption"]}, tokenizer, num_steps=20)))
    assert written == [0, total], outs
    keys = [load_file(chunk)["keys"] for chunk in (tmp_path / "cache").glob("*/*.safetensors")]
    assert sum(map(len, keys)) == total


def test_a_disk_that_fills_up_while_writing_ends_in_one_line_and_leaves_no_half_chunk(tmp_path, child):
    # The kernel refuses the write as it does on a full disk, at a size of our choice.
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    process = child("resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500)) if calls == 3 else None", before=limit)
    out, err = process.communicate(timeout=250)
    assert process.returncode == 1 and "features cannot be written" in err.splitlines()[-1], err
    (folder,) = (p for p in (tmp_path / "cache").iterdir())
    assert len(list(folder.glob("*.safetensors"))) == 2 and not list(folder.glob(".*.part"))


def test_ranks_write_shares_that_together_are_everything(tmp_path, sources, tokenizer):
    """Two ranks in two threads, with a real exchange between them."""
    import threading
    from queue import Queue

    plans = [make_plan({k: sources[k] for k in ("caption", "pages")}, tokenizer) for _ in range(2)]
    inboxes, results = [Queue(), Queue()], [None, None]

    def rank(number):
        def gather(value):
            inboxes[1 - number].put(value)
            other = inboxes[number].get(timeout=60)
            return [value, other] if number == 0 else [other, value]

        store = make_store(tmp_path)
        results[number] = run_fill(store, plans[number], rank=number, world_size=2, gather=gather)

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(2)]
    [t.start() for t in threads], [t.join(100) for t in threads]
    total = len(planned_keys(plans[0]))
    assert results[0]["written"] == results[1]["written"] == total
    sizes = [len(load_file(chunk)["keys"]) for chunk in tmp_path.glob("*/*.safetensors")]
    assert len(sizes) == 2 and sum(sizes) == total and abs(sizes[0] - sizes[1]) <= 1


def test_the_command_lists_stores_and_deletes_one(tmp_path, sources, tokenizer):
    root = tmp_path / "features"
    one, two = make_store(root, weights="a"), make_store(root, weights="b")
    for store in (one, two):
        run_fill(store, make_plan({"caption": sources["caption"]}, tokenizer))
    env = os.environ | {"FASTVLM_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "fastvlm.data.features"]
    done = subprocess.run([*command, f"delete={one.key[:8]}"], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("GB") == 2, done.stderr
    assert not one.folder.exists() and two.folder.exists()
    assert json.loads((two.folder / "store.json").read_text())["weights"] == "b"


def test_the_data_module_keys_by_size_and_fit_and_hands_the_store_to_its_loaders(
    tmp_path, sources, tokenizer, monkeypatch
):
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path))
    mixture = Mixture({"chat": Source("chat", path=sources["chat"])}, weights={"chat": 1}, unit="samples")
    keys = set()
    for size, fit, weights in ((8, "pad", "a"), (16, "pad", "a"), (8, "crop", "a"), (8, "pad", "b"), (8, "pad", "a")):
        options = {"image_size": size, "transform": ImageTransform(image_size=size, fit=fit)}
        data = MixtureDataModule(mixture, tokenizer=tokenizer, num_steps=2, val_samples=4, **options, **BUDGET)
        data.setup()
        about = data.write_features(
            lambda pixels, is_tile: encode(pixels[..., :SIZE, :SIZE]),
            description={"weights": weights},
            shape=SHAPE,
            dtype=torch.float32,
            batch_size=8,
            where="stages.x.cache_features",
        )
        keys.add(about["key"])
        for loader in (data.train_dataloader(), data.val_dataloader()):
            assert all(batch.features.shape[1:] == SHAPE and len(batch.features) for batch in loader)
    assert len(keys) == 4 and about["written"] == 0


def test_all_views_of_a_tiled_image_are_stored_and_lie_in_their_slots(tmp_path, tokenizer):
    part, text = {"type": "image"}, {"type": "text", "text": "seven above nine"}
    sizes = [(8, 8), (16, 8), (8, 24), (40, 40), (30, 14)]
    with ShardWriter(tmp_path / "shards", "train") as writer:
        for i, size in enumerate(sizes):
            images = [draw_png(i, size), draw_png(100 + i, (9, 9))]
            writer.write(f"s-{i}", {"document": [part, text, part, text]}, images)
    transform = ImageTransform(image_size=SIZE, tiles=[[1, 2], [2, 1], [2, 2]])
    sources = {"one": Source("one", path=tmp_path / "shards")}
    mixture = Mixture(sources, weights={"one": 1}, unit="samples")
    plan = Plan(
        mixture, tokenizer, num_steps=3, transform=transform, **(BUDGET | {"max_images": 16, "max_tokens": 200})
    )
    store = make_store(tmp_path)
    run_fill(store, plan, transform=transform)
    options = {"tokenizer": tokenizer, "image_size": SIZE, "transform": transform}
    plain, cached = PlannedDataset(plan, **options), PlannedDataset(plan, features=store, **options)
    for _ in range(2):  # the second time from the sample cache
        for i in range(3):
            assert plain[i].num_images > len(plain[i].keys) * 2  # some have tiles
            torch.testing.assert_close(cached[i].features, encode(plain[i].pixel_values), rtol=1e-5, atol=1e-5)


def test_augmented_images_are_refused_with_the_key(tmp_path, sources, tokenizer, monkeypatch):
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path))
    source = Source("chat", path=sources["chat"], augment=["jitter"])
    mixture = Mixture({"chat": source}, weights={"chat": 1}, unit="samples")
    transform = ImageTransform(image_size=SIZE, augment=Augmentation(jitter=0.5))
    data = MixtureDataModule(
        mixture, tokenizer=tokenizer, image_size=SIZE, num_steps=2, transform=transform, val_samples=0, **BUDGET
    )
    data.setup()
    with pytest.raises(ValueError, match=r"^stages\.x\.cache_features=true, but augmentation \(jitter\)"):
        data.write_features(
            encode, description={}, shape=SHAPE, dtype=torch.float32, batch_size=8, where="stages.x.cache_features"
        )
    assert not list(tmp_path.rglob("*.safetensors"))
