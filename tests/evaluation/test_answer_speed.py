"""What is timed is what was asked for: a second question reuses the first's image; levers change a copy alone."""

import copy

import pytest
import torch
from tiny_vlm import IMAGE_SIZE, draw_png

from fastvlm.data.source import Source
from fastvlm.data.transforms import ImageTransform
from fastvlm.evaluation.answer_speed import OPENING, answer_speed, first_token_ms, opening
from fastvlm.evaluation.questions import Question
from fastvlm.inference.engine import Engine


@pytest.fixture
def questions():
    transform = ImageTransform(image_size=IMAGE_SIZE)
    content = [{"type": "image"}, {"type": "text", "text": "what number stands here"}]
    return [
        Question(
            str(i),
            "q",
            "count",
            [{"role": "user", "content": content}],
            "one",
            files=(draw_png(i),),
            transform=transform,
        )
        for i in range(2)
    ]


def test_a_second_question_is_timed_after_another_about_its_image_and_a_first_without(engine, questions, monkeypatch):
    asked, reused = [], []
    generate = engine.generate

    def spy(records, images, **options):
        answers = generate(records, images, **options)
        asked.append(records[0]["messages"][0]["content"][1]["text"])
        reused.append(answers[0].num_reused_tokens)
        return answers

    monkeypatch.setattr(engine, "generate", spy)
    before = engine.stop_ids, engine.images.max_bytes, engine.prefixes.max_bytes
    first = answer_speed(engine, questions, tokens=3, repeats=1)
    assert set(asked) == {"what number stands here"} and len(asked) == 4 and not any(reused)
    asked.clear(), reused.clear()
    second = answer_speed(engine, questions, second=True, tokens=3, repeats=1)
    assert asked == [OPENING, "what number stands here"] * 4
    assert not any(reused[::2]) and all(n >= engine.tokens_per_image for n in reused[1::2])
    assert first.keys() == second.keys() and all(value > 0 for value in (*first.values(), second["test/speed/ttft_ms"]))
    assert (engine.stop_ids, engine.images.max_bytes, engine.prefixes.max_bytes) == before


@pytest.fixture
def timed(engine, monkeypatch):
    """(threads, clock) of every answer since; the number of threads is put back."""
    generate, seen, before = engine.generate, [], torch.get_num_threads()

    def spy(*rest, **options):
        seen.append((torch.get_num_threads(), engine.clock.kind))
        return generate(*rest, **options)

    monkeypatch.setattr(engine, "generate", spy)
    yield seen
    torch.set_num_threads(before)


@pytest.mark.parametrize(("threads", "kind"), [(1, "cpu"), (2, "wall")])
def test_first_tokens_are_cpu_time_on_one_thread_and_wall_time_on_several(engine, questions, timed, threads, kind):
    torch.set_num_threads(threads)
    figures = first_token_ms(engine, questions[:1], repeats=1)
    assert set(timed) == {(threads, kind)} and figures["test/ttft_ms"] > 0


def test_an_answers_speed_is_cpu_time_of_one_thread_however_many_there_are(engine, questions, timed):
    torch.set_num_threads(2)
    answer_speed(engine, questions[:1], tokens=2, repeats=1)
    assert set(timed) == {(1, "cpu")} and torch.get_num_threads() == 2 and engine.clock.kind == "wall"


def test_the_time_to_the_first_token_is_that_of_every_question_alone_and_warm(engine, questions, monkeypatch):
    generate, seen = engine.generate, []

    def spy(records, images, **options):
        seen.append((len(records), options["max_new_tokens"]))
        return generate(records, images, **options)

    monkeypatch.setattr(engine, "generate", spy)
    times = first_token_ms(engine, questions, repeats=2)
    assert seen == [(1, 1)] * 6 and times["test/ttft_ms"] > 0 and not first_token_ms(engine, [])


def test_speed_without_a_question_is_one_line(engine):
    with pytest.raises(ValueError, match="its first source has no question with an image"):
        answer_speed(engine, [])


def test_the_opening_question_keeps_the_image_where_it_was(questions):
    ((image, text),) = (message["content"] for message in opening(questions[0])["messages"])
    assert image == {"type": "image"} and text["text"] == OPENING
    assert questions[0].messages[0]["content"][1]["text"] == "what number stands here"


def test_levers_are_pulled_on_a_copy(tiny_model, tiny_tokenizer, monkeypatch, tmp_path):
    from fastvlm.evaluation import panel, speed_panel

    scored = []
    threads: list[int] = []

    def run(self, model, tokenizer, *, out, **options):
        scored.append(model)
        threads.append(torch.get_num_threads())
        return {"metrics": self.measure(Engine(model, tokenizer, **options), [], [])}

    monkeypatch.setattr(panel.Panel, "run", run)
    monkeypatch.setattr(
        speed_panel, "answer_speed", lambda engine, *_, **__: {"same": float(engine.model is scored[0])}
    )
    before = copy.deepcopy(tiny_model.state_dict())
    task = speed_panel.SpeedPanel({"questions": Source("questions", path=tmp_path)}, levers="bf16")
    many = torch.get_num_threads()
    torch.set_num_threads(2)
    result = task.run(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE)
    assert threads == [1] and torch.get_num_threads() == 2
    torch.set_num_threads(many)
    assert result["metrics"]["same"] and scored[0] is not tiny_model
    assert next(scored[0].llm.parameters()).dtype == torch.bfloat16
    for name, value in tiny_model.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name
