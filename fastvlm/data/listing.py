"""`shards.json`, the list of the shards in its folder: {split: [{name, size}]}.

`prepare.py` writes it, and `python -m fastvlm.data.index` rewrites it. Behind HTTP, it is the only way to list a
folder. If the folder itself can be listed, it tells which shards are missing; without it, a folder that has lost a
shard looks like a smaller source.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from fastvlm.files import write_whole

LISTING = "shards.json"
SPLITS = ("train", "val", "test", "testA", "testB")  # testA and testB: RefCOCO's people and objects


def split_of(name: str) -> str:
    """Return the split that a shard's name begins with; train if it names none, as img2dataset's `00000.tar`."""
    return match[1] if (match := re.match(rf"({'|'.join(SPLITS)})-", name)) else "train"


def listed(text: str | bytes, split: str, patterns: Sequence[str], *, where: str) -> list[str]:
    """Return the names of the split's shards in a listing that match one of the patterns, sorted.

    Args:
        text: content of the listing.
        where: its path or URL, for messages.

    Raises:
        ValueError: it is not such a list.
    """
    try:
        names = [entry["name"] for entry in json.loads(text).get(split, ())]
        return sorted(name for name in names if any(fnmatch(name, pattern) for pattern in patterns))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f'{where} is not {{"{split}": [{{"name": ..., "size": ...}}]}}: {error}; '
            "write it again with `python -m fastvlm.data.index <folder> --list`"
        ) from None


def check_listed(names: Iterable[str], there: Iterable[str], *, where: str) -> None:
    """Check that the shards named in a listing exist. Shards that it does not name are new and allowed.

    Raises:
        ValueError: a named shard does not exist.
    """
    names, there = set(names), set(there)
    if not (gone := sorted(names - there)):
        return
    folder, more = where.rpartition("/")[0], f" and {len(gone) - 1} more" if len(gone) > 1 else ""
    new = sorted(there - names)
    renamed = f" ({new[0]} is there and not named: renamed?)" if new else ""
    write = f"write the list anew with `python -m fastvlm.data.index {folder} --list`"
    fix = f"take it out of {LISTING}" if "://" in where else write
    raise ValueError(
        f"{where} names {gone[0]}{more}, and there is no such shard{renamed}; put it back, or, if that is meant, {fix}"
    )


def check_folder(folder: Path, split: str, patterns: Sequence[str], found: Iterable[Path]) -> None:
    """Apply `check_listed` to the shards found in a local folder, if it has a listing.

    Raises:
        ValueError: a shard is missing, or the listing is malformed.
    """
    path = folder / LISTING
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return
    check_listed(listed(text, split, patterns, where=str(path)), (shard.name for shard in found), where=str(path))


def write_listing(folder: str | Path) -> Path:
    """List the tars of a folder in `shards.json` by `split_of`, keeping entries whose size has not changed."""
    folder = Path(folder)
    known = {}
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):  # no listing, or another format
        known = {e["name"]: e for entries in json.loads((folder / LISTING).read_text()).values() for e in entries}
    listing: dict[str, list[dict]] = {}
    for shard in sorted(folder.glob("*.tar")):
        entry, size = known.get(shard.name, {}), shard.stat().st_size
        entry = entry if entry.get("size") == size else {"name": shard.name, "size": size}
        listing.setdefault(split_of(shard.name), []).append(entry)
    write_whole(folder / LISTING, json.dumps(listing, indent=1) + "\n")
    return folder / LISTING
