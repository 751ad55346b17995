"""Attention of an answer on visual tokens, and the image regions those tokens represent.

The prompt is prefilled as for generation (reusing stored prefixes), and attention weights are computed only for the
positions that predict the answer, a few at a time. So memory is that of generation plus a bounded number of weights,
however long the prompt is; all weights of 7,300 positions would take 70 GB in a 0.5B model.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from fastvlm.data.conversation import encode_record
from fastvlm.inference.engine import Engine
from fastvlm.inference.kv_cache import KVCache
from fastvlm.inference.memory import image_key
from fastvlm.inference.rows import Row
from fastvlm.models.llms.language_model import LanguageModel

MAX_WEIGHTS = 1 << 24  # attention weights over all layers and heads held at once: 64 MiB in float32
TOKENS_A_PIECE = 32  # visual tokens per piece of work in `token_influence`


@dataclass
class View:
    """Attention on one image's global view, whose patches form a grid of `rows` x `columns`, in row-major order."""

    rows: int
    columns: int
    answer: Float[Tensor, "N"]  # share of the answer's attention on each patch; sums to 1
    tokens: Float[Tensor, "M N"]  # influence of each patch on each non-empty visual token; rows sum to 1


def attend(
    engine: Engine, record: dict, images: Sequence[UInt8[Tensor, "... 3 H W"]], *, max_weights: int = MAX_WEIGHTS
) -> Generator[None, None, list[View]]:
    """Compute where the answer at the end of a conversation attends in its images.

    The generator yields between pieces of work, each no longer than a prefill, and returns one `View` per image.
    Attention is the mean over layers and heads, from the positions that predict the answer's tokens to the visual
    tokens of each image's global view; attention on tiles is left out. A visual token's share is distributed over the
    patches by the norm of its gradient with respect to each of them, which works for any resampler.

    Args:
        max_weights: attention weights held at once; those of a single position are never split.

    Raises:
        ValueError: the last turn is not the assistant's, the conversation is too long, or the model has no attention
            weights or no fixed grid of patches.
    """
    if not record.get("messages") or record["messages"][-1]["role"] != "assistant":
        raise ValueError("the conversation must end with the assistant's answer, whose attention is asked for")
    model = engine.model
    if getattr(model.encoder, "drops_tokens", False):
        raise ValueError("an encoder that drops patches has no fixed place for each: no view of its attention")
    visual = engine.encode_images(images)
    yield
    asked = {"messages": record["messages"][:-1]}
    answer = answer_ids(engine, record, asked, slots=[len(tokens) for tokens in visual])
    row = engine.row(asked, visual, keys=[image_key(image) for image in images], max_new_tokens=len(answer))
    cache = read_prompt(engine, row)
    yield
    looked = torch.zeros(row.length)
    config = model.llm.hf.config
    per_position = config.num_hidden_layers * config.num_attention_heads * (row.length + len(answer))
    for queries in torch.arange(len(answer)).split(max(1, max_weights // per_position)):
        looked += read_attention(engine, row, answer, queries, cache)
        yield
    views = []
    for image, on_slots in zip(images, attention_on_slots(engine, asked, visual, row, looked)):
        influence = yield from token_influence(engine, image)
        per_token = torch.zeros(len(influence) + 1)
        per_token.index_add_(0, global_tokens(engine, image, dim=visual[0].shape[-1]), on_slots)
        share = per_token[1:] @ influence
        read = influence.sum(dim=-1) > 0  # a resampler that drops tokens leaves empty slots
        grid = model.encoder.grid(engine.image_size)
        views.append(View(*grid, answer=share / share.sum().clamp_min(1e-12), tokens=influence[read]))
    return views


def answer_ids(engine: Engine, record: dict, asked: dict, *, slots: Sequence[int]) -> list[int]:
    """Return the ids of the answer and its end token, as they follow the prompt."""
    tokenizer = engine.tokenizer
    prompt = engine.encode_prompt(asked, slots=slots, max_new_tokens=0)
    whole = encode_record(record, tokenizer, tokens_per_image=slots).input_ids
    behind = len(tokenizer.encode_template(tokenizer.template.after["assistant"]))
    return whole[len(prompt) : len(whole) - behind]


def read_prompt(engine: Engine, row: Row) -> KVCache:
    """Return keys and values of a prompt without its last position, which is the first to predict the answer.

    The last position is computed too and then removed: with bidirectional attention, the others attend to it.
    """
    found = engine.prefixes.find(row.names) if row.names is not None and len(engine.prefixes) else None
    cache = KVCache(() if found is None else found.layers)
    known = cache.get_seq_length()
    with torch.inference_mode():
        engine._decode(row.embeds[None, known:], row.positions[None, known:], None, cache)
    for layer in cache.layers:
        layer.hold(layer.keys[:, :, :-1], layer.values[:, :, :-1])
    return cache


@torch.inference_mode()
def read_attention(
    engine: Engine, row: Row, answer: Sequence[int], queries: Int[Tensor, "Q"], cache: KVCache
) -> Float[Tensor, "S"]:
    """Return the attention on each prompt position: the mean over layers and heads, summed over the given queries.

    Args:
        queries: indices of the answer's tokens whose predicting positions attend; earlier ones are in the cache.
    """
    llm = engine.model.llm
    # The prompt's last position predicts the first token, each token the next.
    fed = torch.cat([row.embeds[-1:], llm.embed(torch.tensor(answer[:-1], dtype=torch.long, device=engine.device))])
    embeds = fed[queries][None]
    steps = queries.to(engine.device)
    positions = (row.positions[-1:] + steps.view(-1, *[1] * (row.positions.ndim - 1)))[None]
    mask = torch.ones(1, cache.get_seq_length() + len(queries), dtype=torch.long, device=engine.device)
    with listening(llm) as heard:
        llm.decode(embeds, positions, mask, cache)
    given = [layer for layer in heard if layer is not None]
    if not given:
        raise ValueError(f"{type(llm.hf).__name__} gives no attention weights")
    total = sum(layer[0, :, :, : row.length].float().mean(dim=0).sum(dim=0) for layer in given)
    return (total / len(given)).cpu()


@contextmanager
def listening(llm: LanguageModel) -> Iterator[list[Tensor | None]]:
    """Yield a list to which a call of the model appends the attention weights of all layers, (1, heads, Q, K) each."""
    heard: list[Tensor | None] = []
    decoder, before = llm.hf.get_decoder(), llm.attention
    ask = decoder.register_forward_pre_hook(
        lambda _, args, options: (args, options | {"output_attentions": True}), with_kwargs=True
    )
    listen = decoder.register_forward_hook(lambda _, args, out: heard.extend(out.attentions or ()))
    llm.attention = "eager"  # fused kernels do not return weights
    try:
        yield heard
    finally:
        llm.attention = before
        ask.remove()
        listen.remove()


def attention_on_slots(
    engine: Engine, asked: dict, visual: Sequence[Float[Tensor, "_ D"]], row: Row, looked: Float[Tensor, "S"]
) -> list[Float[Tensor, "_"]]:
    """Return the attention on each slot of each image, from that on a row's positions; 0 for dropped slots."""
    slots = [len(tokens) for tokens in visual]
    ids = torch.tensor(engine.encode_prompt(asked, slots=slots, max_new_tokens=0))
    is_slot, held = ids == engine.tokenizer.image_id, torch.ones(len(ids), dtype=torch.bool)
    if engine.model.drops_tokens:
        held[is_slot] = (torch.cat(list(visual)) != 0).any(dim=-1).cpu()
    assert int(held.sum()) == row.length, (int(held.sum()), row.length)
    on_ids = torch.zeros(len(ids))
    on_ids[held] = looked
    return list(on_ids[is_slot].split(slots))


def global_tokens(engine: Engine, image: UInt8[Tensor, "... 3 H W"], *, dim: int) -> Int[Tensor, "T"]:
    """Return, for each slot of an image, 1 + the index of the global view's visual token in it, or 0.

    A pretrained model's `arrange` reorders tokens and inserts others, so numbered marks are sent through it.
    """
    model, views = engine.model, len(image) if image.ndim == 4 else 1
    count = model.resampler.num_tokens_out(model.encoder.num_patches(engine.image_size))
    layouts = torch.tensor([getattr(image, "view_layout", (1, 1, engine.image_size, engine.image_size))])
    blank = torch.zeros(views, count, dim, device=engine.device)
    marks = blank.clone()
    marks[0] = torch.arange(1, count + 1, device=engine.device)[:, None]
    with torch.inference_mode():
        moved = model.arrange(marks, layouts) - model.arrange(blank, layouts)
    return moved.flatten(0, 1)[:, 0].round().long().cpu()


def token_influence(engine: Engine, image: UInt8[Tensor, "... 3 H W"]) -> Generator[None, None, Float[Tensor, "M N"]]:
    """Compute the influence of each patch on each visual token of the global view: norms of the resampler's gradient.

    Rows sum to 1, or to 0 for a token that depends on no patch.
    """
    model = engine.model
    with torch.inference_mode():
        patches = model.encode_patches((image if image.ndim == 4 else image[None])[:1].to(engine.device))
    yield
    with torch.enable_grad():
        given = patches.clone().requires_grad_()  # leaves inference mode
        tokens = model.resampler(given)[0]
    direction, norms = torch.ones_like(tokens[0]), []
    for number, token in enumerate(range(len(tokens)), start=1):
        if number % TOKENS_A_PIECE == 0:
            yield
        chosen = torch.zeros_like(tokens)
        chosen[token] = direction
        (gradient,) = torch.autograd.grad(tokens, given, chosen, retain_graph=True, allow_unused=True)
        norms.append(torch.zeros(given.shape[1]) if gradient is None else gradient[0].float().norm(dim=-1).cpu())
    height, width = model.encoder.grid(engine.image_size)
    in_order = getattr(model.encoder, "in_order", lambda patches: patches)
    by_patch = in_order(rearrange(torch.stack(norms), "m n -> 1 n m"))
    influence = rearrange(by_patch[:, -height * width :], "1 n m -> m n")  # without a leading class token
    return influence / influence.sum(dim=-1, keepdim=True).clamp_min(1e-12)
