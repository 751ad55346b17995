"""Small data sets of questions in the layouts of the originals, with their quirks; no row of theirs."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_world import draw_png


def write_json(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_images(folder: Path, *names: str) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(draw_png(100 + i))  # readers go by the content, not by the suffix


def ten(*answers: str) -> list[dict]:
    """Ten annotators: the first answers once each, the last one for the rest."""
    given = [*answers, *[answers[-1]] * (10 - len(answers))]
    return [{"answer": a, "answer_confidence": "yes", "answer_id": i + 1} for i, a in enumerate(given)]


def write_vqav2(folder: Path) -> Path:
    """Train: two images, an id that repeats, a lost annotation, empty answers, an image that is missing."""
    questions = [
        {"image_id": 9, "question": "What is it?", "question_id": 9000},
        {"image_id": 25, "question": "Is it red?", "question_id": 25000},
        {"image_id": 9, "question": "How many?", "question_id": 9001},
        {"image_id": 9, "question": "Where?", "question_id": 9002},  # no annotation
        {"image_id": 9, "question": "Who?", "question_id": 9003},  # ten empty answers
        {"image_id": 77, "question": "Why?", "question_id": 77000},  # no image
        {"image_id": 25, "question": "Is it blue?", "question_id": 25000},  # the id again
        {"image_id": 0, "question": "Is zero an id?", "question_id": 0},
    ]
    rows = [
        (9000, 9, "what is", "other", ten("cat", "dog", "dog", "cat")),  # a tie is not one: cat 8, dog 2
        (25000, 25, "is it", "yes/no", ten("yes", "no")),
        (9001, 9, "how many", "number", ten("2", "3", "", "3", "2", "2", "3", "4", "5", "6")),  # 2 and 3 thrice
        (9003, 9, "who", "other", ten("")),
        (77000, 77, "why", "other", ten("because")),
        (25000, 25, "is it", "yes/no", ten("no")),
        (0, 0, "is", "yes/no", ten("yes")),
        (5, 9, "what", "other", ten("lost")),  # no question
    ]
    annotations = [
        {
            "question_type": kind,
            "multiple_choice_answer": answers[0]["answer"],
            "answers": answers,
            "image_id": image,
            "answer_type": answer_type,
            "question_id": name,
        }
        for name, image, kind, answer_type, answers in rows
    ]
    header = {"info": {}, "license": {}, "data_type": "mscoco"}
    for split in ("train2014", "val2014"):
        top = header | {"data_subtype": split}
        write_json(
            folder / f"v2_OpenEnded_mscoco_{split}_questions.json",
            top | {"task_type": "Open-Ended", "questions": questions},
        )
        write_json(folder / f"v2_mscoco_{split}_annotations.json", top | {"annotations": annotations})
        names = [f"{split}/COCO_{split}_{i:012d}.jpg" for i in (0, 9, 25)]
        write_images(folder, *names)
    return folder


def write_okvqa(folder: Path) -> Path:
    """The header (`question_types`) is from memory: not held against a real file yet."""
    raw = ["racing", "racing", "riding bikes", "riding bikes", "racing", "racing", "sport", "sport", "race", "race"]
    stems = ["race", "race", "ride bike", "ride bike", "race", "race", "sport", "sport", "race", "race"]
    answers = [
        {"answer_id": i + 1, "raw_answer": r, "answer": s, "answer_confidence": "yes"}
        for i, (r, s) in enumerate(zip(raw, stems))
    ]
    types = {"four": "Sports and Recreation", "other": "Other", "two": "Brands, Companies and Products"}
    question = {"image_id": 51606, "question": "What is the hairstyle called?", "question_id": 516065}
    annotation = {
        "image_id": 51606,
        "question_id": 516065.0,
        "question_type": "two",
        "answer_type": "other",
        "answers": answers,
        "confidence": 3,
    }
    for split in ("train2014", "val2014"):
        write_json(folder / f"OpenEnded_mscoco_{split}_questions.json", {"questions": [question]})
        write_json(folder / f"mscoco_{split}_annotations.json", {"question_types": types, "annotations": [annotation]})
        write_images(folder, f"{split}/COCO_{split}_000000051606.jpg")
    return folder


def write_aokvqa(folder: Path) -> Path:
    rows = [
        {
            "split": "train",
            "image_id": 299207,
            "question_id": "22MexNkBPpdZGX6sxbxVBH",
            "question": "What is the man by the bags awaiting?",
            "choices": ["skateboarder", "train", "delivery", "cab"],
            "correct_choice_idx": 3,
            "direct_answers": ["ride", "ride", "bus", "taxi", "cab", "cab", "ride", "travelling", "traffic", "taxi"],
            "difficult_direct_answer": False,
            "rationales": ["He has luggage.", "He waits.", "He looks."],
        },
        {
            "split": "train",
            "image_id": 299207,
            "question_id": "2aVb8DyGs3bYXkBqdUZmzU",
            "question": "Which year?",
            "choices": ["1", "2", "3", "4"],
            "correct_choice_idx": 4,  # none of them
            "direct_answers": ["2001"] * 10,
            "difficult_direct_answer": True,
            "rationales": [],
        },
    ]
    for split in ("train", "val"):
        write_json(folder / f"aokvqa_v1p0_{split}.json", [row | {"split": split} for row in rows])
        write_images(folder, f"{split}2017/000000299207.jpg")
    test = [{k: v for k, v in rows[0].items() if k not in ("correct_choice_idx", "direct_answers", "rationales")}]
    write_json(folder / "aokvqa_v1p0_test.json", test)
    return folder


def write_textvqa(folder: Path, *, ocr: bool = True) -> Path:
    nobody = "answering does not require reading text in the image"
    rows = [
        {
            "question": "what is the brand of phone?",
            "image_id": "0054c91397f2fe05",
            "image_classes": ["Belt", "Mobile phone"],
            "flickr_original_url": "https://example.org/o.jpg",
            "flickr_300k_url": "https://example.org/300k.jpg",
            "image_width": 1024,
            "image_height": 730,
            "answers": ["nokia", "nokia", "Nokia", "nokia", nobody, "nokia", "toshiba", "nokia", "nokia", "nokia"],
            "question_tokens": ["what", "is", "the", "brand", "of", "phone"],
            "question_id": 0,
            "set_name": "train",
        }
    ]
    for split in ("train", "val"):
        top = {"dataset_type": split, "dataset_name": "textvqa", "dataset_version": "0.5.1"}
        write_json(folder / f"TextVQA_0.5.1_{split}.json", top | {"data": [row | {"set_name": split} for row in rows]})
        if ocr:
            seen = [{"image_id": "0054c91397f2fe05", "ocr_tokens": ["NOKIA", "6:04"], "ocr_info": []}]
            write_json(folder / f"TextVQA_Rosetta_OCR_v0.2_{split}.json", {"data": seen})
    write_images(folder, "train_images/0054c91397f2fe05.jpg")
    return folder


def write_textvqa_flamingo(folder: Path) -> Path:
    """OpenFlamingo's copy in the VQA format."""
    question = {"question": "what is the brand?", "image_id": "0054c91397f2fe05", "question_id": 34602}
    annotation = {"question_id": 34602, "image_id": "0054c91397f2fe05", "answers": [{"answer": "nokia"}] * 10}
    write_json(folder / "val_questions_vqa_format.json", {"questions": [question]})
    write_json(folder / "val_annotations_vqa_format.json", {"annotations": [annotation]})
    write_images(folder, "train_images/0054c91397f2fe05.jpg")
    return folder


