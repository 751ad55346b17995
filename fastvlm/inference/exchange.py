"""Replace layers of a model by faster equivalents."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def exchange(module: nn.Module, *, fits: Callable[[nn.Module], bool], make: Callable[[nn.Module], nn.Module]) -> int:
    """Replace every layer inside a module for which `fits` is true by `make(layer)`, in place; return their number.

    A layer that is used in several places gets a separate replacement in each.
    """
    count = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if fits(child):
                setattr(parent, name, make(child))
                count += 1
    return count
