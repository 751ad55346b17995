"""Build the shards of a data set by running its recipe.

    python data/prepare.py source=embedded            # 18 s on two idle cores, no download
    python data/prepare.py source=llava_instruct path=llava/llava_v1_5_mix665k.json images=llava/images workers=8
    python data/prepare.py --help                      # every recipe and its keys

A recipe is a module `data/recipes/<source>.py` (or a package); its keyword arguments are the keys of the command line.
It writes to a temporary folder, which is renamed to the final name once it is complete. A folder that the same command
has already completed is left alone; if its input has changed since, this is reported. If two runs write the same
folder, the second waits for the first. A recipe with `parts` and `convert` (data/recipes/record.py) runs in a pool of
processes, and the same command continues a killed run where it stopped. Such recipes take

    path=...        the data set: a file, a folder, a hub id, or hf://datasets/org/name/file.json
    out=...         the folder to write (default: $FASTVLM_DATA/shards/<source>)
    splits=...      train,val,test (default: all splits of the data set)
    val=0.01        hold out this share of train, chosen by a hash of an image, if the data set has no val split
    workers=2       number of processes; affects only the time
    tokenizer=...   folder or hub id of the index's tokenizer (default: the embedded one), template=chatml, and
                    image_token=own or another, as in conf/tokenizer/
    rewrite=true    rebuild a complete folder, or replace another command's; it stays until the new one is complete
"""

from __future__ import annotations

import os
import sys

# Run as a script, this folder comes first on sys.path, and its inspect.py would shadow the standard library's.
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [
    os.path.dirname(HERE),
    *(p for p in sys.path if os.path.abspath(p or ".") not in (HERE, os.path.dirname(HERE))),
]

import contextlib  # noqa: E402
import difflib  # noqa: E402
import hashlib  # noqa: E402
import importlib  # noqa: E402
import inspect  # noqa: E402
import json  # noqa: E402
import pkgutil  # noqa: E402
import re  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import time  # noqa: E402
from concurrent.futures.process import BrokenProcessPool  # noqa: E402
from pathlib import Path  # noqa: E402

ROOT = Path(HERE).parent


def list_recipes() -> list[str]:
    """Return the names of the modules of `data/recipes` that are recipes: those with `prepare` or `SPLITS`."""
    names = sorted(m.name for m in pkgutil.iter_modules([str(ROOT / "data" / "recipes")]))
    modules = {name: importlib.import_module(f"data.recipes.{name}") for name in names}
    return [name for name, module in modules.items() if hasattr(module, "prepare") or hasattr(module, "SPLITS")]


def suggest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"


def load_recipe(source: str):
    """Import a recipe.

    Raises:
        ValueError: there is no recipe of that name.
    """
    if source not in list_recipes():
        raise ValueError(f"source={source} is not a recipe{suggest(source, list_recipes())}")
    return importlib.import_module(f"data.recipes.{source}")


