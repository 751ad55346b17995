"""Report a user's mistake in one line: which file or key, and the nearest correct name."""

from __future__ import annotations

import difflib
import os
import re
import sys
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

from fastvlm.config.composition import CONF, compose


def refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def interrupted(message: str) -> NoReturn:
    print(f"\ninterrupted; {message}", file=sys.stderr)
    sys.exit(130)


def explain(error: BaseException, config_name: str) -> str:
    """Explain a composition error of Hydra or OmegaConf in one line with the nearest correct name."""
    text, cause = str(error), error.__cause__
    full = text if cause is None else f"{text}\n{cause}"
    full_key = re.search(r"full_key: (\S+)", full)
    if isinstance(error, MissingMandatoryValue) and full_key:
        return f"{full_key[1]} must be given"
    if full_key and (match := re.search(r"Interpolation key '([^']+)' not found", full)):
        lacks = f"{full_key[1]} is that of {match[1]}, which this configuration lacks"
        return f"{lacks}; set {full_key[1]}, or choose an option that has {match[1]}"
    if "Config group override must be a string or a list" in full:
        return "a configuration group takes a file's name, not null or a mapping; ~task leaves out the group task"
    if match := re.search(r"Could not find '([^']+)'", full):
        return no_option(match[1], config_name)
    if match := re.match(r"Ambiguous value for argument '([^']+)'", text):
        key, _, value = match[1].partition("=")
        whole = f"'{key}=\"{value}\"'"
        return f"{match[1]}: several values are a sweep, add -m; a list is written [a,b], one value with commas {whole}"
    if (override := getattr(error, "override", None)) is not None:  # Hydra's parser could not read it
        override = str(override).removeprefix("++")  # which is ours, not typed
        key, _, value = override.partition("=")
        quoted = f"; a value with other signs is quoted inside the word: '{key}=\"{value}\"'" if value else ""
        return f"{override} is not key=value{quoted}"
    if match := re.search(r"Could not override '([^']+)'", full):
        return f"unknown key {match[1]}{nearest(match[1].split('@')[0], config_name)}"
    if match := re.search(r"In '([^']+)':.*?(?:Key '([^']+)'|full_key: (\S+))", full, re.S):
        name = full_key[1] if full_key else match[2]
        reason = re.search(r"(Value '.*|Key '.*)", full)
        said = reason[1] if reason else "unknown key"
        return f"conf/{match[1]}.yaml: {said} at {name}{nearest(name, config_name)}"
    reason = text.splitlines()[0] if text else type(error).__name__
    detail = str(cause).splitlines()[0] if cause is not None and str(cause) else ""
    words = [reason, f"({detail})" if detail and detail not in reason else "", f"at {full_key[1]}" if full_key else ""]
    return " ".join(filter(None, words))


def no_option(path: str, config_name: str) -> str:
    """Say that a group has no such option, with the nearest one and all of them."""
    group, _, choice = path.rpartition("/")
    folder = CONF / group
    options = sorted(p.stem for p in folder.glob("*.yaml")) if folder.is_dir() else []
    if group == "experiment":
        from fastvlm.study.arms import STUDIES

        options = sorted(p.parent.name for p in STUDIES.glob("*/study.yaml"))
    near = difflib.get_close_matches(choice, options, 1, 0.3)
    hint = f"; did you mean {group}={near[0]}?" if near else "."
    return f"{group or config_name}={choice} is not an option{hint} Options: {', '.join(options) or 'none'}"


def nearest(key: str, config_name: str) -> str:
    """Return what follows "unknown key ...": the key or group that was meant, or where all keys are listed."""
    try:
        chosen = [o for o in sys.argv[1:] if o.startswith("pipeline=")]  # which decides the keys of `stages`
        plain = OmegaConf.to_container(compose(config_name, chosen), resolve=False)
    except Exception:  # noqa: BLE001  the configuration itself is broken: no hint to give
        return ""
    key = key.lstrip("+~")
    groups = [p.name for p in CONF.iterdir() if p.is_dir() and p.name != key]
    if stages := plain.get("stages"):
        first, own = next(iter(stages)), f": every stage has its own ({', '.join(stages)}); write "
        if key in ("mixture", "optimizer"):
            return f"{own}{key}@stages.{first}.{key}=<name>"
        if key in stages[first]:
            return f"{own}stages.{first}.{key}=<value>"
        if key in ("lr", "learning_rate"):
            return f"{own}stages.{first}.trainable.<part>=<rate>"
    around, _, last = key.rpartition(".")
    if around and OmegaConf.select(OmegaConf.create(plain), around, default=0) is None:
        return f": {around} is null; give it whole, {around}='{{{last}: <value>, ...}}'"
    near = difflib.get_close_matches(key, list(dotted(plain)), 1, 0.6) or difflib.get_close_matches(key, groups, 1, 0.6)
    return f"; did you mean {near[0]}?" if near else f"; see `python {config_name}.py --cfg job` for every key"


def dotted(node: Any, prefix: str = "") -> Iterator[str]:
    """Yield every key of nested dictionaries, written with dots."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{prefix}{key}"
            yield from dotted(value, f"{prefix}{key}.")


def loader_died(error: BaseException) -> bool:
    """Return whether a DataLoader process was killed: torch says so, or the data it was sending ends in the middle."""
    if isinstance(error, RuntimeError):
        return re.match(r"DataLoader worker \(pid.* (killed|exited)", str(error)) is not None
    frames = [frame.filename.replace(os.sep, "/") for frame in traceback.extract_tb(error.__traceback__)]
    in_loader = any(name.endswith("torch/utils/data/dataloader.py") for name in frames)
    handing = any("/multiprocessing/" in name for name in frames)
    return in_loader and handing and isinstance(error, (EOFError, ConnectionError, FileNotFoundError))
