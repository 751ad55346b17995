"""Every task of conf/task over shards that its own recipe made: questions, prompt, answers, score, result file.

What is asked and what is right is written here by hand from the original layouts, never read from the shards.
"""

import json
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

sys.path.append(str(Path(__file__).parent.parent / "data" / "recipes"))

import document_layouts  # noqa: E402
import exam_layouts  # noqa: E402
import instruct_layouts  # noqa: E402
import vqa_layouts  # noqa: E402
from tiny_vlm import IMAGE_SIZE, build_model  # noqa: E402

from data.prepare import prepare  # noqa: E402
from fastvlm.build import build_task  # noqa: E402
from fastvlm.config import CONF, compose  # noqa: E402
from fastvlm.evaluation import short_answers  # noqa: E402
from fastvlm.evaluation.answering import read_window  # noqa: E402
from fastvlm.evaluation.questions import plain_text  # noqa: E402
from fastvlm.inference.engine import Engine  # noqa: E402

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
BOX = "Provide the bounding box of the region this sentence describes, as [left, top, right, bottom] in shares of the "
BOX += "image's width and height between 0 and 1: "
POPE = [(0, "Yes", "no"), (1, "No", "yes")]  # right and wrong
CATEGORIES = ("random", "popular", "adversarial")


@dataclass
class Case:
    """A task's shards and what a model that knows everything says.

    Args:
        write: the original layout, from a folder to the path `data/prepare.py` is given.
        right: an answer by question id (or key, where ids repeat) that scores in full.
        asked: the prompt of the first question.
        groups: of the breakdown.
        official: the first entry of the file that the benchmark's own scorer takes.
        options: of `data/prepare.py`.
        wrong: an answer that scores nothing; the reading of some protocols needs a certain one.
        full: the score of the right answers.
        given: overrides of the task.
    """

    write: object
    right: dict
    asked: str
    groups: set
    official: object
    options: dict = field(default_factory=dict)
    wrong: str | dict = "surely something else"
    full: float = 1.0
    given: tuple = ()


def write_two_captioned(folder: Path) -> Path:
    """Karpathy's layout with two images to test on: how rare a word is, is counted over images."""
    file = instruct_layouts.coco_karpathy(folder) / "dataset_coco.json"
    data = json.loads(file.read_text())
    for i, row in enumerate(data["images"][3:], 3):
        row["split"] = "test"
        for sentence in row["sentences"]:
            sentence["raw"] = f"A cat sits in box {i}."
    file.write_text(json.dumps(data))
    return folder


