"""One row that is not of its layout: it is dropped or mended, and the run goes on with every other one."""

from __future__ import annotations

import base64
import copy
import importlib
import json
from collections import Counter
from pathlib import Path

import document_layouts as documents
import exam_layouts as exams
import instruct_layouts as layouts
import pytest
import vqa_layouts as vqa
from instruct_layouts import told_tokenizer
from tiny_world import draw_png

from data.prepare import main, prepare
from data.recipes import captions, questions
from data.recipes.record import Dropped, Record

ODD = (None, 5, 0, "x", "0.3", ["x"], [None], {"x": 1}, {})
# Recipe, its layout, the file that is changed, and the keys that lead to its rows.
ANNOTATIONS = {
    "aokvqa": (vqa.write_aokvqa, "aokvqa_v1p0_val.json", []),
    "chartqa": (vqa.write_chartqa, "val/val_human.json", []),
    "coco_captions": (layouts.coco_captions, "annotations/captions_train2017.json", ["annotations"]),
    "coco_karpathy": (layouts.coco_karpathy, "dataset_coco.json", ["images"]),
    "docvqa": (vqa.write_docvqa, "val_v1.0_withQT.json", ["data"]),
    "gqa": (exams.write_gqa, "val_balanced_questions.json", []),
    "llava_instruct": (layouts.llava_instruct, "llava_v1_5_mix665k.json", []),
    "mathvista": (exams.write_mathvista, "testmini.json", []),
    "okvqa": (vqa.write_okvqa, "mscoco_val2014_annotations.json", ["annotations"]),
    "refcoco": (exams.write_refcoco, "instances.json", ["annotations"]),
    "scienceqa": (exams.write_scienceqa, "problems.json", []),
    "sharegpt": (layouts.sharegpt, "sharegpt.json", []),
    "stvqa": (vqa.write_stvqa, "train_task_3.json", ["data"]),
    "textvqa": (vqa.write_textvqa, "TextVQA_0.5.1_val.json", ["data"]),
    "vizwiz": (vqa.write_vizwiz, "val.json", []),
    "vqav2": (vqa.write_vqav2, "v2_mscoco_val2014_annotations.json", ["annotations"]),
}


def run(name: str, path: Path) -> tuple[list[Record], Counter]:
    """The records of every split whose files are there, and how many rows were dropped for which reason."""
    recipe = importlib.import_module(f"data.recipes.{name}")
    questions._last.clear()  # files of one size within one tick of the clock
    captions.parse_json.cache_clear()
    made = []
    for split in recipe.SPLITS:
        try:
            parts = recipe.parts(path, split=split)
        except ValueError as error:
            assert " no " in str(error), error  # the file of another split
            continue
        new = [item for part in parts for item in recipe.convert(part)]
        keys = [item.key for item in new if isinstance(item, Record)]
        assert len(set(keys)) == len(keys)
        made += new
    records = [item for item in made if isinstance(item, Record)]
    return records, Counter(item.reason for item in made if isinstance(item, Dropped))


def odd_rows(value, keys: list[str]):
    """The content of a file with one value of its first row replaced by each of `ODD`."""
    rows = value
    for key in keys:
        rows = rows[key]
    first = 0 if isinstance(rows, list) else next(iter(rows))
    for key in rows[first]:
        for odd in ODD:
            new = copy.deepcopy(value)
            at = new
            for step in keys:
                at = at[step]
            at[first][key] = odd
            yield new


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_no_odd_value_of_a_row_ends_the_run(name, tmp_path):
    write, file, keys = ANNOTATIONS[name]
    write(tmp_path / "raw")
    path = tmp_path / "raw" / file
    content = json.loads(path.read_text())
    before, _ = run(name, tmp_path / "raw")
    for changed in odd_rows(content, keys):
        path.write_text(json.dumps(changed))
        run(name, tmp_path / "raw")
    path.write_text(json.dumps(content))
    assert [r.key for r in run(name, tmp_path / "raw")[0]] == [r.key for r in before]


