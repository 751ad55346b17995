"""Apply a stage's freezing and prove it: every frozen tensor must keep its exact bytes."""

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
    """Hash of a tensor's very bytes; of a sharded one, of this rank's shard."""
    tensor = held_of(tensor).detach()
    if hasattr(tensor, "__tensor_flatten__"):  # codes and scales of torchao
        return "".join(digest(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    flat = tensor.cpu().contiguous().reshape(-1)
    return hashlib.blake2b(flat.view(torch.uint8).numpy().data, digest_size=16).hexdigest()


class StageFreezing(L.Callback):
    """Apply a stage's `trainable` patterns and check their effect.

    Before the first step every tensor of the model, parameters and buffers, is hashed. After the first optimiser step
    and again at the end the hashes are compared; a table says, per part and learning rate, how many tensors there are
    and how many changed. A frozen tensor that changed stops the run.

    Args:
        trainable: pattern over parameter names -> learning rate, or `{lr, weight_decay, warmup_steps}`; null excludes.
            The longest matching pattern decides.
        last_layers: `{"num": N, "lr": rate}` trains the last N decoder layers of the language model.
        lora: `{"r", "alpha", "dropout", "targets", "lr"}` puts LoRA into the language model and trains that.
        adapt: part -> `{"method", "lr", ...}` as in `fastvlm.config.Adapt`.
        quantise: what the frozen linear layers of a language model with adapters are held in, where `adapt` does not
            say.
        path: where the proof is written (freezing.json).
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
            # Adapters begin at random: alike on every rank, whatever it drew before.
            torch.manual_seed(int.from_bytes(f"{getattr(stage, 'seed', 0)} {self.name}".encode()) % 2**63)
            settings = self.adapted(stage.model)
        rates = {name: one["lr"] for name, one in settings.items()}
        apply_trainable(stage.model, rates)
        for part, kind in self.quantised(stage.model, rates).items():
            self.hold_in_few_bits(stage, part, kind)
        stage.learning_rates, stage.learning_settings = rates, settings
        stage.train()

    def adapted(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """Put adapters in and say what learns: parameter name -> `lr`, `weight_decay`, `warmup_steps`."""
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
        """Put adapters into a part; returns their full names as patterns, which win over every shorter pattern."""
        module = getattr(model, part)
        before = {name for name, _ in module.named_parameters()}
        self.tuners.append(add_lora(getattr(module, "hf", module), **options, where=where))
        added = {name for name, _ in module.named_parameters()} - before
        return {f"{part}.{name}": rate for name in added if ".lora_" in name}

    def quantised(self, model: nn.Module, rates: dict[str, float]) -> dict[str, str]:
        """Part -> the quantised format of its frozen linear layers."""
        kinds = {part: one["quantise"] for part, one in self.adapt.items() if one.get("quantise")}
        learns_whole = any(name.startswith("llm.") and ".lora_" not in name for name in rates)
        if self.quantise and "llm" not in kinds and not learns_whole and hasattr(model, "llm"):
            kinds["llm"] = self.quantise
        return kinds

    def hold_in_few_bits(self, stage: L.LightningModule, part: str, kind: str) -> None:
        module = getattr(stage.model, part)
        if not any(p.requires_grad for p in module.parameters()):
            # Nothing of this part is handed on, so it must come out of the stage as it went in, to the bit.
            self.stashed[part] = self.path.parent / f".{part}.{os.getpid()}.safetensors"
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_model(module, str(self.stashed[part]))
        quantise(module, kind, keep=heads_of(module), where=f"stages.{self.name}.adapt.{part}.quantise")
        # They never learn and are equal on every rank: DDP need not know of them, nor could it send all their kinds.
        names = [f"model.{part}.{name}.{p}" for name, _ in quantised_layers(module) for p in ("codes", "scale")]
        ignored = getattr(stage, "_ddp_params_and_buffers_to_ignore", [])
        stage._ddp_params_and_buffers_to_ignore = [*ignored, *names]

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

    def merge(self, model: nn.Module) -> None:
        """Plain weights again, for the handoff: quantised ones restored, adapters merged.

        A part with adapters is handed on as the function that was trained: the weights that the quantised layers
        computed with, plus what was learned. A part that was only read gets its own weights back.
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
        """Compare all bytes with those before the first step.

        Raises:
            RuntimeError: a frozen tensor changed.
        """
        rates = stage.learning_rates
        rows: dict[tuple, dict] = {}
        moved_frozen = []
        live = {name for name, module in stage.model.named_modules() if name and module.training}
        moved = self.moved(stage.model)
        for name, tensor in tensors(stage.model):
            # The model's own buffers (the encoder's mean and deviation) belong to no part.
            part, is_parameter = name.split(".")[0] if "." in name else "vlm", isinstance(tensor, nn.Parameter)
            # A buffer (BatchNorm statistics) may move only in a module that trains.
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
        """Names of tensors whose bytes have changed since before the first step; of a sharded one, on any rank."""
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
