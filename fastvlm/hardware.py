"""Accelerator, precision, strategy, workers and threads of a run, detected or configured."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512-BF16, AMX); otherwise bf16 autocast is slower than fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


STRATEGIES = ("auto", "ddp", "fsdp", "deepspeed_zero3")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def under_slurm() -> bool:
    """Whether `srun` started this process as a task; as in Lightning, interactive Slurm shells do not count."""
    return "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def is_first_rank() -> bool:
    """Whether this process has global rank 0, whether started alone, by Lightning, by torchrun or by srun."""
    for key in ("RANK", "SLURM_PROCID"):
        if key in os.environ and (key == "RANK" or under_slurm()):
            return os.environ[key] == "0"
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"


@dataclass(kw_only=True)
class Hardware:
    """Hardware settings of a run. Explicit values are passed to Lightning's Trainer; `auto` is resolved here.

    Args:
        accelerator: auto, cpu or gpu.
        devices: devices per machine; auto: all GPUs, or 1 on a CPU, or the number of tasks per node under srun.
        precision: auto, or one of Lightning's names 32-true, bf16-mixed and 16-mixed.
        strategy: auto; ddp, a replica on every device; fsdp, weights, gradients and optimiser state sharded by torch's
            FSDP2; deepspeed_zero3, the same by DeepSpeed's ZeRO stage 3 (needs the package deepspeed).
        num_nodes: number of machines; auto: those of the Slurm job, or 1 outside Slurm.
        num_workers: data loader processes per rank, or auto.
        threads: torch threads per process; auto: OMP_NUM_THREADS or the cores available here, divided among CPU ranks.
        accumulate: micro-batches per optimiser step; the global batch size is the stage's.
        rows_per_device: largest number of rows per micro-batch; a step is split into as many micro-batches as needed.
        memory_gib: memory of a device in GiB for the estimate before a run; None: what it has. If set, small models are
            estimated, too.
        quantise: format for the linear layers of the language model, in stages that train none of its own weights
            (int8, nf4, fp4, torchao_int8, torchao_fp8, torchao_int4). A stage's `adapt.llm.quantise` takes precedence.
        gradient_checkpointing: recompute the layers of encoder and language model in the backward pass.

    Raises:
        ValueError: there are fewer GPUs than requested, or a precision or strategy is unknown or cannot work here.
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
            fast = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else has_fast_bf16()
            self.precision = "bf16-mixed" if fast else "16-mixed" if on_gpu else "32-true"
        if self.precision not in PRECISIONS:  # 16 bits for all would round frozen weights, too, and lose small updates
            raise ValueError(
                f"hardware.precision={self.precision} is not one of {', '.join(PRECISIONS)}; set bf16-mixed, and "
                "llm.dtype=bfloat16 if the language model is frozen"
            )
        if self.strategy not in STRATEGIES:
            raise ValueError(f"hardware.strategy={self.strategy} is not one of {', '.join(STRATEGIES)}")
        if self.strategy == "deepspeed_zero3" and importlib.util.find_spec("deepspeed") is None:
            raise ValueError(
                "hardware.strategy=deepspeed_zero3 needs deepspeed: pip install '.[deepspeed]'; "
                "hardware.strategy=fsdp shares the weights without it"
            )
        if self.shards and self.precision == "16-mixed":
            raise ValueError(
                f"hardware.precision=16-mixed is nothing for hardware.strategy={self.strategy}; set bf16-mixed, or "
                "32-true where the GPU has no bf16"
            )
        if self.strategy == "auto" and self.num_ranks > 1:
            self.strategy = "ddp"
        for key in ("rows_per_device", "accumulate", "devices", "num_nodes", "threads"):
            if isinstance(value := getattr(self, key), int) and value < 1:
                raise ValueError(f"hardware.{key}={value} must be at least 1")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if self.num_workers == "auto":
            # On two cores a loader process competes with the step: 15 % slower on the embedded run.
            self.num_workers = min(8, max(1, cores // self.devices - 1)) if on_gpu else int(cores > 2)
        if self.threads == "auto":
            self.threads = max(1, int(os.environ.get("OMP_NUM_THREADS", cores)) // (1 if on_gpu else self.devices))

    def decides(self) -> dict[str, str | None]:
        """Return what of the hardware decides a result's numbers: kind of device, precision, quantisation."""
        import torch

        kind = torch.cuda.get_device_name() if self.accelerator == "gpu" else self.accelerator
        return {"accelerator": kind, "precision": self.precision, "quantise": self.quantise}

    @property
    def num_ranks(self) -> int:
        return int(self.devices) * int(self.num_nodes)

    @property
    def device(self) -> str:
        return "cuda" if self.accelerator == "gpu" else "cpu"

    @property
    def shards(self) -> bool:
        """Whether a rank holds only a shard of the weights."""
        return self.strategy in ("fsdp", "deepspeed_zero3")

    def apply(self) -> None:
        """Set torch's global settings for this process."""
        import torch

        torch.set_num_threads(int(self.threads))
        torch.set_float32_matmul_precision("high")

    @property
    def memory(self) -> float:
        """Bytes available to one rank: `memory_gib`, its GPU's memory, or its share of this machine's free memory."""
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
            with contextlib.suppress(OSError):  # a container may forbid it; the peak is then the process's so far
                Path("/proc/self/clear_refs").write_text("5")

    def peak_gib(self) -> float:
        """Return the peak memory since `forget_peak` in GiB: of tensors on a GPU, of this whole process on a CPU."""
        import resource

        import torch

        if self.accelerator == "gpu":
            return torch.cuda.max_memory_allocated() / 2**30
        status = Path("/proc/self/status")
        if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
            return int(found[1]) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def micro_batches(self, batch_size: int) -> int:
        """Return the smallest number of micro-batches for `batch_size` rows that respects `rows_per_device`.

        The data module refuses rows that do not divide evenly among ranks and micro-batches.
        """
        rows, rest = divmod(batch_size, self.num_ranks)
        if self.rows_per_device is None or rest:
            return self.accumulate
        limit = min(self.rows_per_device, max(1, rows // self.accumulate))
        return next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= limit)

    def trainer(self, accumulate: int | None = None) -> dict:
        """Return keyword arguments for Lightning's Trainer.

        Args:
            accumulate: micro-batches per step, from `micro_batches(batch_size)`; None: `self.accumulate`.
        """
        return dict(
            accelerator=self.accelerator,
            devices=self.devices,
            num_nodes=self.num_nodes,
            # DeepSpeed gets autocast from its own configuration; otherwise it would hold weights and norms in 16 bits.
            precision="32-true" if self.strategy == "deepspeed_zero3" else self.precision,
            strategy=self._strategy(),
            accumulate_grad_batches=self.accumulate if accumulate is None else accumulate,
        )

    def plugins(self) -> list:
        """Return Lightning's plugins: under Slurm one by which a job is requeued by Slurm alone.

        Lightning would write a checkpoint of its own at each preemption, and read another.
        """
        from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

        if not under_slurm() or TorchElasticEnvironment.detect():
            return []
        return [SLURMEnvironment(auto_requeue=False)]

    def _strategy(self):
        backend = None if self.device == "cuda" else "gloo"
        if self.strategy == "ddp":
            from lightning.pytorch.strategies import DDPStrategy

            # The VLM uses every trainable parameter in every step, so DDP need not search for unused ones.
            return DDPStrategy(find_unused_parameters=False, process_group_backend=backend)
        if self.strategy == "fsdp":
            from lightning.pytorch.strategies import ModelParallelStrategy

            # One checkpoint file with the whole state, so that a run can resume with another number of ranks.
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
        """Return DeepSpeed's configuration: ZeRO stage 3 with fp32 weights, and autocast under bf16-mixed."""
        autocast = {"enabled": self.precision == "bf16-mixed", "dtype": "bfloat16"}
        return {
            "zero_optimization": {"stage": 3, "contiguous_gradients": True, "overlap_comm": self.device == "cuda"},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "torch_autocast": autocast,
            "train_micro_batch_size_per_gpu": 1,  # only logged: the data plan decides what a rank gets
        }
