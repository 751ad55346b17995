"""Stages end to end, as processes: finished stages are found, killed ones go on, and nothing written is damaged."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from fastvlm.build import load_run
from fastvlm.callbacks.handoff import StageHandoff
from fastvlm.data.source import Mixture, Source
from fastvlm.pipeline import Pipeline
from fastvlm.pipeline.stage_data import in_stage
from fastvlm.pipeline.stage_folder import augment_changes, newest_checkpoint, stopped_before
from tests.conftest import ROOT, TINY

CHAIN = [*TINY, "stages.encoder.steps=4", "stages.base.steps=4", "stages.align.steps=4", "stages.dense.steps=4"]
CHAIN += ["stages.instruct.steps=4", "stages.encoder.batch_size=4", "stages.base.batch_size=2"]


def handoffs(runs: Path) -> dict[str, dict]:
    return {m["stage"]: m for f in runs.glob("stages/*/handoff/manifest.json") for m in [json.loads(f.read_text())]}


def test_a_chain_trains_hands_on_and_is_found_again(cli, tmp_path):
    first = cli("train.py", *CHAIN, "name=one")
    assert "report:" in first.stdout
    assert "ask it: python -m fastvlm.inference.chat run=" in first.stdout.splitlines()[-1]
    assert "pixel_mean" not in first.stdout  # the model's own buffers are one row of the proof
    manifests = handoffs(tmp_path / "runs")
    assert list(manifests) and set(manifests) == {"encoder", "base", "align", "dense", "instruct"}
    # Each stage hands on what it trained, and names where the rest came from.
    assert set(manifests["base"]["components"]) == {"llm"}
    assert set(manifests["dense"]["components"]) == {"encoder", "resampler", "projector", "llm"}
    assert manifests["align"]["parent"]["encoder"]["hash"] == manifests["encoder"]["hash"]
    assert manifests["dense"]["parent"]["llm"]["hash"] == manifests["align"]["hash"]

    again = cli("train.py", *CHAIN, "name=one")
    assert again.stdout.count("finished before") == 5

    # Another last stage, another name: the four before it are shared; another encoder: the text stage still is.
    other = cli("train.py", *CHAIN, "name=two", "stages.instruct.warmup_steps=1")
    assert other.stdout.count("finished before") == 4
    third = cli("train.py", *CHAIN, "name=three", "encoder.mlp_ratio=2.0")
    assert third.stdout.count("finished before") == 1 and "base: finished before" in third.stdout
    # Another number of visual tokens is nothing to the encoder's labels or to text.
    fourth = cli("train.py", *CHAIN, "name=four", "resampler.num_tokens=4")
    assert fourth.stdout.count("finished before") == 2

    wrong = cli("train.py", *CHAIN, "name=five", "projector.depth=0", check=False)
    assert wrong.returncode == 2 and not (tmp_path / "runs/five/config.yaml").exists(), "a mistake takes no name"

    refused = cli("train.py", *CHAIN, "name=one", "stages.align.image_size=32", check=False)
    assert refused.returncode == 2
    assert "holds another configuration (stages.align.image_size: 64 there, 32 here)" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_frozen_parts_come_out_of_a_stage_bit_for_bit(cli, tmp_path):
    cli("train.py", *TINY, "pipeline=align", "stages.align.steps=3", "name=frozen")
    (stage,) = (tmp_path / "runs" / "stages").iterdir()
    rows = json.loads((stage / "freezing.json").read_text())["rows"]
    frozen = [r for r in rows if not r["trainable"]]
    assert {r["part"] for r in frozen} >= {"encoder", "llm"} and all(r["changed"] == 0 for r in frozen)
    assert all(r["changed"] for r in rows if r["trainable"])
    assert not (stage / "handoff" / "encoder.safetensors").exists()


def kill_at_step_8(commands, arguments: list[str], runs: Path, env: dict) -> None:
    process = commands.start([str(ROOT / "train.py"), *arguments], env=env)
    deadline = time.time() + 120
    while not list(runs.glob("stages/*/step=8.ckpt")) and time.time() < deadline and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)  # with its other ranks
    assert process.wait() == -signal.SIGKILL, "the stage ended before it could be killed"


def test_a_killed_stage_goes_on_and_ends_with_the_same_weights(cli, commands, embedded, tmp_path):
    # The encoder learns, so that BatchNorm statistics and the position in the plan must both come back.
    arguments = [*TINY, "pipeline=dense", "stages.dense.steps=24", "checkpoint_every=4", "name=killed"]
    arguments += ["stages.dense.image_size=64", "stages.dense.batch_size=4", "hardware.num_workers=1"]
    cli("train.py", *arguments)
    (undisturbed,) = (tmp_path / "runs" / "stages").iterdir()

    runs = tmp_path / "killed"
    env = os.environ | {"FASTVLM_DATA": str(embedded), "FASTVLM_RUNS": str(runs), "OMP_NUM_THREADS": "1"}
    kill_at_step_8(commands, arguments, runs, env)
    (stage,) = (runs / "stages").iterdir()
    assert not (stage / "handoff" / "manifest.json").exists()

    done = commands.run([str(ROOT / "train.py"), *arguments], env=env)
    assert done.returncode == 0, done.stderr
    assert "going on from step=" in done.stdout
    for name in ("encoder", "resampler", "projector"):
        ours, theirs = (load_file(s / "handoff" / f"{name}.safetensors") for s in (stage, undisturbed))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    # Every step stands once in the metrics.
    steps = [json.loads(line)["step"] for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_data_that_changed_under_a_killed_stage_are_refused_or_planned_anew(
    commands, embedded, tmp_path, monkeypatch, devices
):
    data = tmp_path / "data"
    shutil.copytree(embedded, data)
    monkeypatch.setenv("FASTVLM_DATA", str(data))
    # Without a name: the default one stays the same when a refusal's remedy is added to the command.
    arguments = [*TINY, "pipeline=dense", "stages.dense.steps=24", "checkpoint_every=4"]
    arguments += ["stages.dense.batch_size=4", "mixture@stages.dense.mixture=embedded_45_45_10"]
    arguments.append(f"hardware.devices={devices}")
    runs = tmp_path / "runs"
    kill_at_step_8(commands, arguments, runs, os.environ | {"FASTVLM_RUNS": str(runs), "OMP_NUM_THREADS": "1"})
    (stopped,) = (runs / "stages").iterdir()
    assert json.loads((stopped / "shares.json").read_text())["num_steps"] == 24, "written before the first step"
    step = newest_checkpoint(stopped).stem.split("=")[1]

    captions = data / "embedded" / "captions"
    rewrite_without_first_sample(captions)
    refused = run_here(commands, arguments, data, runs)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert f"stage dense stopped at step {step} and its data have changed since: shards of captions" in refused.stderr
    assert newest_checkpoint(stopped).exists()

    anew = shutil.copytree(runs, tmp_path / "anew", symlinks=True)
    done = run_here(commands, [*arguments, "data.on_change=restart"], data, anew)
    assert "dense: begins anew, its data have changed: shards of captions" in done.stdout, done.stderr
    assert "going on from" not in done.stdout and "planned anew" not in done.stdout and "report:" in done.stdout
    assert steps_of(anew) == [1, *range(2, 25, 2)]

    arguments.append("data.on_change=replan")
    done = run_here(commands, arguments, data, runs)
    assert f"dense: planned anew from step {step}: shards of captions" in done.stdout, done.stderr
    assert f"going on from step={step}.ckpt" in done.stdout and "report:" in done.stdout
    assert "dense: finished before" in run_here(commands, arguments, data, runs).stdout
    steps = steps_of(runs)
    assert steps == sorted(steps) and steps[-1] == 24
    assert (runs / "latest" / "stages" / "dense").resolve() != stopped
    assert len(list(runs.glob("*/config.yaml"))) == 2, "the run and the link to the latest"


OF_STAGE = "stages.dense.mixture"
# What is edited in a mixture, and how refusal and replanning name it.
EDITS = {
    "weights": (
        [f"{OF_STAGE}.weights.text=30"],
        f"{OF_STAGE}.weights.text: 10 there, 30 here",
        "share of captions 0.45 -> 0.375; share of interleaved 0.45 -> 0.375; share of text 0.1 -> 0.25",
    ),
    "a source": (
        [f"{OF_STAGE}.sources.more={{_target_:fastvlm.data.source.Source,name:more,path:'$DATA/embedded/charts'}}"]
        + [f"{OF_STAGE}.weights.more=100"],
        f"{OF_STAGE}.sources.more: only here; {OF_STAGE}.weights.more: None there, 100 here",
        "source more is new; share of captions 0.45 -> 0.225; share of interleaved 0.45 -> 0.225; share of text 0.1 -> "
        "0.05",
    ),
}


@pytest.mark.parametrize("edited", EDITS)
def test_a_mixture_edited_under_a_killed_stage_is_refused_with_the_remedy_which_then_goes_on(
    commands, embedded, tmp_path, edited
):
    arguments = [*TINY, "pipeline=dense", "stages.dense.steps=24", "checkpoint_every=4", "name=edited"]
    arguments += ["stages.dense.batch_size=4", f"mixture@{OF_STAGE}=embedded_45_45_10", "hardware.num_workers=0"]
    # The sources' names stand in the identity of a stage that augments.
    arguments += ["stages.dense.val_samples=0", "stages.dense.image.augment.jitter=0.2"]
    runs = tmp_path / "runs"
    env = os.environ | {"FASTVLM_RUNS": str(runs), "FASTVLM_DATA": str(embedded), "OMP_NUM_THREADS": "1"}
    kill_at_step_8(commands, arguments, runs, env)
    (stopped,) = (runs / "stages").iterdir()
    step = newest_checkpoint(stopped).stem.split("=")[1]
    more, differs, changed = EDITS[edited]
    arguments += [argument.replace("$DATA", str(embedded)) for argument in more]
    refused = run_here(commands, arguments, embedded, runs)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert f"holds another configuration ({differs}); data.on_change=replan goes on with the new data" in refused.stderr
    done = run_here(commands, [*arguments, "data.on_change=replan"], embedded, runs)
    assert f"dense: planned anew from step {step}: {changed}\n" in done.stdout, done.stderr
    assert f"going on from step={step}.ckpt" in done.stdout and "report:" in done.stdout
    assert steps_of(runs) == [1, *range(2, 25, 2)]
    assert "dense: finished before" in run_here(commands, arguments, embedded, runs).stdout


def test_a_changed_augmentation_is_one_of_the_changes_and_hides_no_interrupted_stage(tmp_path):
    ours = {"stage": "dense", "data": "a", "augment": {"captions": ("jitter",), "text": ()}}
    (tmp_path / "identity.json").write_text(json.dumps(ours))
    now = ours | {"data": "b", "augment": {"captions": ("crop", "jitter"), "charts": ("crop",)}}
    assert stopped_before(tmp_path, now) == tmp_path and stopped_before(tmp_path, ours | {"stage": "align"}) is None
    assert augment_changes(ours, now) == ["augmentation of captions jitter -> crop, jitter"]
    assert augment_changes({}, now) == augment_changes(now, now) == []


def test_what_is_wrong_with_a_mixture_or_a_source_is_said_with_its_stage():
    with pytest.raises(ValueError, match=r"^stages\.dense\.mixture\.weights\.txt: no such source"), in_stage("dense"):
        Mixture({"text": Source("text", path="x")}, weights={"txt": 1}, unit="samples")
    with pytest.raises(ValueError, match=r"^stages\.dense\.mixture: source text: repeat=0 must"), in_stage("dense"):
        Source("text", path="x", repeat=0)


def steps_of(runs: Path) -> list[int]:
    """Steps at which the latest run has logged its loss."""
    lines = (runs / "latest" / "stages" / "dense" / "metrics.jsonl").read_text().splitlines()
    return [record["step"] for record in map(json.loads, lines) if "train/loss" in record]


def rewrite_without_first_sample(folder: Path) -> None:
    from fastvlm.data.shards import ShardReader, ShardWriter, parse_sample, scan_shard

    samples, reader = [], ShardReader()
    for shard in sorted(folder.glob("train-*.tar")):
        for span in scan_shard(shard)[0]:
            members = {suffix: reader.read(str(shard), offset, size) for suffix, offset, size in span.members}
            samples.append(parse_sample(span.key, members))
    with ShardWriter(folder, "train") as writer:
        for sample in samples[1:]:
            writer.write(sample.key, sample.record, sample.images)


def run_here(commands, arguments: list[str], data: Path, runs: Path) -> subprocess.CompletedProcess:
    env = os.environ | {"FASTVLM_DATA": str(data), "FASTVLM_RUNS": str(runs), "OMP_NUM_THREADS": "1"}
    return commands.run([str(ROOT / "train.py"), *arguments], env=env)


RANKS = [*TINY, "pipeline=dense", "stages.dense.steps=3", "stages.dense.image_size=64", "stages.dense.batch_size=4"]
# BatchNorm sees a rank's own images; frozen, one rank and two are the same function.
RANKS += ["encoder.mlp_ratio=2.0", "stages.dense.trainable.encoder=null", "stages.dense.trainable.llm=1e-3"]
RANKS += ["hardware.num_workers=0"]


def learned_by(cli, tmp_path: Path, name: str, *arguments: str) -> dict[str, dict[str, torch.Tensor]]:
    """Weights that a run of one stage hands on; the stage is put aside, so that no other run finds it."""
    cli("train.py", *RANKS, *arguments, f"name={name}")
    stage = (tmp_path / "runs" / name / "stages" / "dense").resolve()
    weights = {file.stem: load_file(file) for file in (stage / "handoff").glob("*.safetensors")}
    stage.rename(tmp_path / f"{stage.name}-{name}")
    return weights


def assert_same_weights(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    for part in theirs:
        for key, value in theirs[part].items():
            torch.testing.assert_close(
                ours[part][key], value, rtol=1e-4, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}"
            )


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("mixture", ["embedded_base", pytest.param("embedded_align", marks=pytest.mark.slow)])
def test_two_ranks_learn_what_one_learns_with_and_without_images(cli, tmp_path, mixture):
    one, two = (
        learned_by(cli, tmp_path, f"ranks{n}", f"mixture@stages.dense.mixture={mixture}", f"hardware.devices={n}")
        for n in (1, 2)
    )
    assert_same_weights(two, one)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    "mixture",
    [
        # Text and images: in some steps one rank has images and the other has none.
        "embedded_45_45_10",
        pytest.param("embedded_base", marks=pytest.mark.slow),
        pytest.param("embedded_align", marks=pytest.mark.slow),
    ],
)
def test_ranks_that_share_the_weights_learn_what_one_learns(cli, tmp_path, mixture):
    options = [*RANKS, f"mixture@stages.dense.mixture={mixture}", "stages.dense.trainable.llm=null"]
    options += ["stages.dense.adapt.llm={method: lora, lr: 1e-3}", "stages.dense.val_samples=8", "name=run"]
    ranks = {1: [], 2: ["hardware.devices=2", "hardware.strategy=fsdp"]}
    folders = {n: tmp_path / f"{n} ranks" for n in ranks}
    runs = [{"runs": str(folders[n]), "ranks": n, "overrides": options + more} for n, more in ranks.items()]
    cli("tests/forked_runs.py", json.dumps(runs))
    one, two = (
        {file.stem: load_file(file) for file in folder.glob("run/stages/dense/handoff/*.safetensors")}
        for folder in folders.values()
    )
    assert set(one) == {"resampler", "projector", "llm"} and not any("lora" in key for key in two["llm"])
    assert_same_weights(two, one)
    rows = json.loads((folders[2] / "run/stages/dense/freezing.json").read_text())["rows"]
    assert any(r["part"] == "encoder" and not r["trainable"] and not r["changed"] for r in rows)
    # Without images what reads them has a gradient of zero, which moves no bias.
    reached = {"llm"} if mixture == "embedded_base" else {"llm", "resampler", "projector"}
    learned = [r for r in rows if r["trainable"] and r["part"] in reached]
    assert len(learned) == len(reached) and all(r["changed"] + r["buffers"] >= r["tensors"] for r in learned)


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_a_stage_killed_while_ranks_share_the_weights_goes_on_and_ends_with_the_same_weights(
    cli, commands, embedded, tmp_path
):
    arguments = [*TINY, "pipeline=dense", "stages.dense.steps=16", "checkpoint_every=4", "name=killed"]
    arguments += ["stages.dense.batch_size=4", "hardware.num_workers=0", "hardware.devices=2", "hardware.strategy=fsdp"]
    arguments += ["optimizer@stages.dense.optimizer=muon", "stages.dense.trainable.llm=1e-3"]
    cli("train.py", *arguments)
    (undisturbed,) = (tmp_path / "runs" / "stages").iterdir()
    runs = tmp_path / "killed"
    env = os.environ | {"FASTVLM_DATA": str(embedded), "FASTVLM_RUNS": str(runs), "OMP_NUM_THREADS": "1"}
    kill_at_step_8(commands, arguments, runs, env)
    done = commands.run([str(ROOT / "train.py"), *arguments], env=env)
    assert done.returncode == 0 and "going on from step=" in done.stdout, done.stderr
    (stage,) = (runs / "stages").iterdir()
    for name in ("encoder", "resampler", "projector", "llm"):
        ours, theirs = (load_file(s / "handoff" / f"{name}.safetensors") for s in (stage, undisturbed))
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_adapters_over_four_bits_train_on_two_ranks_and_hand_on_plain_weights(cli, tmp_path):
    pytest.importorskip("bitsandbytes")
    arguments = [*TINY, "pipeline=instruct", "stages.instruct.steps=4", "stages.instruct.lora=null", "name=four"]
    arguments += ["stages.instruct.adapt.llm={method: dora, lr: 1e-3, quantise: nf4}", "hardware.num_workers=0"]
    cli("train.py", *arguments, "hardware.strategy=ddp", "hardware.devices=2")
    (file,) = (tmp_path / "runs" / "stages").glob("*/handoff/llm.safetensors")
    weights = load_file(file)
    assert all(value.dtype == torch.float32 for value in weights.values())
    assert not any("lora" in key or "codes" in key for key in weights)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4", "torchao_int8", "torchao_fp8", "torchao_int4"])
def test_a_stage_over_few_bits_goes_on_after_a_kill_and_hands_on_plain_weights_that_export(
    cli, commands, embedded, tmp_path, kind
):
    pytest.importorskip("torchao" if kind.startswith("torchao") else "bitsandbytes")
    # torchao's four-bit kernel takes inputs in groups of 64.
    arguments = [*TINY, "llm.hidden_size=64", "llm.intermediate_size=128", "pipeline=instruct", "name=few"]
    arguments += ["stages.instruct.steps=24", "stages.instruct.lora=null", "hardware.num_workers=0"]
    arguments += ["stages.instruct.adapt.llm={method: lora, lr: 1e-2}", f"hardware.quantise={kind}"]
    arguments += ["stages.instruct.batch_size=4", "stages.instruct.val_samples=8", "checkpoint_every=4"]
    cli("train.py", *arguments)
    (undisturbed,) = (tmp_path / "runs" / "stages").iterdir()
    runs = tmp_path / "killed"
    env = os.environ | {"FASTVLM_DATA": str(embedded), "FASTVLM_RUNS": str(runs), "OMP_NUM_THREADS": "1"}
    kill_at_step_8(commands, arguments, runs, env)
    assert "going on from step=" in run_here(commands, arguments, embedded, runs).stdout
    (stage,) = (runs / "stages").iterdir()
    ours, theirs = (load_file(s / "handoff" / "llm.safetensors") for s in (stage, undisturbed))
    assert not any("lora" in key or "codes" in key for key in theirs)
    assert all(torch.equal(ours[key], value) and value.dtype == torch.float32 for key, value in theirs.items())
    rows = json.loads((undisturbed / "freezing.json").read_text())["rows"]
    assert any(r["part"] == "llm" and r["trainable"] and r["changed"] for r in rows)
    assert any(r["part"] == "llm" and not r["trainable"] and not r["changed"] for r in rows)
    exported = commands.run(
        ["-m", "fastvlm.deployment.hub", f"run={runs / 'few'}", f"out={tmp_path / 'exported'}"], env=env, cwd=ROOT
    )
    assert exported.returncode == 0, exported.stderr
    saved = {k: v for f in (tmp_path / "exported").glob("*.safetensors") for k, v in load_file(f).items()}
    assert not any("lora" in key or "codes" in key for key in saved)
    (name,) = (key for key in theirs if key.endswith("layers.0.mlp.up_proj.weight"))
    (same,) = (value for key, value in saved.items() if key.endswith("layers.0.mlp.up_proj.weight"))
    assert torch.equal(same, theirs[name])


def test_lora_and_last_layers_hand_on_plain_weights(cli, tmp_path):
    cli("train.py", *TINY, "pipeline=instruct", "stages.instruct.steps=2", "name=lora")
    options = ["stages.instruct.lora=null", "stages.instruct.last_layers={num: 1, lr: 1e-3}"]
    cli("train.py", *TINY, "pipeline=instruct", "stages.instruct.steps=2", *options, "name=last")
    lora, last = (
        load_file((tmp_path / "runs" / n / "stages" / "instruct").resolve() / "handoff" / "llm.safetensors")
        for n in ("lora", "last")
    )
    assert set(lora) == set(last) and not any("lora" in key for key in lora)
    rows = json.loads((tmp_path / "runs/last/stages/instruct/freezing.json").read_text())["rows"]
    assert any(r["part"] == "llm" and r["trainable"] and r["changed"] for r in rows)
    assert any(r["part"] == "llm" and not r["trainable"] and not r["changed"] for r in rows)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_contrastive_stage_trains_an_encoder_and_is_validated_with_rows_left_over(cli, tmp_path, devices):
    # Of the second step of validation all rows but two are empty.
    sizes = [f"stages.contrastive.{key}" for key in ("steps=3", "batch_size=6", "val_samples=8")]
    cli("train.py", *TINY, "pipeline=contrastive", *sizes, f"hardware.devices={devices}")
    manifest = handoffs(tmp_path / "runs")["contrastive"]
    assert set(manifest["components"]) == {"encoder", "llm"} and 0 < manifest["metrics"]["val/loss"] < 3


def test_the_contrastive_stage_refuses_micro_batches_which_would_change_what_is_compared(cli):
    sizes = ["stages.contrastive.batch_size=8", "hardware.rows_per_device=4"]
    done = cli("train.py", *TINY, "pipeline=contrastive", *sizes, check=False)
    assert done.returncode == 2 and "cuts a step into 2 micro-batches; set hardware.rows" in done.stderr


def test_a_stage_is_validated_after_its_last_step_and_keeps_no_checkpoint_of_it(cli, tmp_path):
    lengths = ["stages.align.steps=5", "stages.align.validate_every=2", "log_every=1", "checkpoint_every=5"]
    cli("train.py", *TINY, "pipeline=align", *lengths)
    (file,) = (tmp_path / "runs" / "stages").glob("align-*/metrics.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines if "val/loss" in line] == [2, 4, 5]


def train_until(ends: list[str], arguments: list[str], **place) -> None:
    """Run `train.py` in a process that dies at the first call of one of some functions."""
    dying = (
        "import runpy, shutil, sys\n"
        "from fastvlm.callbacks.handoff import StageHandoff\n"
        "def die(*_, **__): raise SystemExit(9)\n"
        f"{' = '.join(ends)} = die\n"
        f"sys.argv = {[str(ROOT / 'train.py'), *arguments]!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    assert subprocess.run([sys.executable, "-c", dying], capture_output=True, **place).returncode


def test_a_stage_killed_in_its_last_validation_is_validated_and_proved_when_it_goes_on(cli, cli_place, tmp_path):
    lengths = ["stages.align.steps=4", "checkpoint_every=2", "name=killed"]
    ends = [f"StageHandoff.on_{end}" for end in ("train_end", "fit_end", "validation_end")]
    train_until(ends, [*TINY, "pipeline=align", *lengths], **cli_place())
    (folder,) = (tmp_path / "runs" / "stages").glob("align-*")
    assert [path.name for path in folder.glob("*.ckpt")] == ["step=2.ckpt"] and not (folder / "handoff").exists()
    done = cli("train.py", *TINY, "pipeline=align", *lengths)
    assert "going on from step=2.ckpt" in done.stdout
    metrics = json.loads((folder / "handoff" / "manifest.json").read_text())["metrics"]
    assert "val/loss" in metrics and metrics["cost/seconds"] > 0 and metrics["cost/step_ms"] > 0
    assert json.loads((folder / "freezing.json").read_text())["rows"]


def stop_before_handoff(config, monkeypatch) -> Path:
    """Train a stage to its last step without its handoff, and return its folder."""
    with monkeypatch.context() as patch, pytest.raises(EOFError):
        patch.setattr(StageHandoff, "on_fit_end", Mock(side_effect=EOFError))
        Pipeline(config).run()
    (folder,) = Path(config.paths.runs).glob("stages/*")
    return folder


STOPPED = ["pipeline=align", "stages.align.steps=4", "stages.align.val_samples=0", "checkpoint_every=2", "name=stopped"]
STOPPED += ["hardware.num_workers=0"]


def test_an_interrupted_stage_that_is_another_now_begins_anew_and_says_what_differs(tiny_config, monkeypatch, capsys):
    folder = stop_before_handoff(tiny_config(*STOPPED), monkeypatch)
    Pipeline(tiny_config(*STOPPED, "hardware.precision=bf16-mixed")).run()
    said = f"align: begins at step 0; {folder.name} stopped at step 2 and differs: precision: ['32-true', None] there, "
    assert f"{said}['bf16-mixed', None] here\n" in capsys.readouterr().out
    Pipeline(tiny_config(*STOPPED)).run()
    out = capsys.readouterr().out
    assert "begins at step 0" not in out and "going on from step=2.ckpt" in out


def test_weights_that_a_killed_run_has_put_aside_are_gone_when_it_goes_on(tiny_config, monkeypatch):
    folder = stop_before_handoff(tiny_config(*STOPPED), monkeypatch)
    (folder / ".llm.4711.safetensors").touch()
    Pipeline(tiny_config(*STOPPED)).run()
    assert not list(folder.glob(".*.safetensors")) and (folder / "handoff/projector.safetensors").exists()


def test_a_run_that_ends_with_text_is_evaluated_with_the_views_of_the_last_stage_that_sees(tiny_config):
    stages = ["pipeline=align", "+stage@stages.last=base", "stages.align.image_size=32", "name=text"]
    pipeline, asked = Pipeline(tiny_config(*stages)), []
    pipeline.run_dir.mkdir(parents=True)
    pipeline.model, pipeline.tokenizer = torch.nn.Identity(), None
    run = lambda *_, image_size, transform, **__: asked.extend([image_size, transform.image_size]) or {"examples": []}
    pipeline.task = SimpleNamespace(run=run, render=str)
    pipeline.evaluate({"seconds": {}}, [])
    assert asked == [32, 32]


def test_a_run_that_ends_with_text_is_loaded_with_the_views_of_the_last_stage_that_sees(cli, tmp_path):
    stages = ["pipeline=align", "+stage@stages.last=base", "stages.align.image_size=32", "max_steps=1", "name=text"]
    cli("train.py", *TINY, *stages)
    assert load_run(tmp_path / "runs" / "text")[2].image_size == 32


def test_a_checkpoint_is_written_where_it_stays_and_one_cut_short_is_passed_over(cli, cli_place, tmp_path):
    lengths = ["stages.align.steps=4", "checkpoint_every=2", "name=killed"]
    ends = ["shutil.move", "StageHandoff.on_validation_end"]
    train_until(ends, [*TINY, "pipeline=align", *lengths], **cli_place(TMPDIR="/dev/shm"))
    (folder,) = (tmp_path / "runs" / "stages").glob("align-*")
    whole = (folder / "step=2.ckpt").read_bytes()
    (folder / "step=3.ckpt").write_bytes(whole[: len(whole) // 2])
    assert "going on from step=2.ckpt" in cli("train.py", *TINY, "pipeline=align", *lengths).stdout
    assert not list(folder.glob("*.ckpt"))


def test_a_checkout_whose_folders_have_moved_finds_its_runs_again(commands, embedded, tmp_path, monkeypatch):
    arguments = [*TINY, "pipeline=align", "stages.align.steps=2", "name=nested/one"]
    before, after = tmp_path / "before", tmp_path / "after"
    shutil.copytree(embedded, before / "data")
    assert run_here(commands, arguments, before / "data", before / "runs").returncode == 0
    before.rename(after)
    monkeypatch.setenv("FASTVLM_DATA", str(after / "data"))
    monkeypatch.delattr("data.prepare.prepare")  # nothing is built again
    load_run(after / "runs" / "latest")
    again = run_here(commands, arguments, after / "data", after / "runs")
    assert "align: finished before" in again.stdout, again.stderr


def test_a_sweep_gives_each_cell_its_process_and_outlives_a_failing_cell(cli, tmp_path):
    sweep = ["-m", *TINY, "pipeline=align", "stages.align.steps=2", "resampler.num_tokens=1000000,16"]
    done = cli("train.py", *sweep, check=False)
    assert done.returncode == 2 and done.stderr.count("the other cells go on") == 1
    assert "1 of 2 cells failed: #0" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    (finished,) = (p for p in (tmp_path / "runs").glob("*/results.json") if p.parent.name != "latest")
    assert "num_tokens: 16\n" in (finished.parent / "config.yaml").read_text()
