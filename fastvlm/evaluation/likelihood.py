"""Likelihood of given text under a model: answers after their questions, and documents."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from fastvlm.data.conversation import encode_record
from fastvlm.models.splice import splice
from fastvlm.models.vlm import VLM
from fastvlm.tokens import IGNORE_INDEX, Tokenizer

LOGITS = 1 << 28  # computed at once, 1 GiB; those of a batch of long pages would take tens


def token_nll(
    model: VLM,
    tokenizer: Tokenizer,
    rows: Sequence[tuple[list[int], list[int]]],
    visual: Sequence[Sequence[Float[Tensor, "_ D"]]],
    *,
    tokens_per_view: int = 1,
    batch_size: int = 64,
) -> list[Float[Tensor, "_"]]:
    """Return the NLL (nats, float64, on the CPU) of every learned token of every row; see `token_scores`."""
    scores = token_scores(model, tokenizer, rows, visual, tokens_per_view=tokens_per_view, batch_size=batch_size)
    return [nll for nll, _ in scores]


@torch.inference_mode()
def token_scores(
    model: VLM,
    tokenizer: Tokenizer,
    rows: Sequence[tuple[list[int], list[int]]],
    visual: Sequence[Sequence[Float[Tensor, "_ D"]]],
    *,
    tokens_per_view: int = 1,
    batch_size: int = 64,
) -> list[tuple[Float[Tensor, "_"], Bool[Tensor, "_"]]]:
    """Return, for every learned token of every row, its NLL and whether it is the argmax that greedy decoding takes.

    NLLs are in nats, float64, on the CPU.

    Args:
        rows: (input_ids, labels) of one sample each, as from `encode_record`; the first token has no context and is
            never scored.
        visual: visual tokens of each image of a row, its views concatenated, on any device.
        tokens_per_view: M; every image has a whole number of views.

    Raises:
        ValueError: `rows` and `visual` differ in number, or a row is too long for the model.
    """
    if len(rows) != len(visual):
        raise ValueError(f"{len(rows)} rows came with visual tokens for {len(visual)}")
    longest = max((len(ids) for ids, _ in rows), default=0)
    # The last token of a row is predicted, but not an input.
    if longest > model.llm.max_positions + 1:
        raise ValueError(f"a row has {longest} tokens, but the model ends at {model.llm.max_positions}")
    device = next(model.parameters()).device
    nothing = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.bool)
    scores: list[tuple[Tensor, Tensor]] = [nothing] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda row: len(rows[row][0]))
    at_once = max(1, LOGITS // model.llm.vocab_size)
    for start in range(0, len(rows), batch_size):
        chosen = by_length[start : start + batch_size]
        length = len(rows[chosen[-1]][0])
        input_ids = torch.full((len(chosen), length), tokenizer.pad_id)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        segment_ids = torch.zeros_like(input_ids)
        for i, row in enumerate(chosen):
            ids, learned = rows[row]
            input_ids[i, : len(ids)] = torch.tensor(ids)
            labels[i, : len(ids)] = torch.tensor(learned)
            segment_ids[i, : len(ids)] = 1
        input_ids, segment_ids = input_ids.to(device), segment_ids.to(device)
        if length > model.llm.max_positions:
            length -= 1
            input_ids, segment_ids = input_ids[:, :length], segment_ids[:, :length]
        embeds = model.llm.embed(input_ids)  # (B, S, D)
        if images := [image for row in chosen for image in visual[row]]:
            views = rearrange(torch.cat(images).to(device), "(i m) d -> i m d", m=tokens_per_view)
            embeds = splice(embeds, input_ids, views, image_token_id=tokenizer.image_id)
        position_ids = torch.arange(length, device=device).expand_as(input_ids)
        hidden = model.read(embeds, input_ids, labels[:, :length].to(device), position_ids, segment_ids)
        # Only where the next token is learned: in a small model the head is the largest matrix product.
        at, before = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
        targets = labels[at, before + 1].to(device)
        last = hidden[at.to(device), before.to(device)]
        pieces = []
        for some, wanted in zip(last.split(at_once), targets.split(at_once)):
            logits = model.llm.head(some).float()
            nll = logits.logsumexp(dim=-1) - logits.gather(-1, wanted[:, None])[:, 0]
            pieces.append((nll.double().cpu(), (logits.argmax(dim=-1) == wanted).cpu()))
        nll, best = (torch.cat(column) for column in zip(*pieces))
        for i, row in enumerate(chosen):
            scores[row] = nll[at == i], best[at == i]
    return scores


def answer_nll(
    model: VLM,
    tokenizer: Tokenizer,
    records: Sequence[dict],
    visual: Sequence[Sequence[Float[Tensor, "_ D"]]],
    *,
    tokens_per_view: int,
    batch_size: int = 64,
) -> list[tuple[float, int]]:
    """Return (nats, tokens) of each record's learned tokens, given their context: answers with their end token."""
    slots = [[len(image) for image in images] for images in visual]
    encoded = [encode_record(record, tokenizer, tokens_per_image=s) for record, s in zip(records, slots, strict=True)]
    rows = [(e.input_ids, e.labels) for e in encoded]
    scores = token_nll(model, tokenizer, rows, visual, tokens_per_view=tokens_per_view, batch_size=batch_size)
    return [(float(score.sum()), len(score)) for score in scores]


def text_windows(ids: list[int], *, window: int) -> list[tuple[list[int], list[int]]]:
    """Split a document into rows (input_ids, labels) that score each token but the first exactly once.

    Row k holds tokens k * window ... (k + 1) * window and scores all but its first, which row k - 1 scores.
    """
    rows = []
    for start in range(0, len(ids) - 1, window):
        piece = ids[start : start + window + 1]
        rows.append((piece, [IGNORE_INDEX, *piece[1:]]))
    return rows


def text_perplexity(
    model: VLM, tokenizer: Tokenizer, texts: Sequence[str], *, window: int = 256, batch_size: int = 16
) -> dict[str, float]:
    """Compute the perplexity of documents in fixed, non-overlapping windows; a token sees at most `window` before it.

    Returns:
        perplexity: exp of the mean NLL per token, over all documents; includes their end tokens, but not their first
            tokens, which have no context.
        bits_per_byte: total NLL in bits per UTF-8 byte of the scored tokens; comparable between tokenizers.
        num_tokens: number of scored tokens.

    Raises:
        ValueError: `window` is not positive, or there is no token to score.
    """
    if window < 1:
        raise ValueError(f"window={window} must be at least 1 token")
    rows, num_bytes = [], 0
    for text in texts:
        parts = [{"type": "text", "text": text}]
        ids = encode_record({"document": parts}, tokenizer, tokens_per_image=0).input_ids
        rows += text_windows(ids, window=window)
        unscored = tokenizer.hf.decode(ids[:1], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        num_bytes += len(text.encode()) - len(unscored.encode())
    scores = token_nll(model, tokenizer, rows, [[]] * len(rows), batch_size=batch_size)
    nats, num_tokens = sum(float(score.sum()) for score in scores), sum(map(len, scores))
    if not num_tokens:
        raise ValueError(f"{len(texts)} texts hold no token to score")
    return {
        "perplexity": math.exp(nats / num_tokens),
        "bits_per_byte": nats / math.log(2) / num_bytes if num_bytes > 0 else math.nan,
        "num_tokens": num_tokens,
    }
