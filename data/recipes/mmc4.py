"""MMC4: web pages as sentences with images before some of them; zipped JSON lines or tars of JSON."""

from __future__ import annotations

import base64
import binascii
import io
import json
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from data.recipes.documents import LEFT_OUT, NO_IMAGE_LEFT, NO_TEXT, check_image, find_image, join_texts, url_name
from data.recipes.inputs import list_files
from data.recipes.questions import check_choice
from data.recipes.record import BAD_ROW, ODD_ROW, Dropped, Part, Record, make_key

SPLITS = {"train": "train"}  # val=0.001 holds out a share
NOT_ON_HUB = "get its shards by https://github.com/allenai/mmc4, or one of a copy as path=hf://datasets/org/name/file"
SUFFIXES = (".jsonl", ".jsonl.zip", ".tar")
BAD_LINE = "line is not a JSON object with text_list and image_info"
NO_PLACE = f"image has no sentence{LEFT_OUT}"
UNLIKE = f"image below min_similarity{LEFT_OUT}"


def parts(
    path: Path,
    *,
    split: str,
    images: str = "",
    names: str = "filename",
    min_similarity: float = 0.0,
    min_images: int = 1,
) -> list[Part]:
    """Return the parts of a split, one per shard.

    Args:
        path: folder of `*.jsonl.zip`, of `*.jsonl` or of OpenFlamingo's tars, which hold one JSON per page with images
            in `image_base64`; or one such file. Each file becomes a shard.
        images: folder of the downloaded images, if they are not in the tars; a missing image is left out of its
            document.
        names: how these are named: "filename", the `image_name`, or "sha256" of the `raw_url`; with any suffix, in one
            folder or in subfolders of the name's first two letters.
        min_similarity: images with a lower `matched_sim` are left out (OpenFlamingo uses 0.24).
        min_images: documents with fewer remaining images are dropped.
    """
    check_choice("names", names, "filename", "sha256")
    path = Path(path)
    files = [path] if path.is_file() else list_files(path, SUFFIXES)
    if not files or not files[0].name.endswith(SUFFIXES):
        raise ValueError(f"path={path}: no {', '.join(SUFFIXES)} there")
    options = {"images": images, "names": names, "min_similarity": min_similarity}
    options |= {"min_images": min_images}
    return [Part(str(file), i, i + 1, options) for i, file in enumerate(files)]


def read_pages(file: str) -> Iterator[object]:
    """Yield the pages of a shard; None for a page that is not JSON.

    Raises:
        ValueError: the shard is not a readable zip or tar.
    """
    try:
        if file.endswith(".tar"):
            with tarfile.open(file, "r:") as tar:
                for info in tar:
                    if info.isfile() and info.name.endswith(".json"):
                        yield parse(tar.extractfile(info).read())
        elif file.endswith(".zip"):
            with zipfile.ZipFile(file) as archive:
                for name in sorted(n for n in archive.namelist() if n.endswith(".jsonl")):
                    with archive.open(name) as lines:
                        yield from (parse(line) for line in io.BufferedReader(lines) if line.strip())
        else:
            with open(file, "rb") as lines:
                yield from (parse(line) for line in lines if line.strip())
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{file}: {error}; download it again") from None


def parse(data: bytes) -> object:
    try:
        return json.loads(data)
    except ValueError:
        return None


def convert(part: Part) -> Iterator[Record | Dropped]:
    for number, page in enumerate(read_pages(part.path)):
        name = str(page.get("url") or "") if isinstance(page, dict) else ""
        name = name or f"{Path(part.path).name}-{number}"
        try:
            yield convert_page(page, (part.start, number), name, part.options)
        except ODD_ROW:
            yield Dropped(name, BAD_ROW)


def convert_page(page: object, numbers: tuple[int, int], name: str, options: dict) -> Record | Dropped:
    if not isinstance(page, dict) or not isinstance(page.get("text_list"), list):
        return Dropped(name, BAD_LINE)
    texts, infos, notes = page["text_list"], page.get("image_info"), []
    if (
        not isinstance(infos, list)
        or not all(isinstance(t, str) for t in texts)
        or not all(isinstance(i, dict) for i in infos)
    ):
        return Dropped(name, BAD_LINE)
    before: dict[int, list[bytes]] = {}
    similarity: dict[int, list[float | None]] = {}
    for info in infos:
        place, likeness = info.get("matched_text_index"), info.get("matched_sim")
        if not isinstance(place, int) or not 0 <= place < len(texts):
            notes.append(NO_PLACE)
        elif likeness is not None and likeness < options["min_similarity"]:
            notes.append(UNLIKE)
        else:
            image, why = check_image(find_file(info, options))
            if image is None:
                notes.append(why)
                continue
            before.setdefault(place, []).append(image)
            similarity.setdefault(place, []).append(likeness)
    parts: list[dict] = []
    files: list[bytes] = []
    for i, text in enumerate(texts):
        parts += [{"type": "image"}] * len(before.get(i, ()))
        files += before.get(i, ())
        parts.append({"type": "text", "text": text})
    parts = join_texts(parts, separator=" ")
    if not any(part["type"] == "text" for part in parts):
        return Dropped(name, NO_TEXT)
    if len(files) < options["min_images"]:
        return Dropped(name, NO_IMAGE_LEFT if notes else "fewer images than min_images")
    likenesses = [value for i in sorted(similarity) for value in similarity[i]]
    meta = {"missing_images": len(notes), "similarities": likenesses}
    if known := [value for value in likenesses if value is not None]:
        meta["similarity"] = min(known)  # a number, because filters cannot compare lists
    record = {"document": parts, "id": name, "source": "mmc4", "meta": meta}
    return Record(make_key("page", *numbers), record, files, notes)


def find_file(info: dict, options: dict) -> bytes | Path | None:
    if info.get("image_base64"):
        try:
            return base64.b64decode(info["image_base64"], validate=True)
        except (binascii.Error, TypeError, ValueError):
            return None
    if not options["images"] and "image_base64" in info:
        return None
    if not options["images"]:
        raise ValueError("images=... is missing: these pages hold URLs; name the folder of the fetched images")
    name = url_name(str(info.get("raw_url"))) if options["names"] == "sha256" else str(info.get("image_name") or "")
    return find_image(options["images"], name)
