"""Commands without Hydra: a user's mistake is one line, as in `fastvlm.config.command_line`."""

from __future__ import annotations

import sys
from collections.abc import Callable

from fastvlm.files import refusal


def run_command(main: Callable[[], None], *, mistakes: tuple[type[Exception], ...] = ()) -> None:
    """Call `main`. A mistake is printed as `error: ...` and ends with exit status 2, Ctrl-C with 130.

    Args:
        mistakes: exceptions that are the user's, besides ValueError and FileNotFoundError.
    """
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
