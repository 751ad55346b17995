"""stages.<name>.cache_features: the same training, without decoding an image or running the encoder."""

import json
import os
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

from fastvlm.callbacks.features import CachedFeatures, weights_hash
from tests.conftest import TINY
from tests.models.small_parts import small_encoder, small_vlm

DENSE = [*TINY, "pipeline=dense", "stages.dense.image_size=64", "stages.dense.batch_size=4", "hardware.num_workers=0"]
DENSE += ["stages.dense.trainable.encoder=null", "encoder.mlp_ratio=2.0", "log_every=1"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


def losses(stage: Path) -> list[float]:
    records = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [r[key] for key in ("train/loss", "val/loss") for r in records if key in r]


def set_aside(tmp_path) -> Path:
    """The only stage's folder, moved so that the next command trains it again."""
    (stage,) = (tmp_path / "runs" / "stages").iterdir()
    return stage.rename(tmp_path / f"{stage.name}-{len(list(tmp_path.iterdir()))}")


def test_the_loss_curve_is_that_of_the_run_without_and_the_stage_is_the_same(cli, tmp_path, cache):
    arguments = [*DENSE, "stages.dense.steps=6", "stages.dense.validate_every=3", "name=a"]
    cli("train.py", *arguments)
    plain = set_aside(tmp_path)
    done = cli("train.py", *arguments, "stages.dense.cache_features=true")
    # The same run directory and the same identity: where the outputs come from is not part of what is learnt.
    assert "planned images" in done.stdout and "0 in the cache" in done.stdout
    cached = set_aside(tmp_path)
    assert cached.name.rsplit("-", 1)[0] == plain.name.rsplit("-", 1)[0]
    assert len(losses(plain)) >= 8
    torch.testing.assert_close(torch.tensor(losses(cached)), torch.tensor(losses(plain)), rtol=0, atol=1e-6)
    record = json.loads((cached / "features.json").read_text())
    assert record["written"] == record["distinct"] > 0 and record["dtype"] == "torch.float32"
    assert "cache_features" in (cached / "provenance.json").read_text()
    assert "read from the feature cache" in (tmp_path / "runs" / "a" / "report.html").read_text()
    # And once more: nothing is written.
    again = cli("train.py", *arguments, "stages.dense.cache_features=true", "hardware.num_workers=2")
    assert "no image is decoded" in again.stdout
    assert losses(set_aside(tmp_path)) == losses(cached)


def test_a_stage_that_learns_the_encoder_is_refused_in_one_line(cli, cache):
    arguments = [a for a in DENSE if "trainable.encoder" not in a]
    done = cli("train.py", *arguments, "stages.dense.cache_features=true", check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: stages.dense.cache_features=true, but the encoder learns" in done.stderr.splitlines()[-1]
    done = cli("train.py", *TINY, "pipeline=base", "stages.base.cache_features=true", check=False)
    assert done.returncode == 2 and "stages.base.cache_features=true, but the stage computes with llm" in done.stderr
    assert not cache.exists()


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_two_ranks_write_shares_and_pass_steps_in_which_one_has_no_image(cli, tmp_path, cache):
    # One sample a rank and step, of captions and of text: a rank often has no image while the other has one.
    arguments = [*DENSE, "stages.dense.steps=6", "mixture@stages.dense.mixture=embedded_45_45_10"]
    arguments += ["stages.dense.batch_size=2", "stages.dense.packing=false", "stages.dense.max_tokens=512"]
    arguments += ["stages.dense.val_samples=8", "stages.dense.mixture.weights.text=100"]
    weights, curves = [], []
    for devices, cached in ((1, False), (2, True)):
        options = [f"hardware.devices={devices}", f"stages.dense.cache_features={str(cached).lower()}"]
        cli("train.py", *arguments, *options, f"name=ranks{devices}")
        stage = set_aside(tmp_path)
        weights.append(load_file(stage / "handoff" / "projector.safetensors"))
        curves.append(losses(stage))
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-4, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")
    torch.testing.assert_close(torch.tensor(curves[1]), torch.tensor(curves[0]), rtol=1e-4, atol=1e-5)
    counts = [len(load_file(chunk)["keys"]) for chunk in cache.glob("*/*.safetensors")]
    assert len(counts) == 2 and abs(counts[0] - counts[1]) <= 1


def test_one_weight_one_statistic_or_one_setting_of_the_encoder_makes_another_key():
    encoder = small_encoder()
    key = weights_hash(encoder)
    assert weights_hash(small_encoder()) == key
    seen = {key}
    with torch.no_grad():
        next(encoder.parameters()).view(-1)[3] += 1e-6
        seen.add(weights_hash(encoder))
        next(b for b in encoder.buffers() if b.is_floating_point()).view(-1)[0] += 1e-6
        seen.add(weights_hash(encoder))
        seen.add(weights_hash(encoder.double()))
    other = small_encoder()
    next(m for m in other.modules() if isinstance(m, torch.nn.BatchNorm2d)).eps = 1e-4
    seen.add(weights_hash(other))
    assert len(seen) == 5


def test_a_module_of_the_encoder_in_training_mode_is_refused(tmp_path):
    class Stage(L.LightningModule):
        learning_rates = {"projector.weight": 1e-3}

    stage = Stage()
    stage.model = small_vlm().train()
    callback = CachedFeatures(name="align", description={}, path=tmp_path / "features.json")
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="stages.align.cache_features=true, but a module of the encoder"):
        callback.setup(trainer, stage, "fit")
    stage.model.encoder.eval()
    callback.setup(trainer, stage, "fit")


def test_the_cache_is_where_the_environment_says(cache):
    from fastvlm.data.features import features_folder

    assert features_folder() == cache
    del os.environ["FASTVLM_CACHE"]
    assert features_folder() == Path.home() / ".cache" / "fastvlm" / "features"
