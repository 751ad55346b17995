"""Agreement between the ranks of a run outside Lightning's training: the first rank decides, the others follow.

If Lightning starts the ranks, the first one runs alone up to its first training, and everything it decided is on disk
when the others begin. If torchrun or srun starts them, they run in parallel from the first line: a checkpoint that the
first rank is still copying does not exist yet for the second.
"""

from __future__ import annotations

from typing import Any

from fastvlm.hardware import Hardware
from fastvlm.pipeline.messages import quiet_lightning


def join_ranks(hardware: Hardware) -> None:
    """Connect ranks that were all started at once; Lightning then reuses the process group."""
    if hardware.num_ranks == 1:
        return
    import lightning as L
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    quiet_lightning()
    # The process group is the same for all strategies, and this one needs no model to create it.
    plain = DDPStrategy(process_group_backend=None if hardware.device == "cuda" else "gloo")
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    strategy = L.Trainer(**hardware.trainer() | {"strategy": plain}, **quiet).strategy
    if not isinstance(strategy.cluster_environment, LightningEnvironment):
        strategy.setup_environment()


def agree(value: Any) -> Any:
    """Return the first rank's value on every rank; a rank that is alone or not connected yet keeps its own.

    All ranks must call this, and none continues before the first one has called it.
    """
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]
