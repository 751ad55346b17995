"""Run a frozen encoder once over a stage's images, before the first step; training then reads its cached outputs."""

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

# Half precision is stored as such: its first reader rounds to it anyway.
STORED = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
# From a file to the views an encoder sees, and the pass that writes what it says of them.
IMAGES = ("fastvlm.data.transforms", "fastvlm.data.collate")
PASS = (Path(__file__), Path(__file__).parents[1] / "data" / "feature_pass.py")
PIXELS = 4 << 20  # of all images of one forward pass on a CPU; eight times as many on a GPU


def weights_hash(part: nn.Module) -> str:
    """Hash of names, shapes, types and very bytes of all parameters and buffers, and of the modules that hold them."""
    hashed = hashlib.sha256(repr(part).encode())
    for name, tensor in sorted(tensors(part), key=lambda item: item[0]):
        hashed.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {digest(tensor)}\n".encode())
    return hashed.hexdigest()


def code_of(model: nn.Module) -> dict[str, dict]:
    """The code that a VLM's patches depend on: `source` and `versions` of `rests_on`.

    It begins with the modules that define the layers there are, so that a layer of the user's own, an adapter's or one
    of few bits counts too.
    """
    layers = {type(module).__module__ for module in (model, *model.encoder.modules())}
    return rests_on({*layers, *IMAGES}, files=PASS)


class CachedFeatures(L.Callback):
    """Let the data module write the encoder's features where they are missing, and read them in place of images.

    Must stand after `StageFreezing`.

    Args:
        name: of the stage.
        description: the encoder's configuration; weights, precision, device, code and versions of libraries are added
            here.
        path: where the record is written (features.json).
        say: where messages go.

    Raises:
        ValueError: the stage's encoder learns, or the strategy shards it.
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
    """The values of all ranks, as a list on every rank."""
    if trainer.world_size == 1:
        return lambda value: [value]

    def all_gather(value):
        out = [None] * trainer.world_size
        torch.distributed.all_gather_object(out, value)
        return out

    return all_gather
