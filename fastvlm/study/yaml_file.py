"""Read hand-written YAML files as plain values; a mistake in one is a one-line error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


def read_yaml(file: Path) -> Any:
    """Return a file's content with interpolations unresolved.

    Raises:
        ValueError: not valid YAML; names file, line and problem.
    """
    try:
        return OmegaConf.to_container(OmegaConf.create(file.read_text(encoding="utf-8")), resolve=False)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{file}{line}: {first_line(error.problem or error.context or 'no YAML')}") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: {first_line(str(error))}") from None


def mapping(node: dict[str, Any], key: str, *, file: Path, prefix: str = "") -> dict[str, Any]:
    """Return the mapping at a key, which must exist.

    Raises:
        ValueError: the value is not a mapping.
    """
    if not isinstance(node[key], dict):
        raise ValueError(f"{file}: {prefix}{key}={node[key]} must hold keys of its own")
    return node[key]


def only(node: dict[str, Any], keys: Sequence[str], *, file: Path, prefix: str) -> None:
    """Check that a mapping has no other keys than these.

    Raises:
        ValueError: it has one.
    """
    for key in node:
        if key not in keys:
            raise ValueError(f"{file}: {prefix}{key} is not one of {', '.join(prefix + one for one in keys)}")


def first_line(text: str) -> str:
    return text.splitlines()[0] if text else ""
