"""Weights, gradients and optimiser state in shards over the ranks: torch's FSDP2 on our parts, and DeepSpeed's."""

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
    """Shard `module` in place: every layer of a part is gathered alone, then what is left of it, then the rest.

    Args:
        module: the root; what is read outside of a part's forward (embeddings, heads) belongs to it.
        parts: by name; encoder, resampler and projector are called as modules, the language model by its methods.
        methods: of the root, what it is entered by; the weights of the root are whole inside them.

    Raises:
        ValueError: a parameter without dimensions, which cannot be cut.
    """
    scalars = [name for name, p in module.named_parameters() if p.ndim == 0]
    if scalars:
        raise ValueError(
            f"hardware.strategy=fsdp cannot shard {scalars[0]}, a single number; use hardware.strategy=ddp"
        )
    # Codes of quantised layers stay whole: their few bits have no common dtype to be sent in.
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
    """Copy every weight that learns, and all buffers of rank 0, from a sharded module into its plain twin.

    Every rank must call it, and has the whole model afterwards.
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
    """Running statistics of the norms that learn, as rank 0 has them: what DDP does before every forward pass."""
    for one in module.modules():
        if isinstance(one, nn.modules.batchnorm._BatchNorm) and one.training:
            for buffer in one.buffers(recurse=False):
                dist.broadcast(buffer, src=0)
