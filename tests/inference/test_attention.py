"""Where an answer looked, held to the weights of a whole forward pass of the same conversation."""

import io

import pytest
import torch
from PIL import Image
from tiny_checkpoints import save_checkpoint
from tiny_vlm import IMAGE_SIZE, TOKENS_PER_IMAGE, build_model, draw_image

from fastvlm.batch import Batch
from fastvlm.data.conversation import encode_record
from fastvlm.data.transforms import ImageTransform
from fastvlm.inference import attention, packed
from fastvlm.inference.engine import Engine
from fastvlm.inference.levers import apply_levers
from fastvlm.models.encoders.fastvit import FastViT
from fastvlm.models.encoders.multi_granularity import MultiGranularityEncoder
from fastvlm.models.pretrained import from_pretrained
from fastvlm.models.pretrained.views import read_views
from fastvlm.models.resamplers.perceiver import PerceiverResampler
from fastvlm.models.resamplers.token_select import TokenSelectResampler
from fastvlm.tokens import IGNORE_INDEX, Tokenizer

STORES = {"image_store_bytes": 1 << 20, "prefix_store_bytes": 1 << 22}


def pretrained(kind: str, folder) -> Engine:
    folder = save_checkpoint(kind, folder)
    template = "paligemma" if kind == "paligemma" else "own"
    model, tokenizer = from_pretrained(str(folder)), Tokenizer(str(folder), template=template, image_token="own")
    views = read_views(str(folder), model.config)
    transform = ImageTransform(image_size=views.image_size, **views.image)
    return Engine(model, tokenizer, image_size=views.image_size, transform=transform, **STORES)


def two_granularities(tokenizer) -> Engine:
    model = build_model(tokenizer)
    torch.manual_seed(1)
    fine = FastViT(dims=[8, 16], depths=[1, 1], attention=[False, True], mlp_ratio=2.0)
    model.encoder = MultiGranularityEncoder(model.encoder, fine)
    return Engine(model, tokenizer, image_size=IMAGE_SIZE, **STORES)


def selecting(tokenizer) -> Engine:
    model = build_model(tokenizer)
    torch.manual_seed(0)
    options = {"min_tokens": 1, "coverage": 0.6, "temperature": 0.005, "positions": 0}
    model.resampler = TokenSelectResampler(in_dim=model.encoder.out_dim, num_tokens=TOKENS_PER_IMAGE, **options)
    return Engine(model, tokenizer, image_size=IMAGE_SIZE, **STORES)


def picture(engine, width: int, height: int) -> torch.Tensor:
    file = io.BytesIO()
    Image.fromarray(torch.randint(0, 256, (height, width, 3), dtype=torch.uint8).numpy()).save(file, "png")
    return engine.transform(file.getvalue())


