"""Train one stage with Lightning's Trainer: its objective and callbacks."""

from __future__ import annotations

import shutil
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from omegaconf import OmegaConf

from fastvlm.build import build_transform, instantiate
from fastvlm.callbacks.answer_speed import AnswerSpeed
from fastvlm.callbacks.cost import StepClock, count_forward, held_bytes, learned_shares, stage_cost
from fastvlm.callbacks.features import CachedFeatures
from fastvlm.callbacks.handoff import StageHandoff
from fastvlm.callbacks.metrics import Metrics
from fastvlm.callbacks.progress import Progress
from fastvlm.callbacks.provenance import Provenance
from fastvlm.callbacks.rehearsal import LongestFirst
from fastvlm.callbacks.samples import Samples
from fastvlm.data.kept_plan import write_plan
from fastvlm.files import replacing
from fastvlm.hardware import is_first_rank
from fastvlm.identity import commit, hash_of
from fastvlm.pipeline.held_out import answer_speed, generate_answers, held_out_records
from fastvlm.pipeline.learned import build_freezing
from fastvlm.pipeline.messages import quiet_lightning, say, stage_summary
from fastvlm.pipeline.ranks import agree
from fastvlm.pipeline.stage_folder import newest_checkpoint
from fastvlm.pipeline.strategies import check_deepspeed, check_fsdp, check_resumed

if TYPE_CHECKING:
    from fastvlm.pipeline.stage_run import StageRun


