"""Memory for batches that is reused as soon as nothing refers to a batch any more.

Every fresh page costs the kernel a page fault and zeroing: for the pixels of a batch, a tenth of the time of decoding
them; in shared memory, a quarter. A room is a block of memory lent to one batch at a time. It is free again when the
last tensor in it is gone, wherever the batch went; while all are lent, batches get fresh memory as usual.
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
# Reserve no swap: rooms fit the largest batch, and most are never full. Python has the constant from 3.13 on.
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_numbers = itertools.count()
_rooms: weakref.WeakValueDictionary[int, Rooms] = weakref.WeakValueDictionary()


def share_memory(num_bytes: int) -> np.ndarray:
    """Return bytes that are shared with processes forked afterwards."""
    return np.frombuffer(mmap.mmap(-1, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | NORESERVE), np.uint8)


class Rooms:
    """Rooms of one size, shared with processes forked afterwards.

    Args:
        num_bytes: size of a room; memory is allocated when it is first written to.
        processes: number of processes that read batches.
        each: rooms per process.
    """

    def __init__(self, *, num_bytes: int, processes: int = 1, each: int = 4):
        self.num_bytes, self.each = -(-max(1, num_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE, each
        self._memory = share_memory(self.num_bytes * each * processes)
        self._taken = share_memory(each * processes)
        self._lock = threading.Lock()
        self.number = next(_numbers)
        _rooms[self.number] = self

    def take(self, process: int = 0) -> int | None:
        """Take a free room of this process and return its number; None if there is none."""
        with self._lock:
            for number in range(process * self.each, (process + 1) * self.each):
                if not self._taken[number]:
                    self._taken[number] = True
                    return number
        return None

    def free(self, number: int) -> None:
        self._taken[number] = False

    def open(self, number: int, *, lent: bool) -> UInt8[Tensor, " bytes"]:
        """Return the memory of a room.

        Args:
            lent: free the room when the last tensor in it is gone.
        """
        memory = self._memory[number * self.num_bytes : (number + 1) * self.num_bytes]
        if lent:
            # The tensor's storage refers to this very array, which therefore dies with the last view of the tensor.
            weakref.finalize(memory, self.free, number).atexit = False
        return torch.from_numpy(memory)


class Handed:
    """A batch in a room, handed from a worker to its parent process, where it is unpickled as a Batch.

    Pixels and tokens are not copied: only their places in the room are sent.
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
    """Rebuild a handed batch in the process that unpickles it."""
    room = _rooms[rooms].open(number, lent=True)
    tensors = {name: place(room, *where) for name, where in places.items()}
    tensors["pixel_values"] = tensors["pixel_values"].permute(0, 3, 1, 2)
    return Batch(**rest, **tensors)


def place(room: UInt8[Tensor, " bytes"], start: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return the tensor at byte `start` of a room."""
    return room[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
