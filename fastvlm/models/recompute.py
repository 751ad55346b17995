"""Gradient checkpointing: layers keep no activations and recompute them in the backward pass."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastvlm.models.trainable import layers_of


class Recomputed:
    """Mixed in before a layer's own class. Without gradients (generation, a cache) it is the layer as it was.

    transformers' own checkpointing is off in eval mode, and so in a frozen language model through which the projector's
    gradients flow; that is where it is needed most.
    """

    def forward(self, *args, **options):
        if torch.is_grad_enabled():
            return checkpoint(super().forward, *args, use_reentrant=False, **options)
        return super().forward(*args, **options)


def recompute_layers(parts: dict[str, nn.Module]) -> list[str]:
    """Let every layer of these parts recompute its activations; returns the parts that have such layers.

    A part with BatchNorm is left as it is: its statistics would move twice a step.
    """
    taken = []
    for name, part in parts.items():
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in part.modules()):
            continue
        layers = layers_of(part)
        for layer in layers:
            kind = type(layer)
            if not issubclass(kind, Recomputed):
                layer.__class__ = type(kind.__name__, (Recomputed, kind), {"__module__": kind.__module__})
        taken += [name] if layers else []
    return taken
