import io
import os
import pty
import re
import threading
import time

import lightning as L
from rich.console import Console

from fastvlm.callbacks.metrics import Metrics
from fastvlm.callbacks.progress import Progress, clock, shorten


def test_without_a_terminal_there_are_plain_lines_and_one_at_the_end(fit):
    out = io.StringIO()
    fit(30, [Metrics(5), Progress(interval=0.0, console=Console(file=out))])
    lines = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue() and "━" not in out.getvalue() and len(lines) == 31
    assert re.match(
        r"tiny  20/30  loss \d\.\d{3}  [\d.]+k tok/s  lr 1\.0e-02  wait \d+%  mem [\d.]+G  eta 0:\d\d$", lines[19]
    )
    assert re.match(r"tiny  done  30/30 steps  loss \d\.\d+  val \d\.\d+  [\d.]+k tok/s  0:\d\d$", lines[-1])


def test_lines_are_seconds_apart(fit):
    out = io.StringIO()
    fit(30, [Metrics(5), Progress(interval=60, console=Console(file=out))])
    assert len(out.getvalue().splitlines()) == 1


class Pause(L.Callback):
    """Long enough for the bar to be drawn several times."""

    def on_train_batch_end(self, *_):
        time.sleep(0.03)


def test_on_a_terminal_one_line_per_stage_stays(fit):
    """Under a real pseudo-terminal, with Lightning's own bar asked for."""
    leader, follower = pty.openpty()
    read: list[bytes] = []

    def drain():
        while True:
            try:
                read.append(os.read(leader, 65536))
            except OSError:  # the other side is closed
                return

    reader = threading.Thread(target=drain)
    reader.start()
    with os.fdopen(follower, "w") as terminal:
        console = Console(file=terminal, width=100, color_system="standard")
        assert console.is_terminal
        fit(20, [Metrics(5), Progress(console=console), Pause()], enable_progress_bar=True)
    reader.join(10)
    os.close(leader)
    shown = b"".join(read).decode()
    assert "━" in shown and "eta" in shown and "Epoch" not in shown
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).strip().splitlines()[-1]
    assert re.search(r"✓ tiny  20/20 steps  ·  loss \d\.\d+  ·  val \d\.\d+", last)


def test_figures_are_short():
    assert [shorten(v) for v in (0.5, 12, 12_345, 3.2e6)] == ["0.5", "12", "12.3k", "3.2M"]
    assert [clock(s) for s in (5, 75, 3675)] == ["0:05", "1:15", "1:01:15"]
