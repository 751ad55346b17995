"""Contact sheets for inspection: a family's first training records, enlarged, with their text below."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data.recipes.embedded.world import BAR, COLOUR_NAMES

WIDTH = 300  # pixels per sample
SIDE = 288  # pixels of an image: 96, enlarged three times
LINE = 17


def lines_of(record: dict) -> list[str]:
    """Return the record's text as wrapped lines; images appear as [image]."""
    if "document" in record:
        turns = [("", record["document"])]
    else:
        turns = [(f"{m['role']}: ", m["content"]) for m in record["messages"]]
    lines = []
    for role, content in turns:
        parts = [content] if isinstance(content, str) else [p.get("text", "[image]") for p in content]
        for line in (role + " ".join(parts)).split("\n"):
            lines += textwrap.wrap(line, 44)
    if "scene" in record.get("meta", {}):
        lines.append(f"({record['meta']['scene']})")
    return lines


def paint_cells(labels: bytes) -> Image.Image:
    """Draw a label map: the class of each cell on a tint of its colour."""
    cells = Image.open(io.BytesIO(labels)).convert("RGB")
    step = SIDE // cells.width
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=14)
    tints = {"none": (245, 245, 245), "red": (250, 190, 190), "green": (190, 235, 190), "blue": (195, 205, 250)}
    for x in range(cells.width):
        for y in range(cells.height):
            kind, colour, _ = cells.getpixel((x, y))
            draw.rectangle((x * step, y * step, x * step + step - 1, y * step + step - 1), tints[COLOUR_NAMES[colour]])
            if kind:
                draw.text((x * step + 7, y * step + 3), "#" if kind == BAR else str(kind - 1), "black", font=font)
    return picture


def write_sheet(samples: list[tuple[dict, list[bytes], list[bytes]]], path: Path, *, columns: int = 4) -> None:
    """Write one PNG of `samples`, each (record, images, label maps), in rows of `columns` samples."""
    font = ImageFont.load_default(size=13)
    tiles = []
    for record, images, maps in samples:
        pictures = [
            Image.open(io.BytesIO(i)).convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST) for i in images
        ]
        pictures += [paint_cells(m) for m in maps]
        if len(pictures) > 1 and not maps:
            pictures = [p.resize((SIDE // 2, SIDE // 2), Image.Resampling.LANCZOS) for p in pictures]
        lines = lines_of(record)
        tiles.append((pictures, lines, sum(p.height + 6 for p in pictures) + LINE * len(lines) + 14))
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    heights = [max(height for *_, height in row) for row in rows]
    sheet = Image.new("RGB", (columns * (WIDTH + 12), sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for row, height in zip(rows, heights):
        for column, (pictures, lines, _) in enumerate(row):
            x, y = column * (WIDTH + 12) + 6, top + 4
            for picture in pictures:
                sheet.paste(picture, (x, y))
                y += picture.height + 6
            for line in lines:
                draw.text((x, y), line, "black", font=font)
                y += LINE
        top += height
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
