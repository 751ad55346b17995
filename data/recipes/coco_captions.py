"""COCO captions, 2017 or 2014: about five captions per image, train and val."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data.recipes.annotations import as_list, image_bytes
from data.recipes.captions import check_choice, find_repeats, load_json, make_records
from data.recipes.questions import is_table
from data.recipes.record import BAD_ROW, ODD_ROW, Dropped, Part, Record, guard_row
from data.recipes.rows import SPLIT_NAMES, cut_rows, read_rows

SPLITS = {"train": "train", "val": "val"}
HUB = True
ID = (int, float, str)


def parts(
    path: Path,
    *,
    split: str,
    images: str = "",
    year: str = "2017",
    captions: str = "each",
    streaming: bool = True,
    rows: int = 1000,
) -> list[Part]:
    """Return the parts of a split, one per shard.

    Args:
        path: folder with `annotations/captions_<split><year>.json`; or a folder of parquet, or a hub id, with the
            photograph in `image` and its captions in `answer` (lmms-lab/COCO-Caption2017, lmms-lab/COCO-Caption for
            2014: only val).
        images: folder of `<split><year>/`, or of its files; default: `path`.
        captions: "each", "first" or "all"; see `make_records`.
        rows: images per part.
    """
    check_choice(captions)
    name = f"captions_{split}{year}.json"
    file = next((f for f in (path / "annotations" / name, path / name) if f.is_file()), path / "annotations" / name)
    if not file.is_file() and is_table(path):
        settings = {"needs": ("image", "answer"), "hub": "", "streaming": streaming}
        options = {"becomes": split, "captions": captions}
        return cut_rows(path, split=SPLIT_NAMES[split], rows=rows, options=options, **settings)
    data = load_json(str(file))
    if not isinstance(data.get("annotations"), list):
        raise ValueError(f"{file}: no list `annotations` in it; is it the right file?")
    folder = Path(images).expanduser().absolute() if images else path
    folder = next((f for f in (folder / f"{split}{year}", folder / "images" / f"{split}{year}") if f.is_dir()), folder)
    options = {"split": split, "images": str(folder), "captions": captions}
    count = len(data["images"])
    return [Part(str(file), start, min(start + rows, count), options) for start in range(0, count, rows)]


def convert(part: Part) -> Iterator[Record | Dropped]:
    if "kind" in part.options:
        yield from convert_table(part)
        return
    data = load_json(part.path)
    images = data["images"][part.start : part.stop]
    captions: dict[object, list] = {image["id"]: [] for image in images if isinstance(image.get("id"), ID)}
    # Every part reads all annotations; only the first part reports the faulty ones.
    known = {image["id"] for image in data["images"] if isinstance(image.get("id"), ID)} if part.start == 0 else None
    for number, row in enumerate(data["annotations"]):
        try:
            of = captions.get(row["image_id"])
        except ODD_ROW:
            if known is not None:
                yield Dropped(f"annotation {number}", BAD_ROW)
            continue
        name = number if row.get("id") is None else row["id"]
        if of is not None:
            of.append((name, row.get("caption")))
        elif known is not None and row["image_id"] not in known:
            yield Dropped(str(name), "caption of an image that is not listed")
    repeats = find_repeats(data["images"], "id")
    for number, image in enumerate(images, part.start):
        row = (number,) if number in repeats else ()
        yield from guard_row(convert_image(image, captions, row, part.options), image.get("id"))


def convert_image(image: dict, captions: dict, row: tuple[int, ...], options: dict) -> Iterator[Record | Dropped]:
    file = Path(options["images"], image["file_name"])
    # Sorted, because the order within an image differs between copies of the file.
    texts = sorted(captions[image["id"]], key=lambda pair: (str(type(pair[0])), pair[0]))
    settings = {"split": options["split"], "choice": options["captions"], "row": row}
    yield from make_records(image["id"], file, texts, source="coco_captions", **settings)


def convert_table(part: Part) -> Iterator[Record | Dropped]:
    settings = {"source": "coco_captions", "split": part.options["becomes"], "choice": part.options["captions"]}
    for numbers, row in read_rows(part):
        number = "-".join(map(str, numbers))
        # The image id is only in the file name: COCO_val2014_000000000042.jpg.
        digits = Path(str(row.get("file_name") or row.get("question_id") or "")).stem.split("_")[-1]
        name = int(digits) if digits.isdecimal() else f"row {number}"
        if (image := image_bytes(row.get("image"))) is None:
            yield Dropped(str(name), BAD_ROW)
            continue
        texts = [(f"{name}-{k}", text) for k, text in enumerate(as_list(row.get("answer")))]
        yield from make_records(name, image, texts, row=numbers, **settings)
