"""The model card of an exported run: its parts, training data and scores, and how to load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LOAD = {
    "ours": """import fastvlm.auto  # makes the class known
from transformers import AutoModelForImageTextToText, AutoProcessor""",
    "stock": "from transformers import AutoModelForImageTextToText, AutoProcessor",
}
ASK = """
model = AutoModelForImageTextToText.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")
messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What is this?"}}]}}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=image, text=text, return_tensors="pt")
print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))"""


def write_card(
    folder: Path,
    *,
    name: str,
    kind: str,
    parts: dict[str, tuple[str, int]],
    config: dict[str, Any],
    results: dict[str, Any],
    engines: list[str],
    notes: list[str],
) -> None:
    """Write README.md of a model folder.

    Args:
        kind: `ours`, or the name of the stock class.
        parts: name -> (class, number of parameters).
        config: the run's resolved configuration.
        results: the content of its results.json.
        engines: table rows made from `check_folder`.
        notes: differences from the run's own inference.
    """
    stages = config.get("stages") or {}
    sources = sorted({s for stage in stages.values() for s in ((stage.get("mixture") or {}).get("sources") or {})})
    bases = [
        path
        for part in ("llm", "encoder", "vlm")
        for key in ("path", "pretrained", "checkpoint")
        if isinstance(path := (config.get(part) or {}).get(key), str)
    ]
    front = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text"]
    front += ["tags:", "- fastvlm", "- vision-language-model"]
    hub_ids = [base for base in bases if not Path(base).is_absolute() and base.count("/") == 1]
    front += ["base_model:", *[f"- {base}" for base in hub_ids]] if hub_ids else []
    front += ["---", ""]
    total = sum(count for _, count in parts.values())
    lines = [f"# {name}", "", f"A vision-language model of {total / 1e6:.1f} million parameters.", ""]
    lines += ["| part | class | parameters |", "|---|---|---:|"]
    lines += [f"| {part} | {cls} | {count:,} |" for part, (cls, count) in parts.items()]
    lines += ["", f"Saved as {'fastvlm parts' if kind == 'ours' else kind}.", "", "## Load it", "", "```python"]
    lines += [LOAD["ours" if kind == "ours" else "stock"] + ASK.format(name=name), "```", ""]
    lines += ["| loads | engine | |", "|---|---|---|", *[f"| {line} |" for line in engines], ""]
    if notes:
        lines += ["## What differs from the run's own inference", "", *[f"- {note}" for note in notes], ""]
    lines += ["## Training", "", "| stage | steps | image size | learns |", "|---|---:|---:|---|"]
    for stage, keys in stages.items():
        lines.append(f"| {stage} | {keys.get('steps') or ''} | {keys.get('image_size')} | {learning(keys)} |")
    named = ", ".join(sources) or "none named"
    lines += ["", f"Data: {named}. Their licences and addresses: data/README.md of fastvlm."]
    lines += [f"Seed {config.get('seed', 0)}.", ""]
    if metrics := results.get("metrics"):
        lines += ["## Held-out scores", "", "| metric | value |", "|---|---:|"]
        scores = {key: value for key, value in sorted(metrics.items()) if isinstance(value, (int, float))}
        lines += [f"| {key} | {value:.4g} |" for key, value in scores.items()]
        lines += ["", "As the run's own evaluation measured them (`python eval.py checkpoint=<run>`).", ""]
    limits = "It answers from what it was trained on, in the languages of that data; it may be wrong about any image, "
    lines += ["## Limits", "", limits + "and its scores say nothing of images unlike those it was scored on."]
    resolved = json.dumps(config, indent=1, default=str)
    lines += ["", "<details><summary>Resolved configuration</summary>", "", "```json", resolved, "```", ""]
    lines += ["</details>", ""]
    (folder / "README.md").write_text("\n".join(front + lines))


def learning(stage: dict[str, Any]) -> str:
    """Return what learns in a stage: part or parameters, method, and learning rate."""
    rates = {name: r["lr"] if isinstance(r, dict) else r for name, r in (stage.get("trainable") or {}).items()}
    adapted = dict(stage.get("adapt") or {})
    for short, method in (("lora", "lora"), ("last_layers", "partial")):
        if stage.get(short):
            adapted["llm"] = stage[short] | {"method": method}
    for part, one in adapted.items():
        key = {"lora": "r", "dora": "r", "partial": "num"}.get(one["method"])
        how = f"{one['method']} {key}={one[key]}" if key else one["method"]
        rates[f"{part} ({how})"] = one["lr"]
    return ", ".join(f"{name} {rate:g}" for name, rate in rates.items() if rate)
