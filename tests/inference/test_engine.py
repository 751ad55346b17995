import numpy as np
import pytest
import torch
from tiny_vlm import IMAGE_SIZE, TOKENS_PER_IMAGE, build_model, draw_image
from tiny_world import WORDS

from fastvlm.batch import Batch
from fastvlm.data.conversation import encode_record
from fastvlm.inference.engine import Engine
from fastvlm.inference.fast_decoder import FastDecoder, fits
from fastvlm.inference.kv_cache import KVCache
from fastvlm.models.llms.language_model import from_config


def draw_prompts(count: int, *, seed: int = 0):
    """Conversations of 1-3 turns and documents, with 0-3 images anywhere."""
    rng = np.random.default_rng(seed)
    records, images = [], []
    for i in range(count):
        given = int(rng.integers(0, 4))
        parts = [{"type": "image"}] * given + [
            {"type": "text", "text": " ".join(rng.choice(WORDS, int(rng.integers(1, 9)))) + " "} for _ in range(2)
        ]
        parts = [parts[j] for j in rng.permutation(len(parts))]
        if i % 5 == 4:
            records.append({"document": parts})
        else:
            turns = [{"role": "user", "content": parts}]
            if i % 3 == 0:
                turns = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "the digit"}, *turns]
            records.append({"messages": turns})
        images.append([draw_image(100 * i + k) for k in range(given)])
    return records, images


def greedy_without_cache(engine, record, images, *, steps: int) -> list[int]:
    """Reference: the training path, the whole row again for every token."""
    tokenizer = engine.tokenizer
    ids = encode_record(record, tokenizer, tokens_per_image=TOKENS_PER_IMAGE, prompt=True).input_ids
    prompt = len(ids)
    pixels = torch.stack(images) if images else torch.zeros(0, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    while len(ids) < prompt + steps:
        row = torch.tensor([ids])
        batch = Batch(
            input_ids=row,
            labels=torch.full_like(row, -100),
            position_ids=torch.arange(len(ids))[None],
            segment_ids=torch.ones_like(row),
            source_ids=torch.zeros_like(row),
            pixel_values=pixels,
            num_answer_tokens=0,
        )
        with torch.no_grad():
            logits = engine.model(batch)[0, -1]
        logits[tokenizer.image_id] = -torch.inf
        token = int(logits.argmax())
        if token in engine.stop_ids:
            break
        ids.append(token)
    return ids[prompt:]


def test_an_answer_does_not_depend_on_the_batch_it_is_part_of(engine):
    records, images = draw_prompts(40)
    alone = [engine.generate([r], [i])[0] for r, i in zip(records, images)]
    together = []
    for start in range(0, 40, 16):
        together += engine.generate(records[start : start + 16], images[start : start + 16])
    assert [g.token_ids for g in alone] == [g.token_ids for g in together]
    assert [g.text for g in alone] == [g.text for g in together]
    assert [g.finish_reason for g in alone] == [g.finish_reason for g in together]
    assert [g.num_prompt_tokens for g in alone] == [g.num_prompt_tokens for g in together]
    assert len({tuple(g.token_ids) for g in alone}) > 30, "the random model must not answer everything alike"


def test_cached_decoding_equals_greedy_decoding_by_the_full_forward(engine):
    records, images = draw_prompts(12, seed=1)
    answers = engine.generate(records, images)
    for record, given, answer in zip(records, images, answers):
        assert answer.token_ids == greedy_without_cache(engine, record, given, steps=12)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_the_fast_decoder_gives_the_hidden_states_of_transformers(model_type):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    llm = from_config(model_type, vocab_size=50, num_key_value_heads=2, initializer_range=0.3, **sizes).eval()
    for weight in llm.parameters():  # norms and biases that do nothing would hide a mistake
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, 1, 0.3)
    fast, ours, theirs = FastDecoder(llm), KVCache(), llm.new_cache()
    mask = torch.ones(3, 24, dtype=torch.long)
    mask[1, :5], mask[2, :9] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    embeds = torch.randn(3, 24, 32)
    with torch.inference_mode():
        for start, end in ((0, 12), (12, 13), (13, 20), (20, 21), (21, 24)):
            given = embeds[:, start:end], positions[:, start:end]
            expected, theirs = llm.decode(*given, mask[:, :end], theirs)
            hidden, ours = fast.decode(*given, mask[:, :end], ours)
            torch.testing.assert_close(hidden, expected[:, -1:], atol=1e-5, rtol=1e-5)
            for mine, reference in zip(ours.layers, theirs.layers):
                shown = mask[:, None, :end, None].bool().expand_as(mine.keys)
                torch.testing.assert_close(mine.keys[shown], reference.keys[shown], atol=1e-5, rtol=1e-5)
        # Without padding no mask is made at all.
        expected, _ = llm.decode(embeds, torch.arange(24).expand(3, -1), torch.ones(3, 24, dtype=torch.long), None)
        cache = KVCache()
        for start, end in ((0, 9), (9, 23), (23, 24)):
            hidden, _ = fast.decode(embeds[:, start:end], torch.arange(start, end).expand(3, -1), None, cache)
        torch.testing.assert_close(hidden, expected[:, -1:], atol=1e-5, rtol=1e-5)