def change(path: Path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_answers_of_another_form_drop_their_question_alone(tmp_path):
    vqa.write_okvqa(tmp_path / "o")
    change(tmp_path / "o/mscoco_val2014_annotations.json", lambda c: c["annotations"][0].update(answers=["a", "b"]))
    records, dropped = run("okvqa", tmp_path / "o")
    assert len(records) == 1 and dropped == {"row lacks a key or holds another type": 1}  # train's is whole


def test_a_photograph_without_its_sentences_is_dropped_alone(tmp_path):
    layouts.coco_karpathy(tmp_path)
    before, _ = run("coco_karpathy", tmp_path)
    change(tmp_path / "dataset_coco.json", lambda c: c["images"][0].pop("sentences"))
    records, dropped = run("coco_karpathy", tmp_path)
    assert [r.key for r in records] == [r.key for r in before if not r.key.startswith("1000-")]
    assert dropped == {"row lacks a key or holds another type": 1}


def test_a_page_with_a_similarity_in_words_is_dropped_alone(tmp_path):
    pages = documents.mmc4_pages(encoded=True)
    lines = [json.dumps(page) for page in pages]
    pages[0]["image_info"][0]["matched_sim"] = "0.3"
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(pages[0]), *lines]))
    records, dropped = run("mmc4", tmp_path)
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    before, lost = run("mmc4", tmp_path)
    assert len(records) == len(before) and dropped - lost == {"row lacks a key or holds another type": 1}


@pytest.mark.parametrize("choice", ["each", "first", "all"])
def test_photographs_of_one_id_have_keys_of_their_own_and_the_others_keep_theirs(tmp_path, tokenizer, choice):
    layouts.coco_captions(tmp_path / "raw")
    settings = {"path": str(tmp_path / "raw"), "captions": choice, "rows": 2, **told_tokenizer(tokenizer)}
    prepare("coco_captions", out=tmp_path / "before", **settings)
    before = {key for key, *_ in layouts.read_split(tmp_path / "before", "train")}
    file = tmp_path / "raw/annotations/captions_train2017.json"
    change(file, lambda c: c["images"].append(c["images"][0] | {"file_name": "000000000025.jpg"}))
    done = prepare("coco_captions", out=tmp_path / "out", **settings)
    after = {key: images for key, _, images, _ in layouts.read_split(tmp_path / "out", "train")}
    more = sorted(after.keys() - before)
    assert before < after.keys() and more == [f"9-row-3-{k}" for k in range(len(more))] and more
    assert done["notes"]["train"]["id of an earlier sample: kept, its key has the row's number"] == len(more)
    change(tmp_path / "raw/annotations/captions_val2017.json", lambda c: c["images"].append(c["images"][0]))
    done = prepare("coco_captions", out=tmp_path / "val", splits=("val",), **settings)
    assert done["counts"]["coco_captions"] == {"val": 2}


def test_one_odd_first_row_is_no_other_layout(tmp_path):
    rows = [{"id": 1}, {"id": 2, "conversations": layouts.turns("Q", "A")}]
    records, dropped = run("sharegpt", layouts.put_json(tmp_path / "rows.json", rows))
    assert [r.record["id"] for r in records] == [2] and dropped == {"no turns": 1}


def test_a_layout_that_the_cut_into_parts_did_not_foresee_is_one_line(tokenizer, tmp_path, capsys, monkeypatch):
    from data.recipes import okvqa

    def refuse(*arguments, **settings):
        raise AttributeError("'list' object has no attribute 'get'")

    monkeypatch.setattr(okvqa, "cut_parts", refuse)
    raw = vqa.write_okvqa(tmp_path / "raw")
    told = [f"{k}={v}" for k, v in told_tokenizer(tokenizer).items()]
    assert main(["source=okvqa", f"path={raw}", f"out={tmp_path / 'out'}", *told]) == 2
    line = capsys.readouterr().err
    assert f"{raw} is not of the layout of okvqa (AttributeError: 'list'" in line and line.count("\n") == 1


def test_an_image_of_a_page_that_was_never_encoded_is_left_out_of_it(tmp_path):
    page = {"text_list": ["a", "b"], "url": "u"}
    page["image_info"] = [
        {"matched_text_index": 0, "matched_sim": 0.3, "image_base64": data, "image_name": "x"}
        for data in (base64.b64encode(draw_png(1)).decode(), None)
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps(page))
    (record,), dropped = run("mmc4", tmp_path)
    assert len(record.images) == 1 and not dropped
    assert record.notes == ["image missing: left out of its document"]
