"""Exactly the assistant's words and the end of the turn are learned."""

from __future__ import annotations

import pytest
from tiny_world import train_tokenizer

from fastvlm.data.conversation import encode_record
from fastvlm.tokens import IGNORE_INDEX, IMAGE_TOKEN


def image():
    return {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


CHAT = {
    "messages": [
        {"role": "system", "content": "a small digit"},
        {"role": "user", "content": [image(), text("which digit is shown")]},
        {"role": "assistant", "content": "seven"},
        {"role": "user", "content": "and below"},
        {"role": "assistant", "content": [text("a nine")]},
    ]
}


def test_golden_chat(tokenizer):
    encoded = encode_record(CHAT, tokenizer, tokens_per_image=3)
    word = tokenizer.encode_text
    special = {t: tokenizer.hf.convert_tokens_to_ids(t) for t in ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")}
    pieces = [  # (ids, learned), written by hand from the template `roles`
        ([special["<|system|>"]], False),
        (word("a small digit"), False),
        ([special["<|user|>"]], False),
        ([tokenizer.image_id] * 3, False),
        (word("which digit is shown"), False),
        ([special["<|assistant|>"]], False),
        (word("seven"), True),
        ([special["<|end|>"]], True),
        ([special["<|user|>"]], False),
        (word("and below"), False),
        ([special["<|assistant|>"]], False),
        (word("a nine"), True),
        ([special["<|end|>"]], True),
    ]
    assert encoded.input_ids == [i for ids, _ in pieces for i in ids]
    assert encoded.labels == [i if learned else IGNORE_INDEX for ids, learned in pieces for i in ids]
    assert (encoded.num_images, encoded.truncated) == (1, 0)


def test_golden_document(tokenizer):
    """All text of a document and its end are learned, but not its very first token: nothing predicts it."""
    encoded = encode_record({"document": [text("grey seven"), image(), text("nine")]}, tokenizer, tokens_per_image=2)
    first, last = tokenizer.encode_text("grey seven"), tokenizer.encode_text("nine")
    assert encoded.input_ids == [*first, tokenizer.image_id, tokenizer.image_id, *last, tokenizer.document_end_id]
    ignored = [IGNORE_INDEX] * 2
    assert encoded.labels == [IGNORE_INDEX, *first[1:], *ignored, *last, tokenizer.document_end_id]


@pytest.mark.parametrize("template", ["roles", "chatml", "vicuna", "paligemma"])
def test_the_tokenizers_own_chat_template_gives_the_same_ids(tmp_path, template):
    tokenizer = train_tokenizer(tmp_path, template=template)
    ours = encode_record(CHAT, tokenizer, tokens_per_image=1).input_ids
    rendered = tokenizer.hf.apply_chat_template(CHAT["messages"], tokenize=False)
    theirs = tokenizer.hf(rendered, add_special_tokens=False).input_ids
    assert tokenizer.hf.decode(ours) == tokenizer.hf.decode(theirs) == rendered
    if template != "vicuna":  # its plain-text roles may merge with the words behind them
        assert ours == theirs


def test_a_prompt_ends_where_the_answer_begins(tokenizer):
    asked = {"messages": CHAT["messages"][:2]}
    prompt = encode_record(asked, tokenizer, tokens_per_image=3, prompt=True).input_ids
    whole = encode_record(CHAT, tokenizer, tokens_per_image=3)
    assert whole.input_ids[: len(prompt)] == prompt
    assert whole.labels[len(prompt) - 1] == IGNORE_INDEX and whole.labels[len(prompt)] != IGNORE_INDEX


def test_a_user_who_spells_a_special_token_gets_text(tokenizer):
    record = {
        "messages": [{"role": "user", "content": f"{IMAGE_TOKEN}<|end|>"}, {"role": "assistant", "content": "<|end|>"}]
    }
    encoded = encode_record(record, tokenizer, tokens_per_image=3)
    end = tokenizer.end_id
    assert tokenizer.image_id not in encoded.input_ids and encoded.num_images == 0
    assert encoded.input_ids.count(end) == 1 and encoded.labels[-1] == end
    assert tokenizer.hf.decode(encoded.input_ids).count(IMAGE_TOKEN) == 1


def test_truncation_never_leaves_part_of_an_image(tokenizer):
    record = {"document": [text("a"), image(), text("b"), image(), image(), text("c")]}
    whole = encode_record(record, tokenizer, tokens_per_image=5)
    for limit in range(1, len(whole.input_ids) + 1):
        cut = encode_record(record, tokenizer, tokens_per_image=5, max_tokens=limit)
        assert cut.input_ids == whole.input_ids[: len(cut.input_ids)] and len(cut.input_ids) <= limit
        assert cut.labels == whole.labels[: len(cut.labels)]
        assert cut.input_ids.count(tokenizer.image_id) == 5 * cut.num_images
        assert cut.truncated == len(whole.input_ids) - len(cut.input_ids)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "exactly one"),
        ({"messages": [], "document": []}, "exactly one"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role 'robot'"),
        ({"document": [{"type": "video"}]}, "must be an image or a text"),
        ({"document": ["x"]}, "must be an image or a text"),
    ],
)
def test_a_record_of_another_form_is_refused(tokenizer, record, message):
    with pytest.raises(ValueError, match=message):
        encode_record(record, tokenizer, tokens_per_image=1)
