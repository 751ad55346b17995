"""Count a module's FLOPs on the meta device; a multiply-add is two FLOPs, as in torch's counter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

M = TypeVar("M", bound=nn.Module)


def meta_twin(module: M) -> M:
    """Return a copy of the module on the meta device, in eval mode; it takes no memory."""
    tensors = chain(module.parameters(), module.buffers())
    as_meta = lambda t: nn.Parameter(t.to("meta"), False) if isinstance(t, nn.Parameter) else t.to("meta")
    return copy.deepcopy(module, {id(t): as_meta(t) for t in tensors}).eval()


@contextmanager
def counting() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the number of FLOPs counted in the block so far."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        yield counter.get_total_flops


def count_flops(module: nn.Module, *shapes: tuple[int, ...]) -> int:
    """Return the FLOPs of one forward pass on inputs of these shapes."""
    twin = meta_twin(module)
    with counting() as so_far:
        twin(*(torch.zeros(shape, device="meta") for shape in shapes))
        return so_far()
