"""Run a frozen encoder once over a stage's images before the first step, so that training reads cached features."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from fastvlm.callbacks.freezing import digest, tensors
from fastvlm.callbacks.handoff import write_json
from fastvlm.foundation import rests_on

# Under half precision features are stored in it, because the next layer would round to it anyway.
STORED = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
# Code that turns a file into views, and code that computes and writes features.
IMAGES = ("fastvlm.data.transforms", "fastvlm.data.collate")
PASS = (Path(__file__), Path(__file__).parents[1] / "data" / "feature_pass.py")
PIXELS = 4 << 20  # pixels per forward pass on a CPU; eight times as many on a GPU


def weights_hash(part: nn.Module) -> str:
    """Hash a module's structure and the names, shapes, dtypes and bytes of all its parameters and buffers."""
    hashed = hashlib.sha256(repr(part).encode())
    for name, tensor in sorted(tensors(part), key=lambda item: item[0]):
        hashed.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {digest(tensor)}\n".encode())
    return hashed.hexdigest()


def code_of(model: nn.Module) -> dict[str, dict]:
    """Return the code that a VLM's patches depend on, as `source` and `versions` of `rests_on`.

    It starts from the Python modules that define the encoder's actual layers, so that user-defined, adapter and
    quantised layers are included.
    """
    layers = {type(module).__module__ for module in (model, *model.encoder.modules())}
    return rests_on({*layers, *IMAGES}, files=PASS)


class CachedFeatures(L.Callback):
    """Makes the data module write missing encoder features and read them in place of images.

    It must come after `StageFreezing` in the list of callbacks.

    Args:
        name: name of the stage.
        description: the encoder's configuration; weights, precision, device, code and library versions are added to it.
        path: file of the record (features.json).
        say: called with messages.

    Raises:
        ValueError: (setup) the stage trains the encoder, a module of it is in training mode, or the strategy shards it.
    """

    def __init__(self, *, name: str, description: dict, path: Path, say: Callable[[str], None] = print):
        self.name, self.description, self.path, self.say = name, dict(description), Path(path), say
        self.where = f"stages.{name}.cache_features"
        self.record: dict | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        learns = [name for name in pl_module.learning_rates if name.split(".")[0] == "encoder"]
        if learns:
            raise ValueError(
                f"{self.where}=true, but the encoder learns ({learns[0]} and {len(learns) - 1} more): take encoder out "
                f"of stages.{self.name}.trainable, or {self.where}=false"
            )
        if live := [name or "itself" for name, m in pl_module.model.encoder.named_modules() if m.training]:
            raise ValueError(
                f"{self.where}=true, but a module of the encoder is in training mode ({live[0]}); set it false"
            )
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(
                f"{self.where}=true needs a whole encoder on every device; set hardware.strategy=ddp, or set it false"
            )

    def on_fit_start(self, trainer: L.Trainer, stage: L.LightningModule) -> None:
        data, model = trainer.datamodule, stage.model
        if not data.plan.num_images:
            self.say(f"features: {self.where}=true, but the stage has no image")
            return

        def encode(pixel_values: Tensor, is_tile: Tensor | None = None) -> Tensor:
            is_tile = None if is_tile is None else is_tile.to(stage.device)
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                features = model.encode_patches(pixel_values.to(stage.device, non_blocking=True), is_tile)
            return features.to(dtype).cpu()

        precision = str(trainer.precision)
        dtype = STORED.get(precision.split("-")[0], torch.float32)
        size = data.image_size
        shape = tuple(encode(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape[1:])
        on_gpu = stage.device.type == "cuda"
        description = self.description | {
            "weights": weights_hash(model.encoder),
            "pixels": [digest(model.pixel_mean), digest(model.pixel_std)],
            "precision": precision,
            "device": torch.cuda.get_device_name(stage.device) if on_gpu else "cpu",
            "matmul": torch.get_float32_matmul_precision(),
            **code_of(model),
        }
        self.record = data.write_features(
            encode,
            description=description,
            shape=shape,
            dtype=dtype,
            batch_size=max(1, min(512, PIXELS * (8 if on_gpu else 1) // size**2)),
            where=self.where,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            gather=gather(trainer),
            say=lambda text: self.say(f"  {text}"),
        )
        if trainer.is_global_zero:
            write_json(self.path, self.record)


def gather(trainer: L.Trainer) -> Callable[[object], list]:
    """Return a function that gathers a value from all ranks into a list on every rank."""
    if trainer.world_size == 1:
        return lambda value: [value]

    def all_gather(value):
        out = [None] * trainer.world_size
        torch.distributed.all_gather_object(out, value)
        return out

    return all_gather
