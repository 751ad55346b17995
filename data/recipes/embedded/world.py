"""Composed images: scanned digits in grids and lines, and bar charts of real tables.

Every image is 96 x 96. Digits stand in fixed slots in reading order, which a small model can learn to read. Scans and
table rows are assigned to splits before anything is drawn, so images of different splits share no scan.
"""

from __future__ import annotations

import functools
import struct
import zlib
from dataclasses import dataclass
from random import Random

import numpy as np

SIZE = 96  # pixels, both sides
CELL = 8  # pixels per cell of a label map: 12 x 12 cells per image
LEVELS = 8  # of ink, half as many as in the scans: files are a third smaller and look the same
SPLITS = ("train", "val", "test")
SCANS = {"train": range(0, 1297), "val": range(1297, 1547), "test": range(1547, 1797)}  # file order of the digits

COLOURS = ("red", "green", "blue")
INK = {"red": (200, 35, 35), "green": (25, 135, 45), "blue": (35, 60, 200)}
CLASS_NAMES = ("background", *(f"digit {d}" for d in range(10)), "bar")  # channel 0 of a label map
COLOUR_NAMES = ("none", *COLOURS)  # channel 1
BAR = CLASS_NAMES.index("bar")
AXIS = 1 + LEVELS * len(COLOURS)  # palette entry of a chart's base line; entry 0 is the paper


@dataclass(frozen=True)
class Glyph:
    """One scan drawn into the square (x, y, x + size, y + size)."""

    scan: int
    digit: int
    x: int
    y: int
    size: int
    colour: str
    warp: tuple[float, float, float] | None = None  # rotation (radians), slant, stretch


@dataclass(frozen=True)
class Bar:
    """One filled box (x, y, x + width, y + height)."""

    x: int
    y: int
    width: int
    height: int
    colour: str


@dataclass(frozen=True)
class Scene:
    """What a picture shows; `groups` are its digits in reading order, one tuple per line.

    kind is `grid` (1-4 digits in a 2 x 2 grid), `line` (3-4 digits), `lines` (two lines of 2-4) or `chart` (2-5 bars,
    `groups[0]` the digits under them, `tallest` and `shortest` indices of bars).
    """

    kind: str
    groups: tuple[tuple[int, ...], ...]
    glyphs: tuple[Glyph, ...]
    bars: tuple[Bar, ...] = ()
    tallest: int = -1
    shortest: int = -1

    @property
    def digits(self) -> tuple[int, ...]:
        return self.groups[0]

    @property
    def summary(self) -> str:
        """One short string that determines every answer: `grid 471`, `lines 47 381`, `chart 471 7 4`."""
        extra = f" {self.digits[self.tallest]} {self.digits[self.shortest]}" if self.kind == "chart" else ""
        return " ".join([self.kind, *("".join(map(str, g)) for g in self.groups)]) + extra


@dataclass(frozen=True)
class Table:
    """One split of a table: columns, row indices sorted by each column, and rows by class (empty for a regression)."""

    name: str
    features: list[str]
    columns: list[list[float]]
    order: list[list[int]]
    classes: list[list[int]]


