"""Shard weights, gradients and optimiser state over ranks with FSDP2; gather them from FSDP2 or DeepSpeed shards."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from fastvlm.models.pieces import whole_of
from fastvlm.models.quantised import quantised_layers
from fastvlm.models.trainable import layers_of


def shard(module: nn.Module, mesh: DeviceMesh, *, parts: dict[str, nn.Module], methods: tuple[str, ...]) -> None:
    """Shard `module` in place. Each layer, the rest of each part, and the rest of the root are gathered separately.

    Args:
        module: the root; it owns what is read outside a part's forward (embeddings, heads).
        mesh: devices to shard over.
        parts: name -> module. Encoder, resampler and projector are called as modules, the language model (`llm`)
            through its methods, so only its layers are units of their own.
        methods: names of the root's methods that run it; its own weights are gathered inside them.

    Raises:
        ValueError: a parameter has no dimensions, so it cannot be sharded.
    """
    scalars = [name for name, p in module.named_parameters() if p.ndim == 0]
    if scalars:
        raise ValueError(
            f"hardware.strategy=fsdp cannot shard {scalars[0]}, a single number; use hardware.strategy=ddp"
        )
    # Quantised codes are not sharded: their packed formats share no dtype in which they could be gathered.
    whole = {p for _, layer in quantised_layers(module) for p in layer.parameters(recurse=False) if not p.requires_grad}
    options = {"mesh": mesh, "reshard_after_forward": True, "ignored_params": whole}
    for name, part in parts.items():
        for layer in layers_of(part):
            fully_shard(layer, **options)
        if name != "llm" and any(True for _ in part.parameters()):
            fully_shard(part, **options)
    fully_shard(module, **options)
    for method in methods:
        register_fsdp_forward_method(module, method)


@torch.no_grad()
def gather(sharded: nn.Module, whole: nn.Module) -> None:
    """Copy the trainable weights and rank 0's buffers from a sharded module into its unsharded copy.

    Every rank must call this, and has the whole model afterwards.
    """
    targets = dict(whole.named_parameters())
    for name, parameter in sharded.named_parameters():
        if parameter.requires_grad:
            with whole_of(parameter) as value:
                targets[name].copy_(value)
    buffers = dict(whole.named_buffers())
    for name, buffer in sharded.named_buffers():
        dist.broadcast(buffer, src=0)
        buffers[name].copy_(buffer)


def share_statistics(module: nn.Module) -> None:
    """Broadcast rank 0's running statistics of BatchNorm layers in train mode, as DDP does before each forward pass."""
    for one in module.modules():
        if isinstance(one, nn.modules.batchnorm._BatchNorm) and one.training:
            for buffer in one.buffers(recurse=False):
                dist.broadcast(buffer, src=0)
