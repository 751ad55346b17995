"""Check VLMEvalKit through our server against our own evaluation: same questions, same answers, same score.

    python benchmarks/vlmevalkit.py run=runs/latest kit=/path/to/vlmeval/bin/python count=360

`kit` is the Python of an environment with benchmarks/requirements-vlmeval.txt. Held-out questions of the embedded data
become two data sets in VLMEvalKit's format (tables with images in base64): open questions with ten answers each, asked
by its `GPT4V` and scored as its VizWiz, and questions with up to four options, asked through `--base-url` and parsed
without a judge. It requests its default of up to 32,768 tokens per answer; the server stops at `tokens`. VLMEvalKit
sends every picture as a JPEG of Pillow's default quality, so our evaluation reads the same JPEGs; the answers to the
original files are reported, too. Options are parsed by different rules: VLMEvalKit also accepts an answer that contains
the text of exactly one option.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

OPEN, CHOICE = "embedded_open", "embedded_choice"


def read_questions(count: int) -> list[dict]:
    """Read held-out questions with `type`, `question`, `answer`, `image` and `choices`, equally many of each source."""
    from fastvlm.build import ensure_embedded
    from fastvlm.config import compose
    from fastvlm.data.shards import find_shards, parse_sample, scan_shard

    config = compose("eval", ["checkpoint=x"])
    ensure_embedded(config)
    sources = ("short_qa", "reading", "charts")
    found = []
    for number, source in enumerate(sources):
        share, rows = (count * (number + 1)) // len(sources), []
        for shard in find_shards(Path(config.paths.data) / "embedded" / source, "test"):
            data = shard.read_bytes()
            for span in scan_shard(shard)[0]:
                sample = parse_sample(span.key, {name: data[at : at + size] for name, at, size in span.members})
                asked, answered = sample.record["messages"]
                question = "".join(part.get("text", "") for part in asked["content"])
                said = {"question": question, "answer": str(answered["content"]), "image": sample.images[0]}
                rows.append(said | {"type": sample.record["meta"]["type"]})
        found += rows[: share - len(found)]
    answers = defaultdict(list)
    for row in found:
        if row["answer"] not in answers[row["type"]]:
            answers[row["type"]].append(row["answer"])
    chance = random.Random(0)
    for row in found:
        others = [answer for answer in answers[row["type"]] if answer != row["answer"]]
        row["choices"] = chance.sample(others, min(3, len(others))) + [row["answer"]]
        chance.shuffle(row["choices"])
    return found


def annotators(answer: str) -> list[str]:
    """Return ten annotators' answers, three of which differ."""
    return [answer] * 7 + [f"the {answer}.", "none", "7"]


def as_chosen(row: dict) -> str:
    """Return a question with options as VLMEvalKit words it."""
    options = "".join(f"{chr(ord('A') + i)}. {choice}\n" for i, choice in enumerate(row["choices"]))
    request = "Please select the correct answer from the options above. \n"
    return f"Question: {row['question']}\nOptions:\n{options}{request}"


def as_sent(image: bytes) -> bytes:
    """Return the JPEG that VLMEvalKit makes of a picture."""
    stored = io.BytesIO()
    Image.open(io.BytesIO(image)).convert("RGB").save(stored, "JPEG")
    return stored.getvalue()


def write_tables(folder: Path, rows: list[dict]) -> None:
    """Write both data sets as VLMEvalKit reads them from its folder."""
    for name in (OPEN, CHOICE):
        with open(folder / f"{name}.tsv", "w", newline="", encoding="utf-8") as file:
            columns = ["answers"] if name == OPEN else ["answer", *"ABCD"]
            table = csv.writer(file, delimiter="\t", lineterminator="\n")
            table.writerow(["index", "image", "question", "category", *columns])
            for i, row in enumerate(rows):
                if name == OPEN:
                    said = [str(annotators(row["answer"]))]
                else:
                    right = "ABCD"[row["choices"].index(row["answer"])]
                    said = [right, *row["choices"], *[""] * (4 - len(row["choices"]))]
                table.writerow([i, base64.b64encode(row["image"]).decode(), row["question"], row["type"], *said])


