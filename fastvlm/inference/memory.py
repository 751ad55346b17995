"""Caches kept between questions, each limited in bytes: decoded images, visual tokens, keys and values of prompts."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from fastvlm.inference.kv_cache import num_bytes

MIN_PREFIX = 4  # with fewer positions, a look-up costs as much as computing them


def image_key(views: UInt8[Tensor, "*v 3 H W"]) -> bytes:
    """Return a hash of the pixels the encoder sees and of the layout of the views."""
    if (known := getattr(views, "image_key", None)) is not None:  # computed by `FileStore`
        return known
    pixels = views.movedim(-3, -1).contiguous().cpu().numpy()  # decoders write channels last: usually no copy
    shape = repr((pixels.shape, getattr(views, "view_layout", None)))
    return hashlib.blake2b(shape.encode() + pixels.tobytes(), digest_size=16).digest()


class BoundedStore:
    """A thread-safe LRU cache limited in bytes; an entry larger than the limit is not kept.

    Args:
        max_bytes: limit on the total size of the entries; 0 keeps nothing.

    Raises:
        ValueError: `max_bytes` is negative.
    """

    def __init__(self, max_bytes: int):
        if max_bytes < 0:
            raise ValueError(f"a cache of {max_bytes} bytes is negative; 0 turns it off")
        self.max_bytes, self.num_bytes = max_bytes, 0
        self.hits = self.misses = 0
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Any | None:
        with self._lock:
            entry = self._entries.get(key)
            self.hits, self.misses = self.hits + (entry is not None), self.misses + (entry is None)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry[0]

    def put(self, key: Hashable, value: Any, *, size: int) -> None:
        with self._lock:
            if key in self._entries:
                self.num_bytes -= self._entries.pop(key)[1]
            if size > self.max_bytes:
                return
            self._entries[key] = (value, size)
            self.num_bytes += size
            while self.num_bytes > self.max_bytes:
                self.num_bytes -= self._entries.popitem(last=False)[1][1]

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self.num_bytes = 0

    def keys(self) -> list[Hashable]:
        with self._lock:
            return list(self._entries)


class ImageStore(BoundedStore):
    """Visual tokens (T, D) by image key."""

    def keep(self, key: bytes, tokens: Tensor) -> None:
        # A slice of a batch would keep the whole batch alive.
        tokens = tokens.clone() if tokens.untyped_storage().nbytes() > tokens.nbytes else tokens
        self.put(key, tokens, size=tokens.nbytes)


class FileStore(BoundedStore):
    """Views of image files by a hash of the file, so that an image used again is not decoded and resized again."""

    def read(self, data: bytes, transform: Callable[[bytes], Tensor]) -> Tensor:
        """Return the views of a file. They are shared: do not modify them in place."""
        if not self.max_bytes:
            return transform(data)
        key = hashlib.blake2b(data, digest_size=16).digest()
        views = self.get(key)
        if views is None:
            views = transform(data)
            views.image_key = image_key(views)
            self.put(key, views, size=views.nbytes)
        return views


@dataclass(frozen=True)
class Prefix:
    """Keys and values of a row's first `length` positions."""

    length: int
    layers: list[tuple[Tensor, Tensor]]


class PrefixStore(BoundedStore):
    """Keys and values of finished rows, looked up by the longest prefix they share with a new prompt.

    A row's key is one number per position: the id of a text token, or for an image's slots a hash of its pixels
    (`position_names`). So the next turn of a conversation, another question about the same image, and a common system
    prompt reuse what was computed before. Of a row larger than the limit, as many leading positions are kept as fit;
    attention is causal, so they do not depend on later ones.
    """

    max_positions: int | None = None  # of one row; known once a row was kept

    def keep(self, names: np.ndarray, layers: list[tuple[Tensor, Tensor]]) -> None:
        most = self.max_positions = self.max_bytes * len(names) // num_bytes(layers)
        if most < MIN_PREFIX:
            return
        if len(names) > most:
            names = names[:most]
            layers = [(keys[:, :, :most].clone(), values[:, :, :most].clone()) for keys, values in layers]
        for other in self.keys():
            held = np.frombuffer(other, dtype=np.int64)
            both = min(len(held), len(names))
            if np.array_equal(held[:both], names[:both]):
                if len(held) >= len(names):
                    return  # `find` used this entry just now, so it is not the next to be evicted
                self._drop(other)  # a prefix of the new row, e.g. an earlier turn of the conversation
        self.put(names.tobytes(), layers, size=num_bytes(layers))

    def find(self, names: np.ndarray) -> Prefix | None:
        """Return the longest stored prefix of a prompt, or None; never its last position, whose output is needed."""
        best, length = None, MIN_PREFIX - 1
        for key in self.keys():
            held = np.frombuffer(key, dtype=np.int64)
            most = min(len(held), len(names) - 1)
            if most > length:
                differ = np.flatnonzero(held[:most] != names[:most])
                shared = int(differ[0]) if len(differ) else most
                if shared > length:
                    best, length = key, shared
        layers = self.get(best) if best is not None else None
        if layers is None:
            return None
        return Prefix(length, [(keys[:, :, :length], values[:, :, :length]) for keys, values in layers])

    def _drop(self, key: Hashable) -> None:
        with self._lock:
            if key in self._entries:
                self.num_bytes -= self._entries.pop(key)[1]


def position_names(
    input_ids: Sequence[int], *, image_token_id: int, images: Sequence[bytes], slots: Sequence[int]
) -> np.ndarray:
    """Return one int64 per position: the id of a text token, or a negative hash of the image for its slots."""
    names = np.array(input_ids, dtype=np.int64)
    named = [-1 - (int.from_bytes(key[:8], "big") >> 1) for key in images]
    names[names == image_token_id] = np.repeat(np.array(named, dtype=np.int64), slots)
    return names
