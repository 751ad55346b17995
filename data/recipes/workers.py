"""Process pool for the recipes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor


def open_pool(workers: int, *, fork: bool = True) -> ProcessPoolExecutor:
    """Open a pool whose processes exit when this process ends, however it ends.

    Args:
        fork: start workers by fork if the platform has it: in a fresh interpreter, imports take longer than a small
            part. Must be false once the hub's clients are in use, whose connections and threads do not survive a fork.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    method = "fork" if fork and "fork" in multiprocessing.get_all_start_methods() else "spawn"
    return ProcessPoolExecutor(
        max(1, workers),
        mp_context=multiprocessing.get_context(method),
        initializer=start_worker,
        initargs=(os.getpid(),),
    )


def start_worker(parent: int) -> None:
    """Make a worker exit with its parent and leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
