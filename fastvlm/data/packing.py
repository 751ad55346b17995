"""Packing: put the samples of a window into rows, under a token and an image budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import chain

import numpy as np


def pack_window(lengths: Sequence[int], images: Sequence[int], *, max_tokens: int, max_images: int) -> list[list[int]]:
    """Pack samples into rows under both budgets, with the best of up to three methods.

    First, rows are closed by pairs that meet the budget exactly (`close_rows`). If more than one row in a hundred could
    still be saved, best-fit-decreasing is tried; if lengths repeat, subset sum, too (`fill_rows`). Lengths of 114-864
    fill rows of 2,048 to 98.5 % with best-fit-decreasing and to 99.7 % with pairs; those of the embedded instructions
    (40-61, rows of 256) to 93.6 % and 97.7 %, and to 99.4 % with subset sum.

    Args:
        lengths: tokens of every sample, each at most `max_tokens`.
        images: images of every sample, each at most `max_images`.

    Returns:
        Packs of positions in the window, sorted by the mean position of their samples; within a pack, positions ascend.
    """
    budget = {"max_tokens": max_tokens, "max_images": max_images}
    fewest = max(-(-sum(lengths) // max_tokens), -(-sum(images) // max_images))
    packs = close_rows(lengths, images, **budget)
    if len(packs) > max(fewest, 1.01 * sum(lengths) / max_tokens):
        packs = min(packs, best_fit_decreasing(lengths, images, **budget), key=len)
    if len(packs) > fewest and len(set(lengths)) <= 64:
        filled = fill_rows(lengths, max_tokens=max_tokens)
        if len(filled) < len(packs) and all(sum(images[i] for i in pack) <= max_images for pack in filled):
            packs = filled
    for pack in packs:
        pack.sort()
    return sorted(packs, key=lambda pack: sum(pack) / len(pack))


def window_of(lengths: float | int, images: float | int, *, max_tokens: int, max_images: int) -> int:
    """Return the number of samples to pack together: a thousand, or more if those would fill fewer than 100 rows.

    The last row of a window is only partly filled: 1,000 samples of `sft_minimal` make 25 rows of 4,096, and this row
    alone wastes 2 %.

    Args:
        lengths, images: of a sample, on average.
    """
    row = max(lengths / max_tokens, images / max_images)
    return max(1000, math.ceil(100 / row)) if row else 1000


def best_fit_decreasing(
    lengths: Sequence[int], images: Sequence[int], *, max_tokens: int, max_images: int
) -> list[list[int]]:
    """Pack the longest sample first, each into the fullest row with room for it. Args as in `pack_window`."""
    packs: list[list[int]] = []
    room: list[int] = []  # images that each row can still take
    rows: dict[int, list[int]] = {}  # tokens that can still be taken -> rows
    free_bits = 0  # bit n: a row has n tokens left
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    shortest = lengths[order[-1]] if order else 0
    for i in order:
        length, count, pack, free = lengths[i], images[i], -1, 0
        assert length <= max_tokens and count <= max_images
        left = free_bits >> length << length
        while left and pack < 0:
            free = (left & -left).bit_length() - 1
            fitting = rows[free]
            for k in range(len(fitting) - 1, -1, -1):
                if room[fitting[k]] >= count:
                    pack = fitting.pop(k)
                    break
            left &= left - 1
        if pack < 0:
            pack, free = len(packs), max_tokens
            packs.append([])
            room.append(max_images)
        elif not rows[free]:
            free_bits ^= 1 << free
        packs[pack].append(i)
        room[pack] -= count
        free -= length
        if free >= shortest:
            rows.setdefault(free, []).append(pack)
            free_bits |= 1 << free
    return packs


def close_rows(
    lengths: Sequence[int], images: Sequence[int], *, max_tokens: int, max_images: int, tries: int = 48
) -> list[list[int]]:
    """Close rows exactly by their last two samples where possible; the rest is packed best-fit-decreasing.

    A row begins with the longest remaining sample and takes samples near the average of what is still missing, so that
    long and short ones run out together (minimum bin slack, Gupta and Ho, Production Planning & Control 10(6), 1999,
    with the search limited to the last pair). Args as in `pack_window`; tries: candidates for the longer one of the
    pair.
    """
    stock = Stock(lengths, images, max_images)
    packs, open_rows = [], []
    while stock.num:
        pack, free, room = [], max_tokens, max_images
        have = stock.fitting(free, room)
        length = have.bit_length() - 1
        while have:
            i, count = stock.take(length, room)
            pack.append(i)
            free, room = free - length, room - count
            have = stock.fitting(free, room)
            if not have:
                break
            longest, shortest = have.bit_length() - 1, (have & -have).bit_length() - 1
            more = free // shortest  # samples that could still come
            if more == 1 or longest == free:
                length = longest
            elif free > 2 * longest:
                cap = min(free - (more - 1) * shortest, max(shortest, -(-free // more)))
                length = (have & ((2 << cap) - 1)).bit_length() - 1
            else:
                length, total = stock.longer_of_best_pair(free, room, have, tries)
                if total < free and more > 2:
                    cap = min(free - (more - 1) * shortest, max(shortest, -(-free // more)))
                    length = (have & ((2 << cap) - 1)).bit_length() - 1
        # A gap of half a percent is accepted; rows with wider ones are packed again.
        (packs if free <= max_tokens // 200 else open_rows).append(pack)
    rest = sorted(i for pack in open_rows for i in pack)
    if rest:
        budget = {"max_tokens": max_tokens, "max_images": max_images}
        again = best_fit_decreasing([lengths[i] for i in rest], [images[i] for i in rest], **budget)
        packs += [[rest[k] for k in pack] for pack in again]
    return packs


class Stock:
    """Samples not yet in a row, by image count and length; the lengths of each count are the bits of an integer."""

    def __init__(self, lengths: Sequence[int], images: Sequence[int], max_images: int):
        self.num = len(lengths)
        self._left: dict[tuple[int, int], list[int]] = {}  # (length, images) -> positions, descending
        self._bits = [0] * (max_images + 1)  # by image count; bit n: a sample of length n is left
        for i in range(self.num - 1, -1, -1):
            self._left.setdefault((lengths[i], images[i]), []).append(i)
            self._bits[images[i]] |= 1 << lengths[i]
        self._counts = [c for c, bits in enumerate(self._bits) if bits][::-1]

    def fitting(self, free: int, room: int) -> int:
        """Return the lengths of the samples of at most `free` tokens and `room` images, as bits."""
        have = 0
        for count in self._counts:
            if count <= room:
                have |= self._bits[count]
        return have & ((2 << free) - 1)

    def take(self, length: int, room: int) -> tuple[int, int]:
        """Take a sample of this length, with the most images that fit; return (position, images)."""
        for count in self._counts:
            if count <= room and self._bits[count] >> length & 1:
                break
        positions = self._left[length, count]
        i = positions.pop()
        if not positions:
            self._bits[count] ^= 1 << length
        self.num -= 1
        return i, count

    def longer_of_best_pair(self, free: int, room: int, have: int, tries: int) -> tuple[int, int]:
        """Find the two samples whose lengths come closest to `free` tokens, or the longest alone.

        Returns:
            (length of the longer one, sum of both lengths).
        """
        partners = [(c, self._bits[c], self.fitting(free, room - c)) for c in self._counts if c <= room]
        best = total = have.bit_length() - 1
        for _ in range(tries):
            longer = have.bit_length() - 1
            if 2 * longer < free or total == free:
                break
            have ^= 1 << longer
            for count, lengths, fitting in partners:  # noqa: B007
                if lengths >> longer & 1:
                    break
            shorter = (fitting & ((2 << (free - longer)) - 1)).bit_length() - 1
            if longer + shorter > total and shorter > 0:
                if shorter == longer and len(self._left[longer, count]) < 2:
                    continue
                best, total = longer, longer + shorter
        return best, total


def fill_rows(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Fill row by row: the longest remaining sample, and those that together come closest to the budget.

    Those are found by subset sum over the remaining lengths, as bit sets.
    """
    left: dict[int, list[int]] = {}  # length -> positions, descending
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
    """Take the first sample of this length out of `left`; return its position."""
    position = left[length].pop()
    if not left[length]:
        del left[length]
    return position


