"""Batched decoding: each step adds one token to every row; rows join and leave between steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastvlm.inference.answer import Answer
from fastvlm.inference.kv_cache import KVCache
from fastvlm.inference.memory import PrefixStore
from fastvlm.inference.sampling import Sampling, choose_tokens

# Removing rows copies the cache of those that stay, so it waits until this share of the rows has ended.
LEAVE_AT = 0.25


@dataclass(eq=False)
class Row:
    """One prompt and its answer.

    Args:
        embeds: input of the language model, visual tokens included.
        positions: position ids of `embeds`, with several axes for M-RoPE; the answer continues from the last.
        names: identifies the content of each position (`position_names`); None bypasses the prefix store.
        reused: positions whose keys were found in the prefix store (set by `Rows.add`).
        error: why no further token could be drawn (set by `Rows`); this answer has ended, other rows continue.
    """

    embeds: Float[Tensor, "S D"]
    positions: Int[Tensor, "S *axes"]
    names: np.ndarray | None
    answer: Answer
    sampling: Sampling
    generator: torch.Generator
    num_prompt_tokens: int = 0
    num_image_tokens: int = 0
    image_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    reused: int = 0
    error: Exception | None = None
    begun: float = field(default=0.0, repr=False)

    @property
    def length(self) -> int:
        return len(self.embeds)


class Rows:
    """The batch being decoded.

    Args:
        embed: ids (B, 1) -> embeddings (B, 1, D).
        decode: see `FastDecoder.decode`.
        logits: last hidden states (B, D) -> logits (B, V).
        prefixes: store to reuse keys and values from, and to keep those of finished rows in.
        now: returns seconds, after waiting for the device.
        strict: end an answer with an error if its logits are not finite at temperature 0, too. Otherwise the answers of
            a diverged model are what argmax makes of them, so that it can be evaluated.
    """

    def __init__(
        self,
        *,
        embed: Callable[[Tensor], Tensor],
        decode: Callable,
        logits: Callable[[Tensor], Tensor],
        prefixes: PrefixStore,
        device: torch.device,
        now: Callable[[], float] = time.perf_counter,
        strict: bool = False,
    ):
        self.embed, self.decode, self.logits, self.prefixes = embed, decode, logits, prefixes
        self.device, self.now, self.strict = device, now, strict
        self.rows: list[Row] = []
        self.cache: KVCache | None = None
        self._columns: list[int] = []  # of each row, how many of the last cache columns are visible

    def __len__(self) -> int:
        return sum(not row.answer.finish_reason for row in self.rows)

    @torch.inference_mode()
    def add(self, rows: Sequence[Row]) -> None:
        """Prefill the prompts and choose the first token of each answer; rows limited to 0 tokens are skipped."""
        start = self.now()
        for row in rows:
            row.begun = start
        rows = [row for row in rows if not row.answer.finish_reason]
        if not rows:
            return
        # A prompt with a stored prefix is prefilled alone, after the prefix; the others form one batch.
        known = [(row, found) for row in rows if (found := self._find(row)) is not None]
        fresh = [row for row in rows if row.reused == 0]
        groups = [([row], found.layers) for row, found in known] + ([(fresh, ())] if fresh else [])
        for group, layers in groups:
            cache = KVCache(layers)
            hidden = self._prefill(group, cache)
            self._choose(group, hidden)
            self._join(group, cache)
        end = self.now()
        for row in rows:
            row.prefill_seconds = end - start
        self._settle()

    @torch.inference_mode()
    def step(self) -> None:
        """Add one token to every unfinished answer."""
        if not len(self):
            return
        tokens = torch.tensor([[row.answer.last_token] for row in self.rows], device=self.device)
        columns = [count + 1 for count in self._columns]
        longest = self.cache.get_seq_length() + 1
        mask = self._visible(columns, longest)
        positions = torch.stack([row.positions[-1:] + len(row.answer.fed) for row in self.rows])
        hidden, _ = self.decode(self.embed(tokens), positions, mask, self.cache)
        self._columns = columns
        self._choose(self.rows, hidden)
        self._settle()

    def drop(self, row: Row) -> None:
        """Cancel a row."""
        row.answer.finish_reason = row.answer.finish_reason or "cancelled"
        if row in self.rows:
            self._settle()

    # -------------------------------------------------------------------------------------------------------- inside

    def _find(self, row: Row):
        found = self.prefixes.find(row.names) if row.names is not None and len(self.prefixes) else None
        row.reused = 0 if found is None else found.length
        return found

    def _prefill(self, rows: Sequence[Row], cache: KVCache) -> Float[Tensor, "B 1 D"]:
        cached = cache.get_seq_length()
        longest = max(row.length for row in rows) - cached
        padded = [
            torch.nn.functional.pad(row.embeds[cached:], (0, 0, longest - row.length + cached, 0)) for row in rows
        ]
        mask = self._visible([row.length for row in rows], cached + longest)
        starts = [row.positions[cached:] for row in rows]
        positions = torch.stack([torch.cat([p[:1].expand(longest - len(p), *p.shape[1:]), p]) for p in starts])
        return self.decode(torch.stack(padded), positions, mask, cache)[0]

    def _visible(self, columns: Sequence[int], longest: int) -> Tensor | None:
        """Mask (B, longest) with 1 at the last `columns[i]` columns of row i; None if everything is visible."""
        if all(count == longest for count in columns):
            return None
        hidden = longest - torch.tensor(columns, device=self.device)[:, None]
        return (torch.arange(longest, device=self.device) >= hidden).long()

    def _choose(self, rows: Sequence[Row], hidden: Tensor) -> None:
        logits = self.logits(hidden[:, -1])
        chosen: list[int | None] = []
        if len({row.sampling for row in rows}) == 1:
            with suppress(FloatingPointError):  # one row failed before any draw; redo row by row below
                chosen = self._draw(rows, logits).tolist()
        chosen = chosen or [self._draw_alone(row, logits[i : i + 1]) for i, row in enumerate(rows)]
        for row, token in zip(rows, chosen):
            if token is not None:
                row.answer.add(token)

    def _draw_alone(self, row: Row, logits: Tensor) -> int | None:
        """Return a row's next token; if none can be drawn, mark the row as failed and return None."""
        try:
            return self._draw([row], logits).item()
        except FloatingPointError as error:
            if not row.answer.finish_reason:
                row.error, row.answer.finish_reason = error, "failed"
            return None

    def _draw(self, rows: Sequence[Row], logits: Tensor) -> Tensor:
        options = rows[0].sampling
        if self.strict and not logits.amax(dim=-1).isfinite().all():
            raise FloatingPointError("the model's logits are not finite: no token can be drawn")
        return choose_tokens(
            logits,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            generators=[row.generator for row in rows],
        )

    def _join(self, rows: Sequence[Row], cache: KVCache) -> None:
        self.rows = [*self.rows, *rows]
        self._columns += [row.length for row in rows]
        if self.cache is None:
            self.cache = cache
        else:
            self.cache.join(cache)

    def _settle(self) -> None:
        """Store the keys and values of rows that have ended, and remove them once they are numerous enough."""
        end = self.now()
        for row in self.rows:
            if row.answer.finish_reason and not row.decode_seconds:
                row.decode_seconds = max(end - row.begun - row.prefill_seconds, 1e-9)
                self._keep(row)
        failed = any(row.error is not None for row in self.rows)  # has no last token for the next step: remove at once
        live = [i for i, row in enumerate(self.rows) if not row.answer.finish_reason]
        if not live:
            self.rows, self._columns, self.cache = [], [], None
        elif failed or len(self.rows) - len(live) >= max(1, LEAVE_AT * len(self.rows)):
            columns = [self._columns[i] for i in live]
            self.cache.select(live, skip=self.cache.get_seq_length() - max(columns))
            self.rows, self._columns = [self.rows[i] for i in live], columns

    def _keep(self, row: Row) -> None:
        if row.names is None or not self.prefixes.max_bytes or row.error is not None:
            return
        index = self.rows.index(row)
        length = self._columns[index]
        names = np.concatenate([row.names, np.array(row.answer.fed, dtype=np.int64)])[:length]
        self.prefixes.keep(names, self.cache.kept(index, columns=length))
