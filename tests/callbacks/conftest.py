import lightning as L
import pytest
from tiny_stage import TinyData, TinyStage


@pytest.fixture
def fit(tmp_path):
    """fit(num_steps, callbacks, **trainer arguments) -> trainer, on the CPU, in `tmp_path`."""

    def run(num_steps, callbacks, *, ckpt_path=None, stop=None, validate=True, logger=False, folder=tmp_path, **kwargs):
        options = {"devices": 1, "enable_checkpointing": False, "num_sanity_val_steps": 0}
        options |= {"enable_progress_bar": False} | kwargs
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=num_steps,
            logger=logger,
            callbacks=callbacks,
            default_root_dir=folder,
            enable_model_summary=False,
            val_check_interval=None,
            check_val_every_n_epoch=1,
            **options,
        )
        trainer.fit(TinyStage(), TinyData(stop or num_steps, validate=validate), ckpt_path=ckpt_path)
        return trainer

    return run