LETTERS = "A. skateboarder\nB. train\nC. delivery\nD. cab"
AWAITING = "What is the man by the bags awaiting?"
PHONE = "what is the brand of phone?"
UNCERTAIN = "When the provided information is insufficient, respond with 'Unanswerable'."
READ = {"response": "It is 1.2", "extraction": "1.2", "prediction": "1.2", "true_false": True, "answer": "1.2"}
CASES = {
    "vqav2": Case(
        vqa_layouts.write_vqav2,
        # An id that repeats names two questions, so these are keys; of two answers given thrice each scores 0.9.
        {"9000-0": "cat", "25000-1": "no", "9001-2": "3", "25000-6": "no", "0-7": "yes"},
        f"What is it?\n{SHORT}",
        {"other", "yes/no", "number"} | {f"question_type: {kind}" for kind in ("what is", "is it", "how many", "is")},
        {"question_id": 9000, "answer": "cat"},
        full=(4 + 0.9) / 5,
    ),
    "okvqa": Case(
        vqa_layouts.write_okvqa,
        {516065: "race"},
        f"What is the hairstyle called?\n{SHORT}",
        {"two", "subject: Brands, Companies and Products"},
        {"question_id": 516065, "answer": "race"},
    ),
    "vizwiz": Case(
        vqa_layouts.write_vizwiz,
        {"VizWiz_val_00000000.jpg": "basil", "VizWiz_val_00000001.jpg": "unanswerable"},
        f"What is this? And what is it called?\n{UNCERTAIN}\n{SHORT}",
        {"other", "unanswerable"},
        {"image": "VizWiz_val_00000000.jpg", "answer": "basil"},
    ),
    "textvqa": Case(
        vqa_layouts.write_textvqa, {0: "Nokia"}, f"{PHONE}\n{SHORT}", set(), {"question_id": 0, "answer": "Nokia"}
    ),
    "textvqa_ocr": Case(
        vqa_layouts.write_textvqa,
        {0: "Nokia"},
        f"{PHONE}\nReference OCR token: NOKIA, 6:04\n{SHORT}",
        set(),
        {"question_id": 0, "answer": "Nokia"},
    ),
    "aokvqa": Case(
        vqa_layouts.write_aokvqa,
        {"22MexNkBPpdZGX6sxbxVBH": "ride", "2aVb8DyGs3bYXkBqdUZmzU": "anything: too difficult to count"},
        f"{AWAITING}\n{SHORT}",
        {"direct"},
        ("22MexNkBPpdZGX6sxbxVBH", {"direct_answer": "ride"}),
    ),
    "aokvqa_choice": Case(
        vqa_layouts.write_aokvqa,
        {"22MexNkBPpdZGX6sxbxVBH": "D"},
        f"{AWAITING}\n{LETTERS}\n{LETTER}",
        {"direct"},
        ("22MexNkBPpdZGX6sxbxVBH", {"multiple_choice": "cab"}),
        given=("task.limit=1",),  # the second question's answer is not one of its options
    ),
    "chartqa": Case(
        vqa_layouts.write_chartqa,
        {"human-0": "14.0", "human-1": "0.58", "augmented-0": "27.5%", "augmented-1": "lamb"},
        f"How many food items are shown?\n{SHORT}",
        {"human", "augmented"},
        {"imgname": "41699051005347.png", "query": "How many food items are shown?", "prediction": "14.0"},
    ),
    "docvqa": Case(
        vqa_layouts.write_docvqa,
        {337: "1/8/93", 338: "P. CARTER"},
        f"what is the date mentioned in this letter?\n{SHORT}",
        {"handwritten", "form"},
        {"questionId": 337, "answer": "1/8/93"},
    ),
    "mmmu": Case(
        exam_layouts.write_mmmu,
        {"validation_Art_Theory_1": "B", "validation_Art_Theory_2": "It is 1000."},
        f"Compare <image> and <image> please\nA. the first\nB. <image>\nC. it's none\n{LETTER}",
        {"Art_Theory", "Art and Design", "multiple-choice", "open"},
        ("validation_Art_Theory_1", "B"),
        wrong="A",  # what names no letter is drawn
    ),
    "pope": Case(
        vqa_layouts.write_pope,
        {f"{kind}-{k + 1}-{k}": right for kind in CATEGORIES for k, right, _ in POPE},
        f"Is there a snowboard in the image?\n{SHORT}",
        set(CATEGORIES),
        {"question": "Is there a snowboard in the image?", "answer": "Yes"},
        wrong={f"{kind}-{k + 1}-{k}": wrong for kind in CATEGORIES for k, _, wrong in POPE},
    ),
    "gqa": Case(
        exam_layouts.write_gqa,
        {"201": "Red.", "202": "yes"},
        f"What color is it?\n{SHORT}",
        {"query", "verify", "open", "binary", "about attr"},
        {"questionId": "201", "prediction": "red"},
    ),
    "scienceqa": Case(
        exam_layouts.write_scienceqa,
        {"23": "A", "27": "B"},
        f"Which is cold?\nA. ice\nB. fire\n{LETTER}",
        {"natural science", "with image", "with text", "grades 7-12"},
        ("results", {"23": 0, "27": 1}),
    ),
    "coco_captions": Case(
        write_two_captioned,
        {1003: "A cat sits in box 3", 1004: "a cat sits in box 4 ."},
        "Provide a one-sentence caption for the provided image.",
        set(),
        {"image_id": 1003, "caption": "A cat sits in box 3"},
        full=10,  # CIDEr-D's
    ),
    "mathvista": Case(
        exam_layouts.write_mathvista,
        {"1": "It is 1.2", "2": "(B)"},
        "Hint: Please answer the question requiring a floating-point number answer.\nQuestion: How long? (Unit: m)",
        {"free_form", "multi_choice", "figure question answering", "math-targeted-vqa", "bar chart", "college"}
        | {"arithmetic reasoning", "algebra", "float", "text"},
        ("1", READ | {"question_type": "free_form", "choices": None, "answer_type": "float", "precision": 1.0}),
    ),
    "refcoco": Case(
        exam_layouts.write_refcoco,
        {10: "[0.1, 0.1, 0.6, 0.6]", 11: "at [0.100, 0.100, 0.600, 0.600]"},
        f"{BOX}left dog",
        set(),
        {"sent_id": 10, "box": [0.1, 0.1, 0.6, 0.6], "iou": 1.0},
    ),
}


