"""The index of a source: the sidecars of its shards as one table, from which plans are made before data is read.

A sidecar that does not fit is rebuilt, or refused with the command that rebuilds it.

    python -m fastvlm.data.index data/embedded/captions --tokenizer data/embedded/tokenizer --template roles
    python -m fastvlm.data.index data/embedded/captions --list    # only writes the list of the shards, shards.json
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import shlex
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from braceexpand import braceexpand

from fastvlm.commands import run_command
from fastvlm.data.listing import LISTING, SPLITS, check_folder, split_of, write_listing
from fastvlm.data.planned_columns import read_planned
from fastvlm.data.remote import RemoteShard, is_remote, locate_shards
from fastvlm.data.shard_cache import cache_folder
from fastvlm.data.shards import find_shards
from fastvlm.data.sidecar import Sidecar, build_all, is_damaged, open_sidecar
from fastvlm.data.source_index import ShardRows, SourceIndex
from fastvlm.data.unique_keys import check_keys
from fastvlm.tokens import IMAGE_TOKEN, Tokenizer


def load_index(
    folder: str | Path | Sequence[str],
    split: str,
    tokenizer: Tokenizer,
    *,
    rebuild: bool = True,
    names: str | None = None,
) -> SourceIndex:
    """Open the index of `<folder>/<split>-*.tar`, of the shards that `names` selects, or of shards stored elsewhere.

    Missing, stale and damaged sidecars are built.

    Args:
        rebuild: False: raise an error instead of building them.
        names: see `list_shards`.

    Raises:
        ValueError: no shards, two samples with the same key, a shard that cannot be read, an index that cannot be
            written or, with `rebuild=False`, a sidecar that does not fit.
    """
    shards = list_shards(folder, split, names)
    folder = folder if isinstance(folder, (list, tuple)) or is_remote(folder) else Path(folder)
    if not shards:
        raise ValueError(no_shards(folder, split, names))
    which = f"--shards {names!r}" if names and split == "train" else f"--split {split}"
    image = "" if tokenizer.image_token == IMAGE_TOKEN else f" --image-token {shlex.quote(tokenizer.image_token)}"

    def refuse(place: str, why: str) -> None:
        raise ValueError(
            f"{place}.idx.parquet is {why}; rebuild it with `python -m fastvlm.data.index "
            f"{place if isinstance(folder, (list, tuple)) else folder} "
            f"{which} --tokenizer {tokenizer.path} --template {tokenizer.template.name}{image}`"
        )

    def join() -> SourceIndex:
        index = join_sidecars(opened, folder=folder, split=split, shards=shards, fingerprint=tokenizer.fingerprint)
        check_keys(index)
        return index

    options = {"label": f"{folder}, {split}", "refuse": None if rebuild else refuse}
    try:
        opened = open_sidecars(shards, tokenizer, **options)
        try:
            return join()
        except (OSError, pa.ArrowException):
            if not remove_damaged(shards, opened, refuse=options["refuse"]):
                raise
        opened = open_sidecars(shards, tokenizer, **options)
        return join()
    except OSError as error:
        what = " ".join(str(error).split())
        raise ValueError(
            f"{folder}: {what}; its shards must be readable, and its index needs room beside them or in "
            f"{cache_folder()} (FASTVLM_CACHE)"
        ) from None


def open_sidecars(
    shards: Sequence[Path | RemoteShard],
    tokenizer: Tokenizer,
    *,
    label: str,
    refuse: Callable[[str, str], None] | None,
) -> list[Sidecar]:
    """Open the sidecars of shards, building those that do not fit.

    Args:
        label: begins the lines about progress.
        refuse: called with a shard's name and what is wrong with its sidecar, instead of building it; None: build.

    Raises:
        ValueError: from `refuse`; a sidecar does not fit right after it was built.
        OSError: a shard cannot be read, or a sidecar not written.
    """
    look = functools.partial(open_sidecar, fingerprint=tokenizer.fingerprint)
    with ThreadPoolExecutor(min(16, len(shards))) as pool:
        found = list(pool.map(look, shards))
    where = [place_of(shard) for shard in shards]
    unfit = [(place, why) for place, (opened, why) in zip(where, found) if opened is None]
    if unfit and refuse is not None:
        refuse(*unfit[0])
    if unfit:
        build_missing(found, shards, tokenizer, label=label)
    opened = [sidecar for sidecar, _ in found]
    warn_of_breaks(where, opened)
    return opened


def remove_damaged(
    shards: Sequence[Path | RemoteShard], opened: Sequence[Sidecar], *, refuse: Callable[[str, str], None] | None
) -> bool:
    """Remove sidecars with a sound header but damaged columns; return whether there were any.

    Raises:
        ValueError: from `refuse`, see `open_sidecars`.
        OSError: one cannot be removed.
    """
    damaged = [(shard, one) for shard, one in zip(shards, opened) if is_damaged(one.path)]
    for shard, one in damaged:
        if refuse is not None:
            refuse(place_of(shard), "damaged")
        one.path.unlink(missing_ok=True)
    return bool(damaged)


def no_shards(folder: str | Path | Sequence[str], split: str, names: str | None) -> str:
    """Return the message for a split without shards."""
    return (
        f"{folder}: no shards {(names if split == 'train' else None) or f'{split}-*.tar'}; write them with "
        "`python data/prepare.py` (a file of conf/source/ begins with its command), or point the source's path at them"
    )


def place_of(shard: Path | RemoteShard) -> str:
    """Return the path or URL of a shard."""
    return shard.url if isinstance(shard, RemoteShard) else str(shard)


def build_missing(
    found: list[tuple[Sidecar | None, str]],
    shards: Sequence[Path | RemoteShard],
    tokenizer: Tokenizer,
    *,
    label: str,
) -> None:
    """Build the sidecars that are None in `found`, and put them there.

    Raises:
        ValueError: one does not fit right after it was built.
    """
    missing = [i for i, (opened, _) in enumerate(found) if opened is None]
    with one_builder(place_of(shards[0])):
        for i in missing:
            found[i] = open_sidecar(shards[i], tokenizer.fingerprint)  # another process may have built it meanwhile
        missing = [i for i in missing if found[i][0] is None]
        build_all([shards[i] for i in missing], tokenizer, label=label)
    for i in missing:
        found[i] = open_sidecar(shards[i], tokenizer.fingerprint)
        if found[i][0] is None:
            raise ValueError(
                f"index of {place_of(shards[i])} is {found[i][1]} right after it was built; is the shard being written?"
            )


def warn_of_breaks(where: Sequence[str], opened: Sequence[Sidecar]) -> None:
    """Warn of every broken shard, saying how much of it is used."""
    for place, one in zip(where, opened):
        if one.header["broken"]:
            warnings.warn(
                f"{place}: {one.header['broken']}; {one.num_samples} whole samples before the break are used, "
                "what follows is lost: write the shard again",
                stacklevel=1,
            )


def join_sidecars(
    opened: Sequence[Sidecar],
    *,
    folder: Path | str | Sequence[str],
    split: str,
    shards: Sequence[Path | RemoteShard],
    fingerprint: str,
) -> SourceIndex:
    """Join the indexes of a source's shards into one. `fingerprint`: of the tokenizer that counted the tokens."""
    headers, counts, where = [o.header for o in opened], [o.num_samples for o in opened], [place_of(s) for s in shards]
    state = json.dumps([[h["checksum"] for h in headers], fingerprint, counts])
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return SourceIndex(
        folder=folder,
        split=split,
        shards=where,
        files=[s if isinstance(s, RemoteShard) else str(s) for s in shards],
        sidecars=[o.path for o in opened],
        checksums=[h["checksum"] for h in headers],
        suffixes=sorted({suffix for o in opened for suffix in suffixes_of(o)}),
        start=start,
        **read_planned([o.path for o in opened], [o.header for o in opened], start),
        checksum=hashlib.sha256(state.encode()).hexdigest()[:16],
        broken={place: h["broken"] for place, h in zip(where, headers) if h["broken"]},
    )


