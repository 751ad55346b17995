import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_vlm import TOKENS_PER_IMAGE, draw_image

from fastvlm.data.conversation import encode_record
from fastvlm.evaluation import likelihood
from fastvlm.evaluation.likelihood import answer_nll, text_perplexity, text_windows
from fastvlm.models.splice import splice

TEXTS = ["the digit shown here is small and grey. " * 4, "nine", "seven above three, and below it a Zürich.\n" * 2]


def nll_in_float64(model, tokenizer, ids, visual=None):
    """Reference: one unpadded row in double precision, token by token from the full logits."""
    double = model.llm.double()
    row = torch.tensor([ids])
    embeds = double.embed(row)
    if visual:
        embeds = splice(embeds, row, torch.stack(visual).double(), image_token_id=tokenizer.image_id)
    with torch.no_grad():
        hidden = double.hidden(embeds, torch.arange(len(ids))[None], torch.ones_like(row))
        log_probabilities = double.head(hidden)[0].log_softmax(-1)
    model.llm.float()
    return [-float(log_probabilities[t - 1, ids[t]]) for t in range(1, len(ids))]


@pytest.mark.parametrize("window", [7, 64, 200])
def test_perplexity_equals_a_recomputation_in_float64(tiny_model, tiny_tokenizer, window):
    score = text_perplexity(tiny_model, tiny_tokenizer, TEXTS, window=window, batch_size=3)
    nats, num_bytes = [], 0
    for text in TEXTS:
        ids = [*tiny_tokenizer.encode_text(text), tiny_tokenizer.document_end_id]
        for start in range(0, len(ids) - 1, window):
            nats += nll_in_float64(tiny_model, tiny_tokenizer, ids[start : start + window + 1])
        num_bytes += len(text.encode()) - len(tiny_tokenizer.hf.decode(ids[:1]).encode())
    assert score["num_tokens"] == len(nats)
    assert score["perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-5)
    assert score["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / num_bytes, rel=1e-5)


def test_perplexity_does_not_depend_on_the_batch_size(tiny_model, tiny_tokenizer):
    scores = [text_perplexity(tiny_model, tiny_tokenizer, TEXTS, window=9, batch_size=b) for b in (1, 4, 64)]
    assert scores[1] == pytest.approx(scores[0], rel=1e-6)
    assert scores[2] == pytest.approx(scores[0], rel=1e-6)


def test_the_logits_of_long_rows_are_computed_a_piece_at_a_time(tiny_model, tiny_tokenizer, monkeypatch):
    whole, sizes, head = text_perplexity(tiny_model, tiny_tokenizer, TEXTS), [], tiny_model.llm.head
    monkeypatch.setattr(likelihood, "LOGITS", 7 * tiny_model.llm.vocab_size)
    monkeypatch.setattr(tiny_model.llm, "head", lambda hidden: sizes.append(len(hidden)) or head(hidden))
    assert text_perplexity(tiny_model, tiny_tokenizer, TEXTS) == pytest.approx(whole, rel=1e-6)
    assert sizes[:-1] == [7] * (int(whole["num_tokens"]) // 7) and sum(sizes) == whole["num_tokens"]


@given(ids=st.lists(st.integers(0, 99), max_size=60), window=st.integers(1, 20))
def test_windows_score_every_token_but_the_first_exactly_once(ids, window):
    rows = text_windows(ids, window=window)
    assert [label for _, labels in rows for label in labels[1:]] == ids[1:]
    assert all(labels[0] == -100 and row[1:] == labels[1:] and len(row) <= window + 1 for row, labels in rows)


def test_answer_nll_counts_the_answers_tokens_and_equals_float64(tiny_model, tiny_tokenizer):
    image = {"type": "image"}
    records, visual = [], []
    for i in range(7):
        content = [image] * (i % 3) + [{"type": "text", "text": "digit " * (i + 1)}]
        answer = {"role": "assistant", "content": "seven and nine"[: 3 * i + 2]}
        records.append({"messages": [{"role": "user", "content": content}, answer]})
        pixels = [draw_image(10 * i + k) for k in range(i % 3)]
        with torch.no_grad():
            one = torch.stack(pixels) if pixels else torch.zeros(0, 3, 32, 32, dtype=torch.uint8)
            visual.append(list(tiny_model.encode_images(one)) if pixels else [])
    scores = answer_nll(tiny_model, tiny_tokenizer, records, visual, tokens_per_view=TOKENS_PER_IMAGE, batch_size=3)
    for record, tokens, (nats, count) in zip(records, visual, scores):
        encoded = encode_record(record, tiny_tokenizer, tokens_per_image=TOKENS_PER_IMAGE)
        learned = [label != -100 for label in encoded.labels[1:]]
        every = nll_in_float64(tiny_model, tiny_tokenizer, encoded.input_ids, tokens)
        assert count == sum(learned) == len(tiny_tokenizer.encode_text(record["messages"][1]["content"])) + 1
        assert nats == pytest.approx(sum(n for n, counts in zip(every, learned) if counts), rel=1e-4)


def test_nothing_to_score_is_an_error(tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match="0 texts hold no token"):
        text_perplexity(tiny_model, tiny_tokenizer, [])
    with pytest.raises(ValueError, match="window=0"):
        text_perplexity(tiny_model, tiny_tokenizer, ["a"], window=0)
    with pytest.raises(ValueError, match=r"a row has \d+ tokens, but the model ends at 256"):
        text_perplexity(tiny_model, tiny_tokenizer, ["digit 12345 " * 100], window=1000)
