"""Records of the nine families, for training and for evaluation.

A record is a pure function of (seed, family, split, number), independent of workers and of the build's scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

from data.recipes.embedded import photos
from data.recipes.embedded.questions import (
    FAMILY_TYPES,
    ORDINALS,
    answer,
    ask,
    choose_argument,
    describe,
    describe_at_length,
)
from data.recipes.embedded.world import Scene, World, encode_png, label_map, load_world, render

TRAIN_COUNTS = {  # records; `text` is not listed, since it has as many as its documents give
    "captions": 8000,
    "interleaved": 3000,
    "text_qa": 22000,
    "short_qa": 10000,
    "reading": 4000,
    "charts": 5000,
    "long_form": 2000,
    "cells": 6000,
}
FAMILIES = ("captions", "interleaved", "text", "text_qa", "short_qa", "reading", "charts", "long_form", "cells")
PER_TYPE = {"val": 60, "test": 100}  # records of each question type
HELD_OUT = {"val": 300, "test": 300}  # records of each family without questions
IMAGE = {"type": "image"}
GRID_TURNS = ("count", "nth", "nth", "position", "max", "min", "has", "has", "list")  # repeated types are likelier
REQUESTS = ("describe the picture in detail.", "tell me everything you see.")


@dataclass
class Composed:
    """A record and what its images show: a scene, or a photograph's name and crop."""

    key: str
    record: dict
    shown: list[Scene | tuple[str, tuple[int, int, int]]] = field(default_factory=list)


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def random_digits(count: int, rng: Random) -> list[int]:
    """Draw digits: half of the time uniform, else with a uniform largest or smallest digit, so each can be any."""
    kind = rng.random()
    if kind < 0.5:
        return [rng.randrange(10) for _ in range(count)]
    bound = rng.randrange(10)
    return bounded_digits(count, bound, largest=kind < 0.75, rng=rng)


def bounded_digits(count: int, bound: int, *, largest: bool, rng: Random) -> list[int]:
    """Draw digits whose largest (or smallest) is `bound`."""
    digits = [rng.randint(0, bound) if largest else rng.randint(bound, 9) for _ in range(count)]
    digits[rng.randrange(count)] = bound
    return digits


def random_scene(world: World, kind: str, rng: Random) -> Scene:
    if kind == "grid":
        return world.grid(random_digits(rng.randint(1, 4), rng), rng)
    if kind == "line":
        return world.line(random_digits(rng.randint(3, 4), rng), rng)
    if kind == "lines":
        return world.lines(*(random_digits(rng.randint(2, 4), rng) for _ in range(2)), rng)
    return world.chart(rng.sample(range(10), rng.randint(2, 5)), rng)


def pick_kind(rng: Random, **shares: float) -> str:
    return rng.choices(list(shares), list(shares.values()))[0]


def training_turns(scene: Scene, rng: Random) -> list[tuple[str, int | None]]:
    """Draw the distinct (type, argument) pairs of a training conversation, at most four."""
    if scene.kind == "chart":
        kinds = ["tallest", "shortest", "bars"]
        rng.shuffle(kinds)
        return [(kind, None) for kind in kinds[: rng.randint(2, 3)]]
    if scene.kind == "lines":
        turns = [("read_line", 0), ("read_line", 1)]
        rng.shuffle(turns)
        return turns
    if scene.kind == "line":
        turns = [("read", None), *((kind, choose_argument(scene, kind, rng)) for kind in ("nth", "has"))]
        rng.shuffle(turns)
        return turns
    asked: list[tuple[str, int | None]] = []
    for kind in rng.sample(GRID_TURNS, len(GRID_TURNS)):
        if kind in ("max", "min") and len(scene.digits) == 1:
            continue
        turn = (kind, choose_argument(scene, kind, rng))
        if turn not in asked:
            asked.append(turn)
    return asked[:4]


def target_scene(world: World, kind: str, number: int, rng: Random) -> tuple[Scene, int | None]:
    """Return scene and argument of evaluation question `number` of a type.

    Answers are taken in turn, so that no answer is a good guess.
    """
    argument = None
    if kind in ("tallest", "shortest"):
        scene = world.chart(rng.sample(range(10), rng.randint(2, 5)), rng)
        at, wanted = (scene.tallest if kind == "tallest" else scene.shortest), number % 10
        labels = list(scene.digits)
        if wanted in labels:
            other = labels.index(wanted)
            labels[at], labels[other] = labels[other], labels[at]
        labels[at] = wanted
        glyphs = (world.glyph(d, g.x, g.y, g.size, g.colour, rng) for d, g in zip(labels, scene.glyphs))
        return Scene("chart", (tuple(labels),), tuple(glyphs), scene.bars, scene.tallest, scene.shortest), None
    if kind == "bars":
        return world.chart(rng.sample(range(10), 2 + number % 4), rng), None
    if kind == "read":
        return world.line([rng.randrange(10) for _ in range(3 + number % 2)], rng), None
    if kind == "read_line":
        return random_scene(world, "lines", rng), number % 2
    if kind in ("count", "list"):
        digits = [rng.randrange(10) for _ in range(1 + number % 4)]
    elif kind in ("max", "min"):
        digits = bounded_digits(rng.randint(2, 4), number % 10, largest=kind == "max", rng=rng)
    elif kind in ("nth", "position"):
        digits = [rng.randrange(10) for _ in range(rng.randint(2, 4))]
        argument = rng.randrange(len(digits))
        digits[argument] = number % 10
    else:  # has: yes and no in turn, for every digit alike
        argument = number // 2 % 10
        digits = [rng.choice([d for d in range(10) if d != argument]) for _ in range(rng.randint(2, 4))]
        if number % 2:
            digits[rng.randrange(len(digits))] = argument
    return world.grid(digits, rng), argument


