"""Fixtures over `tiny_world`: one tokenizer and four families of shards a test run."""

from __future__ import annotations

import pytest
from tiny_world import train_tokenizer, write_source

from fastvlm.tokens import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def other_tokenizer(tmp_path_factory) -> Tokenizer:
    return train_tokenizer(tmp_path_factory.mktemp("other"), vocab_size=330)


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Folders of four families, with a train and a val split, to be read only."""
    root = tmp_path_factory.mktemp("shards")
    counts = {"caption": 90, "pages": 50, "chat": 70, "text": 40}
    for kind, count in counts.items():
        write_source(root / kind, kind, count)
        write_source(root / kind, kind, 12, split="val", start=5000)
    return {kind: root / kind for kind in counts}
