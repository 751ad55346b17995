"""docs/parts.md is what scripts/parts.py prints, and lists every option."""

import re
import sys

import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import parts  # noqa: E402

COMMITTED = (ROOT / "docs" / "parts.md").read_text()
names = lambda group: {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}


def without_flops(text: str) -> list[str]:
    """Lines, tables without their last column, which is the one with FLOPs."""
    return [re.sub(r"\|[^|]*\|$", "|", line) if line.startswith("|") else line for line in text.splitlines()]


def test_the_committed_table_is_what_the_script_prints():
    assert without_flops(COMMITTED) == without_flops(parts.document(flops=False))


@pytest.mark.slow
def test_the_committed_flops_are_those_counted():
    assert parts.document() == COMMITTED


def test_every_full_size_option_is_listed():
    micro = {name for name in names("encoder") | names("llm") if name.endswith("_micro")}
    assert names("encoder") - micro - {"timm", "transformers"} == set(parts.ENCODERS)
    assert names("llm") - micro - {"pretrained"} == set(parts.LLMS)
    assert names("resampler") - {"qformer"} == set(parts.RESAMPLERS)
    assert names("projector") == {name.split(",")[0] for name in parts.PROJECTORS}


def test_the_sizes_are_the_published_ones():
    """Parameters in millions, as the models' cards state them."""
    stated = {"qwen2_5_0_5b": 494, "qwen2_5_1_5b": 1544, "qwen2_5_7b": 7616, "qwen3_0_6b": 596, "qwen3_1_7b": 1721}
    stated |= {"llama3_2_1b": 1236, "vicuna_7b": 6738, "smollm2_135m": 135, "smollm2_360m": 362, "smollm2_1_7b": 1711}
    stated |= {"opt_125m": 125, "opt_1_3b": 1316}
    for name, millions in stated.items():
        assert abs(parts.number(parts.language_model(name)) / 1e6 - millions) < 1, name
