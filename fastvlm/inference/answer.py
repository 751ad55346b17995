"""One answer while it is being written: its tokens, its text, and whether it has ended."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from fastvlm.tokens import Tokenizer

UNFINISHED_CHARACTER = "\ufffd"  # what a tokenizer makes of a character whose last bytes are still to come


class Answer:
    """Collects tokens until the model ends, a stop string appears or the length is reached.

    Args:
        stop_ids: tokens that end the answer and are no part of it.
        stop: strings that end it; the text ends before the first of them.
        max_new_tokens: bound of its length in tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop_ids: frozenset[int], stop: Sequence[str], max_new_tokens: int):
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.stop = tuple(s for s in stop if s)
        self.max_new_tokens = max_new_tokens
        self.token_ids: list[int] = []
        self.fed: list[int] = []  # every token the model chose, the one that ended the answer included
        self.finish_reason = "" if max_new_tokens > 0 else "length"

    def add(self, token: int) -> None:
        """Take the next token; without effect on an answer that has ended."""
        if self.finish_reason:
            return
        self.fed.append(token)
        if token in self.stop_ids:
            self.finish_reason = "end"
            return
        self.token_ids.append(token)
        if self.stop and self._stop_position(text := self._decoded()) < len(text):
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.max_new_tokens:
            self.finish_reason = "length"

    @property
    def last_token(self) -> int:
        """What the model reads next."""
        return self.fed[-1]

    def text(self) -> str:
        """The text so far, up to a stop string, without outer space."""
        text = self._decoded()
        return text[: self._stop_position(text)].strip()

    def raw_text(self) -> str:
        """The text up to a stop string as it goes on from the prompt, its outer space kept."""
        text = self.tokenizer.decode_further(mend_bytes(self.token_ids, self.tokenizer))
        return text[: self._stop_position(text)]

    def settled_text(self) -> str:
        """The part of `text()` that no further token can change: what may be shown already."""
        text = self._decoded()
        if (end := self._stop_position(text)) < len(text):
            return text[:end].strip()  # nothing comes after a stop string
        text = text.rstrip(UNFINISHED_CHARACTER)
        # The end could be the beginning of a stop string ...
        held = max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        # ... and space at the end is cut unless words follow.
        return text[: len(text) - held].strip()

    def _decoded(self) -> str:
        # Not Tokenizer.decode: it strips, and a stop string may well be a line break.
        ids = mend_bytes(self.token_ids, self.tokenizer)
        return self.tokenizer.hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _stop_position(self, text: str) -> int:
        """Where the first stop string begins; the text's length without one."""
        return min((at for s in self.stop if (at := text.find(s)) >= 0), default=len(text))


def mend_bytes(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Ids whose bytes are UTF-8: what is none stands for `UNFINISHED_CHARACTER`.

    Where bytes are tokens of their own (`<0xE5>`, in SentencePiece's vocabularies), decoders give up all neighbours of
    a byte that does not fit, characters among them that have long been shown.
    """
    byte_of = byte_tokens(tokenizer.hf)
    if not byte_of:
        return list(ids)
    id_of = {byte: token for token, byte in byte_of.items()}
    mended: list[int] = []
    for is_byte, run in groupby(ids, key=byte_of.__contains__):
        if is_byte:
            text = bytes(byte_of[token] for token in run).decode(errors="replace")
            mended += [id_of[byte] for byte in text.encode()]
        else:
            mended += run
    return mended


@lru_cache(maxsize=8)
def byte_tokens(hf: PreTrainedTokenizerBase) -> dict[int, int]:
    """The bytes that are tokens of their own, by id; none where not all are."""
    found = hf.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
    return dict(zip(found, range(256))) if len({None, *found}) > 256 else {}
