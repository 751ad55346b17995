"""Print docs/parts.md: parameters, FLOPs and tokens of every full-size option, counted on the meta device.

    python scripts/parts.py > docs/parts.md     # about two minutes on one core, 1 GB, no download

A GFLOP is 1e9 floating-point operations as torch's FlopCounterMode counts them: two for each multiply-add; norms,
activations and the softmax are not counted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fastvlm.build import instantiate  # noqa: E402
from fastvlm.config import compose  # noqa: E402
from fastvlm.models.flops import count_flops, counting  # noqa: E402
from fastvlm.models.llms import from_config  # noqa: E402
from fastvlm.models.llms.published import PUBLISHED  # noqa: E402

# Weights come from a file or the hub; the table needs shapes only.
LOCAL, BARE = {"pretrained": False}, {"pretrained": None, "device": "meta"}
ENCODERS = {
    "fastvithd": ({"checkpoint": None}, (256, 512, 768, 1024, 1536)),
    "multi_scale": ({"encoder": {"checkpoint": None}}, (768, 1024)),
    "early_exit": ({"encoder": {"checkpoint": None}}, (512, 1024)),
    "multi_granularity": ({"coarse": BARE, "fine": LOCAL}, (336,)),
    "mobileclip2_s0": (LOCAL, (256, 1024)),
    "mobileclip2_s3": (LOCAL, (256, 1024)),
    "mobileclip2_s4": (LOCAL, (256, 1024)),
    "fastvit_mci2": (LOCAL, (256, 768)),
    "clip_vit_l14_336": (BARE, (336,)),
    "siglip_l16_384": (LOCAL, (384,)),
    "siglip_so400m_384": (LOCAL, (384,)),
    "siglip2_l16_384": (LOCAL, (384,)),
    "siglip2_so400m_384": (LOCAL, (384,)),
    "dinov2_l14": (LOCAL | {"interpolate": True}, (336, 518)),
    "dinov3_l16": (LOCAL, (512,)),
    "convnext_l_320": (LOCAL, (320, 512)),
    "convnext_xxl": (LOCAL, (256, 512)),
}
LLMS = ("qwen2_5_0_5b", "qwen2_5_1_5b", "qwen2_5_7b", "qwen3_0_6b", "qwen3_1_7b", "llama3_2_1b", "vicuna_7b")
LLMS += ("smollm2_135m", "smollm2_360m", "smollm2_1_7b", "opt_125m", "opt_1_3b")
PATCHES, WIDTH = 576, 1024  # CLIP ViT-L/14 at 336 px, in front of the resamplers
RESAMPLERS = {
    "identity": {},
    "avgpool": {"num_tokens": 144},
    "adaptive_pool": {"num_tokens": 144},
    "pixel_shuffle": {},
    "perceiver": {"num_tokens": 144, "heads": 16},
    "attention_pool": {"num_tokens": 144, "heads": 16},
    "c_abstractor": {"num_tokens": 144},
    "d_abstractor": {"num_tokens": 144, "heads": 16},
    "qformer_blip2": {},
    "token_select": {"num_tokens": 144},
    "token_merge": {"num_tokens": 144},
}
TOKENS, TEXT_WIDTH = 144, 3584  # into Qwen2.5-7B
PROJECTORS = {
    "linear": {},
    "mlp": {},
    "cross_modal": {"attention": "full", "heads": 16},
    "cross_modal, linear": {"attention": "linear", "heads": 16},
    "cross_modal, sparse": {"attention": "sparse", "heads": 16},
    "cross_modal, strided": {"attention": "strided", "heads": 16},
}
VISUAL, TEXT = 256, 32  # FastViTHD at 1024 px and a short question

number = lambda module: sum(p.numel() for p in module.parameters())
millions = lambda n: f"{n / 1e6:,.2f}" if n < 1e8 else f"{n / 1e6:,.1f}"
giga = lambda n: f"{n / 1e9:,.2f}" if n < 1e11 else f"{n / 1e9:,.0f}"
Row = dict[str, str]


def part(group: str, name: str, overrides: dict, **widths):
    """Build the part that an option names, on the meta device."""
    config = OmegaConf.load(ROOT / "conf" / group / f"{name}.yaml")
    if "defaults" in config:  # composed of other options
        config = compose("train", [f"{group}={name}"])[group]
        OmegaConf.set_struct(config, False)
    with torch.device("meta"):
        return instantiate(OmegaConf.merge(config, overrides), key=group, **widths).eval()


def encoder_rows(*, flops: bool) -> Iterable[Row]:
    for name, (overrides, sizes) in ENCODERS.items():
        encoder = part("encoder", name, overrides)
        for size in sizes:
            row = {"option": name, "image": f"{size}", "width": f"{encoder.out_dim:,}"}
            row["parameters (M)"] = millions(number(encoder))
            if hasattr(encoder, "tokens_at"):
                costs = encoder.flops_at(size) if flops else [0] * (len(encoder.exits) + 1)
                for i, (tokens, cost) in enumerate(zip(encoder.tokens_at(size), costs)):
                    where = f"exit {i + 1}" if i < len(encoder.exits) else "end"
                    yield row | {"option": f"{name}, {where}", "tokens": f"{tokens:,}", "GFLOPs": giga(cost)}
                continue
            kinds = (("global view", None), ("tile", True)) if getattr(encoder, "reads_views", False) else (("", None),)
            for kind, tile in kinds:
                cost = 0
                if flops:
                    with counting() as so_far, torch.device("meta"):
                        if tile:
                            encoder.fine_mlp(encoder.fine(torch.zeros(1, 3, size, size)))
                        elif kind:
                            encoder.coarse_mlp(encoder.coarse(torch.zeros(1, 3, size, size)))
                        else:
                            encoder(torch.zeros(1, 3, size, size))
                        cost = so_far()
                label = f"{name}, {kind}" if kind else name
                yield row | {"option": label, "tokens": f"{encoder.num_patches(size):,}", "GFLOPs": giga(cost)}


def resampler_rows(*, flops: bool) -> Iterable[Row]:
    for name, overrides in RESAMPLERS.items():
        resampler = part("resampler", name, overrides, in_dim=WIDTH)
        yield {
            "option": name,
            "tokens": str(resampler.num_tokens_out(PATCHES)),
            "width": f"{resampler.out_dim:,}",
            "parameters (M)": millions(number(resampler)),
            "GFLOPs": giga(count_flops(resampler, (1, PATCHES, WIDTH)) if flops else 0),
        }


def projector_rows(*, flops: bool) -> Iterable[Row]:
    for name, overrides in PROJECTORS.items():
        projector = part("projector", name.split(",")[0], overrides, in_dim=WIDTH, out_dim=TEXT_WIDTH)
        yield {
            "option": name,
            "parameters (M)": millions(number(projector)),
            "GFLOPs": giga(count_flops(projector, (1, TOKENS, WIDTH)) if flops else 0),
        }


def published(name: str) -> dict:
    return PUBLISHED[OmegaConf.load(ROOT / "conf" / "llm" / f"{name}.yaml").path]


@cache
def language_model(name: str):
    """Build the language model of an option in its published sizes, on the meta device."""
    with torch.device("meta"):
        return from_config(attention="eager", **published(name)).eval()


def llm_rows(*, flops: bool) -> Iterable[Row]:
    for name in LLMS:
        llm, of = language_model(name), published(name)
        dim, depth, heads = of["hidden_size"], of["num_hidden_layers"], of["num_attention_heads"]
        cache = 2 * depth * of.get("num_key_value_heads", heads) * of.get("head_dim", dim // heads) * 2
        cost = 0
        if flops:
            with counting() as so_far, torch.device("meta"):
                shape = (1, VISUAL + TEXT)
                ids = torch.zeros(shape, dtype=torch.long)
                llm.head(llm.hidden(torch.zeros(*shape, dim), ids, torch.ones_like(ids))[:, -1])
                cost = so_far()
        yield {
            "option": name,
            "width": f"{dim:,}",
            "layers": str(depth),
            "vocabulary": f"{of['vocab_size']:,}",
            "positions": f"{of['max_position_embeddings']:,}",
            "parameters (M)": millions(number(llm)),
            "cache (KiB a token, bf16)": f"{cache / 1024:g}",
            "prefill GFLOPs": giga(cost),
        }


def markdown(rows: Iterable[Row]) -> str:
    rows = list(rows)
    lines = [list(rows[0]), ["---", *["---:"] * (len(rows[0]) - 1)], *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def document(*, flops: bool = True) -> str:
    """Return the text of docs/parts.md; without `flops`, which takes only seconds, those columns are zero."""
    return f"""# Parts

