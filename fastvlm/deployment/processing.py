"""A processor of `transformers` that makes our views and image slots."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import no_type_check

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import load_image

from fastvlm.data.transforms import ImageTransform


class PartsVLMImageProcessor(BaseImageProcessor):
    """Image processor that makes views with `ImageTransform`.

    Args:
        image_size: side of a view, pixels.
        image: the transform's other arguments.
    """

    model_input_names = ["pixel_values", "layouts"]

    def __init__(self, image_size: int = 64, image: dict | None = None, **kwargs):
        super().__init__(**kwargs)
        self.image_size, self.image = image_size, dict(image or {})

    def preprocess(self, images, return_tensors: str | None = "pt", **kwargs) -> BatchFeature:
        """Turn images into views.

        Args:
            images: bytes of a file, path, URL, PIL image or array (H, W, 3) of bytes; one or a list.

        Returns:
            pixel_values: uint8 (I, 3, H, W), the views of all images one after another, global view first.
            layouts: int64 (images, 4): rows and columns of each image's tiles, its height and width in pixels.
        """
        transform = ImageTransform(image_size=self.image_size, **self.image)
        views = [transform(as_file(image)) for image in flat(images)]
        layouts = torch.tensor([view.view_layout for view in views], dtype=torch.long).view(-1, 4)
        return BatchFeature({"pixel_values": torch.cat(views), "layouts": layouts})


class PartsVLMProcessor(ProcessorMixin):
    """Processor of texts with one image token per image: makes ids with all slots, and the views.

    Args:
        tokens_per_view: slots of a view.
        image_token: placeholder of an image in the text.
    """

    @no_type_check  # transformers reads the names of the arguments from the function's own code
    def __init__(
        self,
        image_processor: PartsVLMImageProcessor,
        tokenizer: PreTrainedTokenizerFast,
        tokens_per_view: int = 1,
        image_token: str = "<|image|>",
        chat_template: str | None = None,
        **kwargs,
    ):
        self.tokens_per_view, self.image_token = tokens_per_view, image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images=None, text=None, return_tensors: str | None = "pt", **kwargs) -> BatchFeature:
        """Expand image tokens to slots, tokenize the texts and make the views of the images, in the texts' order.

        Raises:
            ValueError: the texts have more or fewer image tokens than there are images.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        out: dict = {}
        counts: list[int] = []
        if images is not None and len(flat(images)):
            out = dict(self.image_processor(images))
            tiles = out["layouts"][:, 0] * out["layouts"][:, 1]
            counts = torch.where(tiles == 1, 1, 1 + tiles).tolist()
        pieces = [one.split(self.image_token) for one in texts]
        slots = sum(len(piece) - 1 for piece in pieces)
        if slots != len(counts):
            raise ValueError(f"the texts have {slots} {self.image_token}, but {len(counts)} images were given")
        number = iter(counts)
        full = []
        for first, *others in pieces:
            for piece in others:
                first += self.image_token * (next(number) * self.tokens_per_view) + piece
            full.append(first)
        if full:
            # The template writes all special tokens, including the first one.
            options = {"add_special_tokens": False, "padding": len(full) > 1, "padding_side": "left"} | {
                key: value for key, value in kwargs.items() if key in ("padding", "padding_side", "truncation")
            }
            options["padding"] = options["padding"] if len(full) > 1 else False
            encoded = self.tokenizer(full, return_tensors=return_tensors, **options)
            out |= {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        return BatchFeature(out)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "layouts"]


def flat(images) -> list:
    if isinstance(images, Sequence) and not isinstance(images, (str, bytes)):
        return [image for entry in images for image in flat(entry)]
    return [] if images is None else [images]


def as_file(image) -> bytes:
    """Return the bytes of an image file; an image in memory is encoded as PNG, without loss."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, torch.Tensor):
        image = image.permute(1, 2, 0) if image.shape[0] == 3 else image
        image = image.cpu().numpy()
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if isinstance(image, str):
        image = load_image(image)
    out = io.BytesIO()
    image.convert("RGB").save(out, "png", compress_level=1)
    return out.getvalue()
