"""The most characters that so many tokens can stand for: a text above it is too long, whatever it says."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

COMPOSING = ("NFC", "NFKC")
KEEPING = ("ByteLevel", "Digits", "Metaspace", "NFD", "NFKD", "Prepend", "UnicodeScripts", *COMPOSING)


class TextBound:
    """A tokenizer whose vocabulary has every byte makes all of a text into tokens, and none of them stands for more
    characters than its own name has. Of others, which may leave characters out or make one token of any number of
    them, nothing is known and no text is refused."""

    def __init__(self, tokenizer: Tokenizer):
        described = json.loads(tokenizer.to_str())
        steps = [*listed(described["normalizer"]), *listed(described["pre_tokenizer"])]
        self.longest = longest_token(described, steps)
        self.forms = [step["type"] for step in steps if step["type"] in COMPOSING]

    def exceeded(self, texts: list[str], *, max_tokens: int) -> bool:
        """Whether the texts are certainly more tokens than these."""
        if self.longest is None:
            return False
        most = max_tokens * self.longest
        if sum(map(len, texts)) <= most:
            return False
        for form in self.forms:
            texts = [unicodedata.normalize(form, text) for text in texts]
        return sum(map(len, texts)) > most


def listed(step: dict | None) -> Iterator[dict]:
    """The steps of a normalizer or pre-tokenizer, one by one."""
    if step is not None and step["type"] == "Sequence":
        for one in step.get("normalizers", step.get("pretokenizers")):
            yield from listed(one)
    elif step is not None:
        yield step


def longest_token(described: dict, steps: list[dict]) -> int | None:
    """Characters of it; None where a text's characters may outnumber those of its tokens."""
    model, added = described["model"], described["added_tokens"]
    if model["type"] != "BPE" or described["truncation"] is not None or not all(map(keeps, steps)):
        return None
    by_bytes = any(step["type"] == "ByteLevel" for step in steps) and model["vocab"].keys() >= set(ByteLevel.alphabet())
    by_names = model.get("byte_fallback", False) and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
    plain = [token for token in added if not token["special"]]  # special ones are text in a text
    if not (by_bytes or by_names) or any(token["lstrip"] or token["rstrip"] for token in plain):
        return None
    return max(map(len, [*model["vocab"], *(token["content"] for token in plain)]))


def keeps(step: dict) -> bool:
    """Whether a step leaves no character out."""
    if step["type"] in ("Split", "Punctuation"):
        return step["behavior"].lower() != "removed"
    if step["type"] == "Replace":
        return "String" in step["pattern"] and len(step["content"]) >= len(step["pattern"]["String"])
    return step["type"] in KEEPING
