"""Refuse texts that are too long without tokenizing them, from the most characters a token can represent."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

COMPOSING = ("NFC", "NFKC")
KEEPING = ("ByteLevel", "Digits", "Metaspace", "NFD", "NFKD", "Prepend", "UnicodeScripts", *COMPOSING)


class TextBound:
    """An upper bound on the characters that a number of tokens can represent.

    With a vocabulary that contains every byte, the tokens cover all of a text, and none represents more characters than
    its own string has. Other tokenizers may drop characters or merge any number into one token: they have no bound, and
    no text is refused.
    """

    def __init__(self, tokenizer: Tokenizer):
        described = json.loads(tokenizer.to_str())
        steps = [*listed(described["normalizer"]), *listed(described["pre_tokenizer"])]
        self.longest = longest_token(described, steps)
        self.forms = [step["type"] for step in steps if step["type"] in COMPOSING]

    def exceeded(self, texts: list[str], *, max_tokens: int) -> bool:
        """Return whether the texts certainly have more than `max_tokens` tokens."""
        if self.longest is None:
            return False
        most = max_tokens * self.longest
        if sum(map(len, texts)) <= most:
            return False
        for form in self.forms:
            texts = [unicodedata.normalize(form, text) for text in texts]
        return sum(map(len, texts)) > most


def listed(step: dict | None) -> Iterator[dict]:
    """Yield the steps of a normalizer or pre-tokenizer."""
    if step is not None and step["type"] == "Sequence":
        for one in step.get("normalizers", step.get("pretokenizers")):
            yield from listed(one)
    elif step is not None:
        yield step


def longest_token(described: dict, steps: list[dict]) -> int | None:
    """Return the characters of the longest token; None if a text may have more characters than its tokens."""
    model, added = described["model"], described["added_tokens"]
    if model["type"] != "BPE" or described["truncation"] is not None or not all(map(keeps, steps)):
        return None
    by_bytes = any(step["type"] == "ByteLevel" for step in steps) and model["vocab"].keys() >= set(ByteLevel.alphabet())
    by_names = model.get("byte_fallback", False) and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
    plain = [token for token in added if not token["special"]]  # special ones in a text are read as plain text
    if not (by_bytes or by_names) or any(token["lstrip"] or token["rstrip"] for token in plain):
        return None
    return max(map(len, [*model["vocab"], *(token["content"] for token in plain)]))


def keeps(step: dict) -> bool:
    """Return whether a step removes no characters."""
    if step["type"] in ("Split", "Punctuation"):
        return step["behavior"].lower() != "removed"
    if step["type"] == "Replace":
        return "String" in step["pattern"] and len(step["content"]) >= len(step["pattern"]["String"])
    return step["type"] in KEEPING
