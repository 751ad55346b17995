"""Throughput of an evaluation compared with lmms-eval: same model, same questions, same score.

    python benchmarks/evaluation.py run=runs/latest lmms=/path/to/lmms/bin/python    minutes; rounds=3 count=1000

`lmms` is the Python of an environment with benchmarks/requirements-lmms-eval.txt. The questions are about the embedded
data's training pictures, several per picture as in VQAv2, with ten answers each, scored by EvalAI's rules on both
sides. lmms-eval runs our model through our plugin (`fastvlm.harnesses.lmms`) with the same engine, batch size, device
and image cache size, so neither side encodes a picture again while it is cached. What differs is the harness: whether
prompts of similar length are batched together, and whether data is read ahead. With `cache_mb=0` the plugin encodes an
image once per question, as lmms-eval's own models do. The two sides take turns in separate processes; imports and
loading the weights are not counted. `batch_size=1` is all that most of lmms-eval's own local models support.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TASK = """
task: bench_vqa
dataset_path: {data}
dataset_kwargs: {{load_from_disk: true}}
test_split: val
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
process_results: !function utils.results
generation_kwargs: {{max_new_tokens: {tokens}, temperature: 0, do_sample: false}}
metric_list: [{{metric: vqa, aggregation: mean, higher_is_better: true}}]
"""
UTILS = """
import statistics

from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

PROCESS = EvalAIAnswerProcessor()


def visual(doc):
    return [doc["image"].convert("RGB")]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def results(doc, result):
    said, answers = PROCESS(result[0]), [PROCESS(answer) for answer in doc["answers"]]
    matches = [sum(other == said for j, other in enumerate(answers) if j != i) for i in range(len(answers))]
    return {"vqa": statistics.mean(min(1, count / 3) for count in matches)}
"""


def make_data(folder: Path, *, count: int) -> None:
    """Write the same questions as shards and as JSON lines with image files."""
    from fastvlm.data.shards import ShardWriter

    rows = list(read_pictures(count))
    with ShardWriter(folder / "shards", "val", max_samples=500) as writer:
        for i, (picture, question, answer) in enumerate(rows):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            meta = {"question_id": i, "answers": answers_to(answer)}
            writer.write(f"q{i:06d}", {"messages": messages, "id": i, "source": "bench", "meta": meta}, [picture])
    images = folder / "images"
    images.mkdir()
    lines = []
    for i, (picture, question, answer) in enumerate(rows):
        (images / f"{i}.png").write_bytes(picture)
        shown = {"image": str(images / f"{i}.png"), "question": question, "question_id": i}
        lines.append(json.dumps(shown | {"answer": answer, "answers": answers_to(answer)}))
    (folder / "rows.jsonl").write_text("\n".join(lines))


def answers_to(answer: str) -> list[str]:
    """Return ten annotators' answers, three of which differ."""
    return [answer] * 7 + [f"the {answer}.", "none", "7"]


def read_pictures(count: int):
    """Yield (picture, question, answer) of `count` embedded training questions, several per picture."""
    from fastvlm.build import ensure_embedded
    from fastvlm.config import compose
    from fastvlm.data.shards import find_shards, parse_sample, scan_shard

    config = compose("eval", ["checkpoint=x"])
    ensure_embedded(config)
    folder = Path(config.paths.data) / "embedded" / "short_qa"
    made = 0
    for shard in find_shards(folder, "train"):
        data = shard.read_bytes()
        for span in scan_shard(shard)[0]:
            sample = parse_sample(span.key, {name: data[at : at + size] for name, at, size in span.members})
            turns = sample.record["messages"]
            for asked, answered in zip(turns[::2], turns[1::2]):
                parts = asked["content"]
                words = parts if isinstance(parts, str) else "".join(p.get("text", "") for p in parts)
                yield sample.images[0], words.split("\n")[0], str(answered["content"])
                made += 1
                if made == count:
                    return