class Training:
    """One stage's training, resumed from its newest checkpoint if there is one.

    Args:
        stage: what is trained, on which data, and the folder for its outputs.

    Raises:
        ValueError: `cache_features` if no rank holds the whole encoder; a setting that FSDP2 or DeepSpeed does not
            support; another strategy wrote the checkpoint.
    """

    def __init__(self, stage: StageRun):
        quiet_lightning()
        self.stage, self.pipeline, self.hardware = stage, stage.pipeline, stage.pipeline.hardware
        if self.hardware.strategy == "deepspeed_zero3":
            longest_first = self.pipeline.config.data.longest_first
            check_deepspeed(stage.name, stage.config, quantise=self.hardware.quantise, longest_first=longest_first)
        if self.hardware.strategy == "fsdp":
            check_fsdp(stage.name, stage.config)
        self.name, self.config, self.folder = stage.name, stage.config, stage.folder
        self.plain = OmegaConf.to_container(stage.config, resolve=True)
        self.plan = stage.data.plan
        self.module = self.build_module()
        path, quantise = self.folder / "freezing.json", self.hardware.quantise
        self.freezing = build_freezing(self.name, self.plain, quantise=quantise, path=path)
        self.metrics = Metrics(self.pipeline.config.log_every, path=self.folder / "metrics.jsonl")
        self.clock = StepClock()
        size = {"image_size": self.config.image_size, "length": self.config.max_tokens}
        # The forward pass of a pretrained VLM is its own, so its operations are not counted.
        whole = bool(self.pipeline.config.vlm)
        self.forward = None if whole else count_forward(self.pipeline.model, parts=list(self.config.parts), **size)
        self.resume = agree(newest_checkpoint(self.folder))
        if self.resume:
            check_resumed(self.resume, strategy=self.hardware.strategy)
        self.logger = self.build_logger()
        self.trainer = self.build_trainer()

    def run(self) -> None:
        """Train to the last step, after which the handoff is written.

        Raises:
            KeyboardInterrupt: training was interrupted; the newest checkpoint is kept.
        """
        say(stage_summary(self.name, self.plain, self.plan, folders=self.pipeline.folders, resume=self.resume))
        if is_first_rank():
            write_plan(self.plan, self.folder, identity=self.stage.identity)
        self.hardware.forget_peak()
        status = "FAILED"
        try:
            self.fit()
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            if self.logger:
                self.pipeline.tracking.finish(self.logger.run_id, status)
        say("\n".join("  " + line for line in self.freezing.table().splitlines()))
        holder = "tensors on the device" if self.hardware.device == "cuda" else "the whole process"
        say(f"  peak memory {self.hardware.peak_gib():.2f} GiB ({holder})")
        if self.trainer.is_global_zero:
            checkpoints = self.folder.glob("step=*.ckpt"), self.folder.glob(".step=*.part")
            for old in (*chain(*checkpoints), self.folder / "order.npz"):
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)

    def fit(self) -> None:
        checkpoint = {"ckpt_path": str(self.resume), "weights_only": False} if self.resume else {}
        try:
            self.trainer.fit(self.module, datamodule=self.stage.data, **checkpoint)
        except SystemExit:  # Lightning turns Ctrl-C into this, with a failure status
            if not self.trainer.interrupted:
                raise
        if self.trainer.interrupted or self.trainer.global_step < self.plan.num_steps:
            raise KeyboardInterrupt

    def build_module(self) -> L.LightningModule:
        config, where = self.config, f"stages.{self.name}"
        return instantiate(
            config.objective,
            key=f"{where}.objective",
            model=self.pipeline.model,
            name=self.name,
            num_steps=self.plan.num_steps,
            optimizer=instantiate(config.optimizer, key=f"{where}.optimizer"),
            warmup_steps=config.warmup_steps,
            decay=config.decay,
            final=config.final,
            decay_steps=config.decay_steps,
            seed=self.stage.seed,
        )

    def build_logger(self):
        """Return the stage's logger, None without tracking; a resumed stage continues its MLflow run."""
        tracking = self.pipeline.tracking
        if not tracking:
            return None
        tags = {"stage": self.name, "hash": self.stage.key}
        before = tracking.find_run(tags) if self.resume else None
        return tracking.stage_logger(self.name, parent=self.pipeline.run_id, tags=tags, run_id=before)

    def build_trainer(self) -> L.Trainer:
        steps, accumulate = self.plan.num_steps, self.stage.data.accumulate
        return L.Trainer(
            **self.hardware.trainer(accumulate),
            default_root_dir=str(self.folder),
            max_epochs=1,
            max_steps=steps,
            gradient_clip_val=self.config.clip,
            val_check_interval=min(self.config.validate_every or steps, steps) * accumulate,
            num_sanity_val_steps=0,
            logger=self.logger or False,
            callbacks=self.build_callbacks(),
            plugins=[WholeCheckpoints(), *self.hardware.plugins()],
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=10**9,  # the Metrics callback logs
            use_distributed_sampler=False,  # the plan already gives every rank its rows
            benchmark=True,
        )

    def build_callbacks(self) -> list[L.Callback]:
        """Return the callbacks in calling order: freezing comes first, because the others read what learns."""
        checkpoints = Checkpoints(
            dirpath=self.folder,
            filename="{step}",
            every_n_train_steps=self.pipeline.config.checkpoint_every,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        provenance = Provenance(
            config={"stage": self.name, **self.stage.identity["config"], "cache_features": self.config.cache_features},
            seeds={"seed": self.stage.seed},
        )
        return [
            self.freezing,
            *([LongestFirst(self.plan, say=say)] if self.pipeline.config.data.longest_first else []),
            *([self.cached_features()] if self.config.cache_features else []),
            self.metrics,
            *self.answer_speed(),
            Progress(),
            *self.samples(),
            provenance,
            checkpoints,
            StageHandoff(self.folder / "handoff", manifest=self.manifest(), finish=self.finish),
            self.clock,
            LastValidation(),
        ]

    def cached_features(self) -> CachedFeatures:
        if self.hardware.shards:
            raise ValueError(
                f"stages.{self.name}.cache_features=true, but with hardware.strategy={self.hardware.strategy} no rank "
                "holds the encoder; write the features with hardware.strategy=ddp, or set it false"
            )
        made = self.pipeline.resolved["encoder"] or self.pipeline.resolved["vlm"]
        return CachedFeatures(
            name=self.name, description={"encoder": made}, path=self.folder / "features.json", say=say
        )

    def samples(self) -> list[Samples]:
        """Return the callback that draws held-out samples at every validation; none if no rank could answer."""
        num = self.pipeline.config.num_samples
        if not num or not self.can_answer("no samples are drawn"):
            return []
        transform = build_transform(self.config)
        records = partial(held_out_records, self.stage.data.mixture, self.pipeline.tokenizer, transform=transform)
        return [Samples(num, generate=partial(generate_answers, **self.engine_options()), records=records)]

    def answer_speed(self) -> list[AnswerSpeed]:
        """Return the callback that measures answer speed after every validation; none if no rank could answer."""
        images = self.pipeline.config.speed_images
        if not images or not self.can_answer("no speed is measured"):
            return []
        return [AnswerSpeed(partial(answer_speed, images=images, **self.engine_options()))]

    def can_answer(self, otherwise: str) -> bool:
        """Return whether the stage has a language model and each rank holds all parts; if sharded, say `otherwise`."""
        if "llm" not in self.config.parts:
            return False
        if self.hardware.shards:
            held = self.hardware.strategy
            say(f"\n{self.name}: {otherwise} at validations: with {held} no rank holds the model")
        return not self.hardware.shards

    def engine_options(self) -> dict:
        options = {"tokenizer": self.pipeline.tokenizer, "device": self.hardware.device}
        return options | {"image_size": self.config.image_size, "transform": build_transform(self.config)}

    def manifest(self) -> dict:
        """Return the handoff's manifest, without metrics."""
        run, identity = self.pipeline, self.stage.identity
        trained = [part for part in self.config.parts if part in run.lineage]
        return {
            "stage": self.name,
            "hash": self.stage.key,
            "parent": {part: {"hash": run.lineage[part], "folder": str(run.folders[part])} for part in trained},
            "config_hash": hash_of(identity["config"]),
            "config": identity["config"],
            "identity": identity,
            "tokenizer": run.tokenizer.fingerprint,
            "template": run.tokenizer.template.name,
            "commit": commit(),
            "steps": self.plan.num_steps,
        }

    def finish(self) -> dict[str, float]:
        """Merge adapters into plain weights after the last step, and return the metrics for the manifest."""
        last = self.metrics.last
        # Before the adapters are merged, after which it is not known what learned.
        cost = {} if self.forward is None else stage_cost(self.forward, learned_shares(self.pipeline.model), self.plan)
        cost["cost/seconds"] = float(last.get("train/seconds", 0.0))
        cost["cost/step_ms"] = self.clock.step_ms
        cost["cost/held_bytes"] = float(held_bytes(self.module.model, self.trainer.optimizers))
        cost["cost/learned"] = float(sum(p.numel() for p in self.module.model.parameters() if p.requires_grad))
        try:
            self.freezing.merge(self.pipeline.model)
        except torch.OutOfMemoryError:  # plain weights take more room than codes
            self.freezing.merge(self.pipeline.model.to("cpu"))
        known = {k: float(v) for k, v in last.items() if k.startswith("val/") and isinstance(v, (int, float))}
        known["train/peak_memory_gib"] = self.hardware.peak_gib()
        return known | cost | (self.score_text() if "llm" in self.config.parts else {})

    def score_text(self) -> dict[str, float]:
        """Return the perplexity on the task's held-out text, which shows how much language ability the stage cost.

        Nothing if the whole model, which ranks that share it never held, does not fit on the device.
        """
        task, model = self.pipeline.task, self.pipeline.model
        if task is None or getattr(task, "text", None) is None:
            return {}
        try:
            model.to(self.hardware.device).eval()
            return {k: float(v) for k, v in task.score_text(model, self.pipeline.tokenizer).items()}
        except torch.OutOfMemoryError:  # the stage is trained, and its handoff is yet to be written
            model.to("cpu")
            say(f"  {self.name}: text perplexity is not measured: the whole model does not fit on the device")
            return {}


class Checkpoints(ModelCheckpoint):
    """Writes none after the last step: a run resumed there would have no last validation, no proof and no costs.

    Nor inside a step: Lightning forgets at a resume that the checkpoint of that step is written, and would replace it
    after the first micro-batch, whose gradients it does not hold.
    """

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        if trainer.global_step < trainer.max_steps and not trainer.fit_loop.epoch_loop._should_accumulate():
            super().on_train_batch_end(trainer, *rest)


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its name: Lightning's own is moved from $TMPDIR, half of it if killed meanwhile."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str, storage_options: Any = None) -> None:
        with replacing(path) as part, open(part, "wb") as file:
            torch.save(checkpoint, file)


class LastValidation(L.Callback):
    """Validates after the last step even if `validate_every` does not divide the steps, as Lightning does not."""

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True  # before it stops, Lightning validates
