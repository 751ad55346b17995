"""The four text tasks as lm-eval itself defines them, over data sets of a few rows with the columns of the originals.

Only the download is replaced. What is asked and what is right is written here by hand.
"""

import sys

import pytest

pytest.importorskip("lm_eval")

import datasets  # noqa: E402
from tiny_vlm import IMAGE_SIZE  # noqa: E402

from fastvlm.build import build_task  # noqa: E402
from fastvlm.config import compose  # noqa: E402
from fastvlm.harnesses import sandbox  # noqa: E402
from fastvlm.harnesses.text import TextModel  # noqa: E402

SUMS = [{"question": f"What is {i} plus 1?", "answer": f"{i} and one more.\n#### {i + 1}"} for i in range(1, 10)]
CHOICES = [
    {"question": f" Which is {i}? ", "subject": "x", "choices": [str((i + k) % 4) for k in range(4)], "answer": -i % 4}
    for i in range(6)
]
PROGRAM = {
    "task_id": "HumanEval/0",
    "prompt": "def add(a, b):\n",
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
}
PROBLEM = {
    "task_id": 11,
    "text": "Write a function to double a number.",
    "code": "def twice(n):\n  return 2 * n",
    "test_list": ["assert twice(1) == 2", "assert twice(2) == 4", "assert twice(-3) == -6"],
    "test_setup_code": "",
    "challenge_test_list": [],
}
ROWS = {
    "openai/gsm8k": {"train": SUMS[1:], "test": SUMS[:1]},
    "cais/mmlu": {"test": CHOICES[:1], "validation": CHOICES[:1], "dev": CHOICES[1:]},
    "openai/openai_humaneval": {"test": [PROGRAM]},
    "google-research-datasets/mbpp": {"train": [PROBLEM], "test": [PROBLEM], "validation": [PROBLEM]},
}
# Answer that is right, one that is not, the metrics they decide, and how the last question is put.
TASKS = {
    "gsm8k": (
        " 1 and one more.\n#### 2",
        " It is 7.",
        ("gsm8k/exact_match/strict-match", "gsm8k/exact_match/flexible-extract"),
        "\n\nQuestion: What is 1 plus 1?\nAnswer:",
    ),
    "humaneval": ("    return a + b\n", "    return a - b\n", ("humaneval/pass@1/create_test",), "def add(a, b):\n"),
    "mbpp": (
        "def twice(n):\n  return n + n\n",
        "def twice(n):\n  return 2\n",
        ("mbpp/pass_at_1",),
        "\n\nYou are an expert Python programmer, and here is your task: Write a function to double a number. "
        "Your code should pass these tests:\n\n"
        "assert twice(1) == 2\nassert twice(2) == 4\nassert twice(-3) == -6\n[BEGIN]\n",
    ),
    "mmlu": (
        "A",
        "B",
        ("mmlu/acc", "mmlu_anatomy/acc", "mmlu_stem/acc"),
        "\n\nWhich is 0?\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer:",
    ),
}


@pytest.fixture(scope="module")
def listed():
    """lm-eval's thousands of task files, listed once: that takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


@pytest.fixture
def guard(monkeypatch, listed):
    """A task as `eval.py task=<name>` builds it, and the prompts it put."""
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda path, name=None, **_: datasets.DatasetDict(
            {split: datasets.Dataset.from_list(rows) for split, rows in ROWS[path].items()}
        ),
    )
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: listed)
    for module in [name for name in sys.modules if name.startswith("lm_eval.tasks.") and name.endswith(".utils")]:
        monkeypatch.delitem(sys.modules, module)  # they keep the metric that ran the last task's code

    def build(name: str, *overrides: str):
        code = ["task.run_code=true"] if name in ("humaneval", "mbpp") else []
        return build_task(compose("eval", [f"task={name}", "checkpoint=none", *code, *overrides]).task)

    return build


def skip_without_sandbox(name: str) -> None:
    if name in ("humaneval", "mbpp"):
        try:
            sandbox.check_sandbox()
        except ValueError as error:
            pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_lm_evals_own_task_scores_right_and_wrong_answers(name, guard, tiny_model, tiny_tokenizer, monkeypatch):
    skip_without_sandbox(name)
    right, wrong, metrics, last = TASKS[name]
    prompts, said = [], [right]

    def generate(self, requests):
        prompts.extend(request.args[0] for request in requests)
        return [said[-1]] * len(requests)

    def choose(self, requests):
        prompts.extend(request.args[0] for request in requests)
        return [(0.0 if request.args[1].strip() == said[-1] else -1.0, True) for request in requests]

    monkeypatch.setattr(TextModel, "generate_until", generate)
    monkeypatch.setattr(TextModel, "loglikelihood", choose)
    figures = guard(name).run(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE)["metrics"]
    assert {metric: figures[f"test/{metric}"] for metric in metrics} == dict.fromkeys(metrics, 1)
    assert all(prompt.endswith(last) for prompt in prompts)
    shots = {"gsm8k": ("Question:", 6), "humaneval": ("def add", 1), "mbpp": ("[BEGIN]", 4), "mmlu": ("Answer:", 6)}
    mark, count = shots[name]
    assert {prompt.count(mark) for prompt in prompts} == {count}
    said.append(wrong)
    figures = guard(name).run(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE)["metrics"]
    assert {metric: figures[f"test/{metric}"] for metric in metrics} == dict.fromkeys(metrics, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_a_model_answers_lm_evals_own_task(name, guard, tiny_model, tiny_tokenizer, tmp_path):
    skip_without_sandbox(name)
    task = guard(name, *(["task.tasks=[mmlu_anatomy]"] if name == "mmlu" else []))
    result = task.run(tiny_model, tiny_tokenizer, image_size=IMAGE_SIZE, out=tmp_path)
    metrics = [metric for metric in TASKS[name][2] if metric.split("/")[0] not in ("mmlu", "mmlu_stem")]
    assert all(0 <= result["metrics"][f"test/{metric}"] <= 1 for metric in metrics)
    [file] = (tmp_path / "predictions").glob("*.jsonl")
    assert file.read_text().strip()
