"""Where the answer looked: attention on visual tokens, and the image regions those tokens stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fastvlm.data.conversation import encode_record
from fastvlm.data.shards import count_images
from fastvlm.inference.engine import Engine


@dataclass
class View:
    """Of one image's global view, whose patches lie in a grid of `rows` x `columns`."""

    rows: int
    columns: int
    answer: Float[Tensor, "N"]  # share of the answer's attention on each patch; sums to 1
    tokens: Float[Tensor, "M N"]  # influence of each patch on each visual token; rows sum to 1


def attend(engine: Engine, record: dict, images: Sequence[UInt8[Tensor, "*v 3 H W"]]) -> list[View]:
    """Reads a conversation that ends with an answer and says where that answer's tokens attended.

    Attention is the mean over layers and heads (from the position that predicts each answer token), read on the visual
    tokens of the image. A visual token is spread over the patches by the size of its gradient with respect to each of
    them, which holds for every resampler.

    Raises:
        ValueError: the last turn is not the assistant's, or the language model gives no attention weights.
    """
    if not record.get("messages") or record["messages"][-1]["role"] != "assistant":
        raise ValueError("the conversation must end with the assistant's answer, whose attention is asked for")
    model, tokenizer = engine.model, engine.tokenizer
    patches, visual = [], []
    with torch.inference_mode():
        for image in images:
            views = image if image.ndim == 4 else image[None]
            patches.append(model.encode_patches(views.to(engine.device)))
            visual.append(model.project(patches[-1]).flatten(0, 1))
    slots = [len(tokens) for tokens in visual]
    row = engine.row(record, visual, max_new_tokens=0)  # with the checks of a question
    asked = {"messages": record["messages"][:-1]}
    before = encode_record(asked, tokenizer, tokens_per_image=slots[: count_images(asked)], prompt=True)
    ids = torch.tensor(encode_record(record, tokenizer, tokens_per_image=slots).input_ids)
    is_slot = ids == tokenizer.image_id
    if model.drops_tokens:
        raise ValueError("a resampler that drops tokens has no fixed place for each: no view of its attention")
    embeds = row.embeds[None, : len(ids)]
    weights = read_attention(model.llm.hf, embeds)  # (S, S)
    predicting = torch.arange(len(before.input_ids) - 1, len(ids) - 1)  # positions that predict the answer
    on_slots = weights[predicting].mean(dim=0)[is_slot].split(slots)
    grid = model.encoder.grid(engine.image_size)
    views = []
    for given, looked in zip(patches, on_slots):
        influence = token_influence(model, given[:1])
        share = looked[: len(influence)] @ influence
        views.append(View(*grid, answer=share / share.sum().clamp_min(1e-12), tokens=influence))
    return views


@torch.inference_mode()
def read_attention(hf, embeds: Float[Tensor, "1 S D"]) -> Float[Tensor, "S S"]:
    """Attention of every position on every other, mean over layers and heads."""
    before = hf.config._attn_implementation
    hf.config._attn_implementation = "eager"  # fused kernels keep their weights to themselves
    try:
        out = hf.get_decoder()(inputs_embeds=embeds, output_attentions=True, use_cache=False)
    finally:
        hf.config._attn_implementation = before
    given = [layer for layer in out.attentions or () if layer is not None]
    if not given:
        raise ValueError(f"{type(hf).__name__} gives no attention weights")
    return torch.stack([layer[0].float().mean(dim=0) for layer in given]).mean(dim=0).cpu()


def token_influence(model, patches: Float[Tensor, "1 N D"]) -> Float[Tensor, "M N"]:
    """How much each visual token changes with each patch: norms of the resampler's gradient, rows summing to 1."""
    with torch.enable_grad():
        given = patches.detach().clone().requires_grad_()  # leaves inference mode
        tokens = model.resampler(given)[0]
        direction = torch.ones_like(tokens[0])
        rows = []
        for token in tokens:
            (gradient,) = torch.autograd.grad(token, given, direction, retain_graph=True, allow_unused=True)
            rows.append(torch.zeros(given.shape[1]) if gradient is None else gradient[0].float().norm(dim=-1).cpu())
    influence = torch.stack(rows)
    return influence / influence.sum(dim=-1, keepdim=True).clamp_min(1e-12)
