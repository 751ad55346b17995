"""Exactly the assistant's words and the end of the turn are learned."""

from __future__ import annotations

import hashlib
import json
import string

import pytest
from tiny_world import train_tokenizer
from tokenizers import Tokenizer as Rust
from tokenizers import models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastvlm.data.conversation import encode_record
from fastvlm.tokens import IGNORE_INDEX, IMAGE_TOKEN, Tokenizer


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


@pytest.mark.parametrize("template", ["roles", "chatml", "vicuna", "llava", "smolvlm", "paligemma"])
@pytest.mark.parametrize("prompt", [False, True])
def test_the_tokenizers_own_chat_template_gives_the_same_ids(tmp_path, template, prompt):
    tokenizer = train_tokenizer(tmp_path, template=template)
    for first in (0, 1, 3):  # with a system turn, an image, and neither
        chat = CHAT["messages"][first : 4 if prompt else 5]
        ours = encode_record({"messages": chat}, tokenizer, tokens_per_image=1, prompt=prompt).input_ids
        rendered = tokenizer.hf.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
        theirs = tokenizer.hf(rendered, add_special_tokens=False).input_ids
        assert tokenizer.hf.decode(ours) == tokenizer.hf.decode(theirs) == rendered
        if first or template not in ("vicuna", "llava"):  # the space after a system turn is a token where it can be one
            assert ours == theirs


SMOLVLMS = (  # no space before an image
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
    "{{ ':' if m['content'][0]['type'] == 'image' else ': ' }}"
    "{% for p in m['content'] %}{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}"
    "{{ '<end_of_utterance>\n' }}{% endfor %}{{ 'Assistant:' if add_generation_prompt }}"
)
LLAVAS = (  # a space and a line break around an image, and no end of an answer
    "{% for m in messages %}{{ m['role'] | upper }}{{ ': ' }}"
    "{% for p in m['content'] if p['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{{ 'ASSISTANT:' if add_generation_prompt }}"
)


@pytest.fixture(scope="module", params=["smolvlm", "llava"])
def pretrained(request, tmp_path_factory):
    """A tokenizer with the chat template of SmolVLM or of LLaVA-1.5."""
    folder = tmp_path_factory.mktemp(request.param)
    hf = train_tokenizer(folder).hf
    hf.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<end_of_utterance>", "<image>"]})
    hf.chat_template = SMOLVLMS if request.param == "smolvlm" else LLAVAS
    hf.save_pretrained(folder)
    return Tokenizer(str(folder), template="own", image_token="<image>")


def test_a_pretrained_models_prompts_are_those_of_its_chat_template(pretrained):
    say = lambda role, *parts: {"role": role, "content": list(parts)}
    ask, answer = say("user", text("which digit is shown")), say("assistant", text("a nine"))
    look = say("user", image(), text("which digit is shown"))
    for chat in ([ask], [look], [look, answer, ask], [ask, answer, ask, answer, ask]):
        ours = encode_record({"messages": chat}, pretrained, tokens_per_image=1, prompt=True).input_ids
        rendered = pretrained.hf.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        if "ASSISTANT" in rendered:  # LLaVA's answers end by a token that only training writes
            ours = [token for token in ours if token != pretrained.end_id]
        assert ours == pretrained.hf(rendered, add_special_tokens=False).input_ids


def test_llavas_own_prompt_has_a_line_break_after_the_image(tmp_path):
    tokenizer = train_tokenizer(tmp_path, template="llava")
    asked = {"messages": [{"role": "user", "content": [image(), text("which digit")]}]}
    ids = encode_record(asked, tokenizer, tokens_per_image=1, prompt=True).input_ids
    assert tokenizer.hf.decode(ids) == f"<s>USER: {IMAGE_TOKEN}\nwhich digit ASSISTANT:"


def test_the_space_before_an_answer_is_learned_with_its_first_word(pretrained):
    asked, answer = [{"role": "user", "content": "which digit"}], [{"role": "assistant", "content": "nine"}]
    whole = encode_record({"messages": asked + answer}, pretrained, tokens_per_image=1)
    prompt = encode_record({"messages": asked}, pretrained, tokens_per_image=1, prompt=True).input_ids
    learned = [label for label in whole.labels if label != IGNORE_INDEX]
    assert learned == [*pretrained.encode_text(" nine"), pretrained.end_id]
    assert whole.input_ids[: len(prompt) + len(learned)] == prompt + learned
    assert pretrained.decode(learned) == "nine"


@pytest.mark.parametrize("normaliser", [True, False])
def test_a_sentencepiece_tokenizers_prompt_has_one_space_before_a_word(tmp_path, normaliser):
    letters = ["<unk>", "▁", *string.ascii_letters, ":"]
    rust = Rust(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[], unk_token="<unk>"))
    if normaliser:  # the two ways in which a tokenizer.json has the space before every text
        rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    PreTrainedTokenizerFast(tokenizer_object=rust, unk_token="<unk>").save_pretrained(tmp_path)
    tokenizer = Tokenizer(str(tmp_path), template="vicuna")
    ids = encode_record({"messages": [{"role": "user", "content": "a b"}]}, tokenizer, tokens_per_image=1, prompt=True)
    assert "".join(tokenizer.hf.convert_ids_to_tokens(ids.input_ids)) == "<s>▁USER:▁a▁b▁ASSISTANT:"
    asked = {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "a b"}]}
    ids = encode_record(asked, tokenizer, tokens_per_image=1, prompt=True)
    assert "".join(tokenizer.hf.convert_ids_to_tokens(ids.input_ids)) == "<s>▁be▁USER:▁a▁b▁ASSISTANT:"
    # An index from before system prompts left their space to what follows does not fit.
    state = [json.loads(tokenizer.hf.backend_tokenizer.to_str()), tokenizer.hf.chat_template]
    before = json.dumps([*state, "spaces are encoded with what follows"], sort_keys=True)
    assert tokenizer.fingerprint != hashlib.sha256(before.encode()).hexdigest()[:16]


@pytest.mark.parametrize(("template", "same"), [("roles", True), ("chatml", True), ("paligemma", True), ("own", False)])
def test_the_fingerprint_tells_of_spaces_only_where_a_template_ends_in_one(tmp_path, template, same):
    hf = train_tokenizer(tmp_path).hf
    hf.chat_template = LLAVAS
    hf.save_pretrained(tmp_path)
    tokenizer = Tokenizer(str(tmp_path), template=template, image_token="<image>")
    state = [json.loads(tokenizer.hf.backend_tokenizer.to_str()), tokenizer.hf.chat_template]
    plain = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]
    assert (tokenizer.fingerprint == plain) is same


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