def run_ours(folder: Path, *, run: str, batch_size: int, tokens: int) -> dict:
    import torch

    from fastvlm.build import build_transform, load_run
    from fastvlm.data.source import Source
    from fastvlm.evaluation.benchmark import Benchmark
    from fastvlm.evaluation.vqa_accuracy import VQAAccuracy

    model, tokenizer, config = load_run(run, device="cuda" if torch.cuda.is_available() else "cpu")
    source, protocol = Source("bench", path=folder / "shards"), VQAAccuracy(normalisation="evalai")
    task = Benchmark("bench", source=source, protocol=protocol, batch_size=batch_size, max_new_tokens=tokens)
    where = {
        "image_size": config.image_size,
        "transform": build_transform(config),
        "device": next(model.parameters()).device,
    }
    with tempfile.TemporaryDirectory() as out:
        begun, spent = time.perf_counter(), time.process_time()
        result = task.run(model, tokenizer, **where, out=out)
        took = {"seconds": time.perf_counter() - begun, "cpu": time.process_time() - spent}
    return took | {
        "score": result["metrics"]["test/bench/vqa_accuracy"],
        "said": [r["prediction"] for r in result["predictions"]],
    }


def run_theirs(folder: Path, *, run: str, batch_size: int, tokens: int, cache_mb: int = 512) -> dict:
    import datasets
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from fastvlm.harnesses import lmms

    store = folder / "dataset"
    if not store.exists():
        rows = datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
        datasets.DatasetDict({"val": rows.cast_column("image", datasets.Image())}).save_to_disk(str(store))
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "tasks" / "bench.yaml").write_text(TASK.format(data=store, tokens=tokens))
    (folder / "tasks" / "utils.py").write_text(UTILS)
    manager = TaskManager(include_path=str(folder / "tasks"))
    ready = {}
    load = lmms.FastVLM.__init__

    def timed(self, *arguments, **options):
        begun = time.perf_counter(), time.process_time()
        load(self, *arguments, **options)
        ready["load"] = time.perf_counter() - begun[0], time.process_time() - begun[1]

    lmms.FastVLM.__init__ = timed
    begun, spent = time.perf_counter(), time.process_time()
    found = simple_evaluate(
        model="fastvlm",
        model_args=f"run={run},cache_mb={cache_mb}",
        tasks=["bench_vqa"],
        batch_size=batch_size,
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
    )
    took = time.perf_counter() - begun - ready["load"][0], time.process_time() - spent - ready["load"][1]
    said = [sample["filtered_resps"][0] for sample in sorted(found["samples"]["bench_vqa"], key=lambda s: s["doc_id"])]
    said = [text if isinstance(text, str) else text[0] for text in said]
    score = next(v for k, v in found["results"]["bench_vqa"].items() if k.startswith("vqa,"))
    return {"seconds": took[0], "cpu": took[1], "score": score, "said": said}


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    side, out = given.get("side"), given.get("out")
    options = {"run": given.get("run", "runs/latest"), "batch_size": int(given.get("batch_size", 16))}
    options["tokens"] = int(given.get("tokens", 8))
    if side == "theirs":
        options["cache_mb"] = int(given.get("cache_mb", 512))
    if side:
        # The result goes into a file, because the harness prints to stdout.
        result = {"ours": run_ours, "theirs": run_theirs}[side](Path(given["data"]), **options)
        Path(out).write_text(json.dumps(result))
        return
    if "lmms" not in given:
        sys.exit(__doc__)
    rounds, count = int(given.get("rounds", 3)), int(given.get("count", 1000))
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder), count=count)
        for turn in range(rounds + 1):  # the first builds index and data set and is not counted
            pair = {}
            for name, python in (("ours", sys.executable), ("theirs", given["lmms"])):
                file = Path(folder, f"{name}.json")
                command = [python, __file__, f"side={name}", f"data={folder}", f"out={file}"]
                command += [f"{key}={value}" for key, value in options.items()]
                command += [f"cache_mb={given['cache_mb']}"] if "cache_mb" in given else []
                env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
                done = subprocess.run(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                if done.returncode:
                    sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
                pair[name] = json.loads(file.read_text())
            if turn:
                pairs.append(pair)
                print(
                    {n: {k: round(v, 3) for k, v in side.items() if k != "said"} for n, side in pair.items()},
                    flush=True,
                )
    same = pairs[0]["ours"]["said"] == pairs[0]["theirs"]["said"]
    scores = {pair[name]["score"] for pair in pairs for name in pair}
    print(f"{count} questions, batches of {options['batch_size']}, answers of at most {options['tokens']} tokens")
    print(f"scores {sorted(scores)}; answers the same: {same}")
    for key, words in (("seconds", "wall clock"), ("cpu", "CPU time")):
        ratios = [pair["theirs"][key] / pair["ours"][key] for pair in pairs]
        rate = statistics.median(count / pair["ours"][key] for pair in pairs)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"throughput over lmms-eval, {words}: {spread}; {rate:.0f} questions/s")


if __name__ == "__main__":
    main()
