"""Generation: prompts and images in, text out, with a key-value cache and the time each part took."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from fastvlm.data.collate import tiles_among
from fastvlm.data.conversation import encode_record
from fastvlm.data.shards import count_images
from fastvlm.data.transforms import ImageTransform
from fastvlm.inference.answer import Answer
from fastvlm.inference.sampling import choose_tokens
from fastvlm.models.slots import empty_slots, take_out
from fastvlm.models.splice import splice
from fastvlm.models.vlm import VLM
from fastvlm.tokens import Tokenizer


@dataclass
class Generation:
    """One answer and what it cost. Seconds are wall time of the whole call the answer was part of."""

    text: str
    token_ids: list[int]  # without the token that ended it
    num_prompt_tokens: int  # all positions of the prompt, image slots included
    num_image_tokens: int
    image_seconds: float  # encoder, resampler and projector
    prefill_seconds: float  # the prompt, up to the first token of the answer
    decode_seconds: float  # every further token
    finish_reason: str  # "end": the model ended it; "stop": a stop string; "length": max_new_tokens

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed of this row, its first token (which prefill pays for) not counted; 0 with nothing to time."""
        further = len(self.token_ids) - (self.finish_reason != "end")
        return further / self.decode_seconds if further > 0 and self.decode_seconds > 0 else 0.0


