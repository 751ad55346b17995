"""Apply a stage's freezing and verify it: every frozen tensor must keep its exact bytes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import lightning as L
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from fastvlm.models.pieces import held_of, is_shard, size_of
from fastvlm.models.quantised import dequantise, heads_of, quantise, quantised_layers
from fastvlm.models.trainable import Rate, add_lora, apply_trainable, last_layers, merge_lora, select_settings


def digest(tensor: Tensor) -> str:
    """Hash a tensor's bytes, or those of this rank's shard."""
    tensor = held_of(tensor).detach()
    if hasattr(tensor, "__tensor_flatten__"):  # codes and scales of torchao
        return "".join(digest(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    flat = tensor.cpu().contiguous().reshape(-1)
    return hashlib.blake2b(flat.view(torch.uint8).numpy().data, digest_size=16).hexdigest()


class StageFreezing(L.Callback):
    """Applies a stage's `trainable` patterns and checks their effect.

    Before the first step every tensor of the model, parameters and buffers, is hashed. The hashes are compared after
    the first optimiser step and at the end. A table reports how many tensors of each part, trainable and frozen,
    changed; a changed frozen tensor stops the run.

    Args:
        trainable: pattern over parameter names -> learning rate, or `{lr, weight_decay, warmup_steps}`; None freezes.
            The longest matching pattern decides.
        path: file of the result (freezing.json).
        last_layers: `{"num": N, "lr": rate}` trains the last N decoder layers of the language model.
        lora: `{"r", "alpha", "dropout", "targets", "lr"}` adds LoRA to the language model and trains it.
        adapt: part -> `{"method", "lr", ...}` as in `fastvlm.config.Adapt`.
        quantise: format for the linear layers of a language model whose own weights are frozen, unless `adapt` sets it.
        name: name of the stage.
    """

    def __init__(
        self,
        trainable: dict[str, Rate],
        *,
        path: Path,
        last_layers: dict | None = None,
        lora: dict | None = None,
        adapt: dict[str, dict] | None = None,
        quantise: str | None = None,
        name: str = "stage",
    ):
        self.trainable, self.last_layers, self.lora = dict(trainable), last_layers, lora
        self.adapt, self.quantise = adapt or {}, quantise
        self.path, self.name = Path(path), name
        self.tuners: list = []
        self.before: dict[str, str] = {}
        self.rows: list[dict] = []
        self.stashed: dict[str, Path] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and not pl_module.learning_rates:
            self.apply(pl_module)

    def apply(self, stage: L.LightningModule) -> None:
        with torch.random.fork_rng(devices=[]):
            # Adapters are initialised randomly, but equally on every rank, whatever its random state.
            named = hashlib.sha256(f"{getattr(stage, 'seed', 0)} {self.name}".encode())
            torch.manual_seed(int.from_bytes(named.digest()[:8], "big"))
            settings = self.adapted(stage.model)
        rates = {name: one["lr"] for name, one in settings.items()}
        apply_trainable(stage.model, rates)
        for part, kind in self.quantised(stage.model, rates).items():
            self.hold_in_few_bits(stage, part, kind)
        stage.learning_rates, stage.learning_settings = rates, settings
        stage.train()

    def adapted(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """Add adapters; return the trainable parameters' names -> `lr`, `weight_decay`, `warmup_steps`."""
        where, patterns = f"stages.{self.name}", dict(self.trainable)
        if self.last_layers:
            for layer in last_layers(model.llm, self.last_layers["num"], where=f"{where}.last_layers"):
                patterns[f"llm.{layer}"] = self.last_layers["lr"]
        if self.lora:
            options = {k: v for k, v in self.lora.items() if k != "lr"}
            patterns |= self.add_adapters("llm", model, options, self.lora["lr"], where=f"{where}.lora")
        for part, one in self.adapt.items():
            rate = {key: one[key] for key in ("lr", "weight_decay", "warmup_steps") if one.get(key) is not None}
            here = f"{where}.adapt.{part}"
            if one["method"] in ("lora", "dora"):
                options = {key: one[key] for key in ("r", "alpha", "dropout", "targets")}
                options["dora"] = one["method"] == "dora"
                patterns |= self.add_adapters(part, model, options, rate, where=here)
            elif one["method"] == "partial":
                for layer in last_layers(getattr(model, part), one["num"], where=here):
                    patterns[f"{part}.{layer}"] = rate
            else:
                patterns[part] = rate if one["method"] == "full" else None
        return select_settings(model, patterns, where=f"{where}.trainable")

    def add_adapters(self, part: str, model: nn.Module, options: dict, rate: Rate, *, where: str) -> dict[str, Rate]:
        """Add adapters to a part; return their full names as patterns, which override every shorter pattern."""
        module = getattr(model, part)
        before = {name for name, _ in module.named_parameters()}
        self.tuners.append(add_lora(getattr(module, "hf", module), **options, where=where))
        added = {name for name, _ in module.named_parameters()} - before
        return {f"{part}.{name}": rate for name in added if ".lora_" in name}

    def quantised(self, model: nn.Module, rates: dict[str, float]) -> dict[str, str]:
        """Map each part to quantise to the format of its frozen linear layers."""
        kinds = {part: one["quantise"] for part, one in self.adapt.items() if one.get("quantise")}
        learns_whole = any(name.startswith("llm.") and ".lora_" not in name for name in rates)
        if self.quantise and "llm" not in kinds and not learns_whole and hasattr(model, "llm"):
            kinds["llm"] = self.quantise
        return kinds

    def hold_in_few_bits(self, stage: L.LightningModule, part: str, kind: str) -> None:
        module = getattr(stage.model, part)
        if not any(p.requires_grad for p in module.parameters()):
            # The part is not in the handoff, so it must leave the stage bit-identical; keep its weights on disk.
            self.stashed[part] = self.path.parent / f".{part}.{os.getpid()}.safetensors"
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_model(module, str(self.stashed[part]))
        quantise(module, kind, keep=heads_of(module), where=f"stages.{self.name}.adapt.{part}.quantise")
        # Codes are frozen and equal on every rank, and DDP cannot broadcast all of their formats.
        names = [f"model.{part}.{name}.{p}" for name, _ in quantised_layers(module) for p in ("codes", "scale")]
        ignored = getattr(stage, "_ddp_params_and_buffers_to_ignore", [])
        stage._ddp_params_and_buffers_to_ignore = [*ignored, *names]

    def on_fit_start(self, trainer: L.Trainer, stage: L.LightningModule) -> None:
        self.remember(stage)

    def remember(self, stage: L.LightningModule) -> None:
        self.before = {name: digest(t) for name, t in tensors(stage.model)}

    def on_train_batch_end(self, trainer: L.Trainer, stage: L.LightningModule, outputs, batch, batch_idx: int) -> None:
        # Only after the first optimiser step of this process, so a resumed run is checked again.
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

    def merge(self, model: nn.Module) -> None:
        """Restore plain weights for the handoff: dequantise layers and merge adapters.

        A part with adapters becomes the function that was trained: the dequantised weights plus what was learned. A
        part without trainable parameters gets its original weights back.
        """
        for part, module in model.named_children():
            if quantised_layers(module):
                dequantise(module)
            if part in self.stashed:
                load_model(module, str(self.stashed[part]))
                self.stashed.pop(part).unlink()
        for tuner in self.tuners:
            merge_lora(tuner)
        self.tuners = []

    def on_exception(self, trainer: L.Trainer, stage: L.LightningModule, exception: BaseException) -> None:
        for file in self.stashed.values():
            file.unlink(missing_ok=True)

    def prove(self, stage: L.LightningModule) -> None:
        """Compare all tensors' hashes with those before the first step.

        Raises:
            RuntimeError: a frozen tensor changed.
        """
        rates = stage.learning_rates
        rows: dict[tuple, dict] = {}
        moved_frozen = []
        live = {name for name, module in stage.model.named_modules() if name and module.training}
        moved = self.moved(stage.model)
        for name, tensor in tensors(stage.model):
            # The model's own buffers (pixel mean and standard deviation) belong to no part.
            part, is_parameter = name.split(".")[0] if "." in name else "vlm", isinstance(tensor, nn.Parameter)
            # A buffer (BatchNorm statistics) may change only in a module in train mode.
            learns = name in rates if is_parameter else name.rpartition(".")[0] in live
            row = rows.setdefault(
                (part, learns),
                dict(part=part, trainable=learns, lr=[], tensors=0, parameters=0, buffers=0, changed=0, unchanged=0),
            )
            if is_parameter and learns and rates[name] not in row["lr"]:
                row["lr"].append(rates[name])
            changed = name in moved
            row["tensors"] += 1
            row["parameters"] += size_of(tensor) if is_parameter else 0
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

    def moved(self, model: nn.Module) -> set[str]:
        """Return the names of tensors whose bytes changed since before the first step, on any rank if sharded."""
        here = {name: digest(tensor) != self.before[name] for name, tensor in tensors(model)}
        if any(is_shard(p) for p in model.parameters()):
            flags = torch.tensor(list(here.values()), dtype=torch.int32, device=next(model.buffers()).device)
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
            here = dict(zip(here, flags.bool().tolist(), strict=True))
        return {name for name, changed in here.items() if changed}

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"stage": self.name, "rows": self.rows}, indent=1))

    def table(self) -> str:
        """Return the result of the last check as a text table."""
        lines = [f"{'part':<10} {'parameters':>11} {'learns':>6} {'rate':>8} {'moved':>11} {'buffers':>7}"]
        for row in self.rows:
            learns = "yes" if row["trainable"] else "no"
            lines.append(
                f"{row['part']:<10} {row['parameters']:>11,} {learns:>6} {row['lr'] or '-':>8} "
                f"{row['changed']:>4} of {row['tensors']:>3} {row['buffers']:>7}"
            )
        return "\n".join(lines)


def tensors(model: nn.Module):
    """Yield (name, tensor) of all parameters and buffers; tied tensors appear once."""
    yield from model.named_parameters()
    yield from model.named_buffers()