def list_shards(folder: str | Path | Sequence[str], split: str, names: str | None = None) -> list[Path | RemoteShard]:
    """List the shards `<split>-*.tar` of a folder, or for train those of the pattern or range `names`, if given.

    A pattern takes no shard whose name begins with another split. If `folder` names shards itself or is remote, see
    `locate_shards`.

    Raises:
        ValueError: a shard of a range, or one that `shards.json` names, is missing; a remote folder cannot be listed.
    """
    plain = isinstance(folder, Path) or not (isinstance(folder, (list, tuple)) or is_remote(folder) or "{" in folder)
    if not plain or str(folder).endswith(".tar"):
        return locate_shards(folder, split, names if split == "train" else None)
    folder = Path(folder)
    if names is None or split != "train":
        return find_shards(folder, split)
    shards: set[Path] = set()
    for name in braceexpand(names):
        found = list(folder.glob(name))
        if not found and not any(c in name for c in "*?["):
            raise ValueError(f"{folder / name}: no such shard, and shards={names} names it; mend the range")
        shards.update(shard for shard in found if split_of(shard.name) == split)
    check_folder(folder, split, list(braceexpand(names)), shards)
    return sorted(shards)


def suffixes_of(opened: Sidecar) -> list[str]:
    """Return the suffixes of a shard's members, from the header of its index if it names them."""
    if "suffixes" in opened.header:
        return opened.header["suffixes"]
    return ShardRows(opened.path, checksum=opened.header["checksum"]).suffixes


