"""Every protocol against the official code's own outputs on adversarial cases (tests/golden/metric_cases.py)."""

import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm.evaluation import aokvqa, boxes, gqa, mathvista, mmmu, pope, science_qa
from fastvlm.evaluation.anls import ANLS, anls, edit_distance
from fastvlm.evaluation.captions import Captions, bleu, cider_d, rouge_l
from fastvlm.evaluation.predictions import question_name, read_rows
from fastvlm.evaluation.ptb import find_jar, tokenise
from fastvlm.evaluation.relaxed_accuracy import RelaxedAccuracy, relaxed_match
from fastvlm.evaluation.scores import make_result
from fastvlm.evaluation.vqa_accuracy import VQAAccuracy, evalai_accuracy, leave_one_out, vqa_accuracy

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


def cases(name: str) -> list:
    golden = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    assert all("@" in source for source in golden["official"].values()), "which version wrote it is not said"
    return golden["cases"]


def wrong(rows, same) -> list:
    assert len(rows) >= 500
    return [row for row in rows if not same(row)]


def as_rows(pairs) -> list[dict]:
    """(prediction, references, ...) as rows of a predictions file."""
    return [{"prediction": p[0], "answers": p[1], "meta": {}, "image_id": i} for i, p in enumerate(pairs)]


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


@pytest.mark.parametrize(
    "said, answers, score",
    [
        ("Unanswerable", ["unanswerable"] * 10, 1),
        ("the can.", ["can"] * 9 + ["soup"], 1),
        ("can", ["The can"] * 10, 0),  # the annotators' words are compared as they are
        ("Basil", ["basil"] * 3 + ["mint"] * 7, 0.9),
    ],
)
def test_vizwiz_normalises_the_answer_and_never_the_annotators_words(said, answers, score):
    row = {"prediction": said, "answers": answers, "meta": {}}
    assert VQAAccuracy(normalisation="vizwiz").grade(row)["score"] == pytest.approx(score)


def test_vqa_accuracy_tells_what_processed_answers_and_raw_references_score():
    rows = [
        {"prediction": "Yes", "answers": ["yes"] * 10, "meta": {"raw_answers": ["yes"] * 10}},
        {"prediction": "racing", "answers": ["race"] * 10, "meta": {"raw_answers": ["racing"] * 10}},
    ]
    assert [vqa_accuracy(row["prediction"], row["answers"]) for row in rows] == [0, 0]
    assert VQAAccuracy().summarise(rows) == {"vqa_accuracy_processed": 0.5, "vqa_accuracy_raw": 1.0}
    assert VQAAccuracy().summarise([rows[0] | {"meta": {}}]) == {"vqa_accuracy_processed": 1.0}
    assert VQAAccuracy(normalisation="evalai").summarise(rows) == {}


@pytest.mark.parametrize(
    "row",
    [
        {"question_id": "VizWiz_val_0.jpg", "image_id": "VizWiz_val_0.jpg"},  # VizWiz's own
        {"question_id": 0, "image_id": "VizWiz_val_0.jpg"},  # the copy in VQA format
        {"question_id": "VizWiz_val_0", "image_id": None},  # the parquet of the hub
    ],
)
def test_vizwiz_names_the_image_file_and_reads_its_own_file_again(row, tmp_path):
    (line,) = VQAAccuracy(normalisation="vizwiz", named_by="image").official([row | {"prediction": "can"}])
    assert line == {"image": "VizWiz_val_0.jpg", "answer": "can"}
    (tmp_path / "said.json").write_text(json.dumps([line]))
    answers, named_by = read_rows(tmp_path / "said.json")
    assert answers[question_name(row, named_by)] == "can"


@given(st.lists(st.sampled_from("abc"), min_size=10, max_size=10), st.sampled_from("abcd"))
def test_leave_one_out_has_the_closed_form_of_ten_annotators(answers, prediction):
    closed = {0: 0, 1: 0.3, 2: 0.6, 3: 0.9}
    assert leave_one_out(prediction, answers) == pytest.approx(closed.get(answers.count(prediction), 1.0))


def test_relaxed_accuracy_is_the_official_one():
    assert not wrong(cases("relaxed_accuracy"), lambda row: relaxed_match(row[0], row[1]) == row[2])


def test_anls_is_the_competitions_script_and_the_harness():
    rows = cases("anls")
    assert not wrong(rows, lambda row: anls(row[0], row[1]) == row[2] == row[3])
    corpus = json.loads((GOLDEN / "anls.json").read_text(encoding="utf-8"))["corpus"]["anls"]
    assert make_result("x", as_rows(rows), protocol=ANLS(), split="val", resamples=1)["table"][-1]["anls"] == corpus


@given(
    st.text("abAB \t", max_size=9),
    st.lists(st.text("abAB \t", max_size=9), min_size=1, max_size=3),
    st.sampled_from([0.25, 0.5, 0.9]),
)
def test_anls_is_the_papers_formula_but_for_its_edge_and_the_spaces_that_count_as_length(prediction, answers, tau):
    """arXiv:1905.13648, section 5: of the normalised texts 1 - NL where NL < tau, else 0; the best reference counts."""
    norm = lambda text: " ".join(text.lower().split())

    def similarity(answer: str) -> float:
        a, b = norm(answer), norm(prediction)
        table = np.zeros((len(a) + 1, len(b) + 1))  # Wagner and Fischer 1974
        table[0], table[:, 0] = np.arange(len(b) + 1), np.arange(len(a) + 1)
        for i in range(1, len(a) + 1):
            for j in range(1, len(b) + 1):
                both = table[i - 1, j - 1] + (a[i - 1] != b[j - 1])
                table[i, j] = min(both, table[i - 1, j] + 1, table[i, j - 1] + 1)
        length = max(len(a), len(b))
        return 1 - float(table[-1, -1]) / length if length else 1.0

    said = anls(norm(prediction), [norm(answer) for answer in answers], threshold=1 - tau)
    best = max(map(similarity, answers))
    assert said == pytest.approx(best if best > 1 - tau or (best == 1 - tau and said) else 0.0)
    assert (
        anls(prediction, answers, threshold=0.0) >= best - 1e-12
    )  # spaces as given make a text longer, never less alike


