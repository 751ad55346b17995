"""Record a stage's metrics: every N optimiser steps, one line of metrics.jsonl and one call to every logger.

Between records counts and losses are summed on the device, so nothing is copied from it.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from fastvlm.batch import Batch
from fastvlm.callbacks.losses import Losses
from fastvlm.callbacks.positions import count_positions, read_counts

log = logging.getLogger(__name__)
GIB = 2**30


def gradient_norms(module: LightningModule) -> dict[str, Tensor]:
    """Return the L2 norm of the gradients in total (`""`) and per part: encoder, resampler, projector, llm, head."""
    grads: dict[str, list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            part = name.removeprefix("model.").split(".")[0] if name.startswith("model.") else "head"
            grads.setdefault(part, []).append(parameter.grad)
    norms = {part: torch.nn.utils.get_total_norm(g) for part, g in grads.items()}
    norms = {part: n.full_tensor() if hasattr(n, "full_tensor") else n for part, n in norms.items()}  # FSDP2's DTensor
    if norms:
        first = next(iter(norms.values()))
        norms[""] = torch.stack([n.to(first) for n in norms.values()]).square().sum().sqrt()
    return norms


def peak_rates(trainer: Trainer) -> dict[str, float]:
    """Return the largest current learning rate among the optimisers' groups of each name."""
    rates: dict[str, float] = {}
    for optimizer in trainer.optimizers:
        for i, group in enumerate(optimizer.param_groups):
            key = f"train/lr/{group.get('name', i)}"
            rates[key] = max(float(group["lr"]), rates.get(key, 0.0))
    return rates


