"""The key-value cache of a decoding batch: grows in place; rows can be added, removed and copied out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

SPARE = 128  # columns allocated in advance: so many tokens are appended without a copy


class GrowingLayer(DynamicLayer):
    """A cache layer that writes new tokens into spare columns; `DynamicLayer` copies everything for each token."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self._room: tuple[Tensor, Tensor] | None = None
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        used, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if self._room is None or end > self._room[0].shape[2]:
            self._room = tuple(self._enlarged(held, end) for held in (self.keys, self.values))
        for room, new in zip(self._room, (key_states, value_states)):
            room[:, :, used:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self._room)
        return self.keys, self.values

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Replace the cached keys and values."""
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values, self._room = keys, values, None

    def stands_in(self, room: tuple[Tensor, Tensor]) -> bool:
        """Return whether the layer writes new columns into this buffer."""
        return self._room is not None and self._room[0] is room[0]

    def grow_into(self, room: tuple[Tensor, Tensor], used: int) -> None:
        """Continue in this buffer, whose first `used` columns are the cached ones."""
        self._room = room
        self.keys, self.values = (held[:, :, :used] for held in room)

    @staticmethod
    def _enlarged(held: Tensor, length: int) -> Tensor:
        rows, heads, used, dim = held.shape
        room = held.new_empty(rows, heads, max(length + SPARE, length * 5 // 4), dim)
        room[:, :, :used] = held
        return room


class KVCache(DynamicCache):
    """A cache of full-attention layers. Rows are padded on the left, so all of them write the same column."""

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]] = ()):
        Cache.__init__(self, layer_class_to_replicate=GrowingLayer)
        for keys, values in layers:
            layer = GrowingLayer()
            layer.hold(keys, values)
            self.layers.append(layer)

    def select(self, rows: Sequence[int], *, skip: int = 0) -> None:
        """Keep these rows, without the first `skip` columns."""
        index = torch.tensor(list(rows), device=self.layers[0].keys.device)
        for layer in self.layers:
            layer.hold(layer.keys[index, :, skip:], layer.values[index, :, skip:])

    def join(self, other: KVCache) -> None:
        """Append another cache's rows; the shorter cache is padded on the left."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            longest = max(mine.keys.shape[2], theirs.keys.shape[2])
            pairs = ((mine.keys, theirs.keys), (mine.values, theirs.values))
            mine.hold(*(torch.cat([pad_left(held, longest) for held in pair]) for pair in pairs))

    def kept(self, row: int, *, columns: int) -> list[tuple[Tensor, Tensor]]:
        """Return a copy of the last `columns` columns of a row, from which a new `KVCache` can be made."""
        return [
            (layer.keys[row : row + 1, :, -columns:].clone(), layer.values[row : row + 1, :, -columns:].clone())
            for layer in self.layers
        ]


def pad_left(held: Float[Tensor, "B H K d"], length: int) -> Float[Tensor, "B H L d"]:
    """Prepend zero columns up to `length` columns in all; the attention mask hides them."""
    return torch.nn.functional.pad(held, (0, 0, length - held.shape[2], 0))


def num_bytes(layers: Sequence[tuple[Tensor, Tensor]]) -> int:
    return sum(tensor.nbytes for pair in layers for tensor in pair)