Made by `python scripts/parts.py > docs/parts.md` on the meta device: shapes, no weights. Parameters are those the part
keeps: layers above the one taken, poolings, classifiers and text towers are left out. A GFLOP is 1e9 operations, two
for each multiplication with addition; norms, activations and softmax are not counted. Small forms for a CPU
(`fastvit_micro`, `llama_micro`, ...) are not listed.

## Encoders

One view. `image` is its side in pixels, `tokens` the patches it yields.

{markdown(encoder_rows(flops=flops))}

`early_exit`: what an image costs that leaves there, gates and one head included; all parameters stand in memory.
`multi_granularity` keeps both encoders; a view pays for one. `timm` and `transformers` take any model of theirs by
name.

## Resamplers

Behind {PATCHES} patches of width {WIDTH:,} (CLIP ViT-L/14 at 336 px); one image. `token_select` with `min_tokens` keeps
from that many to `num_tokens`.

{markdown(resampler_rows(flops=flops))}

## Projectors

{TOKENS} tokens of width {WIDTH:,} to {TEXT_WIDTH:,} (Qwen2.5-7B).

{markdown(projector_rows(flops=flops))}

## Language models

Prefill: {VISUAL} visual and {TEXT} text positions, logits of the last one.

{markdown(llm_rows(flops=flops))}
"""


if __name__ == "__main__":
    print(document(), end="")
