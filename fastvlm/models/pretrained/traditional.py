"""The traditional mode: a CLIP and a language model, not trained together, connected by text labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from fastvlm.models.hub import fetch
from fastvlm.models.llms.language_model import LanguageModel
from fastvlm.models.llms.language_model import from_pretrained as load_llm
from fastvlm.models.pretrained.misfits import refuse_misfits
from fastvlm.models.pretrained.whole import PretrainedVLM
from fastvlm.models.resamplers.identity import IdentityResampler
from fastvlm.tokens import Tokenizer

CLIPS = ("clip", "siglip")


def traditional(
    *,
    clip: str,
    llm: str,
    labels: Sequence[str] | str,
    tokenizer: Tokenizer,
    num_labels: int = 3,
    num_tokens: int = 32,
    photo: str = "a photo of {}",
    said: str = "an image of {}",
    attention: str = "auto",
    gradient_checkpointing: bool = False,
    dtype: str = "float32",
) -> PretrainedVLM:
    """Build a model in which CLIP picks the labels most similar to an image and the language model reads their text.

    This is CLIP's zero-shot classification (arXiv 2103.00020, section 3.1): labels are embedded as text, and the
    image's nearest ones, in order of similarity, fill the image's slots in the prompt.

    Args:
        clip: folder or hub id of a CLIP or SigLIP, with both towers.
        llm: folder or hub id of a causal language model.
        labels: names of what an image may show, or a text file with one per line.
        tokenizer: the language model's tokenizer.
        num_labels: number of labels per image.
        num_tokens: slots per image; longer text is cut off.
        photo: text that CLIP embeds for a label, with `{}` for the label.
        said: text that the language model reads, with `{}` for the labels joined by commas.
        attention, gradient_checkpointing, dtype: as in the language model's `from_pretrained`; `dtype` also of CLIP.

    Raises:
        ValueError: no model or processor there, another kind of model, no labels, or no `{}` in `photo` or `said`.
    """
    if isinstance(labels, str):
        try:
            labels = Path(labels).read_text().splitlines()
        except OSError as error:
            raise ValueError(f"vlm.labels={labels}: {error.strerror}; name a text file with one label a line") from None
    labels = [label.strip() for label in labels if label.strip()]
    if not labels:
        raise ValueError("vlm.labels is empty; name what an image may show, such as [cat, dog, car]")
    for key, value in (("photo", photo), ("said", said)):
        if "{}" not in value:
            raise ValueError(f"vlm.{key}={value!r} has no {{}} where the label goes")
    what, mend = f"vlm.clip={clip}", "name a folder of a CLIP or SigLIP with its processor, or a hub id while online"
    options = {"dtype": getattr(torch, dtype), "output_loading_info": True}
    both, told = fetch(lambda: AutoModel.from_pretrained(clip, **options), what=what, mend=mend)
    refuse_misfits(told, what)
    if both.config.model_type not in CLIPS:
        raise ValueError(f"{what} holds a {both.config.model_type}; the kinds known are {', '.join(CLIPS)}")
    processor = fetch(lambda: AutoImageProcessor.from_pretrained(clip), what=what, mend=mend)
    words = fetch(lambda: AutoTokenizer.from_pretrained(clip), what=what, mend=mend)
    language = load_llm(
        llm,
        vocab_size=len(tokenizer),
        attention=attention,
        gradient_checkpointing=gradient_checkpointing,
        dtype=dtype,
    )
    length = both.config.text_config.max_position_embeddings
    ids = words(
        [photo.format(label) for label in labels],
        # SigLIP was trained on texts padded to their full length.
        padding="max_length" if both.config.model_type == "siglip" else True,
        truncation=True,
        max_length=length,
        return_tensors="pt",
    )
    with torch.no_grad():
        # SigLIP does not mask padding.
        seen = {"input_ids": ids["input_ids"]} if both.config.model_type == "siglip" else ids
        texts = both.eval().get_text_features(**seen).pooler_output
    encoder = PooledTower(both, mean=processor.image_mean, std=processor.image_std)
    return PretrainedVLM(
        encoder,
        IdentityResampler(in_dim=encoder.out_dim),
        Likeness(texts),
        language,
        image_token_id=tokenizer.image_id,
        arrangement=Words(
            labels, tokenizer=tokenizer, llm=language, said=said, num_labels=num_labels, num_tokens=num_tokens
        ),
        config=both.config,
    ).eval()


class PooledTower(nn.Module):
    """CLIP's image tower and projection, which map a view to one vector."""

    def __init__(self, clip: nn.Module, *, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.vision = clip.vision_model
        self.projection = getattr(clip, "visual_projection", nn.Identity())
        self.mean, self.std = tuple(mean), tuple(std)
        vision = clip.config.vision_config
        self.image_size = vision.image_size
        self.out_dim = getattr(clip.config, "projection_dim", None) or vision.hidden_size
        if isinstance(self.projection, nn.Identity):
            self.out_dim = vision.hidden_size

    def grid(self, image_size: int) -> tuple[int, int]:
        if image_size != self.image_size:
            raise ValueError(f"image_size={image_size}, but this CLIP has positions for {self.image_size}")
        return 1, 1

    def num_patches(self, image_size: int) -> int:
        height, width = self.grid(image_size)
        return height * width

    def forward(self, images: Float[Tensor, "I 3 H W"]) -> Float[Tensor, "I 1 D"]:
        self.grid(images.shape[-1])
        return self.projection(self.vision(images).pooler_output)[:, None]


class Likeness(nn.Module):
    """Cosine similarity of an image's vector with every label's."""

    def __init__(self, texts: Float[Tensor, "L D"]):
        super().__init__()
        self.register_buffer("texts", F.normalize(texts, dim=-1))

    def forward(self, tokens: Float[Tensor, "I 1 D"]) -> Float[Tensor, "I 1 L"]:
        return F.normalize(tokens, dim=-1) @ self.texts.to(tokens.dtype).T


class Words:
    """Arrangement that embeds the global view's most similar labels as text for the language model."""

    def __init__(
        self,
        labels: Sequence[str],
        *,
        tokenizer: Tokenizer,
        llm: LanguageModel,
        said: str,
        num_labels: int,
        num_tokens: int,
    ):
        self.labels, self.tokenizer, self.llm, self.said = list(labels), tokenizer, llm, said
        self.num_labels, self.num_tokens = min(num_labels, len(labels)), num_tokens

    def slots(self, tokens: int) -> int:
        return self.num_tokens

    def text(self, likeness: Float[Tensor, "L"]) -> str:
        return self.said.format(", ".join(self.labels[i] for i in likeness.topk(self.num_labels).indices.tolist()))

    def __call__(self, views: Float[Tensor, "v 1 L"], layout: tuple[int, int, int, int] | None) -> Tensor:
        ids = self.tokenizer.encode_text(self.text(views[0, 0]))[: self.num_tokens]
        return self.llm.embed(torch.tensor(ids, device=views.device))
