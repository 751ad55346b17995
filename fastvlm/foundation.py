"""What a computation depends on: the source of all modules it can reach by imports, and the versions of libraries.

Imports are read from the source text, not executed, so that those inside functions count, too.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.machinery
import importlib.metadata
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

# They carry bytes that are hashed themselves, start processes or check types: no value depends on their version.
CARRIERS = ("huggingface_hub", "safetensors", "jaxtyping", "deepspeed")


def rests_on(modules: Iterable[str], *, files: Iterable[str | Path] = ()) -> dict[str, dict[str, str | None]]:
    """Source and library versions that some modules depend on.

    Args:
        modules: names of modules that can be imported; what they import counts, and what that imports.
        files: single files, without what they import.

    Returns:
        `source`: module -> hash of its file, of every module that lies outside the folders of installed libraries.
        `versions`: distribution -> version, of every library one of them imports.
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
            continue  # `from module import name`: no module of its own
        source[name] = digest(path)
        parts = name.split(".")
        todo |= {".".join(parts[:i]) for i in range(1, len(parts))}  # a package's __init__ runs before its modules
        todo |= set(imports_of(path, name))
    source |= {Path(file).name: digest(Path(file)) for file in files}
    return {"source": dict(sorted(source.items())), "versions": versions_of(libraries - set(CARRIERS))}


def imports_of(path: Path, name: str) -> Iterator[str]:
    """Names that a module's text imports, anywhere in it; `from a import b` may mean the modules a and a.b."""
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
    """Whether a top-level module lies in a folder of installed libraries, or in none (built in, or missing)."""
    if top == __package__:
        return False
    spec = importlib.machinery.PathFinder.find_spec(top)
    places = [] if spec is None else [spec.origin] if spec.has_location else list(spec.submodule_search_locations or ())
    installed = {Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib")}
    return all(not installed.isdisjoint(Path(place).resolve().parents) for place in places)


def file_of(name: str) -> Path | None:
    """The file of a module outside the libraries; None where there is none of that name."""
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
    """Distribution -> version of top-level modules; a module that is not installed stands under its own name."""
    names = {name for library in libraries for name in distributions().get(library, [library])}
    return {name: version_of(name) for name in sorted(names)}


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
