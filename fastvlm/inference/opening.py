"""Open an engine from a run directory or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastvlm.inference.engine import Engine

MEGABYTE = 1 << 20


def check_source(text: str) -> Path:
    """Return the folder named by `run=...`; does not import torch.

    Raises:
        ValueError: the folder does not exist, or contains neither a run nor a saved model.
    """
    folder = Path(text)
    try:
        there = folder.is_dir()
    except (OSError, ValueError):  # name too long, not accessible
        there = False
    if not there:
        raise ValueError(f"run={text}: no such run directory; train one with `make train`, or name one below runs/")
    if not (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"run={text} holds no run (config.yaml is missing); name a directory below runs/")
    return folder


def check_device(device: str) -> str:
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device}: {str(error).splitlines()[0]}") from None
    return device


def open_engine(
    source: str | Path,
    *,
    device: str = "cpu",
    levers: str | Sequence[str] | None = None,
    image_store_bytes: int = 256 * MEGABYTE,
    prefix_store_bytes: int = 256 * MEGABYTE,
    **options,
) -> Engine:
    """Load a model and return its engine, which keeps images and prefixes between questions.

    Args:
        source: a run directory or a Hugging Face folder.
        levers: see `fastvlm.inference.levers`.
        options: passed to `Engine`.

    Raises:
        ValueError: the source or the device cannot be used, or a lever cannot be applied.
    """
    folder, device = check_source(str(source)), check_device(device)  # before anything large is imported
    from fastvlm.inference.levers import apply_levers, parse_levers

    parse_levers(levers, device=device)  # before the weights are read
    options |= {"device": device, "image_store_bytes": image_store_bytes, "prefix_store_bytes": prefix_store_bytes}
    from fastvlm.build import build_transform, load_run
    from fastvlm.inference.engine import Engine

    model, tokenizer, config = load_run(folder)
    pulled = apply_levers(model.to(device), levers)
    engine = Engine(model, tokenizer, image_size=config.image_size, transform=build_transform(config), **options)
    engine.levers = pulled
    return engine
