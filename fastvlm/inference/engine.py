"""Generation: prompts and images in, text out, with a key-value cache and the time each part took."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from fastvlm.data.conversation import encode_record
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

    One call is one batch: rows may differ in length and in their number of images. Rows are padded on the left and
    every row counts its positions from 0, so an answer does not depend on the rows beside it; sampling draws from a
    generator of the row's own.

    Args:
        model: in eval mode; its precision and weights are used as they are.
        image_size: side of the square images (pixels), as the last stage saw them.
        max_new_tokens: default bound of an answer.
        image_batch: images encoded at once.
    """

    def __init__(
        self,
        model: VLM,
        tokenizer: Tokenizer,
        *,
        image_size: int,
        max_new_tokens: int = 32,
        device: str | torch.device = "cpu",
        image_batch: int = 64,
    ):
        self.model = model.to(device).eval()
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.max_new_tokens = max_new_tokens
        self.image_batch = image_batch
        self.device = torch.device(device)
        self.tokens_per_image = model.num_visual_tokens(image_size)
        self.stop_ids = frozenset({tokenizer.end_id, tokenizer.document_end_id})

    @torch.inference_mode()
    def encode_images(self, images: Sequence[UInt8[Tensor, "3 H W"]]) -> Float[Tensor, "I M D"]:
        """Visual tokens of images of the engine's size, in chunks of `image_batch`.

        Raises:
            ValueError: an image of another shape or type.
        """
        shape = (3, self.image_size, self.image_size)
        for image in images:
            if tuple(image.shape) != shape or image.dtype != torch.uint8:
                raise ValueError(f"an image is {image.dtype} {tuple(image.shape)}, the engine takes uint8 {shape}")
        chunks = [
            self.model.encode_images(torch.stack(list(images[i : i + self.image_batch])).to(self.device))
            for i in range(0, len(images), self.image_batch)
        ]
        return torch.cat(chunks) if chunks else self._no_images()

    def encode_prompt(self, record: dict, *, num_images: int, max_new_tokens: int | None = None) -> list[int]:
        """Prompt ids of a record, opening the assistant's turn (or going on with a document).

        Raises:
            ValueError: slots and images differ in number; the prompt and its answer are longer than the model can be.
        """
        encoded = encode_record(record, self.tokenizer, tokens_per_image=self.tokens_per_image, prompt=True)
        if encoded.num_images != num_images:
            raise ValueError(f"the prompt has {encoded.num_images} image slots, but {num_images} images were given")
        if not encoded.input_ids:
            raise ValueError("the prompt is empty: there is no token to go on from")
        length, limit = len(encoded.input_ids), self.model.llm.max_positions
        new = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        if limit is not None and length + new > limit:
            raise ValueError(
                f"the prompt has {length} tokens ({num_images * self.tokens_per_image} of images) and the answer may "
                f"take {new}, but the model ends at {limit}: shorten the prompt, use fewer images "
                f"or lower max_new_tokens"
            )
        return encoded.input_ids

    def generate(
        self,
        records: Sequence[dict],
        images: Sequence[Sequence[UInt8[Tensor, "3 H W"]]],
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
        visual = self.encode_images([image for row in images for image in row])
        return self.generate_from_visual(
            records,
            list(visual.split([len(row) for row in images])) if images else [],
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
        visual: Sequence[Float[Tensor, "_ M D"]],
        *,
        image_seconds: float = 0.0,
        **options,
    ) -> list[Generation]:
        """`generate` from what `encode_images` made of each record's images: an evaluation asks of an image often."""
        return _returned(self._run(records, visual, image_seconds=image_seconds, **options))

    def stream(
        self, record: dict, images: Sequence[UInt8[Tensor, "3 H W"]], **options
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
        visual: Sequence[Tensor],
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
            self.encode_prompt(record, num_images=len(images), max_new_tokens=limit)
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
                num_prompt_tokens=len(prompt) - len(images) * self.tokens_per_image + self._num_tokens(images),
                num_image_tokens=self._num_tokens(images),
                image_seconds=image_seconds,
                prefill_seconds=prefill_seconds,
                decode_seconds=decode_seconds,
                finish_reason=answer.finish_reason,
            )
            for answer, prompt, images in zip(answers, prompts, visual)
        ]

    def _prefill_inputs(
        self, prompts: list[list[int]], visual: Sequence[Tensor]
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
        embeds = splice(embeds, input_ids, torch.cat(list(visual)), image_token_id=self.tokenizer.image_id)
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

    def _num_tokens(self, images: Float[Tensor, "_ M D"]) -> int:
        """Visual tokens the language model reads of one record's images."""
        return int((images != 0).any(dim=-1).sum()) if self.model.drops_tokens else len(images) * self.tokens_per_image

    def _no_images(self) -> Float[Tensor, "0 M D"]:
        return torch.zeros(0, self.tokens_per_image, self.model.llm.dim, device=self.device)

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
