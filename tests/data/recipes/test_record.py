"""Markers, turns and keys: what every recipe of conversations rests on."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.recipes.record import (
    EMPTY,
    FIRST_LEFT_OUT,
    LAST_LEFT_OUT,
    MARKER,
    MISMATCH,
    NO_ANSWER,
    ORDER,
    Unusable,
    make_key,
    make_messages,
    split_markers,
)
from fastvlm.data.shards import KEY

PIECES = st.lists(st.sampled_from([MARKER, "\n", "<", "image>", "<image", " ", "a", "é", "word"]), max_size=12)
IMAGE = {"type": "image"}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


@given(PIECES)
def test_images_stand_between_exactly_the_characters_they_stood_between(pieces):
    whole = "".join(pieces)
    parts = split_markers(whole)
    assert sum(part == IMAGE for part in parts) == whole.count(MARKER)
    assert not any(MARKER in part["text"] or not part["text"] for part in parts if part != IMAGE)
    assert not any(a["type"] == b["type"] == "text" for a, b in zip(parts, parts[1:]))
    # An oracle of another make: one line break on either side of a marker goes with it.
    texts = re.split(f"\n?{MARKER}\n?", whole)
    expected = [part for words in texts for part in (IMAGE, text(words))][1:]
    assert parts == [part for part in expected if part == IMAGE or part["text"]]


def test_places_by_hand():
    assert split_markers("<image>\nQ") == [IMAGE, text("Q")]
    assert split_markers("Q\n<image>") == [text("Q"), IMAGE]
    assert split_markers("a <image> b\n\n<image>\n\nc") == [text("a "), IMAGE, text(" b\n"), IMAGE, text("\nc")]
    assert split_markers("<image><image>\n<image>") == [IMAGE] * 3
    assert split_markers("no <image marker") == [text("no <image marker")]
    assert split_markers("") == []


@given(st.lists(st.one_of(st.text(max_size=80), st.integers(), st.none()), max_size=20))
def test_keys_are_valid_and_unique_whatever_the_ids(ids):
    keys = [make_key(id, row) for row, id in enumerate(ids)]
    assert len(set(keys)) == len(ids)
    assert all(KEY.fullmatch(key) and len(key) < 80 for key in keys)
    assert make_key("a", 1, 2) != make_key("a-1", 0, 2)


def test_turns_alternate_and_only_a_first_answer_or_a_last_question_is_left_out():
    messages, notes = make_messages([("gpt", "…"), ("human", "<image>\nQ"), ("gpt", "A"), ("human", "B")], num_images=1)
    assert messages == [{"role": "user", "content": [IMAGE, text("Q")]}, {"role": "assistant", "content": "A"}]
    assert notes == [FIRST_LEFT_OUT, LAST_LEFT_OUT]
    turns = [("system", " "), ("user", "Q"), ("function_call", "f()"), ("observation", "1"), ("assistant", "A")]
    messages, notes = make_messages(turns, num_images=0)
    assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant"] and not notes
    first, _ = make_messages([("system", "S"), ("user", "Q"), ("gpt", "A")], num_images=2, images_first=True)
    assert first[1]["content"] == [IMAGE, IMAGE, text("Q")] and first[0]["content"] == "S"
    marked, _ = make_messages([("user", "Q <image>"), ("gpt", "A")], num_images=1, images_first=True)
    assert marked[0]["content"] == [text("Q "), IMAGE]


@pytest.mark.parametrize(
    ("turns", "images", "reason"),
    [
        ([("human", "<image> Q"), ("gpt", "A")], 0, MISMATCH),
        ([("human", "Q"), ("gpt", "A")], 1, MISMATCH),
        ([("gpt", "<image>"), ("human", "Q"), ("gpt", "A")], 1, MISMATCH),  # its image went with the first turn
        ([("human", "Q"), ("gpt", "\n ")], 0, EMPTY),
        ([("human", ""), ("gpt", "A")], 0, EMPTY),
        ([("human", "Q")], 0, NO_ANSWER),
        ([("human", "Q"), ("human", "Q"), ("gpt", "A")], 0, ORDER),
        ([("human", "Q"), ("system", "S"), ("gpt", "A")], 0, ORDER),
        ([], 0, "no turns"),
        ([("ghost", "Q")], 0, "unknown role"),
        ([("human", None), ("gpt", "A")], 0, "text is not a string"),
    ],
)
def test_a_row_that_is_no_conversation_says_why(turns, images, reason):
    with pytest.raises(Unusable, match=f"^{re.escape(reason)}$"):
        make_messages(turns, num_images=images)
