"""A pretrained vision-language model in our parts says what its own class says."""

import json
import shutil

import numpy as np
import pytest
import torch
from einops import rearrange
from part_options import relative_error
from PIL import Image
from tiny_checkpoints import MAKERS, PATCH, save_checkpoint
from transformers import AutoModelForImageTextToText, AutoProcessor

from fastvlm.batch import Batch
from fastvlm.build import saved_tokenizer
from fastvlm.data.conversation import encode_record
from fastvlm.models.pretrained import from_pretrained
from fastvlm.models.trainable import add_lora, merge_lora
from fastvlm.tokens import IGNORE_INDEX, Tokenizer

QUESTION = "what is in the image?"
# (width, height): one that pads its tiles, and a square
SIZES = {"qwen2_vl": [(84, 84)], "fast_vlm": [(90, 70)]}
PADDED = [(100, 44), (56, 56), (40, 150), (300, 60), (60, 300)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folders = {}

    def get(kind: str):
        if kind not in folders:
            folders[kind] = save_checkpoint(kind, tmp_path_factory.mktemp(kind))
        return folders[kind]

    return get


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def stock_inputs(processor, kind: str, image: Image.Image):
    if kind == "paligemma":
        return processor(images=image, text="<image>" + QUESTION, return_tensors="pt")
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=image, text=text, return_tensors="pt")


def our_views(inputs, kind: str, mean, std) -> torch.Tensor:
    """The processor's pixels as the bytes they were made of, global view first."""
    pixels = inputs["pixel_values"]
    if kind == "qwen2_vl":
        _, height, width = inputs["image_grid_thw"][0].tolist()
        shape = dict(h=height // 2, w=width // 2, a=2, b=2, c=3, t=2, p=PATCH, q=PATCH)
        pixels = rearrange(pixels, "(h w a b) (c t p q) -> t c (h a p) (w b q)", **shape)[:1]
    pixels = pixels.flatten(0, -4) if pixels.ndim > 4 else pixels
    if kind in ("idefics3", "smolvlm"):
        pixels = torch.cat([pixels[-1:], pixels[:-1]])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) * 255 for v in (mean, std))
    exact = pixels * std + mean
    assert (exact - exact.round()).abs().max() < 1e-2
    return exact.round().to(torch.uint8)


def layout_of(inputs, kind: str, image: Image.Image, views: int, model) -> torch.Tensor | None:
    if views == 1 and kind != "llava_onevision":
        return None
    if kind in ("idefics3", "smolvlm"):
        wide = image.width >= image.height
        long, other = 2, (views - 1) // 2
        rows, columns = (other, long) if wide else (long, other)
    else:
        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

        side = model.encoder.image_size
        grids = model.config.image_grid_pinpoints
        rows, columns = get_anyres_image_grid_shape((image.height, image.width), grids, side)
    return torch.tensor([[rows, columns, image.height, image.width]])


def our_prompt(kind: str, folder, slots: int) -> tuple[Tokenizer, list[int]]:
    template = "paligemma" if kind == "paligemma" else "own"
    tokenizer = Tokenizer(str(folder), template=template, image_token="own")
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    record = {"messages": [{"role": "user", "content": content}]}
    return tokenizer, encode_record(record, tokenizer, tokens_per_image=[slots], prompt=True).input_ids


def as_batch(ids: list[int], views: torch.Tensor, layouts, labels: list[int] | None = None) -> Batch:
    row = torch.tensor([ids])
    return Batch(
        input_ids=row,
        labels=torch.full_like(row, IGNORE_INDEX) if labels is None else torch.tensor([labels]),
        position_ids=torch.arange(len(ids))[None],
        segment_ids=torch.ones_like(row),
        source_ids=torch.zeros_like(row),
        pixel_values=views,
        num_answer_tokens=1,
        sources=("only",),
        layouts=layouts,
    )


