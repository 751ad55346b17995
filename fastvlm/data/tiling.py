"""Any-resolution tiling: which grid of tiles an image is cut into, as a function of its size alone.

An image becomes a global view followed by the tiles of one grid, row by row. The grid is the one that LLaVA-NeXT's
`select_best_resolution` chooses (arXiv 2310.03744, section 3.4): it keeps as many of the image's pixels as possible
and, among equals, wastes the fewest of its own. The grid 1 x 1 has no tiles: its only one would be the global view.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CHUNK = 1 << 18  # images at a time: a plan asks for millions


def check_grids(tiles: Sequence[Sequence[int]], *, key: str = "image.tiles") -> tuple[tuple[int, int], ...]:
    """Return `[[rows, columns], ...]` as tuples.

    Raises:
        ValueError: empty, or an entry that is not a pair of positive integers.
    """
    for entry in tiles:
        pair = list(entry) if isinstance(entry, Sequence) and not isinstance(entry, str) else [entry]
        if len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in pair):
            raise ValueError(f"{key}: {entry} is not a pair [rows, columns] of positive integers, such as [2, 2]")
    if not len(tiles):
        raise ValueError(f"{key} is empty; name grids such as [[1, 2], [2, 1], [2, 2]], or null for no tiles")
    return tuple((int(rows), int(columns)) for rows, columns in tiles)


def choose_grids(
    widths: np.ndarray, heights: np.ndarray, *, image_size: int, grids: Sequence[tuple[int, int]]
) -> np.ndarray:
    """Return the number of the best grid for every image: int64 (images,).

    Args:
        widths, heights: of the upright images (EXIF orientation applied), pixels.
        image_size: side of a tile, pixels.
        grids: (rows, columns) of each; ties go to the earlier one.
    """
    tall, wide = (np.array(side, dtype=np.int64) * image_size for side in zip(*grids))
    best = np.empty(len(widths), dtype=np.int64)
    for start in range(0, len(widths), CHUNK):
        width = np.asarray(widths[start : start + CHUNK], dtype=np.int64)[:, None]
        height = np.asarray(heights[start : start + CHUNK], dtype=np.int64)[:, None]
        scale = np.minimum(wide / width, tall / height)  # (images, grids)
        shown = np.minimum((width * scale).astype(np.int64) * (height * scale).astype(np.int64), width * height)
        # One number for both criteria: most pixels shown, then the smallest grid (waste = its area - shown).
        best[start : start + CHUNK] = (shown * 2**32 - tall * wide).argmax(axis=1)
    return best
