"""COCO captions in Karpathy's split (dataset_coco.json): restval belongs to train; 5,000 val and 5,000 test images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data.recipes.captions import check_choice, load_json, make_records
from data.recipes.record import Dropped, Part, Record

SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}


def parts(
    path: Path, *, split: str, images: str = "", captions: str = "each", restval: bool = True, rows: int = 1000
) -> list[Part]:
    """`images` holds train2014/ and val2014/ (the folder of the JSON unless told); rows are images, counted within the
    split. `restval=false` leaves those 30,504 images out."""
    check_choice(captions)
    file = path / "dataset_coco.json" if path.is_dir() else path
    names = [name for name in SPLITS[split] if restval or name != "restval"]
    folder = Path(images).expanduser().absolute() if images else file.parent
    options = {"split": split, "names": names, "images": str(folder), "captions": captions}
    count = len(select(str(file), names))
    return [Part(str(file), start, min(start + rows, count), options) for start in range(0, count, rows)]


def select(file: str, names: list[str]) -> list[dict]:
    return [image for image in load_json(file)["images"] if image.get("split") in names]


def convert(part: Part) -> Iterator[Record | Dropped]:
    options = part.options
    for image in select(part.path, options["names"])[part.start : part.stop]:
        captions = [(sentence.get("sentid"), sentence.get("raw")) for sentence in image["sentences"]]
        file = Path(options["images"], image.get("filepath", ""), image["filename"])
        settings = {"split": options["split"], "choice": options["captions"]}
        yield from make_records(image["cocoid"], file, captions, source="coco_karpathy", **settings)
