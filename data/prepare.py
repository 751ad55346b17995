"""Make the shards of a data set: run its recipe once, whole or not at all.

    python data/prepare.py source=embedded            # about half a minute on two cores, no download
    python data/prepare.py --help                      # every recipe and its keys

A recipe is a module `data/recipes/<source>.py` (or package) with `prepare(path, *, ...) -> dict`; its keyword arguments
are the keys of the command line. It writes into a temporary folder that takes the final name when it is complete. A
folder that is already complete for the same recipe is left alone; of two runs at once the second waits for the first.
"""

from __future__ import annotations

import os
import sys

# As a script this folder comes first on the path, and inspect.py here would hide the standard library's.
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [
    os.path.dirname(HERE),
    *(p for p in sys.path if os.path.abspath(p or ".") not in (HERE, os.path.dirname(HERE))),
]

import contextlib  # noqa: E402
import difflib  # noqa: E402
import importlib  # noqa: E402
import inspect  # noqa: E402
import json  # noqa: E402
import pkgutil  # noqa: E402
import shutil  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

ROOT = Path(HERE).parent


def list_recipes() -> list[str]:
    """Names of the modules of `data/recipes`."""
    return sorted(m.name for m in pkgutil.iter_modules([str(ROOT / "data" / "recipes")]))


def suggest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"


def load_recipe(source: str):
    """Import a recipe.

    Raises:
        ValueError: no recipe of that name.
    """
    if source not in list_recipes():
        raise ValueError(f"source={source} is not a recipe{suggest(source, list_recipes())}")
    return importlib.import_module(f"data.recipes.{source}")


def parse_arguments(recipe, given: dict[str, str]) -> dict:
    """Turn `key=value` into the recipe's keyword arguments, by the type of each default.

    Raises:
        ValueError: an unknown key, a missing one, or a value of another type.
    """
    keys = {n: p for n, p in inspect.signature(recipe.prepare).parameters.items() if p.kind is p.KEYWORD_ONLY}
    values = {}
    for key, text in given.items():
        if key not in keys:
            raise ValueError(f"{key}={text}: this recipe has no key {key}{suggest(key, ['source', 'out', *keys])}")
        default = keys[key].default
        kind = type(default) if default not in (None, inspect.Parameter.empty) else str
        try:
            values[key] = text.lower() in ("1", "true", "yes") if kind is bool else kind(text)
        except ValueError:
            raise ValueError(f"{key}={text} is not of type {kind.__name__}; the default is {default}") from None
    missing = [n for n, p in keys.items() if p.default is inspect.Parameter.empty and n not in values]
    if missing:
        raise ValueError(f"{missing[0]}=... is missing: {recipe.__name__} needs it")
    return values


@contextlib.contextmanager
def locked(path: Path):
    """Hold the lock file beside `path`; a killed process lets it go."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    while True:
        with open(lock, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever held it may have removed it while we waited; then ours is a file nobody else sees.
            if not (lock.exists() and os.path.samestat(lock.stat(), os.fstat(file.fileno()))):
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def read_done(path: Path) -> dict:
    """DONE.json of a complete folder, or nothing."""
    try:
        return json.loads((path / "DONE.json").read_text())
    except (OSError, ValueError):
        return {}


def prepare(source: str, *, out: str | Path | None = None, **arguments) -> dict:
    """Build a data set unless it is there already.

    Args:
        source: name of a recipe.
        out: the folder; unless told, the recipe's own name in $FASTVLM_DATA or, without that, beside this file.
        arguments: the recipe's keyword arguments.

    Returns:
        What DONE.json holds: recipe, hash, seconds, and what the recipe reports; `skipped` when it was there.
    """
    recipe = load_recipe(source)
    folder = Path(os.environ.get("FASTVLM_DATA") or Path(__file__).resolve().parent)
    path = Path(out or folder / getattr(recipe, "DEFAULT_PATH", f"shards/{source}")).absolute()
    known = inspect.signature(recipe.recipe_hash).parameters if hasattr(recipe, "recipe_hash") else {}
    wanted = recipe.recipe_hash(**{k: v for k, v in arguments.items() if k in known}) if known else ""
    with locked(path):
        done = read_done(path)
        if done and done.get("hash") == wanted:
            return done | {"path": str(path), "skipped": True}
        if path.exists() and not done and any(path.iterdir()):
            raise ValueError(f"out={path} holds other files and no DONE.json; name an empty folder or move them away")
        started = time.time()
        for left in path.parent.glob(f".{path.name}.*.tmp"):  # of runs that were killed: the lock is ours
            shutil.rmtree(left)
        part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        part.mkdir(parents=True)
        try:
            report = recipe.prepare(part, **arguments)
            done = {"source": source, "hash": wanted, "seconds": round(time.time() - started, 1), **report}
            (part / "DONE.json").write_text(json.dumps(done, indent=1) + "\n")
            if path.exists():
                old = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
                os.rename(path, old)
                os.rename(part, path)
                shutil.rmtree(old)
            else:
                os.rename(part, path)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return done | {"path": str(path), "skipped": False}


def describe_recipes() -> str:
    lines = [__doc__.strip(), "", "Recipes and their keys (every one also takes out=..., the folder):"]
    for name in list_recipes():
        recipe = load_recipe(name)
        keys = inspect.signature(recipe.prepare).parameters.values()
        shown = [
            k.name + ("=..." if k.default is k.empty else f"={k.default}") for k in keys if k.kind is k.KEYWORD_ONLY
        ]
        lines.append(f"  source={name}  {' '.join(shown)}")
        lines.append(f"      {(recipe.__doc__ or '').strip().splitlines()[0]}")
    return "\n".join(lines)


def main(words: list[str]) -> int:
    if not words or any(w in ("-h", "--help", "help") for w in words):
        print(describe_recipes())
        return 0
    try:
        bad = [w for w in words if "=" not in w]
        if bad:
            raise ValueError(f"{bad[0]!r} is not key=value; for example `python data/prepare.py source=embedded`")
        given = dict(w.split("=", 1) for w in words)
        if "source" not in given:
            raise ValueError(f"source=... is missing{suggest('', list_recipes())}")
        source, out = given.pop("source"), given.pop("out", None)
        done = prepare(source, out=out, **parse_arguments(load_recipe(source), given))
    except ValueError as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2
    total = sum(n for splits in done.get("counts", {}).values() for n in splits.values())
    state = "is complete already" if done["skipped"] else f"built in {done['seconds']} s"
    print(f"{done['path']}: {state}, {total} records")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
