"""Small parts and batches for the tests of models."""

import torch

from fastvlm.batch import Batch
from fastvlm.models.encoders.fastvit import FastViT
from fastvlm.models.llms import from_config
from fastvlm.models.projectors.mlp import MLPProjector
from fastvlm.models.resamplers.avgpool import AvgPoolResampler
from fastvlm.models.vlm import VLM

VOCAB, IMAGE_ID = 64, 5
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def small_llm(model_type="llama", **options):
    torch.manual_seed(0)
    return from_config(model_type, vocab_size=VOCAB, num_key_value_heads=2, **SIZES, **options)


def small_encoder(**options):
    defaults = {"dims": [8, 32], "depths": [1, 1], "attention": [False, True], "mlp_ratio": 2.0, "layer_scale": 0.5}
    torch.manual_seed(0)
    return FastViT(**(defaults | options))


def small_vlm(**options):
    encoder, llm = small_encoder(), small_llm(**options)
    resampler = AvgPoolResampler(in_dim=encoder.out_dim, num_tokens=4)
    projector = MLPProjector(in_dim=resampler.out_dim, out_dim=llm.dim)
    return VLM(encoder, resampler, projector, llm, image_token_id=IMAGE_ID)


def make_batch(
    rows: list[list[list[int]]], *, images: int = 0, image_size: int = 16, length: int | None = None
) -> Batch:
    """Rows of packed samples given as ids; everything is learned; right padding."""
    length = length or max(sum(map(len, row)) for row in rows)
    ids, segments, positions = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(3))
    for r, row in enumerate(rows):
        start = 0
        for s, sample in enumerate(row):
            end = start + len(sample)
            ids[r, start:end], segments[r, start:end] = torch.tensor(sample), s + 1
            positions[r, start:end] = torch.arange(len(sample))
            start = end
    labels = torch.where((segments > 0) & (ids != IMAGE_ID), ids, -100)
    generator = torch.Generator().manual_seed(1)
    return Batch(
        input_ids=ids,
        labels=labels,
        position_ids=positions,
        segment_ids=segments,
        source_ids=torch.where(segments > 0, 0, -1),
        pixel_values=torch.randint(0, 256, (images, 3, image_size, image_size), generator=generator, dtype=torch.uint8),
        num_answer_tokens=int((labels != -100).sum()),
        num_planned_images=images,
        sources=("only",),
    )


def random_ids(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(6, VOCAB, (n,), generator=generator).tolist() for n in lengths]
