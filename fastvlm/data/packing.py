"""Packing: samples of a window into rows under a token and an image budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pack_window(lengths: Sequence[int], images: Sequence[int], *, max_tokens: int, max_images: int) -> list[list[int]]:
    """First-fit-decreasing, the packs in the order in which their samples arrived on average.

    Args:
        lengths: tokens of every sample, each at most `max_tokens`.
        images: images of every sample, each at most `max_images`.

    Returns:
        packs of positions in the window; within a pack they ascend.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    shortest = lengths[order[-1]] if order else 0
    packs: list[list[int]] = []
    free: list[list[int]] = []  # [tokens left, images left, pack], open packs in the order they were opened
    for i in order:
        length, count = lengths[i], images[i]
        for k, slot in enumerate(free):
            if slot[0] >= length and slot[1] >= count:
                slot[0] -= length
                slot[1] -= count
                packs[slot[2]].append(i)
                if slot[0] < shortest:
                    del free[k]
                break
        else:
            assert length <= max_tokens and count <= max_images
            if max_tokens - length >= shortest:
                free.append([max_tokens - length, max_images - count, len(packs)])
            packs.append([i])
    for pack in packs:
        pack.sort()
    return sorted(packs, key=lambda pack: sum(pack) / len(pack))


def group_by_length(lengths: Sequence[int], *, group: int) -> list[int]:
    """Order of a window in which neighbours are of like length, for rows that hold one sample and are padded.

    Samples are sorted by length and cut into groups of `group`; the groups stand in the order of their mean arrival.
    """
    order = np.argsort(np.asarray(lengths), kind="stable").tolist()
    groups = [order[i : i + group] for i in range(0, len(order), group)]
    return [i for members in sorted(groups, key=lambda g: sum(g) / len(g)) for i in members]
