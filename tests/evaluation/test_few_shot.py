import copy
from types import SimpleNamespace

import pytest
import torch
from test_short_answers import write_questions
from tiny_vlm import IMAGE_SIZE, build_model, draw_png

from fastvlm.data.conversation import encode_record
from fastvlm.data.source import Source
from fastvlm.data.transforms import ImageTransform
from fastvlm.evaluation import few_shot, short_answers
from fastvlm.evaluation.answering import Asked, answer_window
from fastvlm.evaluation.benchmark import Benchmark
from fastvlm.evaluation.few_shot import draw_examples, score_after
from fastvlm.evaluation.few_shot_panel import FewShotPanel
from fastvlm.evaluation.likelihood import answer_nll
from fastvlm.evaluation.prompts import Prompt
from fastvlm.evaluation.questions import Question, encode_once, read_questions
from fastvlm.evaluation.vqa_accuracy import VQAAccuracy
from fastvlm.inference.engine import Engine
from fastvlm.tokens import IGNORE_INDEX

PROMPTS = {"chat": Prompt(), "document": Prompt(form="document")}


@pytest.fixture(scope="module")
def engine(tiny_model, tiny_tokenizer):
    return Engine(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return Source("questions", path=write_questions(tmp_path_factory.mktemp("shots"), split="test", per_type=7))


@pytest.fixture(scope="module")
def questions(source, tiny_tokenizer):
    index = source.load("test", tiny_tokenizer)
    return read_questions(index, source="questions", limit=None, transform=ImageTransform(image_size=IMAGE_SIZE))


@pytest.fixture(scope="module")
def visual(engine, questions):
    return encode_once(engine, questions)


def score(engine, questions, visual, *, shots, prompt="chat"):
    drawn = draw_examples(questions, count=shots)
    return score_after(engine, questions, drawn, visual, prompt=PROMPTS[prompt], batch_size=8)


def file_of(question):
    """The file that `write_questions` gave it."""
    _, kind, number = question.key.split("-")
    return draw_png(1000 * len(kind) + int(number))


def question(key, image, kind="count"):
    messages = [{"role": "user", "content": "what is it"}]
    return Question(key=key, source="s", type=kind, messages=messages, answer="one", image_ids=(image,))


def test_examples_are_of_the_type_and_never_show_the_questions_image_or_one_twice():
    made = [question(f"q{i}", f"image {i // 2}") for i in range(12)]  # two questions about every image
    made += [question(f"other{i}", f"image {i}", kind="nth") for i in range(6)]
    for place, drawn in enumerate(draw_examples(made, count=4)):
        shown = [made[other].image_ids[0] for other in drawn]
        assert len({*shown, made[place].image_ids[0]}) == 5
        assert {made[other].type for other in drawn} == {made[place].type}
    with pytest.raises(ValueError, match=r"task.shots=6: of type count there are 5 questions .* raise task.limit"):
        draw_examples(made, count=6)


def test_examples_depend_on_the_question_alone_and_fewer_are_the_first_of_more(questions):
    four = draw_examples(questions, count=4)
    assert four == draw_examples(copy.deepcopy(questions), count=4)
    assert [places[:2] for places in four] == draw_examples(questions, count=2)
    # Every question has its own: 7 of a type leave 360 orders of four.
    assert len({tuple(places) for places in four}) > len(questions) - 3


def test_without_examples_a_conversation_is_scored_as_the_plain_answer(engine, questions, visual):
    plain = answer_nll(
        engine.model, engine.tokenizer, [q.answered for q in questions], visual, tokens_per_view=engine.tokens_per_image
    )
    for (nats, tokens, _), (want, num) in zip(score(engine, questions, visual, shots=0), plain):
        assert tokens == num and nats == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("form", PROMPTS)
def test_what_is_scored_follows_the_prompt_that_a_benchmark_would_be_given(
    form, engine, questions, visual, monkeypatch
):
    """`answer_window` is how `Benchmark` asks: its prompt's tokens and its visual tokens are those scored here."""
    asked, scored = [], []

    def remember(records, shown, **_):
        asked.extend(zip(records, shown))
        return [SimpleNamespace(text="", token_ids=[])] * len(records)

    monkeypatch.setattr(engine, "generate_from_visual", remember)
    monkeypatch.setattr(
        few_shot, "token_scores", lambda model, tok, rows, seen, **_: scored.extend(zip(rows, seen)) or []
    )
    drawn, prompt = draw_examples(questions, count=2), PROMPTS[form]
    for question, places in zip(questions, drawn):
        files = [file_of(question)] if question.images else []
        examples = [(questions[i].answered, [file_of(questions[i])] if files else []) for i in places]
        put = Asked(question.key, question.answered, files, list(question.image_ids))
        answer_window(engine, [put], prompt=prompt, examples=examples)
    score_after(engine, questions, drawn, visual, prompt=prompt)
    assert len(asked) == len(scored) == len(questions)
    for question, (record, shown), ((ids, labels), seen) in zip(questions, asked, scored):
        slots = [len(image) for image in shown]
        begun = encode_record(record, engine.tokenizer, tokens_per_image=slots, prompt=True).input_ids
        assert ids[: len(begun)] == begun and set(labels[: len(begun)]) == {IGNORE_INDEX}
        assert len(shown) == 3 * len(question.images)
        torch.testing.assert_close(list(seen), list(shown), rtol=0, atol=1e-4)
        learned = [label for label in labels if label != IGNORE_INDEX]
        ends = [engine.tokenizer.end_id] if form == "chat" else engine.tokenizer.encode_text("\n")
        said = question.answer if form == "chat" else f" {question.answer}"
        assert learned == engine.tokenizer.encode_text(said) + ends


def test_an_answer_is_right_where_greedy_decoding_takes_its_every_token(engine, questions, visual, monkeypatch):
    best = [torch.tensor([True, i % 2 == 0]) for i in range(len(questions))]
    monkeypatch.setattr(few_shot, "token_scores", lambda *_, **__: [(torch.tensor([1.0, 2.0]), one) for one in best])
    assert score(engine, questions, visual, shots=0) == [(3.0, 2, i % 2 == 0) for i in range(len(questions))]


def test_an_example_changes_what_is_scored_and_its_image_does(engine, questions, visual):
    drawn = draw_examples(questions, count=1)
    after = score_after(engine, questions, drawn, visual, prompt=Prompt())
    place = next(i for i, q in enumerate(questions) if q.images)
    alone = score_after(engine, questions, [[]] * len(questions), visual, prompt=Prompt())
    assert abs(after[place][0] - alone[place][0]) > 1e-3
    swapped = list(visual)
    swapped[drawn[place][0]] = visual[place]
    other = score_after(engine, questions, drawn, swapped, prompt=Prompt())
    assert abs(other[place][0] - after[place][0]) > 1e-4


def test_a_panel_yields_every_number_of_shots_of_questions_that_it_reads_and_encodes_once(
    source, engine, questions, visual, tiny_model, tiny_tokenizer, monkeypatch
):
    read, encoded = [], []
    monkeypatch.setattr(short_answers, "read_questions", lambda *a, **o: read.append(a) or read_questions(*a, **o))
    monkeypatch.setattr(short_answers, "encode_once", lambda *given: encoded.append(given) or encode_once(*given))
    task = FewShotPanel({"questions": source}, shots=[0, 2], first_token=0, limit=7, max_new_tokens=2, batch_size=8)
    metrics = task.run(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE)["metrics"]
    assert metrics["test/answer_nll/shots/0"] == pytest.approx(metrics["test/answer_nll"], abs=1e-4)
    gain = metrics["test/answer_nll/shots/0"] - metrics["test/answer_nll/shots/2"]
    assert metrics["test/answer_nll_gain/2"] == gain != 0
    assert 0 <= metrics["test/exact_match/shots/2"] <= 1
    assert len(read) == len(encoded) == 1
    again = task.score_shots(engine, questions, visual)
    assert again == {key: metrics[key] for key in again}


def test_a_benchmark_asked_with_examples_needs_train_shards(source):
    benchmarks = {"plain": Benchmark("plain", source=source, protocol=VQAAccuracy(), split="test")}
    panel = lambda shots: FewShotPanel({"questions": source}, benchmarks=benchmarks, benchmark_shots=shots)
    panel([0]).require_shards()
    with pytest.raises(ValueError, match="task plain: shots=4 come from train: no train shards in .*splits=train"):
        panel([0, 4]).require_shards()


def test_a_prompt_longer_than_the_model_is_said(source, questions, tiny_tokenizer):
    short = Engine(build_model(tiny_tokenizer, max_positions=24), tiny_tokenizer, image_size=IMAGE_SIZE)
    visual = encode_once(short, questions)
    with pytest.raises(ValueError, match=r"task.shots=4: .* tokens, 20 of them of images, but the model ends at 24"):
        score(short, questions, visual, shots=4)
    with pytest.raises(ValueError, match=r"task.shots=\[0, -1\]"):
        FewShotPanel({"questions": source}, shots=[0, -1])
