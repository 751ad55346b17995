"""Find what a computation depends on: the source of all modules it can reach by imports, and library versions.

Imports are parsed from the source, not executed, so those inside functions are included.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.machinery
import importlib.metadata
import io
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

# These transfer bytes that are hashed themselves, start processes or check types: no value depends on their version.
CARRIERS = ("huggingface_hub", "safetensors", "jaxtyping", "deepspeed")

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def rests_on(modules: Iterable[str], *, files: Iterable[str | Path] = ()) -> dict[str, dict[str, str | None]]:
    """Return the source files and library versions that some modules depend on.

    Args:
        modules: names of importable modules; what they import is included, recursively.
        files: additional files, without what they import.

    Returns:
        `source`: module -> hash of its code (`bare_code`), for every module outside the folders of installed libraries.
        `versions`: distribution -> version, for every library that one of them imports.
    """
    source: dict[str, str] = {}
    libraries: set[str] = set()
    todo = set(modules)
    while todo:
        name = todo.pop()
        top = name.split(".")[0]
        if name in source or top in sys.stdlib_module_names or top == "__main__":
            continue
        if is_library(top):
            libraries.add(top)
            continue
        if (path := file_of(name)) is None:
            continue  # `name` of `from module import name` that is not a module
        source[name] = digest(path)
        parts = name.split(".")
        todo |= {".".join(parts[:i]) for i in range(1, len(parts))}  # a package's __init__ runs before its modules
        todo |= set(imports_of(path, name))
    source |= {Path(file).name: digest(Path(file)) for file in files}
    return {"source": dict(sorted(source.items())), "versions": versions_of(libraries - set(CARRIERS))}


def own_code(config: Any) -> dict[str, str]:
    """Return module -> hash for the user's modules that a plain configuration's `_target_`s name.

    What these modules import outside this package and the libraries is included.
    """
    names = set()
    for target in targets(config):
        words = target.split(".")
        if words[0] != __package__ and not is_library(words[0]):
            modules = (".".join(words[:end]) for end in range(len(words) - 1, 0, -1))
            names |= {next((name for name in modules if file_of(name) is not None), words[0])}
    own = rests_on(names)["source"] if names else {}
    return {name: code for name, code in own.items() if name.split(".")[0] != __package__}


def targets(config: Any) -> Iterator[str]:
    """Yield every `_target_` of nested dicts and lists."""
    if isinstance(config, dict):
        if isinstance(target := config.get("_target_"), str):
            yield target
        for value in config.values():
            yield from targets(value)
    elif isinstance(config, list):
        for value in config:
            yield from targets(value)


def imports_of(path: Path, name: str) -> Iterator[str]:
    """Yield all names a module imports, anywhere in its source; `from a import b` yields a and a.b."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@cache
def is_library(top: str) -> bool:
    """Whether a top-level module is in a folder of installed libraries, or has no file (built in, or missing)."""
    if top == __package__:
        return False
    spec = importlib.machinery.PathFinder.find_spec(top)
    places = [] if spec is None else [spec.origin] if spec.has_location else list(spec.submodule_search_locations or ())
    installed = {Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib")}
    return all(not installed.isdisjoint(Path(place).resolve().parents) for place in places)


def file_of(name: str) -> Path | None:
    """Return the file of a module outside the libraries; None if there is no such module."""
    top, *rest = name.split(".")
    spec = importlib.machinery.PathFinder.find_spec(top)
    if spec is None:
        return None
    for folder in spec.submodule_search_locations or ():
        path = Path(folder).joinpath(*rest)
        for candidate in (path / "__init__.py", path.with_suffix(".py")):
            if candidate.is_file() and (rest or candidate.name == "__init__.py"):
                return candidate
    if spec.submodule_search_locations is None and not rest and spec.origin:
        return Path(spec.origin)
    return None


@cache
def distributions() -> dict[str, list[str]]:
    return dict(importlib.metadata.packages_distributions())


def versions_of(libraries: Iterable[str]) -> dict[str, str | None]:
    """Map the distributions of top-level modules to versions; a missing one keeps its module's name (version None)."""
    names = {name for library in libraries for name in distributions().get(library, [library])}
    return {name: version_of(name) for name in sorted(names)}


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def digest(path: Path) -> str:
    return hashlib.sha256(bare_code(path).encode()).hexdigest()[:16]


def bare_code(file: Path) -> str:
    """Return the source of a Python file without docstrings, comments and blank lines.

    A hash of it stays the same when only words change, and does not depend on the version of Python.
    """
    return _bare(file.read_text(encoding="utf-8"))


@cache
def _bare(source: str) -> str:
    lines, dropped = source.splitlines(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            words = node.body[0]
            if not lines[words.lineno - 1][: words.col_offset].strip():  # not behind `def f():` on one line
                dropped.update(range(words.lineno, words.end_lineno + 1))
    for kind, _, (row, column), _, _ in tokenize.generate_tokens(io.StringIO(source).readline):
        if kind == tokenize.COMMENT:
            lines[row - 1] = lines[row - 1][:column].rstrip()
        if kind in (tokenize.COMMENT, tokenize.NL) and not lines[row - 1].strip():
            dropped.add(row)
    return "\n".join(line for row, line in enumerate(lines, 1) if row not in dropped)
