"""A stage's data: from its configuration to its plan and loaders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig

from fastvlm.build import build_transform, instantiate, seed_of
from fastvlm.data.datamodule import MixtureDataModule
from fastvlm.hardware import Hardware
from fastvlm.models.vlm import VLM
from fastvlm.tokens import Tokenizer


def build_data(
    name: str,
    stage: DictConfig,
    model: VLM,
    tokenizer: Tokenizer,
    *,
    hardware: Hardware,
    options: DictConfig,
    seed: int,
    plan_cache: Path | None,
) -> MixtureDataModule:
    """Build the data module of a stage.

    Args:
        options: the configuration's `data`.
        seed: the stage's seed; that of the data order is derived from it and the stage's name.
        plan_cache: folder for plans that took seconds to make; None: not cached.

    Raises:
        ValueError: a row has no room for an image, or the language model has none for a row.
    """
    slots = check_size(name, stage, model)
    return MixtureDataModule(
        instantiate(stage.mixture, key=f"stages.{name}.mixture"),
        tokenizer=tokenizer,
        image_size=stage.image_size,
        tokens_per_image=slots,
        batch_size=stage.batch_size,
        max_tokens=stage.max_tokens,
        max_images=stage.max_images,
        transform=build_transform(stage),
        packing=stage.packing,
        num_steps=stage.steps,
        epochs=stage.epochs,
        accumulate=hardware.micro_batches(stage.batch_size),
        seed=seed_of(seed, name),
        num_workers=hardware.num_workers,
        val_samples=stage.val_samples,
        pack_window=stage.pack_window,
        sort_window=stage.sort_window,
        plan_cache=plan_cache,
        max_skipped_share=options.max_skipped_share,
        cache_bytes=options.cache_mb << 20,
        where=f"stages.{name}.",
    )


@contextmanager
def in_stage(name: str) -> Iterator[None]:
    """Add the stage's name to errors about its mixture or one of its sources.

    Raises:
        ValueError: the same error, with the stage's name.
    """
    try:
        yield
    except ValueError as error:
        words = str(error)
        if words.startswith("mixture."):
            raise ValueError(f"stages.{name}.{words}") from error
        if words.startswith("source "):
            raise ValueError(f"stages.{name}.mixture: {words}") from error
        raise


def check_size(name: str, stage: DictConfig, model: VLM) -> int:
    """Check that a stage's image size suits the model and its rows have room for an image; return the slots of a view.

    Raises:
        ValueError: names the stage and the keys to change.
    """
    try:
        slots = slots_of(stage, model)
    except ValueError as error:
        raise ValueError(f"stages.{name}: {error}") from None
    check_room(name, stage, slots=slots, positions=model.llm.max_positions if "llm" in stage.parts else None)
    return slots


def slots_of(stage: DictConfig, model: VLM) -> int:
    """Return the positions that a view takes: 1 in a stage that does not feed images to the language model.

    Such a stage has no slots and must not depend on their number.
    """
    reads_images = {"encoder", "llm"} <= set(stage.parts)
    return model.num_visual_tokens(stage.image_size) if reads_images else 1


def check_room(name: str, stage: DictConfig, *, slots: int, positions: int | None) -> None:
    """Check that a row has room for an image, and the language model for a row.

    Raises:
        ValueError: gives both numbers and the keys that change them.
    """
    if slots >= stage.max_tokens:
        raise ValueError(
            f"stages.{name}.max_tokens={stage.max_tokens}, but one view has {slots} visual tokens at "
            f"image_size={stage.image_size}: raise max_tokens, lower image_size, or choose a resampler with fewer"
        )
    if positions is not None and stage.max_tokens > positions:
        raise ValueError(
            f"stages.{name}.max_tokens={stage.max_tokens}, but llm has {positions} positions: lower max_tokens, or "
            "choose a language model with more"
        )
