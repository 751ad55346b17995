"""Sum the losses of many steps on the device, so that they are copied to the host only once."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

# Loss entries of a step's output; every other scalar in it is averaged.
OUTPUT_KEYS = {"loss", "loss_sum", "source_loss", "source_tokens"}


class Losses:
    """Sums of loss and learned tokens per source, and means of the other scalars of a step's output, on the device."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.batches = 0

    def add(self, outputs: dict[str, Any]) -> None:
        for key, value in outputs.items():
            if key == "loss" or not isinstance(value, Tensor) or (key not in OUTPUT_KEYS and value.ndim):
                continue
            value = value.detach()
            if key not in OUTPUT_KEYS:
                # The mean of an empty selection is NaN: leave it out of both sum and count.
                self._add(key + "/n", torch.isfinite(value).float())
                value = torch.nan_to_num(value.float(), 0.0, 0.0, 0.0)
            self._add(key, value)
        self.batches += 1

    def _add(self, key: str, value: Tensor) -> None:
        self.sums[key] = self.sums[key] + value if key in self.sums else value.clone()

    def read(self, split: str, sources: tuple[str, ...], trainer: Trainer) -> dict[str, float]:
        """Return the metrics of everything added so far, over all ranks."""
        sums = {k: trainer.strategy.reduce(v, reduce_op="sum").cpu() for k, v in sorted(self.sums.items())}
        out: dict[str, float] = {}
        if "source_loss" in sums and sums["source_loss"].numel():
            loss, tokens = sums["source_loss"].double(), sums["source_tokens"].double()
            if tokens.sum() > 0:
                out[f"{split}/loss"] = float(loss.sum() / tokens.sum())
            for name, value, n in zip(sources, loss.tolist(), tokens.tolist()):
                if n > 0 and len(sources) > 1:
                    out[f"{split}/loss/{name}"] = value / n
        for key in sums:
            if key not in OUTPUT_KEYS and not key.endswith("/n") and sums[key + "/n"] > 0:
                out[f"{split}/{key}"] = float(sums[key] / sums[key + "/n"])
        return out

    def state_dict(self) -> dict[str, Any]:
        return {"sums": {k: v.tolist() for k, v in self.sums.items()}, "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.sums = {k: torch.tensor(v, device=device) for k, v in state["sums"].items()}
        self.batches = state["batches"]