# Sources of the public panels: writer, what `data/prepare.py` is given below it, and its options.
PANEL_SOURCES = {
    "vqav2": (vqa_layouts.write_vqav2, "", {}),
    "textvqa": (vqa_layouts.write_textvqa, "", {}),
    "chartqa": (vqa_layouts.write_chartqa, "", {}),
    "coco_captions": (instruct_layouts.coco_captions, "", {}),
    "obelics": (lambda folder: document_layouts.write_obelics(folder, built=True), "data", {"val": 0.9}),
    "sharegpt4v": (
        instruct_layouts.sharegpt4v,
        "",
        {"val": 0.9, "images": ("coco={raw}/a", "sam/images={raw}/b", "{raw}/c")},
    ),
    "fineweb_edu": (document_layouts.write_fineweb, "", {"val": 0.9}),
    # Of the benchmarks that `few_shot_public` asks besides.
    "coco_karpathy": (write_two_captioned, "", {"splits": ("test",)}),
    "vizwiz": (vqa_layouts.write_vizwiz, "", {}),
    "okvqa": (vqa_layouts.write_okvqa, "", {}),
}
PANELS = ("embedded", "panel", "speed", "few_shot", "panel_public", "speed_public", "few_shot_public")


def build(name: str, case: Case, folder: Path, tokenizer, *, train: dict | None = None, **changed):
    """The task as `eval.py task=<name>` builds it, over shards prepared as its source's file says.

    Args:
        train: options of the recipe; with them, or none of them, train shards are prepared as well.
        changed: arguments of the task.
    """
    recipe = OmegaConf.load(CONF / "task" / f"{name}.yaml").defaults[0]["/source@source"]
    raw = case.write(folder / "raw")
    settings = {"tokenizer": tokenizer.path, "template": "roles", "workers": 1}
    overrides = [f"task={name}", f"task.source.path={folder / 'shards'}", "checkpoint=none", *case.given]
    config = compose("eval", overrides).task
    OmegaConf.set_struct(config, False)
    task = build_task(OmegaConf.merge(config, changed))
    splits = (task.split,) if train is None else ("train", task.split)
    prepare(recipe, out=folder / "shards", path=str(raw), splits=splits, **settings, **(train or {}))
    return task


def write_answers(path: Path, answers: dict) -> Path:
    by = "question_id" if not any(re.search(r"\d-\d+$", str(name)) for name in answers) else "key"
    path.write_text(json.dumps([{by: name, "prediction": said} for name, said in answers.items()]))
    return path


@pytest.mark.parametrize("name", CASES)
def test_a_task_over_its_own_recipes_shards_scores_perfect_answers_in_full(name, tmp_path, tiny_tokenizer):
    case = CASES[name]
    task = build(name, case, tmp_path, tiny_tokenizer)
    index, windows = task.questions(tiny_tokenizer)
    (asked, *_), *_ = read_window(windows, index=index, source=task.source, transform=None, shown=frozenset())
    request = task.prompt.ask(asked.record)["messages"][-1]["content"]
    assert plain_text(request).removeprefix("<image>") == case.asked

    def score(answers: dict) -> dict:
        return task.score_file(write_answers(tmp_path / "said.json", answers), tiny_tokenizer, out=tmp_path)

    perfect = score(case.right)
    assert perfect["table"][-1][task.protocol.metric] == pytest.approx(case.full)
    assert {group for row in perfect["predictions"] for group in task.protocol.groups(row)} == case.groups
    if name == "pope":  # a file of lines per category
        lines = (tmp_path / "predictions/pope_random_official.jsonl").read_text().splitlines()
        assert len(lines) == len(POPE)
        official = [json.loads(line) for line in lines]
    else:
        official = json.loads((tmp_path / "predictions" / f"{name}_official.json").read_text())
    first = next(iter(official.items() if isinstance(official, dict) else official))
    assert first == case.official
    wrong = case.wrong if isinstance(case.wrong, dict) else dict.fromkeys(case.right, case.wrong)
    assert score(wrong)["table"][-1][task.protocol.metric] == 0