def write_shards(folder: Path, rows: list[dict], *, name: str, sent: bool) -> Path:
    """Write a data set as shards for our tasks, with VLMEvalKit's JPEGs if `sent`, else with the original files."""
    from fastvlm.data.shards import ShardWriter

    folder = folder / f"{name}-{'sent' if sent else 'files'}"
    with ShardWriter(folder, "test") as writer:
        for i, row in enumerate(rows):
            text = row["question"] if name == OPEN else as_chosen(row)
            content = [{"type": "image"}, {"type": "text", "text": text}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": row["answer"]}]
            meta = {"question_id": i, "type": row["type"]}
            if name == OPEN:
                meta["answers"] = annotators(row["answer"])
            else:
                meta |= {"choices": row["choices"], "correct_choice_idx": row["choices"].index(row["answer"])}
            record = {"messages": messages, "id": i, "source": name, "meta": meta}
            image, ext = (as_sent(row["image"]), "jpg") if sent else (row["image"], "png")
            writer.write(f"q{i:06d}", record, [image], image_ext=ext)
    return folder


def run_ours(folder: Path, rows: list[dict], *, run: str, tokens: int) -> dict:
    """Run our own evaluation; return {(data set, sent): (score, [answer])}."""
    from fastvlm.build import build_transform, load_run
    from fastvlm.data.source import Source
    from fastvlm.evaluation.aokvqa import MultipleChoice
    from fastvlm.evaluation.benchmark import Benchmark
    from fastvlm.evaluation.vqa_accuracy import VQAAccuracy

    model, tokenizer, config = load_run(run, device="cpu")
    protocols = {OPEN: VQAAccuracy(), CHOICE: MultipleChoice()}
    found = {}
    for name, protocol in protocols.items():
        for sent in (True, False):
            source = Source(name, path=write_shards(folder, rows, name=name, sent=sent))
            settings = {"source": source, "protocol": protocol, "split": "test", "max_new_tokens": tokens}
            result = Benchmark(name, **settings).run(
                model, tokenizer, image_size=config.image_size, transform=build_transform(config)
            )
            # VLMEvalKit strips the answers.
            said = [row["prediction"].strip() for row in sorted(result["predictions"], key=lambda r: r["question_id"])]
            found[name, sent] = 100 * result["metrics"][f"test/{name}/{protocol.metric}"], said
    return found


def start_server(folder: Path, *, run: str, tokens: int) -> tuple[subprocess.Popen, str]:
    """Start a server for the run; return its process and the base URL of the OpenAI API."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = [f"run={run}", "name=fastvlm", f"port={port}", f"max_new_tokens={tokens}"]
    command, log = [sys.executable, "-m", "fastvlm.inference.server", *settings], folder / "server.log"
    with open(log, "w") as said:
        server = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=said, stderr=said)
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return server, f"http://127.0.0.1:{port}/v1"
        except OSError:
            time.sleep(0.1)
    sys.exit(f"the server did not start:\n{log.read_text()[-3000:]}")


def run_kit(folder: Path, *, kit: str, address: str) -> dict:
    """Run VLMEvalKit; return {data set: (score, [answer])}."""
    config = folder / "config.json"
    asking = {"class": "GPT4V", "model": "fastvlm", "api_base": f"{address}/chat/completions", "key": "none"}
    config.write_text(json.dumps({"model": {"fastvlm": asking}, "data": {OPEN: {"class": "VizWiz", "dataset": OPEN}}}))
    found = {}
    for name, how in (
        (OPEN, ["--config", str(config)]),
        (CHOICE, ["--model", "fastvlm", "--base-url", address, "--data", CHOICE, "--judge", "exact_matching"]),
    ):
        out = folder / f"out-{name}"
        command = [kit, "-m", "vlmeval", *how, "--work-dir", str(out), "--api-nproc", "16", "--retry", "2"]
        # By default, VLMEvalKit enlarges smaller pictures to 100 pixels.
        told = {"LMUData": str(folder), "VLMEVAL_MIN_IMAGE_EDGE": "1", "PRED_FORMAT": "tsv", "HF_HUB_OFFLINE": "1"}
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | told
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
        files = list(out.rglob(f"fastvlm_{name}.tsv")), list(out.rglob(f"fastvlm_{name}*_acc.csv"))
        if done.returncode or not all(files):
            sys.exit(f"VLMEvalKit failed:\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}")
        with open(files[0][0], newline="", encoding="utf-8") as file:
            said = sorted(csv.DictReader(file, delimiter="\t"), key=lambda row: int(row["index"]))
        with open(files[1][0], newline="", encoding="utf-8") as file:
            score = float(next(csv.DictReader(file))["Overall"]) * (1 if name == OPEN else 100)
        found[name] = score, [row["prediction"] for row in said]
    return found


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    if "kit" not in given:
        sys.exit(__doc__)
    run, tokens, count = given.get("run", "runs/latest"), int(given.get("tokens", 16)), int(given.get("count", 360))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows = read_questions(count)
        write_tables(folder, rows)
        server, address = start_server(folder, run=run, tokens=tokens)
        try:
            theirs = run_kit(folder, kit=given["kit"], address=address)
        finally:
            server.terminate()
            server.wait(30)
        ours = run_ours(folder, rows, run=run, tokens=tokens)
    for name, (score, said) in theirs.items():
        mine, answers = ours[name, True]
        other, files = ours[name, False]
        others = sum(a != b for a, b in zip(files, answers))
        print(f"{name}: {len(said)} questions, {len(set(said))} unlike answers; ours the same: {said == answers}")
        print(f"  VLMEvalKit {score:.4f}, ours {mine:.4f}; the files themselves {other:.4f}, {others} other answers")
        for i in [i for i, (a, b) in enumerate(zip(said, answers)) if a != b][:5]:
            print(f"  question {i}: VLMEvalKit has {said[i]!r}, ours is {answers[i]!r}")


if __name__ == "__main__":
    main()
