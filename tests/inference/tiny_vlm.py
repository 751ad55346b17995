"""A VLM of a few thousand random weights whose answers vary with the prompt and with the image."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from fastvlm.models.encoders.fastvit import FastViT
from fastvlm.models.llms.language_model import from_config
from fastvlm.models.projectors.mlp import MLPProjector
from fastvlm.models.resamplers.avgpool import AvgPoolResampler
from fastvlm.models.vlm import VLM
from fastvlm.tokens import Tokenizer

IMAGE_SIZE = 32
TOKENS_PER_IMAGE = 4


def build_model(tokenizer: Tokenizer, *, seed: int = 0, max_positions: int = 256) -> VLM:
    torch.manual_seed(seed)
    encoder = FastViT(dims=[8, 16], depths=[1, 1], attention=[False, True], mlp_ratio=2.0)
    resampler = AvgPoolResampler(in_dim=encoder.out_dim, num_tokens=TOKENS_PER_IMAGE)
    llm = from_config(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=max_positions,
        initializer_range=0.3,  # at the usual 0.02 a random model repeats one token whatever it reads
    )
    projector = MLPProjector(in_dim=resampler.out_dim, out_dim=llm.dim)
    model = VLM(encoder, resampler, projector, llm, image_token_id=tokenizer.image_id)
    # Statistics of the norms: without them all images look alike to random weights.
    with torch.no_grad():
        for _ in range(30):
            encoder(model.normalise(torch.stack([draw_image(i) for i in range(8)])))
    return model.eval()


def draw_image(seed: int) -> torch.Tensor:
    return torch.from_numpy(draw_pixels(seed)).permute(2, 0, 1).contiguous()


def draw_pixels(seed: int) -> np.ndarray:
    """Coarse noise: fine noise averages out, and every image would look the same to the model."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((IMAGE_SIZE // 4, IMAGE_SIZE // 4, 1), dtype=np.uint8))


def draw_png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(draw_pixels(seed)).save(file, "png")
    return file.getvalue()
