"""A study's arms: named lists of command-line overrides, per scale. Imports little: every command imports it."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvlm.identity import hash_of
from fastvlm.study.yaml_file import mapping, only, read_yaml

ROOT = Path(__file__).resolve().parents[2]
STUDIES = Path(os.environ.get("FASTVLM_STUDIES", ROOT / "experiments"))
SCALES = ("micro", "paper")


@dataclass(frozen=True)
class Study:
    """The content of experiments/<name>/study.yaml.

    Args:
        question: the file's first comment other than `@package`.
        arms: scale -> arm -> overrides, including those of `all`.
        grid: hydra.sweeper.params: key -> values.
    """

    name: str
    folder: Path
    question: str
    arms: dict[str, dict[str, list[str]]]
    grid: dict[str, str]

    def overrides(self, arm: str, scale: str) -> list[str]:
        """Return the overrides of an arm.

        Raises:
            ValueError: no such scale or arm; lists the ones that exist.
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
        """Return whether another scale has this arm and this one does not."""
        return arm not in self.arms.get(scale, {}) and any(arm in arms for arms in self.arms.values())


def study_names(root: Path = STUDIES) -> list[str]:
    """Return all experiments whose file has arms, in alphabetical order; files that cannot be read are skipped."""
    return [name for name, found in experiments(root).items() if found is True]


def unreadable(root: Path = STUDIES) -> list[str]:
    """Return one line per experiment file that cannot be read, saying what is wrong with it."""
    return [found for found in experiments(root).values() if isinstance(found, str)]


def experiments(root: Path) -> dict[str, bool | str]:
    """Map each experiment's name to whether it is a study, or to what is wrong with its file."""
    found: dict[str, bool | str] = {}
    for file in sorted(root.glob("*/study.yaml")):
        try:
            found[file.parent.name] = has_arms(file)
        except ValueError as error:
            found[file.parent.name] = str(error)
    return found


def has_arms(file: Path) -> bool:
    """Return whether an experiment's file has arms.

    Raises:
        ValueError: the file is not a YAML mapping.
    """
    plain = read_yaml(file)
    if not isinstance(plain, dict):
        raise ValueError(f"{file} holds no keys; a study begins with `study:`")
    return plain.get("study") is not None


def load_study(name: str, *, root: Path = STUDIES) -> Study:
    """Read a study.

    Raises:
        ValueError: no such study; an unknown key, a scale without arms, an arm that is not a list of overrides.
    """
    file = root / name / "study.yaml"
    if not is_study(name, root=root):
        have = study_names(root)
        near = difflib.get_close_matches(name, have, 1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(f"{name} is not a study{hint} Studies: {', '.join(have)}")
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
            raise ValueError(f"{file}: {prefix}{key}={value} is not a sweep; write the values with commas, {key}: a,b")
    return {str(key): str(value) for key, value in node.items()}


def overrides_of(given: Any, *, key: str, file: Path) -> list[str]:
    """Check and return a list of overrides; None gives an empty list."""
    if given is None:
        return []
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        raise ValueError(f"{file}: {key}={given} must be a list of overrides, such as [resampler.num_tokens=4]")
    return list(given)


def is_study(name: str, *, root: Path = STUDIES) -> bool:
    """Return whether this experiment exists and has arms.

    Raises:
        ValueError: its file is not a YAML mapping.
    """
    file = root / name / "study.yaml"
    return file.is_file() and has_arms(file)


def grid_arms(study: Study) -> list[str]:
    """Return the arms that the grid names, of any scale."""
    return swept(study.grid.get("arm", ""))


def swept(text: str) -> list[str]:
    """Return the values of a sweep written as `a,b` or, the same to Hydra, as `choice(a,b)`."""
    choice = re.fullmatch(r"choice\((.*)\)", text.strip())
    return [value.strip() for value in (choice[1] if choice else text).split(",") if value.strip()]


def key_of(override: str) -> str:
    """Return the key that is set: `a.b` of `++a.b=1`, `stages.align.mixture` of `mixture@stages.align.mixture=x`."""
    return override.split("=", 1)[0].lstrip("+~").split("@")[-1]


def merge(first: list[str], then: list[str]) -> list[str]:
    """Concatenate two lists of overrides; those in `then` replace those in `first` with the same key."""
    keys = {key_of(o) for o in then}
    return [o for o in first if key_of(o) not in keys] + then


def value_of(arguments: list[str], key: str) -> str | None:
    given = [a.split("=", 1)[1] for a in arguments if re.match(rf"\+*{key}=", a)]
    return given[-1] if given else None


def expand(arguments: list[str]) -> list[str]:
    """Replace `arm=<arm>` of a study by the arm's overrides; return other command lines unchanged.

    Overrides on the command line take precedence over the arm's. A sweep (-m) is not expanded, since each of its cells
    calls this function; its arms are limited to those of the grid that its scale has. The run is named after its cell,
    so that it is found again.

    Raises:
        ValueError: an arm or a scale without a study; no such study, arm or scale.
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
    known = is_study(study_name)  # invalid YAML is a one-line error here; Hydra would print a traceback
    if of_study and not known and "," not in study_name:
        load_study(study_name)  # raises, naming the nearest study
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
    """Return overrides that record the arm and remove all arms, whose interpolations may not resolve."""
    return [f"++study.applied={arm}", *(f"~study.{scale}" for scale in study.arms)]


def with_arms_of_scale(arguments: list[str], name: str) -> list[str]:
    """Add `arm=<arms of this scale>` to a sweep's command if the grid names arms that only another scale has.

    An arm that no scale has is kept, to be refused later. Arms given on the command line are left as they are.
    """
    given = {key_of(argument) for argument in arguments}
    if {"arm", "hydra.sweeper.params.arm"} & given:
        return arguments
    study, scale = load_study(name), value_of(arguments, "scale") or "micro"
    named = grid_arms(study)
    here = [arm for arm in named if not study.elsewhere(arm, scale)]
    return arguments if here == named or not here else [*arguments, f"arm={','.join(here)}"]


# Keys that do not make another cell: those that name it, and those that say where and how it runs.
SILENT = ("experiment", "arm", "scale", "seed", "hardware", "logger", "overwrite", "name", "dry_run", "num_samples")
SILENT += ("speed_images", "log_every", "checkpoint_every", "paths", "hydra", "objective", "data")


def is_silent(override: str) -> bool:
    key = key_of(override)
    return key.split(".")[0].split("/")[0] in SILENT and key not in ("hardware.precision", "hardware.quantise")


def cell_name(study: str, scale: str, arm: str, seed: str | int, extra: list[str] = ()) -> str:
    """Return a cell's name, which is its folder below runs/; `extra` are overrides besides the arm's."""
    # The name is passed on as an override, so it must not contain characters of Hydra's grammar.
    tail = "".join(f"-{re.sub(r'[^A-Za-z0-9_.-]+', '_', o.lstrip('+'))}" for o in extra)
    if len(tail) > 120:  # a folder's name has at most 255 bytes
        tail = f"{tail[:110]}-{hash_of(list(extra))[:8]}"
    return f"studies/{study}/{scale}/{arm}-seed{seed}{tail}"


def split_options(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split arguments into (options with the values that follow them, such as `--cfg job`; overrides)."""
    options, overrides, rest = [], [], iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        options.append(argument)
        if argument in ("--cfg", "-c", "--package", "-p", "--info", "-i", "--config-dir", "-cd"):
            options += [value for value in [next(rest, None)] if value is not None]
    return options, overrides
