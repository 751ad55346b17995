"""One answer during generation: its tokens, its text, and whether it has ended."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from fastvlm.tokens import Tokenizer

UNFINISHED_CHARACTER = "\ufffd"  # tokenizers decode a character whose last bytes are missing to this


class Answer:
    """Collects tokens until an end token, a stop string or the length limit.

    Args:
        stop_ids: tokens that end the answer and are not part of it.
        stop: strings that end it; the text is cut before the first of them.
        max_new_tokens: limit on its length in tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop_ids: frozenset[int], stop: Sequence[str], max_new_tokens: int):
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.stop = tuple(s for s in stop if s)
        self.max_new_tokens = max_new_tokens
        self.token_ids: list[int] = []
        self.fed: list[int] = []  # every generated token, including the one that ended the answer
        self.finish_reason = "" if max_new_tokens > 0 else "length"

    def add(self, token: int) -> None:
        """Append a token; does nothing if the answer has ended."""
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
        """The model's next input."""
        return self.fed[-1]

    def text(self) -> str:
        """Return the text so far, up to a stop string, stripped."""
        text = self._decoded()
        return text[: self._stop_position(text)].strip()

    def raw_text(self) -> str:
        """Return the text up to a stop string as it continues the prompt, with its whitespace."""
        text = self.tokenizer.decode_further(mend_bytes(self.token_ids, self.tokenizer))
        return text[: self._stop_position(text)]

    def settled_text(self) -> str:
        """Return the part of `text()` that no further token can change, and that can be streamed already."""
        text = self._decoded()
        if (end := self._stop_position(text)) < len(text):
            return text[:end].strip()  # nothing comes after a stop string
        text = text.rstrip(UNFINISHED_CHARACTER)
        # The end could be the start of a stop string ...
        held = max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        # ... and trailing whitespace is kept only if more text follows.
        return text[: len(text) - held].strip()

    def _decoded(self) -> str:
        # Not Tokenizer.decode: it strips whitespace, and a stop string may be a line break.
        ids = mend_bytes(self.token_ids, self.tokenizer)
        return self.tokenizer.hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _stop_position(self, text: str) -> int:
        """Index of the first stop string in the text; the text's length if there is none."""
        return min((at for s in self.stop if (at := text.find(s)) >= 0), default=len(text))


def mend_bytes(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Return ids whose byte tokens form valid UTF-8, invalid bytes replaced by those of `UNFINISHED_CHARACTER`.

    SentencePiece vocabularies have a token per byte (`<0xE5>`). Their decoders replace a whole run of byte tokens if
    one of them is invalid, including characters that have been streamed already.
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
    """Return token id -> byte for vocabularies that have a token for every byte; else an empty dict."""
    found = hf.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
    return dict(zip(found, range(256))) if len({None, *found}) > 256 else {}
