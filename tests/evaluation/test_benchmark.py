"""A benchmark from shards to its files, on two pictures' worth of questions and a model of random weights."""

import base64
import json
import shutil

import numpy as np
import pytest
import torch
from tiny_vlm import IMAGE_SIZE
from tiny_world import draw_png

from fastvlm.data.shards import ShardReader, ShardWriter
from fastvlm.data.source import Source
from fastvlm.evaluation import benchmark as module
from fastvlm.evaluation.aokvqa import DirectAnswer, MultipleChoice
from fastvlm.evaluation.benchmark import Benchmark
from fastvlm.evaluation.captions import Captions
from fastvlm.evaluation.compare import compare, main, mcnemar, read_scores
from fastvlm.evaluation.predictions import read_rows, write_predictions
from fastvlm.evaluation.prompts import Prompt, split_question
from fastvlm.evaluation.ranks import find_ranks
from fastvlm.evaluation.scores import cluster_interval, make_result
from fastvlm.evaluation.vqa_accuracy import VQAAccuracy
from fastvlm.inference.engine import Engine

SHORT = "Answer the question using a single word or phrase."
CHOICES = ["digit", "seven", "number", "nine"]


def record(i: int) -> dict:
    words = ["what is here", "which number stands left of the small grey digit", "what is shown"][i % 3]
    content = [{"type": "image"}, {"type": "text", "text": f"{words}\n{SHORT}"}]
    meta = {"question_id": 100 + i, "image_id": i // 4, "type": ["name", "count"][i % 2], "turns": 1}
    meta |= {"answers": ["seven"] * 6 + ["nine"] * 4, "choices": CHOICES, "correct_choice_idx": 1}
    meta |= {"direct_answers": ["seven"] * 10, "difficult_direct_answer": i % 5 == 0, "ocr_tokens": ["a", "b"]}
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "seven"}]
    return {"messages": messages, "id": 100 + i, "source": "tiny", "meta": meta}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    for split, count in (("val", 22), ("train", 9)):
        with ShardWriter(folder, split, max_samples=8) as writer:
            for i in range(count):
                picture = draw_png((500 if split == "train" else 0) + i // 4, (24, 20))
                writer.write(f"{split}-{i:03d}", record(i), [picture])
    return folder


@pytest.fixture
def task(shards):
    def make(protocol=None, **options):
        options = {"batch_size": 3, "window": 5, "max_new_tokens": 6, "resamples": 50, "thumbnails": 4} | options
        return Benchmark("tiny", source=Source("tiny", path=shards), protocol=protocol or VQAAccuracy(), **options)

    return make


@pytest.fixture
def run(tiny_model, tiny_tokenizer):
    return lambda task, out=None: task.run(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE, out=out)


@pytest.fixture
def predict(tiny_model, tiny_tokenizer):
    def go(task, out, **options):
        return task.predict(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE, out=out, **options)

    return go


def said(result: dict) -> list[str]:
    return [row["prediction"] for row in result["predictions"]]


def test_every_answer_is_the_engines_own_one_question_at_a_time(task, run, shards, tiny_model, tiny_tokenizer):
    result = run(task())
    engine = Engine(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE, max_new_tokens=6)
    index = Source("tiny", path=shards).load("val", tiny_tokenizer)
    for i in (0, 1, 7, 21):
        raw = index.read(i, ShardReader())
        asked = {"messages": raw.record["messages"][:1]}
        alone = engine.generate([asked], [[engine.transform(raw.images[0])]])[0]
        assert result["predictions"][i]["prediction"] == alone.text
        assert result["predictions"][i]["tokens"] == len(alone.token_ids)
    assert len(set(said(result))) > 3  # else nothing above could fail


def test_an_image_is_encoded_once_and_every_question_keeps_its_place(task, run, monkeypatch):
    counted = []
    encode = Engine.encode_images
    monkeypatch.setattr(
        Engine, "encode_images", lambda self, images: counted.append(len(images)) or encode(self, images)
    )
    result = run(task(window=22))
    assert sum(counted) == 6  # of 22 questions
    assert [row["question_id"] for row in result["predictions"]] == [100 + i for i in range(22)]
    assert said(run(task(window=4, batch_size=2, cache_mb=0))) == said(result)


def test_ranks_share_the_windows_and_leave_what_one_rank_would(task, run, predict, tmp_path):
    whole = run(task(), tmp_path / "one")
    for rank in range(3):
        predict(task(), tmp_path / "three", rank=rank, num_ranks=3)
    shared = task().score(task().collect(tmp_path / "three"), out=tmp_path / "three")
    assert said(shared) == said(whole)
    files = [(tmp_path / name / "predictions" / "tiny.jsonl").read_bytes() for name in ("one", "three")]
    assert files[0] == files[1]


def test_a_killed_run_goes_on_to_the_same_bytes_and_asks_nothing_twice(task, run, predict, tmp_path, monkeypatch):
    whole = run(task(), tmp_path / "whole")
    asked = []
    answer = module.answer_window

    def dies(engine, window, **options):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append([q.key for q in window])
        return answer(engine, window, **options)

    monkeypatch.setattr(module, "answer_window", dies)
    with pytest.raises(KeyboardInterrupt):
        predict(task(), tmp_path / "killed")
    with pytest.raises(ValueError, match="3 of 5 windows .* run the same command again"):
        task().collect(tmp_path / "killed")
    first = list(asked)
    monkeypatch.setattr(
        module, "answer_window", lambda e, w, **o: asked.append([q.key for q in w]) or answer(e, w, **o)
    )
    result = run(task(), tmp_path / "killed")
    assert asked[:2] == first and len({key for window in asked for key in window}) == 22 == sum(map(len, asked))
    assert said(result) == said(whole)
    files = [(tmp_path / name / "predictions" / "tiny.jsonl").read_bytes() for name in ("whole", "killed")]
    assert files[0] == files[1]


def test_other_examples_do_not_take_up_old_answers(task, run, tmp_path, monkeypatch):
    drawn = task(shots=2).examples
    before = said(run(task(shots=2), tmp_path))
    monkeypatch.setattr(Benchmark, "examples", lambda self, tokenizer: drawn(tokenizer)[::-1])
    after = said(run(task(shots=2), tmp_path))
    assert after == said(run(task(shots=2))) != before


def test_other_weights_or_another_prompt_do_not_take_up_old_answers(task, run, tiny_model, tmp_path):
    first = run(task(), tmp_path)
    with torch.no_grad():
        weight = next(tiny_model.projector.parameters())
        before = weight.clone()
        weight.neg_()
        second = run(task(), tmp_path)
        weight.copy_(before)
    assert said(first) != said(second)
    assert said(run(task(instruction=""), tmp_path)) != said(first)
    assert said(run(task(), tmp_path)) == said(first)


def test_the_files_hold_every_question_its_picture_and_the_official_form(task, run, tmp_path):
    result = run(task(), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "predictions/tiny.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [f"val-{i:03d}" for i in range(22)]
    assert (
        lines[1]["question"] == "which number stands left of the small grey digit" and lines[1]["answers"][0] == "seven"
    )
    shown = [line for line in lines if "image" in line]
    assert len(shown) == 4 and all((tmp_path / "predictions" / line["image"]).is_file() for line in shown)
    official = json.loads((tmp_path / "predictions/tiny_official.json").read_text())
    assert official[3] == {"question_id": 103, "answer": lines[3]["prediction"]}
    page = (tmp_path / "predictions/tiny.html").read_text()
    assert all(line["image"] in page for line in shown) and "<script" not in page
    assert {row["type"] for row in result["table"]} == {"name", "count", "all"}
    assert result["metrics"]["test/tiny/vqa_accuracy"] == pytest.approx(np.mean([line["score"] for line in lines]))
    assert "without OCR tokens" in task().render(result)


def test_questions_without_an_id_of_their_image_are_told_apart_by_their_images(run, tiny_tokenizer, tmp_path):
    with ShardWriter(tmp_path / "ids", "val") as writer:
        for i in range(6):
            images = [draw_png(i // 2)] if i < 4 else []  # two questions each on two images, two on none
            content = [{"type": "image"}] * len(images) + [{"type": "text", "text": "which digit"}]
            turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "one"}]
            writer.write(f"q{i}", {"messages": turns, "meta": {"question_id": i, "answers": ["one"]}}, images)
    source = Source("ids", path=tmp_path / "ids")
    task = Benchmark("tiny", source=source, protocol=VQAAccuracy(), max_new_tokens=4)
    result = run(task, tmp_path)
    lines = (tmp_path / "predictions" / "tiny.jsonl").read_text().splitlines()
    first, second, third, fourth, *rest = [json.loads(line)["image_id"] for line in lines]
    assert first == second and third == fourth and len({first, third, *rest}) == 4
    again = task.score_file(tmp_path / "predictions" / "tiny.jsonl", tiny_tokenizer)
    assert again["table"][-1] == result["table"][-1]


def test_answers_of_a_file_are_scored_and_other_questions_refused(task, run, tiny_tokenizer, tmp_path):
    result = run(task(), tmp_path)
    again = task().score_file(tmp_path / "predictions/tiny.jsonl", tiny_tokenizer)
    assert again["metrics"]["test/tiny/vqa_accuracy"] == result["metrics"]["test/tiny/vqa_accuracy"]
    right = tmp_path / "right.json"
    right.write_text(json.dumps([{"question_id": 100 + i, "answer": "Seven."} for i in range(22)]))
    assert task().score_file(right, tiny_tokenizer)["metrics"]["test/tiny/vqa_accuracy"] == 1
    other = tmp_path / "other.json"
    for rows, words in (
        ([{"question_id": 7, "answer": "x"}], "no answer to question 100 .* such as to 7"),
        ([{"question_id": 100 + i, "answer": "x"} for i in range(23)], "does not ask, such as 122"),
        ([{"question_id": 100, "answer": "x"}] * 2, "row 2: question 100 is answered twice"),
        ([{"question_id": 100, "answer": None}], "no answer in words"),
    ):
        other.write_text(json.dumps(rows))
        with pytest.raises(ValueError, match=words):
            task().score_file(other, tiny_tokenizer)
    for text, words in (
        ("[1, 2]", "row 1: 1 is not an object"),
        ("[null]", "row 1: null is not an object"),
        ('{"question_id": 100, "answer": "x"}\n\n2', "line 3: 2 is not an object"),
        ('["question_id answer"]', 'row 1: "question_id answer" is not an object'),
    ):
        other.write_text(text)
        with pytest.raises(ValueError, match=f"predictions={other}, {words} with a question_id and an answer"):
            task().score_file(other, tiny_tokenizer)
    with pytest.raises(ValueError, match="No such file"):
        task().score_file(tmp_path / "nothing.json", tiny_tokenizer)


def test_a_task_without_data_names_the_command_that_makes_it(task, run, tmp_path):
    empty = Benchmark("tiny", source=Source("vqav2", path=tmp_path), protocol=VQAAccuracy())
    with pytest.raises(ValueError, match="no val shards in .*prepare.py source=vqav2 splits=val"):
        run(empty)
    with pytest.raises(ValueError, match="holds no question|no test shards"):
        run(task(split="test"))
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        task(batch_size=0)


def test_an_unreadable_image_and_a_prompt_too_long_are_named_and_scored_as_empty(task, run, shards, tmp_path):
    folder = tmp_path / "broken"
    with ShardWriter(folder, "val") as writer:
        writer.write("good", record(0), [draw_png(0)])
        long = record(1)
        long["messages"][0]["content"][1]["text"] = "what number " * 300
        writer.write("long", long, [draw_png(0)])
    source = Source("broken", path=folder)
    result = run(Benchmark("broken", source=source, protocol=VQAAccuracy(), max_new_tokens=4))
    good, long = result["predictions"]
    assert "fault" not in good and good["tokens"] > 0
    assert long["prediction"] == "" and long["score"] == 0 and "the model ends at 256" in long["fault"]
    assert sum(result["faults"].values()) == 1 and "1 questions could not be asked" in task().render(result)


def test_limit_spreads_over_the_split(task, run):
    result = run(task(limit=4))
    assert [row["question_id"] for row in result["predictions"]] == [100, 107, 114, 121]


def test_shots_are_nested_and_the_same_for_every_question(task, tiny_tokenizer):
    four, eight = task(shots=4).examples(tiny_tokenizer), task(shots=8).examples(tiny_tokenizer)
    assert [r["id"] for r, _ in eight][:4] == [r["id"] for r, _ in four] and len({r["id"] for r, _ in eight}) == 8
    with pytest.raises(ValueError, match="train holds 9 readable samples"):
        task(shots=10).examples(tiny_tokenizer)


@pytest.mark.parametrize("shots", [0, 4, 8])
def test_few_shot_prompts_end_where_the_answer_begins(task, tiny_tokenizer, shots):
    bench = task(shots=shots, form="document")
    examples = [r for r, _ in bench.examples(tiny_tokenizer)]
    document = bench.prompt.ask(record(0), examples)["document"]
    assert [part["type"] for part in document] == ["image", "text"] * (shots + 1)
    assert document[-1]["text"] == "Question: what is here Short answer:"
    assert all(part["text"].endswith(" Short answer: seven\n") for part in document[1:-1:2])
    chat = Prompt().ask(record(0), examples)["messages"]
    assert [m["role"] for m in chat] == ["user", "assistant"] * shots + ["user"]
    assert chat[-1]["content"] == record(0)["messages"][0]["content"]


def test_a_few_shot_run_of_running_text_stops_at_the_line(task, run):
    result = run(task(shots=4, form="document", max_new_tokens=12))
    assert result["asked"] == {"form": "document", "shots": 4, "ocr_tokens": False, "instruction": "as in the shards"}
    assert not any("\n" in text for text in said(result))


@pytest.mark.parametrize(
    "options, text",
    [
        ({}, f"what is here\n{SHORT}"),
        ({"instruction": ""}, "what is here"),
        ({"ocr": True}, f"what is here\nReference OCR token: a, b\n{SHORT}"),
        ({"options": True, "instruction": "Letter."}, "what is here\nA. digit\nB. seven\nC. number\nD. nine\nLetter."),
    ],
)
def test_a_question_is_put_as_the_task_says(options, text):
    assert Prompt(**options).question(record(0))[-1]["text"] == text


def test_what_a_recipe_put_under_a_question_is_taken_away_or_kept_as_the_task_says():
    listed = "A. digit\nB. seven\nC. number\nD. nine"
    put = record(0)
    put["messages"][0]["content"][1]["text"] = f"what is here\n{listed}\n{SHORT}"
    assert split_question(f"what is here\n{listed}\n{SHORT}", put["meta"]) == ("what is here", listed, "", SHORT)
    assert Prompt().question(put)[-1]["text"] == f"what is here\n{listed}\n{SHORT}"
    assert Prompt(options=False).question(put)[-1]["text"] == f"what is here\n{SHORT}"
    assert Prompt(options=True).question(put)[-1]["text"] == f"what is here\n{listed}\n{SHORT}"
    seen = Prompt(ocr=True).question(record(0))[-1]["text"]
    assert split_question(seen, {"choices": CHOICES}) == ("what is here", "", "Reference OCR token: a, b", SHORT)
    assert split_question("1\n2", {}) == ("1\n2", "", "", "")


def test_questions_marked_difficult_are_asked_and_not_counted(task, run):
    result = run(task(DirectAnswer()))
    assert result["table"][-1]["n"] == 17 and len(result["predictions"]) == 22
    assert run(task(MultipleChoice(), options=True))["table"][-1]["n"] == 22


def test_captions_are_asked_of_documents(run, tmp_path):
    with ShardWriter(tmp_path, "test") as writer:
        for i in range(3):
            document = [{"type": "image"}, {"type": "text", "text": "a small grey digit"}]
            meta = {"image_id": i, "question_id": i, "answers": ["a small grey digit", "the digit seven"]}
            writer.write(f"c{i}", {"document": document, "id": i, "meta": meta}, [draw_png(i)])
    source = Source("captions", path=tmp_path)
    options = {"split": "test", "request": "what is here", "resamples": 10}
    task = Benchmark("captions", source=source, protocol=Captions(tokenizer="python"), **options)
    result = run(task)
    assert result["asked"]["tokenizer"].startswith("python (ptb.py, within 0.1 %"), "what cut them into tokens"
    assert f"\ntokens of captions: {result['asked']['tokenizer']}" in task.render(result)
    assert {"test/captions/cider", "test/captions/bleu_4", "test/captions/rouge_l"} <= set(result["metrics"])
    assert result["predictions"][0]["answers"] == ["a small grey digit", "the digit seven"]


def test_two_runs_are_compared_on_the_same_questions(task, run, tmp_path, capsys):
    run(task(), tmp_path / "a" / "eval")
    run(task(max_new_tokens=1), tmp_path / "b" / "eval")
    run(task(limit=5), tmp_path / "c" / "eval")
    assert main([f"a={tmp_path}/a", f"b={tmp_path}/b", "task=tiny"]) == 0
    assert "on 22 questions" in capsys.readouterr().out
    for arguments, words in (
        ([f"a={tmp_path}/a", f"b={tmp_path}/c", "task=tiny"], "answers to other questions (22 and 5, 5 in common"),
        ([f"a={tmp_path}/a", f"b={tmp_path}/d", "task=tiny"], "holds no predictions of task tiny"),
        (["a=x", "bb=y"], "bb=y is not one of a=, b=, task="),
    ):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err


def test_the_paired_interval_covers_a_true_difference_and_mcnemar_is_the_binomial_test():
    from scipy.stats import binomtest

    for only_a, only_b in ((0, 0), (3, 9), (1, 0), (40, 80), (700, 800)):
        expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
        assert mcnemar(only_a, only_b) == pytest.approx(expected)
    rng = np.random.default_rng(0)
    rows = [
        {str(i): {"score": float(rng.random() < share), "image_id": i // 2} for i in range(2000)}
        for share in (0.5, 0.6)
    ]
    found = compare(*rows, resamples=400)
    assert found["interval"][0] < found["difference"] < found["interval"][1] and found["interval"][0] > 0
    assert found["p"] < 0.05 and found["mcnemar_p"] < 0.05
    assert compare(rows[0], rows[0], resamples=100)["difference"] == 0


def test_the_interval_of_clustered_scores_is_wider():
    scores = [float(i < 50) for i in range(100) for _ in range(10)]
    apart = cluster_interval(scores, list(range(1000)), resamples=400)
    together = cluster_interval(scores, [i // 10 for i in range(1000)], resamples=400)
    width = lambda interval: interval[1] - interval[0]
    assert width(together) > 2.5 * width(apart)
    normal = 2 * 1.96 * 0.5 / np.sqrt(1000)
    assert width(apart) == pytest.approx(normal, rel=0.15)


@pytest.mark.parametrize(
    "environment, wanted, expected",
    [
        ({}, 1, (0, 0, 1)),
        ({}, 4, (None, 0, 4)),
        ({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}, 4, (5, 1, 8)),
        ({"SLURM_PROCID": "2", "SLURM_LOCALID": "2", "SLURM_STEP_NUM_TASKS": "4"}, 4, (2, 2, 4)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, 1, (0, 0, 1)),  # a batch script, not a step
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}, 1, (0, 0, 1)),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}, 8, (None, 0, 8)),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "RANK": "3", "WORLD_SIZE": "8"}, 8, (3, 0, 8)),
    ],
)
def test_ranks_are_found_as_they_were_started(environment, wanted, expected):
    ranks = find_ranks(wanted, environment)
    assert (ranks.rank, ranks.local, ranks.count) == expected


