"""A user's mistake is one line that names the file, the key and the fix; nothing already written is damaged."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from fastvlm.build import ensure_embedded
from fastvlm.commands import run_command
from fastvlm.config import check, compose
from fastvlm.config.command_line import run_task
from fastvlm.config.composition import quote_path
from fastvlm.deployment.hub import fresh_folder
from tests.conftest import ROOT, TINY

ALIGN = [*TINY, "pipeline=align", "stages.align.steps=2"]


def one_line(done, *words: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert word in lines[0], f"{word!r} is not in {lines[0]!r}"


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("resampler=avgpol", ["did you mean resampler=avgpool", "perceiver"]),
        ("stages.align.image_sise=64", ["stages.align.image_sise", "did you mean stages.align.image_size"]),
        ("resampler.num_token=4", ["resampler.num_token", "did you mean resampler.num_tokens"]),
        ("+resampler.num_token=4", ["resampler.num_token", "AvgPoolResampler", "did you mean resampler.num_tokens"]),
        ("stages.align.steps=many", ["stages.align.steps", "many"]),
        ("stages.align.steps=-3", ["stages.align.steps=-3 must be above 0"]),
        ("stages.align.epochs=1", ["give exactly one of steps and epochs"]),
        (
            "stages.align.trainable={projecter: 1e-3}",
            ["stages.align.trainable", "projecter", "nearest name is projector"],
        ),
        ("mixture@stages.align.mixture=embeded_align", ["did you mean mixture=embedded_align"]),
        ("stages.align.mixture.weights.captoins=3", ["captoins", "captions"]),
        ("tokenizer.template=chatm", ["tokenizer.template=chatm", "chatml"]),
        ("hardware.accelerator=gpu", ["no CUDA device", "hardware=cpu"]),
        ("stages.align.mixture=embedded_base", ["choose a file of conf/mixture/", "mixture@stages.align.mixture=em"]),
        ("mixture=embedded_base", ["every stage has its own", "mixture@stages.align.mixture=<name>"]),
        ("batch_size=4", ["every stage has its own", "stages.align.batch_size="]),
        ("lr=1e-3", ["unknown key lr", "stages.align.trainable.<part>=<rate>"]),
        ("resampler", ["resampler is not key=value"]),
        ("stages.align.lora.r=4", ["stages.align.lora is null; give it whole, stages.align.lora='{r: <value>, ...}'"]),
        ("stages.align.trainable.projector=fast", ["stages.align.trainable.projector=fast is not a learning rate"]),
        ("tokenizer=chatml", ["tokenizer.path is that of llm.path, which this configuration lacks"]),
        ("encoder=fastvithd", ["encoder.checkpoint must be given"]),
        ("projector=null", ["a configuration group takes a file's name", "~task leaves out"]),
        ("seed=0,1", ["seed=0,1", "add -m"]),
        ("logger.uri=über (1)", ["is not key=value", """quoted inside the word: 'logger.uri="über (1)"'"""]),
        ("log_every=0", ["log_every=0 must be at least 1"]),
    ],
)
def test_a_typo_or_a_wrong_value_is_one_line_with_the_nearest_right_name(cli, argument, words):
    one_line(cli("train.py", *ALIGN, "name=typo", argument, check=False), *words)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("checkpoint_every=-1", "checkpoint_every=-1 must be at least 1"),
        ("max_steps=0", "max_steps=0 must be at least 1, or null"),
        ("+part_seeds.encodr=3", "part_seeds.encodr=3: the parts are encoder, resampler, projector, llm"),
        ("stages.align.warmup_steps=-5", "stages.align.warmup_steps=-5 must not be below 0"),
        ("stages.align.final=-2", "stages.align.final=-2.0 must not be below 0"),
        ("stages.align.val_samples=-3", "stages.align.val_samples=-3 must not be below 0"),
        ("stages.align.clip=-1", "stages.align.clip=-1 must be above 0, or null"),
    ],
)
def test_a_number_that_means_nothing_is_refused_with_its_key(argument, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check(compose("train", ["pipeline=align", argument]))


def test_parts_beside_a_pretrained_model_are_refused_which_brings_its_own(cli):
    typed = ["vlm=auto", "vlm.path=any/thing", "resampler=perceiver", "llm.num_heads=4"]
    one_line(cli("train.py", *typed, check=False), "own parts; leave resampler=perceiver llm.num_heads=4 out")


@pytest.mark.parametrize("name", ["embedded,resampler=perceiver", "größer (2)", "it's"])
def test_a_run_is_given_by_its_path_whatever_signs_are_in_its_name(cli, tmp_path, name):
    (tmp_path / name).mkdir()
    one_line(cli("eval.py", f"checkpoint={tmp_path / name}", check=False), f"{tmp_path / name} holds no run")


def test_only_an_existing_path_that_hydra_cannot_read_is_quoted(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "a,b", "7", "model.pt"):
        (tmp_path / name).touch()
    assert quote_path("encoder.checkpoint=~/model.pt") == f"encoder.checkpoint='{tmp_path}/model.pt'"
    assert quote_path("checkpoint=a,b") == "checkpoint='a,b'"
    for word in ("checkpoint=plain", "resampler=avgpool,perceiver", "seed=7", "vlm.path=~/none", "-m", "~task"):
        assert quote_path(word) == word


def test_a_place_that_takes_no_files_is_one_line(commands, cli_place, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.touch()
    place = cli_place(FASTVLM_RUNS=str(taken))
    one_line(commands.run([str(ROOT / "train.py"), *ALIGN], **place), str(taken), "Not a directory")
    with pytest.raises(SystemExit, match="2"):
        run_command(lambda: fresh_folder(str(taken)))
    assert capsys.readouterr().err == f"error: {taken}: Not a directory\n"


PROBE = """
import warnings, weakref
import fastvlm
from fastvlm.config import command

