"""Descriptions, questions and answers, with the same words for a picture and for its description in text.

A small model can answer about pictures only what it has learnt to answer about sentences, so `describe` is both the
caption of a picture and the premise of text-only questions.
"""

from __future__ import annotations

from random import Random

from data.recipes.embedded.world import Scene

NUMBERS = ("zero", "one", "two", "three", "four", "five")
ORDINALS = ("first", "second", "third", "fourth")
CORNERS = ("top left", "top right", "bottom left", "bottom right")

PHRASES = {
    "count": ("how many digits are there?", "count the digits."),
    "nth": ("what is the {} digit?", "which digit is {}?"),
    "position": ("what is the digit at the {}?", "which digit is at the {}?"),
    "max": ("what is the largest digit?", "which digit is the largest?"),
    "min": ("what is the smallest digit?", "which digit is the smallest?"),
    "has": ("is there a {}?", "do you see a {}?"),
    "list": ("list the digits.", "name all the digits."),
    "read": ("what does the line say?", "read the line."),
    "read_line": ("what does the {} line say?", "read the {} line."),
    "tallest": ("what is the label of the tallest bar?", "which label is under the tallest bar?"),
    "shortest": ("what is the label of the shortest bar?", "which label is under the shortest bar?"),
    "bars": ("how many bars are there?", "count the bars."),
}
TYPES = tuple(PHRASES)
FAMILY_TYPES = {
    "short_qa": ("count", "nth", "position", "max", "min", "has", "list"),
    "reading": ("read", "read_line"),
    "charts": ("tallest", "shortest", "bars"),
    "text_qa": TYPES,
}


def spell(digits) -> str:
    return " ".join(map(str, digits))


def plural(count: int, noun: str) -> str:
    return f"{NUMBERS[count]} {noun}{'' if count == 1 else 's'}"


def describe(scene: Scene, *, colours: bool = False) -> str:
    """Return the caption: count and content, in reading order."""
    digits = scene.digits
    if scene.kind == "grid":
        text = f"{plural(len(digits), 'digit')}: {spell(digits)}."
    elif scene.kind == "line":
        text = f"one line: {spell(digits)}."
    elif scene.kind == "lines":
        text = f"two lines: {spell(digits)}. {spell(scene.groups[1])}."
    else:
        text = f"a chart with {plural(len(digits), 'bar')}. labels: {spell(digits)}."
        return text + f" tallest {digits[scene.tallest]}, shortest {digits[scene.shortest]}."
    if colours:
        inks = {glyph.colour for glyph in scene.glyphs}
        text += f" all in {inks.pop()}." if len(inks) == 1 else " in several colours."
    return text


def describe_at_length(scene: Scene) -> str:
    """Return a full description in several sentences."""
    digits = scene.digits
    if scene.kind == "grid":
        sentences = [f"the picture shows {plural(len(digits), 'digit')}"]
        for i, glyph in enumerate(scene.glyphs):
            sentences.append(f"the {ORDINALS[i]}, at the {CORNERS[i]}, is a {glyph.colour} {glyph.digit}")
        sentences.append(f"the largest digit is {max(digits)} and the smallest is {min(digits)}")
    elif scene.kind == "line":
        sentences = [f"the picture shows one line of {plural(len(digits), 'digit')}", f"it says {spell(digits)}"]
        sentences += [f"it is written in {scene.glyphs[0].colour}"]
        sentences += [f"the first digit is {digits[0]} and the last is {digits[-1]}"]
    elif scene.kind == "lines":
        sentences = ["the picture shows two lines of digits"]
        for name, group, glyph in zip(ORDINALS, scene.groups, (scene.glyphs[0], scene.glyphs[-1])):
            sentences.append(f"the {name} line says {spell(group)}, in {glyph.colour}")
    else:
        sentences = [f"the picture is a chart with {plural(len(digits), 'bar')}"]
        sentences.append(f"the labels under the bars are {spell(digits)}")
        sentences.append(f"the tallest bar stands over {digits[scene.tallest]}")
        sentences.append(f"the shortest bar stands over {digits[scene.shortest]}")
    return ". ".join(sentences) + "."


def choose_argument(scene: Scene, kind: str, rng: Random) -> int | None:
    """Draw what a question asks about: the index of a digit or line, a digit to look for, or None."""
    if kind in ("nth", "position"):
        return rng.randrange(len(scene.digits))
    if kind == "read_line":
        return rng.randrange(2)
    if kind == "has":
        present = set(scene.digits)
        absent = [d for d in range(10) if d not in present]
        return rng.choice(sorted(present) if rng.random() < 0.5 else absent)
    return None


def ask(kind: str, argument: int | None, rng: Random) -> str:
    """Return the question in a random phrasing."""
    word = {"nth": ORDINALS, "read_line": ORDINALS, "position": CORNERS}.get(kind)
    return rng.choice(PHRASES[kind]).format(word[argument] if word else argument)


def answer(scene: Scene, kind: str, argument: int | None = None) -> str:
    """Return the only correct answer."""
    digits = scene.digits
    if kind in ("count", "bars"):
        return NUMBERS[len(digits)]
    if kind in ("nth", "position"):
        return str(digits[argument])
    if kind in ("max", "min"):
        return str(max(digits) if kind == "max" else min(digits))
    if kind == "has":
        return "yes" if argument in digits else "no"
    if kind in ("list", "read"):
        return spell(digits)
    if kind == "read_line":
        return spell(scene.groups[argument])
    return str(digits[scene.tallest if kind == "tallest" else scene.shortest])
