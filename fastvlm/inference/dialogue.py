"""A conversation in the terminal: its turns, its images, and the commands that change them."""

from __future__ import annotations

import http.client
import json
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from fastvlm.files import write_whole
from fastvlm.inference.partners import Local, Remote, Spent, from_openai, to_openai

PLACEHOLDER = "<image>"
COMMANDS = """/image PATH|URL ...  show the model images with your next message
/clear               forget the conversation and its images
/system [TEXT]       tell the model something before everything else; alone: take it back
/set [KEY=VALUE]     temperature, top_p, top_k, max_new_tokens, seed, stop; alone: show them
/retry               answer the last message again
/save FILE           keep the conversation, images included
/load FILE           go on with a kept one
/help                this text
/exit                leave (or Ctrl-D); Ctrl-C stops an answer
A message may hold <image> where an image belongs, or an image's path or address; otherwise images go first."""
# Numeric options: type, minimum, maximum, and the allowed range in words.
NUMBERS: dict[str, tuple[type, float, float, str]] = {
    "temperature": (float, 0.0, sys.float_info.max, "0 (greedy) or more"),
    "top_p": (float, 0.0, 1.0, "from 0 (the most probable token) to 1 (all tokens)"),
    "top_k": (int, 0, 10**6, "from 0 (all tokens) to 1000000"),
    "max_new_tokens": (int, 1, 10**6, "from 1 to 1000000"),
    "seed": (int, -(2**62), 2**62, "from -2**62 to 2**62"),
}
SUFFIXES = "png|jpe?g|webp|gif|bmp|tiff?"
# The path or URL of an image inside a sentence, bare (spaces escaped) or in quotes; a URL may have a query.
MENTION = re.compile(
    rf"""(?P<quote>['"])(?P<quoted>[^'"\n]+?\.(?:{SUFFIXES})(?:\?[^'"\s]+)?)(?P=quote)
    | (?P<bare>(?:\\\ |[^\s'"<>])+\.(?:{SUFFIXES})(?:\?[^\s'"<>]*[\w=&%/+-])?)
      (?=$|[\s,;:!)\]]|\?(?![\w=&%/+-])|\.(?:\s|$))""",
    re.IGNORECASE | re.VERBOSE,
)
MAX_BYTES = 64 << 20  # of an image fetched from a URL


def compose_content(prompt: str, *, num_images: int) -> list[dict]:
    """Return the parts of a user message: images in place of `<image>`, or first if there are no placeholders.

    Raises:
        ValueError: the number of placeholders is neither 0 nor that of the images.
    """
    pieces = prompt.split(PLACEHOLDER)
    slots = len(pieces) - 1
    if not slots:
        return [{"type": "image"}] * num_images + [{"type": "text", "text": prompt}]
    if slots != num_images:
        raise ValueError(
            f"the prompt has {slots} {PLACEHOLDER} placeholders, but {num_images} images were given: give one for each"
        )
    parts: list[dict] = []
    for i, piece in enumerate(pieces):
        parts += [{"type": "image"}] * (i > 0)
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def check_options(options: dict[str, Any]) -> dict[str, Any]:
    """Validate options of `Engine.generate` and convert them to the types it takes.

    Raises:
        ValueError: an unknown option, or a value of the wrong type or out of range.
    """
    checked: dict[str, Any] = {}
    for key, value in options.items():
        said = f"{key}={value}"[:80]
        if key == "stop":
            if not (isinstance(value, list) and all(isinstance(text, str) and text for text in value)):
                raise ValueError(f"{said}: stop takes texts that end an answer")
            checked[key] = value
            continue
        if key not in NUMBERS:
            raise ValueError(f"{key}: there are {', '.join((*NUMBERS, 'stop'))}")
        kind, least, most, words = NUMBERS[key]
        if isinstance(value, bool) or not isinstance(value, (int, kind)):
            raise ValueError(f"{said}: {key} takes a number, such as {key}=1")
        if not least <= value <= most:
            raise ValueError(f"{said}: {key} is {words}")
        checked[key] = kind(value)
    return checked