@pytest.mark.parametrize("kind", MAKERS)
def test_logits_and_greedy_generation_equal_those_of_the_stock_class(kind, checkpoint):
    folder = checkpoint(kind)
    processor = AutoProcessor.from_pretrained(folder)
    stock = AutoModelForImageTextToText.from_pretrained(folder).eval()
    model = from_pretrained(str(folder), attention="sdpa")
    for width, height in SIZES.get(kind, PADDED):
        image = picture(width, height)
        inputs = stock_inputs(processor, kind, image)
        views = our_views(inputs, kind, model.encoder.mean, model.encoder.std)
        layouts = layout_of(inputs, kind, image, len(views), model)
        slots = model.num_visual_tokens(views.shape[-1]) * len(views)
        if kind == "llava_onevision" and len(views) == 2:
            views = views[:1]  # the one tile is the global view, where the image is square
            slots //= 2
        tokenizer, ids = our_prompt(kind, folder, slots)
        after = len(ids) - 1 - max(i for i, token in enumerate(ids) if token == tokenizer.image_id)
        assert after > 3
        assert ids[-after:] == inputs["input_ids"][0, -after:].tolist()
        with torch.no_grad():
            theirs = stock(**inputs).logits[0, -after:]
            ours = model(as_batch(ids, views, layouts))[0, -after:]
        assert relative_error(ours, theirs) <= 1e-5, (width, height)
        begun = inputs["input_ids"].shape[1]
        written = stock.generate(**inputs, max_new_tokens=8, do_sample=False)[0, begun:].tolist()
        stop = stock.generation_config.eos_token_id
        stop = stop if isinstance(stop, list) else [stop] if stop is not None else []
        again = model.generate(torch.tensor([ids]), views, layouts=layouts, max_new_tokens=8, stop_ids=stop)
        assert again[0].tolist() == written


def test_paligemmas_loss_sees_the_prompt_both_ways_and_the_answer_causally(checkpoint):
    folder = checkpoint("paligemma")
    processor, stock = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder).eval()
    inputs = processor(images=picture(56, 56), text="<image>" + QUESTION, suffix="a red square", return_tensors="pt")
    model = from_pretrained(str(folder))
    views = our_views(inputs, "paligemma", model.encoder.mean, model.encoder.std)
    ids, labels = inputs["input_ids"][0].tolist(), inputs["labels"][0].tolist()
    assert labels[0] == IGNORE_INDEX and labels[-1] != IGNORE_INDEX
    with torch.no_grad():
        theirs = stock(**{k: v for k, v in inputs.items() if k != "labels"}).logits
        ours = model(as_batch(ids, views, None, labels))
    assert relative_error(ours, theirs) <= 1e-5


@pytest.mark.parametrize("kind", ["llava_next", "qwen2_vl", "paligemma", "smolvlm"])
def test_samples_packed_in_one_row_have_the_logits_they_have_alone(kind, checkpoint):
    folder = checkpoint(kind)
    model = from_pretrained(str(folder))
    side = 56 if kind in ("qwen2_vl", "smolvlm") else model.encoder.image_size
    many = kind in ("llava_next", "smolvlm")
    layouts = torch.tensor([[1, 2, 40, 100]]) if many else None
    views = torch.randint(0, 256, (3 if many else 1, 3, side, side), dtype=torch.uint8)
    _, ids = our_prompt(kind, folder, model.num_visual_tokens(side) * len(views))
    ids, answer = ids + [30, 31, 32], [IGNORE_INDEX] * len(ids) + [30, 31, 32]
    alone = as_batch(ids, views, layouts, answer)
    n = len(ids)
    twice = Batch(
        input_ids=alone.input_ids.repeat(1, 2),
        labels=alone.labels.repeat(1, 2),
        position_ids=alone.position_ids.repeat(1, 2),
        segment_ids=torch.cat([alone.segment_ids, alone.segment_ids + 1], dim=1),
        source_ids=alone.source_ids.repeat(1, 2),
        pixel_values=torch.cat([views.flip(2), views]),
        num_answer_tokens=1,
        sources=("only",),
        layouts=None if layouts is None else layouts.repeat(2, 1),
    )
    with torch.no_grad():
        assert relative_error(model(twice)[0, n + n - 4 :], model(alone)[0, n - 4 :]) <= 1e-5


