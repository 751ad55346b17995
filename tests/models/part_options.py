"""Every resampler and projector in small, by the name of its YAML; and how far two tensors are apart."""

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from fastvlm.config import compose
from fastvlm.models.projectors.cross_modal import FORMS, CrossModalAdapter
from fastvlm.models.projectors.linear import LinearProjector
from fastvlm.models.projectors.mlp import MLPProjector
from fastvlm.models.resamplers.adaptive_pool import AdaptivePoolResampler
from fastvlm.models.resamplers.attention_pool import AttentionPoolResampler
from fastvlm.models.resamplers.avgpool import AvgPoolResampler
from fastvlm.models.resamplers.c_abstractor import CAbstractorResampler
from fastvlm.models.resamplers.d_abstractor import DAbstractorResampler
from fastvlm.models.resamplers.identity import IdentityResampler
from fastvlm.models.resamplers.perceiver import PerceiverResampler
from fastvlm.models.resamplers.pixel_shuffle import PixelShuffleResampler
from fastvlm.models.resamplers.qformer import QFormerResampler
from fastvlm.models.resamplers.token_merge import TokenMergeResampler
from fastvlm.models.resamplers.token_select import TokenSelectResampler

SMALL_QFORMER = {"dim": 24, "depth": 2, "heads": 2}
RESAMPLERS = {
    "identity": (IdentityResampler, {}),
    "avgpool": (AvgPoolResampler, {}),
    "adaptive_pool": (AdaptivePoolResampler, {}),
    "pixel_shuffle": (PixelShuffleResampler, {}),
    "perceiver": (PerceiverResampler, {"heads": 2}),
    "attention_pool": (AttentionPoolResampler, {"heads": 2}),
    "c_abstractor": (CAbstractorResampler, {"depth": 1, "positions": 4}),
    "d_abstractor": (DAbstractorResampler, {"depth": 2, "heads": 2, "positions": 4}),
    "qformer": (QFormerResampler, SMALL_QFORMER),
    "qformer_blip2": (QFormerResampler, SMALL_QFORMER),
    "token_select": (TokenSelectResampler, {"positions": 4}),
    "token_merge": (TokenMergeResampler, {}),
}
VARIANTS = {
    "c_abstractor wider": ("c_abstractor", {"dim": 24, "positions": 0}),
    "d_abstractor wider": ("d_abstractor", {"dim": 24, "positions": 0}),
    "attention_pool wider": ("attention_pool", {"dim": 24}),
    "token_select soft": ("token_select", {"gradient": "soft"}),
    "token_select per image": ("token_select", {"min_tokens": 1, "coverage": 0.05}),
    "token_merge slowly": ("token_merge", {"share": 0.2}),
}
PROJECTORS = {
    "linear": (LinearProjector, {}),
    "mlp": (MLPProjector, {}),
    **{f"cross_modal {form}": (CrossModalAdapter, {"attention": form, "heads": 2, "window": 1}) for form in FORMS},
}

# What a YAML alone adds is built as the YAML says.
CONF = Path(__file__).parents[2] / "conf"
NEW_RESAMPLERS = sorted({path.stem for path in (CONF / "resampler").glob("*.yaml")} - set(RESAMPLERS))


def option(group: str, name: str):
    """The configuration of an option, of those made of other options with theirs in it."""
    config = OmegaConf.load(CONF / group / f"{name}.yaml")
    if "defaults" in config:
        config = compose("train", [f"{group}={name}"])[group]
        OmegaConf.set_struct(config, False)
    return config


def build_resampler(name: str, *, in_dim: int, num_tokens: int | None, **options):
    if name in NEW_RESAMPLERS:
        return instantiate(OmegaConf.load(CONF / "resampler" / f"{name}.yaml"), in_dim=in_dim)
    if name in VARIANTS:
        name, more = VARIANTS[name]
        options = more | options
    cls, defaults = RESAMPLERS[name]
    if num_tokens is not None:
        options["num_tokens"] = num_tokens
    return cls(in_dim=in_dim, **(defaults | options))


def build_projector(name: str, *, in_dim: int, out_dim: int, **options):
    cls, defaults = PROJECTORS[name]
    return cls(in_dim=in_dim, out_dim=out_dim, **(defaults | options))


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Largest difference over the largest value."""
    assert ours.shape == reference.shape
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).abs().max() / reference.abs().max())
