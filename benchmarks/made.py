"""Data for benchmarks/data.py: photographs, conversations and a tokenizer, made from what installed packages ship.

Photographs: random crops (55-100 % of the side, half of them mirrored) of scikit-learn's two sample photographs,
resized to 640 x 480, 480 x 640 or 640 x 427 (3 : 1 : 1), with varied contrast and brightness and Gaussian luminance
noise of 2-8 grey levels, like a sensor's, written as baseline 4:2:0 JPEG of quality 75-95. A file outside 30-80 KB is
re-encoded at a lower or higher quality. Text: passages of Python's language reference (`pydoc_data`). Everything is a
pure function of the sample's number.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((640, 480), (640, 480), (640, 480), (480, 640), (640, 427))
SMALLEST, LARGEST = 30_000, 80_000  # bytes


@cache
def photographs() -> tuple[Image.Image, ...]:
    from sklearn.datasets import load_sample_images

    return tuple(Image.fromarray(pixels) for pixels in load_sample_images().images)


def photograph(number: int) -> bytes:
    """Return the JPEG of sample `number`."""
    random = np.random.default_rng([7, number])
    width, height = SIZES[random.integers(len(SIZES))]
    photo = photographs()[number % 2]
    side = random.uniform(0.55, 1.0) * min(photo.width / width, photo.height / height)
    w, h = side * width, side * height
    left, top = random.uniform(0, photo.width - w), random.uniform(0, photo.height - h)
    image = photo.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, left + w, top + h))
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(image, dtype=np.float32)
    pixels = (pixels - 128) * random.uniform(0.8, 1.2) + 128 + random.uniform(-15, 15)
    pixels += random.normal(0, random.uniform(2, 8), (height, width, 1)).astype(np.float32)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    quality = int(random.integers(75, 96))
    size, tried = 0, set()
    while not SMALLEST <= size <= LARGEST and quality not in tried and 20 <= quality <= 100:
        tried.add(quality)
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality)
        size = out.tell()
        quality += -5 if size > LARGEST else 5
    return out.getvalue()


@cache
def words() -> tuple[str, ...]:
    from pydoc_data.topics import topics

    return tuple(re.findall(r"[A-Za-z]+[,.;]?", " ".join(topics[name] for name in sorted(topics))))


def passage(random: np.random.Generator, count: int) -> str:
    start = int(random.integers(len(words()) - count))
    return " ".join(words()[start : start + count])


def record(random: np.random.Generator, *, num_images: int, question: int, answer: int) -> dict:
    """Return a conversation of one turn, or a document if `question` is 0; lengths in words."""
    images = [{"type": "image"}] * num_images
    if not question:
        return {"document": [*images, {"type": "text", "text": passage(random, answer)}]}
    ask = [*images, {"type": "text", "text": passage(random, question)}]
    reply = [{"type": "text", "text": passage(random, answer)}]
    return {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}]}


def conversation(number: int) -> dict:
    """Return the record for photograph `number`: a question of 8-20 words, an answer of 20-100."""
    random = np.random.default_rng([11, number])
    question, answer = int(random.integers(8, 21)), int(random.integers(20, 101))
    return record(random, num_images=1, question=question, answer=answer)


def samples(shards: Path) -> Iterator[tuple[str, bytes, bytes]]:
    """Yield (key, record as JSON, image) of every sample in shard order, for conversion to the peers' formats."""
    import tarfile

    for shard in sorted(shards.glob("train-*.tar")):
        with tarfile.open(shard) as tar:
            members = iter(tar)
            for json_member, image_member in zip(members, members):
                key = json_member.name.partition(".")[0]
                assert image_member.name == f"{key}.0.jpg"
                yield key, tar.extractfile(json_member).read(), tar.extractfile(image_member).read()


def train_tokenizer(folder: Path, *, vocab_size: int = 8000) -> None:
    """Train a byte-level BPE on the language reference, with byte-level pre-tokenisation as in GPT-2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    rust = Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rust.train_from_iterator(
        [" ".join(words())],
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
        ),
    )
    PreTrainedTokenizerFast(tokenizer_object=rust, eos_token=specials[0], pad_token=specials[0]).save_pretrained(folder)
