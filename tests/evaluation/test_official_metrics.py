"""Every protocol against the official code's own outputs on adversarial cases (tests/golden/metric_cases.py)."""

import json
import math
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm.evaluation import aokvqa, boxes, gqa, mathvista, mmmu, pope, science_qa
from fastvlm.evaluation.anls import ANLS, anls, edit_distance
from fastvlm.evaluation.captions import Captions, bleu, cider_d, rouge_l
from fastvlm.evaluation.ptb import tokenise
from fastvlm.evaluation.relaxed_accuracy import RelaxedAccuracy, relaxed_match
from fastvlm.evaluation.vqa_accuracy import VQAAccuracy, evalai_accuracy, leave_one_out, vqa_accuracy

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


def cases(name: str) -> list:
    golden = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    assert all("@" in source for source in golden["official"].values()), "which version wrote it is not said"
    return golden["cases"]


def wrong(rows, same) -> list:
    assert len(rows) >= 500
    return [row for row in rows if not same(row)]


def test_vqa_accuracy_is_the_official_one():
    def same(row):
        prediction, distinct, given_, official, evalai = row
        answers = [distinct[i] for i in given_]
        return round(100 * vqa_accuracy(prediction, answers), 10) == official and (
            evalai_accuracy(prediction, answers) == evalai
        )

    assert not wrong(cases("vqa_accuracy"), same)


def test_the_vqa_cases_hold_every_score_and_both_quirks():
    scores = {round(row[3]) for row in cases("vqa_accuracy")}
    assert scores >= {0, 30, 60, 90, 100}
    assert vqa_accuracy("The dog", ["The dog"] * 10) == 1  # unanimous: compared as it is ...
    assert vqa_accuracy("dog", ["The dog"] * 10) == 0  # ... so an article counts
    assert vqa_accuracy("dog", ["The dog"] * 9 + ["cat"]) == 1
    assert evalai_accuracy("dog", ["The dog"] * 10) == 1


@given(st.lists(st.sampled_from("abc"), min_size=10, max_size=10), st.sampled_from("abcd"))
def test_leave_one_out_has_the_closed_form_of_ten_annotators(answers, prediction):
    closed = {0: 0, 1: 0.3, 2: 0.6, 3: 0.9}
    assert leave_one_out(prediction, answers) == pytest.approx(closed.get(answers.count(prediction), 1.0))


def test_relaxed_accuracy_is_the_official_one():
    assert not wrong(cases("relaxed_accuracy"), lambda row: relaxed_match(row[0], row[1]) == row[2])


def test_anls_is_the_competitions():
    rows = cases("anls")
    assert not wrong(rows, lambda row: anls(row[0], row[1]) == row[2])
    assert any(row[2] == 0.5 for row in rows)  # the formula would drop it


@given(st.text("abc", max_size=6), st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_edit_distance_is_a_distance(a, b, c):
    assert edit_distance(a, b) == edit_distance(b, a) <= edit_distance(a, c) + edit_distance(c, b)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))


def test_both_forms_of_aokvqa_are_the_official_ones():
    def same(row):
        chosen, choices, right, picked, direct, answers, difficult, said = row
        meta = {"choices": choices, "correct_choice_idx": right, "difficult_direct_answer": difficult}
        both = {"answers": answers, "meta": meta}
        choice = aokvqa.MultipleChoice().grade(both | {"prediction": chosen})["score"]
        counted = aokvqa.DirectAnswer().counts(both)
        score = aokvqa.DirectAnswer().grade(both | {"prediction": direct})["score"]
        # Two options that differ by case alone are the official scorer's to tell apart.
        exact = chosen not in choices or [c.lower().rstrip(".") for c in choices].count(chosen.lower().rstrip(".")) == 1
        if exact and chosen not in ("A", "b."):
            assert 100 * choice == picked
        return counted == (said is not None) and (said is None or 100 * score == said)

    assert not wrong(cases("aokvqa"), same)


@pytest.mark.parametrize(
    "said, option",
    [("B", 1), ("b. ", None), ("(C)", 2), ("D. old wood", 3), ("Stone", 2), ("stone.", 2), ("E", None), ("", None)],
)
def test_an_option_is_named_by_its_letter_or_its_words(said, option):
    choices = ["wood", "metal", "stone", "old wood"]
    assert aokvqa.read_choice(said, choices) == (None if option is None else choices[option])


def test_pope_is_the_official_one():
    golden = json.loads((GOLDEN / "pope.json").read_text())
    assert not wrong(golden["cases"], lambda row: pope.read_yes_no(row[0]) == row[2])
    for number, table in enumerate(golden["per_20"]):
        part = golden["cases"][20 * number : 20 * number + 20]
        mine = pope.yes_no_figures([row[2] for row in part], [row[1] for row in part])
        assert mine == {
            "accuracy": table["acc"],
            "precision": table["precision"],
            "recall": table["recall"],
            "f1": table["f1"],
            "yes_share": table["yes_ratio"],
        }


def test_gqa_is_the_harness_and_the_official_script():
    same = lambda row: gqa.match(row[0], row[1]) == row[2] and gqa.match_strict(row[0], row[1]) == row[3]
    assert not wrong(cases("gqa"), same)


def test_science_qa_is_read_as_llava_reads_it():
    assert not wrong(cases("science_qa"), lambda row: science_qa.read_option(row[0], num_choices=row[1]) == row[2])


def test_mmmu_options_are_the_official_ones_chance_included():
    chance = random.Random(42)
    read = lambda row: mmmu.read_option(row[0], dict(zip("ABCDE", row[1])), chance=chance)
    assert not wrong(cases("mmmu_choice"), lambda row: read(row) == row[2])


