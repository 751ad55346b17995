"""Serve a model over HTTP: OpenAI's chat completions API, and a web page.

    python -m fastvlm.inference.server run=runs/latest                    # http://127.0.0.1:8000
    python -m fastvlm.inference.server run=runs/latest port=9000 levers=fast max_rows=16 allow_hosts=images.example.org

Needs the extra `serve` (pip install '.[serve]'). Keys are those of `Settings` (settings.py).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fastvlm.commands import run_command
from fastvlm.inference.settings import Settings, parse_settings


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & set(arguments):
        print(__doc__, Settings.__doc__)
        return
    settings = parse_settings(arguments)
    from fastvlm.inference.opening import MEGABYTE, check_source, open_engine

    check_source(settings.run)
    try:
        from fastvlm.inference import connections
        from fastvlm.inference.app import create_app
    except ImportError:
        raise ValueError("the server needs the extra `serve`: pip install '.[serve]'") from None

    engine = open_engine(
        settings.run,
        device=settings.device,
        levers=settings.levers,
        image_store_bytes=settings.image_store_mb * MEGABYTE,
        prefix_store_bytes=settings.prefix_store_mb * MEGABYTE,
    )
    connections.run(create_app(engine, settings), host=settings.host, port=settings.port)


if __name__ == "__main__":
    run_command(main)
