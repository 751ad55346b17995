"""What the ranks of a run agree on beside Lightning's training: the first one decides, the others do as it does.

Started by Lightning itself, the first rank runs alone up to its first training, and all it decided lies on the disk
when the others begin. Started by torchrun or srun they run side by side from the first line: a checkpoint that the
first one is still copying is not there for the second.
"""

from __future__ import annotations

from typing import Any

from fastvlm.hardware import Hardware
from fastvlm.pipeline.messages import quiet_lightning


def join_ranks(hardware: Hardware) -> None:
    """Connect ranks that were all started at once; Lightning finds the connection and makes no other."""
    if hardware.num_ranks == 1:
        return
    import lightning as L
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    quiet_lightning()
    # Of all strategies the connection is the same, and this one asks for no model.
    plain = DDPStrategy(process_group_backend=None if hardware.device == "cuda" else "gloo")
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    strategy = L.Trainer(**hardware.trainer() | {"strategy": plain}, **quiet).strategy
    if not isinstance(strategy.cluster_environment, LightningEnvironment):
        strategy.setup_environment()


def agree(value: Any) -> Any:
    """What the first rank passes, on every rank; a rank that is alone, or not connected yet, keeps its own. All ranks
    must come here, and none goes on before the first has."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]