CHARTS = {
    "train": [
        ("human", "41699051005347.png", "How many food items are shown?", "14"),
        ("human", "41699051005347.png", "What is the difference?", "0.57"),
        ("augmented", "two_col_1.png", "What was the share in 2019?", "27.5%"),
        ("augmented", "41699051005347.png", "Which is the lowest?", "Lamb"),
    ],
}
CHARTS["val"] = CHARTS["test"] = CHARTS["train"]


def write_chartqa(folder: Path) -> Path:
    for split, rows in CHARTS.items():
        for kind in ("human", "augmented"):
            made = [{"imgname": i, "query": q, "label": a} for k, i, q, a in rows if k == kind]
            write_json(folder / split / f"{split}_{kind}.json", made)
        write_images(folder / split, *[f"png/{row[1]}" for row in rows])
        write_json(folder / split / "annotations/41699051005347.json", {"type": "bar"})
    return folder


def write_chartqa_parquet(folder: Path, *, lmms: bool = False) -> Path:
    """HuggingFaceM4/ChartQA, whose columns are from memory: not held against a real file yet; or lmms-lab/ChartQA."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "data").mkdir(parents=True)
    pictures = {name: draw_png(i) for i, name in enumerate({row[1]: 0 for row in CHARTS["train"]})}
    for split, rows in CHARTS.items():
        if lmms and split != "test":
            continue
        table = []
        for kind, image, query, label in rows:
            cell = {"bytes": pictures[image], "path": None}
            if lmms:
                table.append({"type": f"{kind}_test", "question": query, "answer": label, "image": cell})
            else:
                number = 0 if kind == "human" else 1
                table.append({"image": cell, "query": query, "label": [label], "human_or_machine": number})
        pq.write_table(pa.Table.from_pylist(table), folder / f"data/{split}-00000-of-00001.parquet")
    return folder


def write_stvqa(folder: Path) -> Path:
    """`question_id`, `set_name` and the header are from memory: not held against a real file yet."""
    rows = []
    for i in range(40):
        name = f"COCO_train2014_{i:012d}.jpg"
        rows.append(
            {
                "file_path": f"coco-text/{name}",
                "question": f"What does sign {i} say?",
                "dataset": "coco-text",
                "file_name": name,
                "set_name": "train",
                "question_id": i,
                "answers": ["stop", "STOP"] if i % 2 else ["exit"],
            }
        )
    del rows[3]["file_path"]  # loaders differ in which of the two they read
    write_json(folder / "train_task_3.json", {"task": 3, "set_name": "train", "data": rows})
    # Half of the images lie by file_path, half under train_imgs.
    write_images(folder, *[f"{'train_imgs/' if i % 2 else ''}coco-text/{r['file_name']}" for i, r in enumerate(rows)])
    return folder


def docvqa_rows(split: str) -> list[dict]:
    common = {"docId": 279, "ucsf_document_id": "xnbl0037", "data_split": split}
    page = "documents/xnbl0037_1.png"
    return [
        common
        | {
            "questionId": 337,
            "question": "what is the date mentioned in this letter?",
            "question_types": ["handwritten", "form"],
            "image": page,
            "ucsf_document_page_no": "1",
            "answers": ["1/8/93"],
        },
        common
        | {
            "questionId": 338,
            "question": "what is the contact person name?",
            "question_types": ["form"],
            "image": page,
            "ucsf_document_page_no": "1",
            "answers": ["P. Carter", "p. carter"],
        },
    ]


def write_docvqa(folder: Path, *, with_types: bool = True, images: str = "documents") -> Path:
    for split in ("train", "val"):
        rows = docvqa_rows(split)
        if not with_types:
            rows = [{k: v for k, v in row.items() if k != "question_types"} for row in rows]
        top = {"dataset_name": "SP-DocVQA", "dataset_version": "1.0", "dataset_split": split}
        name = f"{split}_v1.0_withQT.json" if with_types else f"{split}_v1.0.json"
        write_json(folder / name, top | {"data": rows})
    write_images(folder, f"{images}/xnbl0037_1.png")
    return folder


def write_docvqa_parquet(folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    cell = {"bytes": draw_png(5), "path": "xnbl0037_1.png"}
    rows = [row | {"image": cell, "questionId": str(row["questionId"])} for row in docvqa_rows("val")]
    pq.write_table(pa.Table.from_pylist(rows), folder / "validation-00000-of-00001.parquet")
    return folder


def write_pope(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    name = "COCO_val2014_000000310196.jpg"
    for category, thing in (("random", "car"), ("popular", "person"), ("adversarial", "dining table")):
        rows = [
            {"question_id": 1, "image": name, "text": "Is there a snowboard in the image?", "label": "yes"},
            {"question_id": 2, "image": name, "text": f"Is there a {thing} in the image?", "label": "no"},
        ]
        (folder / f"coco_pope_{category}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_images(folder, f"val2014/{name}")
    return folder


def write_vizwiz(folder: Path) -> Path:
    for split in ("train", "val"):
        rows = []
        for i, (answers, kind, answerable) in enumerate(
            [
                (["basil leaves"] * 3 + ["basil"] * 5 + ["unsuitable"] * 2, "other", 1),
                (["unanswerable"] * 9 + ["can"], "unanswerable", 0),
            ]
        ):
            given = [{"answer": a, "answer_confidence": "yes"} for a in answers]
            name = f"VizWiz_{split}_{i:08d}.jpg"
            question = "What is this? And what is it called?"
            rows.append(
                {"image": name, "question": question, "answers": given, "answer_type": kind, "answerable": answerable}
            )
        write_json(folder / f"{split}.json", rows)
        write_images(folder, *[f"{split}/{row['image']}" for row in rows])
    return folder


def write_vizwiz_flamingo(folder: Path) -> Path:
    name = "VizWiz_val_00000000.jpg"
    question = {"image_id": name, "question": "What is it?", "question_id": 0}
    annotation = {
        "image_id": name,
        "question_id": 0,
        "answer_type": "other",
        "answers": [{"answer": "can", "answer_confidence": "yes"}] * 10,
    }
    write_json(folder / "val_questions_vqa_format.json", {"info": {}, "questions": [question]})
    write_json(folder / "val_annotations_vqa_format.json", {"info": {}, "annotations": [annotation]})
    write_images(folder, f"val/{name}")
    return folder
