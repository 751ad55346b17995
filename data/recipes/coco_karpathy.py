"""COCO captions in Karpathy's split (dataset_coco.json): restval belongs to train; 5,000 val and 5,000 test images."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from data.recipes.annotations import as_list
from data.recipes.captions import check_choice, find_repeats, load_json, make_records
from data.recipes.questions import is_table
from data.recipes.record import Dropped, Part, Record, guard_row
from data.recipes.rows import SPLIT_NAMES, cut_rows, read_rows

SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}
HUB = True


def parts(
    path: Path,
    *,
    split: str,
    images: str = "",
    captions: str = "each",
    restval: bool = True,
    streaming: bool = True,
    rows: int = 1000,
) -> list[Part]:
    """Return the parts of a split, one per shard.

    Args:
        path: `dataset_coco.json`, or its folder; or a folder of parquet, or a hub id, with the columns of
            yerevann/coco-karpathy. These hold no photographs, so `images` is required with them.
        images: folder of `train2014/` and `val2014/`; default: the folder of the JSON.
        captions: "each", "first" or "all"; see `make_records`.
        restval: false leaves the 30,504 restval images out of train.
        rows: images per part.
    """
    check_choice(captions)
    file = path / "dataset_coco.json" if path.is_dir() else path
    names = [name for name in SPLITS[split] if restval or name != "restval"]
    if not file.is_file() and is_table(path):
        if not images:
            raise ValueError(f"images=... is missing: the rows of {path} name COCO's files; name their folder")
        options = {"becomes": split, "images": str(Path(images).expanduser().absolute()), "captions": captions}
        settings = {"rows": rows, "needs": ("cocoid", "filename"), "hub": "", "streaming": streaming}
        words = [SPLIT_NAMES.get(name, (name,)) for name in names]
        cut = [cut_rows(path, split=word, options=options | {"number": n}, **settings) for n, word in enumerate(words)]
        return [part for parts in cut for part in parts]
    folder = Path(images).expanduser().absolute() if images else file.parent
    options = {"split": split, "names": names, "images": str(folder), "captions": captions}
    count = len(select(str(file), names))
    return [Part(str(file), start, min(start + rows, count), options) for start in range(0, count, rows)]


def select(file: str, names: list[str]) -> list[dict]:
    return [image for image in load_json(file)["images"] if image.get("split") in names]


def convert(part: Part) -> Iterator[Record | Dropped]:
    options = part.options
    if "kind" in options:
        for numbers, row in read_rows(part):
            yield from guard_row(convert_row(row, (options["number"], *numbers), options), row.get("cocoid"))
        return
    chosen = select(part.path, options["names"])
    repeats = find_repeats(chosen, "cocoid")
    for number, image in enumerate(chosen[part.start : part.stop], part.start):
        row = (number,) if number in repeats else ()
        yield from guard_row(convert_image(image, row, options), image.get("cocoid"))


def convert_row(row: dict, numbers: tuple[int, ...], options: dict) -> Iterator[Record | Dropped]:
    """Yield the records of a parquet row; keys include the row's numbers, since another file may repeat the id."""
    pairs = zip_longest(as_list(row.get("sentids")), as_list(row.get("sentences")))
    captions = [(name, text.get("raw") if isinstance(text, dict) else text) for name, text in pairs]
    file = Path(options["images"], row.get("filepath") or "", row["filename"])
    settings = {"split": options["becomes"], "choice": options["captions"], "row": numbers}
    yield from make_records(row["cocoid"], file, captions, source="coco_karpathy", **settings)


def convert_image(image: dict, row: tuple[int, ...], options: dict) -> Iterator[Record | Dropped]:
    captions = [(sentence.get("sentid"), sentence.get("raw")) for sentence in image["sentences"]]
    file = Path(options["images"], image.get("filepath") or "", image["filename"])
    settings = {"split": options["split"], "choice": options["captions"], "row": row}
    yield from make_records(image["cocoid"], file, captions, source="coco_karpathy", **settings)
