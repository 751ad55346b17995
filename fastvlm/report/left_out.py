"""What the stages did not train on: samples left out, cut or unreadable, and broken shards."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fastvlm.report.page import table
from fastvlm.report.stages import StageRecord, read_json

MOST = 10  # names shown of each kind


def left_out_section(stages: Sequence[StageRecord]) -> str:
    """Render a table row for each stage, source and reason, with the count and the first names."""
    rows = []
    for stage in stages:
        plan = read_json(stage.folder / "shares.json") or {}
        for name, source in (plan.get("sources") or {}).items():
            for reason, found in (source.get("excluded") or {}).items():
                rows.append(_row(stage, name, f"left out: {reason}", found["count"], found["keys"]))
            if source.get("truncated"):
                rows.append(_row(stage, name, "cut to max_tokens", source["truncated"], []))
            for shard, where in (source.get("broken_shards") or {}).items():
                rows.append(_row(stage, name, f"broken shard: {where}", None, [shard.rsplit("/", 1)[-1]]))
        skipped: dict[str, list[str]] = {}
        for record in stage.records:
            for key in record.get("skipped_keys") or ():
                source, _, sample = str(key).partition("/")
                skipped.setdefault(source, []).append(sample)
        named = sum(map(len, skipped.values()))
        for source, keys in skipped.items():
            rows.append(_row(stage, source, "could not be read", len(keys), keys))
        if (more := int(stage.last("train/skipped") or 0) - named) > 0:
            rows.append(_row(stage, "", "could not be read, not named", more, []))
    if not rows:
        return "<p>Nothing: every sample of every source was used whole.</p>"
    return table(["stage", "source", "what", "samples", "which"], rows, numeric={3})


def _row(stage: StageRecord, source: str, what: str, count: int | None, names: list[str]) -> list[str]:
    first = list(dict.fromkeys(names))[:MOST]
    more = ", …" if (count or 0) > len(first) and first else ""
    cells = [stage.name, source, what, "–" if count is None else f"{count:,}", ", ".join(first) + more]
    return [escape(cell) for cell in cells]
