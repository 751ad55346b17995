"""Gradient checkpointing: layers recompute their activations in the backward pass instead of keeping them."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastvlm.models.trainable import layers_of


class Recomputed:
    """Mixin, placed before a layer's class, that checkpoints its forward pass while gradients are enabled.

    transformers' own checkpointing is off in eval mode, and therefore in a frozen language model through which the
    projector's gradients flow, where it is needed most.
    """

    def forward(self, *args, **options):
        if torch.is_grad_enabled():
            return checkpoint(super().forward, *args, use_reentrant=False, **options)
        return super().forward(*args, **options)


def recompute_layers(parts: dict[str, nn.Module]) -> list[str]:
    """Enable recomputation in every layer of these parts; return the names of the parts that have such layers.

    Parts with BatchNorm are left unchanged: their statistics would be updated twice per step.
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
