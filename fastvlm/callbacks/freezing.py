"""Freezing, applied and proved: what learns is named once, shown once, and everything else keeps its bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn

from fastvlm.models.trainable import add_lora, apply_trainable, last_layers, merge_lora, select_trainable


def digest(tensor: Tensor) -> str:
    """Hash of a tensor's very bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.blake2b(flat.view(torch.uint8).numpy().data, digest_size=16).hexdigest()


class StageFreezing(L.Callback):
    """Applies a stage's `trainable` patterns and proves them.

    Before the first step every tensor of the model, parameters and buffers, is hashed. After the first optimiser step
    and again at the end a table says, per part and learning rate, how many tensors there are and how many moved; a
    frozen tensor that moved stops the run.

    Args:
        trainable: pattern over parameter names -> learning rate; null excludes. The longest matching pattern decides.
        last_layers: `{"num": N, "lr": rate}` trains the last N decoder layers of the language model.
        lora: `{"r", "alpha", "dropout", "targets", "lr"}` puts LoRA into the language model and trains that.
        path: where the proof is written (freezing.json).
    """

    def __init__(
        self,
        trainable: dict[str, float | None],
        *,
        path: Path,
        last_layers: dict | None = None,
        lora: dict | None = None,
        name: str = "stage",
    ):
        self.trainable, self.last_layers, self.lora = dict(trainable), last_layers, lora
        self.path, self.name = Path(path), name
        self.tuner = None
        self.before: dict[str, str] = {}
        self.rows: list[dict] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and not pl_module.learning_rates:
            self.apply(pl_module)

    def apply(self, stage: L.LightningModule) -> None:
        model, where = stage.model, f"stages.{self.name}.trainable"
        patterns = dict(self.trainable)
        if self.last_layers:
            where_last = f"stages.{self.name}.last_layers"
            for layer in last_layers(model.llm, self.last_layers["num"], where=where_last):
                patterns[f"llm.{layer}"] = self.last_layers["lr"]
        if self.lora:
            options = {k: v for k, v in self.lora.items() if k != "lr"}
            self.tuner = add_lora(model.llm.hf, **options, where=f"stages.{self.name}.lora")
            patterns |= {"*.lora_A.*": self.lora["lr"], "*.lora_B.*": self.lora["lr"]}
        rates = select_trainable(model, patterns, where=where)
        apply_trainable(model, rates)
        stage.learning_rates = rates
        stage.train()

    def on_fit_start(self, trainer: L.Trainer, stage: L.LightningModule) -> None:
        self.remember(stage)

    def remember(self, stage: L.LightningModule) -> None:
        self.before = {name: digest(t) for name, t in tensors(stage.model)}

    def on_train_batch_end(self, trainer: L.Trainer, stage: L.LightningModule, outputs, batch, batch_idx: int) -> None:
        # Only the first optimiser step of this process: a resumed run proves itself anew.
        if self.rows or trainer.fit_loop.epoch_loop._should_accumulate():
            return
        self.prove(stage)
        if trainer.is_global_zero:
            self.write()

    def on_train_end(self, trainer: L.Trainer, stage: L.LightningModule) -> None:
        if trainer.global_step:
            self.prove(stage)
            if trainer.is_global_zero:
                self.write()

    def merge(self) -> None:
        """Fold LoRA into the weights it adapts, before they are handed on."""
        if self.tuner is not None:
            merge_lora(self.tuner)
            self.tuner = None

    def prove(self, stage: L.LightningModule) -> None:
        """Compare all bytes with those before the first step.

        Raises:
            RuntimeError: a frozen tensor changed.
        """
        rates = stage.learning_rates
        rows: dict[tuple, dict] = {}
        moved_frozen = []
        live = {name for name, module in stage.model.named_modules() if name and module.training}
        for name, tensor in tensors(stage.model):
            part, is_parameter = name.split(".")[0], isinstance(tensor, nn.Parameter)
            # A buffer (BatchNorm statistics) may move only in a module that trains.
            learns = name in rates if is_parameter else name.rpartition(".")[0] in live
            row = rows.setdefault(
                (part, learns),
                dict(part=part, trainable=learns, lr=[], tensors=0, parameters=0, buffers=0, changed=0, unchanged=0),
            )
            if is_parameter and learns and rates[name] not in row["lr"]:
                row["lr"].append(rates[name])
            changed = digest(tensor) != self.before[name]
            row["tensors"] += 1
            row["parameters"] += tensor.numel() if is_parameter else 0
            row["buffers"] += not is_parameter
            row["changed" if changed else "unchanged"] += 1
            if changed and not learns:
                moved_frozen.append(name)
        self.rows = [row | {"lr": ", ".join(f"{rate:g}" for rate in sorted(row["lr"]))} for row in rows.values()]
        if moved_frozen:
            raise RuntimeError(
                f"stage {self.name}: {len(moved_frozen)} frozen tensors changed, the first is {moved_frozen[0]}; "
                "the handoff was not written"
            )

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"stage": self.name, "rows": self.rows}, indent=1))

    def table(self) -> str:
        """The proof as lines of text."""
        lines = [f"{'part':<10} {'parameters':>11} {'learns':>6} {'rate':>8} {'moved':>11} {'buffers':>7}"]
        for row in self.rows:
            learns = "yes" if row["trainable"] else "no"
            lines.append(
                f"{row['part']:<10} {row['parameters']:>11,} {learns:>6} {row['lr'] or '-':>8} "
                f"{row['changed']:>4} of {row['tensors']:>3} {row['buffers']:>7}"
            )
        return "\n".join(lines)


def tensors(model: nn.Module):
    """All parameters and buffers by name; a tied tensor stands once."""
    yield from model.named_parameters()
    yield from model.named_buffers()