def test_a_model_the_fast_decoder_does_not_know_is_decoded_by_transformers(engine, tiny_tokenizer, monkeypatch):
    records, images = draw_prompts(6, seed=7)
    assert engine.fast is not None
    expected = [g.token_ids for g in engine.generate(records, images)]
    slow = Engine(engine.model, tiny_tokenizer, image_size=IMAGE_SIZE, max_new_tokens=12, fast=False)
    assert slow.fast is None and [g.token_ids for g in slow.generate(records, images)] == expected
    handle = engine.model.llm.hf.model.layers[0].register_forward_hook(lambda *_: None)
    try:
        assert Engine(engine.model, tiny_tokenizer, image_size=IMAGE_SIZE).fast is None, "a hook would be passed over"
    finally:
        handle.remove()
    assert not fits(from_config("gpt2", vocab_size=20, n_embd=8, n_layer=1, n_head=1))


def read_lengths(engine, monkeypatch) -> list[tuple[int, int]]:
    """(rows, positions) of every call of the language model."""
    calls, decode = [], engine._decode
    monkeypatch.setattr(
        engine, "_decode", lambda embeds, *rest: calls.append(tuple(embeds.shape[:2])) or decode(embeds, *rest)
    )
    return calls


def test_finished_rows_leave_the_batch(engine, monkeypatch):
    records, images = draw_prompts(8, seed=2)
    free = engine.generate(records, images, max_new_tokens=20)
    engine.stop_ids = frozenset(g.token_ids[2 * i] for i, g in enumerate(free))
    calls = read_lengths(engine, monkeypatch)
    answers = engine.generate(records, images, max_new_tokens=20)
    sizes = [rows for rows, _ in calls]
    assert sizes[0] == 8 and sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 3
    for answer, whole in zip(answers, free):
        ends = [i for i, token in enumerate(whole.token_ids) if token in engine.stop_ids]
        assert answer.token_ids == whole.token_ids[: ends[0] if ends else None]


def test_rows_that_join_while_others_are_written_are_answered_as_if_alone(engine):
    records, images = draw_prompts(12, seed=8)
    alone = [g.token_ids for g in engine.generate(records, images)]
    rows, waiting = engine.rows(), [engine.row(r, engine.encode_images(i)) for r, i in zip(records, images)]
    every = list(waiting)
    rows.add([waiting.pop(0)])
    while waiting or len(rows):
        for _ in range(3):
            rows.step()
        rows.add([waiting.pop(0) for _ in range(min(2, len(waiting)))])
    assert [row.answer.token_ids for row in every] == alone


def test_a_cancelled_row_leaves_and_the_others_go_on(engine):
    records, images = draw_prompts(5, seed=9)
    alone = [g.token_ids for g in engine.generate(records, images)]
    rows, every = engine.rows(), [engine.row(r, engine.encode_images(i)) for r, i in zip(records, images)]
    rows.add(every)
    rows.step()
    rows.drop(every[1])
    while len(rows):
        rows.step()
    assert every[1].answer.finish_reason == "cancelled" and len(every[1].answer.token_ids) == 2
    assert [row.answer.token_ids for i, row in enumerate(every) if i != 1] == alone[:1] + alone[2:]


def test_the_answer_depends_on_the_image_and_on_the_order_of_images(engine):
    record = {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}]}
    a, b = draw_image(1), draw_image(2)
    ids = [g.token_ids for g in engine.generate([record] * 3, [[a, b], [b, a], [a, a]])]
    assert ids[0] != ids[1] and ids[0] != ids[2]


@pytest.mark.parametrize("stop", [(), (" the",), ("e",), ("\n", "zz")])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_streamed_pieces_join_to_what_generate_returns(engine, stop, temperature):
    for record, images in zip(*draw_prompts(6, seed=3)):
        options = {"stop": stop, "temperature": temperature, "seed": 5, "max_new_tokens": 20}
        whole = engine.generate([record], [images], **options)[0]
        pieces, stream = [], engine.stream(record, images, **options)
        while True:
            try:
                pieces.append(next(stream))
            except StopIteration as end:
                streamed = end.value
                break
        assert "".join(pieces) == whole.text == streamed.text
        assert all(pieces) and streamed.token_ids == whole.token_ids
        assert streamed.finish_reason == whole.finish_reason


def test_counts_and_seconds_say_what_was_spent(engine):
    record = {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "digit"}]}]}
    answer = engine.generate([record], [[draw_image(0)]], max_new_tokens=5)[0]
    assert answer.num_image_tokens == TOKENS_PER_IMAGE
    words = len(engine.tokenizer.encode_text("digit"))
    assert answer.num_prompt_tokens == TOKENS_PER_IMAGE + words + 2  # <|user|>, <|assistant|>
    assert min(answer.image_seconds, answer.prefill_seconds, answer.decode_seconds, answer.tokens_per_second) > 0


