"""Answer windows of questions: read ahead, encode each image once, batch prompts of similar length."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn

from fastvlm.data.decode import open_image, to_rgb
from fastvlm.data.shards import ShardReader
from fastvlm.data.source import Source
from fastvlm.data.source_index import SourceIndex
from fastvlm.data.transforms import ImageTransform
from fastvlm.evaluation.prompts import Prompt, first_question
from fastvlm.inference.engine import Engine
from fastvlm.inference.memory import ImageStore

THUMBNAIL = 160  # pixels of the longer side
DECODERS = 2  # threads


@dataclass
class Asked:
    """One question as stored in the shard, with the SHA-256 digests of its images."""

    key: str
    record: dict
    images: list[bytes] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    thumbnail: str = ""  # a data URL
    image_id: str = ""  # of the sample's images, shown or not, for data sets that name none; "" without images

    @property
    def text(self) -> str:
        """The text of the first user turn, without images; empty for a document."""
        if "document" in self.record:
            return ""
        return "".join(part["text"] for part in first_question(self.record) if part["type"] == "text")


def read_window(
    windows: Sequence[np.ndarray],
    *,
    index: SourceIndex,
    source: Source,
    transform: ImageTransform | None,
    shown: frozenset[int],
) -> Iterator[list[Asked]]:
    """Yield the questions of each window; the next window is read in a thread meanwhile.

    Args:
        windows: index rows of each window.
        transform: None drops the images.
        shown: rows that get a thumbnail.

    Raises:
        ValueError: a sample cannot be fetched or read; a score over the others would not be comparable.
    """
    reader = ShardReader()
    faults = index.faults.to_pylist()

    def read(rows: np.ndarray) -> list[Asked]:
        asked = []
        for row in rows.tolist():
            if faults[row]:
                raise ValueError(f"{index.folder}: sample {index.key(row)} of {index.split} is broken ({faults[row]})")
            try:
                raw = index.read(row, reader)
            except OSError as error:
                raise ValueError(f"{error}; what is answered is kept: run the same command again") from error
            images = list(raw.images) if source.images and transform is not None else []
            asked.append(
                Asked(
                    key=raw.key,
                    record=source.edit(raw.record),
                    images=images,
                    digests=[hashlib.sha256(image).hexdigest() for image in images],
                    image_id="+".join(hashlib.sha256(image).hexdigest()[:16] for image in raw.images),
                    thumbnail=make_thumbnail(raw.images[0]) if row in shown and raw.images else "",
                )
            )
        return asked

    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(read, rows) for rows in windows[:1]]
        for k in range(len(windows)):
            window = ahead.pop().result()
            if k + 1 < len(windows):
                ahead.append(pool.submit(read, windows[k + 1]))
            yield window
    reader.close()


def answer_window(
    engine: Engine,
    asked: Sequence[Asked],
    *,
    prompt: Prompt,
    examples: Sequence[tuple[dict, list[bytes]]] = (),
    batch_size: int = 32,
    max_new_tokens: int = 16,
    stop: Sequence[str] = (),
    cache: ImageStore | None = None,
) -> list[dict]:
    """Return the greedy `prediction` of every question and its `tokens`, in order; `fault` if it could not be asked.

    With an unreadable image or a prompt that is too long for the model the prediction is empty, and scored as such.

    Args:
        examples: records and image files of the shots before every question.
        max_new_tokens: limit on the length of an answer.
        stop: strings that end an answer.
        cache: visual tokens by digest, kept between windows; None keeps none.
    """
    cache = ImageStore(0) if cache is None else cache
    shots = [record for record, _ in examples]
    before = [(hashlib.sha256(image).hexdigest(), image) for _, images in examples for image in images]
    needed = dict(before) | {d: image for q in asked for d, image in zip(q.digests, q.images)}
    visual, broken = encode_new(engine, needed, cache)
    rows: list[dict] = [{"prediction": "", "tokens": 0} for _ in asked]
    lengths: dict[int, int] = {}
    records, shown = {}, {}
    for i, question in enumerate(asked):
        digests = [d for d, _ in before] + question.digests
        if unreadable := [d for d in digests if d in broken]:
            rows[i]["fault"] = f"image cannot be read: {broken[unreadable[0]]}"
            continue
        records[i], shown[i] = prompt.ask(question.record, shots), [visual[d] for d in digests]
        try:
            ids = engine.encode_prompt(records[i], slots=[len(v) for v in shown[i]], max_new_tokens=max_new_tokens)
        except ValueError as error:
            rows[i]["fault"] = str(error)
            continue
        lengths[i] = len(ids)
    by_length = sorted(lengths, key=lambda i: (lengths[i], i))
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        generations = engine.generate_from_visual(
            [records[i] for i in batch], [shown[i] for i in batch], max_new_tokens=max_new_tokens, stop=stop
        )
        for i, generation in zip(batch, generations):
            rows[i] = {"prediction": generation.text, "tokens": len(generation.token_ids)}
    return rows


def encode_new(engine: Engine, images: dict[str, bytes], cache: ImageStore) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return visual tokens by image digest, encoding those not in the cache; and the errors of unreadable images."""
    found = {digest: cache.get(digest.encode()) for digest in images}
    visual = {digest: tokens for digest, tokens in found.items() if tokens is not None}
    new = [digest for digest in images if digest not in visual]
    broken: dict[str, str] = {}
    if not new:
        return visual, broken
    transforms = [engine.transform.restricted(()) for _ in range(DECODERS)]  # each has scratch memory of its own

    def decode(job: tuple[int, list[str]]) -> list[Tensor | str]:
        thread, digests = job
        out: list[Tensor | str] = []
        for digest in digests:
            try:
                out.append(transforms[thread](images[digest]))
            except Exception as error:  # noqa: BLE001  decoders may raise anything
                out.append(str(error).splitlines()[0] if str(error) else type(error).__name__)
        return out

    chunks = [new[i : i + engine.image_batch] for i in range(0, len(new), engine.image_batch)]
    with ThreadPoolExecutor(DECODERS) as pool:
        jobs = lambda chunk: [pool.submit(decode, (t, chunk[t::DECODERS])) for t in range(DECODERS)]
        ahead = jobs(chunks[0])
        for k, chunk in enumerate(chunks):
            parts = [job.result() for job in ahead]
            if k + 1 < len(chunks):
                ahead = jobs(chunks[k + 1])
            decoded = {chunk[t + DECODERS * i]: view for t in range(DECODERS) for i, view in enumerate(parts[t])}
            broken |= {digest: why for digest, why in decoded.items() if isinstance(why, str)}
            good = [digest for digest in chunk if digest not in broken]
            for digest, tokens in zip(good, engine.encode_images([decoded[digest] for digest in good])):
                visual[digest] = tokens
                cache.keep(digest.encode(), tokens)
    return visual, broken


def make_thumbnail(image: bytes) -> str:
    """Return a thumbnail as a data URL; "" if the image cannot be read."""
    try:
        small = to_rgb(open_image(image))
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        stored = io.BytesIO()
        small.save(stored, "JPEG", quality=75)
    except Exception:  # noqa: BLE001  reported with the question itself
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(stored.getvalue()).decode()


def fingerprint_model(model: nn.Module) -> str:
    """Return a hash of names, shapes and about sixteen values spread over each tensor; training moves some of them."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // 16)].cpu().double() if flat.is_floating_point() else flat[:16].cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {some.tolist()}".encode())
    return digest.hexdigest()[:16]
