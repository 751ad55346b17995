"""Memory that batches are read into, and that is used again as soon as nobody refers to a batch any more.

Every fresh page costs the kernel a fault and a wipe: for the pixels of a batch that takes a tenth as long as decoding
them, shared between processes a quarter. A room is lent to one batch at a time. It comes back when the last tensor that
lies in it is gone, wherever the batch went; while all are lent, batches get fresh memory as usual.
"""

from __future__ import annotations

import itertools
import math
import mmap
import sys
import threading
import weakref
from dataclasses import fields

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from fastvlm.batch import Batch

ALIGNED = 64  # bytes
# Reserves nothing: rooms are sized for the largest batch, and most are never full. Python names it from 3.13 on.
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_numbers = itertools.count()
_rooms: weakref.WeakValueDictionary[int, Rooms] = weakref.WeakValueDictionary()


def share_memory(num_bytes: int) -> np.ndarray:
    """Bytes that processes forked afterwards see too."""
    return np.frombuffer(mmap.mmap(-1, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | NORESERVE), np.uint8)


class Rooms:
    """Rooms of one size, shared with the processes that are forked afterwards.

    Args:
        num_bytes: of a room; memory is taken where it is written to, not before.
        processes: that read batches.
        each: rooms of a process.
    """

    def __init__(self, *, num_bytes: int, processes: int = 1, each: int = 4):
        self.num_bytes, self.each = -(-max(1, num_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE, each
        self._memory = share_memory(self.num_bytes * each * processes)
        self._taken = share_memory(each * processes)
        self._lock = threading.Lock()
        self.number = next(_numbers)
        _rooms[self.number] = self

    def take(self, process: int = 0) -> int | None:
        """Number of a free room of this process, no longer free; None where there is none."""
        with self._lock:
            for number in range(process * self.each, (process + 1) * self.each):
                if not self._taken[number]:
                    self._taken[number] = True
                    return number
        return None

    def free(self, number: int) -> None:
        self._taken[number] = False

    def open(self, number: int, *, lent: bool) -> UInt8[Tensor, " bytes"]:
        """The room.

        Args:
            lent: it is free again when the last tensor that lies in it is gone.
        """
        memory = self._memory[number * self.num_bytes : (number + 1) * self.num_bytes]
        if lent:
            # The tensor's storage holds this very array, so that it dies with the last view of it.
            weakref.finalize(memory, self.free, number).atexit = False
        return torch.from_numpy(memory)


class Handed:
    """A batch in a room on its way from the process that read it to the one that forked it, where it is a Batch again.

    Of pixels and tokens only their places travel.
    """

    def __init__(self, batch: Batch, *, rooms: Rooms, number: int):
        self.rooms, self.number = rooms, number
        self.places: dict[str, tuple[int, torch.Size, torch.dtype]] = {}
        self.rest = {f.name: getattr(batch, f.name) for f in fields(batch)}
        room, end = rooms.open(number, lent=False), batch.pixel_values.numel()
        self.places["pixel_values"] = (0, batch.pixel_values.permute(0, 2, 3, 1).shape, torch.uint8)
        del self.rest["pixel_values"]
        for name, value in list(self.rest.items()):
            start = -(-end // ALIGNED) * ALIGNED
            if isinstance(value, Tensor) and start + value.nbytes <= len(room):
                end = start + value.nbytes
                place(room, start, value.shape, value.dtype).copy_(value)
                self.places[name] = (start, value.shape, value.dtype)
                del self.rest[name]

    def __reduce__(self) -> tuple:
        return take_over, (self.rooms.number, self.number, self.places, self.rest)


def take_over(rooms: int, number: int, places: dict[str, tuple[int, torch.Size, torch.dtype]], rest: dict) -> Batch:
    room = _rooms[rooms].open(number, lent=True)
    tensors = {name: place(room, *where) for name, where in places.items()}
    tensors["pixel_values"] = tensors["pixel_values"].permute(0, 3, 1, 2)
    return Batch(**rest, **tensors)


def place(room: UInt8[Tensor, " bytes"], start: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return room[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
