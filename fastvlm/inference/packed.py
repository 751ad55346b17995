"""Linear layers whose weights are laid out once for oneDNN's products on a CPU.

`torch`'s own product of float32 rows lays nothing out: of one row it is slow to read a weight that lies in no cache, of
many it leaves half of what AVX-512 could do. oneDNN's is the same sum in another order.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fastvlm.inference.exchange import exchange

SMALLEST = 1 << 16  # weights of a layer; below, a call costs more than the layout saves
ROWS = 256  # oneDNN chooses the layout for this many rows; that for one row was slower even with one row
DTYPES = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Module):
    """`nn.Linear` without its plain weight: `state_dict`, copies and pickles hold that, and make the layout anew.

    Forward raises RuntimeError for rows of another precision than the weight's.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = pack(linear.weight.detach())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    @property
    def weight(self) -> Tensor:
        """The layout itself: it tells precision, device and shape, and refuses arithmetic with plain tensors."""
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
    """The weight in oneDNN's layout, an opaque tensor; `to_dense` gives it back bit by bit."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)


def is_packable(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and layer.weight.numel() >= SMALLEST and layer.weight.dtype in DTYPES


def pack_linears(module: nn.Module) -> int:
    """Exchange every large linear layer of a module (in place); returns how many.

    A head tied to the embedding is held twice from then on: rows are looked up in one, multiplied with the other.
    """
    return exchange(module, fits=is_packable, make=PackedLinear)