PUBLIC = OmegaConf.load(CONF / "task" / "few_shot_public.yaml").benchmarks
BASIL = "<I>Question: What is this? And what is it called? Short answer:"
BRAND = f"<I>Question: {PHONE} Short answer:"
CALLED = "<I>Question: What is the hairstyle called? Short answer:"
NOKIA = f"<|user|><I>{PHONE}\nReference OCR token: NOKIA, 6:04\n{SHORT}<|assistant|>"
CAB = f"<|user|><I>{AWAITING}\n{LETTERS}\n{LETTER}<|assistant|>"
# Options of the recipe, arguments of the task, and what the model reads with one example.
SHOTS = {
    "coco_captions": ({}, PUBLIC.coco_captions, "<I>A cat 0 1.\n<I>"),
    "vqav2": (
        {},
        PUBLIC.vqav2,
        "<I>Question: Is zero an id? Short answer: yes\n<I>Question: What is it? Short answer:",
    ),
    "textvqa": ({}, PUBLIC.textvqa, f"{BRAND} nokia\n{BRAND}"),
    "vizwiz": ({}, PUBLIC.vizwiz, f"{BASIL} basil\n{BASIL}"),
    "okvqa": ({}, PUBLIC.okvqa, f"{CALLED} racing\n{CALLED}"),
    "textvqa_ocr": ({"ocr": True}, {}, f"{NOKIA}nokia<|end|>{NOKIA}"),
    "aokvqa_choice": ({"form": "choice"}, {}, f"{CAB}D<|end|>{CAB}"),
    "mmmu": (
        {},
        {"form": "document"},
        "<I>Question: How much?\n<image 3> Short answer: 1,000\n"
        "Question: Compare <I> and <I> please\nA. the first\nB. <I>\nC. it's none Short answer:",
    ),
}


@pytest.mark.parametrize("name", SHOTS)
def test_an_example_of_the_train_shards_stands_before_a_question_as_the_question_is_put(
    name, tmp_path, tiny_tokenizer, monkeypatch
):
    options, arguments, text = SHOTS[name]
    task = build(name, CASES[name], tmp_path, tiny_tokenizer, train=options, shots=1, **arguments)
    read, encode = [], Engine.encode_prompt

    def remember(self, record, *, slots, **more):
        ids = encode(self, record, slots=slots, **more)
        assert ids.count(tiny_tokenizer.image_id) == sum(slots)
        read.append(re.sub(r"(<\|image\|>)+", "<I>", tiny_tokenizer.hf.decode(ids)))
        return ids

    monkeypatch.setattr(Engine, "encode_prompt", remember)
    result = task.run(build_model(tiny_tokenizer, max_positions=1024), tiny_tokenizer, image_size=IMAGE_SIZE)
    assert read[0] == text
    assert result["asked"]["shots"] == 1 and not any("fault" in row for row in result["predictions"])


def test_an_example_that_does_not_fit_its_question_is_said_with_what_mends_it(tmp_path, tiny_model, tiny_tokenizer):
    for name, message in {
        "aokvqa_choice": r"example 299207 of .* answered with 'ride', not with an option's letter: .* form=choice",
        "textvqa_ocr": r"no recognised text for 0054c91397f2fe05; .* those of examples with ocr=true",
    }.items():
        task = build(name, CASES[name], tmp_path / name, tiny_tokenizer, train={}, shots=1)
        with pytest.raises(ValueError, match=message):
            task.run(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE)


