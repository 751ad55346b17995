"""Show what a mixture will do before training on it: the plan as a table, its first samples as a picture.

python data/inspect.py mixture=embedded_instruct            # seconds; writes mixture.png
python data/inspect.py mixture=embedded_45_45_10 max_tokens=512 batch_size=32 out=sheet.png
python data/inspect.py mixture=embedded_instruct max_tokens=512 "image.tiles=[[1,2],[2,1]]"
"""

from __future__ import annotations

import os
import sys

# Run as a script, this folder comes first on sys.path, and this file would shadow the standard library's `inspect`.
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [
    os.path.dirname(HERE),
    *(p for p in sys.path if os.path.abspath(p or ".") not in (HERE, os.path.dirname(HERE))),
]

from pathlib import Path  # noqa: E402

from fastvlm.config import command  # noqa: E402

PREFIXES = (100, 1000, 10000)
WIDTH, THUMBNAIL, MARGIN, LINE, SIZE = 1500, 112, 12, 19, 14
LEARNED, SPECIAL, PLAIN = (255, 233, 148), (120, 120, 160), (20, 20, 20)


def make_plan(config):
    """Return the plan for one epoch of a configuration's mixture, and its tokenizer."""
    from fastvlm.build import build_tokenizer, build_transform, instantiate
    from fastvlm.data.plan import Plan

    tokenizer = build_tokenizer(config)
    mixture = instantiate(config.mixture, key="mixture")
    keys = ("split", "tokens_per_image", "max_tokens", "max_images", "batch_size", "packing", "pack_window")
    options = {key: config[key] for key in (*keys, "sort_window", "seed")}
    return Plan(mixture, tokenizer, transform=build_transform(config), **options), tokenizer


