"""A finished answer with its token counts and timings."""

from __future__ import annotations

from dataclasses import dataclass

from fastvlm.inference.rows import Row


@dataclass
class Generation:
    """One answer, its token counts and its seconds by the engine's clock; images and prefill are timed per call."""

    text: str  # stripped of whitespace
    raw_text: str  # unstripped, e.g. for code, where the first line's indentation matters
    token_ids: list[int]  # without the token that ended it
    num_prompt_tokens: int  # all positions of the prompt, image slots included
    num_image_tokens: int
    num_reused_tokens: int  # positions of the prompt taken from the prefix store
    image_seconds: float  # encoder, resampler and projector
    prefill_seconds: float  # the prompt, up to the first token of the answer
    decode_seconds: float  # all further tokens
    finish_reason: str  # "end": the model ended it; "stop": a stop string; "length": max_new_tokens

    @property
    def first_token_seconds(self) -> float:
        """Time to first token in seconds: images and prefill, without reading image files."""
        return self.image_seconds + self.prefill_seconds

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed of this row without its first token, which is part of prefill; 0 if there are no others."""
        further = len(self.token_ids) - (self.finish_reason != "end")
        return further / self.decode_seconds if further > 0 and self.decode_seconds > 0 else 0.0


def finished(row: Row) -> Generation:
    """Return the result of a row.

    Raises:
        FloatingPointError: a token could not be drawn.
    """
    if row.error is not None:
        raise row.error
    return Generation(
        text=row.answer.text(),
        raw_text=row.answer.raw_text(),
        token_ids=row.answer.token_ids,
        num_prompt_tokens=row.num_prompt_tokens,
        num_image_tokens=row.num_image_tokens,
        num_reused_tokens=row.reused,
        image_seconds=row.image_seconds,
        prefill_seconds=row.prefill_seconds,
        decode_seconds=row.decode_seconds,
        finish_reason=row.answer.finish_reason,
    )
