"""Training speed compared with nanoVLM's loop: same model sizes, samples, rows, precision and machine.

    git clone https://github.com/huggingface/nanoVLM     # the commit of October 2025 was used; not part of this project
    python benchmarks/nanovlm.py --peer nanoVLM          # about five minutes on two cores

The sides run in turn, each in its own process, `--rounds` times. A round gives one ratio of wall time and one of CPU
time (including loader processes), and the medians are reported; CPU time is valid on a busy machine, too. Tokens are
positions of real samples, including image tokens, without padding. Both sides are timed from the start of step `--warm`
to the end of the last step: without start-up and the first steps, with reading and decoding, packing, clipping and
schedule. `nanovlm_peer.py` lists what is changed in the peer.
"""

from __future__ import annotations

import argparse
import io
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

from benchmarks.peers.serve import cpu_seconds  # noqa: E402

SIZES = {
    "vision": {"dim": 192, "depth": 6, "heads": 3, "patch": 16, "image": 128},
    "language": {"dim": 256, "inner": 704, "layers": 6, "heads": 4, "kv_heads": 2},
    "shuffle": 2,
    "rows": 4,
    "tokens": 512,
    "images": 18,
}


class Clock:
    """Measures wall seconds, CPU seconds and real tokens from step `warm` on."""

    def __init__(self, warm: int):
        self.warm, self.tokens, self.begun, self.found = warm, [], None, {}

    def step(self, tokens: int) -> None:
        if len(self.tokens) == self.warm:
            self.begun = time.perf_counter(), cpu_seconds()
        self.tokens.append(tokens)

    def end(self) -> None:
        if not self.found:
            seconds, cpu = time.perf_counter() - self.begun[0], cpu_seconds() - self.begun[1]
            counted = self.tokens[self.warm :]
            self.found = {"tokens": sum(counted), "steps": len(counted), "seconds": seconds, "cpu": cpu}


def run_ours(work: Path, clock: Clock, steps: int) -> dict:
    os.environ["FASTVLM_RUNS"] = str(work / f"runs-{os.getpid()}")
    import lightning as L
    from omegaconf import OmegaConf, open_dict

    from fastvlm import pipeline
    from fastvlm.config import compose

    class Marks(L.Callback):
        def on_train_batch_start(self, trainer, stage, batch, index) -> None:
            clock.step(int((batch.segment_ids > 0).sum()))

        def on_validation_start(self, *_) -> None:
            clock.end()

    v, lm, stage = SIZES["vision"], SIZES["language"], "stages.instruct"
    overrides = [
        "pipeline=instruct",
        "encoder=timm",
        "encoder.name=vit_tiny_patch16_224",
        "encoder.pretrained=false",
        f"encoder.embed_dim={v['dim']}",
        f"encoder.depth={v['depth']}",
        f"encoder.num_heads={v['heads']}",
        f"encoder.img_size={v['image']}",
        "encoder.class_token=false",
        "encoder.global_pool=''",
        "resampler=pixel_shuffle",
        f"resampler.factor={SIZES['shuffle']}",
        "projector=linear",
        "projector.bias=false",
        f"llm.hidden_size={lm['dim']}",
        f"llm.intermediate_size={lm['inner']}",
        f"llm.num_hidden_layers={lm['layers']}",
        f"llm.num_attention_heads={lm['heads']}",
        f"llm.num_key_value_heads={lm['kv_heads']}",
        "llm.tie_word_embeddings=true",
        "~task",
        "num_samples=0",
        "logger=none",
        "hardware=auto",
        "name=ours",
        f"{stage}.steps={steps}",
        f"{stage}.batch_size={SIZES['rows']}",
        f"{stage}.max_tokens={SIZES['tokens']}",
        f"{stage}.max_images={SIZES['images']}",
        f"{stage}.image_size={v['image']}",
        f"{stage}.image.fit=squash",
        f"{stage}.lora=null",
        f"{stage}.trainable={{encoder: 5e-5, projector: 5e-3, llm: 5e-5}}",
        f"{stage}.val_samples=8",
    ]
    config = compose("train", overrides)
    source = {"_target_": "fastvlm.data.source.Source", "name": "qa", "path": str(qa_folder())}
    mixture = {"sources": {"qa": source}, "weights": {"qa": 1}, "unit": "samples"}
    with open_dict(config):
        config.stages.instruct.mixture = OmegaConf.create({"_target_": "fastvlm.data.source.Mixture", **mixture})
    plain = L.Trainer
    L.Trainer = lambda *, callbacks, **options: plain(callbacks=[*callbacks, Marks()], **options)
    run = pipeline.Pipeline(config)
    run.run()
    return {"parameters": sum(p.numel() for p in run.model.parameters()), "precision": run.hardware.precision}


