import io
import json
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_vlm import IMAGE_SIZE, TOKENS_PER_IMAGE, build_model, draw_png

from fastvlm.data.conversation import encode_record, without_images
from fastvlm.data.shards import ShardReader, ShardWriter
from fastvlm.data.source import Source
from fastvlm.data.transforms import ImageTransform
from fastvlm.evaluation.likelihood import token_nll
from fastvlm.evaluation.metrics import exact_match
from fastvlm.evaluation.panel import Panel
from fastvlm.evaluation.questions import Question, encode_once, read_questions, swap_partners
from fastvlm.evaluation.short_answers import ShortAnswers, _answer_all, evaluate_answers, save_examples
from fastvlm.inference.engine import Engine

TRANSFORM = ImageTransform(image_size=IMAGE_SIZE)
PHRASES = {"count": "what number stands here", "nth": "which digit is above", "blind": "what is three"}
ANSWERS = {"count": ("one", "two"), "nth": ("7", "3", "9"), "blind": ("three",)}


def write_questions(folder, *, split: str, per_type: int, answer=None):
    """Questions of three types, one of them without an image; `answer(key)` overrides the reference."""
    with ShardWriter(folder, split, max_samples=7) as writer:
        for i in range(per_type):
            for kind, phrase in PHRASES.items():
                key = f"{split}-{kind}-{i:03d}"
                images = [draw_png(1000 * len(kind) + i)] if kind != "blind" else []
                content = [{"type": "image"}] * len(images) + [{"type": "text", "text": phrase + " small" * (i % 4)}]
                said = answer(key) if answer else ANSWERS[kind][i % len(ANSWERS[kind])]
                turns = [{"role": "user", "content": content}, {"role": "assistant", "content": said}]
                writer.write(key, {"messages": turns, "meta": {"type": kind}}, images)
    return folder


def write_text(folder):
    with ShardWriter(folder, "test") as writer:
        for i in range(5):
            text = "the digit shown here is grey. " * (i + 1)
            writer.write(f"text-{i}", {"document": [{"type": "text", "text": text}]})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = write_questions(tmp_path_factory.mktemp("questions"), split="test", per_type=12)
    return write_questions(path, split="train", per_type=9)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def result(folder, text_folder, tiny_model, tiny_tokenizer, tmp_path_factory):
    task = ShortAnswers(
        {"questions": Source("questions", path=folder)},
        text=Source("text", path=text_folder),
        limit=10,
        formed=["count", "nth"],
        batch_size=8,
        max_new_tokens=6,
    )
    out = tmp_path_factory.mktemp("run")
    result = task.run(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE, out=out)
    return task, result, out


def questions_of(folder, tokenizer, **options):
    source = Source("questions", path=folder)
    return read_questions(
        source.load("test", tokenizer), source="questions", limit=None, transform=TRANSFORM, **options
    )


def test_every_prediction_is_what_the_engine_answers_alone(result, folder, tiny_model, tiny_tokenizer):
    """Sorting, batching and encoding images once must not mix up whose answer is whose."""
    engine = Engine(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE, max_new_tokens=6)
    questions = {q.key: q for q in questions_of(folder, tiny_tokenizer)}
    for row in result[1]["predictions"]:
        question = questions[row["key"]]
        assert row["prediction"] == engine.generate([question.prompt], [question.images])[0].text
        assert row["reference"] == question.answer and row["type"] == question.type
        if question.images:
            other = questions[row["swapped_with"]]
            assert row["prediction_swapped"] == engine.generate([question.prompt], [other.images])[0].text
            assert row["prediction_removed"] == engine.generate([without_images(question.prompt)], [[]])[0].text


