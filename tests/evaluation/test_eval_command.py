"""`eval.py` as a user types it, on a run of two steps and a few questions."""

import json
import signal
import time
from pathlib import Path

import pytest
from tiny_world import draw_png

from fastvlm.data.shards import ShardWriter

ROOT = Path(__file__).resolve().parent.parent.parent
ALIGN = [
    "pipeline=align",
    "encoder.dims=[8,16]",
    "llm.hidden_size=32",
    "llm.intermediate_size=64",
    "llm.num_hidden_layers=2",
    "llm.num_attention_heads=2",
    "logger=none",
    "hardware=cpu",
    "hardware.threads=1",
    "~task",
    "num_samples=0",
    "stages.align.steps=2",
    "name=asked",
]


def write_questions(folder: Path, count: int) -> Path:
    with ShardWriter(folder, "val", max_samples=10) as writer:
        for i in range(count):
            content = [{"type": "image"}, {"type": "text", "text": f"how many digits are there in {i}?"}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "7"}]
            meta = {
                "question_id": i,
                "image_id": i // 3,
                "type": ["number", "other"][i % 2],
                "answers": ["7"] * 9 + ["8"],
            }
            writer.write(
                f"q{i}", {"messages": messages, "id": i, "source": "x", "meta": meta}, [draw_png(i // 3, (64, 64))]
            )
    return folder


def ask(run: Path, questions: Path, *more: str) -> list[str]:
    source = [f"task.source.path={questions}", "task.window=4", "task.max_new_tokens=4"]
    return [f"checkpoint={run}", *source, *more]


def test_several_tasks_are_scored_in_one_command_and_answers_to_other_questions_refused(cli, tmp_path):
    cli("train.py", *ALIGN)
    run, questions = tmp_path / "runs" / "asked", write_questions(tmp_path / "questions", 9)
    done = cli("eval.py", *ask(run, questions, "task=[vqav2,textvqa]", "hardware=cpu"))
    assert "vqav2: vqa accuracy" in done.stdout and "textvqa: vqa accuracy" in done.stdout
    refused = cli("eval.py", f"checkpoint={run}", "task=[embedded,panel]", check=False)
    assert refused.returncode == 2 and "embedded and panel write the same metrics and files" in refused.stderr
    metrics = json.loads((run / "eval/results.json").read_text())["metrics"]
    assert {"test/vqav2/vqa_accuracy", "test/vqav2/vqa_accuracy/number", "test/textvqa/vqa_accuracy"} <= set(metrics)
    one = json.loads((run / "eval/vqav2.json").read_text())
    assert one["asked"]["ocr_tokens"] is False and one["metrics"]["test/vqav2/num_questions"] == 9
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps([{"question_id": 77, "answer": "7"}]))
    scored = ask(run, questions, "task=vqav2", f"predictions={answers}", "hardware=cpu")
    refused = cli("eval.py", *scored, check=False)
    said = [line for line in refused.stderr.splitlines() if line.startswith(("error", "Traceback"))]
    assert refused.returncode == 2 and len(said) == 1 and "no answer to question 0" in said[0]
    refused = cli("eval.py", *ask(run, questions, "task=vqav2", "hardware=cpu", "hardware.num_nodes=2"), check=False)
    said = [line for line in refused.stderr.splitlines() if line.startswith(("error", "Traceback"))]
    assert refused.returncode == 2 and len(said) == 1 and "hardware.num_nodes=2: one process starts no" in said[0]


def test_a_second_task_without_shards_is_said_before_the_first_is_answered_and_one_that_fails_after_it_is_written(
    cli, tmp_path
):
    cli("train.py", *ALIGN)
    shards, out = tmp_path / "data" / "shards", tmp_path / "out"
    two = [f"checkpoint={tmp_path}/runs/asked", "task=[vqav2,textvqa]", "hardware=cpu", "task.max_new_tokens=2"]
    two += [f"paths.data={tmp_path}/data", f"out={out}"]
    write_questions(shards / "vqav2", 3)
    refused = cli("eval.py", *two, check=False)
    assert refused.returncode == 2 and "error: task textvqa: no val shards in" in refused.stderr
    assert not out.exists()
    (shards / "textvqa").mkdir()
    (shards / "textvqa" / "val-00000.tar").write_bytes(b"no shard")
    refused = cli("eval.py", *two, check=False)
    assert refused.returncode == 2 and "textvqa" in refused.stderr and not (out / "results.json").exists()
    assert json.loads((out / "vqav2.json").read_text())["metrics"]["test/vqav2/num_questions"] == 3


@pytest.mark.slow
def test_a_killed_evaluation_and_two_ranks_end_with_the_same_bytes(cli, commands, cli_place, tmp_path):
    cli("train.py", *ALIGN)
    run, questions = tmp_path / "runs" / "asked", write_questions(tmp_path / "questions", 40)
    outs = {name: tmp_path / name for name in ("one", "two", "killed")}
    cli("eval.py", *ask(run, questions, "task=vqav2", "hardware=cpu", f"out={outs['one']}"))
    command = [str(ROOT / "eval.py")]
    two = [*command, *ask(run, questions, "task=vqav2", "hardware=cpu_ddp2", f"out={outs['two']}")]
    step = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}
    done = commands.run(two, **cli_place(**step))
    assert done.returncode == 0 and done.stdout.count("results: ") == 1, done.stderr
    command += ask(run, questions, "task=vqav2", "hardware=cpu", f"out={outs['killed']}")
    process = commands.start(command, **cli_place())
    windows = lambda: list(outs["killed"].glob("predictions/.vqav2-*/0*.json"))
    while not windows() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(windows()) < 10
    cli("eval.py", *ask(run, questions, "task=vqav2", "hardware=cpu", f"out={outs['killed']}"))
    written = {name: (out / "predictions/vqav2.jsonl").read_bytes() for name, out in outs.items()}
    assert written["one"] == written["two"] == written["killed"]
