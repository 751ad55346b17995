"""What a cached feature or a stage rests on: all source and libraries that can be reached, and no words about it."""

import shutil
import sys
from modulefinder import ModuleFinder
from pathlib import Path

import pytest
import torch

from fastvlm.callbacks.features import IMAGES, code_of
from fastvlm.foundation import CARRIERS, bare_code, distributions, file_of, is_library, own_code, rests_on
from fastvlm.identity import SCORING, code_hash, run_code
from fastvlm.models.encoders.multi_granularity import MultiGranularityEncoder
from tests.conftest import ROOT
from tests.models.small_parts import small_vlm

ENCODERS = sorted((Path(__file__).parents[1] / "fastvlm/models/encoders").glob("[a-z]*.py"))
STARTS = [*(f"fastvlm.models.encoders.{path.stem}" for path in ENCODERS), "fastvlm.models.pretrained.whole"]


@pytest.mark.parametrize("start", [*STARTS, "fastvlm.models.vlm", *IMAGES])
def test_nothing_that_the_standard_librarys_module_finder_reaches_is_missed(start):
    """It follows the instructions of compiled code, and not the text."""
    libraries = [name for name in distributions() if name.isidentifier() and is_library(name)]
    finder = ModuleFinder(path=[str(Path(__file__).parents[1])], excludes=[*libraries, *sys.stdlib_module_names])
    finder.run_script(str(file_of(start)))
    made = rests_on([start])
    ours = {name for name in finder.modules if name.split(".")[0] == "fastvlm"}
    assert ours <= made["source"].keys()
    reached = {name.split(".")[0] for name in finder.badmodules} - set(sys.stdlib_module_names) - {"fastvlm"}
    named = {d for name in reached - set(CARRIERS) for d in distributions().get(name, [name])}
    assert named == made["versions"].keys()


def test_the_decoder_the_norms_and_the_library_of_every_kind_of_encoder_are_in_the_key():
    model = small_vlm()
    made = code_of(model)
    assert {"simplejpeg", "torchvision", "pillow", "numpy", "torch", "transformers"} <= made["versions"].keys()
    assert all(made["versions"].values())
    assert {"fastvlm.models.norms", "fastvlm.data.decode", "feature_pass.py", "features.py"} <= made["source"].keys()
    assert {"timm", "open_clip_torch"}.isdisjoint(made["versions"]), "another encoder's"
    assert not any("perceiver" in name or "fsspec" in name for kind in made.values() for name in kind)
    few_bits = type("Linear4bit", (torch.nn.Linear,), {"__module__": "bitsandbytes.nn"})  # without importing it
    model.encoder.add_module("adapter", few_bits(4, 4))
    assert "bitsandbytes" in code_of(model)["versions"], "a layer's library counts, whoever put it there"
    assert "fastvlm.models.norms" in rests_on([MultiGranularityEncoder.__module__])["source"]


MINE = "from torch import nn\nfrom .blocks import Block\nclass Mine(nn.Module):\n    pass\n"
EDITS = {
    "its own file": ("__init__.py", MINE + "x = 1\n"),
    "a file it imports": ("blocks.py", "from mine_encoder.deep import scale\nclass Block: ...\ny = 2\n"),
    "a file that one imports inside a function": ("late.py", "z = 3\n"),
    "a file that is imported from": ("deep.py", "scale = 2\n"),
}


