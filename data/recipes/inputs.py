"""Record a finished folder's input files and its recipe's code, so that a change of either is noticed.

Only names, sizes and times of input files are compared, so a check reads no data. Images named by rows are not checked.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from data.recipes.record import Part
from fastvlm.foundation import bare_code

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
IMPORTED = re.compile(r"^ *from data\.recipes\.(\w+) import", re.MULTILINE)
PARTS_OF_MANY = {".parquet", ".tar", ".zip", ".jsonl"}  # a folder's files are all read, so a new one means more rows
INDEX = ".idx.parquet"
DEPTH = 3


def describe_inputs(path: str, parts: Iterable[Part]) -> dict[str, list[int]]:
    """Return path -> [size in bytes, mtime in ns] of every file that the rows come from; empty for a hub id."""
    files = {part.path for part in parts}
    for part in parts:
        files |= {file for file, *_ in part.options.get("state") or ()}
    inputs = {}
    for file in sorted({*files, *list_more(path, files)}):
        if os.path.isfile(file):
            stat = os.stat(file)
            inputs[file] = [stat.st_size, stat.st_mtime_ns]
    return inputs


def list_files(path: str | Path, suffixes: Sequence[str], *, depth: int | None = None) -> list[Path]:
    """Return the files below a folder that have one of the suffixes, sorted.

    Skips hidden files and what `prepare.py` wrote: finished folders (DONE.json), work in progress (`.<name>.work`) and
    shard indexes.

    Args:
        depth: how many folder levels to search; None for all.
    """
    found = []
    for folder, inner, names in os.walk(path):
        if "DONE.json" in names or (depth is not None and len(Path(folder).relative_to(path).parts) >= depth):
            inner.clear()
        inner[:] = [name for name in inner if not name.startswith(".")]
        if "DONE.json" in names:
            continue
        for name in names:
            if name.lower().endswith(tuple(suffixes)) and not name.startswith(".") and not name.endswith(INDEX):
                found.append(Path(folder, name))
    return sorted(file for file in found if file.is_file())


def list_more(path: str, files: Iterable[str]) -> list[str]:
    """Return all files below `path` of the types of `files`, for types of which every file is read."""
    suffixes = {Path(file).suffix for file in files} & PARTS_OF_MANY
    return [str(file) for file in list_files(path, tuple(suffixes), depth=DEPTH)] if suffixes else []


def find_change(path: str, inputs: dict[str, list[int]]) -> str:
    """Describe what has changed; "" if nothing has, or if the data set has been removed altogether."""
    if not inputs or not os.path.exists(path):
        return ""
    for file, (size, time) in inputs.items():
        try:
            stat = os.stat(file)
        except OSError:
            return f"{file} is gone"
        if stat.st_size != size:
            return f"{file} has {stat.st_size} bytes and had {size}"
        if stat.st_mtime_ns != time:
            return f"{file} is newer" if stat.st_mtime_ns > time else f"{file} is older"
    new = [file for file in list_more(path, inputs) if file not in inputs]
    return f"{min(new)} is new" if new else ""


def hash_code(source: str) -> str:
    """Hash the source files of a recipe and of every module it is run by."""
    names, waiting = set(), {source, "assembly"}
    while waiting:
        name = waiting.pop()
        names.add(name)
        waiting |= set(IMPORTED.findall(find_module(name).read_text())) - names
    state = hashlib.sha256()
    for file in [*map(find_module, sorted(names)), ROOT / "fastvlm/data/shards.py", ROOT / "fastvlm/data/decode.py"]:
        state.update(bare_code(file).encode())
    return state.hexdigest()[:16]


def find_module(name: str) -> Path:
    file = HERE / f"{name}.py"
    return file if file.is_file() else HERE / name / "__init__.py"