def task(config):
    def raised(_):
        raise RuntimeError({words!r})
    thing = type("Thing", (), {{}})()
    gone = weakref.ref(thing, raised)  # what Python cannot raise
    del thing
    warnings.warn_explicit("a shard is broken", UserWarning, fastvlm.__file__, 1)

command("train", task)
"""


@pytest.mark.parametrize("words", ["DataLoader worker (pid 7) is killed by signal: Killed. ", "another"])
def test_a_command_tells_its_warnings_in_a_line_and_a_loader_killed_in_a_finaliser_without_a_traceback(tmp_path, words):
    (tmp_path / "probe.py").write_text(PROBE.format(words=words))
    place = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT), "FASTVLM_RUNS": str(tmp_path / "runs")}}
    done = subprocess.run([sys.executable, "probe.py"], capture_output=True, text=True, **place)
    assert done.returncode == 0 and done.stderr.endswith("warning: a shard is broken\n"), done.stderr
    assert ("Traceback" in done.stderr) is (words == "another") and (words == "another" or done.stderr.count("\n") == 1)


def test_an_interrupted_run_says_from_where_the_same_command_goes_on(capsys):
    def interrupt(config):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="130"):
        run_task(interrupt, compose("train"), name="train", typed="python train.py", show_traceback=False)
    assert "goes on from the last checkpoint (one every checkpoint_every=200 steps)" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["dätä", "data/"])
def test_the_embedded_data_are_built_wherever_they_are_to_be(tmp_path, monkeypatch, folder):
    built = []
    monkeypatch.setattr("data.prepare.prepare", lambda name, *, out: built.append(out))
    monkeypatch.setenv("FASTVLM_DATA", f"{tmp_path}/{folder}")
    ensure_embedded(compose("train", ["pipeline=align"]))
    assert built == [tmp_path / folder / "embedded"]
    ensure_embedded(compose("eval", ["checkpoint=any", "task=gsm8k"]))
    assert len(built) == 1


def test_a_rate_of_no_part_is_refused_before_the_first_stage_trains():
    config = compose("train", ["stages.instruct.trainable.projectr=1e-3"])
    with pytest.raises(ValueError, match="stages.instruct.trainable: .*'projectr'.* the nearest name is projector"):
        check(config)


def test_an_evaluation_of_no_run_asks_for_one_and_takes_no_group_of_a_run(cli):
    one_line(cli("eval.py", check=False), "checkpoint=<run directory> must be given")
    one_line(cli("eval.py", "checkpoint=any", "logger=none", check=False), "unknown key logger; see `python eval.py")


def test_of_several_tasks_a_misspelt_one_is_one_line(cli):
    one_line(cli("eval.py", "checkpoint=any", "task=[embedded,vqa2]", check=False), "did you mean task=vqav2?")


def test_a_damaged_configuration_of_a_run_is_one_line_that_names_the_file(cli, tmp_path):
    (tmp_path / "runs" / "typo").mkdir(parents=True)
    (tmp_path / "runs" / "typo" / "config.yaml").write_text("stages: {")
    one_line(cli("train.py", *ALIGN, "name=typo", check=False), "typo/config.yaml cannot be read", "mend or delete it")


def test_a_source_without_shards_and_a_task_of_no_run_are_one_line(cli, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    done = cli("train.py", *ALIGN, f"stages.align.mixture.sources.captions.path={empty}", check=False)
    one_line(done, str(empty), "prepare.py")
    one_line(cli("eval.py", "checkpoint=nowhere", check=False), "nowhere holds no run")


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        (
            "stages.last.mixture.sources.captions.path={empty}",
            "stages.last.mixture: source captions: {empty}: no shards",
        ),
        ("task.sources.reading.path={empty}", "task.sources.reading: {empty}: no shards test-*.tar"),
        ("task.text.path={trained}", "task.text: {trained}: no shards test-*.tar"),
        ("task=panel task.held_out.captions.path={trained}", "task.held_out.captions: {trained}: no shards test-*.tar"),
        ("task=vqav2 task.source.path={trained}", "task vqav2: no val shards in {trained}"),
        ("task=vqav2 task.split=train task.source.path={empty}", "task vqav2: no train shards in {empty}"),
        ("task=vqav2 task.split=test task.shots=2 task.source.path={asked}", "task vqav2: shots=2 come from train: no"),
    ],
)
def test_shards_that_a_later_stage_or_the_task_needs_are_asked_for_before_the_first_stage(
    cli, tmp_path, argument, words
):
    folders = {name: tmp_path / name for name in ("empty", "trained", "asked")}
    for folder in folders.values():
        folder.mkdir()
    (folders["trained"] / "train-00000.tar").touch()
    (folders["asked"] / "test-00000.tar").touch()
    two = [*(o for o in ALIGN if o != "~task"), "+stage@stages.last=align", "name=later"]
    one_line(cli("train.py", *two, *argument.format(**folders).split(), check=False), words.format(**folders))
    assert not (tmp_path / "runs" / "stages").exists()


def test_a_handoff_of_another_tokenizer_or_a_damaged_one_is_refused_and_left_alone(cli, tmp_path):
    cli("train.py", *ALIGN, "name=one")
    (stage,) = (tmp_path / "runs" / "stages").iterdir()
    weights = stage / "handoff" / "projector.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    one_line(
        cli("train.py", *ALIGN, "name=one", check=False), "projector.safetensors", "not the file the manifest names"
    )
    weights.write_bytes(good)
    manifest = stage / "handoff" / "manifest.json"
    manifest.write_text(manifest.read_text()[:100])
    one_line(cli("train.py", *ALIGN, "name=one", check=False), "manifest.json: not a handoff manifest")
    assert weights.read_bytes() == good


def test_a_stage_that_was_trained_with_another_tokenizer_does_not_load(cli, tmp_path):
    options = ["stages.align.trainable={projector: 1e-3, llm: 1e-3}", "name=one"]
    cli("train.py", *ALIGN, *options)
    (stage,) = (tmp_path / "runs" / "stages").iterdir()
    manifest = json.loads((stage / "handoff" / "manifest.json").read_text())
    (stage / "handoff" / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": "another"}))
    one_line(
        cli("train.py", *ALIGN, *options, check=False), "trained with tokenizer another", "use the same `tokenizer`"
    )


def test_the_command_works_from_any_directory_and_says_everything_that_can_be_set(cli, tmp_path):
    done = cli("train.py", "--cfg", "job")
    assert "stages:" in done.stdout and "num_tokens: 16" in done.stdout
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)


def test_a_run_is_scored_again_by_eval(cli, tmp_path):
    cli("train.py", *ALIGN, "name=scored")
    scored = ["checkpoint=" + str(tmp_path / "runs" / "latest"), "hardware=cpu", "task.limit=2", "task.text_limit=2"]
    done = cli("eval.py", *scored)
    results = json.loads((tmp_path / "runs" / "scored" / "eval" / "results.json").read_text())
    assert "test/exact_match/mean" in results["metrics"] and "mean of all" in done.stdout
