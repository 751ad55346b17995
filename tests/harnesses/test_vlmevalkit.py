"""VLMEvalKit through our server, in an environment of its own: FASTVLM_VLMEVAL names its Python."""

import os
import re

import pytest

from tests.conftest import TINY

KIT = os.environ.get("FASTVLM_VLMEVAL")
# Enough steps for answers that are words: an empty one VLMEvalKit asks again, and takes for a failure.
SPEAKS = [
    *TINY,
    "pipeline=dense",
    "mixture@stages.dense.mixture=embedded_sft_minimal",
    "stages.dense.trainable={encoder: 1e-2, resampler: 1e-2, projector: 1e-2, llm: 1e-2}",
    "stages.dense.image_size=64",
    "stages.dense.batch_size=16",
    "stages.dense.steps=150",
]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not KIT, reason="FASTVLM_VLMEVAL=<python of an environment with VLMEvalKit> is not given")
def test_vlmevalkit_is_answered_as_our_own_evaluation_is_and_gives_the_same_score(cli, tmp_path):
    cli("train.py", *SPEAKS, "name=speaks", timeout=280)
    asked = [f"run={tmp_path}/runs/latest", f"kit={KIT}", "count=24", "tokens=6"]
    done = cli("benchmarks/vlmevalkit.py", *asked, timeout=560)
    found = re.findall(r"(\d+) unlike answers; ours the same: (\w+)\n  VLMEvalKit ([\d.]+), ours ([\d.]+)", done.stdout)
    assert [same for _, same, _, _ in found] == ["True", "True"], done.stdout
    unlike, _, theirs, ours = found[0]
    assert int(unlike) > 5 and float(theirs) > 0 and theirs == ours, done.stdout
