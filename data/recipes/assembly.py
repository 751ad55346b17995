"""Build a finished folder from a recipe's parts: split, convert the parts in a pool, check, name, report.

Work in progress is kept in `.<name>.work` beside the folder. It survives a kill, and the next run of the same command
continues from it; if options, code or input files have changed, it is discarded.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from data.recipes.held_out import write_held_out
from data.recipes.hub_files import fetch
from data.recipes.inputs import describe_inputs, hash_code
from data.recipes.record import ODD_ROW, Part
from data.recipes.workers import open_pool
from data.recipes.writing import NO_SPACE, Job, do_part, load_tokenizer, write_text

ROWS = 2000
EXAMPLES = 3
REPEATED = "id of an earlier sample: kept, its key has the row's number"
LINE_SECONDS = 10


def assemble(
    recipe,
    folder: Path,
    work: Path,
    *,
    source: str,
    path: str,
    splits: list[str],
    options: dict,
    workers: int,
    tokenizer: tuple[str, ...],
    val: float,
    rows: int,
    rewrite: bool = False,
) -> dict:
    """Write every split of a data set into `folder`, which is empty.

    Args:
        work: folder that keeps finished parts until all are finished.
        source: the recipe's name.
        path: the data set, as given on the command line.
        options: the recipe's own arguments.
        workers: number of processes.
        tokenizer: path, template and, if given, image token of the tokenizer that the index counts with.
        val: share of train to hold out if the data set has no val; 0 for none. The held-out records are converted and
            their images left out of train even if only train was requested.
        rows: rows per shard.
        rewrite: use no finished part but those of an interrupted rewrite.

    Returns:
        For DONE.json: counts, dropped, notes and shards by split, what was held out, and inputs and code.

    Raises:
        ValueError: an argument or the data set is unusable, the disk is full, or a worker was killed.
    """
    load_tokenizer(*tokenizer)  # before the fork, or each worker would import the library itself
    jobs = cut(recipe, work, source, path, splits, options, tokenizer, val, rows)
    made_of = {"inputs": describe_inputs(path, [job.part for job in jobs]), "code": hash_code(source)}
    stamp = make_stamp(jobs, made_of | {"rewrite": rewrite})
    mark = work / "stamp.txt"
    if work.exists() and not (mark.exists() and mark.read_text() == stamp):
        print(f"{work}: of other options, files or code; starting anew", file=sys.stderr)
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    for left in work.glob(".*"):  # temporary files of a killed run
        left.unlink()
    if not mark.exists():
        write_text(mark, stamp)
    reports: list[dict | None] = [None] * len(jobs)
    try:
        run(jobs, reports, workers)
        settings = {"splits": splits, "source": source, "path": path, "tokenizer": tokenizer, "val": val}
        return publish(jobs, reports, folder, **settings) | made_of
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        state = f"{sum(r is not None for r in reports)} of {len(jobs)} shards are whole and stay in {work}"
        words = os.strerror(error.errno).lower()
        raise ValueError(f"{words} while writing; {state}: make room and run the same command again") from None
    except BrokenProcessPool:
        raise ValueError(
            "a worker process was killed (out of memory?); what is done stays: "
            "run the same command again, with fewer workers or rows"
        ) from None


def cut(recipe, work, source, path, splits, options, tokenizer, val, rows) -> list[Job]:
    jobs = []
    takes_rows = "rows" in inspect.signature(recipe.parts).parameters
    where = find_rows(recipe, path, options)
    for split in dict.fromkeys([*splits, *(["val"] if val and "train" in splits else [])]):
        held_out = bool(val) and split == "val"
        # Read enough rows of train to fill a held-out shard.
        extra = {"rows": max(1, round(rows / val)) if held_out else rows} if takes_rows else {}
        try:
            parts: list[Part] = recipe.parts(where, split="train" if held_out else split, **options, **extra)
        except ODD_ROW as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} is not of the layout of {source} ({what}); is this the right recipe?") from error
        if not parts:
            raise ValueError(f"{path}: split {split} has no rows; leave it out with splits=...")
        share = val if split in ("train", "val") else 0.0
        counts_faults = not (held_out and "train" in splits)
        jobs += [Job(source, split, i, part, work, tokenizer, share, counts_faults) for i, part in enumerate(parts)]
    check_apart(jobs)
    return jobs


def check_apart(jobs: list[Job]) -> None:
    """Check that no file is read for two splits.

    Raises:
        ValueError: the rows of one file would be in two splits.
    """
    of: dict[str, str] = {}
    for job in jobs:
        options = job.part.options
        # Recipes may split the rows of a file themselves, and so does the hub.
        if options.get("kind", "hub") == "hub" or "holdout" in options or job.is_held_out:
            continue
        if (other := of.setdefault(job.part.path, job.split)) != job.split:
            raise ValueError(
                f"{job.part.path}: neither its name nor its folder below path=... says its split, so {other} and "
                f"{job.split} would hold the same rows; name one of them with splits=..."
            )


def find_rows(recipe, path: str, options: dict) -> Path:
    """Return the file or folder of the rows, downloaded if a single file of the hub holds them; else the hub id.

    Raises:
        ValueError: the file cannot be downloaded, or its images would be missing.
    """
    if os.path.exists(path):
        return Path(os.path.abspath(path))
    files = getattr(recipe, "HUB_FILES", ())
    if (found := fetch(path, files)) is None:
        return Path(path)
    if files and "images" in inspect.signature(recipe.parts).parameters and not options.get("images"):
        raise ValueError(f"images=... is missing: {path} gives the rows alone; unpack its images and name their folder")
    return found


def make_stamp(jobs: list[Job], made_of: dict) -> str:
    """Hash everything that the shards' bytes depend on: parts, options, input files and the recipes' code."""
    state = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode())
    for job in jobs:
        part = job.part
        line = [job.source, job.split, job.val, job.counts_faults, part.path, part.start, part.stop, part.options]
        state.update(json.dumps(line, default=str, sort_keys=True).encode())
    return state.hexdigest()


def run(jobs: list[Job], reports: list[dict | None], workers: int) -> None:
    """Convert the parts, in processes if workers > 1, and fill `reports` in the jobs' order.

    Held-out parts come first, because train must not contain their images.
    """
    again = 0
    first = [i for i, job in enumerate(jobs) if job.is_held_out]
    rest = [i for i, job in enumerate(jobs) if not job.is_held_out]
    with show_progress(len(jobs)) as advance:
        for chosen in filter(None, (first, rest)):
            if first and chosen is rest:
                images = [reports[i]["images"] for i in first]
                known = write_held_out(jobs[0].folder / "held_out.bin", images)
                for i in rest:
                    jobs[i].held_out = known if jobs[i].val else None
            for number, report in finished([jobs[i] for i in chosen], workers):
                reports[chosen[number]] = report
                again += report["again"]
                advance(report["kept"], len(report["dropped"]))
    if again:
        print(f"{again} of {len(jobs)} shards were there from a run before, and sound", file=sys.stderr)


def finished(jobs: list[Job], workers: int) -> Iterator[tuple[int, dict]]:
    if workers <= 1:
        for i, job in enumerate(jobs):
            yield i, do_part(job)
        return
    hub = any(job.part.options.get("kind") == "hub" for job in jobs)
    pool = open_pool(min(workers, len(jobs)), fork=not hub)
    waiting: dict[Future, int] = {}
    queue = iter(enumerate(jobs))
    try:
        while True:
            # Submit only a few at a time, so that little is started after a fault.
            while len(waiting) < 2 * workers and (job := next(queue, None)) is not None:
                waiting[pool.submit(do_part, job[1])] = job[0]
            if not waiting:
                return
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(future), future.result()
    except KeyboardInterrupt:
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class show_progress:  # noqa: N801  used as a function
    """Progress on standard error: a Rich bar on a terminal, else a line at most every LINE_SECONDS."""

    def __init__(self, total: int):
        self.total, self.done, self.kept, self.dropped, self.shown = total, 0, 0, 0, time.monotonic()
        self.bar = None

    def __enter__(self):
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("shards"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True))
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total)
        return self.advance

    def advance(self, kept: int, dropped: int) -> None:
        self.done, self.kept, self.dropped = self.done + 1, self.kept + kept, self.dropped + dropped
        text = f"{self.kept} kept, {self.dropped} dropped"
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, description=text)
        elif time.monotonic() - self.shown > LINE_SECONDS:
            self.shown = time.monotonic()
            print(f"shards {self.done}/{self.total}: {text}", file=sys.stderr, flush=True)

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.stop()


def publish(jobs, reports, folder: Path, *, splits, source, path, tokenizer, val) -> dict:
    """Give the shards their final names in `folder`, check them and write the lists; return the report for DONE.json.

    Raises:
        ValueError: a split has no usable sample, or its index does not match what was written.
    """
    from fastvlm.data.index import load_index
    from fastvlm.data.sidecar import sidecar

    shards: dict[str, list] = {split: [] for split in splits}
    dropped: dict[str, dict] = {split: {} for split in splits}
    notes: dict[str, dict] = {split: {} for split in splits}
    lines = []
    for job, report in zip(jobs, reports):
        if job.split not in splits:
            continue
        if report["kept"]:
            # Numbered without gaps, so that `train-{00000..00012}.tar` matches all of them.
            name = f"{job.split}-{len(shards[job.split]):05d}.tar"
            place(job.shard, folder / name)
            place(sidecar(job.shard), sidecar(folder / name))
            entry = {"name": name, "size": report["bytes"], "samples": report["kept"], "sha256": report["sha256"]}
            shards[job.split].append(entry)
        for id, reason in report["dropped"]:
            lines.append(json.dumps({"split": job.split, "id": id, "reason": reason}) + "\n")
            row = dropped[job.split].setdefault(reason, {"count": 0, "examples": []})
            row["count"] += 1
            if len(row["examples"]) < EXAMPLES:
                row["examples"].append(id)
        for note, count in report["notes"].items():
            notes[job.split][note] = notes[job.split].get(note, 0) + count
    for split in splits:
        if repeated := count_repeated([r["ids"] for job, r in zip(jobs, reports) if job.split == split]):
            notes[split][REPEATED] = repeated
    counts = {split: sum(entry["samples"] for entry in shards[split]) for split in splits}
    for split in splits:
        if not counts[split]:
            why = "; ".join(f"{row['count']} {reason}" for reason, row in dropped[split].items())
            if val and split == "val":
                raise ValueError(f"val={val:g} holds out no sample of {path}; give a larger share")
            for job in jobs:
                if job.split == split:
                    job.report.unlink(missing_ok=True)  # tried again: its images may come later
            raise ValueError(f"{path}: no sample of split {split} is usable ({why or 'no rows'})")
        index = load_index(folder, split, load_tokenizer(*tokenizer), rebuild=False)
        if index.num_samples != counts[split] or index.broken:
            raise ValueError(f"{folder}: split {split} holds {index.num_samples} samples, {counts[split]} were written")
    write_text(folder / "dropped.jsonl", "".join(lines))
    write_text(folder / "shards.json", json.dumps(shards, indent=1) + "\n")
    made = [report for job, report in zip(jobs, reports) if job.is_held_out]
    held_out = {"kept": sum(r["kept"] for r in made), "of": sum(r["seen"] for r in made), "val": val}
    return {
        "counts": {source: counts},
        "held_out": held_out if made else {},
        "dropped": dropped,
        "notes": notes,
        "shards": {s: len(shards[s]) for s in splits},
    }


def count_repeated(ids: list[str]) -> int:
    """Count samples whose original id repeats an earlier one; each string joins ids of 16 hex digits."""
    import numpy as np

    values = np.frombuffer(bytes.fromhex("".join(ids)), dtype=">u8")
    return len(values) - len(np.unique(values))


def place(old: Path, new: Path) -> None:
    """Create `new` as a hard link to `old`, so that a killed run loses nothing; move `old` if links do not work."""
    try:
        os.link(old, new)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        os.replace(old, new)


def reindex(folder: Path, tokenizer: tuple[str, ...], workers: int) -> None:
    """Rebuild the indexes of finished shards for another tokenizer."""
    from fastvlm.data.sidecar import build_index, open_sidecar

    loaded = load_tokenizer(*tokenizer)
    stale = [shard for shard in sorted(folder.glob("*.tar")) if open_sidecar(shard, loaded.fingerprint)[0] is None]
    with open_pool(workers) as pool:
        list(pool.map(build_index, stale, [loaded] * len(stale)))


def format_table(done: dict) -> str:
    """Format what was kept, dropped and noted for each split as a text table."""
    counts = next(iter(done["counts"].values()))
    lines = [f"{'split':<8}{'kept':>10}{'dropped':>10}{'shards':>8}"]
    for split, kept in counts.items():
        lost = sum(row["count"] for row in done["dropped"][split].values())
        lines.append(f"{split:<8}{kept:>10}{lost:>10}{done['shards'][split]:>8}")
    if held_out := done.get("held_out"):
        share = 100 * held_out["kept"] / (held_out["of"] or 1)
        lines.append(
            f"  held out {held_out['kept']} of {held_out['of']} records: {share:.3g} % (val={held_out['val']:g})"
        )
    for split, reasons in done["dropped"].items():
        for reason, row in sorted(reasons.items(), key=lambda item: -item[1]["count"]):
            lines.append(f"  {split} dropped {row['count']}: {reason} (for example {', '.join(row['examples'])})")
    for split, notes in done["notes"].items():
        lines += [f"  {split} noted {count}: {note}" for note, count in sorted(notes.items())]
    return "\n".join(lines)
