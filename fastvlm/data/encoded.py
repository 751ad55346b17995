"""An image file as it lies in a shard."""

from __future__ import annotations

EncodedImage = bytes | memoryview  # a view spares a copy of it out of what was read