def test_mmmu_open_answers_are_the_official_ones():
    def same(row):
        response, answers, meant, correct = row
        mine = mmmu.read_open(response)
        return sorted(map(str, mine)) == meant and mmmu.match_open(mine, answers) == correct

    assert not wrong(cases("mmmu_open"), same)


def test_mathvista_is_the_official_one_up_to_what_gpt_is_asked():
    def same(row):
        response, choices, kind, found, extraction, precision, parsed, answer, equal = row
        mine = mathvista.extract(response, choices=choices, answer_type=kind)
        normalised = mathvista.normalise(extraction, choices=choices, answer_type=kind, precision=precision)
        return (
            mine == (None if found == "<asks GPT>" else found)
            and normalised == parsed
            and ((normalised == answer) == equal)
        )

    assert not wrong(cases("mathvista"), same)


@pytest.mark.parametrize(
    "said, form, read",
    [
        ("The number is 14.", {"choices": None, "answer_type": "integer"}, "14"),
        ("1,200 of 1,400", {"choices": None, "answer_type": "integer"}, "1400"),
        ("It is -0.65", {"choices": None, "answer_type": "float"}, "-0.65"),
        ("so [2007, 2008] it is", {"choices": None, "answer_type": "list"}, "[2007, 2008]"),
        ("The correct answer is (B) 8/11", {"choices": ["3/11", "8/11"], "answer_type": "text"}, "B"),
        ("I do not know", {"choices": ["3/11", "8/11"], "answer_type": "text"}, "I do not know"),
    ],
)
def test_where_the_official_code_asks_gpt_the_last_of_its_kind_is_taken(said, form, read):
    assert mathvista.extract(said, **form) is None
    assert mathvista.extract_last(said, **form) == read


def test_boxes_are_read_and_compared_as_in_the_harness():
    def same(row):
        text, true, box, iou, inside = row
        grade = boxes.Boxes().grade({"prediction": text, "meta": {"box": true}})
        figures = boxes.Boxes().summarise([grade | {"meta": {"box": true}}])
        return grade["parsed"] == box and grade["iou"] == iou and figures["centre_accuracy"] == inside

    assert not wrong(cases("boxes"), same)


def test_a_box_in_thousandths_is_the_same_box():
    row = {"meta": {"box": [0.1, 0.2, 0.5, 0.9]}}
    shares = boxes.Boxes().grade(row | {"prediction": "[0.1, 0.2, 0.5, 0.8]"})
    assert boxes.Boxes(scale=1000).grade(row | {"prediction": "[100, 200, 500, 800]"})["iou"] == pytest.approx(
        shares["iou"]
    )


@pytest.fixture(scope="module")
def captions():
    files = [json.loads((GOLDEN / f"captions_{half}.json").read_text(encoding="utf-8")) for half in (1, 2)]
    return [row for file in files for row in file["cases"]], files[0]["corpus"]


def test_cider_bleu_and_rouge_are_cocos(captions):
    rows, corpus = captions
    assert len(rows) >= 500
    predictions, references = [row[2] for row in rows], [row[3] for row in rows]
    scores = cider_d(predictions, references)
    assert scores == pytest.approx([row[4] for row in rows], abs=1e-8)
    assert math.fsum(scores) / len(scores) == pytest.approx(corpus["cider"], rel=1e-12)
    assert bleu(predictions, references) == pytest.approx(corpus["bleu"], rel=1e-12)
    assert [rouge_l(a, b) for a, b in zip(predictions, references)] == pytest.approx([row[5] for row in rows], abs=1e-8)


def test_captions_are_cut_as_stanfords_program_cuts_them(captions):
    rows, _ = captions
    pairs = [(text, cut) for row in rows for text, cut in zip([row[0], *row[1]], [row[2], *row[3]])]
    other = [text for text, cut in pairs if tokenise(text).split() != cut.split()]
    assert len(pairs) > 1500 and len(other) <= len(pairs) * 0.002, other[:5]


def test_a_caption_task_from_raw_text_has_cocos_figures(captions):
    rows, corpus = captions
    protocol = Captions()
    given_ = [{"prediction": row[0], "answers": row[1], "image_id": i, "meta": {}} for i, row in enumerate(rows)]
    scored = [row | score for row, score in zip(given_, protocol.score(given_))]
    assert sum(r["score"] for r in scored) / len(scored) == pytest.approx(corpus["cider"], rel=1e-3)
    assert protocol.summarise(scored)["bleu_4"] == pytest.approx(corpus["bleu"][3], rel=1e-3)


@settings(max_examples=50)
@given(st.lists(st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=2, max_size=5), min_size=2, max_size=5))
def test_cider_of_the_only_reference_is_ten_or_nothing(sentences):
    texts = [" ".join(words) for words in sentences]
    for text, score in zip(texts, cider_d(texts, [[text] for text in texts])):
        grams = min(4, len(text.split()))  # n-grams a text is too short for count as 0
        assert score <= 10 * grams / 4 + 1e-9


@pytest.mark.parametrize("protocol", [VQAAccuracy(), RelaxedAccuracy(), ANLS()])
def test_a_protocols_grade_is_its_function(protocol):
    row = {"prediction": "2", "answers": ["two"] * 9 + ["2"], "meta": {}, "type": "number"}
    expected = {"vqa_accuracy": 1.0, "relaxed_accuracy": 1.0, "anls": 1.0}
    assert protocol.grade(row)["score"] == expected[protocol.metric]
