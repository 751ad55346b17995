from __future__ import annotations

import errno
import gc
import itertools

import pytest
import torch

from fastvlm.data.datamodule import MixtureDataModule
from fastvlm.data.dataset import PlannedDataset
from fastvlm.data.rooms import Rooms
from fastvlm.data.source import Mixture, Source

TENSORS = ("input_ids", "labels", "position_ids", "segment_ids", "source_ids", "pixel_values")


@pytest.fixture(scope="module")
def loader_of(sources, tokenizer):
    plans = []

    def make(num_workers=0):
        mixture = {name: Source(name, path=sources[name]) for name in ("caption", "pages", "text")}
        module = MixtureDataModule(
            Mixture(mixture, weights=None, unit="samples"),
            tokenizer=tokenizer,
            image_size=8,
            tokens_per_image=4,
            batch_size=4,
            max_tokens=64,
            num_steps=12,
            num_workers=num_workers,
            val_samples=0,
            cache_bytes=0,
        )
        module.plan = plans[0] if plans else None
        module.setup()
        plans.append(module.plan)
        return module.train_dataloader()

    return make


def equal(batch, other):
    assert all(torch.equal(getattr(batch, name), getattr(other, name)) for name in TENSORS)
    assert (batch.keys, batch.sources, batch.skipped, batch.step) == (other.keys, other.sources, (), other.step)
    assert batch.pixel_values.permute(0, 2, 3, 1).is_contiguous()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_in_rooms_equal_those_in_fresh_memory_and_keep_while_anything_refers_to_them(loader_of, num_workers):
    loader = loader_of(num_workers)
    dataset, taken = loader.dataset, loader.dataset._rooms._taken
    plain = PlannedDataset(dataset.plan, tokenizer=dataset.tokenizer, image_size=8)
    kept, copies = [], []
    for number, batch in enumerate(loader):
        equal(batch, plain[number])
        if number % 5 == 0:  # one view of a tensor is enough to keep all of it
            kept.append((batch.pixel_values[1:, :, 2:], batch.labels[0]))
            copies.append([tensor.clone() for tensor in kept[-1]])
    for tensors, then in zip(kept, copies):
        assert all(torch.equal(a, b) for a, b in zip(tensors, then))
    del batch
    gc.collect()
    if not num_workers:
        assert 0 < taken.sum() <= len(kept), "what nobody refers to any more is free"
    del kept, tensors
    gc.collect()
    assert taken.sum() == 0


def test_the_same_memory_comes_round(loader_of):
    for loader in (loader_of(), loader_of(1)):
        places = {batch.pixel_values.data_ptr() for batch in loader}
        assert len(places) <= loader.dataset._rooms.each < len(loader)


def test_without_a_free_room_batches_come_in_fresh_memory(loader_of):
    loader = loader_of(1)
    plain = PlannedDataset(loader.dataset.plan, tokenizer=loader.dataset.tokenizer, image_size=8)
    held = list(loader)
    assert loader.dataset._rooms._taken.sum() == loader.dataset._rooms.each < len(held)
    for number, batch in enumerate(held):
        equal(batch, plain[number])


def test_a_batch_read_beside_the_workers_takes_none_of_their_rooms(loader_of):
    loader = loader_of(1)
    rooms, plain = loader.dataset._rooms, loader.dataset[0]
    held = list(loader)
    assert rooms._taken.sum() == 1 + rooms.each < len(held)
    equal(held[0], plain)


def test_where_no_memory_is_promised_batches_come_in_fresh_memory(loader_of, monkeypatch):
    def refuse(num_bytes):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("fastvlm.data.rooms.share_memory", refuse)
    loader = loader_of(1)
    assert loader.dataset._rooms is None
    plain = PlannedDataset(loader.dataset.plan, tokenizer=loader.dataset.tokenizer, image_size=8)
    for number, batch in enumerate(loader):
        equal(batch, plain[number])


def test_a_batch_that_fails_gives_its_room_back(loader_of, monkeypatch):
    """In the process that reads, and where the other side sees an error in place of the batch."""
    for loader in (loader_of(), loader_of(1)):
        read = PlannedDataset._read_rows

        def fail(dataset, rows, room, *, step, read=read, **options):
            if step % 2:
                raise ValueError(f"step {step} cannot be read")
            return read(dataset, rows, room, step=step, **options)

        monkeypatch.setattr(PlannedDataset, "_read_rows", fail)
        batches, errors, iterator = 0, 0, iter(loader)
        for _ in range(len(loader)):
            try:
                batch = next(iterator)
                batches += batch.pixel_values.shape[0] > 0
            except ValueError as error:
                assert "cannot be read" in str(error)
                errors += 1
                if not loader.num_workers:  # torch's iterator in one process ends here
                    iterator = iter(loader.__class__(loader.dataset, sampler=range(errors * 2, 12), batch_size=None))
        assert batches and errors == 6
        batch = iterator = None
        gc.collect()
        assert loader.dataset._rooms._taken.sum() == 0
        monkeypatch.undo()


def test_a_room_is_lent_once():
    rooms = Rooms(num_bytes=10, processes=2, each=3)
    taken = [rooms.take(process) for process in (1, 1, 0, 1, 1)]
    assert taken == [3, 4, 0, 5, None]
    one, other = (rooms.open(number, lent=True) for number in taken[:2])
    one.fill_(1), other.fill_(2)
    part = one[3:7].view(2, 2)
    del one, other
    assert rooms.take(1) == 4 and rooms.take(1) is None and part.tolist() == [[1, 1], [1, 1]]
    del part
    assert rooms.take(1) == 3


def test_rooms_take_no_memory_before_they_are_written_to():
    rooms = Rooms(num_bytes=1 << 34, each=8)  # more than there is
    assert [rooms.open(n, lent=False)[-1].item() for n in itertools.takewhile(lambda n: n is not None, [0, 7])] == [
        0,
        0,
    ]
