"""LightningDataModule that reads the batches of a plan."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, Sampler

from fastvlm.data.dataset import PlannedDataset
from fastvlm.data.feature_pass import Encode, fill
from fastvlm.data.features import FeatureStore
from fastvlm.data.lengths import check_damage
from fastvlm.data.plan import Plan
from fastvlm.data.replan import Seen
from fastvlm.data.source import Mixture
from fastvlm.data.transforms import ImageTransform
from fastvlm.data.validation import ValidationPlan
from fastvlm.tokens import Tokenizer

AHEAD = 4  # batches that each worker prefetches


class StepSampler(Sampler[int]):
    """Micro-batches `start .. count`, in order.

    Its length is that of the whole epoch, not of the remainder: after a resume, Lightning's fetcher adds the batches
    from before to those it has fetched, and ends the epoch when the sum reaches the length.
    """

    def __init__(self, count: int, *, start: int = 0):
        self.count, self.start = count, start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.count))

    def __len__(self) -> int:
        return self.count


class PlanLoader(DataLoader):
    """A DataLoader whose position is the Trainer's step counter.

    Its empty state tells Lightning that it can resume mid-epoch; the data module's state holds the rest.
    """

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class MixtureDataModule(L.LightningDataModule):
    """The data of one stage. The stage is one Trainer epoch (`max_epochs=1` or -1) of `plan.num_steps` steps.

    Args:
        mixture: sources and shares.
        tokenizer: shared with the model.
        image_size: side of the square views, pixels.
        tokens_per_image: slots per view: `VLM.num_visual_tokens(image_size)`.
        batch_size: rows per optimiser step, over all ranks and micro-batches.
        max_tokens, max_images: budget of a row; an image counts as one towards max_images, or with tiles as its number
            of views.
        transform: image file -> views of `image_size`; None: pad images to squares. Only training images are augmented.
        packing: put several samples into a row.
        num_steps, epochs: length of the stage, at most one of them; neither: one epoch.
        accumulate: micro-batches per step; must equal the Trainer's `accumulate_grad_batches`.
        seed: seed of the order and of augmentation.
        num_workers: loader processes per rank; the batches are the same for any number.
        val_samples: validation samples of all sources together, balanced; 0: no validation.
        pack_window, sort_window, plan_cache: see `Plan` (`cache`).
        max_skipped_share, cache_bytes: see `PlannedDataset`; the share also bounds what the indexes of each source
            already find damaged.
        where: prefix of the stage's keys in error messages, such as `stages.align.`.

    Raises:
        ValueError: in `setup`, from the plan, or if too much of a source is damaged; from the loaders, if rows do not
            divide among ranks and micro-batches or the checkpoint was written inside an optimiser step. One written at
            the end of a step may come from other numbers of ranks and micro-batches.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        tokenizer: Tokenizer,
        image_size: int,
        tokens_per_image: int,
        batch_size: int,
        max_tokens: int,
        max_images: int = 8,
        packing: bool = True,
        transform: ImageTransform | None = None,
        num_steps: int | None = None,
        epochs: float | int | None = None,
        accumulate: int = 1,
        seed: int = 0,
        num_workers: int = 0,
        val_samples: int = 256,
        pack_window: int | None = None,
        sort_window: int = 0,
        plan_cache: str | Path | None = None,
        max_skipped_share: float = 0.01,
        cache_bytes: int = 256 << 20,
        where: str = "",
    ):
        super().__init__()
        self.mixture, self.tokenizer, self.num_workers = mixture, tokenizer, num_workers
        self.accumulate, self.val_samples, self.image_size = accumulate, val_samples, image_size
        self.plan: Plan | None = None
        self.val_plan: ValidationPlan | None = None
        self._budget = {
            "tokens_per_image": tokens_per_image,
            "max_tokens": max_tokens,
            "max_images": max_images,
            "packing": packing,
            "batch_size": batch_size,
            "transform": transform,
            "where": where,
        }
        self._length = {"num_steps": num_steps, "epochs": epochs}
        self._order = {"seed": seed, "pack_window": pack_window, "sort_window": sort_window, "cache": plan_cache}
        self._reading = {
            "tokenizer": tokenizer,
            "image_size": image_size,
            "transform": transform,
            "max_skipped_share": max_skipped_share,
            "cache_bytes": cache_bytes,
        }

    def replan(self, after: Seen) -> None:
        """Plan the rest of a stage from what it has seen; training resumes from the checkpoint of that step."""
        self._order["after"] = after
        self.plan = None
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Open the indexes (building those that are missing) and make the plan."""
        if self.plan is None:
            self.plan = Plan(self.mixture, self.tokenizer, **self._budget, **self._length, **self._order)
        if (
            self.val_plan is None
            and self.val_samples
            and any(s.has_split("val") for s in self.mixture.sources.values())
        ):
            self.val_plan = ValidationPlan(self.mixture, self.tokenizer, num_samples=self.val_samples, **self._budget)
        for plan in (self.plan, self.val_plan):
            if plan is not None:
                check_damage(plan.sources, max_share=self._reading["max_skipped_share"])

    def state_dict(self) -> dict[str, int | str]:
        """Return what a resumed run needs: (epoch, step in it) of the next batch, and the plan's fingerprint."""
        done = 0 if self.trainer is None else min(self.trainer.global_step, self.plan.num_steps)
        epoch, step = self.plan.position(done)
        return {"epoch": epoch, "step": step, "plan": self.plan.fingerprint}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Check that the checkpoint was written under this plan.

        After `replan`, one of any plan is accepted, and the loader checks its step.

        Raises:
            ValueError: training would continue in another order, over samples it has already seen.
        """
        fitting = self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING
        if fitting and self.plan.after is None and state["plan"] != self.plan.fingerprint:
            raise ValueError(
                f"the checkpoint was written in epoch {state['epoch']}, step {state['step']} of plan {state['plan']}, "
                f"but sources, weights, shards, budget or seed make plan {self.plan.fingerprint} now; bring them back, "
                "or plan the rest from the samples seen (train.py: data.on_change=replan; a Trainer of your own: "
                "MixtureDataModule.replan(seen_before(folder, step)), the first plan kept by write_order)"
            )

    def write_features(
        self, encode: Encode, *, description: dict, shape: tuple[int, int], dtype: torch.dtype, **options
    ) -> dict:
        """Fill the feature store of an encoder and let the loaders read features instead of images.

        Args:
            encode: uint8 (I, 3, H, W) and which of them are tiles -> features (I, N, D), on the CPU in `dtype`.
            description: what the features depend on, besides the image and this module's transform.
            shape: (N, D) of one view.
            dtype: of the features.
            options: of `feature_pass.fill`.

        Returns:
            The record of the pass, see `fill`.

        Raises:
            ValueError: training images are augmented; from `fill`.
        """
        transform = self._reading["transform"] or ImageTransform(image_size=self.image_size)
        if transform.augment is not None:
            raise ValueError(
                f"{options['where']}=true, but augmentation ({', '.join(transform.augment.kinds)}) makes another image "
                "of it in every step; take image.augment out of the stage, or set it false"
            )
        settings = {key: getattr(transform, key) for key in ("image_size", "fit", "tiles", "padding")}
        store = FeatureStore(description | {"image": settings}, shape=shape, dtype=dtype)
        plans = [p for p in (self.plan, self.val_plan) if p is not None]
        about = fill(store, plans, encode=encode, transform=transform, num_workers=self.num_workers, **options)
        store.refresh()
        self._reading["features"] = store
        return about

    def train_dataloader(self) -> PlanLoader:
        """Return the loader of this rank's micro-batches, from where a resumed run continues."""
        options = {"accumulate": self.accumulate, "augment_seed": self._order["seed"]}
        dataset = PlannedDataset(self.plan, **options, **self._ranks(), **self._reading)
        self.plan.extend()  # before the workers fork, so that they share the arrays and need not plan
        return self._loader(dataset, start=self._start())

    def val_dataloader(self) -> PlanLoader | list:
        """Return the loader of the validation set, or [] if there is none."""
        if self.val_plan is None:
            return []
        options = {"accumulate": self.accumulate, **self._ranks(), **self._reading}
        return self._loader(PlannedDataset(self.val_plan, **options), start=0)

    def _loader(self, dataset: PlannedDataset, *, start: int) -> PlanLoader:
        # Per worker: the prefetched batches, the one being read, and two that the model may still hold.
        dataset.furnish(workers=self.num_workers, each=AHEAD + 3 if self.num_workers else 3)
        return PlanLoader(
            dataset,
            sampler=StepSampler(len(dataset), start=start),
            batch_size=None,  # the dataset yields whole batches
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            prefetch_factor=AHEAD if self.num_workers else None,
            pin_memory=torch.cuda.is_available(),
        )

    def _ranks(self) -> dict[str, int]:
        trainer = self.trainer
        if trainer is None:
            return {"rank": 0, "world_size": 1}
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError("Trainer(use_distributed_sampler=True) would deal out rows a second time; set it to False")
        return {"rank": trainer.global_rank, "world_size": trainer.world_size}

    def _start(self) -> int:
        """Return the first micro-batch: the Trainer's step counter says where a resumed run begins."""
        trainer = self.trainer
        if trainer is None:
            return 0
        if trainer.accumulate_grad_batches != self.accumulate:
            raise ValueError(
                f"MixtureDataModule(accumulate={self.accumulate}) and Trainer(accumulate_grad_batches="
                f"{trainer.accumulate_grad_batches}) must have the same number"
            )
        if self.plan.after is not None and trainer.global_step < self.plan.after.step:
            raise ValueError(
                f"the plan goes on from step {self.plan.after.step}, but training stands at step "
                f"{trainer.global_step}; resume from the checkpoint of step {self.plan.after.step}"
            )
        start = trainer.global_step * self.accumulate
        if trainer.fit_loop.restarting:
            go_on_at(start, trainer)
        return start


def go_on_at(start: int, trainer: L.Trainer) -> None:
    """Make a resuming Trainer count its micro-batches from `start`, where its step begins.

    The checkpoint may have been written with another number of micro-batches per step.

    Raises:
        ValueError: it was written inside a step, whose gradients are lost.
    """
    loop = trainer.fit_loop.epoch_loop
    counts, optimizer = loop.batch_progress, loop.automatic_optimization.optim_progress.optimizer
    done = counts.current.processed
    # A step begins with zero_grad: one more zero_grad than steps means that a step has begun.
    begun, steps = optimizer.zero_grad.total.completed, optimizer.step.total.completed
    inside = begun > steps and counts.current.ready == done
    ended = begun == steps == trainer.global_step and counts.total.processed == done
    if inside or (done != start and not ended):
        raise ValueError(
            f"the checkpoint stands at micro-batch {done} and step {trainer.global_step}, inside a step; resume from "
            "one written at a step's end"
        )
    for count in (counts.current, counts.total):
        for event in ("ready", "started", "processed", "completed"):
            setattr(count, event, getattr(count, event) + start - done)
