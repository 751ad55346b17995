"""Generation and likelihood of a model whose images keep fewer tokens than they have slots."""

import pytest
import torch
from test_engine import draw_prompts, greedy_without_cache
from tiny_vlm import IMAGE_SIZE, TOKENS_PER_IMAGE, build_model

from fastvlm.data.conversation import encode_record
from fastvlm.evaluation.likelihood import answer_nll, token_nll
from fastvlm.inference.engine import Engine
from fastvlm.models.resamplers.token_select import TokenSelectResampler


@pytest.fixture(scope="module")
def engine(tiny_tokenizer):
    model = build_model(tiny_tokenizer)
    torch.manual_seed(0)
    options = {"min_tokens": 1, "coverage": 0.6, "temperature": 0.005, "positions": 0}
    model.resampler = TokenSelectResampler(in_dim=model.encoder.out_dim, num_tokens=TOKENS_PER_IMAGE, **options)
    return Engine(model.eval(), tiny_tokenizer, image_size=IMAGE_SIZE, max_new_tokens=6)


def test_generation_without_the_empty_slots_is_that_of_training_which_hides_them(engine):
    records, images = draw_prompts(12, seed=3)
    answers = engine.generate(records, images)
    slots = TOKENS_PER_IMAGE * sum(map(len, images))
    assert sum(map(len, images)) < sum(a.num_image_tokens for a in answers) < slots
    for record, given, answer in zip(records, images, answers):
        expected = greedy_without_cache(engine, record, given, steps=6)
        assert [t for t in answer.token_ids if t not in engine.stop_ids] == expected
        prompt = encode_record(record, engine.tokenizer, tokens_per_image=TOKENS_PER_IMAGE, prompt=True).input_ids
        dropped = TOKENS_PER_IMAGE * len(given) - answer.num_image_tokens
        assert answer.num_prompt_tokens == len(prompt) - dropped


def test_the_language_model_is_given_fewer_positions(engine, monkeypatch):
    records, images = draw_prompts(12, seed=3)
    lengths = []
    decode = engine._decode
    monkeypatch.setattr(
        engine, "_decode", lambda embeds, *rest: lengths.append(embeds.shape[1]) or decode(embeds, *rest)
    )
    for record, given in zip(records, images):
        lengths.clear()
        (answer,) = engine.generate([record], [given])
        assert lengths[0] == answer.num_prompt_tokens


def test_the_likelihood_of_an_answer_does_not_see_the_empty_slots(engine):
    records, images = draw_prompts(8, seed=5)
    for record in records:
        if "messages" in record:
            record["messages"].append({"role": "assistant", "content": "the digit"})
    visual = [engine.encode_images(given) for given in images]
    options = {"tokens_per_image": TOKENS_PER_IMAGE}
    ours = answer_nll(engine.model, engine.tokenizer, records, visual, tokens_per_view=TOKENS_PER_IMAGE)
    for record, tokens, (nats, count) in zip(records, visual, ours):
        encoded = encode_record(record, engine.tokenizer, **options)
        tokens = torch.cat([torch.zeros(0, engine.model.llm.dim), *tokens])
        kept = (tokens != 0).any(-1)
        flags = iter(kept.tolist())
        stays = [i != engine.tokenizer.image_id or next(flags) for i in encoded.input_ids]
        ids = [i for i, s in zip(encoded.input_ids, stays) if s]
        labels = [label for label, s in zip(encoded.labels, stays) if s]
        row = torch.tensor([ids])
        with torch.no_grad():
            embeds = engine.model.llm.embed(row)
            embeds[row == engine.tokenizer.image_id] = tokens[kept]
            hidden = engine.model.llm.hidden(embeds, torch.arange(len(ids))[None], torch.ones_like(row))
            losses = engine.model.llm.head(hidden)[0, :-1].log_softmax(-1)
        at = torch.tensor(labels[1:]) != -100
        expected = -losses[at, torch.tensor(labels[1:])[at]].sum()
        assert count == int(at.sum())
        torch.testing.assert_close(nats, float(expected), rtol=1e-4, atol=1e-4)


def test_text_alone_is_untouched(engine):
    (scores,) = token_nll(engine.model, engine.tokenizer, [([9, 8, 7, 6], [-100, 8, 7, 6])], [[]])
    assert len(scores) == 3 and scores.isfinite().all()
