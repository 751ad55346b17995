"""Small data sets of exams and regions in the layouts of the originals, with their quirks; no row of theirs."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tiny_world import draw_png
from vqa_layouts import write_images, write_json


def write_parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def cell(seed: int) -> dict:
    return {"bytes": draw_png(seed), "path": f"{seed}.png"}


def write_gqa(folder: Path) -> Path:
    """Two questions of an image, one of a missing image, one without an answer."""
    types = {"structural": "query", "semantic": "attr", "detailed": "color"}
    rows = {
        "201": {"imageId": "n1", "question": "What color is it?", "answer": "red", "types": types, "isBalanced": True},
        "202": {"imageId": "n1", "question": "Is it red?", "answer": "yes", "types": types | {"structural": "verify"}},
        "203": {"imageId": "n9", "question": "Where?", "answer": "left", "types": types},
        "204": {"imageId": "n2", "question": "Who?", "answer": None, "types": types},
    }
    for split in ("train_balanced", "val_balanced", "testdev_balanced"):
        write_json(folder / f"{split}_questions.json", rows)
    write_images(folder / "images", "n1.jpg", "n2.jpg")
    return folder


def scienceqa_rows() -> dict[str, dict]:
    common = {
        "subject": "natural science",
        "topic": "physics",
        "grade": "grade8",
        "hint": "",
        "lecture": "",
        "task": "",
    }
    return {
        "3": common | {"question": "Which is cold?", "choices": ["ice", "fire"], "answer": 0, "image": "image.png"},
        "7": common | {"question": "2+2?", "choices": ["3", "4", "5"], "answer": 1, "image": None, "hint": "Count."},
        "9": common | {"question": "Broken?", "choices": ["a", "b"], "answer": 2, "image": None},
    }


def write_scienceqa(folder: Path) -> Path:
    rows = {}
    for number, split in enumerate(("train", "val", "test")):
        for name, row in scienceqa_rows().items():
            rows[f"{number}{name}"] = row | {"split": split}
            if row["image"]:
                write_images(folder / split / f"{number}{name}", "image.png")
    write_json(folder / "problems.json", rows)
    return folder


def write_scienceqa_parquet(folder: Path) -> Path:
    for split in ("train", "validation", "test"):
        rows = [row | {"image": cell(5) if row["image"] else None} for row in scienceqa_rows().values()]
        write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", rows)
    return folder


def write_mmmu(folder: Path) -> Path:
    """Markers in the question and in an option, an image nobody names, an open question with two answers."""
    nothing = {f"image_{i}": None for i in range(1, 8)} | {
        "explanation": "",
        "subfield": "Theory",
        "img_type": "['Plots']",
    }
    for split in ("dev", "validation"):
        rows = [
            nothing
            | {
                "id": f"{split}_Art_Theory_1",
                "question": "Compare <image 1> and <image 2> please",
                "options": "['the first', '<image 2>', \"it's none\"]",
                "answer": "B",
                "question_type": "multiple-choice",
                "image_1": cell(1),
                "image_2": cell(2),
            },
            nothing
            | {
                "id": f"{split}_Art_Theory_2",
                "question": "How much?\n<image 3>",
                "options": "[]",
                "answer": "['1,000', '1000 $']",
                "question_type": "open",
                "image_1": cell(3),
            },
            nothing
            | {"id": f"{split}_Art_Theory_3", "question": "?", "options": "[]", "answer": "?", "question_type": "open"},
        ]
        write_parquet(folder / "Art_Theory" / f"{split}-00000-of-00001.parquet", rows)
    return folder


def mathvista_rows() -> dict[str, dict]:
    about = {
        "task": "figure question answering",
        "category": "math-targeted-vqa",
        "context": "bar chart",
        "grade": "college",
    }
    about |= {"skills": ["arithmetic reasoning", "algebra"], "language": "english", "source": "X", "img_height": 8}
    common = {"image": "images/1.jpg", "unit": None, "metadata": about}
    free = {"question_type": "free_form", "choices": None}
    return {
        "1": common
        | free
        | {"question": "How long?", "answer": "1.2", "answer_type": "float", "precision": 1.0, "unit": "m"},
        "2": common
        | {
            "question": "Which?",
            "answer": "8/11",
            "answer_type": "text",
            "precision": None,
            "choices": ["3/11", "8/11"],
        }
        | {"question_type": "multi_choice"},
        "3": common | free | {"question": "How many?", "answer": None, "answer_type": "integer", "precision": None},
    }


def write_mathvista(folder: Path) -> Path:
    write_json(folder / "testmini.json", mathvista_rows())
    write_images(folder / "images", "1.jpg")
    return folder


def write_mathvista_parquet(folder: Path) -> Path:
    query = "Hint: a number.\nQuestion: How long?"
    rows = [{"pid": name} | row | {"decoded_image": cell(1), "query": query} for name, row in mathvista_rows().items()]
    write_parquet(folder / "data" / "testmini-00000-of-00001.parquet", rows)
    return folder


def write_refcoco(folder: Path) -> Path:
    """Two sentences of a region, a region that is not among the instances."""
    refs = []
    for number, split in enumerate(("train", "val", "testA", "testB")):
        sentences = [
            {"sent_id": 10 * number + k, "raw": f"{word} dog", "sent": f"{word} dog", "tokens": [word, "dog"]}
            for k, word in enumerate(("left", "big"))
        ]
        refs.append(
            {"ref_id": number, "ann_id": 5, "image_id": 42, "split": split, "sentences": sentences, "category_id": 1}
        )
        refs.append({"ref_id": 90 + number, "ann_id": 6, "image_id": 42, "split": split, "sentences": sentences})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    photograph = {"id": 42, "file_name": "COCO_train2014_000000000042.jpg", "width": 200, "height": 100}
    instances = {"images": [photograph], "annotations": [{"id": 5, "image_id": 42, "bbox": [20, 10, 100, 50]}]}
    write_json(folder / "instances.json", instances | {"categories": []})
    write_images(folder / "train2014", photograph["file_name"])
    return folder


def write_refcoco_parquet(folder: Path) -> Path:
    row = {"question_id": "469306", "image": cell(3), "bbox": [2.0, 4.0, 4.0, 4.0], "answer": ["left", "small"]}
    row |= {"question": "Please describe", "file_name": "COCO_train2014_1.jpg", "iscrowd": 0}
    for split in ("val", "test", "testA", "testB"):
        write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", [row])
    return folder


def write_evil_refs(folder: Path) -> Path:
    class Runs:
        def __reduce__(self):
            return (json.loads, ('"ran"',))

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "refs(unc).p").write_bytes(pickle.dumps([Runs()], protocol=2))
    return folder
