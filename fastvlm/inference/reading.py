"""Read requests in threads: tokenize the text, load the image files and decode them into views.

Downloads from other hosts have their own thread pool, and long texts are tokenized in a separate thread, one at a time.
So neither delays other requests, and the memory a request can take is bounded.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from fastvlm.data.conversation import encode_record
from fastvlm.data.decode import measure_image
from fastvlm.inference.engine import Engine
from fastvlm.inference.fetching import ImageFetcher
from fastvlm.inference.settings import Settings
from fastvlm.inference.text_bound import TextBound
from fastvlm.tokens import LONG, Tokenizer


class Reader:
    """Reads requests for an engine within the limits of `settings`."""

    def __init__(self, engine: Engine, settings: Settings):
        self.engine, self.settings = engine, settings
        self.fetch = ImageFetcher(
            hosts=[host.strip() for host in settings.allow_hosts.split(",") if host.strip()],
            max_bytes=settings.max_image_bytes,
            timeout=settings.fetch_seconds,
            private=settings.allow_private,
        )
        # One thread per possible request, so that each waits only for its own images.
        self._downloads = ThreadPoolExecutor(settings.max_requests, thread_name_prefix="downloads")
        self._bound = TextBound(engine.tokenizer.hf.backend_tokenizer)
        self._short, self._long = TokenizerThread(engine.tokenizer), TokenizerThread(engine.tokenizer)

    async def read(self, record: dict, urls: Sequence[str], *, max_tokens: int) -> tuple[list[Tensor], list[int]]:
        """Return the views of a request's images and its prompt as ids; refuses long prompts before the model runs.

        Raises:
            ValueError: too many tokens, or an image that cannot be read.
        """
        one = self.engine.tokens_per_image
        input_ids = await self._encode(record, [one] * len(urls), max_tokens)  # an image has at least one view
        if not urls:
            return [], input_ids
        away = self._downloads if any(map(self.fetch.is_away, urls)) else None
        loop = asyncio.get_running_loop()
        files = await loop.run_in_executor(away, self.fetch.all, urls)
        images = await asyncio.to_thread(self._views, files)
        views = [len(image) if image.ndim == 4 else 1 for image in images]
        if sum(views) > len(images):
            input_ids = await self._encode(record, [one * count for count in views], max_tokens)
        return images, input_ids

    async def _encode(self, record: dict, slots: Sequence[int], max_tokens: int) -> list[int]:
        texts = [text for message in record["messages"] for text in texts_of(message["content"])]
        characters = sum(map(len, texts))
        remedy = f"more than the {max_tokens} this server reads: shorten it or use fewer images"
        if self._bound.exceeded(texts, max_tokens=max_tokens):
            raise ValueError(f"the prompt has {characters} characters, in tokens {remedy}")
        input_ids = await (self._short if characters <= LONG else self._long).encode(record, slots)
        if len(input_ids) > max_tokens:
            raise ValueError(f"the prompt has {len(input_ids)} tokens ({sum(slots)} of images), {remedy}")
        return input_ids

    def _views(self, files: Sequence[bytes]) -> list[Tensor]:
        for data in files:
            width, height = measure_image(data)
            if width * height > self.settings.max_pixels:
                raise ValueError(f"an image of {width} x {height} pixels, more than {self.settings.max_pixels}")
        return self.engine.read_images(files)


class TokenizerThread:
    """Tokenizes prompts in one thread, with a copy of the tokenizer: tokenizers are not thread-safe."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = copy.deepcopy(tokenizer)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoding")

    async def encode(self, record: dict, slots: Sequence[int]) -> list[int]:
        """Return the ids of a prompt whose images take these numbers of slots."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._encode, record, slots)

    def _encode(self, record: dict, slots: Sequence[int]) -> list[int]:
        return encode_record(record, self._tokenizer, tokens_per_image=slots, prompt=True).input_ids


def texts_of(content: str | Sequence[dict]) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
