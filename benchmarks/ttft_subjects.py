"""Models for `ttft.py`: stock classes with random weights, since time does not depend on the weights.

timm's fastvit_mci3 (FastViTHD) and transformers' SigLIP, CLIP and Qwen2-0.5B, with our projector and perceiver.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Subject:
    """One row of the results: encoder, image size in pixels, tiles and resampler."""

    name: str
    encoder: str
    image_size: int
    tiles: tuple[tuple[int, int], ...] | None = None
    resampler: str = "identity"

    @property
    def idle_levers(self) -> set[str]:
        """Levers that do not apply to this encoder."""
        return set() if self.encoder == "fastvithd" else {"reparameterize", "channels_last", "depthwise"}


SUBJECTS = {
    s.name: s
    for s in (
        *(Subject(f"fastvlm-{px}", "fastvithd", px) for px in (256, 512, 768, 1024)),
        Subject("clip-l-336", "clip", 336),
        Subject("perceiver-64", "clip", 336, resampler="perceiver"),
        Subject("siglip-so400m", "siglip", 384),
        Subject("llava-onevision", "siglip", 384, tiles=((3, 3),)),
    )
}


def build(subject: Subject):
    """Build the complete model with random weights."""
    import torch
    from torch import nn
    from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

    from fastvlm.models.encoders.timm_encoder import TimmEncoder
    from fastvlm.models.llms.language_model import from_config
    from fastvlm.models.projectors.mlp import MLPProjector
    from fastvlm.models.resamplers.identity import IdentityResampler
    from fastvlm.models.resamplers.perceiver import PerceiverResampler
    from fastvlm.models.vlm import VLM

    class Stock(nn.Module):
        """A vision transformer from transformers as an encoder."""

        def __init__(self, model, *, prefix: int):
            super().__init__()
            self.model, self.prefix, config = model, prefix, model.config
            self.out_dim, self.patch = config.hidden_size, config.patch_size
            self.mean, self.std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

        def num_patches(self, image_size: int) -> int:
            return (image_size // self.patch) ** 2

        def forward(self, images):
            return self.model(images).last_hidden_state[:, self.prefix :]

    torch.manual_seed(0)
    if subject.encoder == "fastvithd":
        encoder = TimmEncoder("fastvit_mci3", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    elif subject.encoder == "clip":
        sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
        config = CLIPVisionConfig(num_hidden_layers=23, image_size=336, patch_size=14, **sizes)
        encoder = Stock(CLIPVisionModel(config), prefix=1)
    else:
        sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16}
        config = SiglipVisionConfig(num_hidden_layers=26, image_size=384, patch_size=14, vision_use_head=False, **sizes)
        encoder = Stock(SiglipVisionModel(config), prefix=0)
    resampler = (
        IdentityResampler(in_dim=encoder.out_dim)
        if subject.resampler == "identity"
        else PerceiverResampler(in_dim=encoder.out_dim, num_tokens=64)
    )
    llm = from_config(
        "qwen2",
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
    )
    projector = MLPProjector(in_dim=resampler.out_dim, out_dim=llm.dim)
    return VLM(encoder, resampler, projector, llm, image_token_id=0).eval().requires_grad_(False)