class Engine:
    """Answers conversations and continues documents with a VLM.

    An image is one view (3, H, W) or several (v, 3, H, W), as `transform` makes them of a file; its visual tokens are
    (T, D) with T = v * M.

    One call is one batch: rows may differ in length and in their number of images. Rows are padded on the left and
    every row counts its positions from 0, so an answer does not depend on the rows beside it; sampling draws from a
    generator of the row's own.

    Args:
        model: in eval mode; its precision and weights are used as they are.
        image_size: side of a view (pixels), as the last stage saw them.
        transform: from a file to its views, as the last stage saw them; None pads to squares.
        max_new_tokens: default bound of an answer.
        image_batch: views encoded at once.
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
    ):
        self.model = model.to(device).eval()
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.transform = (transform or ImageTransform(image_size=image_size)).restricted(())
        self.max_new_tokens = max_new_tokens
        self.image_batch = image_batch
        self.device = torch.device(device)
        self.tokens_per_image = model.num_visual_tokens(image_size)
        self.stop_ids = frozenset({tokenizer.end_id, tokenizer.document_end_id})

    @torch.inference_mode()
    def encode_images(self, images: Sequence[UInt8[Tensor, "... 3 H W"]]) -> list[Float[Tensor, "_ D"]]:
        """Visual tokens of every image, of all its views one behind the other; in chunks of `image_batch` views.

        Raises:
            ValueError: an image of another shape or type.
        """
        shape = (3, self.image_size, self.image_size)
        for image in images:
            if tuple(image.shape[-3:]) != shape or image.ndim > 4 or image.dtype != torch.uint8:
                raise ValueError(f"an image is {image.dtype} {tuple(image.shape)}, the engine takes uint8 {shape}")
        views = [view for image in images for view in (image if image.ndim == 4 else image[None])]
        is_tile = tiles_among([len(image) if image.ndim == 4 else 1 for image in images])
        chunks = [
            self.model.encode_images(
                torch.stack(views[i : i + self.image_batch]).to(self.device),
                None if is_tile is None else is_tile[i : i + self.image_batch].to(self.device),
            )
            for i in range(0, len(views), self.image_batch)
        ]
        if not chunks:
            return []
        counts = [self.tokens_per_image * (len(image) if image.ndim == 4 else 1) for image in images]
        return list(rearrange(torch.cat(chunks), "i m d -> (i m) d").split(counts))

    def encode_prompt(self, record: dict, *, slots: Sequence[int], max_new_tokens: int | None = None) -> list[int]:
        """Prompt ids of a record, opening the assistant's turn (or going on with a document).

        Args:
            slots: visual tokens of each image.

        Raises:
            ValueError: image parts and images differ in number; the prompt and its answer are longer than the model
                can be.
        """
        if (parts := count_images(record)) != len(slots):
            raise ValueError(f"the prompt has {parts} image slots, but {len(slots)} images were given")
        encoded = encode_record(record, self.tokenizer, tokens_per_image=slots, prompt=True)
        if not encoded.input_ids:
            raise ValueError("the prompt is empty: there is no token to go on from")
        length, limit = len(encoded.input_ids), self.model.llm.max_positions
        new = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        if limit is not None and length + new > limit:
            raise ValueError(
                f"the prompt has {length} tokens ({sum(slots)} of images) and the answer may "
                f"take {new}, but the model ends at {limit}: shorten the prompt, use fewer images "
                f"or lower max_new_tokens"
            )
        return encoded.input_ids

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
            top_k: sample among the k most probable tokens; 0 among all.
            top_p: sample among the most probable tokens that together reach this probability.
            stop: strings that end an answer; the answer ends before them.
            seed: row i of the call draws from a generator seeded by (seed, i).
        """
        if len(records) != len(images):
            raise ValueError(f"{len(records)} records came with {len(images)} lists of images")
        start = self._now()
        visual = iter(self.encode_images([image for row in images for image in row]))
        return self.generate_from_visual(
            records,
            [[next(visual) for _ in row] for row in images],
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            stop=stop,
            seed=seed,
            image_seconds=self._now() - start,
        )

    def generate_from_visual(
        self,
        records: Sequence[dict],
        visual: Sequence[Sequence[Float[Tensor, "_ D"]]],
        *,
        image_seconds: float = 0.0,
        **options,
    ) -> list[Generation]:
        """`generate` from what `encode_images` made of each record's images: an evaluation asks of an image often."""
        return _returned(self._run(records, visual, image_seconds=image_seconds, **options))

    def stream(
        self, record: dict, images: Sequence[UInt8[Tensor, "... 3 H W"]], **options
    ) -> Generator[str, None, Generation]:
        """Pieces of the answer as they come; joined they are the text of `generate([record], [images])`.

        The generator returns (as the value of its StopIteration) the `Generation`. Options are those of `generate`.
        """
        start = self._now()
        visual = self.encode_images(images)
        run = self._run([record], [visual], image_seconds=self._now() - start, **options)
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

    @torch.inference_mode()
    def _run(
        self,
        records: Sequence[dict],
        visual: Sequence[Sequence[Tensor]],
        *,
        image_seconds: float,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> Generator[list[Answer], None, list[Generation]]:
        """Decode step by step, handing out the unfinished answers after each token."""
        limit = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        prompts = [
            self.encode_prompt(record, slots=[len(image) for image in images], max_new_tokens=limit)
            for record, images in zip(records, visual, strict=True)
        ]
        answers = [Answer(self.tokenizer, stop_ids=self.stop_ids, stop=stop, max_new_tokens=limit) for _ in prompts]
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + row) for row in range(len(prompts))]
        start = self._now()
        prefill_seconds = 0.0
        if prompts and limit > 0:
            inputs_embeds, mask, position_ids = self._prefill_inputs(prompts, visual)
            cache = None
            while True:
                hidden, cache = self.model.llm.decode(inputs_embeds, position_ids, mask, cache)
                logits = self._next_logits(hidden[:, -1])
                chosen = choose_tokens(logits, temperature=temperature, top_k=top_k, top_p=top_p, generators=generators)
                for answer, token in zip(answers, chosen.tolist()):
                    answer.add(token)
                prefill_seconds = prefill_seconds or self._now() - start
                yield answers
                if all(answer.finish_reason for answer in answers):
                    break
                inputs_embeds = self.model.llm.embed(chosen[:, None])  # (B, 1, D)
                position_ids = position_ids[:, -1:] + 1
                mask = torch.cat([mask, mask.new_ones(len(answers), 1)], dim=1)
        decode_seconds = self._now() - start - prefill_seconds
        return [
            Generation(
                text=answer.text(),
                token_ids=answer.token_ids,
                num_prompt_tokens=len(prompt) - sum(map(len, images)) + self._num_tokens(images),
                num_image_tokens=self._num_tokens(images),
                image_seconds=image_seconds,
                prefill_seconds=prefill_seconds,
                decode_seconds=decode_seconds,
                finish_reason=answer.finish_reason,
            )
            for answer, prompt, images in zip(answers, prompts, visual)
        ]

    def _prefill_inputs(
        self, prompts: list[list[int]], visual: Sequence[Sequence[Tensor]]
    ) -> tuple[Float[Tensor, "B S D"], Int[Tensor, "B S"], Int[Tensor, "B S"]]:
        """Embeddings padded on the left, their mask (1 where a token stands), positions from 0 in every row."""
        longest = max(map(len, prompts))
        input_ids = torch.full((len(prompts), longest), self.tokenizer.pad_id)
        mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        input_ids, mask = input_ids.to(self.device), mask.to(self.device)
        embeds = self.model.llm.embed(input_ids)
        images = [image for row in visual for image in row]
        if images:
            views = rearrange(torch.cat(images), "(i m) d -> i m d", m=self.tokens_per_image)
            embeds = splice(embeds, input_ids, views, image_token_id=self.tokenizer.image_id)
            if self.model.drops_tokens:
                empty = empty_slots(embeds, input_ids == self.tokenizer.image_id)
                embeds, mask = take_out(empty, embeds, mask)
        position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)
        return embeds, mask, position_ids

    def _next_logits(self, hidden: Float[Tensor, "B D"]) -> Float[Tensor, "B V"]:
        """Logits without the tokens no answer may hold: image slots, and rows of the head beyond the tokenizer."""
        logits = self.model.llm.head(hidden).float()
        logits[:, self.tokenizer.image_id] = -torch.inf
        logits[:, len(self.tokenizer) :] = -torch.inf
        return logits

    def _num_tokens(self, images: Sequence[Float[Tensor, "_ D"]]) -> int:
        """Visual tokens of a record that the language model reads."""
        if not self.model.drops_tokens:
            return sum(map(len, images))
        return sum(int((image != 0).any(dim=-1).sum()) for image in images)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _returned(generator: Generator):
    """Run a generator to its end; its return value."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value
