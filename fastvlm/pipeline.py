"""Run a chain of stages: find what is finished, resume what was interrupted, train what is new, then evaluate."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fastvlm.build import (
    build_model,
    build_tokenizer,
    build_transform,
    instantiate,
    part_seed,
    seed_of,
    settle_views,
)
from fastvlm.callbacks.freezing import StageFreezing
from fastvlm.callbacks.handoff import StageHandoff, load_component, read_manifest, write_json
from fastvlm.data.replan import Seen, changes, read_description, seen_before, write_order
from fastvlm.hardware import Hardware, is_first_rank
from fastvlm.identity import ENCODING, INCIDENTAL, SCORING, code_hash, commit, hash_of, machine, remember
from fastvlm.study.cell import CELL
from fastvlm.study.recorded import NOTE, begin, flat_cost


def say(message: str) -> None:
    if is_first_rank():
        print(message, flush=True)


@contextmanager
def only_one(folder: Path):
    """Two cells that share a stage train it once: the second waits here and then finds it finished."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        if is_first_rank():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another run that is training {folder.name}")
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Pipeline:
    """A configuration, made real: `run()` trains what is not trained yet and evaluates the result.

    `lineage` says for every part where its weights come from; a stage's hash covers its own configuration, its data,
    its code and the lineage of the parts it computes with, and nothing else. So a stage that only reads text is shared
    by runs with different encoders.
    """

    def __init__(self, config: DictConfig):
        settle_views(config)
        self.config = config
        self.hardware: Hardware = instantiate(config.hardware, key="hardware")
        self.runs = Path(config.paths.runs).resolve()
        self.run_dir = self.runs / config.name
        self.resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)

    def claim_run_dir(self) -> None:
        """Take the run directory, or refuse one that holds another configuration.

        Raises:
            ValueError: naming the first keys that differ.
        """
        path = self.run_dir / "config.yaml"
        if path.exists() and not self.config.overwrite:
            theirs = OmegaConf.to_container(OmegaConf.load(path))
            differ = [d for d in differences(theirs, self.resolved) if d.split(".")[0].split(":")[0] not in INCIDENTAL]
            if self.config.data.on_change == "replan":
                differ = [d for d in differ if not re.match(r"stages\.\w+\.mixture\.", d)]
            differ = [d for d in differ if ".cache_features:" not in d]
            if differ:
                raise ValueError(
                    f"{self.run_dir} holds another configuration ({'; '.join(differ[:3])}"
                    f"{f' and {len(differ) - 3} more' if len(differ) > 3 else ''}); "
                    "choose name=<another> or overwrite=true"
                )
        self.run_dir.mkdir(parents=True, exist_ok=True)
        # What stands in the run directory is true of this command from here on.
        (self.run_dir / "lineage.json").unlink(missing_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")
        beside.write_text(OmegaConf.to_yaml(OmegaConf.create(self.resolved)))
        beside.replace(path)
        latest = self.runs / "latest"
        beside = self.runs / f".latest.{os.getpid()}"
        beside.symlink_to(self.run_dir.relative_to(self.runs), target_is_directory=True)
        beside.replace(latest)

    def run(self) -> dict:
        """Returns the run's results (also in results.json): metrics, table, seconds a stage."""
        import torch

        from fastvlm.models.recompute import recompute_layers

        self.hardware.apply()
        start, made = time.time(), self.made()
        first = is_first_rank()
        if first:
            self.claim_run_dir()
        self.tokenizer = build_tokenizer(self.config)
        self.model = build_model(self.config, self.tokenizer)
        self.task = build_task(self.config.task) if self.config.task else None
        tokenizer = self.tokenizer.fingerprint
        self.initial = {
            n: hash_of([self.resolved[n] or self.resolved["vlm"], part_seed(self.config, n), tokenizer])
            for n in self.model.parts
        }
        self.lineage: dict[str, str] = {}
        self.folders: dict[str, Path] = {}
        if self.hardware.gradient_checkpointing:
            recompute_layers(self.model.parts)
        say(self.summary())
        for line in self.memory_notes():
            say(line)
        tracking = instantiate(self.config.logger, key="logger") if first else None
        run_id = None
        if tracking:
            run_id = begin(tracking, self.config, made=made, resolved=self.resolved)
        status, stages = "FAILED", []
        try:
            for name, stage in self.config.stages.items():
                stages.append(self.run_stage(name, stage, tracking, run_id))
            results = {
                "metrics": {},
                "seconds": {s["name"]: s["seconds"] for s in stages},
                "cost": {s["name"]: stage_costs(s["metrics"]) for s in stages if self.counts(s["name"])},
                "made": made,
            }
            if first:
                folders = {part: str(folder) for part, folder in self.folders.items()}
                write_json(self.run_dir / "lineage.json", {"components": folders, "hashes": self.lineage})
                self.model.to(self.hardware.device).eval()
                torch.manual_seed(self.config.seed)
                results = self.evaluate(results, stages)
                results["seconds"]["total"] = time.time() - start
                write_json(self.run_dir / "results.json", results)
                remember(self.run_dir, self.runs, self.resolved)
                report = self.report(results, stages)
                if tracking:
                    tracking.log_metrics(run_id, results["metrics"] | flat_cost(results), step=0)
                    tracking.log_artifact(run_id, report)
                    tracking.log_artifact(run_id, self.run_dir / "config.yaml")
                    if self.config.study:
                        write_json(self.run_dir / NOTE, {"uri": self.config.logger.get("uri"), "run_id": run_id})
                say(f"report: {report}")
            status = "FINISHED"
            return results
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            if tracking:
                tracking.finish(run_id, status)
                if self.config.study and CELL not in os.environ:  # else the sweep ends the study's own run
                    tracking.finish(tracking.study_run(self.config.study.name, scale=self.config.scale))

    def identity(self) -> dict:
        return {k: v for k, v in self.resolved.items() if k not in INCIDENTAL}

    def made(self) -> dict:
        """By what the results were made, so that a finished cell of a study is known again."""
        hw = self.hardware
        ran = {"ranks": hw.num_ranks, "accelerator": hw.accelerator, "precision": hw.precision, "threads": hw.threads}
        return {
            "commit": commit(),
            "code": code_hash(SCORING),
            "config": hash_of(self.identity()),
            "hardware": machine() | ran,
            "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }

    def counts(self, name: str) -> bool:
        """Whether a stage's cost is the run's: one with a seed of its own stands in for a pretrained part."""
        return self.config.stages[name].get("seed") is None

    def stage_seed(self, stage: DictConfig) -> int:
        return self.config.seed if stage.get("seed") is None else stage.seed

    def summary(self) -> str:
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in self.model.parts.items()}
        parts = ", ".join(
            f"{name} {type(self.model.parts[name]).__name__} {n / 1e6:.2f}M" for name, n in counts.items()
        )
        hw = self.hardware
        return (
            f"run      {self.run_dir}\nmodel    {parts} = {sum(counts.values()) / 1e6:.2f}M parameters\n"
            f"stages   {' -> '.join(self.config.stages)}\n"
            f"hardware {hw.num_ranks} x {hw.accelerator}, {hw.precision}, {hw.threads} threads, "
            f"{hw.num_workers} loader workers"
        )

    def memory_notes(self) -> list[str]:
        """What each stage will need on a device, and for one that will not fit the keys that mend it.

        Models of less than fifty million parameters are left out unless `hardware.memory_gib` is given.
        """
        if self.hardware.memory_gib is None and sum(p.numel() for p in self.model.parameters()) < 5e7:
            return []
        lines, has = [], self.hardware.memory
        for name, stage in self.config.stages.items():
            try:
                need = self.stage_memory(name, stage)
            except Exception as error:  # noqa: BLE001  whatever a model does that cannot be done without numbers
                lines.append(f"memory   {name}: not known before it runs ({type(error).__name__} without numbers)")
                continue
            lines.append(f"memory   {name}: {need} of {has / 2**30:.2f}")
            if need.total > has:
                mend = "; ".join(self.mend_memory(name, stage, need.largest))
                lines.append(f"         {name} will not fit, {need.largest} being most of it: {mend}")
        return lines

    def stage_memory(self, name: str, stage: DictConfig):
        """The estimate for one stage: full rows, and as many images as they have room for."""
        import torch

        from fastvlm.models.memory import estimate

        plain, hw = OmegaConf.to_container(stage, resolve=True), self.hardware
        rows = max(1, stage.batch_size // hw.num_ranks // hw.micro_batches(stage.batch_size))
        reads_images = "encoder" in stage.parts
        per_image = self.model.num_visual_tokens(stage.image_size) if {"encoder", "llm"} <= set(stage.parts) else 1
        per_row = min(stage.max_images, max(1, stage.max_tokens // per_image)) if "llm" in stage.parts else 1
        freezing = self.freezing(name, plain, self.runs / "unused")
        dtypes = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}

        return estimate(
            self.model,
            apply=lambda model: {n: one["lr"] for n, one in freezing.adapted(model).items()},
            quantised=freezing.quantised,
            optimizer=instantiate(stage.optimizer, key=f"stages.{name}.optimizer"),
            rows=rows,
            tokens=stage.max_tokens,
            images=rows * per_row if reads_images else 0,
            image_size=stage.image_size,
            parts=stage.parts,
            autocast=dtypes.get(hw.precision),
            shards=hw.num_ranks if hw.shards else 1,
        )

    def mend_memory(self, name: str, stage: DictConfig, largest: str) -> list[str]:
        """Keys that make a stage's largest share of memory smaller, the cheapest first."""
        here, hw, out = f"stages.{name}", self.hardware, []
        rows = max(1, stage.batch_size // hw.num_ranks // hw.micro_batches(stage.batch_size))
        if largest in ("activations", "logits"):
            if rows > 1:
                out.append(f"hardware.rows_per_device={rows // 2}")
            if not hw.gradient_checkpointing and largest == "activations":
                out.append("hardware.gradient_checkpointing=true")
            out.append(f"{here}.max_tokens={stage.max_tokens // 2}")
        elif largest == "weights":
            out += [] if hw.quantise else ["hardware.quantise=int8 (or nf4)"]
            out += [] if hw.shards or hw.num_ranks == 1 else ["hardware.strategy=fsdp"]
            out.append("llm.dtype=bfloat16 for pretrained weights")
        else:
            out.append(f"{here}.adapt.llm='{{method: lora, lr: 1e-4}}' in place of training it whole")
            if largest == "optimiser" and "8bit" not in str(stage.optimizer):
                out.append(f"optimizer@{here}.optimizer=adamw8bit")
            out += [] if hw.shards or hw.num_ranks == 1 else ["hardware.strategy=fsdp"]
        return out

    def freezing(self, name: str, plain: dict, folder: Path) -> StageFreezing:
        return StageFreezing(
            plain["trainable"],
            path=folder / "freezing.json",
            last_layers=plain["last_layers"],
            lora=plain["lora"],
            adapt=plain["adapt"],
            quantise=self.hardware.quantise,
            name=name,
        )

    def data(self, name: str, stage: DictConfig):
        from fastvlm.data.datamodule import MixtureDataModule

        # Only a language model that reads images has slots; no other stage may depend on their number.
        reads_images = {"encoder", "llm"} <= set(stage.parts)
        slots = self.model.num_visual_tokens(stage.image_size) if reads_images else 1
        self.check_room(name, stage, slots)
        return MixtureDataModule(
            instantiate(stage.mixture, key=f"stages.{name}.mixture"),
            tokenizer=self.tokenizer,
            image_size=stage.image_size,
            tokens_per_image=slots,
            batch_size=stage.batch_size,
            max_tokens=stage.max_tokens,
            max_images=stage.max_images,
            transform=build_transform(stage),
            packing=stage.packing,
            num_steps=stage.steps,
            epochs=stage.epochs,
            accumulate=self.hardware.micro_batches(stage.batch_size),
            seed=seed_of(self.stage_seed(stage), name),
            num_workers=self.hardware.num_workers,
            val_samples=stage.val_samples,
            pack_window=stage.pack_window,
            sort_window=stage.sort_window,
            plan_cache=self.runs / "plans",
            max_skipped_share=self.config.data.max_skipped_share,
            cache_bytes=self.config.data.cache_mb << 20,
        )

    def check_room(self, name: str, stage: DictConfig, slots: int) -> None:
        """A row has room for an image, and the language model for a row.

        Raises:
            ValueError: with both numbers and the keys that change them.
        """
        if slots >= stage.max_tokens:
            raise ValueError(
                f"stages.{name}.max_tokens={stage.max_tokens}, but one view has {slots} visual tokens at "
                f"image_size={stage.image_size}: raise max_tokens, lower image_size, or choose a resampler with fewer"
            )
        room = self.model.llm.max_positions if "llm" in stage.parts else None
        if room is not None and stage.max_tokens > room:
            raise ValueError(
                f"stages.{name}.max_tokens={stage.max_tokens}, but llm has {room} positions: lower max_tokens, or "
                "choose a language model with more"
            )

    def run_stage(self, name: str, config: DictConfig, tracking, run_id: str | None) -> dict:
        """Train one stage, or find it trained; either way the model holds its handoff afterwards."""
        begun = time.time()
        data = self.data(name, config)
        data.setup("fit")
        stage_config = OmegaConf.to_container(config, resolve=True)
        stage_config.pop("cache_features")  # the same function, computed earlier
        stage_config.pop("mixture")  # the plan's fingerprint says what the data are, wherever they lie
        stage_config.pop("seed")  # stands below
        identity = {
            "stage": name,
            "config": stage_config,
            "data": data.plan.fingerprint,
            "parts": {part: [self.initial[part], self.lineage.get(part)] for part in config.parts},
            "precision": [self.hardware.precision, self.hardware.quantise],
            "seed": self.stage_seed(config),
            "code": code_hash(),
        }
        if data.plan.num_images and build_transform(config).augment:
            identity["augment"] = {source.name: source.augment for source in data.plan.sources}
        key = hash_of(identity)
        folder = self.runs / "stages" / f"{name}-{key[:12]}"
        if (stopped := self.stopped(name, identity)) and stopped != folder:
            self.go_on_from(stopped, data, identity)
            key = hash_of(identity)
            folder = self.runs / "stages" / f"{name}-{key[:12]}"
        with only_one(folder):
            manifest = read_manifest(folder / "handoff")
            found = manifest is not None
            if found:
                say(f"\n{name}: finished before ({folder.name})")
            else:
                self.link(name, folder)
                self.train(name, config, data, folder, key, identity, tracking, run_id)
                manifest = read_manifest(folder / "handoff")
        for part in manifest["components"]:
            load_component(
                self.model.parts[part], part, folder / "handoff", manifest, tokenizer=self.tokenizer.fingerprint
            )
            self.lineage[part], self.folders[part] = key, folder / "handoff"
        self.link(name, folder)
        return {
            "name": name,
            "dir": folder,
            "seconds": time.time() - begun,
            "reused": found,
            "metrics": manifest["metrics"],
        }

    def link(self, name: str, folder: Path) -> None:
        if is_first_rank():
            links = self.run_dir / "stages"
            links.mkdir(parents=True, exist_ok=True)
            beside = links / f".{name}.{os.getpid()}"
            beside.symlink_to(os.path.relpath(folder, links), target_is_directory=True)
            beside.replace(links / name)

    def stopped(self, name: str, identity: dict) -> Path | None:
        """Where this run's stage stands, when nothing but its data differs from what is asked for now: interrupted, or
        finished with data that were planned anew on the way."""
        folder = (self.run_dir / "stages" / name).resolve()
        try:
            theirs = json.loads((folder / "identity.json").read_text())
        except (OSError, ValueError):
            return None
        same = {k: v for k, v in json.loads(json.dumps(identity, default=str)).items() if k != "data"}
        return folder if {k: v for k, v in theirs.items() if k != "data"} == same else None

    def go_on_from(self, stopped: Path, data, identity: dict) -> None:
        """Data changed under an interrupted stage: refuse, begin anew, or plan the rest from what has been seen.

        Raises:
            ValueError: with `data.on_change=refuse`, naming what changed.
        """
        name, checkpoint, before = identity["stage"], newest_checkpoint(stopped), read_description(stopped)
        if before is None:
            return
        if before["base"] == data.plan.base and before["after"]:  # planned anew by an earlier run of this command
            data.replan(Seen.load(stopped))
            identity["data"] = data.plan.fingerprint
            return
        if checkpoint is None or not (stopped / "order.npz").exists():
            return
        step, changed = int(checkpoint.stem.split("=")[1]), "; ".join(changes(before, data.plan))
        choice = self.config.data.on_change
        if choice == "refuse":
            raise ValueError(
                f"stage {name} stopped at step {step} and its data have changed since: {changed}. "
                "data.on_change=replan goes on with the new data from the samples already seen, "
                "data.on_change=restart begins the stage anew"
            )
        if choice == "restart":
            say(f"\n{name}: begins anew, its data have changed: {changed}")
            return
        data.replan(seen_before(stopped, step))
        identity["data"] = data.plan.fingerprint
        say(f"\n{name}: planned anew from step {step}: {changed}")
        if is_first_rank():
            folder = self.runs / "stages" / f"{name}-{hash_of(identity)[:12]}"
            folder.mkdir(parents=True, exist_ok=True)
            if (stopped / "metrics.jsonl").exists():
                shutil.copyfile(stopped / "metrics.jsonl", folder / "metrics.jsonl")
            shutil.copyfile(checkpoint, folder / f".{checkpoint.name}")
            os.replace(folder / f".{checkpoint.name}", folder / checkpoint.name)

    def train(self, name, config, data, folder: Path, key: str, identity: dict, tracking, run_id: str | None) -> None:
        import lightning as L
        from lightning.pytorch.callbacks import ModelCheckpoint

        from fastvlm.callbacks.cost import StepClock, count_forward, held_bytes, learned_shares, stage_cost
        from fastvlm.callbacks.features import CachedFeatures
        from fastvlm.callbacks.metrics import Metrics
        from fastvlm.callbacks.progress import Progress
        from fastvlm.callbacks.provenance import Provenance
        from fastvlm.callbacks.rehearsal import LongestFirst
        from fastvlm.callbacks.samples import Samples

        quiet_lightning()
        steps = data.plan.num_steps
        stage = instantiate(
            config.objective,
            key=f"stages.{name}.objective",
            model=self.model,
            name=name,
            num_steps=steps,
            optimizer=instantiate(config.optimizer, key=f"stages.{name}.optimizer"),
            warmup_steps=config.warmup_steps,
            decay=config.decay,
            final=config.final,
            decay_steps=config.decay_steps,
            seed=self.stage_seed(config),
        )
        plain = OmegaConf.to_container(config, resolve=True)
        freezing = self.freezing(name, plain, folder)
        parents = {
            p: {"hash": self.lineage[p], "folder": str(self.folders[p])} for p in config.parts if p in self.lineage
        }
        manifest = {
            "stage": name,
            "hash": key,
            "parent": parents,
            "config_hash": hash_of(identity["config"]),
            "config": identity["config"],
            "identity": identity,
            "tokenizer": self.tokenizer.fingerprint,
            "template": self.tokenizer.template.name,
            "commit": commit(),
            "steps": steps,
        }
        metrics, clock = Metrics(self.config.log_every, path=folder / "metrics.jsonl"), StepClock()
        size = {"image_size": config.image_size, "length": config.max_tokens}
        # A whole pretrained model has a chain of its own between its parts.
        forward = None if self.config.vlm else count_forward(self.model, parts=list(config.parts), **size)

        def finish() -> dict[str, float]:
            cost = {} if forward is None else stage_cost(forward, learned_shares(self.model), data.plan)
            cost["cost/seconds"] = float(metrics.last.get("train/seconds", 0.0))
            cost["cost/step_ms"] = clock.step_ms
            cost["cost/held_bytes"] = float(held_bytes(stage.model, trainer.optimizers))
            sizes = [(p.numel(), p.requires_grad) for p in stage.model.parameters()]
            cost["cost/learned"] = float(sum(size for size, learns in sizes if learns))
            freezing.merge(self.model)
            known = {
                k: float(v) for k, v in metrics.last.items() if k.startswith("val/") and isinstance(v, (int, float))
            }
            known["train/peak_memory_gib"] = self.hardware.peak_gib()
            return known | cost | (self.score_text() if "llm" in config.parts else {})

        handoff = StageHandoff(folder / "handoff", manifest=manifest, finish=finish)
        checkpoints = ModelCheckpoint(
            dirpath=folder,
            filename="{step}",
            every_n_train_steps=self.config.checkpoint_every,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        resume = newest_checkpoint(folder)
        logger = None
        if tracking:
            tags = {"stage": name, "hash": key}
            logger = tracking.stage_logger(
                name, parent=run_id, tags=tags, run_id=tracking.find_run(tags) if resume else None
            )
        callbacks = [
            freezing,
            metrics,
            Progress(),
            Provenance(
                config={"stage": name, **identity["config"], "cache_features": config.cache_features},
                seeds={"seed": self.stage_seed(config)},
            ),
            checkpoints,
            handoff,
            clock,
        ]
        if config.cache_features and self.hardware.shards:
            raise ValueError(
                f"stages.{name}.cache_features=true, but with hardware.strategy={self.hardware.strategy} no rank holds "
                "the encoder; write the features with hardware.strategy=ddp, or set it false"
            )
        if config.cache_features:
            made = self.resolved["encoder"] or self.resolved["vlm"]
            description = {"encoder": made, "code": code_hash(ENCODING)}
            cached = CachedFeatures(name=name, description=description, path=folder / "features.json", say=say)
            callbacks.insert(1, cached)
        if self.config.num_samples and "llm" in config.parts and self.hardware.shards:
            say(f"\n{name}: no samples are drawn at validations: with {self.hardware.strategy} no rank holds the model")
        elif self.config.num_samples and "llm" in config.parts:
            records = partial(held_out_records, data.mixture, self.tokenizer, transform=build_transform(config))
            callbacks.insert(3, Samples(self.config.num_samples, generate=self.generator(config), records=records))
        if self.config.data.longest_first:
            callbacks.insert(1, LongestFirst(data.plan, say=say))
        trainer = L.Trainer(
            **self.hardware.trainer(data.accumulate),
            default_root_dir=str(folder),
            max_epochs=1,
            max_steps=steps,
            gradient_clip_val=config.clip,
            val_check_interval=validation_interval(config.validate_every, steps) * data.accumulate,
            num_sanity_val_steps=0,
            logger=logger or False,
            callbacks=callbacks,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=10**9,  # the Metrics callback logs
            use_distributed_sampler=False,  # the plan already gives every rank its rows
            benchmark=True,
        )
        loaded = ", ".join(f"{p} <- {Path(self.folders[p]).parent.name}" for p in config.parts if p in self.folders)
        new = ", ".join(p for p in config.parts if p not in self.folders)
        say(
            f"\n{name}: {steps} steps x {config.batch_size} rows"
            f"{f', {config.image_size} px' if data.plan.num_images else ''}; "
            f"learns {', '.join(learning(plain))}"
            f"\n  loaded: {loaded or 'nothing'}; new: {new or 'nothing'}"
            + (f"\n  going on from {resume.name}" if resume else "")
        )
        for line in data.plan.notes():
            say(f"  {line}")
        if is_first_rank() and not resume_of(folder, data.plan):
            write_order(data.plan, folder)
            write_json(folder / "identity.json", identity)
        status = "FAILED"
        self.hardware.forget_peak()
        try:
            trainer.fit(
                stage,
                datamodule=data,
                ckpt_path=str(resume) if resume else None,
                weights_only=False if resume else None,
            )
            if trainer.interrupted or trainer.global_step < steps:
                raise KeyboardInterrupt
            status = "FINISHED"
        finally:
            if logger:
                tracking.finish(logger.run_id, status)
        say("\n".join("  " + line for line in freezing.table().splitlines()))
        holder = "tensors on the device" if self.hardware.device == "cuda" else "the whole process"
        say(f"  peak memory {self.hardware.peak_gib():.2f} GiB ({holder})")
        if trainer.is_global_zero:
            write_json(folder / "shares.json", data.plan.report())
            for old in (*folder.glob("step=*.ckpt"), folder / "order.npz"):
                old.unlink(missing_ok=True)

    def generator(self, stage: DictConfig):
        from fastvlm.inference.engine import Engine

        def generate(model, records, images):
            size, transform = stage.image_size, build_transform(stage)
            engine = Engine(model, self.tokenizer, image_size=size, transform=transform, device=self.hardware.device)
            return [g.text for g in engine.generate(records, images)]

        return generate

    def score_text(self) -> dict[str, float]:
        """Perplexity on the task's held-out text, for every stage's manifest: what the images cost the words."""
        if self.task is None or getattr(self.task, "text", None) is None:
            return {}
        self.model.to(self.hardware.device).eval()
        return {k: float(v) for k, v in self.task.score_text(self.model, self.tokenizer).items()}

    def evaluate(self, results: dict, stages: list[dict]) -> dict:
        if self.task is None:
            return results
        say("\nevaluating on held-out samples")
        begun, task = time.time(), self.task
        last = list(self.config.stages.values())[-1]
        images = {"image_size": last.image_size, "transform": build_transform(last)}
        outcome = task.run(self.model, self.tokenizer, **images, device=self.hardware.device, out=self.run_dir)
        results |= outcome
        results["predictions"] = results.pop("examples", [])  # all of them are in predictions/
        # Before: the language model as the last text-only stage left it.
        text_only = [s for s in stages if self.config.stages[s["name"]].parts == ["llm"]]
        if text_only and "text_perplexity" in outcome:
            results["text_perplexity"]["before"] = text_only[-1]["metrics"].get("test/text_perplexity")
        results["seconds"]["evaluation"] = time.time() - begun
        say(task.render(results))
        return results

    def report(self, results: dict, stages: list[dict]) -> Path:
        from fastvlm.report import write_report

        return write_report(self.run_dir, title=self.config.name, stages=stages, results=results, config=self.resolved)


def stage_costs(metrics: dict) -> dict[str, float]:
    return {k.removeprefix("cost/"): v for k, v in metrics.items() if k.startswith("cost/")}


def build_task(config: DictConfig):
    return instantiate(config, key="task")


def held_out_records(mixture, tokenizer, num: int, *, transform) -> list[tuple[dict, list]]:
    """Validation samples of a mixture's sources in turn, with the views (v, 3, H, W) of each of their images."""
    from fastvlm.data.shards import ShardReader

    reader, found = ShardReader(), []
    sources = [s for s in mixture.sources.values() if s.has_split("val")]
    for source in sources:
        index = source.load("val", tokenizer)
        rows, _ = source.select(index)
        # Spread over the split, whose questions stand type by type.
        for row in rows[:: max(1, len(rows) // max(1, num // len(sources)))][: -(-num // len(sources))]:
            raw = index.read(int(row), reader)
            images = [transform(data) for data in raw.images] if source.images else []
            found.append((source.edit(raw.record), images))
    return found[:num]


def resume_of(folder: Path, plan) -> bool:
    """Whether the order of this very plan is kept there already."""
    before = read_description(folder)
    after = plan.after and plan.after.digest
    return (
        before is not None
        and (before["base"], before["after"]) == (plan.base, after)
        and (folder / "order.npz").exists()
    )


def learning(stage: dict) -> list[str]:
    """What a stage's configuration says of what learns, in few words."""
    rates = {p: r["lr"] if isinstance(r, dict) else r for p, r in stage["trainable"].items()}
    out = [f"{part} {rate:g}" for part, rate in rates.items() if rate is not None]
    adapt = dict(stage["adapt"])
    if stage["lora"]:
        out.append(f"LoRA r={stage['lora']['r']} {stage['lora']['lr']:g}")
    if stage["last_layers"]:
        out.append(f"last {stage['last_layers']['num']} layers {stage['last_layers']['lr']:g}")
    for part, one in adapt.items():
        how = {"lora": f"LoRA r={one['r']}", "dora": f"DoRA r={one['r']}", "partial": f"last {one['num']} layers"}
        held = f" over {one['quantise']}" if one["quantise"] else ""
        out += [f"{part} {how.get(one['method'], '')}{held} {one['lr']:g}"] if one["lr"] is not None else []
    return out


def validation_interval(every: int | None, steps: int) -> int:
    return min(every or steps, steps)


def newest_checkpoint(folder: Path) -> Path | None:
    found = sorted(folder.glob("step=*.ckpt"), key=lambda p: int(p.stem.split("=")[1]))
    return found[-1] if found else None


def differences(theirs: Any, ours: Any, prefix: str = ""):
    """Dotted keys at which two plain configurations differ, with both values."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted({*theirs, *ours}, key=str):
            yield from differences(theirs.get(key), ours.get(key), f"{prefix}{key}.")
    elif theirs != ours:
        yield f"{prefix[:-1]}: {theirs} there, {ours} here"


def quiet_lightning() -> None:
    """Lightning's advice about workers and loggers is not for a user of this program."""
    import logging
    import warnings

    # gcsfs, which Lightning imports where it is installed, speaks of its experiments.
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero", "gcsfs"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nobody writes into it
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning)
