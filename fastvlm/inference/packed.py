"""Linear layers with weights prepacked for oneDNN's matrix products on a CPU.

`torch`'s own float32 product does not pack weights: for one row it reads a weight outside the CPU caches slowly, for
many rows it reaches half of what AVX-512 could do. oneDNN computes the same sums in another order.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fastvlm.inference.exchange import exchange

SMALLEST = 1 << 16  # weights of a layer; in smaller ones a call costs more than packing saves
ROWS = 256  # rows for which oneDNN chooses the layout; the one for a single row was slower even with a single row
DTYPES = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Module):
    """`nn.Linear` that holds only the packed weight; `state_dict`, copies and pickles hold the plain one and repack it.

    An input that needs a gradient is multiplied by the plain weight, because oneDNN's product has no derivative.
    Forward raises RuntimeError if the input's dtype differs from the weight's.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = pack(linear.weight.detach())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        if torch.is_grad_enabled() and x.requires_grad:
            return nn.functional.linear(x, self.packed.to_dense(), self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    @property
    def weight(self) -> Tensor:
        """The packed weight: it has dtype, device and shape, but raises on arithmetic with plain tensors."""
        return self.packed

    def _apply(self, fn, recurse: bool = True):
        probe = fn(torch.empty(1, dtype=self.packed.dtype))
        if probe.device.type != "cpu" or probe.dtype not in DTYPES:
            raise ValueError(
                f"levers=packed: packed weights stay on the CPU in float32 or bfloat16, not {probe.dtype} "
                f"on {probe.device}; move the model before its levers are pulled"
            )
        if probe.dtype != self.packed.dtype:
            self.packed = pack(fn(self.packed.to_dense()))
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.packed.to_dense()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        name = prefix + "weight"
        if name in unexpected:
            unexpected.remove(name)
        given = state_dict.get(name)
        if given is None:
            missing.append(name)
        elif given.shape != self.packed.shape:
            errors.append(f"{name}: {tuple(given.shape)} in the checkpoint, {tuple(self.packed.shape)} in the model")
        else:
            self.packed = pack(given.detach().to(self.packed.dtype))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"packed": self.packed.to_dense()}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.packed = pack(self.packed)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def pack(weight: Float[Tensor, "O I"]) -> Tensor:
    """Return the weight in oneDNN's layout, an opaque tensor; `to_dense` restores it bit for bit."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)


def is_packable(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and layer.weight.numel() >= SMALLEST and layer.weight.dtype in DTYPES


def pack_linears(module: nn.Module) -> int:
    """Replace every large linear layer of a module in place; return their number.

    A head tied to the embedding is stored twice afterwards: plain for look-ups, packed for the product.
    """
    return exchange(module, fits=is_packable, make=PackedLinear)
