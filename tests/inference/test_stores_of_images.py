import io
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_engine import draw_prompts, read_lengths
from tiny_vlm import IMAGE_SIZE, TOKENS_PER_IMAGE, draw_image, draw_png

from fastvlm.data.transforms import ImageTransform
from fastvlm.inference.engine import Engine
from fastvlm.inference.memory import MIN_PREFIX, BoundedStore, PrefixStore, image_key, position_names

IMAGE, BIT = {"type": "image"}, st.integers(0, 1)


def asked(*questions: str, answers=(), images: int = 1) -> dict:
    """A conversation whose first message has the images."""
    content = [IMAGE] * images + [{"type": "text", "text": questions[0]}]
    messages = [{"role": "user", "content": content}]
    for question, answer in zip(questions[1:], answers):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
    return {"messages": messages}


@pytest.fixture
def keeping(tiny_model, tiny_tokenizer):
    stores = {"image_store_bytes": 1 << 20, "prefix_store_bytes": 1 << 22}
    return Engine(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE, max_new_tokens=12, **stores)


def test_a_conversation_reads_only_what_is_new_and_answers_as_without_a_store(engine, keeping, monkeypatch):
    image, questions, answers = draw_image(3), ["which digit", "what word", "how many digits are there"], []
    encoded, encode = [], keeping.model.encode_images
    monkeypatch.setattr(
        keeping.model, "encode_images", lambda pixels, *more: encoded.append(len(pixels)) or encode(pixels, *more)
    )
    calls, known = read_lengths(keeping, monkeypatch), 0
    for turn in range(3):
        calls.clear()
        record = asked(*questions[: turn + 1], answers=answers)
        (answer,) = keeping.generate([record], [[image]])
        (expected,) = engine.generate([record], [[image]])
        assert answer.token_ids == expected.token_ids and expected.num_reused_tokens == 0
        assert calls[0] == (1, answer.num_prompt_tokens - answer.num_reused_tokens)
        assert answer.num_reused_tokens >= known
        # The answer's own keys are found too where its text becomes the same tokens again.
        known = answer.num_prompt_tokens
        answers.append(answer.text)
    assert encoded[0] == 1 and sum(encoded) == 1 + 3, "ours once; the reference engine shares the model"


def test_another_question_about_an_image_reuses_it_and_another_image_does_not(engine, keeping):
    first, second = draw_image(1), draw_image(2)
    keeping.generate([asked("which digit")], [[first]])
    (again,) = keeping.generate([asked("what number")], [[first]])
    assert again.num_reused_tokens > TOKENS_PER_IMAGE
    assert again.token_ids == engine.generate([asked("what number")], [[first]])[0].token_ids
    (other,) = keeping.generate([asked("which digit")], [[second]])
    assert other.num_reused_tokens == 0
    assert other.token_ids == engine.generate([asked("which digit")], [[second]])[0].token_ids


def test_known_and_new_prompts_share_a_batch(engine, keeping):
    records, images = draw_prompts(10, seed=11)
    keeping.generate(records[:5], images[:5])
    again = keeping.generate(records, images)
    assert [g.token_ids for g in again] == [g.token_ids for g in engine.generate(records, images)]
    assert any(g.num_reused_tokens for g in again[:5])


def test_the_same_image_twice_in_a_call_is_encoded_once(keeping, monkeypatch):
    encoded, encode = [], keeping.model.encode_images
    monkeypatch.setattr(
        keeping.model, "encode_images", lambda pixels, *more: encoded.append(len(pixels)) or encode(pixels, *more)
    )
    a, b = draw_image(1), draw_image(2)
    tokens = keeping.encode_images([a, b, a.clone()])
    assert encoded == [2] and torch.equal(tokens[0], tokens[2]) and not torch.equal(tokens[0], tokens[1])
    keeping.encode_images([b])
    assert encoded == [2] and keeping.images.hits == 1


def test_files_read_side_by_side_are_the_files_read_one_by_one(engine):
    files = [draw_png(i) for i in range(24)]
    for ours, expected in zip(engine.read_images(files), map(engine.transform, files)):
        assert torch.equal(ours, expected)
    with pytest.raises(ValueError):
        engine.read_images([files[0], b"no picture"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), max_size=60), st.integers(0, 100))
