"""OBELICS, MMC4, img2dataset, FineWeb-Edu and LMSYS-Chat in small, in their layouts; no row of theirs."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from PIL import Image
from tiny_world import draw_png

URLS = [f"https://example.org/{name}.jpg" for name in ("one", "two", "three")]


def obelics_rows(*, built: bool) -> list[dict]:
    """A page of three images of which one was never fetched; a page whose only image is missing; one that is broken."""

    def cell(i: int):
        return {"bytes": draw_png(i) if i < 2 else None, "path": None} if built else URLS[i]

    def note(i: int) -> dict:
        return {
            "document_url": "https://example.org/page",
            "unformatted_src": URLS[i],
            "src": URLS[i],
            "formatted_filename": f"file {i}",
            "alt_text": "",
            "original_width": 8,
            "original_height": 8,
            "format": "jpeg",
        }

    def page(url: str, images: list, texts: list) -> dict:
        notes = [None if i is None else note(i) for i in images]
        return {
            "images": [None if i is None else cell(i) for i in images],
            "texts": texts,
            "metadata": json.dumps(notes),
            "general_metadata": json.dumps({"url": url, "warc_filename": "crawl-data/x.warc.gz"}),
        }

    broken = page("https://example.org/broken", [0, None], [None, "t"])
    broken["texts"] = ["t"]
    return [
        page("https://example.org/page", [None, 0, None, 2, None, 1], ["A\n\nB", None, "C", None, "D", None]),
        page("https://example.org/gone", [2, None], [None, "Alone."]),
        page("https://example.org/page", [1, None], [None, "The same address again."]),
        broken,
    ]


def write_obelics(folder: Path, *, built: bool = False) -> Path:
    (folder / "data").mkdir(parents=True)
    table = pa.Table.from_pylist(obelics_rows(built=built))
    pq.write_table(table, folder / "data/train-00000-of-00001.parquet", row_group_size=2)
    fetched = folder / "fetched"
    fetched.mkdir()
    for i, url in enumerate(URLS[:2]):
        name = hashlib.sha256(url.encode()).hexdigest()
        # One beside the others, one in a folder of its first letters, as large downloads lie.
        place = fetched / (f"{name}.png" if i else f"{name[:2]}/{name}.jpg")
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(draw_png(i))
    return folder


def mmc4_pages(*, encoded: bool = False) -> list[dict]:
    def info(name: str, place: object, likeness: float, number: int) -> dict:
        row = {
            "image_name": f"{name}.png",
            "raw_url": f"https://example.org/{name}.png",
            "matched_text_index": place,
            "matched_sim": likeness,
            "face_detections": None,
        }
        return row | ({"image_base64": base64.b64encode(draw_png(number)).decode()} if encoded else {})

    def page(url: str, texts: list[str], infos: list[dict]) -> dict:
        similar = [[0.1] * len(texts) for _ in infos]
        return {
            "url": url,
            "text_list": texts,
            "image_info": infos,
            "similarity_matrix": similar,
            "could_have_url_duplicate": 0,
        }

    return [
        page(
            "https://example.org/a",
            ["First.", "Second.", "Third."],
            [info("b1", 2, 0.30, 1), info("b0", 0, 0.20, 0)],
        ),
        page("https://example.org/b", ["Only."], [info("b1", 1, 0.3, 1)]),  # no such sentence
        page("https://example.org/c", ["One.", "Two."], [info("b0", 1, 0.3, 0), info("b1", 1, 0.4, 1)]),
    ]


def write_mmc4(folder: Path) -> Path:
    """One zipped shard and one plain one, with a broken line; the images in a folder."""
    folder.mkdir(parents=True)
    lines = [json.dumps(page) for page in mmc4_pages()]
    with zipfile.ZipFile(folder / "docs_no_face_shard_0_v2.jsonl.zip", "w") as archive:
        archive.writestr("docs_no_face_shard_0_v2.jsonl", "\n".join(lines) + "\n")
    (folder / "docs_no_face_shard_1_v2.jsonl").write_text(lines[0] + "\n\n" + lines[2][:40] + "\n")
    (folder / "images").mkdir()
    for i in range(2):
        (folder / f"images/b{i}.png").write_bytes(draw_png(i))
    return folder


def write_mmc4_tar(folder: Path) -> Path:
    """As OpenFlamingo's convert_mmc4_to_wds.py leaves it: a JSON a page, its images inside."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "000000000.tar", "w") as tar:
        for i, page in enumerate(mmc4_pages(encoded=True)):
            data = json.dumps(page).encode()
            info = tarfile.TarInfo(f"{i:09d}.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return folder


def encode_as(data: bytes, kind: str) -> bytes:
    """A picture in one of img2dataset's `encode_format`."""
    file = io.BytesIO()
    Image.open(io.BytesIO(data)).save(file, {"jpg": "jpeg"}.get(kind, kind))
    return file.getvalue()


def write_img2dataset(
    folder: Path, *, statistics: bool = True, table: bool = True, kind: str = "", failed: bool = False
) -> Path:
    """Two shards of four URLs each; in each one download fails, in the second also a resize and a caption is lost.

    Args:
        kind: encode_format, jpg, png or webp; unless told a PNG under the name of jpg.
        failed: the rows that failed stand in the tars too, without an image.
    """
    folder.mkdir(parents=True)
    for shard in range(2):
        rows, status = [], {"success": 0}
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as writer:
            for i in range(4):
                key = f"{shard:05d}{i:04d}"
                state, message = ("success", None) if i else ("failed_to_download", "HTTP Error 404: Not Found")
                if shard and i == 1:
                    state, message = "failed_to_resize", "image decoding error"
                row = {
                    "caption": f"picture {shard} {i}",
                    "NSFW": "UNLIKELY",
                    "similarity": 0.25 + i / 100,
                    "LICENSE": "?",
                    "url": f"https://example.org/{key}.jpg",
                    "key": key,
                    "status": state,
                    "error_message": message,
                    "width": 8 if state == "success" else None,
                    "height": 8 if state == "success" else None,
                    "original_width": 16 if state == "success" else None,
                    "original_height": 16 if state == "success" else None,
                    "exif": "{}" if state == "success" else None,
                    "sha256": hashlib.sha256(key.encode()).hexdigest() if state == "success" else None,
                }
                rows.append(row)
                status[message or "success"] = status.get(message or "success", 0) + 1
                if failed and state != "success":
                    writer.write({"__key__": key, "txt": row["caption"], "json": json.dumps(row).encode()})
                if state == "success":
                    image = draw_png(10 * shard + i)
                    image = encode_as(image, kind) if kind else image
                    members = {"__key__": key, kind or "jpg": image, "json": json.dumps(row).encode()}
                    lost = shard == 1 and i == 3  # neither a txt nor a caption in the json
                    if lost:
                        members["json"] = json.dumps(row | {"caption": None}).encode()
                    elif i != 2:  # save_caption can be off: then the json alone has it
                        members["txt"] = row["caption"]
                    writer.write(members)
        if table:
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
        if statistics:
            states = [row["status"] for row in rows]
            stats = {
                "count": 4,
                "successes": status["success"],
                "failed_to_download": states.count("failed_to_download"),
                "failed_to_resize": states.count("failed_to_resize"),
                "duration": 0.1,
                "start_time": 0.0,
                "end_time": 0.1,
                "status_dict": status,
            }
            (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
    return folder


def write_fineweb(folder: Path) -> Path:
    (folder / "sample/10BT").mkdir(parents=True)
    rows = [
        {
            "text": text,
            "id": f"<urn:uuid:{i:08d}>",
            "dump": "CC-MAIN-2013-20",
            "url": f"http://example.org/{i}",
            "file_path": "s3://commoncrawl/x.warc.gz",
            "language": "en",
            "language_score": 0.9,
            "token_count": len(text.split()),
            "score": 2.5 + i / 2,
            "int_score": 3,
        }
        for i, text in enumerate(
            ["The digit shown here.\n\nIs a small grey seven.", "  ", "above nine and below three"]
        )
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "sample/10BT/000_00000.parquet")
    return folder


def write_lmsys(folder: Path, *, lines: bool = False) -> Path:
    def chat(i: int, turns: list[tuple[str, str]], *, language="English", flagged=False, redacted=False) -> dict:
        return {
            "conversation_id": f"33f01939a744455c869cb234afca47f{i}",
            "model": "vicuna-13b",
            "conversation": [{"content": text, "role": role} for role, text in turns],
            "turn": len(turns) // 2,
            "language": language,
            "openai_moderation": [
                {"categories": {"hate": flagged}, "category_scores": {"hate": 0.1}, "flagged": flagged} for _ in turns
            ],
            "redacted": redacted,
        }

    pair = [("user", "What does <image> mean in HTML?"), ("assistant", "Nothing.")]
    rows = [
        chat(0, pair),
        chat(1, pair, language="German"),
        chat(2, pair, flagged=True),
        chat(3, [("user", "Hello NAME_1"), ("assistant", "Hi"), ("user", "Bye"), ("assistant", "Bye.")], redacted=True),
        chat(4, [("user", "One"), ("assistant", "")]),
    ]
    folder.mkdir(parents=True)
    if lines:
        (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        (folder / "data").mkdir()
        pq.write_table(pa.Table.from_pylist(rows), folder / "data/train-00000-of-00006-4feeb3f83346a0e9.parquet")
    return folder
