"""COCO captions, 2017 or 2014: about five captions an image, train and val."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data.recipes.captions import check_choice, load_json, make_records
from data.recipes.record import Dropped, Part, Record

SPLITS = {"train": "train", "val": "val"}


def parts(
    path: Path, *, split: str, images: str = "", year: str = "2017", captions: str = "each", rows: int = 1000
) -> list[Part]:
    """`path` holds annotations/captions_train2017.json and train2017/ (or `images` does); `captions` is each, first
    or all. Rows are images."""
    check_choice(captions)
    name = f"captions_{split}{year}.json"
    file = next((f for f in (path / "annotations" / name, path / name) if f.is_file()), path / "annotations" / name)
    data = load_json(str(file))
    if not isinstance(data.get("annotations"), list):
        raise ValueError(f"{file}: no list `annotations` in it; is it the right file?")
    folder = Path(images).expanduser().absolute() if images else path
    folder = next((f for f in (folder / f"{split}{year}", folder / "images" / f"{split}{year}") if f.is_dir()), folder)
    options = {"split": split, "images": str(folder), "captions": captions}
    count = len(data["images"])
    return [Part(str(file), start, min(start + rows, count), options) for start in range(0, count, rows)]


def convert(part: Part) -> Iterator[Record | Dropped]:
    data = load_json(part.path)
    images = data["images"][part.start : part.stop]
    captions: dict[object, list] = {image["id"]: [] for image in images}
    known = {image["id"] for image in data["images"]} if part.start == 0 else None
    for number, row in enumerate(data["annotations"]):
        if not isinstance(row, dict) or "image_id" not in row:
            raise ValueError(f"{part.path}: annotations, row {number} has no image_id")
        if row["image_id"] in captions:
            captions[row["image_id"]].append((row.get("id", number), row.get("caption")))
        elif known is not None and row["image_id"] not in known:
            yield Dropped(str(row.get("id", number)), "caption of an image that is not listed")
    for image in images:
        file = Path(part.options["images"], image["file_name"])
        # Sorted: the file's own order is not by image, and other copies of it differ.
        rows = sorted(captions[image["id"]], key=lambda pair: (str(type(pair[0])), pair[0]))
        settings = {"split": part.options["split"], "choice": part.options["captions"]}
        yield from make_records(image["id"], file, rows, source="coco_captions", **settings)