def qa_folder() -> Path:
    return Path(os.environ.get("FASTVLM_DATA", ROOT / "data")) / "embedded" / "short_qa"


def write_for_peer(work: Path, samples: int) -> None:
    """Write the same conversations as a Hugging Face data set in the peer's layout, and the same tokenizer."""
    import datasets
    from PIL import Image

    from fastvlm.data.shards import ShardReader
    from fastvlm.data.source import Source
    from fastvlm.tokens import Tokenizer

    tokenizer = Tokenizer(str(qa_folder().parent / "tokenizer"), template="roles")
    tokenizer.hf.eos_token = "<|end|>"
    tokenizer.save(work / "tokenizer")
    (work / "vocabulary.json").write_text(json.dumps(len(tokenizer)))
    index, reader, rows = Source(name="qa", path=str(qa_folder())).load("train", tokenizer), ShardReader(), []
    for row in range(min(samples, index.num_samples)):
        raw = index.read(row, reader)
        texts = [words(m["content"]) for m in raw.record["messages"] if m["role"] != "system"]
        turns = [{"user": a, "assistant": b} for a, b in zip(texts[::2], texts[1::2], strict=True)]
        rows.append({"images": [Image.open(io.BytesIO(i)).convert("RGB") for i in raw.images], "texts": turns})
    turn = {name: datasets.Value("string") for name in ("user", "assistant")}
    features = datasets.Features(images=datasets.List(datasets.Image()), texts=datasets.List(turn))
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(work / "shard_0"))


def words(content: str | list) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def run_side(side: str, options: argparse.Namespace) -> None:
    clock = Clock(options.warm)
    if side == "ours":
        made = run_ours(options.work, clock, options.steps)
    else:
        sys.path.remove(str(ROOT))  # both repositories have modules `data` and `train`
        import nanovlm_peer

        more = {"sizes": SIZES, "steps": options.steps, "workers": options.peer_workers}
        made = nanovlm_peer.run(options.peer.resolve(), options.work, **more, step=clock.step, end=clock.end)
    (options.work / f"{side}.json").write_text(json.dumps(clock.found | made))


def play_round(number: int, options: argparse.Namespace, work: Path) -> tuple[float, float]:
    """Run both sides in turn; return our speed over the peer's in tokens per wall second and per CPU second."""
    speeds = {}
    for side in ("ours", "peer") if number % 2 == 0 else ("peer", "ours"):
        command = [sys.executable, __file__, *sys.argv[1:], "--work", str(work), "--run", side]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        one = json.loads((work / f"{side}.json").read_text())
        speeds[side] = one["tokens"] / one["seconds"], one["tokens"] / one["cpu"]
        print(
            f"  {side:<5} {speeds[side][0]:7.0f} tokens/s, {speeds[side][1]:7.0f} a CPU second; "
            f"{one['parameters'] / 1e6:.2f}M parameters, {one['steps']} steps of {one['tokens'] / one['steps']:.0f} "
            f"tokens, {one['precision']}",
            flush=True,
        )
    clock, cpu = (ours / peer for ours, peer in zip(speeds["ours"], speeds["peer"], strict=True))
    print(
        f"round {number + 1}: {clock:.2f}x by the clock, {cpu:.2f}x by CPU time, load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    return clock, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, required=True, help="a checkout of huggingface/nanoVLM")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warm", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-workers", type=int, help="loader processes of the peer; its own three if not given")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--run", choices=["ours", "peer"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (options.peer / "models" / "vision_language_model.py").exists():
        sys.exit(f"error: --peer={options.peer} is no checkout of https://github.com/huggingface/nanoVLM")
    if not qa_folder().exists():
        sys.exit(f"error: {qa_folder()} is not there; make it with: python data/prepare.py source=embedded")
    if options.run:
        run_side(options.run, options)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_for_peer(Path(folder), samples=options.steps * SIZES["rows"] * 8 + 400)
        ratios = [play_round(number, options, Path(folder)) for number in range(options.rounds)]
    clock, cpu = (statistics.median(one) for one in zip(*ratios, strict=True))
    print(f"median of {len(ratios)}: {clock:.2f}x the peer's tokens a second, {cpu:.2f}x a CPU second")


if __name__ == "__main__":
    main()