def group_by_length(lengths: Sequence[int], *, group: int) -> list[list[int]]:
    """Group samples of similar length, `group` each, for rows of one padded sample.

    Groups are sorted by the mean position of their samples.
    """
    order = np.argsort(np.asarray(lengths), kind="stable").tolist()
    groups = [order[i : i + group] for i in range(0, len(order), group)]
    return sorted(groups, key=lambda members: sum(members) / len(members))


def balance(
    packs: list[list[int]], *, sources: np.ndarray, costs: np.ndarray, weights: Sequence[Fraction]
) -> list[list[int]]:
    """Reorder the packs of a window so that shares stay close to their targets after every pack.

    Packing groups samples by length, and sources differ in length, so in any other order the shares drift within a
    window (on the embedded instruction mixture by up to 35 samples' worth, in this order by 5). The next pack is always
    the one that leaves the smallest sum over sources of |served - share|; ties go to the earlier pack.

    Args:
        sources: source number of every sample of the window.
        costs: its cost in the mixture's unit.
        weights: target share of every source.
    """
    # Integers, so that ties are broken the same way on every machine.
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
        # Remove entry k; `np.delete` is several times slower.
        left[k:-1], numbers[k:-1] = left[k + 1 :], numbers[k + 1 :]
        left, numbers = left[:-1], numbers[:-1]
    return [packs[i] for i in order]
