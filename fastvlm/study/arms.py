"""A study's arms: named lists of command-line overrides, for each scale. Light: every command of a sweep imports it."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm.study.yaml_file import mapping, only, read_yaml

ROOT = Path(__file__).resolve().parents[2]
STUDIES = Path(os.environ.get("FASTVLM_STUDIES", ROOT / "experiments"))
SCALES = ("micro", "paper")


@dataclass(frozen=True)
class Study:
    """experiments/<name>/study.yaml.

    Args:
        question: the comment it opens with.
        arms: scale -> arm -> overrides, those of `all` included.
        grid: hydra.sweeper.params.
    """

    name: str
    folder: Path
    question: str
    arms: dict[str, dict[str, list[str]]]
    grid: dict[str, str]

    def overrides(self, arm: str, scale: str) -> list[str]:
        """Raises:
        ValueError: no such scale or arm, with the ones there are.
        """
        if scale not in self.arms:
            raise ValueError(f"scale={scale}: experiment={self.name} has {', '.join(self.arms)}")
        if arm not in self.arms[scale]:
            have = list(self.arms[scale])
            near = difflib.get_close_matches(arm, have, 1)
            hint = f"; did you mean arm={near[0]}?" if near else ""
            hint = "; several are a sweep, add -m" if "," in arm else hint
            raise ValueError(
                f"arm={arm}: experiment={self.name} has no such arm at scale={scale}, only {', '.join(have)}{hint}"
            )
        return self.arms[scale][arm]

    def elsewhere(self, arm: str, scale: str) -> bool:
        """Whether another scale has this arm and this one has not."""
        return arm not in self.arms.get(scale, {}) and any(arm in arms for arms in self.arms.values())


def study_names(root: Path = STUDIES) -> list[str]:
    """All experiments whose file has arms, in alphabetical order; files that cannot be read are left out."""
    return [name for name, found in experiments(root).items() if found is True]


def unreadable(root: Path = STUDIES) -> list[str]:
    """What is wrong, a line each, with the files of experiments that cannot be read."""
    return [found for found in experiments(root).values() if isinstance(found, str)]


def experiments(root: Path) -> dict[str, bool | str]:
    """Name -> whether the experiment is a study, or what is wrong with its file."""
    found: dict[str, bool | str] = {}
    for file in sorted(root.glob("*/study.yaml")):
        try:
            found[file.parent.name] = has_arms(file)
        except ValueError as error:
            found[file.parent.name] = str(error)
    return found


def has_arms(file: Path) -> bool:
    """Raises:
    ValueError: the file is no YAML mapping.
    """
    plain = read_yaml(file)
    if not isinstance(plain, dict):
        raise ValueError(f"{file} holds no keys; a study begins with `study:`")
    return plain.get("study") is not None


def load_study(name: str, *, root: Path = STUDIES) -> Study:
    """Read a study.

    Raises:
        ValueError: no such study; a key that is none, a scale without arms, an arm that is no list of overrides.
    """
    file = root / name / "study.yaml"
    if not is_study(name, root=root):
        have = study_names(root)
        near = difflib.get_close_matches(name, have, 1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(f"{name} is no study{hint} Studies: {', '.join(have)}")
    plain = read_yaml(file)
    of_study = mapping(plain, "study", file=file)
    if of_study.get("name") != name:
        raise ValueError(f"{file}: study.name={of_study.get('name')} must be {name}, as its folder is called")
    only(of_study, ("name", *SCALES), file=file, prefix="study.")
    arms: dict[str, dict[str, list[str]]] = {}
    for scale in SCALES:
        if of_study.get(scale) is None:
            continue
        at_scale = mapping(of_study, scale, file=file, prefix="study.")
        if not at_scale.get("arms"):
            raise ValueError(f"{file}: study.{scale}.arms names no arm")
        only(at_scale, ("all", "arms"), file=file, prefix=f"study.{scale}.")
        own = mapping(at_scale, "arms", file=file, prefix=f"study.{scale}.")
        shared = overrides_of(at_scale.get("all"), key=f"study.{scale}.all", file=file)
        arms[scale] = {
            str(arm): merge(shared, overrides_of(given, key=f"study.{scale}.arms.{arm}", file=file))
            for arm, given in own.items()
        }
    if not arms:
        raise ValueError(f"{file}: study has neither {' nor '.join(SCALES)}, each with its arms")
    text = file.read_text(encoding="utf-8")
    comment = [line[1:].strip() for line in text.splitlines() if line.startswith("#") and "@package" not in line]
    question = comment[0] if comment else ""
    return Study(name, file.parent, question, arms, read_grid(plain, file=file))


def read_grid(plain: dict[str, Any], *, file: Path) -> dict[str, str]:
    node, prefix = plain, ""
    for key in ("hydra", "sweeper", "params"):
        if node.get(key) is None:
            return {}
        node, prefix = mapping(node, key, file=file, prefix=prefix), f"{prefix}{key}."
    for key, value in node.items():
        if isinstance(value, list | dict):
            raise ValueError(f"{file}: {prefix}{key}={value} is no sweep; write the values with commas, {key}: a,b")
    return {str(key): str(value) for key, value in node.items()}


def overrides_of(given: Any, *, key: str, file: Path) -> list[str]:
    """A list of overrides; nothing is none."""
    if given is None:
        return []
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        raise ValueError(f"{file}: {key}={given} must be a list of overrides, such as [resampler.num_tokens=4]")
    return list(given)


def is_study(name: str, *, root: Path = STUDIES) -> bool:
    """Raises:
    ValueError: its file is no YAML mapping.
    """
    file = root / name / "study.yaml"
    return file.is_file() and has_arms(file)


def grid_arms(study: Study) -> list[str]:
    """The arms its grid names, of whatever scale."""
    return [arm.strip() for arm in study.grid.get("arm", "").split(",") if arm.strip()]


def key_of(override: str) -> str:
    """What an override sets: `a.b` of `++a.b=1`, `stages.align.mixture` of `mixture@stages.align.mixture=x`."""
    return override.split("=", 1)[0].lstrip("+~").split("@")[-1]


def merge(first: list[str], then: list[str]) -> list[str]:
    """Overrides in order; a later one replaces an earlier one of the same key."""
    keys = {key_of(o) for o in then}
    return [o for o in first if key_of(o) not in keys] + then


def value_of(arguments: list[str], key: str) -> str | None:
    given = [a.split("=", 1)[1] for a in arguments if re.match(rf"\+*{key}=", a)]
    return given[-1] if given else None


def expand(arguments: list[str]) -> list[str]:
    """`experiment=<study> arm=<arm> [scale=...] [seed=...]` with the arm's overrides written out; all else unchanged.

    What stands on the command line itself wins over the arm. A sweep (-m) is left to its cells, each of which comes
    here; it gets those arms of the grid that its scale has. The run gets the name of its cell, so that it is found
    again.

    Raises:
        ValueError: an arm or a scale of no study; no such study, arm or scale.
    """
    if any(a.lstrip("+").startswith("study.applied=") for a in arguments):
        return arguments
    study_name, arm = value_of(arguments, "experiment"), value_of(arguments, "arm")
    of_study = [f"{key}={value}" for key in ("arm", "scale") if (value := value_of(arguments, key)) is not None]
    if study_name is None:
        if of_study:
            raise ValueError(
                f"{of_study[0]} is one of a study's: add experiment=<study>, one of {', '.join(study_names())}"
            )
        return arguments
    known = is_study(study_name)  # here a file that is no YAML is one line; Hydra would end in a traceback
    if of_study and not known and "," not in study_name:
        load_study(study_name)  # says that it is none, with the nearest
    if {"-m", "--multirun"} & set(arguments):
        return with_arms_of_scale(arguments, study_name) if known else arguments
    if arm is None:
        return arguments
    study = load_study(study_name)
    scale, seed = value_of(arguments, "scale") or "micro", value_of(arguments, "seed") or "0"
    own = study.overrides(arm, scale)
    options, given = split_options(arguments)
    extra = sorted(a for a in given if not is_silent(a))
    named = [] if value_of(given, "name") else [f"name={cell_name(study_name, scale, arm, seed, extra)}"]
    head = [a for a in given if key_of(a) == "experiment"]
    rest = [a for a in given if key_of(a) != "experiment"]
    return [*options, *head, *merge(own, rest), *named, *applied(study, arm)]


def applied(study: Study, arm: str) -> list[str]:
    """Notes the arm in the configuration and takes all arms out of it: what they interpolate may not be there."""
    return [f"++study.applied={arm}", *(f"~study.{scale}" for scale in study.arms)]


def with_arms_of_scale(arguments: list[str], name: str) -> list[str]:
    """The command of a study's grid, with `arm=` where the grid names arms that only another scale has. An arm that
    none has stays in, to be refused; arms on the command line are the user's own."""
    given = {key_of(argument) for argument in arguments}
    if {"arm", "hydra.sweeper.params.arm"} & given:
        return arguments
    study, scale = load_study(name), value_of(arguments, "scale") or "micro"
    named = grid_arms(study)
    here = [arm for arm in named if not study.elsewhere(arm, scale)]
    return arguments if here == named or not here else [*arguments, f"arm={','.join(here)}"]


# What a cell may differ in and still be the same cell: what names it, and what only tells where and how it runs.
SILENT = ("experiment", "arm", "scale", "seed", "hardware", "logger", "overwrite", "name", "dry_run", "num_samples")
SILENT += ("speed_images", "log_every", "checkpoint_every", "paths", "hydra", "objective")


def is_silent(override: str) -> bool:
    return key_of(override).split(".")[0].split("/")[0] in SILENT


def cell_name(study: str, scale: str, arm: str, seed: str | int, extra: list[str] = ()) -> str:
    """Name, and folder below runs/, of a cell; what was changed beside the arm is part of it."""
    # No character that Hydra's grammar would read: the name is handed on as an override.
    tail = "".join(f"-{re.sub(r'[^A-Za-z0-9_.]+', '_', o.lstrip('+'))}" for o in extra)
    return f"studies/{study}/{scale}/{arm}-seed{seed}{tail}"


def split_options(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(options with the values that follow them, such as `--cfg job`; overrides)."""
    options, overrides, rest = [], [], iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        options.append(argument)
        if argument in ("--cfg", "-c", "--package", "-p", "--info", "-i", "--config-dir", "-cd"):
            options += [value for value in [next(rest, None)] if value is not None]
    return options, overrides
