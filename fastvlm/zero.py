"""DeepSpeed's ZeRO without a GPU: Lightning's strategy, which by itself refuses the CPU, on gloo."""

from __future__ import annotations

import os

from lightning.pytorch.strategies import DeepSpeedStrategy


class DeepSpeedOnCPU(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy on DeepSpeed's CPU accelerator (gloo; needs gcc and ninja to build)."""

    def __init__(self, **options):
        os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported and looks for devices itself
        super().__init__(**options)

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model, optimizer, lr_scheduler=None):
        import deepspeed

        # Lightning's own call passes a device index, which a CPU does not have.
        engine, optimizer, _, _ = deepspeed.initialize(
            config=self.config,
            model=model,
            model_parameters=(p for p in model.parameters() if p.requires_grad),
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, optimizer
