"""What a run runs on: accelerator, precision, workers and threads, chosen or told."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512-BF16 or AMX); without it autocast only costs."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


@dataclass(kw_only=True)
class Hardware:
    """Where training runs. Everything given is passed on to Lightning's Trainer; `auto` is resolved here.

    Args:
        accelerator: auto, cpu or gpu.
        devices: how many of them, or auto for all GPUs (one on a CPU).
        precision: auto, or Lightning's names (32-true, bf16-mixed, 16-mixed, bf16-true).
        strategy: auto, ddp, fsdp, ... (Lightning's names).
        num_nodes: machines.
        num_workers: loader processes a rank, or auto.
        threads: torch threads a process, or auto for the cores this process may use, shared among its ranks.
        accumulate: micro-batches an optimiser step; the global batch stays the stage's.
    """

    accelerator: str = "auto"
    devices: int | str = "auto"
    precision: str = "auto"
    strategy: str = "auto"
    num_nodes: int = 1
    num_workers: int | str = "auto"
    threads: int | str = "auto"
    accumulate: int = 1

    def __post_init__(self):
        import torch

        cuda = torch.cuda.is_available()
        if self.accelerator == "auto":
            self.accelerator = "gpu" if cuda else "cpu"
        if self.accelerator == "gpu" and not cuda:
            raise ValueError(
                "hardware.accelerator=gpu, but torch sees no CUDA device; use hardware=cpu or hardware=auto"
            )
        on_gpu = self.accelerator == "gpu"
        if self.devices == "auto":
            self.devices = torch.cuda.device_count() if on_gpu else 1
        self.devices = int(self.devices)
        if self.precision == "auto":
            fast = torch.cuda.is_bf16_supported() if on_gpu else has_fast_bf16()
            self.precision = "bf16-mixed" if fast else "16-mixed" if on_gpu else "32-true"
        if self.strategy == "auto" and self.num_ranks > 1:
            self.strategy = "ddp"
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if self.num_workers == "auto":
            # On two cores a loader process takes from the step what it gives: 15 % slower on the embedded run.
            self.num_workers = min(8, max(1, cores // self.devices - 1)) if on_gpu else int(cores > 2)
        if self.threads == "auto":
            self.threads = max(1, int(os.environ.get("OMP_NUM_THREADS", cores)) // (1 if on_gpu else self.devices))

    @property
    def num_ranks(self) -> int:
        return int(self.devices) * self.num_nodes

    @property
    def device(self) -> str:
        return "cuda" if self.accelerator == "gpu" else "cpu"

    def apply(self) -> None:
        """Settings of this process that torch keeps globally."""
        import torch

        torch.set_num_threads(int(self.threads))
        torch.set_float32_matmul_precision("high")

    def trainer(self) -> dict:
        """Keyword arguments for Lightning's Trainer."""
        strategy = self.strategy
        if strategy == "ddp":
            from lightning.pytorch.strategies import DDPStrategy

            # Every trainable parameter is touched in every step (the VLM sees to it), so nothing is searched for.
            strategy = DDPStrategy(
                find_unused_parameters=False, process_group_backend=None if self.device == "cuda" else "gloo"
            )
        return dict(
            accelerator=self.accelerator,
            devices=self.devices,
            num_nodes=self.num_nodes,
            precision=self.precision,
            strategy=strategy,
            accumulate_grad_batches=self.accumulate,
        )
