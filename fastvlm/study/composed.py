"""A study's arms as study.yaml and conf/ compose them now: which results and which stand-in parts belong to them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fastvlm.config import check, composition, explain
from fastvlm.identity import hash_of, identity, portable_hash
from fastvlm.study.arms import Study, applied, cell_name, merge

SEED = 987_654_321  # placeholder: a configuration is resolved once for all seeds
NAMES = {"llm": "language model"}  # parts whose name in a sentence is not their key


class Composed:
    """One arm at one scale, composed once: seeds differ only where the configuration interpolates `seed`.

    Args:
        config: composed and checked; None if that failed.
        fault: why it failed; nothing is then known about the arm's cells.
    """

    def __init__(self, config: DictConfig | None, *, fault: str = ""):
        self.config, self.fault = config, fault
        self._whole: dict | None = None
        self._resolved: dict[int, dict] = {}

    def resolved(self, seed: int) -> dict:
        if self._whole is None:
            self.config.seed = SEED
            self._whole = OmegaConf.to_container(self.config, resolve=True, throw_on_missing=False)
        if seed not in self._resolved:
            self._resolved[seed] = with_seed(self._whole, seed)
        return self._resolved[seed]

    def hash(self, seed: int) -> str:
        """Return the `config` column of results.csv, which does not depend on where data and runs are."""
        return portable_hash(self.resolved(seed))

    def knows(self, config: str, *, seed: int) -> bool:
        """Return whether `config` is the hash of this arm's configuration, as in results.csv or as in a run here."""
        return config in (self.hash(seed), hash_of(identity(self.resolved(seed))))

    def stand_ins(self, seed: int) -> dict[str, str]:
        """Map each stand-in for a pretrained part to the hash of the stage that trains it: one with its own seed."""
        whole, found = self.resolved(seed), {}
        for stage in whole["stages"].values():
            if stage.get("seed") is None:
                continue
            seeds = {part: (whole.get("part_seeds") or {}).get(part, seed) for part in stage["parts"]}
            made = {part: whole[part] or whole["vlm"] for part in stage["parts"]}
            own = {key: value for key, value in stage.items() if key != "cache_features"}
            found |= {part: hash_of([own, made, seeds, whole["tokenizer"]]) for part in stage["parts"]}
        return found


def with_seed(node: Any, seed: int) -> Any:
    """Copy what was resolved with `SEED`, with this seed in its place, as a number or within a string."""
    if isinstance(node, dict):
        return {key: with_seed(value, seed) for key, value in node.items()}
    if isinstance(node, list):
        return [with_seed(value, seed) for value in node]
    if isinstance(node, str):
        return node.replace(str(SEED), str(seed))
    return seed if node == SEED and isinstance(node, int) else node


def composed(study: Study, *, scale: str, arm: str) -> Composed:
    """Compose an arm; returns the same object until study.yaml changes."""
    text = (study.folder / "study.yaml").read_text(encoding="utf-8")
    key = (study.name, text, scale, arm, composition.CONF)
    if key not in _COMPOSED:
        _COMPOSED[key] = _compose(study, scale=scale, arm=arm)
    return _COMPOSED[key]


_COMPOSED: dict[tuple, Composed] = {}


def _compose(study: Study, *, scale: str, arm: str) -> Composed:
    given = [f"arm={arm}", f"scale={scale}", "seed=0", f"name={cell_name(study.name, scale, arm, 0)}"]
    overrides = [f"experiment={study.name}", *merge(study.overrides(arm, scale), given), *applied(study, arm)]
    before = os.environ.get("FASTVLM_STUDIES")
    os.environ["FASTVLM_STUDIES"] = str(study.folder.parent)
    try:
        config = composition.compose("train", overrides)
        check(config, images=False)
        if config.get("vlm"):
            from fastvlm.build import settle_views

            settle_views(config)
    except Exception as error:
        if isinstance(error, ValueError):
            return Composed(None, fault=str(error).splitlines()[0])
        if type(error).__module__.startswith(("hydra", "omegaconf")):
            return Composed(None, fault=explain(error, "train"))
        raise
    finally:
        os.environ.pop("FASTVLM_STUDIES") if before is None else os.environ.update(FASTVLM_STUDIES=before)
    return Composed(config)


def told_apart(study: Study, cells: Sequence, *, scale: str) -> tuple[list, frozenset[str], list[str]]:
    """Find the cells, published or recorded earlier, that belong to another configuration than their arm has now.

    Returns:
        All cells, those of the present configuration with its hash; the arms of the others; remarks about them.
    """
    known, others, faults = [], {}, {}
    for cell in cells:
        if cell.arm not in study.arms.get(scale, {}):  # the arm is gone
            known.append(cell)
            continue
        now = composed(study, scale=scale, arm=cell.arm)
        if now.fault:
            faults[cell.arm] = now.fault
        elif now.knows(cell.about["config"], seed=cell.seed):
            cell = replace(cell, about=cell.about | {"config": now.hash(cell.seed)})
        else:
            others[cell.arm] = others.get(cell.arm, 0) + 1
        known.append(cell)
    remarks = []
    if others:
        arms = ", ".join(f"{count} of {arm}" for arm, count in others.items())
        remarks.append(
            f"{sum(others.values())} of {len(cells)} cells were run with another configuration of their arm than is "
            f"composed now ({arms}); a key that was added since counts, too"
        )
    remarks += [f"whether cells of {arm} are of its configuration is not known: {why}" for arm, why in faults.items()]
    return known, frozenset(others), remarks


def one_training(first: Iterable[Composed], second: Iterable[Composed]) -> tuple[str, ...]:
    """Return the parts whose stand-ins differ between two sides and were trained once for all seeds of an arm.

    An interval over seeds leaves out what another training would change. Empty if an arm cannot be composed.
    """
    sides = [list(first), list(second)]
    arms = [arm for side in sides for arm in side]
    if any(arm.fault for arm in arms):
        return ()
    found = []
    for part in dict.fromkeys(part for arm in arms for part in arm.stand_ins(0)):
        theirs = [{arm.stand_ins(0).get(part) for arm in side} for side in sides]
        fixed = any(part in arm.stand_ins(0) and arm.stand_ins(0)[part] == arm.stand_ins(1).get(part) for arm in arms)
        if theirs[0] != theirs[1] and fixed:
            found.append(NAMES.get(part, part))
    return tuple(found)
