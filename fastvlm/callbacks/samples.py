"""Show the same held-out samples at every validation: image, prompt, reference, and the model's current answer."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Record = dict[str, Any]
COLOURS = {"right": "#1a7f37", "wrong": "#b35900", "text": "#1f2328", "label": "#6e7781", "rule": "#d0d7de"}


def split_reference(record: Record) -> tuple[Record, str]:
    """Split a record into the prompt and the reference, which is the last assistant turn or a document's last text.

    Raises:
        ValueError: the record has no such text.
    """
    if "messages" in record:
        messages = record["messages"]
        at = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
        if at is None:
            raise ValueError(f"a sample to show needs an assistant turn: {str(messages)[:80]}")
        return {**record, "messages": messages[:at]}, plain_text(messages[at]["content"])
    parts = record["document"]
    at = max((i for i, p in enumerate(parts) if p["type"] == "text"), default=None)
    if at is None:
        raise ValueError(f"a sample to show needs a text: {str(parts)[:80]}")
    if at == 0:  # there is nothing before it, so its first words become the prompt
        words = parts[0]["text"].split(" ")
        cut = max(1, min(20, len(words) // 2))
        start = {"type": "text", "text": " ".join(words[:cut])}
        return {**record, "document": [start]}, " ".join(words[cut : cut + 30])
    return {**record, "document": parts[:at]}, parts[at]["text"]


def plain_text(content: str | list[dict]) -> str:
    """Return a turn's text, with `[image]` for each image."""
    if isinstance(content, str):
        return content
    return " ".join("[image]" if part["type"] == "image" else part["text"] for part in content).strip()


def prompt_text(prompt: Record) -> str:
    """Return the prompt as readable text."""
    if "document" in prompt:
        return plain_text(prompt["document"])
    return "\n".join(plain_text(message["content"]) for message in prompt["messages"])


def same_answer(prediction: str, reference: str) -> bool:
    return " ".join(prediction.lower().split()).rstrip(".") == " ".join(reference.lower().split()).rstrip(".")


def to_picture(image: Any) -> Image.Image:
    """Convert a uint8 (3, H, W) tensor, the first view of a (v, 3, H, W) tensor, or a PIL image to an RGB PIL image."""
    if isinstance(image, Tensor):
        image = image[0] if image.ndim == 4 else image
        return Image.fromarray(image.detach().cpu().permute(1, 2, 0).contiguous().numpy())
    return image.convert("RGB")


def draw_grid(rows: Sequence[dict[str, Any]], pictures: Sequence[Sequence[Any]], *, title: str = "") -> Image.Image:
    """Draw all samples in one picture, two per line: image left; prompt, reference and prediction right.

    Args:
        rows: a dict with `prompt`, `reference`, `prediction` and `correct` for each sample.
        pictures: the images (tensors or PIL) of each sample, possibly none.
    """
    side, width, pad, line = 176, 620, 14, 19
    font, bold = _font(14), _font(14, bold=True)
    cells = []
    for row, images in zip(rows, pictures, strict=True):
        lines: list[tuple[str, str]] = []
        for label, key, limit in (("prompt", "prompt", 4), ("reference", "reference", 2), ("model", "prediction", 3)):
            wrapped = [w for part in row[key].splitlines() or [""] for w in textwrap.wrap(part, 46) or [""]]
            if len(wrapped) > limit:
                wrapped = [*wrapped[: limit - 1], wrapped[limit - 1][:44] + " …"]
            colour = COLOURS["right" if row["correct"] else "wrong"] if key == "prediction" else COLOURS["text"]
            lines.append((label, COLOURS["label"]))
            lines += [(text, colour) for text in wrapped or [""]]
        cells.append((lines, images, max(side, line * len(lines)) + 2 * pad))
    columns = 2 if len(cells) > 1 else 1
    heights = [max(c[2] for c in cells[i : i + columns]) for i in range(0, len(cells), columns)]
    top = 34 if title else 0
    grid = Image.new("RGB", (width * columns, sum(heights) + top), "white")
    draw = ImageDraw.Draw(grid)
    draw.text((pad, 9), title, fill=COLOURS["text"], font=bold)
    y = top
    for i, height in enumerate(heights):
        for j, (lines, images, _) in enumerate(cells[i * columns : (i + 1) * columns]):
            x = j * width
            draw.rectangle((x, y, x + width - 1, y + height - 1), outline=COLOURS["rule"])
            shown = [to_picture(image) for image in images][:4]
            # Several images of one sample share the space of one.
            per_line = 1 if len(shown) <= 1 else 2
            small = side // per_line
            for k, picture in enumerate(shown):
                # Nearest-neighbour keeps the pixels of a small picture visible when it is enlarged.
                how = Image.Resampling.NEAREST if picture.width < small else Image.Resampling.LANCZOS
                scale = small / max(picture.size)
                size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
                at = x + pad + (k % per_line) * small, y + pad + (k // per_line) * small
                grid.paste(picture.resize(size, how), at)
            left, text_y = x + pad + (side + pad if shown else 0), y + pad
            for text, colour in lines:
                weight = bold if colour in (COLOURS["right"], COLOURS["wrong"]) else font
                draw.text((left, text_y), text, fill=colour, font=weight)
                text_y += line
        y += height
    return grid


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    # Pillow's built-in font has only Latin letters; matplotlib ships DejaVu.
    from matplotlib import get_data_path

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / name, size)