def asked(engine, images, answer: str) -> dict:
    content = [*[{"type": "image"}] * len(images), {"type": "text", "text": "what is in the image?"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def look(engine, record, images, **options):
    """The views, and the attention on each slot of each image."""
    seen, original = [], attention.attention_on_slots
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "attention_on_slots", lambda *given: seen.extend(original(*given)) or seen)
        work = attention.attend(engine, record, images, **options)
        while True:
            try:
                next(work)
            except StopIteration as end:
                return end.value, seen


def whole_pass(engine, record, images) -> list[torch.Tensor]:
    """The same from one forward pass of all positions, as training makes it: without a cache, S x S weights."""
    model, tokenizer = engine.model, engine.tokenizer
    views = [image if image.ndim == 4 else image[None] for image in images]
    slots = [engine.tokens_per_image * len(image) for image in views]
    encoded = encode_record(record, tokenizer, tokens_per_image=slots)
    grids = [(1, len(v) - 1 or 1, IMAGE_SIZE, IMAGE_SIZE) for v in views]
    layouts = [getattr(image, "view_layout", grid) for image, grid in zip(images, grids)]
    row, labels = torch.tensor([encoded.input_ids]), torch.tensor([encoded.labels])
    batch = Batch(
        input_ids=row,
        labels=labels,
        position_ids=torch.arange(row.shape[1])[None],
        segment_ids=torch.ones_like(row),
        source_ids=torch.zeros_like(row),
        pixel_values=torch.cat(views),
        num_answer_tokens=1,
        sources=("only",),
        layouts=torch.tensor(layouts),
    )
    with torch.no_grad(), attention.listening(model.llm) as heard:
        model.hidden(batch)
    weights = torch.stack([layer[0].mean(dim=0) for layer in heard]).mean(dim=0)  # (S, S)
    learned = (labels[0] != IGNORE_INDEX).nonzero().squeeze(1)
    return list(weights[learned - 1].sum(dim=0)[row[0] == tokenizer.image_id].split(slots))


KINDS = ["llava", "llava_next", "llava_onevision", "qwen2_vl", "paligemma", "smolvlm"]


@pytest.fixture(scope="module", params=[*KINDS, "two_granularities", "selecting"])
def case(request, tmp_path_factory, tiny_tokenizer):
    torch.manual_seed(0)
    if request.param in KINDS:
        engine = pretrained(request.param, tmp_path_factory.mktemp(request.param))
        return engine, [picture(engine, 100, 44)]
    if request.param == "selecting":
        return selecting(tiny_tokenizer), [draw_image(1), draw_image(2)]
    return two_granularities(tiny_tokenizer), [torch.stack([draw_image(i) for i in range(3)]), draw_image(5)[None]]


def test_attention_is_that_of_a_whole_forward_pass_however_few_weights_are_held(case):
    engine, images = case
    record = asked(engine, images, "a red square and two blue circles")
    expected = whole_pass(engine, record, images)
    lengths, decode = [], engine.model.llm.decode
    for most in (1 << 24, 1):
        with pytest.MonkeyPatch.context() as patch:
            spy = lambda embeds, *rest: lengths.append(embeds.shape[1]) or decode(embeds, *rest)
            patch.setattr(engine.model.llm, "decode", spy)
            views, found = look(engine, record, images, max_weights=most)
        for ours, theirs in zip(found, expected, strict=True):
            assert theirs.sum() > 0 and torch.allclose(ours, theirs, rtol=2e-5, atol=1e-7)
        assert len(views) == len(images)
        for view in views:
            assert view.answer.shape == (view.rows * view.columns,) == view.tokens.shape[1:]
            for shares in (view.answer, *view.tokens):
                assert abs(shares.sum() - 1) < 1e-4
    assert lengths[-5:] == [1] * 5, "one position at a time where more weights may not be held"


def test_each_slot_of_the_global_view_is_known_whatever_stands_between(case):
    engine, images = case
    model, (visual, *_) = engine.model, engine.encode_images(images)
    views = images[0] if images[0].ndim == 4 else images[0][None]
    with torch.inference_mode():
        tokens = model.encode_images(views[:1])[0]
    numbers = attention.global_tokens(engine, images[0], dim=visual.shape[1])
    assert len(numbers) == len(visual) and set(range(1, len(tokens) + 1)) <= set(numbers.tolist())
    for slot, number in zip(visual, numbers.tolist()):
        if number:
            assert torch.allclose(slot, tokens[number - 1], atol=1e-4)


def test_a_prompt_that_was_answered_is_not_read_again(tiny_tokenizer):
    engine = Engine(build_model(tiny_tokenizer), tiny_tokenizer, image_size=IMAGE_SIZE, **STORES)
    images = [draw_image(1), draw_image(2)]
    record = asked(engine, images, "digit word digit")
    fresh, _ = look(engine, record, images)
    (answer,) = engine.generate([{"messages": record["messages"][:1]}], [images], max_new_tokens=4)
    read, decode = [], engine._decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_decode", lambda embeds, *rest: read.append(embeds.shape[1]) or decode(embeds, *rest))
        again, _ = look(engine, record, images)
    assert read == [1] and answer.num_prompt_tokens > 8
    for one, other in zip(fresh, again):
        assert torch.allclose(one.answer, other.answer, atol=1e-5)
    assert engine.generate([{"messages": record["messages"][:1]}], [images], max_new_tokens=4)[0].text == answer.text


def test_patches_of_qwen2_vl_stand_row_by_row_though_its_tower_has_them_in_blocks(tmp_path):
    engine = pretrained("qwen2_vl", tmp_path)
    images = [picture(engine, 100, 44)]
    (view,), _ = look(engine, asked(engine, images, "a red square"), images)
    for i, token in enumerate(view.tokens):
        row, column = divmod(i, view.columns // 2)
        block = {(2 * row + r) * view.columns + 2 * column + c for r in (0, 1) for c in (0, 1)}
        assert set(token.nonzero().squeeze(1).tolist()) == block


def test_packed_layers_of_a_resampler_leave_the_regions_of_its_tokens_as_they_were(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(packed, "SMALLEST", 1)
    model = build_model(tiny_tokenizer)
    model.resampler = PerceiverResampler(in_dim=model.encoder.out_dim, num_tokens=TOKENS_PER_IMAGE)
    torch.nn.init.uniform_(model.resampler.norm.weight, 0.5, 2.0)  # at 1 a token's sum depends on no patch
    engine = Engine(model, tiny_tokenizer, image_size=IMAGE_SIZE)
    images = [draw_image(1)]
    record = asked(engine, images, "a red square")
    (plain,), _ = look(engine, record, images)
    apply_levers(model, "packed")
    (view,), _ = look(engine, record, images)
    assert len(plain.tokens) == TOKENS_PER_IMAGE
    torch.testing.assert_close(view.tokens, plain.tokens, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(view.answer, plain.answer, atol=1e-4, rtol=1e-3)


def test_a_conversation_without_an_answer_has_no_attention(tiny_tokenizer):
    engine = Engine(build_model(tiny_tokenizer), tiny_tokenizer, image_size=IMAGE_SIZE)
    question = {"messages": asked(engine, [0], "x")["messages"][:1]}
    with pytest.raises(ValueError, match="must end with the assistant's answer"):
        look(engine, question, [draw_image(1)])
    long = asked(engine, [0], "digit " * 400)
    with pytest.raises(ValueError, match="the model ends at 256"):
        look(engine, long, [draw_image(1)])