def test_every_task_is_one_of_these():
    names = {file.stem for file in (CONF / "task").glob("*.yaml")}
    texts = {name for name in names if OmegaConf.load(CONF / "task" / f"{name}.yaml")._target_.endswith("TextGuard")}
    assert names == {*CASES, *PANELS, *texts}


def test_a_question_whose_answer_is_none_of_its_options_is_named(tmp_path, tiny_tokenizer):
    task = build("aokvqa_choice", replace(CASES["aokvqa_choice"], given=()), tmp_path, tiny_tokenizer)
    answers = dict.fromkeys(("22MexNkBPpdZGX6sxbxVBH", "2aVb8DyGs3bYXkBqdUZmzU"), "D")
    with pytest.raises(ValueError, match="question 2aVb8DyGs3bYXkBqdUZmzU: correct_choice_idx=4 .* 4 choices"):
        task.score_file(write_answers(tmp_path / "said.json", answers), tiny_tokenizer)


@pytest.fixture(scope="module")
def panel_shards(tmp_path_factory, tiny_tokenizer) -> Path:
    root = tmp_path_factory.mktemp("panel")
    for name, (write, below, options) in PANEL_SOURCES.items():
        raw = write(root / "raw" / name) / below
        if "images" in options:
            options = options | {"images": tuple(place.format(raw=raw) for place in options["images"])}
        settings = {"tokenizer": tiny_tokenizer.path, "template": "roles", "workers": 1, "splits": ("val",)}
        prepare(name, out=root / "shards" / name, path=str(raw), **(settings | options))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", PANELS)
def test_a_panel_over_its_sources_shards_scores_perfect_answers_in_full(
    name, request, tiny_model, tiny_tokenizer, tmp_path, monkeypatch
):
    """The oracle stands where the model is asked with the right images, which is first; all else is the model's."""
    asked, calls = [], []
    read, answer = short_answers.read_questions, short_answers._answer_all

    def remember(*args, **kwargs):
        asked.extend(questions := read(*args, **kwargs))
        return questions

    def know(engine, prompts, visual, **options):
        calls.append(len(prompts))
        given = answer(engine, prompts, visual, **options)
        return [(question.answer, 1) for question in asked] if len(calls) == 1 else given

    monkeypatch.setattr(short_answers, "read_questions", remember)
    monkeypatch.setattr(short_answers, "_answer_all", know)
    monkeypatch.setenv(
        "FASTVLM_DATA", str(request.getfixturevalue("panel_shards" if name.endswith("public") else "embedded"))
    )
    overrides = [f"task={name}", "checkpoint=none", "task.max_new_tokens=2", "task.text_limit=2", "task.limit=2"]
    overrides += ["task.records=3"] if name != "embedded" else []
    overrides += ["task.timed=1", "task.tokens=2"] if name.startswith("speed") else []
    # These shards hold a question or two, and none to train on.
    overrides += ["task.shots=[0]", "task.benchmark_shots=[0]"] if name.startswith("few_shot") else []
    task = build_task(compose("eval", overrides).task)
    metrics = task.run(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE, out=tmp_path)["metrics"]
    assert metrics["test/exact_match/mean"] == 1 and set(task.sources) == {q.source for q in asked}
    assert {f"test/nll/{source}" for source in getattr(task, "held_out", ())} <= set(metrics)
    assert metrics["test/text_tokens"] > 0
    if name.endswith("public"):
        kinds = {"other", "yes/no", "number", "textvqa", "human", "augmented"}
        assert {kind for kind in kinds if metrics[f"test/exact_match/{kind}"] == 1} == kinds
    if name.startswith("speed"):
        assert metrics["test/speed/ttft_ms"] > 0
    if name.startswith("few_shot"):
        assert metrics["test/answer_nll/shots/0"] > 0
    if name == "few_shot_public":
        figures = (
            "coco_captions/shots/0/cider",
            *(f"{n}/shots/0/vqa_accuracy" for n in ("vqav2", "textvqa", "vizwiz", "okvqa")),
        )
        mean = sum(metrics[f"test/{figure}"] for figure in figures) / 5
        assert metrics["test/benchmarks/shots/0"] == pytest.approx(mean)
