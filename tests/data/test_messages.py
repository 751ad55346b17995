"""A mistake in a stage's data is named with the key that the user can set."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
from tiny_world import write_source

from fastvlm.build import build_tokenizer
from fastvlm.config import StageConfig
from fastvlm.data.datamodule import MixtureDataModule
from fastvlm.data.source import Mixture, Source
from fastvlm.data.validation import ValidationPlan
from fastvlm.hardware import Hardware
from fastvlm.pipeline.stage_data import build_data
from tests.models.small_parts import small_vlm

BUDGET = {"tokens_per_image": 2, "batch_size": 4, "max_tokens": 64}


def mixture_of(folder, **options) -> Mixture:
    return Mixture({"x": Source("x", path=folder, **options)}, weights={"x": 1}, unit="samples")


@pytest.mark.parametrize(
    "mistake",
    [
        {"batch_size": 0},
        {"max_tokens": 0},
        {"pack_window": 0},
        {"sort_window": -1},
        {"num_steps": 0},
        {"num_steps": None, "epochs": -1},
        {"num_steps": 10_000},
        {"max_tokens": 1},
        {"max_images": 0},
        {"batch_size": 3, "accumulate": 2},
    ],
    ids=str,
)
def test_every_key_in_a_line_about_a_stages_data_is_one_of_the_configuration(sources, tokenizer, mistake):
    options = BUDGET | {"num_steps": 4, "image_size": 8, "val_samples": 0, "where": "stages.align."} | mistake
    data = MixtureDataModule(mixture_of(sources["chat"], max_epochs=1), tokenizer=tokenizer, **options)
    with pytest.raises(ValueError) as raised:
        data.setup()
        data.train_dataloader()
    line = str(raised.value)
    named = re.findall(r"([a-z_.]+)=", line)
    assert named and "\n" not in line
    stage, hardware = ({f.name for f in fields(schema)} for schema in (StageConfig, Hardware))
    for key in named:
        group, _, name = key.rpartition(".")
        assert name in {"stages.align": stage, "hardware": hardware}[group], line


def test_a_split_that_is_not_there_names_the_stages_key(tmp_path, tokenizer):
    write_source(tmp_path, "chat", 20)
    with pytest.raises(ValueError, match=r"no source of x has shards val-\*.tar; set stages.align.val_samples=0"):
        ValidationPlan(mixture_of(tmp_path), tokenizer, where="stages.align.", **BUDGET)


def test_a_stages_data_know_the_name_of_the_stage(tiny_config):
    config = tiny_config("pipeline=base", "stages.base.batch_size=6", "stages.base.steps=4")
    hardware = Hardware(accelerator="cpu", devices=1, accumulate=4)
    options = {"hardware": hardware, "options": config.data, "seed": 0, "plan_cache": None}
    data = build_data("base", config.stages.base, small_vlm(), build_tokenizer(config), **options)
    data.setup()
    with pytest.raises(
        ValueError, match=r"^stages.base.batch_size=6 .* hardware.accumulate=4; make it a multiple of 4$"
    ):
        data.train_dataloader()
