"""`shards.json`, the list of the shards beside it: {split: [{name, size}]}.

`prepare.py` writes it, and `python -m fastvlm.data.index` anew. Behind HTTP a folder is known by it alone. Where the
folder itself can be seen it says what is missing there: a folder that has lost a shard looks like a smaller source.
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
SPLIT = re.compile(r"(train|val|test[AB]?)-")  # test, or RefCOCO's two of people and of things


def listed(text: str | bytes, split: str, patterns: Sequence[str], *, where: str) -> list[str]:
    """Names of the split's shards in a listing that match one of the patterns, in order.

    Args:
        where: the listing's own path or URL, for messages.

    Raises:
        ValueError: it is no such list.
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
    """Compare what a listing names with what is there. A shard that it does not name is a new one, and welcome.

    Raises:
        ValueError: a shard that it names is not there.
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
    """`check_listed` for the shards found in a folder of this machine, where it has a listing.

    Raises:
        ValueError: one is missing, or the listing is none.
    """
    path = folder / LISTING
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return
    check_listed(listed(text, split, patterns, where=str(path)), (shard.name for shard in found), where=str(path))


def write_listing(folder: str | Path) -> Path:
    """Write the list of the shards `<split>-*.tar` that are in a folder; what it said of those that stay, it says
    still."""
    folder = Path(folder)
    known = {}
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):  # none, or none of ours
        known = {e["name"]: e for entries in json.loads((folder / LISTING).read_text()).values() for e in entries}
    listing: dict[str, list[dict]] = {}
    for shard in sorted(folder.glob("*.tar")):
        if match := SPLIT.match(shard.name):
            entry, size = known.get(shard.name, {}), shard.stat().st_size
            entry = entry if entry.get("size") == size else {"name": shard.name, "size": size}
            listing.setdefault(match[1], []).append(entry)
    write_whole(folder / LISTING, json.dumps(listing, indent=1) + "\n")
    return folder / LISTING
