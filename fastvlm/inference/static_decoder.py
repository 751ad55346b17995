"""Decode single tokens with CUDA graphs, which replay all kernels of a token as one launch.

On a GPU, launching the kernels of a token, some twenty per layer, takes longer than running them in a small model. A
graph reads from the addresses it was captured with, so keys and values, mask and positions are in fixed buffers.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastvlm.inference.fast_decoder import FastDecoder, norm
from fastvlm.inference.kv_cache import KVCache

COLUMNS = 256  # cache capacities are multiples of this; each has a graph of its own
KEPT = 4  # graphs kept, each with its key and value buffers


class StaticStep:
    """One decoding step for `rows` rows with room for `capacity` columns.

    Args:
        like: input embeddings, which give width, dtype and device.
    """

    def __init__(self, decoder: FastDecoder, *, rows: int, capacity: int, like: Tensor):
        self.decoder = decoder
        place = {"device": like.device, "dtype": like.dtype}
        self.embeds = torch.zeros(rows, 1, like.shape[-1], **place)
        self.positions = torch.zeros(rows, 1, dtype=torch.long, device=like.device)
        self.column = torch.zeros(1, dtype=torch.long, device=like.device)
        self.mask = torch.zeros(rows, 1, 1, capacity, dtype=torch.bool, device=like.device)
        shape = (rows, decoder.kv_heads, capacity, decoder.dim)
        layers = range(len(decoder.decoder.layers))
        self.rooms = [(torch.zeros(shape, **place), torch.zeros(shape, **place)) for _ in layers]
        self.tables = decoder.rotation_tables(capacity, like)
        self.hidden: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._holder: weakref.ref | None = None  # the cache whose columns are in `rooms`

    def __call__(self, embeds: Tensor, positions: Tensor, mask: Tensor | None, cache: KVCache) -> Tensor:
        used = cache.get_seq_length()
        self._take(cache)
        self.embeds.copy_(embeds)
        self.positions.copy_(positions)
        self.column.fill_(used)
        self.mask.zero_()
        self.mask[..., : used + 1] = True if mask is None else mask.bool()[:, None, None]
        self.mask[..., used] = True  # padding attends to itself: a fully masked row would give NaN
        if self.embeds.is_cuda:
            if self._graph is None:
                self._capture()
            self._graph.replay()
        else:
            self.hidden = self._compute()
        for layer, room in zip(cache.layers, self.rooms):
            layer.grow_into(room, used + 1)
        return self.hidden.clone()

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Write a token's keys and values and return those of all columns, like `Cache.update`."""
        for room, new in zip(self.rooms[layer], (keys, values)):
            room.index_copy_(2, self.column, new)
        return self.rooms[layer]

    def _compute(self) -> Tensor:
        cos, sin = (table[self.positions][:, None] for table in self.tables)
        x, layers = self.embeds, self.decoder.decoder.layers
        for i, layer in enumerate(layers):
            x = self.decoder.layer(layer, x, cos, sin, self.mask, None, self, i, last=i == len(layers) - 1)
        return norm(self.decoder.decoder.norm, x)

    def _capture(self) -> None:
        """Warm up on a side stream, because libraries allocate on first use, then record the graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._compute()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.hidden = self._compute()

    def _take(self, cache: KVCache) -> None:
        """Move the cache into this step's buffers; a cache that used them before continues with a copy."""
        if all(layer.stands_in(room) for layer, room in zip(cache.layers, self.rooms)):
            return
        former = self._holder and self._holder()
        if former is not None and former is not cache:
            for layer, room in zip(former.layers, self.rooms):
                if layer.stands_in(room):
                    layer.hold(layer.keys.clone(), layer.values.clone())
        used = cache.get_seq_length()
        for layer, room in zip(cache.layers, self.rooms):
            for fixed, held in zip(room, (layer.keys, layer.values)):
                fixed[:, :, :used] = held
            layer.grow_into(room, used)
        self._holder = weakref.ref(cache)


class StaticDecoder:
    """A `FastDecoder` that runs single tokens through `StaticStep`; prompts are passed to the decoder unchanged.

    Args:
        decoder: its weights must not move in memory once the first token was decoded.
    """

    def __init__(self, decoder: FastDecoder):
        self.decoder = decoder
        self._steps: OrderedDict[tuple, StaticStep] = OrderedDict()

    def decode(
        self,
        inputs_embeds: Float[Tensor, "B S D"],
        position_ids: Int[Tensor, "B S"],
        attention_mask: Int[Tensor, "B K"] | None,
        cache: KVCache,
    ) -> tuple[Float[Tensor, "B 1 D"], KVCache]:
        """See `FastDecoder.decode`."""
        used = cache.get_seq_length()
        if inputs_embeds.shape[1] > 1 or not used:
            return self.decoder.decode(inputs_embeds, position_ids, attention_mask, cache)
        rows, capacity = len(inputs_embeds), -(-(used + 1) // COLUMNS) * COLUMNS
        key = (rows, capacity, inputs_embeds.dtype)
        if key not in self._steps:
            self._steps[key] = StaticStep(self.decoder, rows=rows, capacity=capacity, like=inputs_embeds)
        self._steps.move_to_end(key)
        while len(self._steps) > KEPT:
            self._steps.popitem(last=False)
        return self._steps[key](inputs_embeds, position_ids, attention_mask, cache), cache
