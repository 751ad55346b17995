"""Load an encoder's weights strictly from a local file, in any of the formats they are published in."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from fastvlm.models.hub import fetch, refuse_differences


def load_weights(model: nn.Module, path: str) -> None:
    """Load a checkpoint into `model`, in place.

    Its keys may have any common prefix, or be in the format the model was published in: timm converts OpenAI's and
    open_clip's CLIP, Meta's DINOv2, Apple's MobileCLIP and others. Every weight of the model must be present; extra
    ones (classifier, pooling, other towers) are ignored. Learned positions of another grid are interpolated.

    Raises:
        ValueError: the file cannot be read, or tensors are missing or of another shape; the message lists them.
    """
    if not Path(path).is_file():
        raise ValueError(f"encoder.checkpoint={path}: no such file; name a .safetensors or .pt file of its weights")
    state = fetch(
        lambda: timm.models.load_state_dict(path),
        what=f"encoder.checkpoint={path}",
        mend="name a .safetensors or .pt file of its weights",
    )
    wanted = model.state_dict()
    state = below_prefix(state, wanted)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        # For another model's weights it returns nothing useful or raises anything; both are reported below.
        with torch.no_grad(), suppress(Exception):
            state = convert(state, model)
    if not any(key in wanted for key in state):
        first = next(iter(wanted))
        raise ValueError(f"encoder.checkpoint={path} holds no {first}: these are not weights of this model")
    refuse_differences(wanted, state, what=f"encoder.checkpoint={path}", mend="name a checkpoint of encoder.name")
    model.load_state_dict({key: state[key] for key in wanted})


def below_prefix(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Strip the prefix under which `state` holds the wanted keys; return all of `state` if there is none."""
    first = next(iter(wanted))
    held = [key.removesuffix(first) for key in state if key == first or key.endswith("." + first)]
    if not held:
        return dict(state)
    return {key.removeprefix(held[0]): value for key, value in state.items() if key.startswith(held[0])}
