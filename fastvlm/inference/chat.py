"""Talk to a trained model in the terminal.

    python -m fastvlm.inference.chat run=runs/embedded --image digits.png --prompt "how many digits are there?"
    python -m fastvlm.inference.chat run=runs/embedded            # a conversation; /help lists its commands
    python -m fastvlm.inference.chat http://127.0.0.1:8000        # with a server

Prints the answer, and tokens and times of image, prompt and answer. `--image` can be repeated; the prompt may contain
as many `<image>` placeholders as there are images, otherwise the images go first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from fastvlm.commands import run_command
from fastvlm.inference.dialogue import COMMANDS, Dialogue, check_options, compose_content, read_image
from fastvlm.inference.partners import Local, Remote

ADDRESS = ("http://", "https://")


def converse(dialogue: Dialogue) -> None:
    """Read messages and commands from standard input until it ends."""
    prompt = ""
    if sys.stdin.isatty():
        import readline  # noqa: F401  gives input() history and editing

        prompt = "> "
        print(COMMANDS)
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            if line == "/exit":
                return
            dialogue.take(line)
        except KeyboardInterrupt:
            print("\n[stopped]")
        except (ValueError, OSError, FloatingPointError) as error:
            print(error, file=sys.stderr)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastvlm.inference.chat",
        description="Ask a trained model about images; without --prompt, hold a conversation.",
        epilog="Commands of a conversation:\n" + COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run",
        metavar="run=DIR",
        help="run directory that train.py wrote, a saved model's folder, or a server's address",
    )
    parser.add_argument("--image", action="append", default=[], metavar="PATH", help="an image; repeat for more")
    parser.add_argument("--prompt", help="one question; may hold <image> placeholders")
    parser.add_argument("--system", default="", metavar="TEXT", help="what the model is told before everything else")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="bound of an answer (64)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (0)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample among the K most probable tokens")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample within this probability mass")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (cpu)")
    parser.add_argument("--levers", default="", metavar="NAMES", help="what makes it faster, e.g. fast")
    parser.error = _refuse
    return parser.parse_args(arguments)


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"{message}; see --help")


def main(arguments: Sequence[str] | None = None) -> None:
    from fastvlm.inference.opening import check_source, open_engine

    args = parse_arguments(arguments)
    source = args.run.removeprefix("run=")
    if not source.startswith(ADDRESS):
        check_source(source)  # report mistakes before torch is imported
    files = [read_image(path) for path in args.image]
    if args.prompt is not None:
        compose_content(args.prompt, num_images=len(files))
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "stop", "seed")
    options = check_options({name: getattr(args, name) for name in names})
    if source.startswith(ADDRESS):
        partner = Remote(source)
    else:
        partner = Local(open_engine(source, device=args.device, levers=args.levers))
    dialogue = Dialogue(partner, options=options, streamed=sys.stdout.isatty(), system=args.system)
    dialogue.waiting = files
    if args.prompt is not None:
        dialogue.say(args.prompt)
    else:
        converse(dialogue)


if __name__ == "__main__":
    run_command(main, mistakes=(FloatingPointError,))
