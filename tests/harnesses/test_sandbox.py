"""A program that a model wrote reaches nothing and ends; and code tasks score by it."""

import pytest

from fastvlm.harnesses.code_eval import CodeEval, pass_at_k
from fastvlm.harnesses.sandbox import check_sandbox, run_python

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
        ("open('big', 'wb').write(b'x' * (1 << 26))", "File too large"),
        ("x = 'a' * (1 << 32)", "MemoryError"),
        ("assert 1 == 2", "AssertionError"),
        ("import sys; sys.exit(0)", ""),
        ("import os; os._exit(0)", ""),
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
