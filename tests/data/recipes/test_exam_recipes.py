"""Recipes of GQA, ScienceQA, MMMU, MathVista and RefCOCO, against records written by hand, and through `prepare`."""

from __future__ import annotations

import exam_layouts
import pytest
from test_vqa_recipes import run

from data.prepare import prepare
from data.recipes.mmmu import place_images
from fastvlm.data.source import Source
from fastvlm.data.transforms import ImageTransform
from fastvlm.evaluation.questions import read_questions

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
COUNTS = {  # recipe -> (writer, kept by split, dropped by split)
    "gqa": ("gqa", {"train": 1, "val": 2, "test": 2}, {"train": 2, "val": 2, "test": 2}),
    "scienceqa": ("scienceqa", {"train": 2, "val": 2, "test": 2}, {"train": 1, "val": 1, "test": 1}),
    "scienceqa, parquet": ("scienceqa_parquet", {"train": 2, "val": 2, "test": 2}, {"train": 1, "val": 1, "test": 1}),
    "mmmu": ("mmmu", {"train": 2, "val": 2}, {"train": 1, "val": 1}),
    "mathvista": ("mathvista", {"val": 2}, {"val": 1}),
    "mathvista, parquet": ("mathvista_parquet", {"val": 2}, {"val": 1}),
    "refcoco": (
        "refcoco",
        dict.fromkeys(("train", "val", "testA", "testB"), 2),
        dict.fromkeys(("train", "val", "testA", "testB"), 1),
    ),
    "refcoco, parquet": ("refcoco_parquet", dict.fromkeys(("val", "testA", "testB", "test"), 2), {}),
}


@pytest.mark.parametrize("name", COUNTS)
def test_exams_are_prepared_and_read_back(name, tmp_path, tokenizer):
    writer, kept, dropped = COUNTS[name]
    recipe = name.split(",")[0]
    raw = getattr(exam_layouts, f"write_{writer}")(tmp_path / "raw")
    settings = {"tokenizer": tokenizer.path, "template": "roles", "workers": 1, "splits": tuple(kept)}
    done = prepare(recipe, out=tmp_path / "out", path=str(raw), **settings)
    assert done["counts"] == {recipe: kept}
    lost = {split: sum(row["count"] for row in reasons.values()) for split, reasons in done["dropped"].items()}
    assert {split: count for split, count in lost.items() if count} == dropped
    source = Source(recipe, path=tmp_path / "out", rebuild_index=False)
    split = "val" if recipe != "refcoco" else "testA"
    questions = read_questions(
        source.load(split, tokenizer), source=recipe, limit=None, transform=ImageTransform(image_size=16)
    )
    assert len(questions) == kept[split] and all(q.answer for q in questions)


def content(record) -> list:
    return record.record["messages"][0]["content"]


def test_gqa_keeps_the_types_its_score_is_broken_down_by(tmp_path):
    records, _ = run("gqa", exam_layouts.write_gqa(tmp_path), "test")
    assert records[0].record["meta"] == {
        "question_id": "201",
        "image_id": "n1",
        "type": "query",
        "turns": 1,
        "structural": "query",
        "semantic": "attr",
        "detailed": "color",
        "answers": ["red"],
    }
    assert content(records[0]) == [{"type": "image"}, {"type": "text", "text": f"What color is it?\n{SHORT}"}]


def test_scienceqa_asks_with_and_without_an_image(tmp_path):
    (seen, read), _ = run("scienceqa", exam_layouts.write_scienceqa(tmp_path), "test")
    assert content(seen)[0] == {"type": "image"} and len(seen.images) == 1
    assert content(seen)[1]["text"] == f"Which is cold?\nA. ice\nB. fire\n{LETTER}"
    assert content(read) == f"Context: Count.\n2+2?\nA. 3\nB. 4\nC. 5\n{LETTER}" and not read.images
    assert read.record["messages"][1]["content"] == "B" and read.record["meta"]["answers"] == ["B"]
    assert seen.record["meta"]["has_image"] and not read.record["meta"]["has_image"]


def test_mmmu_places_images_where_the_words_and_options_name_them(tmp_path):
    (choice, opened), _ = run("mmmu", exam_layouts.write_mmmu(tmp_path), "val")
    image = {"type": "image"}
    assert content(choice) == [
        {"type": "text", "text": "Compare "},
        image,
        {"type": "text", "text": " and "},
        image,
        {"type": "text", "text": " please\nA. the first\nB. "},
        image,
        {"type": "text", "text": f"\nC. it's none\n{LETTER}"},
    ]
    assert choice.images[1] == choice.images[2] != choice.images[0]
    meta = choice.record["meta"]
    assert meta["type"] == "Art_Theory" and meta["choices"] == ["the first", "<image 2>", "it's none"]
    # The picture it does not name comes first; the one it names and has not stays words.
    assert content(opened) == [image, {"type": "text", "text": f"How much?\n<image 3>\n{SHORT}"}]
    assert opened.record["meta"]["answers"] == ["1,000", "1000 $"] and "choices" not in opened.record["meta"]


def test_the_line_break_behind_an_image_goes_only_where_images_alone_stand_before_it():
    image = {"type": "image"}
    parts, images = place_images("<image 1>\na\n<image 2>\nb", {1: b"x", 2: b"y"})
    assert parts == [image, {"type": "text", "text": "a\n"}, image, {"type": "text", "text": "\nb"}]
    assert images == [b"x", b"y"]


@pytest.mark.parametrize("form", ["mathvista", "mathvista_parquet"])
def test_mathvista_states_the_form_of_its_answers(form, tmp_path):
    (length, which), _ = run("mathvista", getattr(exam_layouts, f"write_{form}")(tmp_path), "val")
    meta = length.record["meta"]
    assert (meta["answer_type"], meta["precision"], meta["answers"]) == ("float", 1.0, ["1.2"])
    assert content(length)[1]["text"].endswith(
        "Question: How long?" + ("" if form.endswith("parquet") else " (Unit: m)")
    )
    assert which.record["messages"][1]["content"] == "B" and which.record["meta"]["answers"] == ["8/11"]
    assert which.record["meta"]["skills"] == ["arithmetic reasoning", "algebra"]


def test_a_region_is_its_edges_as_shares_of_the_sides(tmp_path):
    (left, big), _ = run("refcoco", exam_layouts.write_refcoco(tmp_path), "testA")
    assert left.record["messages"][1]["content"] == "[0.100, 0.100, 0.600, 0.600]"
    assert left.record["meta"]["box"] == [0.1, 0.1, 0.6, 0.6] and left.record["id"] == 20
    assert content(big)[1]["text"].endswith(": big dog")
    (one, _), _ = run("refcoco", exam_layouts.write_refcoco_parquet(tmp_path / "b"), "test")
    assert one.record["meta"]["box"] == [0.25, 0.5, 0.75, 1.0]  # of 8 x 8 pixels


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    with pytest.raises(ValueError, match="refs\\(unc\\).p cannot be read .*only lists, dicts"):
        run("refcoco", exam_layouts.write_evil_refs(tmp_path), "val")


@pytest.mark.parametrize(
    "name, write, split, words",
    [
        ("mmmu", "mmmu", "test", "answers are not public"),
        ("mathvista", "mathvista", "test", "answers are not public"),
        ("gqa", "scienceqa", "val", "no val_balanced_questions.json"),
        ("scienceqa", "gqa", "val", "no problems.json"),
        ("refcoco", "gqa", "val", r"no refs\(unc\).p"),
    ],
)
def test_another_layout_is_one_line(name, write, split, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        run(name, getattr(exam_layouts, f"write_{write}")(tmp_path), split)
