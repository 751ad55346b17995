"""Training speed against nanoVLM's own loop: the same model sizes, samples, rows and precision on the same machine.

    git clone https://github.com/huggingface/nanoVLM     # not part of this project
    python benchmarks/nanovlm.py --peer nanoVLM          # about six minutes on two cores

Each side runs as a process of its own, in turn, `--rounds` times; a round gives one ratio, and their median is the
figure. Tokens are positions of real samples, image tokens among them, padding not. The clock runs from the start of
step `--warm` to the end of the last, so start-up and the first steps are left out on both sides; reading and decoding,
packing, clipping and the schedule are inside on both.

The peer runs as its `train.train` is, with two things changed from outside: `apply_chat_template` returns a list (since
transformers 5 it returns a mapping, whose length its loss mask would take for a number of tokens), and
`--peer-workers` may replace its three loader processes, which on two cores take from the step what they give.
"""

from __future__ import annotations

import argparse
import functools
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

VISION = {"dim": 192, "depth": 6, "heads": 3, "patch": 16, "image": 128}
LANGUAGE = {"dim": 256, "inner": 704, "layers": 6, "heads": 4, "kv_heads": 2}
SHUFFLE, ROWS, TOKENS, IMAGES = 2, 4, 512, 18
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
)


class Clock:
    """Seconds and real tokens from step `warm` on."""

    def __init__(self, warm: int):
        self.warm, self.marks, self.tokens = warm, [], []

    def step(self, tokens: int) -> None:
        self.marks.append(time.perf_counter())
        self.tokens.append(tokens)

    def end(self) -> dict:
        seconds = time.perf_counter() - self.marks[self.warm]
        return {"tokens": sum(self.tokens[self.warm :]), "seconds": seconds, "steps": len(self.marks) - self.warm}


def run_ours(work: Path, steps: int, warm: int) -> dict:
    os.environ["FASTVLM_RUNS"] = str(work / f"runs-{os.getpid()}")
    import lightning as L
    from omegaconf import OmegaConf, open_dict

    from fastvlm import pipeline
    from fastvlm.config import compose

    clock, found = Clock(warm), {}

    class Marks(L.Callback):
        def on_train_batch_start(self, trainer, stage, batch, index) -> None:
            clock.step(int((batch.segment_ids > 0).sum()))

        def on_validation_start(self, *_) -> None:
            if not found:
                found.update(clock.end())

    v, lm = VISION, LANGUAGE
    config = compose(
        "train",
        ["pipeline=instruct", "encoder=timm", "encoder.name=vit_tiny_patch16_224", "encoder.pretrained=false"]
        + [f"encoder.embed_dim={v['dim']}", f"encoder.depth={v['depth']}", f"encoder.num_heads={v['heads']}"]
        + [f"encoder.img_size={v['image']}", "encoder.class_token=false", "encoder.global_pool=''"]
        + ["resampler=pixel_shuffle", f"resampler.factor={SHUFFLE}", "projector=linear"]
        + [
            f"llm.hidden_size={lm['dim']}",
            f"llm.intermediate_size={lm['inner']}",
            f"llm.num_hidden_layers={lm['layers']}",
        ]
        + [f"llm.num_attention_heads={lm['heads']}", f"llm.num_key_value_heads={lm['kv_heads']}"]
        + ["llm.tie_word_embeddings=true", "~task", "num_samples=0", "logger=none", "hardware=auto", "name=ours"]
        + [f"stages.instruct.steps={steps}", f"stages.instruct.batch_size={ROWS}", "stages.instruct.lora=null"]
        + [f"stages.instruct.max_tokens={TOKENS}", f"stages.instruct.max_images={IMAGES}"]
        + [f"stages.instruct.image_size={v['image']}", "stages.instruct.image.fit=squash"]
        + ["stages.instruct.trainable={encoder: 5e-5, projector: 5e-3, llm: 5e-5}", "stages.instruct.val_samples=8"],
    )
    source = {"_target_": "fastvlm.data.source.Source", "name": "qa", "path": str(qa_folder())}
    mixture = {"_target_": "fastvlm.data.source.Mixture", "sources": {"qa": source}, "weights": {"qa": 1}}
    with open_dict(config):
        config.stages.instruct.mixture = OmegaConf.create(mixture)
    plain = L.Trainer
    L.Trainer = lambda *, callbacks, **options: plain(callbacks=[*callbacks, Marks()], **options)
    run = pipeline.Pipeline(config)
    run.run()
    return found | {"parameters": sum(p.numel() for p in run.model.parameters()), "precision": run.hardware.precision}


