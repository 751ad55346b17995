"""A program that a model wrote reaches nothing and ends; and code tasks score by it."""

import json
import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from fastvlm.harnesses.code_eval import CodeEval, pass_at_k
from fastvlm.harnesses.sandbox import Outcome, check_sandbox, run_python

ROOT = Path(__file__).resolve().parent.parent.parent
SYSTEM_PYTHON = "/usr/bin/python3"  # which any user may run; ours may lie in a folder of root's
NOBODY = 65534

try:
    check_sandbox()
except ValueError as error:
    pytest.skip(str(error), allow_module_level=True)


def test_a_program_that_reaches_its_end_passes_and_says_what_it_said():
    outcome = run_python("import math\nprint(math.pi > 3)")
    assert outcome.passed and outcome.said == "True\n" and not outcome.timed_out


@pytest.mark.parametrize(
    "program, words",
    [
        ("import socket; socket.create_connection(('127.0.0.1', 9))", "Network is unreachable"),
        ("import socket; socket.create_connection(('192.0.2.1', 80))", "Network is unreachable"),
        ("open({secret!r}).read()", "Permission denied"),
        ("open({secret!r}, 'w')", "Permission denied"),
        ("import os; os.remove({secret!r})", "Permission denied"),
        ("import os; os.listdir('/home')", "Permission denied"),
        ("import os; print(os.listdir('/proc'))", "Permission denied"),
        ("open('big', 'wb').write(b'x' * (1 << 26))", "No space left on device"),
        ("for i in range(5000): open(str(i), 'w').close()", "No space left on device"),
        ("import os; os.memfd_create('x')", "Function not implemented"),
        ("import ctypes; assert ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) >= 0", "AssertionError"),
        ("import ctypes; assert ctypes.CDLL(None).mount(b'x', b'.', b'tmpfs', 0, None) == 0", "AssertionError"),
        ("import os; os.setuid(0)", "Operation not permitted"),
        ("x = 'a' * (1 << 32)", "MemoryError"),
        ("assert 1 == 2", "AssertionError"),
        ("import sys; sys.exit(0)", ""),
        ("import os; os._exit(0)", ""),
        ("import os; os._exit(97)", ""),
        ("print('passed'); raise SystemExit", "passed"),
    ],
)
def test_a_program_is_kept_from(program, words, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("keep")
    outcome = run_python(program.replace("{secret!r}", repr(str(secret))))
    assert not outcome.passed and words in outcome.said
    assert secret.read_text() == "keep"


def test_a_program_and_what_it_started_ends_in_time():
    loops = run_python("while True: pass", seconds=1)
    leaves = run_python(
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\ntime.sleep(60)", seconds=1
    )
    assert loops.timed_out and leaves.timed_out and max(loops.seconds, leaves.seconds) < 5


@pytest.fixture(params=["ourselves", "nobody"])
def run_as(request, tmp_path, monkeypatch):
    """`run_python` as another user too, in a folder; afterwards nothing of it may be left."""
    folder = tmp_path / "places"
    folder.mkdir()
    if request.param == "ourselves":
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        yield run_python
    else:
        if os.getuid():
            pytest.skip("only root runs a program as another user")
        folder = Path(tempfile.mkdtemp())  # tmp_path is in a folder of root's
        folder.chmod(0o777)
        call = "import json, sys; from fastvlm.harnesses.sandbox import *; from dataclasses import asdict; "
        call += "print(json.dumps(asdict(run_python(sys.argv[1], **json.loads(sys.argv[2])))))"
        env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "TMPDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}

        def run(program: str, **limits) -> Outcome:
            command = [SYSTEM_PYTHON, "-c", call, program, json.dumps(limits)]
            rights = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
            done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, **rights)
            assert done.returncode == 0, done.stderr
            return Outcome(**json.loads(done.stdout))

        try:
            reached = run("pass").passed
        except (OSError, AssertionError) as error:
            pytest.skip(f"another user has no Python here: {error}")
        assert reached
        yield run
    assert not list(folder.iterdir())
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [command for command in commands if str(folder).encode() in command]


def test_a_fork_bomb_is_ended_and_named(run_as):
    # Of 400 and no more: where nothing stops it, it must not take the machine along.
    bomb = "import os, time\nfor _ in range(400):\n    try:\n        if os.fork() == 0:\n            time.sleep(30)\n"
    bomb += "    except OSError:\n        pass\ntime.sleep(30)"
    outcome = run_as(bomb, seconds=20)
    assert not outcome.passed and outcome.said.endswith("stopped: more than 64 processes\n")
    assert not outcome.timed_out


def test_the_kernel_makes_no_more_than_128_processes_and_threads(run_as):
    start = "import threading\nheld = threading.Event()\nthreading.stack_size(1 << 16)\nfor n in range({}):\n    "
    start += "threading.Thread(target=held.wait, daemon=True).start()"
    assert "can't start new thread" in run_as(start.format(200), seconds=20, memory_mb=8192).said
    assert run_as(start.format(100), seconds=20, memory_mb=8192).passed


def test_the_memory_of_all_forks_together_is_bounded_and_what_they_share_counts_once(run_as):
    fork = "import os, time\nkept = b'x' * (60 << 20)\nfor _ in range(8):\n    if os.fork() == 0:\n        "
    each = fork + "mine = b'y' * (60 << 20)\n        time.sleep(60)\ntime.sleep(60)"
    outcome = run_as(each, seconds=20, memory_mb=250)
    assert not outcome.passed and outcome.said.endswith("stopped: more than 250 MB of memory\n")
    assert run_as(fork + "time.sleep(0.3)\n        os._exit(0)\ntime.sleep(0.3)", seconds=20, memory_mb=250).passed


def test_the_files_of_a_program_are_bounded_together_and_so_is_what_it_prints(run_as):
    outcome = run_as("for i in range(8):\n    open(str(i), 'wb').write(b'x' * (3 << 20))", files_mb=8)
    assert not outcome.passed and "No space left on device" in outcome.said
    assert run_as("for i in range(2):\n    open(str(i), 'wb').write(b'x' * (3 << 20))", files_mb=8).passed
    assert not run_as("while True: print('x' * 1000000)", files_mb=8).timed_out


def test_it_may_write_into_its_own_folder_and_knows_nothing_of_ours(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "s3cret")
    outcome = run_python("import os\nopen('x', 'w').write('y')\nprint(open('x').read(), 'SECRET_KEY' in os.environ)")
    assert outcome.passed and outcome.said == "y False\n"


def test_pass_at_k_is_the_papers_estimator():
    figures, results = CodeEval(seconds=3).compute(
        references=["assert add(2, 3) == 5", "assert add(1, 1) == 3"],
        predictions=[["def add(a, b): return a + b", "def add(a, b): return a * b"], ["def add(a, b): return 3"] * 2],
        k=[1, 2, 5],
    )
    assert figures == {"pass@1": 0.75, "pass@2": 1.0}
    assert [found["passed"] for _, found in results[0]] == [True, False]
    assert "AssertionError" in results[0][1][1]["result"]
    assert pass_at_k([(10, 3)], 5) == pytest.approx(1 - (7 * 6 * 5 * 4 * 3) / (10 * 9 * 8 * 7 * 6))