def test_an_image_is_a_sequence_and_a_map_and_text_its_embeddings(checkpoint):
    for kind, side in (("llava", 28), ("qwen2_vl", 56)):
        model = from_pretrained(str(checkpoint(kind)))
        views = torch.zeros(1, 3, side, side, dtype=torch.uint8)
        patch = model.encoder.patch
        views[:, :, :patch, patch : 2 * patch] = 255  # the second patch of the first row
        with torch.no_grad():
            encoding = model.encode_image(views)
            blank = model.encode_image(torch.zeros_like(views))
        assert encoding.sequence.shape == (1, model.num_visual_tokens(side), model.llm.dim)
        moved = (encoding.spatial - blank.spatial).norm(dim=1)[0]
        assert moved.shape == (side // patch, side // patch) and moved.argmax() == 1
        ids = torch.tensor([[7, 8]])
        assert torch.equal(model.encode_text(ids), model.llm.embed(ids))


@pytest.mark.parametrize("kind", ["smolvlm", "paligemma"])
def test_a_folders_own_tokenizer_writes_around_an_image_what_its_model_does_not(kind, checkpoint):
    folder = checkpoint(kind)
    ours = our_prompt(kind, folder, 4)[1]
    record = {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]}
    assert encode_record(record, saved_tokenizer(folder), tokens_per_image=4, prompt=True).input_ids == ours


def test_every_parameter_of_a_part_has_a_gradient_so_that_ranks_agree(checkpoint):
    for kind in ("llava", "llava_next", "qwen2_vl", "paligemma", "smolvlm"):
        model = from_pretrained(str(checkpoint(kind))).train()
        side = 56 if kind in ("qwen2_vl", "smolvlm") else 28
        views = torch.zeros(0, 3, side, side, dtype=torch.uint8)  # a step of text alone
        loss = model(as_batch([30, 31, 32, 33], views, None, [IGNORE_INDEX, 31, 32, 33])).sum()
        loss.backward()
        without = [name for name, p in model.named_parameters() if p.grad is None]
        assert not without, (kind, without)


def test_the_embedding_grows_for_tokens_a_template_adds(checkpoint):
    for kind in ("llava", "qwen2_vl"):
        model, before = (from_pretrained(str(checkpoint(kind)), vocab_size=size) for size in (400, None))
        assert model.llm.vocab_size == 400
        ids = torch.tensor([[7, 399]])
        where = (torch.arange(2)[None], torch.ones_like(ids))
        grown = model.llm.head(model.llm.hidden(model.llm.embed(ids), *where))
        short = before.llm.head(before.llm.hidden(before.llm.embed(ids[:, :1]), *(x[:, :1] for x in where)))
        assert grown.shape[-1] == 400
        assert relative_error(grown[:, :1, : short.shape[-1]], short) <= 1e-5


def test_lora_goes_into_the_language_model_and_merges(checkpoint):
    model = from_pretrained(str(checkpoint("qwen2_vl")))
    names = set(model.state_dict())
    tuner = add_lora(model.llm.hf, r=2, alpha=4.0, dropout=0.0, targets=["q_proj", "v_proj"])
    assert any("lora_A" in name for name, _ in model.named_parameters())
    merge_lora(tuner)
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("kind", MAKERS)
def test_a_model_given_back_to_its_own_class_is_what_it_was(kind, checkpoint, tmp_path):
    folder = checkpoint(kind)
    stock, model = AutoModelForImageTextToText.from_pretrained(folder), from_pretrained(str(folder))
    with torch.no_grad():
        next(model.projector.parameters()).add_(1)
    back = model.restored().state_dict()
    theirs = stock.state_dict()
    assert back.keys() == theirs.keys()
    changed = [name for name in theirs if not torch.equal(back[name], theirs[name])]
    assert len(changed) == 1


def test_what_is_not_there_or_does_not_fit_is_one_line(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = checkpoint("llava")
    with pytest.raises(ValueError, match="holds a llava, not a qwen2_vl; use vlm=llava_1_5"):
        from_pretrained(str(folder), model_type="qwen2_vl")
    with pytest.raises(ValueError, match=r"vlm.path=no/such-model.*name a folder with config.json"):
        from_pretrained("no/such-model")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 64
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"6 weights do not fit.*gate_proj.weight \(48, 32\) is \(64, 32\) here"):
        from_pretrained(str(other))
    with pytest.raises(ValueError, match="image_size=336, but this model has positions for 28"):
        from_pretrained(str(folder)).num_visual_tokens(336)
