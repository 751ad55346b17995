"""The bar of an evaluation, on a real terminal and where there is none; what it is told."""

import os
import pty
import re
import select

import pytest

from fastvlm.evaluation import progress as module
from fastvlm.evaluation.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


@pytest.fixture
def terminal(monkeypatch):
    """Makes a real terminal standard error; what it returns reads what stands on it."""
    outer, inner = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with os.fdopen(inner, "w") as screen:

        def put():
            monkeypatch.setattr(module.sys, "stderr", screen)  # not before the test: pytest sets it anew
            return read

        def read() -> str:
            screen.flush()
            shown = b""
            while select.select([outer], [], [], 0.5)[0]:  # a terminal hands on what it has, in pieces
                shown += os.read(outer, 1 << 16)
            return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())

        yield put
        monkeypatch.undo()
    os.close(outer)


def test_a_terminal_shows_a_bar_with_the_count_and_the_pace(terminal, clock):
    read = terminal()
    with Progress("vqav2") as progress:
        progress(40, 200)  # answered by a run before this one
        clock(10.0)
        progress(90, 200)
        progress.bar.refresh()
        assert progress.bar.tasks[0].completed == 90
    shown = read()
    assert "vqav2" in shown and "90/200" in shown and "5.0 questions/s" in shown
    assert progress.bar.finished is False and not progress.bar.live.is_started


def test_the_bar_goes_when_the_evaluation_fails(terminal):
    terminal()
    with pytest.raises(KeyError), Progress("vqav2") as progress:
        progress(1, 2)
        raise KeyError
    assert not progress.bar.live.is_started


def test_without_a_terminal_a_line_comes_now_and_then(capsys, clock):
    with Progress("gqa", every=30.0) as progress:
        for done in range(0, 101, 10):
            progress(done, 100)
            clock(10.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["gqa: 40 of 100 questions, 1.0 questions/s", "gqa: 80 of 100 questions, 1.0 questions/s"]


def test_ranks_that_are_not_the_first_say_nothing(capsys, clock, terminal):
    terminal()
    with Progress("gqa", shown=False, every=0.0) as progress:
        clock(10.0)
        progress(1, 2)
    assert progress.bar is None and not capsys.readouterr().err
