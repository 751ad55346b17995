"""Commands without Hydra: a user's mistake is one line, as in `fastvlm.config.command_line`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from fastvlm.files import refusal

PACKAGE = str(Path(__file__).parent)
PYTHONS_FORMAT = warnings.formatwarning


def format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Format this package's own warnings as `warning: ...`, others as Python does."""
    if filename.startswith(PACKAGE):
        return f"warning: {message}\n"
    return PYTHONS_FORMAT(message, category, filename, lineno, line)


def run_command(main: Callable[[], None], *, mistakes: tuple[type[Exception], ...] = ()) -> None:
    """Call `main`. A mistake is printed as `error: ...` and ends with exit status 2, Ctrl-C with 130.

    Args:
        mistakes: exceptions that are the user's, besides ValueError and FileNotFoundError.
    """
    warnings.formatwarning = format_warning
    try:
        main()
    except (ValueError, FileNotFoundError, *mistakes) as error:
        print(f"error: {str(error) or repr(error)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if (reason := refusal(error)) is None:
            raise
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
