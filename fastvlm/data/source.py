"""A source is a folder of shards; a mixture is a weighted set of sources and the unit its weights are counted in."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from fastvlm.data.augment import check_kinds
from fastvlm.data.conversation import Text, with_system, with_system_text, without_images, without_images_text
from fastvlm.data.index import list_shards, load_index, no_shards
from fastvlm.data.remote import is_remote
from fastvlm.data.source_index import KEPT_SHARDS, SourceIndex
from fastvlm.tokens import Tokenizer

UNITS = ("samples", "tokens", "answer_tokens")


class NothingLeft(ValueError):
    """No sample of a source's split is left after its types and filters and the limits of the plan."""


class Source:
    """One data set: `<path>/<split>-*.tar` with their indexes.

    Args:
        name: as shown in logs, metrics and error messages.
        path: folder of the shards or its URL (`s3://`, `gs://`, `hf://`, `https://`), a brace pattern, or a list of
            shards. In a pattern or list, a name without a split belongs to train; see `fastvlm/data/remote.py`.
        types: keep only samples of these question types (`meta.type` or one of `meta.types`); None: all.
        filters: number -> `{min, max, missing}`: keep samples whose number is within the bounds. Numbers are
            `text_tokens`, `answer_tokens`, `num_images`, `width` and `height` (minimum over the images, pixels) and
            the numbers in the records' meta, such as ratings (the lowest of a conversation) and similarity. A sample
            without the number is dropped, or kept with `missing: keep`. The plan's report counts dropped samples. If
            filters or `types` leave nothing of the val split, a warning is logged and the source takes no part in
            validation.
        max_samples: keep this many samples of the train split; None: all. They are drawn with the name as the only
            seed, so a smaller subset is part of a larger one (for studies of data size).
        repeat: how many times an epoch counts the source. It affects the length of a stage given in epochs, and the
            shares of a mixture without weights.
        max_epochs: maximum number of passes over the train split; when they are used up, the other sources continue in
            their own proportions. None: as many as the weights require.
        system: system prompt for every conversation, to name the style of its answers; None: none.
        images: False removes the images from every record, for baselines that must answer blind.
        shards: names of the folder's train shards if they are not `train-*.tar`, for data that others wrote: a pattern
            ("*.tar", which leaves out `val-00000.tar`) or a range ("{00000..00127}.tar"), of which every shard must
            exist.
        augment: kinds of augmentation (crop, jitter, mirror) that keep its answers true; the stage sets their strength.
            A crop may lose what is counted, read or located, a mirror swaps left and right.
        rebuild_index: build a missing or stale index; False: raise an error that names the command to build it.
    """

    def __init__(
        self,
        name: str,
        *,
        path: str | Path | Sequence[str],
        types: Sequence[str] | str | None = None,
        filters: Mapping[str, Mapping[str, float | int | str | None]] | None = None,
        max_samples: int | None = None,
        repeat: float | int = 1,
        max_epochs: float | int | None = None,
        system: str | None = None,
        images: bool = True,
        shards: str | None = None,
        augment: Sequence[str] = ("jitter",),
        rebuild_index: bool = True,
    ):
        if max_samples is not None and not (is_number(max_samples, Integral) and max_samples >= 1):
            raise ValueError(
                f"source {name}: max_samples={max_samples!r} must be a whole number of 1 or more, or null for all"
            )
        for key, value in (("repeat", repeat), ("max_epochs", max_epochs)):
            if value is not None and not (is_number(value) and 0 < value < float("inf")):
                raise ValueError(f"source {name}: {key}={value!r} must be a number above 0")
        if not isinstance(filters or {}, Mapping):
            raise ValueError(f"source {name}: filters={filters} must be numbers' names, each with min, max or missing")
        self.filters = {number: check_bounds(name, number, bounds) for number, bounds in (filters or {}).items()}
        self.repeat, self.max_epochs = repeat, max_epochs
        self.name, self.max_samples, self.rebuild_index = name, max_samples, rebuild_index
        self.path = as_path(path) if isinstance(path, str) and not (is_remote(path) or "{" in path) else path
        self.system, self.images, self.shards = system, images, shards
        self.augment = check_kinds(augment, key=f"source {name}: augment")
        self.types = None if types is None else (types,) if isinstance(types, str) else tuple(types)
        self.kept_shards = KEPT_SHARDS  # raised by a mixture of wider windows

    def has_split(self, split: str) -> bool:
        """Return whether the source has shards of the split."""
        return bool(list_shards(self.path, split, self.shards))

    def require(self, split: str) -> None:
        """Check that the source has shards of the split.

        Raises:
            ValueError: it has none.
        """
        if not self.has_split(split):
            raise ValueError(f"source {self.name}: {no_shards(self.path, split, self.shards)}")

    def load(self, split: str, tokenizer: Tokenizer) -> SourceIndex:
        """Load the index of a split.

        Raises:
            ValueError: see `load_index`.
        """
        index = load_index(self.path, split, tokenizer, rebuild=self.rebuild_index, names=self.shards)
        index.kept_shards = self.kept_shards
        return index

    def edit(self, record: dict) -> dict:
        """Return a record as this source gives it to the model: with its system prompt, or without its images.

        Raises:
            ValueError: a system prompt for a document.
        """
        if self.system is not None:
            record = with_system(record, self.system)
        return record if self.images else without_images(record)

    def edit_text(self, text: Text, tokenizer: Tokenizer) -> Text:
        """Apply `edit` to a tokenised record.

        Raises:
            ValueError: see `edit`.
        """
        if self.system is not None:
            text = with_system_text(text, self.system, tokenizer)
        return text if self.images else without_images_text(text)

    def select(self, index: SourceIndex, *, capped: bool = True) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return this source's rows of the index (int64, ascending), and those that filters drop, by reason.

        Args:
            capped: apply `max_samples`.

        Raises:
            NothingLeft: no sample is of one of `types`, or none has a number that `filters` names.
        """
        rows, left_out = np.arange(index.num_samples), {}
        if self.types is not None:
            kinds = index.types.to_pylist()
            wanted = set(self.types)
            rows = rows[[not wanted.isdisjoint(kind.split(",")) for kind in kinds]]
            if not len(rows):
                there = sorted({t for kind in pc.unique(index.types).to_pylist() for t in kind.split(",")})
                raise NothingLeft(
                    f"source {self.name}: no sample in {self.path}, split {index.split}, is of "
                    f"types={list(self.types)}; it has {there}"
                )
        for name, bounds in self.filters.items():
            number = index.number(name)[rows]
            missing_kept = bounds.get("missing", "drop") == "keep"
            if len(rows) and np.isnan(number).all() and not missing_kept:
                there = ", ".join(sorted(pc.unique(index.numbers.keys).to_pylist()))
                raise NothingLeft(
                    f"source {self.name}: no sample in {self.path}, split {index.split}, has the number "
                    f"filters.{name}; there are text_tokens, answer_tokens, num_images, width, "
                    f"height{', ' if there else ''}{there}"
                )
            keep = (number >= bounds.get("min", -np.inf)) & (number <= bounds.get("max", np.inf))
            keep |= np.isnan(number) & missing_kept
            left_out[f"filtered by {name}"], rows = rows[~keep], rows[keep]
        if capped and self.max_samples is not None and index.split == "train" and len(rows) > self.max_samples:
            rows = np.sort(rows[shuffled(len(rows), "subset", self.name)[: self.max_samples]])
        return rows, left_out


def is_number(value: object, kind: type = Real) -> bool:
    """Return whether `value` is a number of this kind; booleans are not."""
    return isinstance(value, kind) and not isinstance(value, bool)


def as_fraction(weight: float | int) -> Fraction:
    """Return a positive weight as a fraction of denominator at most 10^9, or exactly where that would be 0."""
    exact = Fraction(str(weight))
    return exact.limit_denominator(10**9) or exact


def check_bounds(name: str, number: str, bounds: object) -> dict:
    """Return the bounds of a filter without those that are null.

    Raises:
        ValueError: an unknown key or `missing`, a bound that is not a number, or `min` above `max`.
    """
    key = f"source {name}: filters.{number}"
    if not isinstance(bounds, Mapping) or not bounds or set(bounds) - {"min", "max", "missing"}:
        raise ValueError(f"{key}={bounds} takes min, max and missing")
    bounds = {word: value for word, value in bounds.items() if value is not None}
    if bounds.get("missing", "drop") not in ("keep", "drop"):
        raise ValueError(f"{key}.missing={bounds['missing']} is keep or drop")
    for word in ("min", "max"):
        if word in bounds and not is_number(bounds[word]):
            raise ValueError(f"{key}.{word}={bounds[word]!r} must be a number")
    if bounds.get("min", -np.inf) > bounds.get("max", np.inf):
        raise ValueError(f"{key}: min={bounds['min']} is above max={bounds['max']}, so that nothing lies within")
    return bounds


def as_path(path: str) -> Path:
    """Return the Path of a local folder as users write it: `file:///data/mine`, `~/mine`."""
    return Path(re.sub(r"^(file|local)://", "", path)).expanduser()


class Mixture:
    """Sources and their shares.

    Args:
        sources: name -> source; the names are the keys of `weights`.
        weights: a non-negative number per source; they are normalised. Sources of weight 0 are left out. None: weights
            proportional to the size of each source in `unit` (times its `repeat`), so an epoch is one pass over every
            source (`repeat` passes).
        unit: what shares are counted in: samples, tokens (text and image slots) or answer_tokens (learned tokens).
        window_shards: shards open at once: shards are shuffled, then samples within windows of this many shards.

    Raises:
        ValueError: no sources, unknown or missing names in weights, a negative weight, no positive one, an unknown
            unit, or `window_shards` below 1.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        *,
        weights: Mapping[str, float | int] | None,
        unit: str,
        window_shards: int = 4,
    ):
        names = [str(name) for name in sources]
        if not names:
            raise ValueError("mixture.sources is empty; name at least one source")
        for name in weights or ():
            if name not in names:
                nearest = difflib.get_close_matches(str(name), names, n=1) or names[:1]
                raise ValueError(
                    f"mixture.weights.{name}: no such source; did you mean {nearest[0]}? (sources: {', '.join(names)})"
                )
        for name in names if weights is not None else ():
            if name not in weights:
                raise ValueError(f"mixture.weights has no {name}; give it a weight (0 leaves the source out)")
            if not is_number(weights[name]) or not 0 <= weights[name] < float("inf"):
                raise ValueError(f"mixture.weights.{name}={weights[name]!r} must be a number of 0 or more")
        if unit not in UNITS:
            nearest = difflib.get_close_matches(str(unit), UNITS, n=1) or UNITS[:1]
            raise ValueError(f"mixture.unit={unit} is not one of {', '.join(UNITS)}; did you mean {nearest[0]}?")
        if window_shards < 1:
            raise ValueError(f"mixture.window_shards={window_shards} must be 1 or more")
        self.unit, self.window_shards = unit, window_shards
        for source in sources.values():
            source.kept_shards = max(source.kept_shards, 2 * window_shards)  # this window, and the next is fetched
        self.shares: list[Fraction] | None = None
        self.weights: dict[str, float] | None = None
        if weights is None:
            self.sources = {name: sources[name] for name in names}
            return
        exact = {name: as_fraction(weights[name]) for name in names if weights[name] > 0}
        if not exact:
            raise ValueError(f"mixture.weights are all 0; give one of {', '.join(names)} a positive weight")
        self.sources = {name: sources[name] for name in exact}
        total = sum(exact.values())
        self.shares = [weight / total for weight in exact.values()]  # fractions that sum to exactly 1
        self.weights = {name: float(share) for name, share in zip(exact, self.shares)}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sources, without those of weight 0."""
        return tuple(self.sources)


def shuffled(count: int, *seeds: str | int) -> np.ndarray:
    """Return a permutation of `range(count)` that depends only on the seeds: int64 (count,).

    It sorts raw 64-bit words of PCG64: numpy guarantees the raw stream across versions and platforms, but not the
    result of `Generator.permutation` (NEP 19).
    """
    import hashlib

    digest = hashlib.sha256("\x1f".join(map(str, seeds)).encode()).digest()
    return np.argsort(np.random.PCG64(int.from_bytes(digest[:16], "little")).random_raw(count), kind="stable")