def conversation(
    scene: Scene, turns: list[tuple[str, int | None]], rng: Random, *, in_words: bool, single: bool
) -> dict:
    """Compose a conversation about a picture, or about its description if `in_words`."""
    messages = []
    for i, (kind, argument) in enumerate(turns):
        question = ask(kind, argument, rng)
        if i == 0:
            premise = describe(scene, colours=rng.random() < 0.3) if in_words else ""
            question = f"{premise} {question}" if in_words else [IMAGE, text_part(question)]
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer(scene, kind, argument)})
    kinds = [kind for kind, _ in turns]
    return {"messages": messages, "meta": {"type": kinds[0]} if single else {"types": kinds}}


def compose(family: str, world: World, number: int, rng: Random) -> Composed:
    """Compose record `number` of a family in the world's split; see FAMILIES."""
    key = f"{world.split}-{number:06d}"
    if family in FAMILY_TYPES:
        if world.split == "train":
            shares = {
                "short_qa": {"grid": 1.0},
                "reading": {"line": 0.5, "lines": 0.5},
                "charts": {"chart": 1.0},
                "text_qa": {"grid": 0.65, "line": 0.08, "lines": 0.12, "chart": 0.15},
            }[family]
            scene = random_scene(world, pick_kind(rng, **shares), rng)
            turns = training_turns(scene, rng)
        else:
            kinds = FAMILY_TYPES[family]
            kind = kinds[number % len(kinds)]
            scene, argument = target_scene(world, kind, number // len(kinds), rng)
            turns = [(kind, argument)]
        in_words = family == "text_qa"
        record = conversation(scene, turns, rng, in_words=in_words, single=world.split != "train")
        record["meta"]["scene"] = scene.summary
        return Composed(key, record, [] if in_words else [scene])

    if family == "interleaved":
        kind = pick_kind(rng, grid=0.7, line=0.15, chart=0.15)
        scenes = [random_scene(world, kind, rng) for _ in range(rng.randint(2, 3))]
        parts = [part for scene in scenes for part in (IMAGE, text_part(describe(scene)))]
        longest = sorted(range(len(scenes)), key=lambda i: -len(scenes[i].digits))
        noun = "bars" if kind == "chart" else "digits"
        if len(scenes[longest[0]].digits) > len(scenes[longest[1]].digits):
            parts[-1] = text_part(f"{parts[-1]['text']} the {ORDINALS[longest[0]]} picture has the most {noun}.")
        return Composed(key, {"document": parts, "meta": {"scenes": [s.summary for s in scenes]}}, scenes)

    kinds = {"captions": {"grid": 0.57, "line": 0.1, "lines": 0.1, "chart": 0.2, "photo": 0.03}}
    kind = pick_kind(rng, **kinds.get(family, {"grid": 0.5, "line": 0.12, "lines": 0.18, "chart": 0.2}))
    if kind == "photo":
        name = rng.choice(photos.PHOTOS)
        crop = photos.choose_crop(name, world.split, rng)
        document = [IMAGE, text_part(photos.describe_crop(name, crop))]
        return Composed(key, {"document": document, "meta": {"scene": f"photo {name}"}}, [(name, crop)])
    scene = random_scene(world, kind, rng)
    meta = {"scene": scene.summary}
    if family == "captions":
        document = [IMAGE, text_part(describe(scene, colours=True))]
        return Composed(key, {"document": document, "meta": meta}, [scene])
    if family == "cells":
        return Composed(key, {"document": [IMAGE], "meta": meta}, [scene])
    messages = [
        {"role": "user", "content": [IMAGE, text_part(rng.choice(REQUESTS))]},
        {"role": "assistant", "content": describe_at_length(scene)},
    ]
    return Composed(key, {"messages": messages, "meta": {"types": ["describe"], **meta}}, [scene])


def count_records(family: str, split: str, scale: float) -> int:
    """Return the number of records of a family other than `text` at this scale; evaluation keeps types balanced."""
    if split == "train":
        return max(8, round(TRAIN_COUNTS[family] * scale))
    if family in FAMILY_TYPES:
        return len(FAMILY_TYPES[family]) * max(4, round(PER_TYPE[split] * scale))
    return max(8, round(HELD_OUT[split] * scale))


def compose_split(
    family: str, split: str, *, seed: int, scale: float = 1.0, limit: int | None = None
) -> Iterator[tuple[Composed, Random]]:
    """Yield the records of a split of a family other than `text`, each with its random generator."""
    world = load_world(split)
    count = count_records(family, split, scale)
    for number in range(count if limit is None else min(count, limit)):
        rng = Random(f"{seed} {family} {split} {number}")
        yield compose(family, world, number, rng), rng


def draw(composed: Composed, world_scans, rng: Random) -> list[bytes]:
    """Render the record's images as PNG files."""
    images = []
    for shown in composed.shown:
        if isinstance(shown, Scene):
            images.append(encode_png(*render(shown, world_scans, rng), level=6))
        else:
            images.append(encode_png(photos.render_crop(*shown)))
    return images


def draw_labels(composed: Composed) -> list[bytes]:
    """Encode the dense label maps of the record's scenes as PNG files."""
    return [encode_png(label_map(scene)) for scene in composed.shown]


def record_texts(record: dict) -> list[str]:
    """Return a record's texts as the tokenizer will receive them."""
    contents = [m["content"] for m in record["messages"]] if "messages" in record else [record["document"]]
    texts = []
    for content in contents:
        parts = [text_part(content)] if isinstance(content, str) else content
        texts += [part["text"] for part in parts if part["type"] == "text"]
    return texts
