"""A YAML file that somebody wrote, as plain values; what is wrong in it is one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


def read_yaml(file: Path) -> Any:
    """What a file holds, interpolations as they stand.

    Raises:
        ValueError: it is no YAML, with file, line and what is wrong there.
    """
    try:
        return OmegaConf.to_container(OmegaConf.create(file.read_text(encoding="utf-8")), resolve=False)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{file}{line}: {first_line(error.problem or error.context or 'no YAML')}") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: {first_line(str(error))}") from None


def mapping(node: dict[str, Any], key: str, *, file: Path, prefix: str = "") -> dict[str, Any]:
    """What stands below a key, which is there.

    Raises:
        ValueError: no keys of its own.
    """
    if not isinstance(node[key], dict):
        raise ValueError(f"{file}: {prefix}{key}={node[key]} must hold keys of its own")
    return node[key]


def only(node: dict[str, Any], keys: Sequence[str], *, file: Path, prefix: str) -> None:
    """Raises:
    ValueError: a key that is none of these.
    """
    for key in node:
        if key not in keys:
            raise ValueError(f"{file}: {prefix}{key} is none of {', '.join(prefix + one for one in keys)}")


def first_line(text: str) -> str:
    return text.splitlines()[0] if text else ""
