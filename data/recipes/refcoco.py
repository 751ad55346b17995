"""RefCOCO, RefCOCO+ and RefCOCOg: the box of the region a sentence describes; original pickles and JSON, or parquet."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path

from data.recipes.annotations import find_file, first_there, image_bytes, read_json
from data.recipes.options import make_question
from data.recipes.questions import BAD_ROW, check_split, is_table, plain_id
from data.recipes.record import Dropped, Part, Record, guard_row
from data.recipes.rows import cut_rows, read_rows

SPLITS = {split: split for split in ("train", "val", "testA", "testB", "test")}
HUB = True
ASK = "Provide the bounding box of the region this sentence describes, as [left, top, right, bottom] in shares of the "
ASK += "image's width and height between 0 and 1: "
NO_REGION = "expression without its region"


class PlainUnpickler(pickle.Unpickler):
    """Unpickler for lists, dicts, numbers and strings only, because a pickle that names other objects can run code."""

    def find_class(self, module: str, name: str):
        raise ValueError(f"it names {module}.{name}, and only lists, dicts, numbers and words are read")


def parts(
    path: Path, *, split: str, images: str = "", by: str = "unc", streaming: bool = True, rows: int = 2000
) -> list[Part]:
    """Return the parts of a split, one per shard; a record is one sentence, and a region has several.

    Args:
        path: folder of one of the three sets with `refs(unc).p` and `instances.json`, as downloaded from
            https://github.com/lichengunc/refer; or lmms-lab's copies with `bbox` and `answer`, as a folder of parquet
            or a hub id.
        images: folder of COCO's `train2014/`, or of its files; default: `path`.
        by: who made the splits: unc, google or (RefCOCOg) umd. unc has val, testA and testB, the others val and test.
    """
    check_split(split, SPLITS)
    if is_table(path):
        needs = ("image", "bbox", "answer")
        return cut_rows(path, split=split, rows=rows, needs=needs, hub="", streaming=streaming)
    refs = find_file(path, f"refs({by}).p")
    count = sum(ref.get("split") == split for ref in read_refs(refs))
    options = {"split": split, "images": images or str(path)}
    return [Part(str(refs), i, min(i + rows, count), options) for i in range(0, count, rows)]


def read_refs(file: str | Path) -> list[dict]:
    """Read the list of references.

    Raises:
        ValueError: the file is missing, is not a pickle, or holds anything but plain values.
    """
    try:
        refs = PlainUnpickler(io.BytesIO(Path(file).read_bytes()), encoding="latin1").load()
    except (OSError, EOFError, pickle.UnpicklingError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{file} cannot be read as a pickle of references ({error}); download it again") from None
    if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
        raise ValueError(f"{file} holds no list of references; is it the file of another data set?")
    return refs


def convert(part: Part) -> Iterator[Record | Dropped]:
    if "kind" in part.options:
        for numbers, row in read_rows(part):
            yield from guard_row(convert_row(row, *numbers), row.get("question_id"))
        return
    instances = read_json(find_file(Path(part.path).parent, "instances.json"))
    regions = {plain_id(row.get("id")): row.get("bbox") for row in instances["annotations"]}
    photographs = {plain_id(row.get("id")): row for row in instances["images"]}
    chosen = [ref for ref in read_refs(part.path) if ref.get("split") == part.options["split"]]
    for number, ref in enumerate(chosen[part.start : part.stop], part.start):
        photograph, box = photographs.get(plain_id(ref.get("image_id"))), regions.get(plain_id(ref.get("ann_id")))
        if photograph is None or box is None:
            yield Dropped(plain_id(ref.get("ref_id")), NO_REGION)
            continue
        yield from guard_row(convert_ref(ref, photograph, box, part.options["images"], number), ref.get("ref_id"))


def convert_ref(ref: dict, photograph: dict, box: list, images: str, number: int) -> Iterator[Record | Dropped]:
    file = photograph["file_name"]
    image = Path(first_there(images, f"train2014/{file}", file))
    size = (photograph["width"], photograph["height"])
    for k, sentence in enumerate(ref.get("sentences") or []):
        words, name = sentence.get("raw") or sentence.get("sent"), sentence.get("sent_id")
        yield from locate(name, words, box, size, image, number, k, image_id=ref["image_id"])


def convert_row(row: dict, *numbers: int) -> Iterator[Record | Dropped]:
    from fastvlm.data.decode import measure_image

    image, box, sentences = image_bytes(row.get("image")), row.get("bbox"), row.get("answer")
    sentences = [sentences] if isinstance(sentences, str) else sentences
    try:
        size = measure_image(image) if image is not None else None
    except ValueError:
        size = None
    if size is None or not sentences or not box:
        yield Dropped(plain_id(row.get("question_id")), BAD_ROW)
        return
    for k, words in enumerate(sentences):
        name = f"{plain_id(row.get('question_id'))}-{k}"
        yield from locate(name, words, box, size, image, *numbers, k, image_id=row.get("file_name"))


def locate(
    name: object, words: object, box: list, size: tuple[int, int], image: bytes | Path, *numbers: int, image_id: object
) -> Iterator[Record | Dropped]:
    """Yield one sentence as a record; a COCO box (left, top, width, height in px) becomes relative edges in 0..1."""
    if not isinstance(words, str) or not words.strip() or len(box) != 4:
        yield Dropped(plain_id(name), BAD_ROW)
        return
    (left, top, width, height), (across, down) = box, size
    edges = [left / across, top / down, (left + width) / across, (top + height) / down]
    said = "[" + ", ".join(f"{edge:.3f}" for edge in edges) + "]"
    content = [{"type": "image"}, {"type": "text", "text": ASK + words.strip()}]
    meta = {"box": edges, "expression": words.strip()}
    yield from make_question(name, content, [image], [said], *numbers, source="refcoco", image_id=image_id, meta=meta)