def test_anls_keeps_the_half_that_the_formula_drops():
    assert anls("ab", ["ac"]) == 0.5 and sum(row[2] == 0.5 for row in cases("anls")) >= 10


@given(st.text("abc", max_size=6), st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_edit_distance_is_a_distance(a, b, c):
    assert edit_distance(a, b) == edit_distance(b, a) <= edit_distance(a, c) + edit_distance(c, b)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))


def test_both_forms_of_aokvqa_are_the_official_ones():
    def row_of(case) -> dict:
        _, choices, right, _, _, answers, difficult, _ = case
        meta = {"choices": choices, "correct_choice_idx": right, "difficult_direct_answer": difficult}
        return {"question_id": "q", "answers": answers, "meta": meta}

    def choice_is_same(case) -> bool:
        return 100 * aokvqa.MultipleChoice().grade(row_of(case) | {"prediction": case[0]})["score"] == case[3]

    def names_one(case) -> bool:
        """The official scorer is given an option; words name none of two that differ by case, nor one like a letter."""
        chosen, choices = case[0], [c.lower().rstrip(".") for c in case[1]]
        return choices.count(chosen.lower().rstrip(".")) < 2 and chosen not in ("A", "b.")

    rows, direct = cases("aokvqa"), aokvqa.DirectAnswer()
    assert not wrong([case for case in rows if names_one(case)], choice_is_same)
    assert all(direct.counts(row_of(case)) == (case[7] is not None) for case in rows)
    counted = [case for case in rows if case[7] is not None]
    assert not wrong(counted, lambda c: 100 * direct.grade(row_of(c) | {"prediction": c[4]})["score"] == c[7])


@pytest.mark.parametrize(
    "said, option",
    [
        ("B", 1),
        ("b. ", None),
        ("A metal bowl", None),
        ("(C)", 2),
        ("D. old wood", 3),
        ("Stone", 2),
        ("stone.", 2),
        ("E", None),
        ("", None),
    ],
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
    rows = cases("gqa")
    assert not wrong(
        rows, lambda row: gqa.match(row[0], row[1]) == row[4] and gqa.match_strict(row[0], row[1]) == row[5]
    )
    figures = json.loads((GOLDEN / "gqa.json").read_text(encoding="utf-8"))["corpus"]

    class Strict(gqa.GQA):
        def grade(self, row: dict) -> dict:
            return {"score": float(gqa.match_strict(row["prediction"], row["answers"][0]))}

    asked = [
        row | {"type": case[2], "meta": {"structural": case[2], "semantic": case[3]}}
        for case, row in zip(rows, as_rows([[case[0], [case[1]]] for case in rows]))
    ]
    result = make_result("x", asked, protocol=Strict(), split="test", resamples=1)
    mine = {row["type"]: 100 * row["exact_match"] for row in result["table"]}
    assert mine == pytest.approx({("all" if name == "accuracy" else name): value for name, value in figures.items()})
    assert 100 * result["figures"]["exact_match_strict"] == pytest.approx(figures["accuracy"])


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


@pytest.mark.slow
@pytest.mark.skipif(find_jar() is None or shutil.which("java") is None, reason="needs Java and pycocoevalcap")
def test_a_caption_task_by_the_original_tokenizer_has_exactly_cocos_figures(captions):
    rows, corpus = captions
    protocol = Captions(tokenizer="java")
    given_ = [{"prediction": row[0], "answers": row[1], "image_id": i, "meta": {}} for i, row in enumerate(rows)]
    grades = protocol.score(given_)
    assert [grade["parsed"] for grade in grades] == [row[2] for row in rows]
    assert math.fsum(grade["score"] for grade in grades) / len(rows) == pytest.approx(corpus["cider"], rel=1e-12)
    figures = protocol.summarise([row | grade for row, grade in zip(given_, grades)])
    assert [figures[f"bleu_{n}"] for n in (1, 2, 3, 4)] == pytest.approx(corpus["bleu"], rel=1e-12)
    assert figures["rouge_l"] == pytest.approx(corpus["rouge_l"], rel=1e-12)


@pytest.mark.parametrize("there, chosen", [(True, "java"), (False, "python")])
def test_captions_are_cut_by_the_original_program_where_it_can_run_unless_told(there, chosen, monkeypatch):
    monkeypatch.setattr("fastvlm.evaluation.captions.has_java", lambda: there)
    assert Captions().describe()["tokenizer"].split()[0] == Captions().tokenizer == chosen
    assert Captions(tokenizer="python").tokenizer == "python" and Captions(tokenizer="java").tokenizer == "java"


def test_the_original_tokenizer_without_java_or_its_jar_is_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="tokenizer=java: .*(java is not on the PATH|pip install pycocoevalcap)"):
        Captions(tokenizer="java").score([{"prediction": "a", "answers": ["a"]}])


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
