"""The handoff of a finished stage: the components it trained, and a manifest of their origin."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import lightning as L
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from fastvlm.files import replacing, write_whole

MANIFEST = "manifest.json"


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value) -> None:
    """Write JSON atomically: a reader sees the old file or the new one."""
    write_whole(path, json.dumps(value, indent=1, default=str))


def write_handoff(folder: Path, parts: dict[str, nn.Module], manifest: dict) -> dict:
    """Save `parts` as safetensors, then by atomic rename the manifest, which marks the stage as finished."""
    folder.mkdir(parents=True, exist_ok=True)
    components = {}
    for name, part in parts.items():
        path = folder / f"{name}.safetensors"
        with replacing(path) as beside:
            save_model(part, str(beside))
        components[name] = {
            "file": path.name,
            "sha256": file_hash(path),
            "parameters": sum(p.numel() for p in part.parameters()),
        }
    manifest = manifest | {"components": components, "created": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    write_json(folder / MANIFEST, manifest)
    return manifest


def read_manifest(folder: Path) -> dict | None:
    """Return the manifest of a finished stage, or None if the stage has not finished.

    Raises:
        ValueError: the manifest exists but cannot be read.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
        manifest["components"], manifest["hash"], manifest["tokenizer"]
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(
            f"{path}: not a handoff manifest ({error}); delete {folder.parent} to train the stage again"
        ) from None
    return manifest


def load_component(part: nn.Module, name: str, folder: Path, manifest: dict, *, tokenizer: str | None = None) -> None:
    """Load one component strictly: file hash, tokenizer (of the llm), names and shapes must match.

    Raises:
        ValueError: any of these differs; the message says which.
    """
    entry = manifest["components"][name]
    path = folder / entry["file"]
    if tokenizer is not None and name == "llm" and manifest["tokenizer"] != tokenizer:
        raise ValueError(
            f"{folder}: trained with tokenizer {manifest['tokenizer']}, this run has {tokenizer}; "
            "use the same `tokenizer`, or train the stage again without this handoff"
        )
    if not path.exists() or file_hash(path) != entry["sha256"]:
        raise ValueError(
            f"{path}: missing or not the file the manifest names; delete {folder.parent} to train the stage again"
        )
    try:
        with safe_open(path, framework="pt") as stored:
            found = {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}; delete {folder.parent} to train the stage again") from None
    wanted = {key: tuple(value.shape) for key, value in part.state_dict().items()}
    wrong = [f"{k} {found[k]} is {wanted[k]} here" for k in found if k in wanted and found[k] != wanted[k]]
    unknown = sorted(found.keys() - wanted.keys())
    if wrong or unknown:
        what = wrong + [f"{key} is not in this model" for key in unknown]
        raise ValueError(
            f"{path} does not fit `{name}`: {'; '.join(what[:3])}"
            f"{f' and {len(what) - 3} more' if len(what) > 3 else ''}; "
            f"choose the {name} it was trained with, or drop the handoff"
        )
    missing, _ = load_model(part, str(path), strict=False)
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} tensors of `{name}`, the first is {sorted(missing)[0]}; "
            f"choose the {name} it was trained with, or drop the handoff"
        )


class StageHandoff(L.Callback):
    """Writes the handoff after a stage has run all its steps; an interrupted stage writes none.

    Args:
        folder: folder of the handoff.
        manifest: the manifest without components and metrics.
        finish: called before writing; merges adapters and returns the metrics for the manifest.
    """

    def __init__(self, folder: Path, *, manifest: dict, finish: Callable[[], dict[str, float]]):
        self.folder, self.manifest, self.finish = Path(folder), manifest, finish
        self.written: dict | None = None

    def on_fit_end(self, trainer: L.Trainer, stage: L.LightningModule) -> None:
        if trainer.global_step < stage.num_steps:
            return
        stage.gather_weights()
        trained = {name.split(".")[0] for name in stage.learning_rates}
        metrics = self.finish()
        if trainer.is_global_zero:
            parts = {name: part for name, part in stage.model.parts.items() if name in trained}
            self.written = write_handoff(self.folder, parts, self.manifest | {"metrics": metrics})
        trainer.strategy.barrier("handoff")
