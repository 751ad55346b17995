"""The pool of processes that the recipes work in."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor


def open_pool(workers: int, *, fork: bool = True) -> ProcessPoolExecutor:
    """Processes that end with this one, however that ends.

    Args:
        fork: start them so where there is fork: a fresh interpreter imports for longer than a small part takes. Not
            behind the hub's clients, whose connections and threads do not survive a fork.
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
    """A worker ends with its parent; the parent alone answers Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