def test_a_store_stays_below_its_bytes_and_forgets_the_least_recently_used(puts, bound):
    store, model = BoundedStore(bound), {}
    for key, size in puts:
        store.put(key, size, size=size)
        model.pop(key, None)
        if size <= bound:
            model[key] = size
        while sum(model.values()) > bound:
            model.pop(next(iter(model)))
        assert store.num_bytes == sum(model.values()) <= bound
        assert store.keys() == list(model)
        if model and key % 2:
            oldest = next(iter(model))
            assert store.get(oldest) == model[oldest]
            model[oldest] = model.pop(oldest)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=30), max_size=8), st.lists(st.integers(0, 1), max_size=30)
)
def test_the_longest_common_start_is_found(rows, prompt):
    store = PrefixStore(1 << 20)
    for row in rows:
        keys = torch.tensor(row, dtype=torch.float32).view(1, 1, -1, 1)
        store.keep(np.array(row, dtype=np.int64), [(keys, keys + 1)])
    common = lambda row: next(
        (i for i, (a, b) in enumerate(zip(row, prompt[:-1])) if a != b), min(len(row), len(prompt) - 1)
    )
    longest = max(map(common, rows), default=0)
    found = store.find(np.array(prompt, dtype=np.int64))
    if longest < MIN_PREFIX:
        assert found is None
    else:
        assert found.length == longest and found.layers[0][0].flatten().tolist() == prompt[:longest]


def test_a_conversation_that_outgrows_the_store_keeps_its_first_positions():
    layers = lambda n: [(torch.arange(n, dtype=torch.float32).view(1, 1, n, 1),) * 2]  # 8 bytes a position
    store, asked = PrefixStore(100 * 8), np.arange(300)
    for length, known in ((60, 60), (90, 90), (150, 100), (200, 100), (100, 100), (40, 100)):
        store.keep(np.arange(length), layers(length))
        found = store.find(asked)
        assert found.length == known and found.layers[0][0].flatten().tolist() == list(range(known))
        assert store.num_bytes <= 100 * 8 and store.max_positions == 100
    assert store.find(asked).layers[0][0].untyped_storage().nbytes() == 100 * 4, "nothing more is held"
    tiny = PrefixStore(3 * 8)
    tiny.keep(np.arange(60), layers(60))
    assert tiny.find(asked) is None and not len(tiny)


def test_a_conversation_beyond_the_store_is_answered_as_without_one(engine, tiny_model, tiny_tokenizer):
    image, answers, reused = draw_image(3), [], []
    small = Engine(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE, max_new_tokens=12, prefix_store_bytes=30 * 512)
    questions = ["which digit", "what word", "how many digits are there", "and now"]
    for turn in range(4):
        record = asked(*questions[: turn + 1], answers=answers)
        (answer,) = small.generate([record], [[image]])
        assert answer.token_ids == engine.generate([record], [[image]])[0].token_ids
        answers.append(answer.text)
        reused.append(answer.num_reused_tokens)
    assert reused[0] == 0 < reused[1] <= reused[2] <= reused[3] == small.prefixes.max_positions, reused


def test_an_image_is_named_by_its_pixels_and_shape():
    image = draw_image(0)
    assert image_key(image) == image_key(image.clone().contiguous())
    changed = image.clone()
    changed[0, 0, 0] ^= 1
    assert len({image_key(image), image_key(changed), image_key(image[None]), image_key(image.mT)}) == 4
    names = position_names([5, 7, 7, 7, 6], image_token_id=7, images=[b"a" * 16, b"b" * 16], slots=[1, 2])
    assert names[1] < 0 and names[2] < 0 and names[1] != names[2] == names[3] and names[0] == 5


def test_a_file_that_comes_again_is_read_once_within_the_bound(tiny_model, tiny_tokenizer, monkeypatch):
    size = 3 * IMAGE_SIZE**2
    engine = Engine(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE, image_store_bytes=2 * size, workers=1)
    files, read, call = [draw_png(seed) for seed in range(3)], [], ImageTransform.__call__
    monkeypatch.setattr(ImageTransform, "__call__", lambda self, data: read.append(data) or call(self, data))
    (first,), (again,) = engine.read_images(files[:1]), engine.read_images(files[:1])
    assert again is first and read == files[:1]
    engine.read_images(files)
    assert read == files and engine.files.num_bytes == 2 * size
    engine.read_images(files[:1])
    assert read == [*files, files[0]], "the least recently used one had left"
    keyless = Engine(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE)
    assert torch.equal(keyless.read_images(files[:1])[0], first) and not len(keyless.files)


def test_images_read_in_several_threads_at_once_are_not_mixed(engine, monkeypatch):
    pixels = [np.full((48, 16, 3), 40 * i, dtype=np.uint8) for i in range(1, 6)]  # narrow: scaled in scratch memory
    files, place = [to_png(image) for image in pixels], ImageTransform._place
    monkeypatch.setattr(ImageTransform, "_place", lambda self, *given: time.sleep(0.02) or place(self, *given))
    with ThreadPoolExecutor(5) as threads:  # as requests with one image each
        read = [views for (views,) in threads.map(lambda file: engine.read_images([file]), files)]
    middle = [int(views[0, 0, IMAGE_SIZE // 2, IMAGE_SIZE // 2]) for views in read]
    assert middle == [40 * i for i in range(1, 6)]


def to_png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()
