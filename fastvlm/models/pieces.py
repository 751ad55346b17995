"""Access to sharded tensors, under torch's FSDP2 or DeepSpeed's ZeRO stage 3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.distributed.tensor import DTensor


def is_shard(tensor: Tensor) -> bool:
    """Whether this rank holds only a shard of the tensor."""
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")


def held_of(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, or the tensor itself if it is not sharded."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return tensor.ds_tensor if hasattr(tensor, "ds_id") else tensor


def size_of(tensor: Tensor) -> int:
    """Return the number of elements of the whole tensor."""
    return tensor.ds_numel if hasattr(tensor, "ds_id") else tensor.numel()


@contextmanager
def whole_of(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the whole tensor, gathered for the duration of the block. Every rank must call this."""
    if hasattr(tensor, "ds_id"):
        import deepspeed  # `zero` is an attribute of it, not an importable module

        with deepspeed.zero.GatheredParameters([tensor]):
            yield tensor
    else:
        yield tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
