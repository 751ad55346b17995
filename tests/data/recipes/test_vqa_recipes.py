"""Recipes of data sets of questions about images, against records written by hand."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from pathlib import Path

import pytest
import vqa_layouts
from hypothesis import given
from hypothesis import strategies as st
from tiny_world import draw_png

from data.recipes.questions import Question, converse, count_answers, group_questions
from data.recipes.record import Dropped, Record
from fastvlm.data.shards import count_images

SHORT = "\nAnswer the question using a single word or phrase."


def run(name: str, folder: Path, split: str, **options) -> tuple[list[Record], Counter]:
    """Every record of a split, and how many rows were dropped for which reason."""
    recipe = importlib.import_module(f"data.recipes.{name}")
    made = [item for part in recipe.parts(folder, split=split, **options) for item in recipe.convert(part)]
    records = [item for item in made if isinstance(item, Record)]
    keys = [record.key for record in records]
    assert len(set(keys)) == len(keys)
    for record in records:
        assert count_images(record.record) == len(record.images)
        json.dumps(record.record)
    return records, Counter(item.reason for item in made if isinstance(item, Dropped))


def ask(*turns: tuple[str, str]) -> list[dict]:
    messages = []
    for i, (question, answer) in enumerate(turns):
        parts = [{"type": "image"}, {"type": "text", "text": question}]
        messages += [{"role": "user", "content": question if i else parts}, {"role": "assistant", "content": answer}]
    return messages


def test_vqav2_train_groups_by_image_and_learns_the_most_frequent_answer(tmp_path):
    records, dropped = run("vqav2", vqa_layouts.write_vqav2(tmp_path), "train")
    assert [r.record for r in records] == [
        {
            "messages": ask((f"What is it?{SHORT}", "cat"), ("How many?", "2")),
            "id": 9,
            "source": "vqav2",
            "meta": {"question_ids": [9000, 9001], "types": ["other", "number"], "image_id": 9, "turns": 2},
        },
        {
            "messages": ask((f"Is it red?{SHORT}", "no"), ("Is it blue?", "no")),
            "id": 25,
            "source": "vqav2",
            "meta": {"question_ids": [25000, 25000], "types": ["yes/no"] * 2, "image_id": 25, "turns": 2},
        },
        {
            "messages": ask((f"Is zero an id?{SHORT}", "yes")),
            "id": 0,
            "source": "vqav2",
            "meta": {"question_ids": [0], "types": ["yes/no"], "image_id": 0, "turns": 1},
        },
    ]
    assert records[0].images == [tmp_path / "train2014/COCO_train2014_000000000009.jpg"]
    assert records[1].notes == ["question id repeats"]
    assert dropped == {
        "question without an annotation": 1,
        "annotation without a question": 1,
        "no answer": 1,
        "image missing": 1,
    }


def test_vqav2_val_holds_one_question_a_record_with_all_ten_answers(tmp_path):
    records, dropped = run("vqav2", vqa_layouts.write_vqav2(tmp_path), "val")
    assert len(records) == 5 and sum(dropped.values()) == 4
    assert records[2].record == {
        "messages": ask((f"How many?{SHORT}", "2")),
        "id": 9001,
        "source": "vqav2",
        "meta": {
            "question_id": 9001,
            "image_id": 9,
            "type": "number",
            "turns": 1,
            "question_type": "how many",
            "answers": ["2", "3", "", "3", "2", "2", "3", "4", "5", "6"],
        },
    }
    # Two questions with one id: each with its own annotation, both counted, and the result file keeps the id.
    twice = [r for r in records if r.record["id"] == 25000]
    assert [r.record["meta"]["answers"].count("yes") for r in twice] == [1, 0]
    assert [r.key for r in twice] == ["25000-1", "25000-6"]


def test_prompt_and_grouping_are_options(tmp_path):
    vqa_layouts.write_vqav2(tmp_path)
    (first, *_), _ = run("vqav2", tmp_path, "train", prompt="every")
    assert first.record["messages"] == ask((f"What is it?{SHORT}", "cat"), (f"How many?{SHORT}", "2"))
    (first, *_), _ = run("vqav2", tmp_path, "train", prompt="none")
    assert first.record["messages"] == ask(("What is it?", "cat"), ("How many?", "2"))
    records, _ = run("vqav2", tmp_path, "train", grouped=False)
    assert [r.record["id"] for r in records] == [9000, 25000, 9001, 25000, 0]
    assert records[0].record["meta"] == {
        "question_id": 9000,
        "image_id": 9,
        "type": "other",
        "turns": 1,
        "question_type": "what is",
    }


def test_all_distinct_answers_never_meet_in_one_conversation(tmp_path):
    records, _ = run("vqav2", vqa_layouts.write_vqav2(tmp_path), "train", answers="all_distinct")
    image = [r.record["messages"] for r in records if r.record["id"] == 9]
    assert image[0] == ask((f"What is it?{SHORT}", "cat"), ("How many?", "2"))
    assert image[1] == ask((f"What is it?{SHORT}", "dog"), ("How many?", "3"))
    assert image[2:] == [ask((f"How many?{SHORT}", answer)) for answer in "456"]


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_the_cut_into_parts_changes_no_record(tmp_path, rows):
    vqa_layouts.write_vqav2(tmp_path)
    whole, _ = run("vqav2", tmp_path, "train")
    assert run("vqav2", tmp_path, "train", rows=rows)[0] == whole


def test_other_annotations_make_other_parts(tmp_path):
    from data.recipes import vqav2

    before = vqav2.parts(vqa_layouts.write_vqav2(tmp_path), split="val")
    assert vqav2.parts(tmp_path, split="val") == before
    file = tmp_path / "v2_mscoco_val2014_annotations.json"
    file.write_text(file.read_text() + " ")
    assert vqav2.parts(tmp_path, split="val") != before


@pytest.mark.parametrize("name", ["vqav2", "aokvqa", "textvqa", "stvqa", "docvqa", "vizwiz"])
def test_a_test_split_without_answers_is_refused_with_the_reason(name, tmp_path):
    recipe = importlib.import_module(f"data.recipes.{name}")
    with pytest.raises(ValueError, match="split=test: its answers are not public.*; take train or val"):
        recipe.parts(tmp_path, split="test")


def test_mistakes_end_in_a_line_that_names_file_and_fix(tmp_path):
    with pytest.raises(ValueError, match="no v2_OpenEnded_mscoco_val2014_questions.json there or one folder down"):
        run("vqav2", tmp_path, "val")
    vqa_layouts.write_vqav2(tmp_path)
    with pytest.raises(ValueError, match="answers=majorty is not one of majority, all_distinct; did you mean majority"):
        run("vqav2", tmp_path, "val", answers="majorty")
    (tmp_path / "v2_mscoco_val2014_annotations.json").write_text('{"annotations": [')
    with pytest.raises(ValueError, match="v2_mscoco_val2014_annotations.json is not JSON"):
        run("vqav2", tmp_path, "val")
    vqa_layouts.write_json(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": {}})
    with pytest.raises(ValueError, match="holds no list of rows under 'annotations'"):
        run("vqav2", tmp_path, "val")


def test_okvqa_learns_raw_answers_and_keeps_the_stems_that_are_scored(tmp_path):
    # The question's id is an integer in one file and a float in the other.
    (train,), dropped = run("okvqa", vqa_layouts.write_okvqa(tmp_path), "train")
    assert not dropped
    assert train.record["messages"][1]["content"] == "racing"
    (train,), _ = run("okvqa", tmp_path, "train", field="answer")
    assert train.record["messages"][1]["content"] == "race"
    (val,), _ = run("okvqa", tmp_path, "val")
    assert val.images == [tmp_path / "val2014/COCO_val2014_000000051606.jpg"]
    stems = ["race", "race", "ride bike", "ride bike", "race", "race", "sport", "sport", "race", "race"]
    assert val.record["messages"] == ask((f"What is the hairstyle called?{SHORT}", "racing"))
    meta = val.record["meta"]
    assert meta["answers"] == stems and meta["raw_answers"][2] == "riding bikes"
    assert meta["question_id"] == 516065 and meta["type"] == "two"
    assert meta["subject"] == "Brands, Companies and Products"


def test_aokvqa_asks_for_the_answer_or_for_a_letter_and_keeps_both_references(tmp_path):
    vqa_layouts.write_aokvqa(tmp_path)
    question = "What is the man by the bags awaiting?"
    (first, hard), dropped = run("aokvqa", tmp_path, "val")
    assert first.record["messages"] == ask((f"{question}{SHORT}", "ride")) and not dropped
    meta = first.record["meta"]
    assert first.record["id"] == meta["question_id"] == "22MexNkBPpdZGX6sxbxVBH"
    assert meta["choices"] == ["skateboarder", "train", "delivery", "cab"] and meta["correct_choice_idx"] == 3
    assert meta["answers"] == meta["direct_answers"] and len(meta["answers"]) == 10
    assert not meta["difficult_direct_answer"] and hard.record["meta"]["difficult_direct_answer"]

    (choice,), dropped = run("aokvqa", tmp_path, "val", form="choice")
    letters = f"{question}\nA. skateboarder\nB. train\nC. delivery\nD. cab"
    line = "\nAnswer with the option's letter from the given choices directly."
    assert choice.record["messages"] == ask((letters + line, "D"))
    assert choice.record["meta"]["answers"] == ["D"] and len(choice.record["meta"]["direct_answers"]) == 10
    assert dropped == {"correct_choice_idx is not one of the choices": 1}


def test_textvqa_keeps_recognised_text_and_says_it_only_where_asked(tmp_path):
    vqa_layouts.write_textvqa(tmp_path)
    (val,), _ = run("textvqa", tmp_path, "val")
    assert val.images == [tmp_path / "train_images/0054c91397f2fe05.jpg"]  # val's images lie there too
    assert val.record["messages"] == ask((f"what is the brand of phone?{SHORT}", "nokia"))
    assert val.record["id"] == 0 and val.record["meta"]["ocr_tokens"] == ["NOKIA", "6:04"]
    assert val.record["meta"]["answers"][2] == "Nokia" and len(val.record["meta"]["answers"]) == 10
    (val,), _ = run("textvqa", tmp_path, "val", ocr=True)
    question = f"what is the brand of phone?\nReference OCR token: NOKIA, 6:04{SHORT}"
    assert val.record["messages"] == ask((question, "nokia"))


def test_textvqa_without_recognised_text_refuses_to_say_it(tmp_path):
    vqa_layouts.write_textvqa(tmp_path, ocr=False)
    (val,), _ = run("textvqa", tmp_path, "val")
    assert "ocr_tokens" not in val.record["meta"]
    with pytest.raises(ValueError, match="TextVQA_Rosetta_OCR_v0.2_val.json"):
        run("textvqa", tmp_path, "val", ocr=True)


def test_copies_in_the_vqa_format_give_the_same_records(tmp_path):
    (val,), _ = run("textvqa", vqa_layouts.write_textvqa_flamingo(tmp_path / "textvqa"), "val")
    assert val.record["messages"] == ask((f"what is the brand?{SHORT}", "nokia"))
    assert val.record["meta"]["answers"] == ["nokia"] * 10 and val.record["id"] == 34602
    (val,), _ = run("vizwiz", vqa_layouts.write_vizwiz_flamingo(tmp_path / "vizwiz"), "val")
    assert val.record["messages"] == ask((f"What is it?{SHORT}", "can"))
    assert val.images == [tmp_path / "vizwiz/val/VizWiz_val_00000000.jpg"]


def test_vizwiz_keeps_drops_or_announces_the_unanswerable(tmp_path):
    vqa_layouts.write_vizwiz(tmp_path)
    question = "What is this? And what is it called?"
    records, _ = run("vizwiz", tmp_path, "train")
    assert [r.record["messages"][1]["content"] for r in records] == ["basil", "unanswerable"]
    records, dropped = run("vizwiz", tmp_path, "train", unanswerable="drop")
    assert len(records) == 1 and dropped == {"unanswerable (unanswerable=drop)": 1}
    records, dropped = run("vizwiz", tmp_path, "val", unanswerable="drop")
    assert len(records) == 2 and not dropped  # a score needs every question
    assert records[1].record["meta"]["answerable"] == 0 and records[1].record["meta"]["type"] == "unanswerable"
    (first, _), _ = run("vizwiz", tmp_path, "val", unanswerable="prompt")
    line = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    assert first.record["messages"] == ask((f"{question}{line}{SHORT}", "basil"))


def test_chartqas_three_layouts_agree(tmp_path):
    folders, lmms = vqa_layouts.write_chartqa(tmp_path / "a"), tmp_path / "c"
    parquet = vqa_layouts.write_chartqa_parquet(tmp_path / "b")
    vqa_layouts.write_chartqa_parquet(lmms, lmms=True)
    answers, kinds = {}, {}
    for folder in (folders, parquet, lmms):
        records, dropped = run("chartqa", folder, "test")
        assert not dropped
        answers[folder] = {r.record["messages"][0]["content"][1]["text"]: r.record["meta"]["answers"] for r in records}
        kinds[folder] = Counter(r.record["meta"]["type"] for r in records)
    assert answers[folders] == answers[parquet] == answers[lmms]
    assert answers[folders][f"What was the share in 2019?{SHORT}"] == ["27.5%"]
    assert kinds[folders] == kinds[parquet] == kinds[lmms] == {"human": 2, "augmented": 2}
    train, _ = run("chartqa", folders, "train")
    copy, _ = run("chartqa", parquet, "train")
    turns = [("How many food items are shown?" + SHORT, "14"), ("What is the difference?", "0.57")]
    assert train[0].record["messages"] == copy[0].record["messages"] == ask(*turns, ("Which is the lowest?", "Lamb"))
    assert copy[0].images == [draw_png(0)] and len(train) == len(copy) == 2
    with pytest.raises(ValueError, match="no parquet files of split train"):
        run("chartqa", lmms, "train")


def test_stvqa_finds_images_by_either_path_and_holds_out_whole_images(tmp_path):
    vqa_layouts.write_stvqa(tmp_path)
    train, dropped = run("stvqa", tmp_path, "train", holdout=0.3)
    val, more = run("stvqa", tmp_path, "val", holdout=0.3)
    assert not dropped and not more
    assert {
        r.record["id"] if "answers" in r.record["meta"] else r.record["meta"]["question_ids"][0] for r in train + val
    } == set(range(40))
    assert 3 < len(val) < 20
    everything, _ = run("stvqa", tmp_path, "train", holdout=0.0)
    assert len(everything) == 40
    three = next(r for r in everything if r.record["meta"]["question_ids"] == [3])
    assert three.images == [tmp_path / "train_imgs/coco-text/COCO_train2014_000000000003.jpg"]
    assert three.record["messages"] == ask((f"What does sign 3 say?{SHORT}", "stop"))
    odd = next(r for r in val if r.record["id"] % 2)
    assert odd.record["meta"]["answers"] == ["stop", "STOP"] and odd.record["meta"]["type"] == "coco-text"
    with pytest.raises(ValueError, match="holdout=0"):
        run("stvqa", tmp_path, "val", holdout=0.0)


def test_docvqas_files_and_parquet_agree(tmp_path):
    records, _ = run("docvqa", vqa_layouts.write_docvqa(tmp_path / "a"), "val")
    assert [r.record["meta"]["answers"] for r in records] == [["1/8/93"], ["P. Carter", "p. carter"]]
    meta = records[0].record["meta"]
    assert meta["question_types"] == ["handwritten", "form"] and meta["type"] == "handwritten,form"
    assert meta["question_id"] == 337 and meta["docId"] == 279 and meta["ucsf_document_page_no"] == "1"
    copy, _ = run("docvqa", vqa_layouts.write_docvqa_parquet(tmp_path / "b"), "val")
    assert [r.record["messages"] for r in copy] == [r.record["messages"] for r in records]
    assert [r.record["meta"]["answers"] for r in copy] == [r.record["meta"]["answers"] for r in records]
    assert copy[0].images == [draw_png(5)]
    bare = vqa_layouts.write_docvqa(tmp_path / "c", with_types=False, images="spdocvqa_images")
    (train,), _ = run("docvqa", bare, "train")
    assert train.images == [bare / "spdocvqa_images/xnbl0037_1.png"]
    assert train.record["meta"]["question_ids"] == [337, 338] and train.record["meta"]["types"] == ["docvqa"] * 2


def test_pope_keeps_its_categories_apart_though_each_counts_from_one(tmp_path):
    records, dropped = run("pope", vqa_layouts.write_pope(tmp_path), "test")
    assert not dropped
    assert [(r.key, r.record["id"], r.record["meta"]["type"]) for r in records] == [
        ("random-1-0", 1, "random"),
        ("random-2-1", 2, "random"),
        ("popular-1-0", 1, "popular"),
        ("popular-2-1", 2, "popular"),
        ("adversarial-1-0", 1, "adversarial"),
        ("adversarial-2-1", 2, "adversarial"),
    ]
    assert records[5].record["messages"] == ask((f"Is there a dining table in the image?{SHORT}", "no"))
    assert records[5].record["meta"]["answers"] == ["no"]


answer_lists = st.lists(st.sampled_from(["a", "b", " a", "", "c "]), max_size=10)


@given(answer_lists)
def test_the_majority_is_the_most_frequent_answer_and_of_equals_the_first(answers):
    clean = [a.strip() for a in answers if a.strip()]
    distinct = count_answers(answers)
    assert sorted(distinct) == sorted(set(clean))
    if clean:
        most = max(clean.count(a) for a in clean)
        assert distinct[0] == next(a for a in clean if clean.count(a) == most)


@given(
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["Q", "R", " "]), answer_lists), max_size=12),
    st.booleans(),
    st.sampled_from(["majority", "all_distinct"]),
    st.sampled_from(["train", "val"]),
)
def test_every_question_is_asked_or_dropped_and_none_twice(rows, grouped, answers, split):
    questions = [
        Question(i, bytes([image]), image, f"{text}{i}" if text.strip() else text, list(given))
        for i, (image, text, given) in enumerate(rows)
    ]
    options = {"split": split, "answers": answers, "prompt": "none", "grouped": grouped}
    groups = group_questions(questions, grouped=grouped and split == "train")
    made = [item for n, group in enumerate(groups) for item in converse(group, n, source="s", options=options)]
    asked, dropped = Counter(), [item for item in made if isinstance(item, Dropped)]
    for item in made:
        if isinstance(item, Record):
            texts = [m["content"] for m in item.record["messages"]]
            texts = [c if isinstance(c, str) else c[1]["text"] for c in texts]
            assert len(set(texts[::2])) == len(texts) // 2  # no conversation asks a question twice
            asked.update(zip(texts[::2], texts[1::2]))
    usable = {q.text: count_answers(q.answers) for q in questions if q.text.strip() and count_answers(q.answers)}
    every = answers == "all_distinct" and split == "train"
    assert asked == Counter(
        (text, answer) for text, given in usable.items() for answer in given[: None if every else 1]
    )
    assert len(dropped) + len(usable) == len(questions)
    keys = [item.key for item in made if isinstance(item, Record)]
    assert len(set(keys)) == len(keys)


def test_wrong_types_drop_their_row_or_name_it(tmp_path):
    folder = vqa_layouts.write_vqav2(tmp_path / "v")
    file = folder / "v2_OpenEnded_mscoco_val2014_questions.json"
    content = json.loads(file.read_text())
    content["questions"][0]["image_id"] = "nine"
    content["questions"][1]["question"] = 5
    del content["questions"][2]["question_id"]
    file.write_text(json.dumps(content))
    records, dropped = run("vqav2", folder, "val")
    assert [r.record["id"] for r in records] == [25000, 0]
    # Two questions are gone, so two more annotations are without one.
    assert (
        dropped["row lacks a key or holds another type"] == 2
        and dropped["empty turn"] == 1
        and dropped["annotation without a question"] == 3
    )
    content["questions"][3] = ["not", "an", "object"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="questions.json: row 3 is of type list, not an object"):
        run("vqav2", folder, "val")
    folder = vqa_layouts.write_aokvqa(tmp_path / "a")
    vqa_layouts.write_json(folder / "aokvqa_v1p0_val.json", [{"question_id": 1, "image_id": None, "choices": "abcd"}])
    assert run("aokvqa", folder, "val") == ([], Counter({"row lacks a key or holds another type": 1}))
    folder = vqa_layouts.write_pope(tmp_path / "p")
    (folder / "coco_pope_random.json").write_text('[1, 2]\n{"question_id": 1}\n')
    assert run("pope", folder, "test")[1] == {"row lacks a key or holds another type": 2}
