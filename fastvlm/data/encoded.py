"""The type of an encoded image file."""

from __future__ import annotations

EncodedImage = bytes | memoryview  # a memoryview saves copying it out of what was read