def test_the_table_and_the_metrics_add_up_from_the_predictions(result):
    _, result, _ = result
    rows, metrics = result["predictions"], result["metrics"]
    assert Counter(r["type"] for r in rows) == {"count": 10, "nth": 10, "blind": 10}
    table = {row["type"]: row for row in result["table"]}
    for kind in PHRASES:
        mine = [r for r in rows if r["type"] == kind]
        assert table[kind]["n"] == 10
        assert metrics[f"test/exact_match/{kind}"] == sum(r["correct"] for r in mine) / 10
        nats = sum(r["nats"] for r in mine) / sum(r["scored_tokens"] for r in mine)
        assert table[kind]["nll"] == pytest.approx(nats)
    assert metrics["test/exact_match/mean"] == sum(metrics[f"test/exact_match/{k}"] for k in PHRASES) / 3
    assert metrics["test/exact_match/formed"] == sum(metrics[f"test/exact_match/{k}"] for k in ("count", "nth")) / 2
    # count alternates one, two; nth is 7, 3, 9 in training and the first ten here; blind is always three.
    assert metrics["test/exact_match_majority/count"] == 0.5
    assert metrics["test/exact_match_majority/nth"] == 0.3
    assert metrics["test/exact_match_majority/blind"] == 1
    tokens = sum(r["scored_tokens"] for r in rows)
    assert metrics["test/answer_nll"] == pytest.approx(sum(r["nats"] for r in rows) / tokens)
    seen = [r for r in rows if "nats_swapped" in r]
    gap = sum(r["nats_swapped"] - r["nats"] for r in seen) / sum(r["scored_tokens"] for r in seen)
    assert metrics["test/answer_nll_gap"] == pytest.approx(gap)
    assert metrics["test/answer_length"] == sum(r["prediction_tokens"] for r in rows) / 30
    assert "test/exact_match_removed/blind" not in metrics and table["blind"]["swapped"] is None
    assert result["text_perplexity"] == {"after": metrics["test/text_perplexity"]}


def test_the_result_is_json_and_lies_in_the_run(result):
    task, result, out = result
    assert json.loads(json.dumps(result)) == result
    lines = (out / "predictions" / "short_answers.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result["predictions"]
    markdown = (out / "short_answers.md").read_text()
    assert markdown.count("\n|") == 1 + len(result["table"]) and "| blind | 10 |" in markdown
    printed = task.render({**result, "text_perplexity": {"before": 39.25, "after": 41.5}})
    for words in ("mean of 2: count, nth", "mean of all 3", "perplexity 41.50", "39.25", "other image"):
        assert words in printed


def test_a_model_that_says_the_references_scores_one_and_less_with_other_images(tmp_path, tiny_model, tiny_tokenizer):
    engine = Engine(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE, max_new_tokens=6)
    first = questions_of(write_questions(tmp_path / "a", split="test", per_type=8), tiny_tokenizer)
    said = {q.key: engine.generate([q.prompt], [q.images])[0].text for q in first}
    again = write_questions(tmp_path / "b", split="test", per_type=8, answer=said.__getitem__)
    metrics = evaluate_answers(engine, questions_of(again, tiny_tokenizer), batch_size=5, max_new_tokens=6)["metrics"]
    assert metrics["test/exact_match/mean"] == 1
    assert metrics["test/exact_match_swapped/mean"] < 0.5 and metrics["test/exact_match_removed/mean"] < 0.5


def draw_question(i: int, kind: str, answer: str, num_images: int, image: int) -> Question:
    ids = tuple(f"{image}-{k}" for k in range(num_images))
    return Question(key=str(i), source="s", type=kind, messages=[], answer=answer, image_ids=ids)


SPEC = st.tuples(st.sampled_from("ab"), st.sampled_from(["x", "X.", "y"]), st.integers(0, 2), st.integers(0, 3))


@settings(max_examples=200)
@given(st.lists(SPEC, max_size=12))
def test_swapping_never_pairs_a_question_with_its_own_image_and_prefers_other_answers(specs):
    questions = [draw_question(i, *spec) for i, spec in enumerate(specs)]
    partners = swap_partners(questions)
    assert partners == swap_partners(questions)

    def is_second_best(mine, other):
        return other.type != mine.type or exact_match(other.answer, mine.answer)

    for question, partner in zip(questions, partners):
        fits = [
            q
            for q in questions
            if question.image_ids and len(q.image_ids) == len(question.image_ids) and q.image_ids != question.image_ids
        ]
        if partner is None:
            assert not fits
        else:
            other = questions[partner]
            assert other in fits and other is not question
            assert is_second_best(question, other) == min(is_second_best(question, q) for q in fits)
            assert other.type == question.type or all(q.type != question.type for q in fits)


def test_questions_without_images_are_compared_with_none():
    class Counted(list):
        seen = 0

        def __getitem__(self, at):
            self.seen += 1
            return super().__getitem__(at)

    questions = Counted(draw_question(i, "a", "x", int(i < 2), i) for i in range(40))
    assert swap_partners(questions) == [1, 0] + [None] * 38 and questions.seen < 100


def test_taking_images_out_leaves_the_words_and_the_record_as_they_were():
    record = {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]}
    before = json.dumps(record)
    parts = [{"type": "text", "text": ""}, {"type": "text", "text": "a"}]  # the first opens the turn as the image did
    assert without_images(record) == {"messages": [{"role": "user", "content": parts}]}
    assert json.dumps(record) == before