def expand(path: str) -> Path:
    """Expand `~` or `~user` in a path; an unknown user's is left unchanged, as a shell does."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def is_file(path: str) -> bool:
    """Return whether a path is an existing file; False if it is not a valid path."""
    try:
        return expand(path).is_file()
    except (OSError, ValueError):  # name too long, not accessible; null byte
        return False


def read_image(path: str) -> bytes:
    """Read an image from a path or an http(s) URL, check that it decodes, and return its encoded bytes.

    Raises:
        ValueError: no such file, the URL cannot be read, or it is not an image.
    """
    if path.startswith(("http://", "https://")):
        try:
            with urlopen(path, timeout=20) as reply:  # noqa: S310  on the user's machine, a URL the user typed
                data = reply.read(MAX_BYTES + 1)
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"image {path}: nothing to be had there ({reason})") from None
        if len(data) > MAX_BYTES:
            raise ValueError(f"image {path}: more than {MAX_BYTES} bytes")
    else:
        if not is_file(path):
            raise ValueError(f"image {path}: no such file")
        try:
            data = expand(path).read_bytes()
        except OSError as error:
            raise ValueError(f"image {path}: cannot be read ({error.strerror})") from None
    check_image(data, named=f"image {path}")
    return data


def check_image(data: bytes, *, named: str) -> None:
    """Decode an image to check it.

    Raises:
        ValueError: it cannot be decoded.
    """
    import io

    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = re.sub(r"<_io\.BytesIO object at \w+>", "the file", reason)
        raise ValueError(f"{named}: not an image that can be read ({reason})") from None


def mentioned_images(text: str) -> tuple[str, list[str]]:
    """Replace each existing image file and image URL in a message by `<image>`; return the text and these in order."""
    found: list[str] = []

    def exchange(match: re.Match) -> str:
        named = match["quoted"] or match["bare"].replace("\\ ", " ")
        if named.startswith(("http://", "https://")) or is_file(named):
            found.append(named)
            return PLACEHOLDER
        return match[0]

    return MENTION.sub(exchange, text), found


class Dialogue:
    """A conversation: its turns and images so far, and the images attached to the next message.

    Args:
        partner: generates the answers.
        options: of `Engine.generate`; `/set` changes them.
        streamed: print an answer piece by piece as it is generated.
        system: system prompt; empty is none.
    """

    def __init__(self, partner: Local | Remote, *, options: dict, streamed: bool, system: str = ""):
        self.partner, self.options, self.streamed, self.system = partner, dict(options), streamed, system
        self.clear()

    def clear(self) -> None:
        self.messages: list[dict] = []
        self.images: list[bytes] = []
        self.waiting: list[bytes] = []

    def take(self, line: str) -> None:
        """Handle a line typed by the user: a command or a message.

        Raises:
            ValueError: it cannot be carried out; the conversation has not changed.
        """
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if command == "/clear":
            self.clear()
        elif command == "/help":
            print(COMMANDS)
        elif command == "/image":
            self.attach(argument)
        elif command == "/system":
            self.system = argument
        elif command == "/set":
            self.set(argument)
        elif command == "/retry":
            self.retry()
        elif command == "/save":
            self.save(argument)
        elif command == "/load":
            self.load(argument)
        elif command.startswith("/") and not mentioned_images(line)[1]:
            raise ValueError(f"{command} is not a command; /help lists them")
        elif line:
            text, mentioned = mentioned_images(line)
            files = [read_image(path) for path in mentioned]
            if mentioned and (self.waiting or PLACEHOLDER in line):
                raise ValueError("a message takes images by /image and <image>, or by their paths, not by both")
            self.say(text, files=files)

    def attach(self, paths: str) -> None:
        """Attach images to the next message."""
        try:
            names = [paths] if is_file(paths) else shlex.split(paths)
        except ValueError:
            names = [paths]
        if not names:
            raise ValueError("/image needs a path or an address")
        self.waiting += [read_image(name) for name in names]

    def say(self, text: str, *, files: Sequence[bytes] = ()) -> None:
        """Answer a message; both turns are recorded only once the answer is complete."""
        files = [*self.waiting, *files]
        content = compose_content(text, num_images=len(files))
        messages = [*self.messages, {"role": "user", "content": content}]
        images = [*self.images, *files]
        spent = self._answer(messages, images)
        self.messages, self.images, self.waiting = [*messages, _assistant(spent)], images, []

    def retry(self) -> None:
        if not self.messages:
            raise ValueError("there is no message to answer again")
        # A new seed, so that a sampled answer differs; at temperature 0 it stays the same.
        before, self.options = self.options, self.options | {"seed": self.options.get("seed", 0) + 1}
        try:
            self.messages[-1] = _assistant(self._answer(self.messages[:-1], self.images))
        except BaseException:
            self.options = before
            raise

    def set(self, assignments: str) -> None:
        """Change options given as `key=value ...`; print all of them if there are none.

        Raises:
            ValueError: an unknown option, or an invalid value.
        """
        if not assignments:
            print(" ".join(f"{key}={value}" for key, value in self.options.items()))
            return
        options: dict[str, Any] = {}
        for assignment in shlex.split(assignments):
            key, _, value = assignment.partition("=")
            options[key] = value
            if key == "stop":
                options[key] = [value] if value else []
            elif key in NUMBERS:
                with suppress(ValueError):  # check_options reports it
                    options[key] = NUMBERS[key][0](value)
        try:
            self.options |= check_options(options)
        except ValueError as error:
            raise ValueError(f"/set {error}") from None

    def save(self, path: str) -> None:
        if not path:
            raise ValueError("/save needs a file's name")
        kept = {"system": self.system, "options": self.options, "messages": to_openai(self.messages, self.images)}
        try:
            write_whole(expand(path), json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error  # str(error) would name the temporary file
            raise ValueError(f"/save {path}: cannot be written ({reason}); what was there is as it was") from None
        print(f"[{len(self.messages)} messages and {len(self.images)} images in {path}]")

    def load(self, path: str) -> None:
        if not path or not is_file(path):
            raise ValueError(f"/load {path}: no such file")
        try:
            kept = json.loads(expand(path).read_text(encoding="utf-8"))
            messages, images = from_openai(kept["messages"])
            options, system = kept.get("options") or {}, kept.get("system") or ""
            if not isinstance(options, dict) or not isinstance(system, str):
                raise ValueError(
                    "its options are not an object" if isinstance(system, str) else "its system prompt is not text"
                )
            options = check_options(options)
            for i, image in enumerate(images, 1):
                check_image(image, named=f"image {i}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"/load {path}: not a conversation that /save wrote ({error})") from None
        self.messages, self.images, self.waiting, self.system = messages, images, [], system
        self.options |= options
        print(f"[{len(messages)} messages and {len(images)} images]")

    def _answer(self, messages: Sequence[dict], images: Sequence[bytes]) -> Spent:
        """Generate and print an answer, piece by piece if `streamed`, and its token counts and times."""
        told = [{"role": "system", "content": self.system}] if self.system else []
        pieces = self.partner.ask([*told, *messages], images, self.options)
        while True:
            try:
                piece = next(pieces)
            except StopIteration as end:
                spent = end.value
                break
            if self.streamed:
                print(piece, end="", flush=True)
        print("" if self.streamed else spent.text)
        print(spent.line())
        return spent


def _assistant(spent: Spent) -> dict:
    return {"role": "assistant", "content": spent.text}