def test_an_answer_ends_at_either_end_token_at_a_stop_string_or_at_its_length(engine):
    record, images = {"messages": [{"role": "user", "content": "which digit"}]}, []
    free = engine.generate([record], [images])[0]
    assert free.finish_reason == "length" and len(free.token_ids) == 12
    ender = free.token_ids[4]
    engine.stop_ids = frozenset({ender})
    ended = engine.generate([record], [images])[0]
    assert ended.finish_reason == "end"
    assert ended.token_ids == free.token_ids[: free.token_ids.index(ender)]
    engine.stop_ids = frozenset()
    part = engine.tokenizer.hf.decode(free.token_ids)
    stopped = engine.generate([record], [images], stop=[part[6:9]])[0]
    assert stopped.finish_reason == "stop" and stopped.text == part[: part.index(part[6:9])].strip()
    assert len(stopped.token_ids) < 12


def test_greedy_decoding_knows_the_tokens_that_end_a_turn_and_a_document(engine, tiny_tokenizer):
    assert engine.stop_ids == {tiny_tokenizer.end_id, tiny_tokenizer.document_end_id}


def test_sampling_repeats_with_its_seed_and_differs_between_seeds_and_rows(engine):
    records, images = draw_prompts(6, seed=4)
    draw = lambda seed: [g.token_ids for g in engine.generate(records, images, temperature=1.0, seed=seed)]
    assert draw(0) == draw(0) != draw(1)
    same = engine.generate([records[0]] * 4, [images[0]] * 4, temperature=1.0)
    assert len({tuple(g.token_ids) for g in same}) == 4
    # A row's draws depend on its place, not on how many rows follow.
    assert engine.generate(records[:1], images[:1], temperature=1.0)[0].token_ids == draw(0)[0]


def test_an_answer_never_holds_an_image_slot(engine):
    record = {"messages": [{"role": "user", "content": "what"}]}
    answers = engine.generate([record] * 40, [[]] * 40, temperature=20.0, max_new_tokens=64)
    tokens = [token for answer in answers for token in answer.token_ids]
    # Almost uniform draws from 400 ids: by chance the slot would be missed with probability 0.5 % or less.
    assert len(tokens) > 1500 and engine.tokenizer.image_id not in tokens


def test_top_k_of_one_is_greedy(engine):
    records, images = draw_prompts(4, seed=6)
    greedy = engine.generate(records, images)
    sampled = engine.generate(records, images, temperature=2.0, top_k=1)
    assert [g.token_ids for g in sampled] == [g.token_ids for g in greedy]


def test_mistakes_are_named_in_one_line(engine, tiny_tokenizer):
    asked = {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "digit " * 20}]}]}
    small = Engine(build_model(tiny_tokenizer, max_positions=32), tiny_tokenizer, image_size=IMAGE_SIZE)
    mistakes = {
        r"the prompt has \d+ tokens .4 of images.* the model ends at 32": lambda: small.generate(
            [asked], [[draw_image(0)]]
        ),
        "1 image slots, but 0 images": lambda: engine.generate([asked], [[]]),
        "1 image slots, but 2 images": lambda: engine.generate([asked], [[draw_image(0), draw_image(1)]]),
        r"the engine takes uint8 .3, 32, 32.": lambda: engine.encode_images([torch.zeros(3, 8, 8, dtype=torch.uint8)]),
        "has 1 slots of images, whose visual tokens are 4": lambda: engine.generate(
            [{"input_ids": [5, engine.tokenizer.image_id]}], [[draw_image(0)]]
        ),
        "2 records came with 1 lists": lambda: engine.generate([asked, asked], [[draw_image(0)]]),
        "the prompt is empty": lambda: engine.generate([{"document": ""}], [[]]),
        "temperature=-1": lambda: engine.generate([asked], [[draw_image(0)]], temperature=-1.0),
        "top_p=-0.5": lambda: engine.generate([asked], [[draw_image(0)]], top_p=-0.5),
    }
    for message, mistake in mistakes.items():
        with pytest.raises(ValueError, match=message) as error:
            mistake()
        assert "\n" not in str(error.value)


def test_logits_that_are_no_numbers_are_said_and_nothing_of_the_row_is_kept(tiny_model, tiny_tokenizer):
    engine = Engine(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE, max_new_tokens=4, prefix_store_bytes=1 << 22)
    logits = engine._next_logits
    engine._next_logits = lambda hidden: logits(hidden) * torch.nan
    records = [{"messages": [{"role": "user", "content": "digit"}]}]
    with pytest.raises(FloatingPointError, match="not finite"):
        engine.generate(records, [[]], temperature=1.0)
    assert not len(engine.prefixes)
    engine._next_logits = logits
    assert len(engine.generate(records, [[]], temperature=1.0)[0].token_ids) == 4 and len(engine.prefixes)


def test_no_records_give_no_answers(engine):
    assert engine.generate([], []) == []
    assert engine.encode_images([]) == []