@contextlib.contextmanager
def one_builder(name: str) -> Iterator[None]:
    """Let one process at a time build an index, so that ranks that start together build it once."""
    lock = None
    with contextlib.suppress(OSError):  # without a cache folder every process builds it, and the last one stays
        folder = cache_folder() / "index"
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / f".{hashlib.sha256(name.encode()).hexdigest()[:20]}.lock", "w")  # noqa: SIM115
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description="Build the index of a source's shards.")
    parser.add_argument("folder", help="folder, URL or brace pattern of the shards")
    parser.add_argument("--split", default="*", help=f"{', '.join(SPLITS)}; all of them unless told")
    parser.add_argument("--shards", help="a pattern or range of names where they are not <split>-*.tar")
    parser.add_argument("--tokenizer", help="folder or hub id")
    parser.add_argument("--template", default="chatml")
    parser.add_argument("--image-token", default=IMAGE_TOKEN, help="a token, or own; as in conf/tokenizer/")
    parser.add_argument(
        "--list", action="store_true", help=f"only write {LISTING} anew, from the shards that are there"
    )
    args = parser.parse_args()
    if args.list:
        if not Path(args.folder).is_dir():
            parser.error(f"--list: {args.folder} is not a folder on this machine")
        print(write_listing(args.folder))
        return
    if args.tokenizer is None:
        parser.error("--tokenizer is needed, or --list")
    tokenizer = Tokenizer(args.tokenizer, template=args.template, image_token=args.image_token)
    splits = SPLITS if args.split == "*" else (args.split,)
    splits = ("train",) if args.shards else splits
    count = 0
    for split in splits:
        shards = list_shards(args.folder, split, args.shards)
        count += len(shards)
        build_all(shards, tokenizer, label=f"{args.folder}, {split}", replace=True)
        for shard in shards:
            opened, reason = open_sidecar(shard, tokenizer.fingerprint)
            if opened is None:
                raise ValueError(f"index of {shard} is {reason} right after it was built")
            warn_of_breaks([place_of(shard)], [opened])
            table = pq.read_table(opened.path, columns=["text_tokens", "fault"])
            faults = sum(fault != "" for fault in table["fault"].to_pylist())
            tokens = pc.sum(table["text_tokens"], min_count=0)
            print(f"{opened.path}: {len(table)} samples, {tokens} text tokens, {faults} unreadable")
    if not count:
        raise ValueError(f"{args.folder}: no shards {args.split}-*.tar")
    if Path(args.folder).is_dir():
        with contextlib.suppress(OSError):
            write_listing(args.folder)


if __name__ == "__main__":
    run_command(main)
