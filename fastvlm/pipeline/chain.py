"""Run a chain of stages: find what is finished, resume what was interrupted, train what is new, then evaluate."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from fastvlm.build import (
    build_model,
    build_task,
    build_tokenizer,
    build_transform,
    ensure_embedded,
    instantiate,
    part_seed,
    seeing_stage,
    settle_views,
    strings,
)
from fastvlm.callbacks.freezing import digest, tensors
from fastvlm.callbacks.handoff import load_component, write_json
from fastvlm.foundation import own_code
from fastvlm.hardware import Hardware, is_first_rank
from fastvlm.identity import commit, hash_of, identity, libraries, machine, remember, run_code
from fastvlm.models.recompute import recompute_layers
from fastvlm.pipeline.learned import count_learned
from fastvlm.pipeline.memory_notes import memory_notes
from fastvlm.pipeline.messages import run_summary, say
from fastvlm.pipeline.ranks import join_ranks
from fastvlm.pipeline.run_folder import check_run_dir, claim_run_dir
from fastvlm.pipeline.shards_there import check_shards
from fastvlm.pipeline.stage_data import check_size
from fastvlm.pipeline.stage_run import StageRun
from fastvlm.report import write_report
from fastvlm.study.recorded import NOTE, begin, end_study, flat_cost


class Pipeline:
    """A run of a configuration: `run()` trains the stages that are not trained yet and evaluates the result.

    `lineage` records where each part's weights come from. A stage's hash covers its own configuration, data, code,
    precision and seed and the lineage of the parts it computes with, and nothing else, so that runs with different
    encoders share a stage that only reads text.
    """

    def __init__(self, config: DictConfig):
        settle_views(config)
        self.config = config
        self.hardware: Hardware = instantiate(config.hardware, key="hardware")
        self.runs = Path(config.paths.runs).resolve()
        self.run_dir = self.runs / config.name
        self.resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
        self.initial: dict[str, str] = {}  # part -> hash of what its first weights depend on
        self.lineage: dict[str, str] = {}  # part -> hash of the stage that trained it last
        self.folders: dict[str, Path] = {}  # part -> that stage's handoff
        self.tracking, self.run_id = None, None

    def run(self) -> dict:
        """Train and evaluate; return the run's results (also in results.json): metrics, table, seconds per stage."""
        self.hardware.apply()
        join_ranks(self.hardware)
        begun, made = time.time(), self.made()
        if is_first_rank():
            check_run_dir(self.run_dir, resolved=self.resolved)
            if self.config.data.on_change == "replan" and not (self.run_dir / "config.yaml").exists():
                say(f"data.on_change=replan: {self.run_dir} holds no run to go on with; name=<the run's own> finds it")
        ensure_embedded(self.config)
        check_shards(self.config)
        self.build()
        for name, stage in self.config.stages.items():
            check_size(name, stage, self.model)
            count_learned(name, stage, self.model)
        if is_first_rank():  # only now: a configuration that cannot be built claims no name
            claim_run_dir(self.run_dir, runs=self.runs, resolved=self.resolved)
        say(run_summary(self.config, self.model, self.hardware, run_dir=self.run_dir))
        for line in memory_notes(self.config, self.model, self.hardware):
            say(line)
        self.tracking = instantiate(self.config.logger, key="logger") if is_first_rank() else None
        with self.tracked(made):
            stages = [self.run_stage(name, stage) for name, stage in self.config.stages.items()]
            results = {
                "metrics": {},
                "seconds": {s["name"]: s["seconds"] for s in stages},
                "cost": {s["name"]: stage_costs(s["metrics"]) for s in stages if self.counts(s["name"])},
                "made": made,
            }
            if is_first_rank():
                results = self.evaluate(results, stages)
                results["seconds"]["total"] = time.time() - begun
                self.record(results, stages)
        return results

    def build(self) -> None:
        """Build tokenizer, model and task of the configuration."""
        self.tokenizer = build_tokenizer(self.config)
        self.model = build_model(self.config, self.tokenizer)
        self.task = build_task(self.config.task) if self.config.task else None
        for part in self.model.parts:
            made = self.resolved[part] or self.resolved["vlm"]
            rests_on = [made, part_seed(self.config, part), self.tokenizer.fingerprint]
            if own := own_code(made):
                rests_on.append(own)
            if names_file(made):  # whose contents may change under the same name
                rests_on.append(sorted((name, digest(tensor)) for name, tensor in tensors(self.model.parts[part])))
            self.initial[part] = hash_of(rests_on)
        if self.hardware.gradient_checkpointing:
            recompute_layers(self.model.parts)

    @contextmanager
    def tracked(self, made: dict) -> Iterator[None]:
        """Record the block as a run in MLflow, if configured, with its final status."""
        if self.tracking is None:
            yield
            return
        self.run_id, status = begin(self.tracking, self.config, made=made, resolved=self.resolved), "FAILED"
        try:
            yield
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            self.tracking.finish(self.run_id, status)
            end_study(self.tracking, self.config, status)

    def made(self) -> dict:
        """Return code, configuration, hardware and libraries of the results; they identify a study's finished cell."""
        hw = self.hardware
        ran = {"ranks": hw.num_ranks, "threads": hw.threads, **hw.decides()}
        return {
            "commit": commit(),
            "code": run_code(self.resolved),
            "config": hash_of(identity(self.resolved)),
            "hardware": machine() | ran,
            "libraries": libraries(),
            "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }

    def counts(self, name: str) -> bool:
        """Return whether a stage counts towards the run's cost.

        A stage with its own seed trains a stand-in for a pretrained part and does not count.
        """
        return self.config.stages[name].get("seed") is None

    def run_stage(self, name: str, config: DictConfig) -> dict:
        """Train one stage, or find it finished; either way the model then has the weights of its handoff."""
        begun = time.time()
        stage = StageRun(self, name=name, config=config)
        manifest, found = stage.complete()
        handoff = stage.folder / "handoff"
        for part in manifest["components"]:
            load_component(self.model.parts[part], part, handoff, manifest, tokenizer=self.tokenizer.fingerprint)
            self.lineage[part], self.folders[part] = stage.key, handoff
        return {
            "name": name,
            "dir": stage.folder,
            "seconds": time.time() - begun,
            "reused": found,
            "metrics": manifest["metrics"],
        }

    def evaluate(self, results: dict, stages: list[dict]) -> dict:
        """Add the task's evaluation to the results; called on the first rank only."""
        # Relative, so that the folder of all runs can move.
        folders = {part: os.path.relpath(folder, self.run_dir) for part, folder in self.folders.items()}
        write_json(self.run_dir / "lineage.json", {"components": folders, "hashes": self.lineage})
        self.model.eval()
        torch.manual_seed(self.config.seed)
        if self.task is None:
            return results
        try:
            self.model.to(self.hardware.device)
        except torch.OutOfMemoryError:
            run = os.path.relpath(self.run_dir)
            raise ValueError(
                f"{run}: its stages are finished, but the whole model does not fit on the device to be evaluated; "
                f"python eval.py checkpoint={run} task=<the run's> hardware=cpu evaluates it"
            ) from None
        say("\nevaluating on held-out samples")
        begun, task = time.time(), self.task
        views = seeing_stage(self.config.stages)
        images = {"image_size": views.image_size, "transform": build_transform(views)}
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

    def record(self, results: dict, stages: list[dict]) -> None:
        """Write results.json and report.html, and log both to MLflow."""
        write_json(self.run_dir / "results.json", results)
        remember(self.run_dir, self.runs, self.resolved)
        shown = {"stages": stages, "results": results, "config": self.resolved}
        report = write_report(self.run_dir, title=self.config.name, **shown)
        if self.tracking:
            self.tracking.log_metrics(self.run_id, results["metrics"] | flat_cost(results), step=0)
            self.tracking.log_artifact(self.run_id, report)
            self.tracking.log_artifact(self.run_id, self.run_dir / "config.yaml")
            if self.config.study:
                write_json(self.run_dir / NOTE, {"uri": self.config.logger.get("uri"), "run_id": self.run_id})
        say(f"report: {report}")
        if self.config.study is None and {"encoder", "llm"} <= set(seeing_stage(self.config.stages).parts):
            run = shlex.quote(f"run={os.path.relpath(self.run_dir)}")
            say(f"ask it: python -m fastvlm.inference.chat {run} --image <file>")


def names_file(config: Any) -> bool:
    """Return whether a string of a part's plain configuration is a file, or the folder of a model, on this machine."""
    return any(os.path.isfile(s) or os.path.isfile(os.path.join(s, "config.json")) for s in strings(config))


def stage_costs(metrics: dict) -> dict[str, float]:
    return {k.removeprefix("cost/"): v for k, v in metrics.items() if k.startswith("cost/")}
