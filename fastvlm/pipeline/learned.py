"""What a stage trains, worked out on shapes before any stage runs."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from fastvlm.callbacks.freezing import StageFreezing
from fastvlm.models.memory import copy_with, shape_of
from fastvlm.models.vlm import VLM


def build_freezing(name: str, stage: dict, *, quantise: str | None, path: Path) -> StageFreezing:
    """Build the StageFreezing callback of a stage's resolved configuration, with the hardware's `quantise`."""
    return StageFreezing(
        stage["trainable"],
        path=path,
        last_layers=stage["last_layers"],
        lora=stage["lora"],
        adapt=stage["adapt"],
        quantise=quantise,
        name=name,
    )


def count_learned(name: str, stage: DictConfig, model: VLM) -> int:
    """Number of parameters a stage trains, adapters included; see `what_learns`."""
    return sum(parameter.numel() for parameter in what_learns(name, stage, model).values())


def what_learns(name: str, stage: DictConfig, model: VLM) -> dict[str, nn.Parameter]:
    """Return the parameters a stage trains, adapters included, on the meta device: `model` stays as it is.

    Raises:
        ValueError: a pattern, a layer count or an adapter's targets do not fit the model, a part learns that is not one
            of the stage's, or a parameter has 16 bits.
    """
    freezing = build_freezing(name, OmegaConf.to_container(stage, resolve=True), quantise=None, path=Path("unused"))
    shapes = copy_with(model, lambda tensor: shape_of(tensor, "meta"))
    with torch.random.fork_rng(devices=[]):  # peft draws an adapter's first weights before it moves them
        rates = freezing.adapted(shapes)
    # The stage's identity covers its parts alone: another run could go on with this one's weights unawares.
    if others := sorted({key.split(".")[0] for key in rates} - set(stage.parts)):
        part = others[0]
        key = f"stages.{name}.{'adapt' if part in stage.adapt else 'trainable'}.{part}"
        raise ValueError(
            f"{key}: {part} learns, but stages.{name}.parts=[{', '.join(stage.parts)}] is without it; set {key}=null, "
            f"or add {part} to stages.{name}.parts"
        )
    learns = {key: parameter for key, parameter in shapes.named_parameters() if key in rates}
    for key, parameter in learns.items():
        if parameter.itemsize < 4:  # an update smaller than half a step of the format changes nothing
            kind, part = str(parameter.dtype).removeprefix("torch."), key.split(".")[0]
            raise ValueError(
                f"stages.{name}.trainable: {key} is held in {kind}, in which small updates are lost; set "
                f"llm.dtype=float32 (vlm.dtype of a whole model), or freeze {part} and adapt it by "
                f"stages.{name}.adapt.{part}='{{method: lora, lr: 1e-4}}'"
            )
    return learns
