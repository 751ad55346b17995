"""Show a stage's progress: a Rich bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

from fastvlm.callbacks.metrics import Metrics


def shorten(value: float | int) -> str:
    """Format a number with a unit prefix: 12345 -> '12.3k'."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def clock(seconds: float | int) -> str:
    """Format seconds: 75 -> '1:15', 3675 -> '1:01:15'."""
    seconds = int(max(0, seconds) + 0.5)
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class Progress(Callback):
    """Shows stage, step, smoothed loss, speed, learning rate, waiting for data, memory and time left.

    Time to first token is shown where it is measured. The figures come from the `Metrics` callback, which must precede
    this one; without it only steps and time are shown. Lightning's own bar is disabled.

    Args:
        interval: seconds between two lines without a terminal.
        smoothing: weight of the past in the running mean of the loss.
        console: where to write; None: standard output.
    """

    def __init__(self, *, interval: float | int = 10, smoothing: float = 0.8, console: Console | None = None):
        self.interval, self.smoothing = interval, smoothing
        self.console = console
        self._bar: Bar | None = None
        self._loss: float | None = None
        self._shown = 0.0
        self._loss_step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        other = trainer.progress_bar_callback
        if other is not None:
            other.disable()

    # -- training -------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self.console = self.console or Console(file=sys.stdout)
        self._metrics = next((c for c in trainer.callbacks if isinstance(c, Metrics)), None)
        self._name = getattr(pl_module, "name", type(pl_module).__name__)
        self._total = trainer.max_steps if trainer.max_steps > 0 else int(trainer.num_training_batches or 0)
        self._first, self._started = trainer.global_step, time.perf_counter()
        self._paused, self._shown = 0.0, self._started
        if self.console.is_terminal:
            self._bar = Bar(
                SpinnerColumn(finished_text="[green]✓"),
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=6)),
                TextColumn("{task.completed:.0f}/{task.total:.0f}", style="cyan"),
                TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True)),
                console=self.console,
                expand=True,
                refresh_per_second=8,
            )
            self._task = self._bar.add_task(self._name, total=max(1, self._total), completed=self._first, text="")
            self._bar.start()
        elif self._first:
            self._print(f"{self._name}: continues at step {self._first} of {self._total}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero:
            return
        step, now = trainer.global_step, time.perf_counter()
        if self._metrics is not None and self._metrics._logged_step != self._loss_step:
            self._loss_step = self._metrics._logged_step
            if "train/loss" in self._metrics.last:
                loss = self._metrics.last["train/loss"]
                self._loss = loss if self._loss is None else self._smooth(loss)
        wait = 0.1 if self._bar is not None else self.interval
        if now - self._shown >= wait:
            self._shown = now
            self._show(step, now)

    def _smooth(self, loss: float) -> float:
        return self.smoothing * self._loss + (1 - self.smoothing) * loss

    def _show(self, step: int, now: float) -> None:
        fields = self._fields(step, now)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=self._fit(fields))
        else:
            text = "  ".join(f"{k} {v}" if k else v for k, v in fields)
            self._print(f"{self._name}  {step:>{len(str(self._total))}}/{self._total}  {text}")

    def _fields(self, step: int, now: float) -> list[tuple[str, str]]:
        """Return (label, figure) pairs in order of importance, except the time left, which is last."""
        fields = []
        last = self._metrics.last if self._metrics is not None else {}
        if self._loss is not None:
            fields.append(("loss", f"{self._loss:.3f}"))
        if "train/tokens_per_second" in last:
            fields.append(("", f"{shorten(last['train/tokens_per_second'])} tok/s"))
        if "speed/ttft_ms" in last:
            fields.append(("ttft", f"{shorten(last['speed/ttft_ms'])}ms"))
        rates = [value for key, value in last.items() if key.startswith("train/lr/")]
        if rates:
            fields.append(("lr", f"{max(rates):.1e}"))
        if "train/data_wait" in last:
            fields.append(("wait", f"{100 * last['train/data_wait']:.0f}%"))
        if "train/memory_gib" in last:
            fields.append(("mem", f"{last.get('train/gpu_memory_gib', last['train/memory_gib']):.1f}G"))
        done = step - self._first
        if done > 0:
            left = (now - self._started - self._paused) / done * (self._total - step)
            fields.append(("eta", clock(left)))
        return fields

    def _fit(self, fields: list[tuple[str, str]]) -> str:
        """Join as many figures as fit next to the bar; the last one (the time left) always stays."""
        room = self.console.width - len(self._name) - 2 * len(str(self._total)) - 16
        while len(fields) > 1 and sum(len(k) + len(v) + 3 for k, v in fields) > room:
            fields.pop(-2)
        return "  ".join(f"[dim]{k}[/] {v}" if k else v for k, v in fields)

    # -- validation and the end -----------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_started = time.perf_counter()
        if self._bar is not None and not trainer.sanity_checking:
            self._bar.update(self._task, completed=trainer.global_step, text="[dim]validating …[/]")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if hasattr(self, "_paused"):
            self._paused += time.perf_counter() - self._validation_started

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close(trainer, "[green]✓[/]" if trainer.global_step >= getattr(self, "_total", 0) else "[yellow]■[/]")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close(trainer, "[yellow]■[/]" if isinstance(exception, KeyboardInterrupt) else "[red]✗[/]")

    def _close(self, trainer: Trainer, sign: str) -> None:
        """Replace the bar by one final line."""
        if not trainer.is_global_zero or not hasattr(self, "_started"):
            return
        seconds = time.perf_counter() - self._started
        if self._bar is not None:
            self._bar.remove_task(self._task)
            self._bar.stop()
            self._bar = None
        last = self._metrics.last if self._metrics is not None else {}
        text = [f"{trainer.global_step}/{self._total} steps"]
        if "train/loss" in last:
            text.append(f"loss {last['train/loss']:.3f}")
        if "val/loss" in last:
            text.append(f"val {last['val/loss']:.3f}")
        if "train/tokens_per_second" in last:
            text.append(f"{shorten(last['train/tokens_per_second'])} tok/s")
        if "speed/ttft_ms" in last:
            text.append(f"ttft {shorten(last['speed/ttft_ms'])}ms")
        text.append(clock(seconds))
        if self.console.is_terminal:
            self.console.print(f"{sign} [bold]{self._name}[/]  " + "  [dim]·[/]  ".join(text), highlight=False)
        else:
            self._print(f"{self._name}  done  " + "  ".join(text))
        del self._started

    def _print(self, text: str) -> None:
        print(text, file=self.console.file, flush=True)
