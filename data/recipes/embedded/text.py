"""Real prose without a download: Python's language reference and the descriptions of scikit-learn's data sets.

Documents are assigned to splits before they are cut, so no document has both training and held-out text.
"""

from __future__ import annotations

import re
from importlib import resources

MAX_TOKENS = 120  # per chunk; a longer sentence is cut between words


def load_documents() -> dict[str, str]:
    """Return name -> text in a fixed order; the reference varies slightly between Python versions."""
    from pydoc_data.topics import topics

    documents = {f"topic-{name}": text for name, text in sorted(topics.items())}
    folder = resources.files("sklearn.datasets.descr")
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".rst"):
            documents[f"data-{entry.name[:-4]}"] = entry.read_text(encoding="utf-8")
    return documents


def split_documents() -> dict[str, list[tuple[str, list[str]]]]:
    """Return split -> [(name, paragraphs), ...]; every eighth document is held out; val and test are about equal."""
    documents = [(name, split_paragraphs(text)) for name, text in load_documents().items()]
    length = lambda document: sum(map(len, document[1]))
    splits = {"train": [d for i, d in enumerate(documents) if i % 8 != 7], "val": [], "test": []}
    for document in sorted(documents[7::8], key=length, reverse=True):  # longest first, each to the shorter split
        splits[min(("test", "val"), key=lambda s: sum(map(length, splits[s])))].append(document)
    return splits


def split_paragraphs(text: str) -> list[str]:
    """Return prose paragraphs with collapsed white space; heading underlines, tables and grammars are left out."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        block = " ".join(re.sub(r"^\s*[*=\-~^+#]{3,}\s*$", "", block, flags=re.M).split())
        letters = sum(c.isalpha() or c == " " for c in block)
        if len(block) >= 25 and letters / len(block) > 0.75 and "::=" not in block:
            paragraphs.append(block)
    return paragraphs


def split_sentences(paragraph: str) -> list[str]:
    return re.split(r"(?<=[.!?:;]) (?=\S)", paragraph)


def cut_chunks(paragraphs: list[str], count_tokens) -> list[str]:
    """Split paragraphs into chunks of at most MAX_TOKENS: whole paragraphs if they fit, else sentences, else words.

    Args:
        count_tokens: text -> number of tokens.
    """
    pieces: list[tuple[str, str]] = []  # separator before the piece, piece
    for paragraph in paragraphs:
        separator = "\n"
        units = [paragraph] if count_tokens(paragraph) <= MAX_TOKENS else split_sentences(paragraph)
        for unit in units:
            words = unit.split(" ") if count_tokens(unit) > MAX_TOKENS else [unit]
            for word in words:
                pieces.append((separator, word))
                separator = " "
    chunks: list[str] = []
    current = ""
    for separator, piece in pieces:
        longer = f"{current}{separator}{piece}" if current else piece
        if current and count_tokens(longer) > MAX_TOKENS:
            chunks.append(current)
            current = piece
        else:
            current = longer
    return [*chunks, current] if current else chunks
