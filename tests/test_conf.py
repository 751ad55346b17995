"""Every YAML in conf/ is one constructor call with the constructor's own names, or fits the schema."""

import inspect
from pathlib import Path

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

from fastvlm.config import CONF, StageConfig, compose

CONSTRUCTORS = [
    "encoder",
    "resampler",
    "projector",
    "llm",
    "vlm",
    "tokenizer",
    "source",
    "mixture",
    "hardware",
    "optimizer",
    "logger",
    "task",
]
FILES = [f for group in CONSTRUCTORS for f in sorted((CONF / group).glob("*.yaml"))]


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_yaml_is_one_constructor_call(path: Path):
    config = OmegaConf.load(path)
    arguments = {k for k in config if k not in ("_target_", "_partial_", "defaults")}
    parameters = inspect.signature(get_object(config._target_)).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    assert open_ended or arguments <= set(parameters), arguments - set(parameters)
    for name in arguments & set(parameters):
        default = parameters[name].default
        value = OmegaConf.to_container(config, resolve=False)[name]
        assert default is inspect.Parameter.empty or value != default, f"{name}: {value} repeats the default"


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_yaml_says_in_its_first_line_what_it_is(path: Path):
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("path", sorted((CONF / "stage").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_stage_fits_the_schema(path: Path):
    keys = {k for k in OmegaConf.load(path) if k != "defaults"}
    assert keys <= set(StageConfig.__dataclass_fields__)


@pytest.mark.parametrize("path", sorted((CONF / "pipeline").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_pipeline_composes(path: Path):
    config = compose("train", [f"pipeline={path.stem}"])
    assert config.stages
    for stage in config.stages.values():
        assert set(stage.mixture.weights) == set(stage.mixture.sources)


def test_three_stage_has_the_designs_rates():
    stages = compose("train", ["pipeline=three_stage"]).stages
    assert dict(stages.align.trainable) == {"resampler": 1e-3, "projector": 1e-3}
    assert dict(stages.dense.trainable) == {"encoder": 5e-5, "resampler": 5e-5, "projector": 5e-5}
    assert stages.instruct.lora.r == 8 and stages.instruct.lora.lr == 2e-5
    assert stages.align.image_size < stages.dense.image_size


def test_a_stages_mixture_and_keys_are_set_from_the_command_line():
    config = compose("train", ["mixture@stages.align.mixture=embedded_45_45_10", "stages.dense.image_size=128"])
    assert set(config.stages.align.mixture.weights) == {"captions", "interleaved", "text"}
    assert config.stages.dense.image_size == 128


def test_the_evaluation_page_lists_every_task():
    page = (CONF.parent / "docs" / "evaluation.md").read_text()
    assert not [f.stem for f in (CONF / "task").glob("*.yaml") if f"`{f.stem}`" not in page]


@pytest.mark.parametrize("path", sorted((CONF / "vlm").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_whole_model_brings_its_tokenizer_and_a_pipeline_that_takes_its_own_views(path: Path):
    config = compose("train", [f"vlm={path.stem}", "vlm.path=somewhere"])
    assert list(config.stages) == ["instruct"] and config.stages.instruct.image_size is None
    expected = "${llm.path}" if path.stem == "traditional" else "somewhere"
    assert OmegaConf.to_container(config, resolve=False)["tokenizer"]["path"] in (expected, "${vlm.path}")