def print_report(report: dict) -> None:
    """Print samples, epochs, exclusions and shares of each source, then the packing."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    epoch = f"one epoch: {report['samples']:,} samples in {report['num_steps']:,} steps"
    table = Table(title=f"{epoch}; weights count {report['unit']}; plan {report['fingerprint']}")
    table.add_column("source")
    for name in ("samples", "epochs", "cut", "left out", "largest error,\nsamples' worth"):
        table.add_column(name, justify="right")
    for name, source in report["sources"].items():
        left_out = sum(entry["count"] for entry in source["excluded"].values())
        counts = (f"{source['truncated']:,}", f"{left_out:,}", f"{source['largest_error']:.2f}")
        table.add_row(name, f"{source['samples']:,}", f"{source['epochs']:.2f}", *counts)
    console.print(table)
    table = Table(title="share in %, after " + ", ".join(f"{n:,}" for n in PREFIXES) + " samples")
    table.add_column("source")
    table.add_column("target", justify="right")
    for unit in ("samples", "tokens", "answer_tokens"):
        table.add_column(unit, justify="right", style="bold" if unit == report["unit"] else None)
    for name, source in report["sources"].items():
        cells = [" ".join(f"{100 * share[str(n)]:.1f}" for n in PREFIXES) for share in source["share"].values()]
        table.add_row(name, f"{100 * source['target']:.1f}", *cells)
    console.print(table)
    packing = report["packing"]
    console.print(
        f"at the ends of steps no source is further from its share than {report['largest_step_error']:.1f} samples"
    )
    console.print(
        f"rows: {packing['samples_per_row']:.1f} samples each, {packing['filled_tokens']:.1%} of max_tokens and "
        f"{packing['filled_images']:.1%} of max_images used, {packing['padding']:.1%} of a step's positions are padding"
    )


def split_runs(ids: list[int], labels: list[int], tokenizer) -> list[tuple[str, bool, bool]]:
    """Split a sample's tokens into runs of one kind and return (text, learned, special) for each.

    The slots of an image are one run; every other special token is a run of its own.
    """
    special = {i for i, token in tokenizer.hf.added_tokens_decoder.items() if token.special}
    runs: list[tuple[list[int], bool, bool]] = []
    for token, label in zip(ids, labels):
        kind = (label == token, token in special)
        slots = token == tokenizer.image_id
        if runs and kind == runs[-1][1:] and (not kind[1] or (slots and runs[-1][0][-1] == token)):
            runs[-1][0].append(token)
        else:
            runs.append(([token], *kind))
    image = tokenizer.image_id
    text = lambda run: f"<image: {len(run)} slots>" if run[0] == image else tokenizer.hf.decode(run)
    return [(text(run), learned, is_special) for run, learned, is_special in runs]


def draw_sample(sample, tokenizer, font):
    """Draw a sample: images on the left, text on the right, learned tokens on yellow."""
    import re

    from einops import rearrange
    from PIL import Image, ImageDraw

    left = MARGIN + max(1, min(len(sample.images), 3)) * (THUMBNAIL + MARGIN)
    words = []  # (text, learned, special, width); None is a new line
    for text, learned, special in split_runs(sample.input_ids, sample.labels, tokenizer):
        for piece in [text] if special else re.findall(r"\n|[^\s]+[^\S\n]*|[^\S\n]+", text):
            words.append(None if piece == "\n" else (piece, learned, special, font.getlength(piece)))
    lines, x = [[]], left
    for word in words:
        if word is None or (x + word[3] > WIDTH - MARGIN and lines[-1]):
            lines.append([])
            x = left
        if word is not None:
            lines[-1].append((x, *word))
            x += word[3]
    rows = -(-max(1, len(sample.images)) // 3)
    height = max(rows * (THUMBNAIL + MARGIN), (len(lines) + 1) * LINE) + 2 * MARGIN
    sheet = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(sample.images):
        picture = Image.fromarray(rearrange(image, "c h w -> h w c").numpy()).resize(
            (THUMBNAIL, THUMBNAIL), Image.Resampling.NEAREST
        )
        sheet.paste(picture, (MARGIN + i % 3 * (THUMBNAIL + MARGIN), MARGIN + i // 3 * (THUMBNAIL + MARGIN)))
    learned = sum(label != -100 for label in sample.labels)
    title = f"{sample.source} / {sample.key}: {len(sample.input_ids)} tokens, {learned} learned"
    draw.text((left, MARGIN), title, fill=(150, 60, 20), font=font)
    for number, line in enumerate(lines, start=1):
        y = MARGIN + number * LINE
        for x, text, is_learned, special, width in line:
            if is_learned:
                draw.rectangle((x, y, x + width, y + LINE - 2), fill=LEARNED)
            draw.text((x, y), text, fill=SPECIAL if special else PLAIN, font=font)
    draw.line((0, height - 1, WIDTH, height - 1), fill=(210, 210, 210))
    return sheet


def draw_samples(plan, tokenizer, *, image_size: int, count: int, out: Path, transform=None) -> None:
    """Draw the first `count` samples of the schedule, one below the other, with every view of each image."""
    import matplotlib
    from PIL import Image, ImageFont

    from fastvlm.data.dataset import PlannedDataset

    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), SIZE)
    dataset = PlannedDataset(plan, tokenizer=tokenizer, image_size=image_size, transform=transform)
    strips = [draw_sample(dataset.read(s, row), tokenizer, font) for s, row in plan.first_samples(count)]
    sheet = Image.new("RGB", (WIDTH, sum(s.height for s in strips)))
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)


def show(config) -> None:
    from fastvlm.build import build_transform
    from fastvlm.data.plan_report import notes, report

    plan, tokenizer = make_plan(config)
    print_report(report(plan, PREFIXES))
    for line in notes(plan):
        print(line)
    out = Path(config.out)
    images = {"image_size": config.image_size, "transform": build_transform(config)}
    draw_samples(plan, tokenizer, **images, count=config.samples, out=out)
    print(f"first {config.samples} samples (yellow: learned): {out.resolve()}")


if __name__ == "__main__":
    command("inspect", show)