QUESTION = {"image_id": 1, "type": "", "question": "?", "answers": ["a"], "meta": {}}


def test_an_end_of_line_that_a_model_says_ends_no_line_of_its_predictions(tmp_path):
    said = "a\u2028b\x85c\x0cd"
    rows = [QUESTION | {"key": key, "question_id": key, "prediction": said} for key in "xy"]
    result = make_result("tiny", rows, protocol=VQAAccuracy(), split="val", resamples=5)
    write_predictions(tmp_path, result, protocol=VQAAccuracy())
    assert read_rows(tmp_path / "predictions" / "tiny.jsonl") == ({"x": said, "y": said}, "key")
    assert read_scores(tmp_path, "tiny").keys() == {"x", "y"}


def test_answers_by_question_may_stand_in_one_object_of_several_lines(tmp_path):
    said = {"val_1": "B", "val_2": "C"}
    for indent in (None, 4):
        (tmp_path / "said.json").write_text(json.dumps(said, indent=indent))
        assert read_rows(tmp_path / "said.json") == (said, "question_id")


def test_two_keys_that_differ_in_a_slash_keep_thumbnails_of_their_own(tmp_path):
    code = lambda data: "data:image/jpeg;base64," + base64.b64encode(data).decode()
    rows = [
        QUESTION | {"key": key, "question_id": key, "prediction": "a", "thumbnail": code(key.encode())}
        for key in ("a/b", "a-b")
    ]
    result = make_result("tiny", rows, protocol=VQAAccuracy(), split="val", resamples=5)
    examples = write_predictions(tmp_path, result, protocol=VQAAccuracy())
    assert [(tmp_path / example["image"]).read_bytes() for example in examples] == [b"a/b", b"a-b"]


def test_questions_that_could_not_be_asked_are_counted_by_reason_whatever_the_numbers_in_it():
    reasons = ("the prompt has 300 tokens: x", "the prompt has 31 tokens: x", "no image: cut", "no image: x")
    rows = [QUESTION | {"key": why, "question_id": why, "prediction": "", "fault": why} for why in reasons]
    result = make_result("tiny", rows, protocol=VQAAccuracy(), split="val", resamples=5)
    assert result["faults"] == {"the prompt has 300 tokens": 2, "no image": 2}


def test_predictions_without_scores_are_no_comparison(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"key": "a", "prediction": "b"}\n')
    with pytest.raises(ValueError, match="no scored predictions"):
        read_scores(tmp_path / "x.jsonl", "tiny")
    for wrong in ('{"score": 1}\n', "[1]\n", "3\n", '{"key": "a", "sco'):
        (tmp_path / "x.jsonl").write_text(wrong)
        with pytest.raises(ValueError, match="x.jsonl .* score it again with"):
            read_scores(tmp_path / "x.jsonl", "tiny")
    shutil.rmtree(tmp_path)