def list_keys(recipe) -> dict[str, inspect.Parameter]:
    """Return the command-line keys of a recipe, except source and out."""
    if hasattr(recipe, "prepare"):
        parameters = inspect.signature(recipe.prepare).parameters
        return {n: p for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    parameters = inspect.signature(recipe.parts).parameters
    own = {n: p for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY and n != "split"}
    common = inspect.signature(prepare_parts).parameters
    held_out = "val" in recipe.SPLITS
    return {"path": common["path"]} | own | {n: common[n] for n in COMMON_KEYS if not (n == "val" and held_out)}


BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def parse_arguments(recipe, given: dict[str, str]) -> dict:
    """Convert `key=value` words to the recipe's keyword arguments, by the type of each default; commas separate lists.

    Raises:
        ValueError: a key is unknown or missing, or a value has the wrong type.
    """
    keys = list_keys(recipe)
    values = {}
    for key, text in given.items():
        if key not in keys:
            raise ValueError(f"{key}={text}: this recipe has no key {key}{suggest(key, ['source', 'out', *keys])}")
        default = keys[key].default
        kind = type(default) if default not in (None, inspect.Parameter.empty) else str
        try:
            if kind is tuple:
                values[key] = tuple(word for word in text.split(",") if word)
            else:
                values[key] = BOOLEANS[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            raise ValueError(f"{key}={text} is not of type {kind.__name__}; the default is {default}") from None
    missing = [n for n, p in keys.items() if p.default is inspect.Parameter.empty and n not in values]
    if missing:
        raise ValueError(f"{missing[0]}=... is missing: source={recipe.__name__.rpartition('.')[2]} needs it")
    return values


@contextlib.contextmanager
def locked(path: Path):
    """Hold an exclusive lock on a file beside `path`; the system releases the lock of a killed process.

    Raises:
        ValueError: nothing can be written beside `path`.
    """
    import fcntl

    from data.recipes.writing import NO_SPACE

    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        raise ValueError(f"out={path}: {describe_fault(error)}; name a folder that can be written") from None
    while True:
        with open(lock, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # The previous holder may have deleted the file while we waited; then our lock protects nothing.
            if not (lock.exists() and os.path.samestat(lock.stat(), os.fstat(file.fileno()))):
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def recover(path: Path) -> None:
    """Repair a run that was killed between its two renames: old folder out of the way, new folder to `path`.

    Renames to `path` the new folder if it is complete, else the old one.
    """
    if path.exists():
        return
    own = re.compile(rf"\.{re.escape(path.name)}\.\d+(\.old)?\.tmp")
    beside = [entry for entry in path.parent.iterdir() if own.fullmatch(entry.name) and read_done(entry)]
    if any(entry.name.endswith(".old.tmp") for entry in beside):
        os.rename(min(beside, key=lambda entry: entry.name.endswith(".old.tmp")), path)


def read_done(path: Path) -> dict:
    """Return DONE.json of a complete folder, {} if there is none."""
    try:
        return json.loads((path / "DONE.json").read_text())
    except (OSError, ValueError):
        return {}


def prepare(source: str, *, out: str | Path | None = None, **arguments) -> dict:
    """Build a data set unless it already exists.

    Args:
        source: name of a recipe.
        out: output folder. Default: the recipe's DEFAULT_PATH or `shards/<source>`, in $FASTVLM_DATA or, if that is
            not set, beside this file.
        arguments: the recipe's keyword arguments.

    Returns:
        The content of DONE.json (source, hash, seconds, the recipe's report), `path`, and whether it was `skipped`.
    """
    recipe = load_recipe(source)
    path = Path(out or data_folder() / getattr(recipe, "DEFAULT_PATH", f"shards/{source}")).absolute()
    if not hasattr(recipe, "prepare"):
        return prepare_parts(recipe, path, source=source, **arguments)
    known = inspect.signature(recipe.recipe_hash).parameters if hasattr(recipe, "recipe_hash") else {}
    wanted = recipe.recipe_hash(**{k: v for k, v in arguments.items() if k in known}) if known else ""
    with locked(path):
        recover(path)
        done = read_done(path)
        if done and done.get("hash") == wanted:
            return done | {"path": str(path), "skipped": True}
        build = lambda part: {"source": source, "hash": wanted} | timed(recipe.prepare, part, **arguments)
        return publish(path, done, build) | {"path": str(path), "skipped": False}


COMMON_KEYS = ("path", "splits", "val", "workers", "tokenizer", "template", "image_token", "rewrite")


FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".tar", ".zip")


def may_be_on_hub(path: str) -> bool:
    """Return whether a path that does not exist locally can be a hub id: at most `org/name`, without a file suffix."""
    if path.startswith("hf://"):
        return True
    return not path.startswith((".", "/", "~")) and path.count("/") <= 1 and Path(path).suffix not in FILES


def prepare_parts(
    recipe,
    out: Path,
    *,
    source: str,
    path: str,
    splits: tuple = (),
    val: float = 0.0,
    workers: int = 2,
    tokenizer: str = "",
    template: str = "",
    image_token: str = "",
    rewrite: bool = False,
    **options,
) -> dict:
    """Build a data set with a recipe that has `parts` and `convert`; see `data/recipes/assembly.py`.

    Raises:
        ValueError: an argument is invalid, or the input has changed since the folder was written.
    """
    from data.recipes.inputs import find_change, hash_code

    path = os.path.expanduser(path)
    path = os.path.abspath(path) if os.path.exists(path) else path
    if not 0 <= val < 1:
        raise ValueError(f"val={val:g} must be a share of 0 or more and below 1, such as 0.01")
    if val and "val" in recipe.SPLITS:
        raise ValueError(f"val={val:g}: {source} has a val split of its own; leave val=... out")
    known = [*recipe.SPLITS, *(["val"] if val else [])]
    for split in splits:
        if split not in known:
            hint = "; hold one out with val=0.01" if split == "val" else ""
            if split in getattr(recipe, "REFUSED", {}):
                hint = f"; {recipe.REFUSED[split]}"
            raise ValueError(f"splits={','.join(splits)}: {source} has no split {split}, it has {known}{hint}")
    splits = [split for split in known if split in (splits or known)]
    keys = list_keys(recipe)
    unknown = [key for key in options if key not in keys]
    if unknown:
        raise ValueError(f"{unknown[0]}=...: {source} has no such key{suggest(unknown[0], list(keys))}")
    rows = options.pop("rows", getattr(keys.get("rows"), "default", 0))
    if "rows" in keys and rows < 1:
        raise ValueError(f"rows={rows} must be 1 or more")
    state = json.dumps([source, path, splits, val, rows, options], sort_keys=True, default=str)
    wanted = hashlib.sha256(state.encode()).hexdigest()[:16]
    work = out.with_name(f".{out.name}.work")
    image = (image_token,) if image_token else ()
    with locked(out):
        recover(out)
        done = read_done(out)
        if done and done.get("hash") == wanted and not rewrite:
            if change := find_change(path, done.get("inputs", {})):
                raise ValueError(
                    f"{out} was written before its input changed: {change}; it is left as it is, "
                    "and rewrite=true writes it again"
                )
            if done.get("code", "") not in ("", hash_code(source)):
                print(f"{out}: {source}'s code has changed since; rewrite=true writes it again", file=sys.stderr)
            shutil.rmtree(work, ignore_errors=True)
            if tokenizer and [tokenizer, template or "chatml", *image] != done["tokenizer"]:
                from data.recipes.assembly import reindex

                done["tokenizer"] = [tokenizer, template or "chatml", *image]
                reindex(out, tuple(done["tokenizer"]), workers)
                write_done(out, done)
            return done | {"path": str(out), "skipped": True}
        on_hub = path.startswith("hf://") or hasattr(recipe, "HUB_FILES") or getattr(recipe, "HUB", False)
        if not os.path.exists(path) and not (on_hub and may_be_on_hub(path)):
            hint = "name the file or the folder of the data set" + (", or its hub id (org/name)" if on_hub else "")
            if may_be_on_hub(path) and hasattr(recipe, "NOT_ON_HUB"):
                hint = f"{source} takes no hub id: {recipe.NOT_ON_HUB}"
            raise ValueError(f"path={path} does not exist; {hint}")
        if done and done.get("hash") != wanted and not rewrite:
            made = f"{done.get('source')} path={(done.get('options') or {}).get('path')}"
            raise ValueError(
                f"out={out} holds what another command made (source={made}); name another folder, or rewrite=true "
                "replaces it"
            )
        chosen = ((tokenizer, template or "chatml") if tokenizer else embedded_tokenizer(template)) + image

        def build(part: Path) -> dict:
            from data.recipes.assembly import assemble

            settings = {"source": source, "path": path, "splits": splits, "options": options, "workers": workers}
            settings |= {"tokenizer": chosen, "val": val, "rows": rows, "rewrite": rewrite}
            report = timed(assemble, recipe, part, work, **settings)
            shown = {"path": path, "splits": splits, "val": val, "rows": rows, **options}
            return {"source": source, "hash": wanted, "options": shown, "tokenizer": list(chosen)} | report

        done = publish(out, done, build)
        shutil.rmtree(work, ignore_errors=True)
        return done | {"path": str(out), "skipped": False}


def embedded_tokenizer(template: str) -> tuple[str, str]:
    """Return the folder and template of the embedded tokenizer; build it if it is missing."""
    folder = data_folder() / "embedded"
    if not (folder / "tokenizer").exists():
        prepare("embedded", out=folder)
    return str(folder / "tokenizer"), template or "roles"


def data_folder() -> Path:
    return Path(os.environ.get("FASTVLM_DATA") or Path(__file__).resolve().parent)


def timed(build, *arguments, **settings) -> dict:
    started = time.time()
    report = build(*arguments, **settings)
    return {"seconds": round(time.time() - started, 1), **report}


def write_done(path: Path, done: dict) -> None:
    part = path / f".DONE.json.{os.getpid()}"
    part.write_text(json.dumps(done, indent=1) + "\n")
    os.replace(part, path / "DONE.json")


def publish(path: Path, done: dict, build) -> dict:
    """Fill a temporary folder with `build`, then rename it to `path`.

    Args:
        done: DONE.json of the folder now at `path`, {} if there is none.
        build: fills the folder it is given and returns the content of DONE.json.

    Raises:
        ValueError: `path` is a file, or a folder with files that this command did not write.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"out={path} is a file; name a folder")
    if path.exists() and not done and any(path.iterdir()):
        raise ValueError(f"out={path} holds other files and no DONE.json; name an empty folder or move them away")
    # Leftovers of killed runs, since we hold the lock. The pattern is exact: other names may start with ours and a dot.
    own = re.compile(rf"\.{re.escape(path.name)}\.\d+(\.old)?\.tmp")
    for left in [entry for entry in path.parent.iterdir() if own.fullmatch(entry.name)]:
        shutil.rmtree(left)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    part.mkdir(parents=True)
    try:
        done = build(part)
        write_done(part, done)
        if path.exists():
            old = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
            os.rename(path, old)
            os.rename(part, path)
            shutil.rmtree(old)
        else:
            os.rename(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return done


def show_default(value) -> str:
    if value is inspect.Parameter.empty:
        return "..."
    return ",".join(value) if isinstance(value, tuple) else str(value)


def describe_recipes() -> str:
    lines = [__doc__.strip(), "", "Recipes and their own keys:"]
    for name in list_recipes():
        recipe = load_recipe(name)
        keys = [k for n, k in list_keys(recipe).items() if hasattr(recipe, "prepare") or n not in COMMON_KEYS[1:]]
        shown = [f"{k.name}={show_default(k.default)}" for k in keys]
        lines.append(f"  source={name}  {' '.join(shown)}")
        lines.append(f"      {(recipe.__doc__ or '').strip().splitlines()[0]}")
    return "\n".join(lines)


def describe_fault(error: Exception) -> str:
    """Return a fault as one line, with the file's name, and for a full disk or a killed worker what to do."""
    from data.recipes.writing import NO_SPACE

    if isinstance(error, BrokenProcessPool):
        return "a worker process was killed (out of memory?): run the same command again, with fewer workers"
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    words = os.strerror(error.errno).lower()
    if error.errno in NO_SPACE:
        what = f" {error.filename}" if error.filename else ""
        return f"{words} while writing{what}: make room and run the same command again"
    return f"{error.filename}: {words}" if error.filename else words


def main(words: list[str]) -> int:
    if not words or any(w in ("-h", "--help", "help") for w in words):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly under `| head`
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
    except (ValueError, OSError, BrokenProcessPool) as error:
        print(f"error: {describe_fault(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    total = sum(n for splits in done.get("counts", {}).values() for n in splits.values())
    state = "is complete already" if done["skipped"] else f"built in {done['seconds']} s"
    if "dropped" in done and not done["skipped"]:
        from data.recipes.assembly import format_table

        print(format_table(done))
    print(f"{done['path']}: {state}, {total} records")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
