"""Answers of a model whose images leave the encoder at different exits, against the same computed by hand."""

import pytest
import torch
from test_engine import draw_prompts
from tiny_vlm import IMAGE_SIZE, draw_image

from fastvlm.data.conversation import encode_record
from fastvlm.inference.engine import Engine
from fastvlm.models.encoders.early_exit import EarlyExitEncoder
from fastvlm.models.encoders.fastvit import FastViT
from fastvlm.models.llms.language_model import from_config
from fastvlm.models.projectors.mlp import MLPProjector
from fastvlm.models.resamplers.identity import IdentityResampler
from fastvlm.models.vlm import VLM

TOKENS = [1, 4, 16]  # of an image that leaves at the first exit, at the second, at the end


@pytest.fixture(scope="module")
def model(tiny_tokenizer):
    """Random weights, gates set so that half of the images that come to an exit leave there."""
    torch.manual_seed(0)
    parts = {"dims": [8, 16, 32], "depths": [1, 1, 1], "attention": [False, False, True], "stem_stride": 2}
    encoder = EarlyExitEncoder(FastViT(**parts, mlp_ratio=2.0), exits=[0, 1], num_tokens=TOKENS[:2])
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    limits = {"max_position_embeddings": 256, "initializer_range": 0.3}
    llm = from_config("llama", vocab_size=len(tiny_tokenizer), **sizes, **limits)
    projector = MLPProjector(in_dim=32, out_dim=llm.dim)
    model = VLM(encoder, IdentityResampler(in_dim=32), projector, llm, image_token_id=tiny_tokenizer.image_id)
    x = model.normalise(torch.stack([draw_image(100 * i + k) for i in range(16) for k in range(3)]))
    with torch.no_grad():
        for _ in range(20):
            encoder.encoder.train()(x)
        encoder.eval()
        for stage, gate in enumerate(encoder.gates):
            x = encoder.encoder.advance(stage, x)
            gate[1].weight.normal_(std=30.0)
            said = gate(x.mean((2, 3))).flatten().sort().values
            gate[1].bias -= said[len(said) // 2 - 1 :][:2].mean()  # between two images: rounding moves neither
            x = x[gate(x.mean((2, 3))).squeeze(1) <= 0]
    return model.eval()


def make_engine(model, tokenizer, **options):
    return Engine(model, tokenizer, image_size=IMAGE_SIZE, max_new_tokens=8, **options)


@torch.no_grad()
def tokens_by_hand(model, image):
    """Visual tokens (t, D) of one image: stage after stage, at each gate the question whether it goes on."""
    encoder, x = model.encoder, model.normalise(image[None])
    for exit, (gate, head) in enumerate(zip(encoder.gates, encoder.heads)):
        x = encoder.encoder.advance(exit, x)
        if float(torch.sigmoid(gate(x.mean((2, 3))))) > encoder.threshold:
            side = int(TOKENS[exit] ** 0.5)
            return model.projector(head(torch.nn.functional.adaptive_avg_pool2d(x, side).flatten(2).mT))[0]
    x = encoder.encoder.finish(encoder.encoder.advance(2, x))
    return model.projector(x.flatten(2).mT)[0]


@torch.no_grad()
def greedy_by_hand(engine, record, visual, *, steps):
    """The prompt with as many slots as an image has tokens, and the language model read whole for every token."""
    model, tokenizer = engine.model, engine.tokenizer
    ids = encode_record(record, tokenizer, tokens_per_image=[len(v) for v in visual], prompt=True).input_ids
    prompt = len(ids)
    while len(ids) < prompt + steps:
        row = torch.tensor(ids)
        embeds = model.llm.embed(row[None])[0]
        embeds[row == tokenizer.image_id] = torch.cat([embeds[:0], *visual])
        logits = model.llm.hf(inputs_embeds=embeds[None]).logits[0, -1]
        logits[tokenizer.image_id] = -torch.inf
        if int(logits.argmax()) in engine.stop_ids:
            break
        ids.append(int(logits.argmax()))
    return ids[prompt:], prompt


def test_answers_are_those_of_a_loop_by_hand_in_which_each_image_takes_its_exit(model, tiny_tokenizer):
    engine, (records, images) = make_engine(model, tiny_tokenizer), draw_prompts(16, seed=3)
    answers, left = engine.generate(records, images), []
    for record, given, answer in zip(records, images, answers):
        visual = [tokens_by_hand(model, image) for image in given]
        left += map(len, visual)
        expected, length = greedy_by_hand(engine, record, visual, steps=8)
        assert answer.token_ids == expected
        assert answer.num_image_tokens == sum(map(len, visual)) and answer.num_prompt_tokens == length
    assert set(left) == set(TOKENS), "the batch must hold images of every exit"


def test_rows_whose_images_leave_and_rows_whose_images_stay_are_answered_as_if_alone(model, tiny_tokenizer):
    engine, (records, images) = make_engine(model, tiny_tokenizer), draw_prompts(16, seed=4)
    fields = lambda g: (g.token_ids, g.num_image_tokens, g.num_prompt_tokens)
    alone = [fields(engine.generate([r], [i])[0]) for r, i in zip(records, images)]
    assert [fields(g) for g in engine.generate(records, images)] == alone
    stores = {"image_store_bytes": 1 << 24, "prefix_store_bytes": 1 << 24}
    remembering = make_engine(model, tiny_tokenizer, **stores)
    first, second = (remembering.generate(records, images) for _ in range(2))
    assert [fields(g) for g in first] == [fields(g) for g in second] == alone
    assert any(0 < g.num_reused_tokens < g.num_prompt_tokens for g in second)


@pytest.mark.parametrize("threshold, tokens", [(0.0, 1), (1.0, 16)])
def test_the_threshold_decides_how_many_tokens_an_answer_reads_and_which_stages_run(
    model, tiny_tokenizer, monkeypatch, threshold, tokens
):
    monkeypatch.setattr(model.encoder, "threshold", threshold)
    seen, advance = [], model.encoder.encoder.advance
    monkeypatch.setattr(model.encoder.encoder, "advance", lambda k, x: seen.append((k, len(x))) or advance(k, x))
    records, images = draw_prompts(8, seed=5)
    answers = make_engine(model, tiny_tokenizer).generate(records, images)
    assert [a.num_image_tokens for a in answers] == [tokens * len(given) for given in images]
    number = sum(map(len, images))
    assert seen == [(k, number) for k in (range(1) if threshold == 0 else range(3))]
