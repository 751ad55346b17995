"""The embedded data set: nine families of VLM training data, built without downloads from scikit-learn and Python."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from importlib import metadata
from pathlib import Path

from data.recipes.workers import open_pool
from fastvlm.foundation import bare_code

DEFAULT_PATH = "embedded"
SHEET_SAMPLES = 12


def recipe_hash(*, seed: int = 0, scale: float = 1.0) -> str:
    """Hash the recipe's source files, the library versions, seed and scale; imports nothing heavy."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(f"{file.name}\0{bare_code(file)}".encode())
    versions = [metadata.version(package) for package in ("numpy", "scikit-learn", "tokenizers")]
    # The prose comes from this Python's documentation, so its version matters.
    digest.update(json.dumps([versions, sys.version_info[:3], seed, scale]).encode())
    return digest.hexdigest()[:16]


def prepare(path: Path, *, seed: int = 0, workers: int = 2, scale: float = 1.0) -> dict:
    """Build the data set in `path`, an empty folder; called by `data/prepare.py`.

    Args:
        seed: random seed of everything that is drawn.
        workers: number of processes; affects only the time.
        scale: share of the full number of records, for tests.

    Returns:
        counts (family -> split -> records), image_size in pixels, label_sets (names of the classes), build_seconds.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from data.recipes.embedded.families import FAMILIES, TRAIN_COUNTS, compose_split, record_texts
    from data.recipes.embedded.text import split_documents
    from data.recipes.embedded.tokenizer import train_tokenizer
    from data.recipes.embedded.world import CLASS_NAMES, COLOUR_NAMES, SIZE, SPLITS
    from fastvlm.tokens import Tokenizer

    started = time.time()
    documents = split_documents()
    texts = ["\n".join(paragraphs) for _, paragraphs in documents["train"]]
    for family in TRAIN_COUNTS:
        # A tenth of the drawn records covers their few words; the remaining merges go to the prose.
        limit = max(200, round(TRAIN_COUNTS[family] * scale / 10))
        for composed, _ in compose_split(family, "train", seed=seed, limit=min(limit, 1000)):
            texts += record_texts(composed.record)
    train_tokenizer(texts, path / "tokenizer")

    # Largest first, so that the workers finish together.
    cost = lambda task: TRAIN_COUNTS.get(task[0], 1000) if task[1] == "train" else 0
    tasks = sorted(((f, s) for f in FAMILIES for s in SPLITS), key=cost, reverse=True)
    arguments = [(path, family, split, seed, scale) for family, split in tasks]
    Tokenizer(str(path / "tokenizer"), template="roles")  # imports what every worker needs before the fork
    if workers > 1:
        with open_pool(workers) as pool:
            counts = list(pool.map(write_split, *zip(*arguments)))
    else:
        counts = [write_split(*a) for a in arguments]
    table = {family: {} for family in FAMILIES}
    for (family, split), count in zip(tasks, counts):
        table[family][split] = count
    return {
        "counts": {f: {s: row[s] for s in SPLITS} for f, row in table.items()},
        "image_size": SIZE,
        "label_sets": {"class": list(CLASS_NAMES), "colour": list(COLOUR_NAMES)},
        "build_seconds": round(time.time() - started, 1),
    }


def write_split(path: Path, family: str, split: str, seed: int, scale: float) -> int:
    """Write and index one split of one family; return its number of records."""
    from data.recipes.embedded.families import compose_split, draw, draw_labels
    from data.recipes.embedded.sheet import write_sheet
    from data.recipes.embedded.world import load_world
    from fastvlm.data.shards import ShardWriter
    from fastvlm.data.sidecar import build_index
    from fastvlm.tokens import Tokenizer

    tokenizer = Tokenizer(str(path / "tokenizer"), template="roles")
    samples = []
    with ShardWriter(path / family, split) as writer:
        if family == "text":
            for key, record in text_records(split, tokenizer, scale):
                writer.write(key, record, [])
                samples.append((record, [], []))
        else:
            scans = load_world(split).scans
            for composed, rng in compose_split(family, split, seed=seed, scale=scale):
                images = draw(composed, scans, rng)
                maps = draw_labels(composed) if family == "cells" else None
                writer.write(composed.key, composed.record, images, maps)
                if len(samples) < SHEET_SAMPLES:
                    samples.append((composed.record, images, maps or []))
        count = writer.num_samples
    for shard in sorted((path / family).glob(f"{split}-*.tar")):
        build_index(shard, tokenizer)
    if split == "train":
        write_sheet(samples[:SHEET_SAMPLES], path / "contact_sheets" / f"{family}.png")
    return count


def text_records(split: str, tokenizer, scale: float):
    """Yield (key, record) for every chunk of a split's prose."""
    from data.recipes.embedded.text import cut_chunks, split_documents

    number = 0
    documents = split_documents()[split]
    for name, paragraphs in documents[: max(1, round(len(documents) * scale))]:
        for chunk in cut_chunks(paragraphs, lambda text: len(tokenizer.encode_text(text))):
            record = {"document": [{"type": "text", "text": chunk}], "meta": {"document": name}}
            yield f"{split}-{number:06d}", record
            number += 1