class World:
    """The real data of one split, and methods that compose scenes from it.

    Args:
        split: train, val or test.
    """

    def __init__(self, split: str):
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.split = split
        self.scans = digits.images.astype(np.float32) / 16  # (1797, 8, 8) in 0..1
        self.by_digit = [[i for i in SCANS[split] if digits.target[i] == d] for d in range(10)]
        self.tables = [load_table(name, split) for name in ("iris", "wine", "breast_cancer", "diabetes")]

    def glyph(self, digit: int, x: int, y: int, size: int, colour: str, rng: Random) -> Glyph:
        """Draw a scan of the digit; training glyphs are slightly rotated, slanted and stretched.

        There are only 1,297 training scans, and the held-out ones, which are not warped, are by other writers.
        """
        warp = None
        if self.split == "train":
            warp = (rng.uniform(-0.25, 0.25), rng.uniform(-0.25, 0.25), rng.uniform(0.85, 1.15))
        return Glyph(rng.choice(self.by_digit[digit]), digit, x, y, size, colour, warp)

    def grid(self, digits: list[int], rng: Random) -> Scene:
        """Place 1-4 digits of 26-36 px, in the order top left, top right, bottom left, bottom right."""
        one_colour = rng.choice(COLOURS) if rng.random() < 0.6 else None
        glyphs = []
        for slot, digit in enumerate(digits):
            size = rng.randint(26, 36)
            x, y = 48 * (slot % 2) + rng.randint(0, 48 - size), 48 * (slot // 2) + rng.randint(0, 48 - size)
            glyphs.append(self.glyph(digit, x, y, size, one_colour or rng.choice(COLOURS), rng))
        return Scene("grid", (tuple(digits),), tuple(glyphs))

    def line(self, digits: list[int], rng: Random) -> Scene:
        """Place 3-4 digits of 22-24 px in one line at any height."""
        return Scene("line", (tuple(digits),), tuple(self._write(digits, rng.randint(2, SIZE - 26), rng)))

    def lines(self, first: list[int], second: list[int], rng: Random) -> Scene:
        """Place two lines of 2-4 digits, one in each half."""
        glyphs = [*self._write(first, rng.randint(2, 22), rng), *self._write(second, rng.randint(50, 70), rng)]
        return Scene("lines", (tuple(first), tuple(second)), tuple(glyphs))

    def _write(self, digits: list[int], top: int, rng: Random) -> list[Glyph]:
        colour = rng.choice(COLOURS)
        glyphs = []
        for i, digit in enumerate(digits):
            size = rng.randint(22, 24)
            glyphs.append(
                self.glyph(digit, 24 * i + rng.randint(0, 24 - size), top + rng.randint(0, 2), size, colour, rng)
            )
        return glyphs

    def chart(self, labels: list[int], rng: Random) -> Scene:
        """Draw a bar for each label: bootstrapped group means of a real table's feature, on a stretched axis."""
        heights = self.bar_heights(len(labels), rng)
        pitch = 24 if len(labels) <= 4 else 19
        glyphs, bars = [], []
        for i, (digit, height) in enumerate(zip(labels, heights)):
            colour = rng.choice(COLOURS)
            size = rng.randint(pitch - 4, pitch - 2)
            glyphs.append(self.glyph(digit, pitch * i + 2, 74 + rng.randint(0, 22 - size), size, colour, rng))
            bars.append(Bar(pitch * i + 4, 72 - height, pitch - 8, height, colour))
        tallest, shortest = heights.index(max(heights)), heights.index(min(heights))
        return Scene("chart", (tuple(labels),), tuple(glyphs), tuple(bars), tallest, shortest)

    def bar_heights(self, num_bars: int, rng: Random) -> list[int]:
        """Draw bar heights in pixels; the tallest and the shortest differ from all others by at least 7."""
        while True:
            table = rng.choice(self.tables)
            column = table.columns[rng.randrange(len(table.columns))]
            if len(table.classes) == num_bars and rng.random() < 0.5:
                groups = table.classes
            else:  # equal groups of the rows sorted by a random feature
                order = rng.choice(table.order)
                edges = [len(order) * i // num_bars for i in range(num_bars + 1)]
                groups = [order[a:b] for a, b in zip(edges, edges[1:])]
            means = [sum(column[row] for row in rng.choices(group, k=12)) / 12 for group in groups]
            rng.shuffle(means)
            low, high = min(means), max(means)
            if high == low:
                continue
            bottom, top = rng.randint(10, 22), rng.randint(54, 66)
            heights = [round(bottom + (m - low) / (high - low) * (top - bottom)) for m in means]
            inner = sorted(heights)
            if inner[-1] - inner[-2] >= 7 and inner[1] - inner[0] >= 7:
                return heights


@functools.cache
def load_world(split: str) -> World:
    """Return the world of a split, built once per process."""
    return World(split)


@functools.cache
def load_table(name: str, split: str) -> Table:
    """Load a table's rows of one split: of every six rows, four are in train, one in val and one in test."""
    from sklearn import datasets

    data = getattr(datasets, f"load_{name}")()
    last = {"train": (0, 1, 2, 3), "val": (4,), "test": (5,)}[split]
    rows = [i for i in range(len(data.data)) if i % 6 in last]
    columns = [[float(v) for v in data.data[rows, j]] for j in range(data.data.shape[1])]
    order = [sorted(range(len(rows)), key=c.__getitem__) for c in columns]
    target = data.target[rows] if "target_names" in data else []
    classes = [[i for i, t in enumerate(target) if t == c] for c in sorted({int(t) for t in target})]
    return Table(name, [str(f) for f in data.feature_names], columns, order, classes)


@functools.cache
def upsample(size: int) -> np.ndarray:
    """Return the (size, 8) matrix of linear interpolation from 8 to `size` samples."""
    at = np.clip((np.arange(size) + 0.5) * 8 / size - 0.5, 0, 7)
    left = np.minimum(at.astype(int), 6)
    matrix = np.zeros((size, 8), np.float32)
    matrix[np.arange(size), left] = 1 - (at - left)
    matrix[np.arange(size), left + 1] += at - left
    return matrix


def draw_scan(scan: np.ndarray, size: int, warp: tuple[float, float, float] | None) -> np.ndarray:
    """Resize a scan (8, 8) to (size, size) bilinearly; `warp` rotates, slants and stretches it about its centre."""
    if warp is None:
        matrix = upsample(size)
        return matrix @ scan @ matrix.T
    turn, slant, stretch = warp
    at = (np.arange(size, dtype=np.float32) + 0.5) * 8 / size - 4
    y, x = at[:, None], at[None, :]
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    row = (cos * y - sin * x) / np.float32(stretch) + 3.5 + 1  # + 1: the scan is padded by one empty sample
    column = cos * x + sin * y + np.float32(slant) * y + 3.5 + 1
    row, column = np.clip(row, 0, 8.999), np.clip(column, 0, 8.999)
    top, left = row.astype(np.int64), column.astype(np.int64)
    down, right = row - top, column - left
    padded = np.pad(scan, 1)
    upper = padded[top, left] * (1 - right) + padded[top, left + 1] * right
    lower = padded[top + 1, left] * (1 - right) + padded[top + 1, left + 1] * right
    return upper * (1 - down) + lower * down


def render(scene: Scene, scans: np.ndarray, rng: Random) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene; return palette indices uint8 (96, 96) and the palette uint8 (P, 3).

    Every ink has one palette entry per level, so a picture takes one byte per pixel and compresses well.
    """
    pixels = np.zeros((SIZE, SIZE), np.uint8)
    palette = np.zeros((1 + AXIS, 3), np.float32)
    paper = np.array([rng.randint(228, 255) for _ in range(3)], np.float32)
    palette[0], palette[AXIS] = paper, 90
    steps = np.arange(1, LEVELS + 1, dtype=np.float32)[:, None] / LEVELS
    for j, colour in enumerate(COLOURS):
        ink = np.array([c + rng.randint(-25, 25) for c in INK[colour]], np.float32)
        palette[1 + LEVELS * j : 1 + LEVELS * (j + 1)] = paper + steps * (ink - paper)
    for thing in (*scene.bars, *scene.glyphs):
        base = LEVELS * COLOURS.index(thing.colour)  # entry base + level, level 1..LEVELS
        if isinstance(thing, Bar):
            pixels[thing.y : thing.y + thing.height, thing.x : thing.x + thing.width] = base + LEVELS
        else:
            level = np.rint(draw_scan(scans[thing.scan], thing.size, thing.warp) * LEVELS).astype(np.uint8)
            box = pixels[thing.y : thing.y + thing.size, thing.x : thing.x + thing.size]
            box[...] = np.where(level > 0, level + base, box)
    if scene.bars:
        pixels[72] = AXIS
    return pixels, np.clip(palette, 0, 255).astype(np.uint8)


def label_map(scene: Scene) -> np.ndarray:
    """Return dense labels uint8 (12, 12, 3): a cell belongs to the object whose box covers its centre.

    Channel 0 indexes CLASS_NAMES, channel 1 COLOUR_NAMES; channel 2 is zero.
    """
    cells = np.zeros((SIZE // CELL, SIZE // CELL, 3), np.uint8)
    for thing in (*scene.bars, *scene.glyphs):
        width, height = (thing.width, thing.height) if isinstance(thing, Bar) else (thing.size, thing.size)
        # Cell i has its centre at pixel 8 i + 4; the first cell centred at or after a box's start is (start + 3) // 8.
        rows = slice((thing.y + 3) // CELL, (thing.y + height + 3) // CELL)
        columns = slice((thing.x + 3) // CELL, (thing.x + width + 3) // CELL)
        cells[rows, columns, 0] = BAR if isinstance(thing, Bar) else 1 + thing.digit
        cells[rows, columns, 1] = COLOUR_NAMES.index(thing.colour)
    return cells


def encode_png(pixels: np.ndarray, palette: np.ndarray | None = None, level: int = 1) -> bytes:
    """Encode uint8 (h, w) palette indices or (h, w, 3) RGB as PNG, several times faster than a general encoder.

    Format (https://www.w3.org/TR/png-3/): signature, IHDR, PLTE, IDAT with rows that begin with filter byte 0, IEND.
    """
    height, width = pixels.shape[:2]
    rows = np.zeros((height, 1 + pixels[0].size), np.uint8)
    rows[:, 1:] = pixels.reshape(height, -1)
    colour_type = 2 if palette is None else 3
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0))]
    if palette is not None:
        chunks.append((b"PLTE", palette[: int(pixels.max()) + 1].tobytes()))
    chunks += [(b"IDAT", zlib.compress(rows.tobytes(), level)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
