"""An answer and what it cost."""

from __future__ import annotations

from dataclasses import dataclass

from fastvlm.inference.rows import Row


@dataclass
class Generation:
    """One answer and what it cost. Seconds are the engine's clock's; of images and prompt they are the whole call's."""

    text: str  # without outer space
    raw_text: str  # as it goes on from the prompt: for code, where the first line's indent counts
    token_ids: list[int]  # without the token that ended it
    num_prompt_tokens: int  # all positions of the prompt, image slots included
    num_image_tokens: int
    num_reused_tokens: int  # positions of the prompt that an earlier question had computed
    image_seconds: float  # encoder, resampler and projector
    prefill_seconds: float  # the prompt, up to the first token of the answer
    decode_seconds: float  # every further token
    finish_reason: str  # "end": the model ended it; "stop": a stop string; "length": max_new_tokens

    @property
    def first_token_seconds(self) -> float:
        """Images and prompt; reading files comes before."""
        return self.image_seconds + self.prefill_seconds

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed of this row, its first token (which prefill pays for) not counted; 0 with nothing to time."""
        further = len(self.token_ids) - (self.finish_reason != "end")
        return further / self.decode_seconds if further > 0 and self.decode_seconds > 0 else 0.0


def finished(row: Row) -> Generation:
    """What became of a row.

    Raises:
        FloatingPointError: none of its tokens could be drawn, or not all.
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
