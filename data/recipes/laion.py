"""LAION, or any list of URLs, as downloaded by img2dataset (webdataset output): indexed in place, not rewritten."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

NO_RECORD = "neither .parquet nor _stats.json beside the shard: its failed rows are not counted"
UNEQUAL = "the parquet has another number of successes than the shard has samples"
NO_IMAGE = "no image"
EXAMPLES = 3


def find_shards(path: str, shards: str) -> list[Path]:
    """List the shards of a folder.

    Raises:
        ValueError: the folder does not exist or has no shards.
    """
    from fastvlm.data.index import list_shards

    folder = Path(os.path.expanduser(path)).absolute()
    if not folder.is_dir():
        raise ValueError(f"path={path} is not a folder; name img2dataset's output_folder")
    if not (found := list_shards(folder, "train", shards)):
        raise ValueError(
            f"path={path}: no shards {shards} in it; img2dataset writes them with output_format=webdataset"
        )
    return found


def recipe_hash(*, path: str, shards: str = "*.tar", tokenizer: str = "", template: str = "") -> str:
    """Hash the shards' names, sizes and times, their folder and the tokenizer."""
    stats = [[s.name, s.stat().st_size, s.stat().st_mtime_ns] for s in find_shards(path, shards)]
    state = json.dumps([stats, os.path.abspath(os.path.expanduser(path)), tokenizer, template])
    return hashlib.sha256(state.encode()).hexdigest()[:16]


def prepare(
    out: Path, *, path: str, shards: str = "*.tar", workers: int = 2, tokenizer: str = "", template: str = ""
) -> dict:
    """Write an index beside every shard, and the errors of failed downloads to `out/failed.json`.

    Args:
        path: img2dataset's output folder: `00000.tar`, `00000.parquet`, `00000_stats.json` and so on.
        shards: names of the shards, as a pattern or a range ("{00000..00127}.tar"); same as the source's key `shards`.
        workers: number of processes.
        tokenizer, template: what the index counts tokens with; default: the embedded tokenizer.

    Returns:
        counts, dropped (failed downloads by status, unreadable samples), notes, shards, tokenizer and folder.
    """
    from data.prepare import embedded_tokenizer
    from data.recipes.assembly import show_progress
    from data.recipes.workers import open_pool

    chosen = (tokenizer, template or "chatml") if tokenizer else embedded_tokenizer(template)
    found = find_shards(path, shards)
    kept, notes, errors = 0, Counter(), Counter()
    dropped: dict[str, dict] = {}
    with open_pool(workers) as pool, show_progress(len(found)) as advance:
        for report in pool.map(index_shard, found, [chosen] * len(found)):
            kept += report["kept"]
            notes.update(report["notes"])
            errors.update(report["errors"])
            for reason, (count, examples) in report["dropped"].items():
                row = dropped.setdefault(reason, {"count": 0, "examples": []})
                row["count"] += count
                row["examples"] = (row["examples"] + examples)[:EXAMPLES]
            advance(report["kept"], sum(count for count, _ in report["dropped"].values()))
    (out / "failed.json").write_text(json.dumps(dict(errors.most_common()), indent=1) + "\n")
    return {
        "counts": {"laion": {"train": kept}},
        "dropped": {"train": dropped},
        "notes": {"train": dict(notes)},
        "shards": {"train": len(found)},
        "tokenizer": list(chosen),
        "folder": str(found[0].parent),
    }


def index_shard(shard: Path, tokenizer: tuple[str, str]) -> dict:
    """Index a shard unless it is indexed; return kept, dropped (reason -> count, keys), notes and errors.

    Raises:
        ValueError: the shard is incomplete.
    """
    import pyarrow.parquet as pq

    from data.recipes.writing import load_tokenizer
    from fastvlm.data.sidecar import build_index, open_sidecar

    loaded = load_tokenizer(*tokenizer)
    opened, _ = open_sidecar(shard, loaded.fingerprint)
    if opened is None:
        build_index(shard, loaded)
        opened, _ = open_sidecar(shard, loaded.fingerprint)
    table, header = pq.read_table(opened.path), opened.header
    if header["broken"]:
        raise ValueError(f"{shard}: {header['broken']}; is img2dataset still writing it? Else fetch this shard again")
    dropped: dict[str, tuple[int, list[str]]] = {}
    faults = [
        (key, name_fault(fault)) for key, fault in zip(*table.select(["key", "fault"]).to_pydict().values()) if fault
    ]
    failed, errors, successes = read_failures(shard)
    for reason in {reason for _, reason in faults}:
        keys = [key for key, why in faults if why == reason]
        dropped[reason] = (len(keys), keys[:EXAMPLES])
    bare = dropped.get(NO_IMAGE, (0, []))[0]
    if failed:
        dropped.pop(NO_IMAGE, None)  # `failed` already counts these rows
    notes = []
    if successes is None:
        notes.append(NO_RECORD)
    elif successes != len(table) - bare:
        notes.append(UNEQUAL)
    return {"kept": len(table) - len(faults), "dropped": dropped | failed, "notes": notes, "errors": errors}


def name_fault(fault: str) -> str:
    """Return the reason under which an unreadable sample is counted."""
    signs = {"no caption": "no caption", "has no image": NO_IMAGE, "cannot be opened": "image unreadable"}
    for sign, reason in signs.items():
        if sign in fault:
            return reason
    return "unreadable"


def read_failures(shard: Path) -> tuple[dict[str, tuple[int, list[str]]], Counter, int | None]:
    """Read what img2dataset could not download for a shard, which only its parquet and statistics record.

    Returns:
        status -> (count, keys); error message -> count; the number of successes, None if neither file exists.

    Raises:
        ValueError: the file is not in img2dataset's format.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table, statistics = shard.with_suffix(".parquet"), shard.with_name(f"{shard.stem}_stats.json")
    try:
        if table.exists():
            rows = pq.read_table(table, columns=["key", "status", "error_message"]).to_pylist()
            failed = [row for row in rows if row["status"] != "success"]
            errors = Counter(str(row["error_message"]) for row in failed)
            kinds = Counter(row["status"] for row in failed)
            keys = {kind: [r["key"] for r in failed if r["status"] == kind][:EXAMPLES] for kind in kinds}
            return {kind: (n, keys[kind]) for kind, n in kinds.items()}, errors, len(rows) - len(failed)
        if statistics.exists():
            stats = json.loads(statistics.read_text())
            kinds = {kind: stats.get(kind, 0) for kind in ("failed_to_download", "failed_to_resize")}
            errors = Counter({k: n for k, n in stats.get("status_dict", {}).items() if k != "success"})
            return {kind: (n, []) for kind, n in kinds.items() if n}, errors, stats["successes"]
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        which = table if table.exists() else statistics
        raise ValueError(
            f"{which} is not as img2dataset writes it ({str(error).splitlines()[0]}); fetch it again"
        ) from None
    return {}, Counter(), None
