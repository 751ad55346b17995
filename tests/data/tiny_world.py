"""A tiny tokenizer and small shards, made in a moment: no download, no embedded data set."""

from __future__ import annotations

import io
import string

import numpy as np
from PIL import Image
from tokenizers import Tokenizer as Rust
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastvlm.data.shards import ShardWriter
from fastvlm.tokens import Tokenizer

WORDS = [
    "the",
    "digit",
    "shown",
    "here",
    "is",
    "a",
    "small",
    "grey",
    "seven",
    "above",
    "nine",
    "and",
    "below",
    "three",
    "what",
    "which",
    "number",
    "stands",
    "left",
]
SPECIALS = ["<|endoftext|>", "<|image|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


def train_tokenizer(folder, *, vocab_size=400, template="roles") -> Tokenizer:
    rust = Rust(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rust.train_from_iterator([" ".join(WORDS), string.printable], trainer)
    extra = {"additional_special_tokens": SPECIALS[1:]}
    PreTrainedTokenizerFast(
        tokenizer_object=rust, eos_token=SPECIALS[0], pad_token=SPECIALS[0], **extra
    ).save_pretrained(folder)
    return Tokenizer(str(folder), template=template)


def draw_png(seed: int, size: tuple[int, int] = (8, 8)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def say(rng: np.random.Generator, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS, int(rng.integers(low, high))))


def make_record(kind: str, i: int) -> tuple[dict, list[bytes]]:
    """A sample of a family: `caption`, `pages` (1-3 images), `chat` (one image, one or two turns) or `text`."""
    rng = np.random.default_rng([i, len(kind)])
    image, text = {"type": "image"}, lambda low, high: {"type": "text", "text": say(rng, low, high)}
    if kind == "caption":
        return {"document": [image, text(2, 12)]}, [draw_png(i)]
    if kind == "pages":
        count = int(rng.integers(1, 4))
        parts = [part for _ in range(count) for part in (text(2, 9), image)]
        return {"document": [*parts, text(1, 5)]}, [draw_png(1000 + 10 * i + k) for k in range(count)]
    if kind == "chat":
        turns = [
            {"role": "user", "content": [image, text(2, 6)]},
            {"role": "assistant", "content": say(rng, 1, 9)},
        ]
        if i % 3 == 0:
            turns += [{"role": "user", "content": say(rng, 2, 5)}, {"role": "assistant", "content": say(rng, 1, 4)}]
        return {"messages": turns, "meta": {"types": ["name"] * (len(turns) // 2)}}, [draw_png(2000 + i)]
    return {"document": [text(3, 30)]}, []


def write_source(folder, kind: str, count: int, *, split="train", max_samples=20, start=0):
    with ShardWriter(folder, split, max_samples=max_samples) as writer:
        for i in range(start, start + count):
            record, images = make_record(kind, i)
            writer.write(f"{kind}-{i:05d}", record, images)
    return folder