class Samples(Callback):
    """Writes `<stage>/samples/step-XXXXXX.{png,json}` after every validation, and passes both to the loggers.

    Args:
        num: number of samples.
        generate: `(model, prompts, images) -> answers`; a prompt is a record without its reference, and `images` has
            one list of images per record.
        records: function of `num` that returns pairs (record, its images), called once at the first validation; None:
            the data module's `held_out`. An image is a uint8 (3, H, W) or (v, 3, H, W) tensor or a PIL image.
        folder: folder of the stage; None: `trainer.default_root_dir`.

    Raises:
        ValueError: (setup) there is neither `records` nor a data module with `held_out`.
    """

    def __init__(
        self,
        num: int = 8,
        *,
        generate: Callable[[Any, list[Record], list[list[Any]]], list[str]],
        records: Callable[[int], Sequence[tuple[Record, list[Any]]]] | None = None,
        folder: str | Path | None = None,
    ):
        self.generate, self.records, self.num = generate, records, num
        self.folder = Path(folder) if folder else None
        self._chosen: list[tuple[Record, str, list[Any]]] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.records is None:
            self.records = getattr(trainer.datamodule, "held_out", None)
        if self.records is None:
            raise ValueError("Samples needs `records`, or a data module with a method `held_out(num)`")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or self.num < 1:
            return
        if self._chosen is None:
            records = list(self.records(self.num))[: self.num]
            self._chosen = [(*split_reference(record), list(images)) for record, images in records]
        if not self._chosen:
            return
        prompts, references, images = (list(column) for column in zip(*self._chosen))
        model = getattr(pl_module, "model", pl_module)
        # Every rank generates: a sharded model needs all of them in its forward pass.
        modes = [(module, module.training) for module in pl_module.modules()]
        cuda = [pl_module.device] if pl_module.device.type == "cuda" else []
        with torch.inference_mode(), torch.random.fork_rng(devices=cuda):
            answers = self.generate(model, prompts, images)
        # Generation puts the model in eval mode; restore every module's mode.
        for module, training in modes:
            module.training = training
        if not trainer.is_global_zero:
            return
        if len(answers) != len(prompts):
            raise ValueError(f"generate returned {len(answers)} answers to {len(prompts)} prompts")
        rows = [
            {
                "prompt": prompt_text(prompt),
                "reference": reference,
                "prediction": answer,
                "correct": same_answer(answer, reference),
            }
            for prompt, reference, answer in zip(prompts, references, answers)
        ]
        step, name = trainer.global_step, getattr(pl_module, "name", type(pl_module).__name__)
        folder = (self.folder or Path(trainer.default_root_dir)) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{step:06d}.png"
        draw_grid(rows, images, title=f"{name}, step {step}").save(path)
        text = json.dumps({"stage": name, "step": step, "samples": rows}, indent=1, ensure_ascii=False)
        path.with_suffix(".json").write_text(text)
        for logger in trainer.loggers:
            if hasattr(logger, "log_file"):
                logger.log_file(path, "samples")
                logger.log_file(path.with_suffix(".json"), "samples")