def test_a_limit_takes_the_first_of_every_type(folder, tiny_tokenizer):
    source = Source("questions", path=folder)
    index = source.load("test", tiny_tokenizer)
    keys = [q.key for q in read_questions(index, source="q", limit=2, transform=TRANSFORM)]
    assert sorted(keys) == [f"test-{kind}-{i:03d}" for kind in sorted(PHRASES) for i in range(2)]


def test_a_source_restricted_to_a_type_asks_only_that_type(folder, tiny_model, tiny_tokenizer):
    task = ShortAnswers({"questions": Source("questions", path=folder, types=["nth"])}, limit=3, max_new_tokens=2)
    result = task.run(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE)
    assert [row["type"] for row in result["table"]] == ["nth", "mean of all 1"]
    assert "text_perplexity" not in result


def test_a_sources_system_prompt_and_images_left_out_are_in_what_is_asked(folder, tiny_model, tiny_tokenizer):
    told, blind = Source("told", path=folder, system="digit"), Source("blind", path=folder, images=False)
    task = Panel({"told": told, "blind": blind}, held_out={"blind": blind}, limit=2, first_token=0, max_new_tokens=2)
    result = task.run(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE)
    prompts = {name: [p["prompt"] for p in result["predictions"] if p["source"] == name] for name in task.sources}
    assert all(prompt.startswith("digit\n") for prompt in prompts["told"]) and len(prompts["told"]) == 6
    assert any("<image>" in prompt for prompt in prompts["told"])
    assert not any("<image>" in prompt for prompt in prompts["blind"]) and len(prompts["blind"]) == 6
    assert result["metrics"]["test/nll/blind"] > 0


def test_held_out_text_is_what_its_sources_filters_leave(folder, text_folder, tiny_model, tiny_tokenizer):
    tokens = lambda **more: ShortAnswers(
        {"questions": Source("questions", path=folder)}, text=Source("text", path=text_folder, **more)
    ).score_text(tiny_model, tiny_tokenizer)["test/text_tokens"]
    index = Source("text", path=text_folder).load("test", tiny_tokenizer)
    longest = int(index.text_tokens.max())
    assert 0 < tokens(filters={"text_tokens": {"min": longest}}) < tokens()


def test_the_room_for_an_answer_is_what_the_task_asks_for(tiny_model, tiny_tokenizer):
    engine = Engine(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE)
    limit = tiny_model.llm.max_positions
    ask = lambda words: {"messages": [{"role": "user", "content": "digit " * words}]}
    length = lambda words: len(tiny_tokenizer.encode_text("digit " * words)) + 8
    words = next(n for n in range(1, limit) if length(n) > limit - 26)
    (said,) = _answer_all(engine, [ask(words)], [[]], batch_size=1, max_new_tokens=4)
    assert said[1] <= 4
    with pytest.raises(ValueError, match="max_new_tokens"):
        _answer_all(engine, [ask(words)], [[]], batch_size=1, max_new_tokens=32)


