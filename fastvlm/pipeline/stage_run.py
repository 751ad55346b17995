"""One stage of a run: found finished, resumed or trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from fastvlm.build import build_transform
from fastvlm.callbacks.handoff import read_manifest
from fastvlm.data.kept_plan import write_plan
from fastvlm.data.replan import Seen, changes, read_description, seen_before
from fastvlm.foundation import own_code
from fastvlm.hardware import is_first_rank
from fastvlm.identity import code_hash, hash_of, libraries
from fastvlm.pipeline.messages import say
from fastvlm.pipeline.ranks import agree
from fastvlm.pipeline.run_folder import ON_CHANGE, point
from fastvlm.pipeline.stage_data import build_data, in_stage
from fastvlm.pipeline.stage_folder import (
    augment_changes,
    left_behind,
    newest_checkpoint,
    only_one,
    read_identity,
    step_of,
    stopped_before,
    take_over,
)
from fastvlm.pipeline.training import Training

if TYPE_CHECKING:
    from fastvlm.pipeline.chain import Pipeline


class StageRun:
    """A stage with its plan, ready to be completed.

    Its `identity` is everything its weights depend on; its folder is named after the hash of that.

    Args:
        pipeline: the run; its model holds what the previous stages handed on.
        name: the stage's key in `stages`.
        config: the stage's configuration.
    """

    def __init__(self, pipeline: Pipeline, *, name: str, config: DictConfig):
        self.pipeline, self.name, self.config = pipeline, name, config
        self.seed = pipeline.config.seed if config.get("seed") is None else config.seed
        with in_stage(name):
            self.data = build_data(
                name,
                config,
                pipeline.model,
                pipeline.tokenizer,
                hardware=pipeline.hardware,
                options=pipeline.config.data,
                seed=self.seed,
                plan_cache=pipeline.runs / "plans",
            )
            self.data.setup("fit")
        self.identity = self.identify()

    @property
    def key(self) -> str:
        return hash_of(self.identity)

    @property
    def folder(self) -> Path:
        return self.pipeline.runs / "stages" / f"{self.name}-{self.key[:12]}"

    @property
    def link(self) -> Path:
        """Path of the run's link to the stage's folder."""
        return self.pipeline.run_dir / "stages" / self.name

    def identify(self) -> dict:
        """Return everything the stage's weights depend on, and nothing else."""
        run, config = self.pipeline, OmegaConf.to_container(self.config, resolve=True)
        config.pop("cache_features")  # the same function, computed earlier
        config.pop("mixture")  # the plan's fingerprint identifies the data, wherever they are
        config.pop("seed")  # given below
        identity = {
            "stage": self.name,
            "config": config,
            "data": self.data.plan.fingerprint,
            "parts": {part: [run.initial[part], run.lineage.get(part)] for part in self.config.parts},
            "precision": [run.hardware.precision, run.hardware.quantise],
            "seed": self.seed,
            "code": code_hash(),
        }
        if own := own_code(config):
            identity["own_code"] = own
        if run.config.study:  # whose cells must not mix weights of two versions or devices
            identity["made_with"] = [libraries(), run.hardware.decides()["accelerator"]]
        if self.data.plan.num_images and build_transform(self.config).augment:
            identity["augment"] = {source.name: source.augment for source in self.data.plan.sources}
        return identity

    def complete(self) -> tuple[dict, bool]:
        """Train the stage, or find it finished.

        Returns:
            The manifest of its handoff, and whether it was found finished.
        """
        if (stopped := agree(stopped_before(self.link, self.identity))) and stopped != self.folder:
            self.go_on_from(stopped)
        with only_one(self.folder):
            if is_first_rank():  # before the ranks agree: none has written its own yet
                for original in self.folder.glob(".*.safetensors"):  # of quantised parts, left by a killed run
                    original.unlink()
            manifest = agree(read_manifest(self.folder / "handoff"))
            found = manifest is not None
            if is_first_rank():
                anew = not (found or stopped or newest_checkpoint(self.folder))
                if anew and (left := left_behind(self.link, self.identity)):
                    say(f"\n{self.name}: begins at step 0; {left}")
                point(self.link, at=self.folder)
            if found:
                say(f"\n{self.name}: finished before ({self.folder.name})")
            else:
                Training(self).run()
                manifest = agree(read_manifest(self.folder / "handoff"))
        return manifest, found

    def go_on_from(self, stopped: Path) -> None:
        """Handle data that changed under an interrupted stage: refuse, restart, or plan the rest from what was seen.

        Raises:
            ValueError: with `data.on_change=refuse`; names what changed.
        """
        before, checkpoint = read_description(stopped), newest_checkpoint(stopped)
        if before is None:
            return
        augmented = augment_changes(read_identity(stopped), self.identity)
        # An earlier run of this command has planned it anew.
        if before["base"] == self.data.plan.base and before["after"] and not augmented:
            self.replan(Seen.load(stopped))
            return
        changed = "; ".join(changes(before, self.data.plan, more=augmented))
        if checkpoint is None or not (stopped / "order.npz").exists():
            say(f"\n{self.name}: its data are others than those of {stopped.name}: {changed}")
            return
        step = step_of(checkpoint)
        choice = self.pipeline.config.data.on_change
        if choice == "refuse":
            raise ValueError(
                f"stage {self.name} stopped at step {step} and its data have changed since: {changed}. {ON_CHANGE}"
            )
        if choice == "restart":
            say(f"\n{self.name}: begins anew, its data have changed: {changed}")
            return
        self.replan(seen_before(stopped, step))
        say(f"\n{self.name}: planned anew from step {step}: {changed}")
        if is_first_rank():
            # Before the link points to it, so that a rank that comes later finds the same plan there.
            self.folder.mkdir(parents=True, exist_ok=True)
            write_plan(self.data.plan, self.folder, identity=self.identity)
            take_over(stopped, checkpoint, self.folder)

    def replan(self, seen: Seen) -> None:
        self.data.replan(seen)
        self.identity["data"] = self.data.plan.fingerprint
