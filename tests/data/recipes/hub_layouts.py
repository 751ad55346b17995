"""Data sets as their copies on the hub hold them: parquet with the image in the row; the columns are the copies' own.

Each is made of the files that `vqa_layouts` and `instruct_layouts` write in the original layout, so that both can be
compared. The columns are those of the copy that is named, as far as its card or a reader of it says.
"""

from __future__ import annotations

import json
from pathlib import Path

import instruct_layouts
import pyarrow as pa
import pyarrow.parquet as pq
import vqa_layouts


def put_parquet(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


def cell(file: Path) -> dict:
    return {"bytes": file.read_bytes(), "path": None}


def load(file: Path):
    return json.loads(file.read_text())


def vqav2(raw: Path, out: Path) -> None:
    """lmms-lab/VQAv2: questions and annotations joined, val alone."""
    vqa_layouts.write_vqav2(raw)
    questions = load(raw / "v2_OpenEnded_mscoco_val2014_questions.json")["questions"]
    notes = {n["question_id"]: n for n in load(raw / "v2_mscoco_val2014_annotations.json")["annotations"]}
    rows = []
    for row in questions:
        image = raw / f"val2014/COCO_val2014_{row['image_id']:012d}.jpg"
        if row["question_id"] in notes and image.exists() and row["question_id"] != 25000:  # it repeats
            rows.append(notes[row["question_id"]] | row | {"image": cell(image)})
    put_parquet(out / "data/validation-00000-of-00001.parquet", rows)


def okvqa(raw: Path, out: Path) -> None:
    """lmms-lab/OK-VQA: val2014 alone; ten words an answer, of one form."""
    vqa_layouts.write_okvqa(raw)
    (row,) = load(raw / "OpenEnded_mscoco_val2014_questions.json")["questions"]
    (note,) = load(raw / "mscoco_val2014_annotations.json")["annotations"]
    image = cell(raw / "val2014/COCO_val2014_000000051606.jpg")
    row = {"question_id": "516065", "image": image, "question": row["question"], "answer_type": "other"}
    answers = [a["answer"] for a in note["answers"]]
    row |= {"answers": answers, "question_type": note["question_type"]}
    put_parquet(out / "data/val2014-00000-of-00001.parquet", [row])


def aokvqa(raw: Path, out: Path) -> None:
    """HuggingFaceM4/A-OKVQA: the direct answers are the text of a list."""
    vqa_layouts.write_aokvqa(raw)
    for split, name in (("train", "train"), ("val", "validation")):
        rows = load(raw / f"aokvqa_v1p0_{split}.json")
        image = cell(raw / f"{split}2017/000000299207.jpg")
        left_out = ("split", "image_id")
        rows = [{k: v for k, v in row.items() if k not in left_out} | {"image": image} for row in rows]
        rows = [row | {"direct_answers": str(row["direct_answers"])} for row in rows]
        put_parquet(out / f"data/{name}-00000-of-00001.parquet", rows)


def textvqa(raw: Path, out: Path) -> None:
    """lmms-lab/textvqa: the original's columns and the recognised text."""
    vqa_layouts.write_textvqa(raw)
    image = cell(raw / "train_images/0054c91397f2fe05.jpg")
    for split, name in (("train", "train"), ("val", "validation")):
        seen = load(raw / f"TextVQA_Rosetta_OCR_v0.2_{split}.json")["data"][0]["ocr_tokens"]
        rows = load(raw / f"TextVQA_0.5.1_{split}.json")["data"]
        put_parquet(
            out / f"data/{name}-00000-of-00001.parquet", [r | {"image": image, "ocr_tokens": seen} for r in rows]
        )


def vizwiz(raw: Path, out: Path) -> None:
    """lmms-lab/VizWiz-VQA: val alone; the file's name is the question's id."""
    vqa_layouts.write_vizwiz(raw)
    rows = []
    for row in load(raw / "val.json"):
        answers = [a["answer"] for a in row["answers"]]
        new = {"question_id": row["image"], "image": cell(raw / f"val/{row['image']}"), "question": row["question"]}
        rows.append(new | {"answers": answers, "category": row["answer_type"]})
    put_parquet(out / "data/val-00000-of-00001.parquet", rows)


def pope(raw: Path, out: Path) -> None:
    """lmms-lab/POPE: the three categories one after the other."""
    vqa_layouts.write_pope(raw)
    rows = []
    for category in ("random", "popular", "adversarial"):
        for line in (raw / f"coco_pope_{category}.json").read_text().splitlines():
            row = json.loads(line)
            new = {"id": str(len(rows)), "question_id": str(row["question_id"]), "question": row["text"]}
            new |= {"answer": row["label"], "image_source": Path(row["image"]).stem, "category": category}
            rows.append(new | {"image": cell(raw / f"val2014/{row['image']}")})
    put_parquet(out / "data/test-00000-of-00001.parquet", rows)


def stvqa(raw: Path, out: Path) -> None:
    """vikhyatk/st-vqa: a row a photograph, with its questions; train alone."""
    vqa_layouts.write_stvqa(raw)
    rows = []
    for i, row in enumerate(load(raw / "train_task_3.json")["data"]):
        image = cell(raw / ("train_imgs" if i % 2 else ".") / f"coco-text/{row['file_name']}")
        rows.append({"image": image, "qas": [{"question": row["question"], "answers": row["answers"]}]})
    put_parquet(out / "data/train-00000-of-00001.parquet", rows)


def coco_captions(raw: Path, out: Path) -> None:
    """lmms-lab/COCO-Caption2017: a row a photograph with all its captions; val alone."""
    instruct_layouts.coco_captions(raw)
    data = load(raw / "annotations/captions_val2017.json")
    notes = sorted(data["annotations"], key=lambda note: note["id"])
    rows = []
    for image in data["images"]:
        texts = [note["caption"] for note in notes if note["image_id"] == image["id"]]
        new = {"question_id": image["file_name"], "question": "Please describe it.", "answer": texts, "id": image["id"]}
        rows.append(new | {"file_name": image["file_name"], "image": cell(raw / f"val2017/{image['file_name']}")})
    put_parquet(out / "data/val-00000-of-00001.parquet", rows)


def coco_karpathy(raw: Path, out: Path) -> None:
    """yerevann/coco-karpathy: rows without the photographs, restval a split of its own."""
    instruct_layouts.coco_karpathy(raw)
    names = {"train": "train", "restval": "restval", "val": "validation", "test": "test"}
    for split, name in names.items():
        rows = [row for row in load(raw / "dataset_coco.json")["images"] if row["split"] == split]
        rows = [row | {"sentences": [s["raw"] for s in row["sentences"]], "url": "http://x"} for row in rows]
        put_parquet(out / f"data/{name}-00000-of-00001.parquet", rows)
