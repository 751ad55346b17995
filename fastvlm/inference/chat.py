"""Talk to a trained model.

    python -m fastvlm.inference.chat run=runs/embedded --image digits.png --prompt "how many digits are there?"

prints the answer and what image, prompt and answer cost. `--image` may stand several times; the prompt may hold as many
`<image>` placeholders, otherwise the images go first. Without --prompt a conversation starts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from torch import Tensor

    from fastvlm.inference.engine import Engine, Generation

PLACEHOLDER = "<image>"
COMMANDS = """/image PATH   show the model an image with your next message (several are fine)
/clear        forget the conversation and its images
/help         this text
/exit         leave (or Ctrl-D); Ctrl-C stops an answer
A message may hold <image> where an image belongs; otherwise images go first."""


def compose_content(prompt: str, *, num_images: int) -> list[dict]:
    """Parts of a user's message: images where `<image>` stands, or all of them first.

    Raises:
        ValueError: there are placeholders, but not as many as images.
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


def read_image(path: str | Path) -> bytes:
    """The bytes of an image file that can be decoded.

    Raises:
        ValueError: no such file, or no image in it.
    """
    from PIL import Image

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"image {path}: no such file")
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"image {path}: not an image that can be read ({reason})") from None
    return path.read_bytes()


def describe_cost(generation: Generation, *, num_images: int) -> str:
    """One line: tokens and milliseconds of images, prompt and answer."""
    image = (
        f"{num_images} image{'s' * (num_images > 1)}: {generation.num_image_tokens} tokens, "
        f"{1000 * generation.image_seconds:.1f} ms"
        if num_images
        else "no image"
    )
    return (
        f"[{image} | prompt: {generation.num_prompt_tokens} tokens, {1000 * generation.prefill_seconds:.1f} ms | "
        f"answer: {len(generation.token_ids)} tokens, {generation.tokens_per_second:.0f} tokens/s]"
    )


def answer(engine: Engine, record: dict, images: Sequence[Tensor], *, streamed: bool, options: dict) -> Generation:
    """Print the answer, piece by piece where somebody watches, and its cost."""
    if streamed:
        pieces = engine.stream(record, images, **options)
        while True:
            try:
                print(next(pieces), end="", flush=True)
            except StopIteration as end:
                generation = end.value
                break
        print()
    else:
        generation = engine.generate([record], [images], **options)[0]
        print(generation.text)
    print(describe_cost(generation, num_images=len(images)))
    return generation


class Conversation:
    """Turns so far with their images, and images waiting for the next message."""

    def __init__(self, engine: Engine, *, options: dict, streamed: bool):
        self.engine, self.options, self.streamed = engine, options, streamed
        self.clear()

    def clear(self) -> None:
        self.messages: list[dict] = []
        self.images: list[Tensor] = []
        self.waiting: list[Tensor] = []

    def attach(self, path: str) -> None:
        """An image for the next message."""
        self.waiting.append(self.engine.transform(read_image(path)))

    def say(self, text: str) -> None:
        """Answer a message; the turn counts only once it is answered."""
        content = compose_content(text, num_images=len(self.waiting))
        messages = [*self.messages, {"role": "user", "content": content}]
        images = [*self.images, *self.waiting]
        generation = answer(self.engine, {"messages": messages}, images, streamed=self.streamed, options=self.options)
        self.messages = [*messages, {"role": "assistant", "content": generation.text}]
        self.images, self.waiting = images, []


def converse(conversation: Conversation) -> None:
    """Read messages and commands from standard input until it ends."""
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        print(COMMANDS)
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, argument = line.partition(" ")
        try:
            if command == "/exit":
                return
            elif command == "/clear":
                conversation.clear()
            elif command == "/help":
                print(COMMANDS)
            elif command == "/image":
                conversation.attach(argument.strip())
            elif command.startswith("/"):
                print(f"{command} is not a command; /help lists them", file=sys.stderr)
            elif line:
                conversation.say(line)
        except KeyboardInterrupt:
            print("\n[stopped]")
        except ValueError as error:
            print(f"{error} (/clear forgets the conversation)", file=sys.stderr)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastvlm.inference.chat",
        description="Ask a trained model about images; without --prompt, hold a conversation.",
        epilog="Commands of a conversation:\n" + COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="run=DIR", help="run directory that train.py wrote")
    parser.add_argument("--image", action="append", default=[], metavar="PATH", help="an image; repeat for more")
    parser.add_argument("--prompt", help="one question; may hold <image> placeholders")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="bound of an answer (64)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (0)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample among the K most probable tokens")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample within this probability mass")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (cpu)")
    parser.error = _refuse
    return parser.parse_args(arguments)


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"{message}; see --help")


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    run = Path(args.run.removeprefix("run="))
    # What can be wrong is looked at before torch is imported.
    if not run.is_dir():
        raise ValueError(f"run={run}: no such run directory; train one with `make train`, or name one below runs/")
    if not (run / "config.yaml").is_file():
        raise ValueError(f"run={run} holds no run (config.yaml is missing); name a directory below runs/")
    files = [read_image(path) for path in args.image]
    content = None if args.prompt is None else compose_content(args.prompt, num_images=len(files))

    import torch

    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device}: {str(error).splitlines()[0]}") from None

    from fastvlm.build import build_transform, load_run
    from fastvlm.inference.engine import Engine

    model, tokenizer, config = load_run(run)
    transform = build_transform(config)
    engine = Engine(model, tokenizer, image_size=config.image_size, transform=transform, device=args.device)
    options = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "stop": args.stop,
        "seed": args.seed,
    }
    streamed = sys.stdout.isatty()
    images = [engine.transform(data) for data in files]
    if content is not None:
        record = {"messages": [{"role": "user", "content": content}]}
        answer(engine, record, images, streamed=streamed, options=options)
        return
    conversation = Conversation(engine, options=options, streamed=streamed)
    conversation.waiting = images
    converse(conversation)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        print(str(error) or repr(error), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