def test_a_panel_scores_records_spread_over_the_whole_split(tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    folder = write_questions(tmp_path, split="test", per_type=3)
    source = Source("questions", path=folder)
    read = []
    index = source.load("test", tiny_tokenizer)
    reading = type(index).read
    monkeypatch.setattr(type(index), "read", lambda *given: read.append(given[1]) or reading(*given))
    panel = Panel({"questions": source}, held_out={"questions": source}, records=6)
    panel.score_records(Engine(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE), "questions", source)
    assert len(read) == 6 and read[0] == 0 and read[-1] == index.num_samples - 1


def write_pages(folder, *, images: int):
    """Pages of a sentence, then of as many images with a sentence each."""
    said = {"type": "text", "text": "the digit shown here is grey"}
    with ShardWriter(folder, "test") as writer:
        for i in range(3):
            parts = [said, *[part for _ in range(images) for part in ({"type": "image"}, said)]]
            writer.write(f"page-{i}", {"document": parts}, [draw_png(10 * i + k) for k in range(images)])
    return folder


def test_a_page_longer_than_the_model_is_scored_up_to_where_the_model_ends(tmp_path, tiny_model, tiny_tokenizer):
    """A token's likelihood depends on what precedes it: up to the cut it is as on the whole page in a longer model."""
    source = Source("pages", path=write_pages(tmp_path, images=7))
    index, pages, wide = source.load("test", tiny_tokenizer), [], Engine(tiny_model, tiny_tokenizer, image_size=32)
    for row in range(index.num_samples):
        raw = index.read(row, ShardReader())
        visual = wide.encode_images([TRANSFORM(file) for file in raw.images])
        page = encode_record(raw.record, tiny_tokenizer, tokens_per_image=TOKENS_PER_IMAGE)
        rows = [(page.input_ids, page.labels)]
        (nats,) = token_nll(tiny_model, tiny_tokenizer, rows, [visual], tokens_per_view=TOKENS_PER_IMAGE)
        pages.append((page, nats))
    panel = Panel({}, held_out={"pages": source})
    fourth = [at for at, token in enumerate(pages[0][0].input_ids) if token == tiny_tokenizer.image_id][12]
    for room, shown in ((fourth + 2, 3), (fourth + 6, 4)):  # in the middle of the fourth image, and after it
        model = build_model(tiny_tokenizer, max_positions=room)
        metrics = panel.score_records(Engine(model, tiny_tokenizer, image_size=IMAGE_SIZE), "pages", source)
        learned = sum(label != -100 for label in pages[0][0].labels[1:room])
        nats = torch.cat([nats[:learned] for _, nats in pages])
        assert learned < len(pages[0][1]) and metrics["test/nll/pages"] == pytest.approx(float(nats.mean()), rel=1e-4)
        assert sorted(metrics) == ["test/nll/pages", *(f"test/nll/pages/{k}" for k in range(shown))]


@pytest.mark.parametrize("tiles", [None, [[1, 2], [2, 2]]])
def test_of_all_questions_no_more_views_are_held_than_the_encoder_takes_at_once(
    tiles, folder, tiny_model, tiny_tokenizer, monkeypatch
):
    transform, held, batches = ImageTransform(image_size=IMAGE_SIZE, tiles=tiles), weakref.WeakSet(), []

    def read(file):
        held.add(image := transform(file))
        return image

    def encode(pixels, *more):
        batches.append((len(pixels), len(held)))
        return encoding(pixels, *more)

    questions = questions_of(folder, tiny_tokenizer)
    for question in questions:
        question.transform = read
    engine = Engine(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE, transform=transform, image_batch=4)
    encoding = tiny_model.encode_images
    monkeypatch.setattr(tiny_model, "encode_images", encode)
    visual = encode_once(engine, questions)
    monkeypatch.undo()
    total = sum(len(image) for question in questions for image in question.images)
    assert [count for count, _ in batches] == [4] * (total // 4) + [total % 4] * (total % 4 > 0)
    assert len(batches) > 3 and max(alive for _, alive in batches) <= 5  # one more whose views are in the next batch
    for question, tokens in zip(questions, visual):
        torch.testing.assert_close(tokens, engine.encode_images(question.images), rtol=0, atol=1e-4)


def test_mistakes_are_named(folder, tmp_path, tiny_model, tiny_tokenizer):
    run = lambda task: task.run(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE)
    source = Source("questions", path=folder)
    with pytest.raises(ValueError, match="task.formed names colour, but .* blind, count, nth"):
        run(ShortAnswers({"questions": source}, formed=["colour"], limit=1))
    with pytest.raises(ValueError, match="no question to evaluate"):
        run(ShortAnswers({"questions": source}, limit=0))
    with pytest.raises(ValueError, match="is not one question with one answer"):
        run(ShortAnswers({"text": Source("text", path=write_text(tmp_path / "t"))}))
    with pytest.raises(ValueError, match="is not a document of text alone"):
        run(ShortAnswers({"questions": source}, text=source, limit=1))


def draw_grey(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (shade, shade, shade)).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("keys", [("test-1", "test-1"), ("a/b", "a_b")])
def test_an_example_is_saved_with_its_own_picture_where_two_sources_use_one_key(keys, tmp_path):
    (tmp_path / "predictions").mkdir()
    questions = [
        Question(key, source, kind, [], "4", files=(draw_grey(shade),), transform=TRANSFORM)
        for key, source, kind, shade in zip(keys, ("short_qa", "reading"), ("max", "read"), (10, 200), strict=True)
    ]
    predictions = [{"key": q.key, "type": q.type, "correct": True} for q in questions]
    for example in save_examples(predictions, questions, folder=tmp_path):
        shade = np.asarray(Image.open(tmp_path / example["image"]))[0, 0, 0]
        assert shade == {"max": 10, "read": 200}[example["type"]]
