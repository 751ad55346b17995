"""Packing: samples of a window into rows under a token and an image budget."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import chain

import numpy as np


def pack_window(lengths: Sequence[int], images: Sequence[int], *, max_tokens: int, max_images: int) -> list[list[int]]:
    """Rows filled to the brim where that needs fewer of them than first-fit-decreasing and keeps the image budget.

    Samples of like length leave first-fit-decreasing with a gap in every row (3 % on the embedded instructions); the
    sum of a few of them can meet the budget exactly.

    Args:
        lengths: tokens of every sample, each at most `max_tokens`.
        images: images of every sample, each at most `max_images`.

    Returns:
        packs of positions in the window, in the order in which their samples arrived on average; within a pack the
        positions ascend.
    """
    packs = first_fit_decreasing(lengths, images, max_tokens=max_tokens, max_images=max_images)
    if sum(lengths) > (len(packs) - 1) * max_tokens:
        return packs  # one row fewer cannot hold them
    filled = fill_rows(lengths, max_tokens=max_tokens)
    if len(filled) < len(packs) and all(sum(images[i] for i in pack) <= max_images for pack in filled):
        packs = filled
    for pack in packs:
        pack.sort()
    return sorted(packs, key=lambda pack: sum(pack) / len(pack))


def fill_rows(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Row by row the longest sample left, and with it those whose lengths come closest to the budget (subset sum over
    the lengths that are left, as bit sets)."""
    left: dict[int, list[int]] = {}  # length -> positions, the first to arrive last
    for i in range(len(lengths) - 1, -1, -1):
        left.setdefault(lengths[i], []).append(i)
    packs = []
    while left:
        longest = max(left)
        pack, free = [take(left, longest)], max_tokens - longest
        full, mask = 1 << free, (1 << (free + 1)) - 1
        reached, parts = [1], []  # bit n of reached[k]: the first k parts have a subset that sums to n
        for length in sorted(left, reverse=True):
            count, part = min(len(left[length]), free // length), 1
            while count > 0 and not reached[-1] & full:
                part = min(part, count)
                parts.append((length, part))
                reached.append((reached[-1] | reached[-1] << (part * length)) & mask)
                count, part = count - part, part * 2
        total = reached[-1].bit_length() - 1
        for k in range(len(parts), 0, -1):
            if not reached[k - 1] >> total & 1:
                length, part = parts[k - 1]
                pack.extend(take(left, length) for _ in range(part))
                total -= length * part
        packs.append(pack)
    return packs


def take(left: dict[int, list[int]], length: int) -> int:
    position = left[length].pop()
    if not left[length]:
        del left[length]
    return position


def first_fit_decreasing(
    lengths: Sequence[int], images: Sequence[int], *, max_tokens: int, max_images: int
) -> list[list[int]]:
    """First-fit-decreasing, the packs in the order in which their samples arrived on average.

    Args and returns as `pack_window`.
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


def group_by_length(lengths: Sequence[int], *, group: int) -> list[list[int]]:
    """Groups of `group` samples of like length, for rows that hold one sample and are padded; in the order in which
    their samples arrived on average."""
    order = np.argsort(np.asarray(lengths), kind="stable").tolist()
    groups = [order[i : i + group] for i in range(0, len(order), group)]
    return sorted(groups, key=lambda members: sum(members) / len(members))


def balance(
    packs: list[list[int]], *, sources: np.ndarray, costs: np.ndarray, weights: Sequence[Fraction]
) -> list[list[int]]:
    """Reorder the packs of a window so that shares stay close to their targets after every pack.

    Packing gathers samples by length, and sources differ in length, so in any other order the shares drift within a
    window (on the embedded instruction mixture by up to 35 samples' worth, so by 5). Next comes the pack that leaves
    the smallest sum over sources of |served - share|; the earlier one at a tie.

    Args:
        sources: source number of every sample of the window.
        costs: its cost in the mixture's unit.
    """
    # Integers, so that ties are broken alike on every machine.
    scale = 1 << 20
    shares = np.array([round(scale * w) for w in weights], dtype=np.int64)
    served = np.zeros((len(packs), len(weights)), dtype=np.int64)
    pack_of = np.repeat(np.arange(len(packs)), [len(pack) for pack in packs])
    members = np.fromiter(chain.from_iterable(packs), dtype=np.int64, count=len(costs))
    np.add.at(served, (pack_of, sources[members]), costs[members])
    left = served * scale - served.sum(axis=1, keepdims=True) * shares
    numbers, error, order = np.arange(len(packs)), np.zeros(len(weights), dtype=np.int64), []
    while len(numbers):
        k = int(np.abs(left + error).sum(axis=1).argmin())
        order.append(int(numbers[k]))
        error = error + left[k]
        # Close the gap; `np.delete` costs several times this.
        left[k:-1], numbers[k:-1] = left[k + 1 :], numbers[k + 1 :]
        left, numbers = left[:-1], numbers[:-1]
    return [packs[i] for i in order]
