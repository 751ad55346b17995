"""Imports point down (docs/design.md, section 2)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What each package of ours may import of ours.
MAY = {
    "tokens": set(),
    "batch": {"tokens"},
    "hardware": {"zero"},
    "zero": set(),
    "tracking": set(),
    "report": set(),
    "files": set(),
    "commands": {"files"},
    "models": {"tokens", "batch"},
    "data": {"tokens", "batch", "files", "commands"},
    "stages": {"models", "batch", "tokens"},
    "foundation": set(),
    "callbacks": {"models", "batch", "tokens", "foundation", "files"},
    "inference": {"models", "data", "batch", "tokens", "build", "files", "commands"},
    "identity": {"files", "foundation"},
    "study": {"identity", "files", "tracking", "build", "config", "callbacks", "models", "pipeline"},
    "harnesses": {"evaluation", "inference", "models", "data", "batch", "tokens", "build"},
    "deployment": {"models", "data", "inference", "batch", "tokens", "build", "auto", "commands"},
    "auto": {"models", "deployment"},
    "bench": {"inference", "models", "data", "batch", "tokens", "build", "commands"},
    "evaluation": {"models", "data", "inference", "batch", "tokens", "files"},
}


def imported(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("owner", MAY)
def test_imports_point_down(owner):
    entry = ROOT / "fastvlm" / owner
    files = list(entry.rglob("*.py")) if entry.is_dir() else [entry.with_suffix(".py")]
    assert files
    for file in files:
        for module in imported(file):
            parts = module.split(".")
            if (
                parts[0] == "fastvlm"
                and len(parts) > 1
                and (ROOT / "fastvlm" / parts[1]).exists() | (ROOT / "fastvlm" / f"{parts[1]}.py").exists()
            ):
                assert parts[1] in MAY[owner] | {owner}, f"{file.relative_to(ROOT)} imports {module}"


def test_nothing_imports_the_entry_points_or_the_experiments():
    for file in (ROOT / "fastvlm").rglob("*.py"):
        for module in imported(file):
            assert module.split(".")[0] not in {"train", "eval", "experiments", "tests"}, f"{file} imports {module}"


def test_only_config_and_build_know_hydra():
    package = ROOT / "fastvlm"
    files = [f for f in package.rglob("*.py") if any(m.split(".")[0] == "hydra" for m in imported(f))]
    assert {f.relative_to(package).parts[0] for f in files} == {"config", "build.py"}
