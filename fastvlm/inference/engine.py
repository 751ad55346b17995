"""Text generation from prompts and images, with a key-value cache and timings of each part."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from fastvlm.data.conversation import encode_record
from fastvlm.data.shards import count_images
from fastvlm.data.transforms import ImageTransform
from fastvlm.inference import fast_decoder
from fastvlm.inference.answer import Answer
from fastvlm.inference.clock import Clock
from fastvlm.inference.generation import Generation, finished
from fastvlm.inference.memory import FileStore, ImageStore, PrefixStore, image_key, position_names
from fastvlm.inference.rows import Row, Rows
from fastvlm.inference.sampling import Sampling
from fastvlm.inference.static_decoder import StaticDecoder
from fastvlm.models.splice import splice
from fastvlm.models.vlm import VLM
from fastvlm.tokens import Tokenizer


class Engine:
    """Answers conversations and continues documents with a VLM.

    An image is one view (3, H, W) or several views (v, 3, H, W), as `transform` produces them from a file; its visual
    tokens have shape (T, D) with T = v * M.

    Each call generates for one batch, whose rows may differ in length and in number of images. Rows are padded on the
    left and the positions of each row start at 0, so an answer does not depend on the other rows of the batch; each
    row samples from its own generator. Finished rows leave the batch.

    With stores enabled, an image is encoded once, and if a prompt starts like an earlier one (the next turn of a
    conversation, another question about the same image) only the remainder is computed. Stores are only valid while
    the weights do not change, so they are off by default.

    Args:
        model: moved to `device` and put in eval mode; its precision and weights are used as they are.
        image_size: side of a view in pixels, as in the last training stage.
        transform: turns an image file into views, as in the last training stage; None pads to squares.
        max_new_tokens: default limit on the length of an answer.
        image_batch: number of views encoded at once.
        image_store_bytes: limit on the visual tokens kept between calls, and separately on the views read from files.
        prefix_store_bytes: limit on the keys and values kept between calls.
        workers: threads that read image files.
        fast: use `FastDecoder` if it supports the language model.
    """

    def __init__(
        self,
        model: VLM,
        tokenizer: Tokenizer,
        *,
        image_size: int,
        transform: ImageTransform | None = None,
        max_new_tokens: int = 32,
        device: str | torch.device = "cpu",
        image_batch: int = 64,
        image_store_bytes: int = 0,
        prefix_store_bytes: int = 0,
        workers: int = 4,
        fast: bool = True,
    ):
        self.model = model.to(device).eval()
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.transform = (transform or ImageTransform(image_size=image_size)).restricted(())
        self.max_new_tokens = max_new_tokens
        self.image_batch = image_batch
        self.device, self.clock = torch.device(device), Clock(device)
        self.tokens_per_image = model.num_visual_tokens(image_size)
        self.stop_ids = frozenset({tokenizer.end_id, tokenizer.document_end_id})
        self.files, self.images = FileStore(image_store_bytes), ImageStore(image_store_bytes)
        self.prefixes = self._prefix_store(prefix_store_bytes)
        self.workers, self.levers = workers, ()
        self._threads: ThreadPoolExecutor | None = None
        self._local = threading.local()
        self.fast = fast_decoder.FastDecoder(model.llm) if fast and fast_decoder.fits(model.llm) else None
        if self.fast is not None and getattr(model.llm, "graphs", False):
            self.fast = StaticDecoder(self.fast)

    def read_images(self, files: Sequence[bytes]) -> list[UInt8[Tensor, "v 3 H W"]]:
        """Decode image files into views, in parallel.

        Raises:
            ValueError: a file is broken or too large.
        """
        if len(files) < 2 or self.workers < 2:
            return [self._read(data) for data in files]
        self._threads = self._threads or ThreadPoolExecutor(self.workers, thread_name_prefix="images")
        return list(self._threads.map(self._read, files))

    def _read(self, data: bytes) -> Tensor:
        if not hasattr(self._local, "transform"):  # one per thread: a transform has scratch memory
            self._local.transform = self.transform.restricted(())
        return self.files.read(data, self._local.transform)

    @torch.inference_mode()
    def encode_images(self, images: Sequence[UInt8[Tensor, "... 3 H W"]]) -> list[Float[Tensor, "_ D"]]:
        """Return the visual tokens (T, D) of each image, its views concatenated; encodes `image_batch` views at a time.

        Raises:
            ValueError: an image has the wrong shape or dtype.
        """
        if not self.images.max_bytes:
            return list(self.encode_each(images))
        keys = [image_key(image) for image in images]
        found = {key: tokens for key in dict.fromkeys(keys) if (tokens := self.images.get(key)) is not None}
        new = {key: image for key, image in zip(keys, images) if key not in found}
        for key, tokens in zip(new, self.encode_each(new.values())):
            found[key] = tokens
            self.images.keep(key, tokens)
        return [found[key] for key in keys]

    @torch.inference_mode()
    def encode_each(self, images: Iterable[UInt8[Tensor, "... 3 H W"]]) -> Iterator[Float[Tensor, "_ D"]]:
        """Yield what `encode_images` returns, without the store; takes images as it goes and holds a batch of views.

        Raises:
            ValueError: see `encode_images`.
        """
        taken: deque[tuple[int, tuple]] = deque()  # views and layout of every image that is not yielded yet
        encoded = self._encode(self._views(images, taken))
        for first in encoded:
            count, layout = taken.popleft()
            visual = self.model.arrange(torch.stack([first, *islice(encoded, count - 1)]), torch.tensor([layout]))
            yield rearrange(visual, "v m d -> (v m) d")

    def _views(self, images: Iterable[Tensor], taken: deque) -> Iterator[tuple[Tensor, bool]]:
        """Yield every view and whether it is a tile; append every image's number of views and layout to `taken`."""
        shape = (3, self.image_size, self.image_size)
        for image in images:
            if tuple(image.shape[-3:]) != shape or image.ndim > 4 or image.dtype != torch.uint8:
                raise ValueError(f"an image is {image.dtype} {tuple(image.shape)}, the engine takes uint8 {shape}")
            views = image if image.ndim == 4 else image[None]
            taken.append((len(views), getattr(image, "view_layout", (1, 1, self.image_size, self.image_size))))
            yield from ((view, number > 0) for number, view in enumerate(views))

    def _encode(self, views: Iterator[tuple[Tensor, bool]]) -> Iterator[Float[Tensor, "M D"]]:
        while batch := list(islice(views, self.image_batch)):
            pixels, is_tile = zip(*batch)
            tiles = torch.tensor(is_tile).to(self.device) if any(is_tile) else None
            yield from self.model.encode_images(torch.stack(pixels).to(self.device), tiles)

    def encode_prompt(self, record: dict, *, slots: Sequence[int], max_new_tokens: int | None = None) -> list[int]:
        """Return the prompt ids of a record, up to where the assistant's turn (or the rest of a document) begins.

        Args:
            record: see `encode_record`; or `{"input_ids": [...]}`, a prompt that is already tokenized and includes its
                image slots.
            slots: number of visual tokens of each image.
            max_new_tokens: room to reserve for the answer; None is the engine's default.

        Raises:
            ValueError: the number of image parts differs from that of images, or the number of slots from that of
                visual tokens; the prompt is empty; prompt and answer exceed the model's maximum length.
        """
        input_ids = record.get("input_ids")
        if input_ids is None:
            if (parts := count_images(record)) != len(slots):
                raise ValueError(f"the prompt has {parts} image slots, but {len(slots)} images were given")
            input_ids = encode_record(record, self.tokenizer, tokens_per_image=slots, prompt=True).input_ids
        elif (held := input_ids.count(self.tokenizer.image_id)) != sum(slots):
            raise ValueError(f"the prompt has {held} slots of images, whose visual tokens are {sum(slots)}")
        if not input_ids:
            raise ValueError("the prompt is empty: there is no token to go on from")
        length, limit = len(input_ids), self.model.llm.max_positions
        new = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        if limit is not None and length + new > limit:
            raise ValueError(
                f"the prompt has {length} tokens ({sum(slots)} of images) and the answer may "
                f"take {new}, but the model ends at {limit}: shorten the prompt, use fewer images "
                f"or lower max_new_tokens"
            )
        return input_ids

    def generate(
        self,
        records: Sequence[dict],
        images: Sequence[Sequence[UInt8[Tensor, "... 3 H W"]]],
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[Generation]:
        """Answer every record; `images[i]` are the images of record i in the order of their slots.

        Args:
            temperature: 0 is greedy.
            top_k: sample from the k most probable tokens; 0 uses all.
            top_p: sample from the smallest set of most probable tokens whose total probability reaches this.
            max_new_tokens: limit on the length of each answer; None is the engine's default.
            stop: strings that end an answer and are not part of it.
            seed: row i of the call draws from a generator seeded by (seed, i).
        """
        if len(records) != len(images):
            raise ValueError(f"{len(records)} records came with {len(images)} lists of images")
        start = self.now()
        visual = iter(self.encode_images([image for row in images for image in row]))
        return self.generate_from_visual(
            records,
            [[next(visual) for _ in row] for row in images],
            keys=[[image_key(image) for image in row] for row in images] if self.prefixes.max_bytes else None,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            stop=stop,
            seed=seed,
            image_seconds=self.now() - start,
        )

    def generate_from_visual(
        self,
        records: Sequence[dict],
        visual: Sequence[Sequence[Float[Tensor, "_ D"]]],
        *,
        image_seconds: float = 0.0,
        **options,
    ) -> list[Generation]:
        """Run `generate` on visual tokens from `encode_images`, so that an image asked about often is encoded once.

        Options are those of `generate`, and `keys`: the images' keys, needed to store prefixes that contain images.
        """
        return _returned(self._run(records, visual, image_seconds=image_seconds, **options))

    def stream(
        self, record: dict, images: Sequence[UInt8[Tensor, "... 3 H W"]], **options
    ) -> Generator[str, None, Generation]:
        """Yield pieces of the answer as they are generated; joined, they equal the text of `generate`.

        The generator returns (as the value of its StopIteration) the `Generation`. Options are those of `generate`.
        """
        start = self.now()
        visual = self.encode_images(images)
        keys = [[image_key(image) for image in images]] if self.prefixes.max_bytes else None
        run = self._run([record], [visual], keys=keys, image_seconds=self.now() - start, **options)
        shown = 0
        while True:
            try:
                piece = next(run)[0].settled_text()[shown:]
            except StopIteration as end:
                generation = end.value[0]
                break
            shown += len(piece)
            if piece:
                yield piece
        if generation.text[shown:]:
            yield generation.text[shown:]
        return generation

    def rows(self, *, strict: bool = False) -> Rows:
        """Return an empty batch, to which rows (see `row`) can be added at any time; `strict`: see `Rows`."""
        return Rows(
            embed=self.model.llm.embed,
            decode=self._decode,
            logits=self._next_logits,
            prefixes=self.prefixes,
            device=self.device,
            now=self.now,
            strict=strict,
        )

    @torch.inference_mode()
    def row(
        self,
        record: dict,
        visual: Sequence[Float[Tensor, "_ D"]],
        *,
        keys: Sequence[bytes] | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008  frozen
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        seed: int = 0,
        image_seconds: float = 0.0,
    ) -> Row:
        """Prepare a prompt for `Rows.add`. Raises the same errors as `encode_prompt`.

        Args:
            visual: visual tokens of each image, from `encode_images`, on any device.
            keys: the images' keys (`image_key`), needed to store a prefix that contains images.
            seed: of the row's generator.
            image_seconds: time spent on encoding the images, for the `Generation`.
        """
        slots = [len(image) for image in visual]
        limit = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        input_ids = torch.tensor(self.encode_prompt(record, slots=slots, max_new_tokens=limit), device=self.device)
        embeds = self.model.llm.embed(input_ids[None])
        names = None
        if self.prefixes.max_bytes and (keys is not None or not slots):
            names = position_names(
                input_ids.tolist(), image_token_id=self.tokenizer.image_id, images=keys or (), slots=slots
            )
        if visual:
            views = rearrange(torch.cat(list(visual)).to(self.device), "(i m) d -> i m d", m=self.tokens_per_image)
            embeds = splice(embeds, input_ids[None], views, image_token_id=self.tokenizer.image_id)
            if self.model.drops_tokens:  # empty slots are removed, from the names of the prefix store too
                held = ~((input_ids == self.tokenizer.image_id) & (embeds[0] == 0).all(dim=-1))
                embeds = embeds[:, held]
                names = None if names is None else names[held.cpu().numpy()]
        return Row(
            embeds=embeds[0],
            positions=self.model.positions(input_ids[None], torch.arange(embeds.shape[1], device=self.device)[None])[0],
            names=names,
            answer=Answer(self.tokenizer, stop_ids=self.stop_ids, stop=stop, max_new_tokens=limit),
            sampling=sampling,
            generator=torch.Generator().manual_seed(seed),
            num_prompt_tokens=embeds.shape[1],
            num_image_tokens=embeds.shape[1] - len(input_ids) + sum(slots),
            image_seconds=image_seconds,
        )

    def _run(
        self,
        records: Sequence[dict],
        visual: Sequence[Sequence[Tensor]],
        *,
        image_seconds: float,
        keys: Sequence[Sequence[bytes]] | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> Generator[list[Answer], None, list[Generation]]:
        """Decode step by step, yielding all answers after each token."""
        options = {"sampling": Sampling(temperature, top_k, top_p), "max_new_tokens": max_new_tokens, "stop": stop}
        waiting = [
            self.row(
                record,
                images,
                keys=None if keys is None else keys[i],
                seed=(seed * 1_000_003 + i) % 2**63,
                image_seconds=image_seconds,
                **options,
            )
            for i, (record, images) in enumerate(zip(records, visual, strict=True))
        ]
        answers, rows = [row.answer for row in waiting], self.rows()
        rows.add(waiting)
        yield answers
        while len(rows):
            rows.step()
            yield answers
        return [finished(row) for row in waiting]

    def _decode(self, inputs_embeds: Tensor, position_ids: Tensor, mask: Tensor | None, cache) -> tuple[Tensor, object]:
        if self.fast is not None:
            return self.fast.decode(inputs_embeds, position_ids, mask, cache)
        if mask is None:
            columns = cache.get_seq_length() + inputs_embeds.shape[1]
            mask = torch.ones(len(inputs_embeds), columns, dtype=torch.long, device=self.device)
        hidden, cache = self.model.llm.decode(inputs_embeds, position_ids, mask, cache)
        return hidden[:, -1:], cache

    def _next_logits(self, hidden: Float[Tensor, "B D"]) -> Float[Tensor, "B V"]:
        """Logits, -inf for tokens an answer may not contain: the image token, and padding rows of the head."""
        logits = self.model.llm.head(hidden).float()
        logits[:, self.tokenizer.image_id] = -torch.inf
        logits[:, len(self.tokenizer) :] = -torch.inf
        return logits

    def _prefix_store(self, max_bytes: int) -> PrefixStore:
        return PrefixStore(0 if getattr(self.model.llm, "whole_prompts", False) else max_bytes)

    @contextmanager
    def measured(self, clock: Clock, *, store_bytes: int = 0) -> Iterator[None]:
        """Use another clock and empty stores inside the context, where the model's end tokens do not end an answer.

        Args:
            store_bytes: limit of each store; 0 keeps nothing.
        """
        kept = {name: getattr(self, name) for name in ("clock", "stop_ids", "files", "images", "prefixes")}
        self.clock, self.stop_ids = clock, frozenset()
        self.files, self.images = FileStore(store_bytes), ImageStore(store_bytes)
        self.prefixes = self._prefix_store(store_bytes)
        try:
            yield
        finally:
            for name, value in kept.items():
                setattr(self, name, value)

    def now(self) -> float:
        """Return the time in seconds, after waiting for the device."""
        return self.clock.now()


def _returned(generator: Generator):
    """Exhaust a generator and return its return value."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value