class Metrics(Callback):
    """Records what happened in the last `every` optimiser steps, and shares since the stage began.

    Each record has `train/loss` (mean over learned tokens) and `train/loss/<source>`; `train/share/<source>` in the
    mixture's unit, and `share_samples`, `share_tokens`, `share_answer_tokens` and `share_target`; speed in tokens
    without padding, share of padding, share of time waiting for data, memory, gradient norms before clipping, learning
    rates, and the number of samples that could not be read. After a validation it has `val/loss`, `val/loss/<source>`
    and the scalars that `validation_step` returns. A resumed stage drops the lines after the step it resumes from and
    continues counting.

    Args:
        every: optimiser steps between two records; the first and the last step are always recorded.
        path: metrics.jsonl; None: `<trainer.default_root_dir>/metrics.jsonl`.
    """

    def __init__(self, every: int = 20, *, path: str | Path | None = None):
        if every < 1:
            raise ValueError(f"callbacks.metrics.every={every} must be at least 1")
        self.every, self.path = every, Path(path) if path else None
        self.last: dict[str, Any] = {}  # the latest value of every metric, for other callbacks
        self._losses, self._val = Losses(), Losses()
        self._sources: tuple[str, ...] = ()
        self._val_sources: tuple[str, ...] = ()
        self._window: Tensor | None = None  # position codes since the last record, on the device
        self._total: Tensor | None = None  # position codes since the stage began, over all ranks, on the CPU
        self._seconds = {"step": 0.0, "wait": 0.0, "total": 0.0}
        self._skipped: list[str] = []
        self._num_skipped = 0
        self._norms: dict[str, Tensor] = {}
        self._mark = 0.0  # when this batch started
        self._idle_since: float | None = None  # when the last batch ended; None if the gap is not waiting for data
        self._logged_step = 0
        self._warm = False
        self._restored: dict[str, Any] | None = None
        self._image_token_id: int | None = None

    # -- resume ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": self._losses.state_dict(),
            "sources": list(self._sources),
            "window": self._window.tolist() if self._window is not None else None,
            "total": self._total.tolist() if self._total is not None else None,
            "seconds": dict(self._seconds),
            "skipped": list(self._skipped),
            "num_skipped": self._num_skipped,
            "logged_step": self._logged_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def _restore(self, trainer: Trainer, device: torch.device) -> None:
        state, self._restored = self._restored, None
        before = tuple(state["sources"])
        plan = getattr(getattr(trainer, "datamodule", None), "plan", None)
        now = self._sources = tuple(getattr(plan, "names", before))  # the sources differ if the data were replanned
        if state["total"] is not None:
            self._total = of_sources(torch.tensor(state["total"], dtype=torch.int64), before, now, beside=1)
        self._seconds = dict(state["seconds"])
        self._num_skipped, self._logged_step = state["num_skipped"], state["logged_step"]
        # The checkpoint holds the window of all ranks, so only one rank may add it again.
        if trainer.is_global_zero:
            self._losses.load_state_dict(state["losses"], device)
            for key in {"source_loss", "source_tokens"} & self._losses.sums.keys():
                self._losses.sums[key] = of_sources(self._losses.sums[key], before, now)
            self._skipped = list(state["skipped"])
            if state["window"] is not None:
                window = torch.tensor(state["window"], dtype=torch.int64, device=device)
                self._window = of_sources(window, before, now, beside=1)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.path = self.path or Path(trainer.default_root_dir) / "metrics.jsonl"
        self._image_token_id = getattr(getattr(pl_module, "model", None), "image_token_id", None)
        self._stage = getattr(pl_module, "name", type(pl_module).__name__)
        if self._restored is not None:
            self._restore(trainer, pl_module.device)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            keep_lines(self.path, step=trainer.global_step)
            self._log_left_out(trainer)
        self._idle_since = None

    def _log_left_out(self, trainer: Trainer) -> None:
        """Log what the plan leaves out: counts per source as metrics, keys in a file."""
        plan = getattr(getattr(trainer, "datamodule", None), "plan", None)
        counts, names = {}, {}
        for source in getattr(plan, "sources", ()):
            counts[f"data/left_out/{source.name}"] = float(sum(map(len, source.excluded.values())))
            counts[f"data/truncated/{source.name}"] = float(source.num_truncated)
            counts[f"data/broken_shards/{source.name}"] = float(len(source.index.broken))
            if source.excluded or source.index.broken:
                named = {
                    why: [source.index.key(row) for row in rows[:1000].tolist()]
                    for why, rows in source.excluded.items()
                }
                excluded = {why: {"count": len(rows), "keys": named[why]} for why, rows in source.excluded.items()}
                names[source.name] = {"left out": excluded, "broken shards": source.index.broken}
        for logger in trainer.loggers:
            if counts:
                logger.log_metrics(counts, step=trainer.global_step)
        self._log_names(trainer, "left_out.json", names)

    def _log_names(self, trainer: Trainer, name: str, names: dict[str, Any]) -> None:
        if not names:
            return
        file = self.path.parent / name
        file.write_text(json.dumps(names, indent=1) + "\n")
        for logger in trainer.loggers:
            if hasattr(logger, "log_file"):
                logger.log_file(file)

    # -- every batch ----------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self._mark = time.perf_counter()
        if self._idle_since is not None:
            self._seconds["wait"] += self._mark - self._idle_since

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer) -> None:
        if self._is_due(trainer, trainer.global_step + 1):
            self._norms = gradient_norms(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if self._sources != batch.sources:
            assert not self._sources, f"the sources of a stage changed from {self._sources} to {batch.sources}"
            self._sources = batch.sources
        counts = count_positions(batch, image_token_id=self._image_token_id)
        self._window = counts if self._window is None else self._window + counts
        self._losses.add(outputs)
        self._skipped += batch.skipped
        step = trainer.global_step
        if step != self._logged_step and self._is_due(trainer, step):
            self._record_training(trainer, step)
        else:
            self._seconds["step"] += time.perf_counter() - self._mark
        # After the first batch other callbacks work (freezing hashes the model); that is not waiting for data.
        self._idle_since = time.perf_counter() if self._warm else None
        self._warm = True

    def _is_due(self, trainer: Trainer, step: int) -> bool:
        return step % self.every == 0 or step == 1 or step == trainer.max_steps

    # -- records --------------------------------------------------------------------------------------------------

    def _record_training(self, trainer: Trainer, step: int) -> None:
        metrics = self._losses.read("train", self._sources, trainer)  # synchronises with the device
        window = trainer.strategy.reduce(self._window, reduce_op="sum").cpu()
        self._seconds["step"] += time.perf_counter() - self._mark
        self._total = window if self._total is None else self._total + window
        counts = read_counts(window)
        seconds = max(self._seconds["step"] + self._seconds["wait"], 1e-9)
        self._seconds["total"] += seconds
        metrics |= self._speed(counts, window, seconds)
        metrics |= self._shares(trainer)
        for part, norm in self._norms.items():
            metrics["train/grad_norm" + (f"/{part}" if part else "")] = float(norm)
        metrics |= peak_rates(trainer)
        skipped = self._gather_skipped(trainer)
        self._num_skipped += len(skipped)
        metrics["train/skipped"] = float(self._num_skipped)
        if skipped and trainer.is_global_zero:
            log.warning("samples that could not be read (%d): %s", len(skipped), ", ".join(skipped[:10]))
        self.write(trainer, step, metrics, **({"skipped_keys": skipped[:100]} if skipped else {}))
        if skipped and trainer.is_global_zero:
            records = [json.loads(line) for line in self.path.read_text().splitlines()]
            found = {str(r["step"]): r["skipped_keys"] for r in records if "skipped_keys" in r}
            self._log_names(trainer, "skipped.json", found)
        self._losses, self._window, self._norms, self._skipped = Losses(), None, {}, []
        self._seconds["step"] = self._seconds["wait"] = 0.0
        self._logged_step = step

    def _speed(self, counts: dict[str, Tensor], window: Tensor, seconds: float) -> dict[str, float]:
        """Return rates from the counts of the last `seconds`, and the memory in use."""
        tokens, image_tokens = int(counts["tokens"].sum()), int(counts["image_tokens"].sum())
        metrics = {
            "train/tokens_per_second": tokens / seconds,
            "train/image_tokens_per_second": image_tokens / seconds,
            "train/text_tokens_per_second": (tokens - image_tokens) / seconds,
            "train/samples_per_second": int(counts["samples"].sum()) / seconds,
            "train/padding": int(counts["padding"]) / max(1, int(window.sum())),
            "train/data_wait": self._seconds["wait"] / seconds,
            "train/seconds": self._seconds["total"],
            "train/memory_gib": psutil.Process().memory_info().rss / GIB,
        }
        if torch.cuda.is_available():
            metrics["train/gpu_memory_gib"] = torch.cuda.max_memory_allocated() / GIB
        return metrics

    def _shares(self, trainer: Trainer) -> dict[str, float]:
        plan = getattr(getattr(trainer, "datamodule", None), "plan", None)
        mixture = getattr(plan, "mixture", None)
        unit = getattr(mixture, "unit", "samples")
        totals = read_counts(self._total)
        out = {}
        for kind in ("samples", "tokens", "answer_tokens"):
            share = (totals[kind] / totals[kind].sum().clamp(min=1)).tolist()
            for name, value in zip(self._sources, share):
                out[f"train/share_{kind}/{name}"] = value
                if kind == unit:
                    out[f"train/share/{name}"] = value
        weights = dict(getattr(mixture, "weights", None) or {})
        if sum(weights.values()) > 0:
            for name in self._sources:
                out[f"train/share_target/{name}"] = weights.get(name, 0.0) / sum(weights.values())
        return out

    def _gather_skipped(self, trainer: Trainer) -> list[str]:
        if trainer.world_size == 1:
            return self._skipped
        gathered: list[list[str]] = [[] for _ in range(trainer.world_size)]
        torch.distributed.all_gather_object(gathered, self._skipped)
        return [key for keys in gathered for key in keys]

    def write(self, trainer: Trainer, step: int, metrics: dict[str, float], **extra: Any) -> None:
        """Write a line of metrics.jsonl, pass it to every logger and keep it in `last`. Every rank may call this."""
        self.last |= metrics
        # For checkpoints that monitor a metric, and for the handoff's manifest.
        chosen = {k: torch.tensor(v) for k, v in metrics.items() if k.startswith(("val/", "train/loss"))}
        trainer.callback_metrics.update(chosen)
        if not trainer.is_global_zero:
            return
        # Seven digits are about float32's precision.
        short = {key: float(f"{value:.7g}") for key, value in metrics.items()}
        record = {"step": step, "time": round(time.time(), 3), "stage": self._stage, **short, **extra}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)

    # -- validation -----------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._val = Losses()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx=0
    ) -> None:
        self._val_sources = batch.sources
        self._val.add(outputs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._idle_since = None
        if trainer.sanity_checking or self.path is None or not self._val.batches:
            return
        self.write(trainer, trainer.global_step, self._val.read("val", self._val_sources, trainer))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Lightning saves between two batches; that time is not waiting for data.
        self._idle_since = None
        if trainer.world_size == 1:
            return
        state = checkpoint["callbacks"][self.state_key]  # of rank 0; `reduce` may add up in place
        total = lambda tensor: trainer.strategy.reduce(tensor.clone(), reduce_op="sum").tolist()
        state["losses"]["sums"] = {key: total(value) for key, value in sorted(self._losses.sums.items())}
        state["window"] = None if self._window is None else total(self._window)
        state["skipped"] = self._gather_skipped(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._idle_since = None


def of_sources(rows: Tensor, before: tuple[str, ...], now: tuple[str, ...], *, beside: int = 0) -> Tensor:
    """Reorder rows, one per source, from an earlier list of sources to the current one; new sources get 0.

    Args:
        beside: number of leading rows that belong to no source.
    """
    if before == now:
        return rows
    out = rows.new_zeros(beside + len(now), *rows.shape[1:])
    out[:beside] = rows[:beside]
    for i, name in enumerate(now):
        if name in before:
            out[beside + i] = rows[beside + before.index(name)]
    return out


def keep_lines(path: Path, *, step: int) -> None:
    """Drop atomically the records after `step`, and lines cut off by a crash."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step and step > 0:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue
    part = path.with_suffix(".part")
    part.write_text("".join(line + "\n" for line in kept))
    part.replace(path)
