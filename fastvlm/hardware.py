"""Accelerator, precision, strategy, workers and threads of a run, detected or given."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512-BF16 or AMX); without it bf16 autocast is slower than
    fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


STRATEGIES = ("auto", "ddp", "fsdp", "deepspeed_zero3")


def under_slurm() -> bool:
    """Whether `srun` started this process as one of its tasks; an interactive Slurm shell does not count (Lightning's
    rule)."""
    return "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def is_first_rank() -> bool:
    """Whether this process is rank 0 of all machines, however it was started: alone, by Lightning, torchrun or srun."""
    for key in ("RANK", "SLURM_PROCID"):
        if key in os.environ and (key == "RANK" or under_slurm()):
            return os.environ[key] == "0"
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"


@dataclass(kw_only=True)
class Hardware:
    """Where training runs. Given values are passed on to Lightning's Trainer; `auto` is resolved here.

    Args:
        accelerator: auto, cpu or gpu.
        devices: how many of them, or auto for all GPUs (one on a CPU; under srun its tasks a node).
        precision: auto, or Lightning's names (32-true, bf16-mixed, 16-mixed, bf16-true).
        strategy: auto; ddp, a replica on every device; fsdp, weights, gradients and optimiser state sharded (torch's
            FSDP2); deepspeed_zero3, the same by DeepSpeed's ZeRO stage 3 (the package deepspeed).
        num_nodes: machines, or auto for those of the Slurm job (one outside of it).
        num_workers: loader processes a rank, or auto.
        threads: torch threads a process, or auto for the cores this process may use, shared among its ranks.
        accumulate: micro-batches an optimiser step; the global batch stays the stage's.
        rows_per_device: most rows of a micro-batch; a step is split into as many micro-batches as that takes.
        memory_gib: memory of a device for the estimate before a run; null for what it has. If given, small models are
            estimated, too.
        quantise: what the frozen linear layers of the language model are held in, in stages that do not train it
            whole: int8, nf4, fp4, torchao_int8, torchao_fp8, torchao_int4. A stage's own `adapt.llm.quantise` goes
            before it.
        gradient_checkpointing: recompute the layers of encoder and language model in the backward pass.

    Raises:
        ValueError: a GPU is asked for and there is none, or a strategy is not known or cannot work here.
    """

    accelerator: str = "auto"
    devices: int | str = "auto"
    precision: str = "auto"
    strategy: str = "auto"
    num_nodes: int | str = 1
    num_workers: int | str = "auto"
    threads: int | str = "auto"
    accumulate: int = 1
    rows_per_device: int | None = None
    memory_gib: float | int | None = None
    quantise: str | None = None
    gradient_checkpointing: bool = False

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
        if self.num_nodes == "auto":
            self.num_nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", 1)) if under_slurm() else 1
        if self.devices == "auto":
            tasks = os.environ.get("SLURM_NTASKS_PER_NODE") if under_slurm() else None
            self.devices = int(tasks) if tasks else torch.cuda.device_count() if on_gpu else 1
        self.devices = int(self.devices)
        if on_gpu and self.devices > torch.cuda.device_count():
            raise ValueError(
                f"hardware.devices={self.devices}, but torch sees {torch.cuda.device_count()} CUDA devices; "
                f"set hardware.devices={torch.cuda.device_count()}"
            )
        if self.precision == "auto":
            fast = torch.cuda.is_bf16_supported() if on_gpu else has_fast_bf16()
            self.precision = "bf16-mixed" if fast else "16-mixed" if on_gpu else "32-true"
        if self.strategy not in STRATEGIES:
            raise ValueError(f"hardware.strategy={self.strategy} is none of {', '.join(STRATEGIES)}")
        if self.strategy == "deepspeed_zero3":
            self._check_deepspeed()
        if self.strategy == "auto" and self.num_ranks > 1:
            self.strategy = "ddp"
        if self.rows_per_device is not None and self.rows_per_device < 1:
            raise ValueError(f"hardware.rows_per_device={self.rows_per_device} must be at least 1")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if self.num_workers == "auto":
            # On two cores a loader process takes from the step what it gives: 15 % slower on the embedded run.
            self.num_workers = min(8, max(1, cores // self.devices - 1)) if on_gpu else int(cores > 2)
        if self.threads == "auto":
            self.threads = max(1, int(os.environ.get("OMP_NUM_THREADS", cores)) // (1 if on_gpu else self.devices))

    @property
    def num_ranks(self) -> int:
        return int(self.devices) * int(self.num_nodes)

    @property
    def device(self) -> str:
        return "cuda" if self.accelerator == "gpu" else "cpu"

    @property
    def shards(self) -> bool:
        """Whether a rank holds only a share of the weights."""
        return self.strategy in ("fsdp", "deepspeed_zero3")

    def _check_deepspeed(self) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise ValueError(
                "hardware.strategy=deepspeed_zero3 needs deepspeed: pip install '.[deepspeed]'; "
                "hardware.strategy=fsdp shares the weights without it"
            )
        if self.precision == "16-mixed":
            raise ValueError(
                "hardware.precision=16-mixed is nothing for hardware.strategy=deepspeed_zero3; set bf16-mixed, or "
                "32-true where the GPU has no bf16"
            )

    def apply(self) -> None:
        """Set torch's global settings for this process."""
        import torch

        torch.set_num_threads(int(self.threads))
        torch.set_float32_matmul_precision("high")

    @property
    def memory(self) -> float:
        """Bytes one rank may hold: `memory_gib`, or what its GPU has, or its share of this machine's free memory."""
        import psutil
        import torch

        if self.memory_gib is not None:
            return float(self.memory_gib * 2**30)
        if self.accelerator == "gpu":
            return float(torch.cuda.get_device_properties(0).total_memory)
        return psutil.virtual_memory().available / self.devices

    def forget_peak(self) -> None:
        """Reset the peak that `peak_gib` reports."""
        import torch

        if self.accelerator == "gpu":
            torch.cuda.reset_peak_memory_stats()
        elif Path("/proc/self/clear_refs").exists():
            with contextlib.suppress(OSError):  # a container may forbid it; the peak is then that of the process
                Path("/proc/self/clear_refs").write_text("5")

    def peak_gib(self) -> float:
        """Most memory held since `forget_peak`: by tensors on a GPU, by this whole process on a CPU."""
        import resource

        import torch

        if self.accelerator == "gpu":
            return torch.cuda.max_memory_allocated() / 2**30
        status = Path("/proc/self/status")
        if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
            return int(found[1]) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def micro_batches(self, batch_size: int) -> int:
        """Micro-batches of an optimiser step of `batch_size` rows: the fewest that respect `rows_per_device`.

        Rows that do not divide among ranks and micro-batches are refused by the data module.
        """
        rows, rest = divmod(batch_size, self.num_ranks)
        if self.rows_per_device is None or rest:
            return self.accumulate
        limit = min(self.rows_per_device, max(1, rows // self.accumulate))
        return next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= limit)

    def trainer(self, accumulate: int | None = None) -> dict:
        """Keyword arguments for Lightning's Trainer.

        Args:
            accumulate: micro-batches a step, `micro_batches(batch_size)`; None for `self.accumulate`.
        """
        return dict(
            accelerator=self.accelerator,
            devices=self.devices,
            num_nodes=self.num_nodes,
            # DeepSpeed is told of autocast in its own configuration: else it would hold weights and norms in 16 bits.
            precision="32-true" if self.strategy == "deepspeed_zero3" else self.precision,
            strategy=self._strategy(),
            accumulate_grad_batches=self.accumulate if accumulate is None else accumulate,
        )

    def _strategy(self):
        backend = None if self.device == "cuda" else "gloo"
        if self.strategy == "ddp":
            from lightning.pytorch.strategies import DDPStrategy

            # Every trainable parameter is touched in every step (the VLM sees to it), so nothing is searched for.
            return DDPStrategy(find_unused_parameters=False, process_group_backend=backend)
        if self.strategy == "fsdp":
            from lightning.pytorch.strategies import ModelParallelStrategy

            # One file with the whole state: a run can go on with another number of ranks.
            return ModelParallelStrategy(
                data_parallel_size=self.num_ranks,
                tensor_parallel_size=1,
                save_distributed_checkpoint=False,
                process_group_backend=backend,
            )
        if self.strategy == "deepspeed_zero3":
            if self.device == "cpu":
                from fastvlm.zero import DeepSpeedOnCPU

                return DeepSpeedOnCPU(config=self.deepspeed(), process_group_backend=backend)
            from lightning.pytorch.strategies import DeepSpeedStrategy

            return DeepSpeedStrategy(config=self.deepspeed())
        return self.strategy

    def deepspeed(self) -> dict:
        """DeepSpeed's own configuration: ZeRO stage 3 over weights in fp32, matrix products in this precision."""
        autocast = {"enabled": self.precision == "bf16-mixed", "dtype": "bfloat16"}
        return {
            "zero_optimization": {"stage": 3, "contiguous_gradients": True, "overlap_comm": self.device == "cuda"},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "torch_autocast": autocast,
            "train_micro_batch_size_per_gpu": 1,  # for its log alone: the plan says what a rank gets
        }