def run_peer(work: Path, peer: Path, steps: int, warm: int, workers: int | None) -> dict:
    import types

    sys.path.remove(str(ROOT))
    sys.path.insert(0, str(peer))
    os.chdir(work)
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.modules["wandb"] = types.ModuleType("wandb")
    import data.processors as processors

    original = processors.get_tokenizer

    @functools.wraps(original)
    def get_tokenizer(*arguments, **options):
        tokenizer = original(*arguments, **options)
        method = type(tokenizer).apply_chat_template
        tokenizer.apply_chat_template = lambda *a, **k: method(tokenizer, *a, **({"return_dict": False} | k))
        return tokenizer

    processors.get_tokenizer = get_tokenizer
    import models.config as config
    import torch

    import train

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    clock, found = Clock(warm), {}
    plain = train.synchronized_dataloader_step

    def marked(loader, is_dist):
        try:
            for batch in plain(loader, is_dist):
                clock.step(int(batch["attention_mask"].sum()))
                yield batch
        finally:
            found.update(clock.end())

    train.synchronized_dataloader_step = marked
    if workers is not None:
        loader = train.DataLoader
        train.DataLoader = lambda *a, **k: loader(*a, **(k | {"num_workers": workers}))
    made = train.VisionLanguageModel
    sizes = []

    def counted(*arguments, **options):
        model = made(*arguments, **options)
        sizes.append(sum(p.numel() for p in model.parameters()))
        return model

    train.VisionLanguageModel = counted
    v, lm = VISION, LANGUAGE
    vocabulary = json.loads((work / "sizes.json").read_text())["vocabulary"]
    model = config.VLMConfig(
        vit_hidden_dim=v["dim"],
        vit_inter_dim=4 * v["dim"],
        vit_patch_size=v["patch"],
        vit_img_size=v["image"],
        vit_n_heads=v["heads"],
        vit_n_blocks=v["depth"],
        lm_hidden_dim=lm["dim"],
        lm_inter_dim=lm["inner"],
        lm_n_heads=lm["heads"],
        lm_n_kv_heads=lm["kv_heads"],
        lm_n_blocks=lm["layers"],
        lm_base_vocab_size=vocabulary,
        extra_token_amount=0,
        lm_vocab_size=vocabulary,
        lm_max_length=TOKENS,
        lm_max_position_embeddings=1024,
        lm_tokenizer=str(work / "tokenizer"),
        lm_chat_template=TEMPLATE,
        mp_pixel_shuffle_factor=SHUFFLE,
        mp_image_token_length=(v["image"] // v["patch"] // SHUFFLE) ** 2,
        max_img_size=v["image"],
        vlm_extra_tokens={"image_token": "<|image|>", "r1c1": "<|system|>"},
        vlm_load_backbone_weights=False,
    )
    training = config.TrainConfig(
        lr_mp=5e-3,
        val_size=64,
        batch_size=ROWS,
        gradient_accumulation_steps=1,
        eval_in_epochs=False,
        max_training_steps=steps,
        max_images_per_knapsack=IMAGES,
        max_sample_length=TOKENS,
        train_dataset_path=str(work),
        train_dataset_name=("shards",),
        stream_dataset=False,
        log_wandb=False,
        use_lmms_eval=False,
    )
    train.train(training, model)
    return found | {"parameters": sizes[0], "precision": "bf16-mixed"}


def qa_folder() -> Path:
    return Path(os.environ.get("FASTVLM_DATA", ROOT / "data")) / "embedded" / "short_qa"


def write_for_peer(work: Path, samples: int) -> None:
    """The same conversations as a Hugging Face data set in the peer's layout, and the same tokenizer."""
    import io

    import datasets
    from PIL import Image

    from fastvlm.data.shards import ShardReader
    from fastvlm.data.source import Source
    from fastvlm.tokens import Tokenizer

    tokenizer = Tokenizer(str(qa_folder().parent / "tokenizer"), template="roles")
    tokenizer.hf.eos_token = "<|end|>"
    tokenizer.save(work / "tokenizer")
    (work / "sizes.json").write_text(json.dumps({"vocabulary": len(tokenizer)}))
    index, reader, rows = Source(name="qa", path=str(qa_folder())).load("train", tokenizer), ShardReader(), []
    for row in range(min(samples, len(index))):
        raw = index.read(row, reader)
        texts = [
            "".join(p.get("text", "") for p in m["content"]) for m in raw.record["messages"] if m["role"] != "system"
        ]
        turns = [{"user": a, "assistant": b} for a, b in zip(texts[::2], texts[1::2], strict=True)]
        rows.append({"images": [Image.open(io.BytesIO(i)).convert("RGB") for i in raw.images], "texts": turns})
    features = datasets.Features(
        images=datasets.List(datasets.Image()),
        texts=datasets.List({k: datasets.Value("string") for k in ("user", "assistant")}),
    )
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(work / "shard_0"))


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
    if options.run:
        if options.run == "ours":
            found = run_ours(options.work, options.steps, options.warm)
        else:
            found = run_peer(options.work, options.peer.resolve(), options.steps, options.warm, options.peer_workers)
        (options.work / f"{options.run}.json").write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        work, ratios = Path(folder), []
        write_for_peer(work, samples=options.steps * ROWS * 8 + 400)
        for number in range(options.rounds):
            sides = {}
            for side in ("ours", "peer") if number % 2 == 0 else ("peer", "ours"):
                done = subprocess.run(
                    [sys.executable, __file__, *sys.argv[1:], "--work", folder, "--run", side],
                    capture_output=True,
                    text=True,
                )
                if done.returncode:
                    sys.exit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
                sides[side] = json.loads((work / f"{side}.json").read_text())
            speed = {side: one["tokens"] / one["seconds"] for side, one in sides.items()}
            ratios.append(speed["ours"] / speed["peer"])
            for side, one in sides.items():
                print(
                    f"  {side:<5} {speed[side]:8.0f} tokens/s, {one['parameters'] / 1e6:.2f}M parameters, "
                    f"{one['steps']} steps of {one['tokens'] / one['steps']:.0f} tokens, {one['precision']}",
                    flush=True,
                )
            print(f"round {number + 1}: {ratios[-1]:.2f}x", flush=True)
        print(f"median of {len(ratios)}: {statistics.median(ratios):.2f}x the peer's tokens a second")


if __name__ == "__main__":
    main()