@pytest.mark.parametrize("what", EDITS)
def test_an_edit_of_an_encoder_of_ones_own_makes_another_key_however_deep_it_lies(tmp_path, monkeypatch, what):
    folder = tmp_path / "mine_encoder"
    folder.mkdir()
    (folder / "__init__.py").write_text(MINE)
    (folder / "blocks.py").write_text("from mine_encoder.deep import scale\nclass Block: ...\n")
    (folder / "deep.py").write_text("def scale():\n    from mine_encoder import late\n")
    (folder / "late.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    import mine_encoder

    model = small_vlm()
    model.encoder = torch.nn.Sequential(model.encoder, mine_encoder.Mine())
    try:
        before = code_of(model)
        assert {"mine_encoder", "mine_encoder.blocks", "mine_encoder.deep", "mine_encoder.late"} <= before[
            "source"
        ].keys()
        name, text = EDITS[what]
        (folder / name).write_text(text)
        assert code_of(model) != before
    finally:
        for name in [name for name in sys.modules if name.startswith("mine_encoder")]:
            del sys.modules[name]


def test_another_version_of_a_library_makes_another_key(monkeypatch):
    before = rests_on(IMAGES)
    import importlib.metadata

    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0" if name == "simplejpeg" else real(name))
    after = rests_on(IMAGES)
    assert after["source"] == before["source"] and after["versions"] == before["versions"] | {"simplejpeg": "0.0"}


def test_a_users_module_and_what_it_imports_are_in_the_code_of_a_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/part.py").write_text("from mine.inner import width\nclass Part: pass\n")
    (tmp_path / "mine/inner.py").write_text("width = 1\n")
    config = {"encoder": {"_target_": "mine.part.Part"}, "optimizer": {"_target_": "torch.optim.AdamW"}}
    config["more"] = [{"_target_": "fastvlm.models.resamplers.avgpool.AvgPool"}]
    before = own_code(config)
    assert {"mine.part", "mine.inner"} <= before.keys() and all(name.startswith("mine") for name in before)
    (tmp_path / "mine/inner.py").write_text("width = 1  # said\n")
    assert own_code(config) == before
    (tmp_path / "mine/inner.py").write_text("width = 2\n")
    assert own_code(config) != before
    assert own_code({key: config[key] for key in ("optimizer", "more")}) == {}
    assert run_code(config) != run_code({}) == code_hash(SCORING)


def test_what_builds_plans_and_trains_is_the_code_of_a_stage_and_what_draws_its_page_is_not(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "fastvlm", tmp_path / "fastvlm", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr("fastvlm.identity.ROOT", tmp_path)
    now = code_hash.__wrapped__
    for name, decides in (
        ("build.py", True),
        ("pipeline/training.py", True),
        ("pipeline/stage_data.py", True),
        ("callbacks/features.py", True),
        ("report/stages.py", False),
    ):
        before = now()
        file = tmp_path / "fastvlm" / name
        file.write_text(file.read_text() + "\nother = 1\n")
        assert (now() != before) == decides, name


CODE = '''"""A module."""

import os  # for its names


class A:
    """A class.

    Of two paragraphs.
    """

    text = """
# not a comment

"""  # a comment

    def f(self, x):
        # a comment of its own line
        "A method."
        return [
            x,  # the first

            "#",
        ]


def g(): "a docstring on the line of its function"
'''


def hashed(tmp_path, text: str) -> str:
    (tmp_path / "a.py").write_text(text)
    return bare_code(tmp_path / "a.py")


def test_words_leave_the_code_as_it_is(tmp_path):
    code = hashed(tmp_path, CODE)
    told = CODE.replace("A module.", "Another.").replace("Of two paragraphs.", "Of\n    more.")
    told = told.replace("the first", "x").replace("        # a comment of its own line\n", "")
    told = told.replace("\n\nclass", "\n\n# c\n\nclass")
    assert told != CODE and hashed(tmp_path, told) == code
    wordless = {}
    exec(compile(code, "a.py", "exec"), wordless)
    assert wordless["A"]().f(1) == [1, "#"] and wordless["A"].text == "\n# not a comment\n\n"


def test_every_other_change_is_seen(tmp_path):
    code = hashed(tmp_path, CODE)
    for old, new in (
        ("x,", "x, x,"),
        ('"#"', '"##"'),
        ("# not a comment", "# another text"),
        ('comment\n\n"""', 'comment\n"""'),
        ("def g", "def h"),
        ("import os", "import sys"),
    ):
        assert old in CODE and hashed(tmp_path, CODE.replace(old, new, 1)) != code, old
