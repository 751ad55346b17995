"""Small data sets in their original layouts, made by code: files as they are downloaded."""

from __future__ import annotations

import base64
import io
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tiny_world import draw_png

from fastvlm.tokens import Tokenizer

ROOT = Path(__file__).parents[3]


def draw_jpg(seed: int, size=(10, 8)) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.open(io.BytesIO(draw_png(seed, size))).save(file, "jpeg")
    return file.getvalue()


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def put_json(path: Path, value) -> Path:
    return put(path, json.dumps(value, ensure_ascii=False, indent=2))


def turns(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def llava_pretrain(folder: Path) -> Path:
    for i in range(3):
        put(folder / f"images/0045{i}/00453{i}.jpg", draw_jpg(i))
    rows = [
        {
            "id": f"00453{i}",
            "image": f"0045{i}/00453{i}.jpg",
            "conversations": turns(
                ("<image>\nWhat is shown?", "Describe it.\n<image>")[i % 2], ("a red bus", "two cats", "snow, far")[i]
            ),
        }
        for i in range(3)
    ]
    put_json(folder / "blip_laion_cc_sbu_558k.json", rows)
    return folder


def llava_instruct(folder: Path) -> Path:
    for name in ("coco/train2017/000000000009.jpg", "gqa/images/1.jpg"):
        put(folder / name, draw_jpg(len(name)))
    first = "coco/train2017/000000000009.jpg"
    rows = [
        {
            "id": "000000000009",
            "image": first,
            "conversations": turns("<image>\nWhat?", "A dog.", "Where?", "Home."),
        },
        {"id": "000000000009", "image": first, "conversations": turns("Look: <image> and say.", "A dog, again.")},
        {"id": 33, "model": "", "conversations": turns("Only text?", "Yes.")},  # text only, an int as id
        {
            "id": "two",
            "image": [first, "gqa/images/1.jpg"],
            "conversations": turns("<image> or <image>?", "First."),
        },
        {"id": "list", "images": ["gqa/images/1.jpg"], "conversations": turns("<image>\nQ", "A")},
        {"id": "gone", "image": "coco/train2017/404.jpg", "conversations": turns("<image>\nQ", "A")},
        {"id": "more", "image": first, "conversations": turns("<image> <image>", "A")},
        {"id": "none", "image": first, "conversations": turns("no marker", "A")},
        {"id": "bare", "conversations": turns("<image>\nQ", "A")},
        {"id": "empty", "image": first, "conversations": turns("<image>\nQ", " ")},
        {"id": "wrong", "image": first, "conversations": "Q"},
        {"id": "role", "conversations": [{"from": "ghost", "value": "boo"}]},
        {"id": "away", "image": "../../secret.jpg", "conversations": turns("<image>\nQ", "A")},
        {"id": "asked", "image": first, "conversations": turns("<image>\nQ", "A", "and then?")},
        {"conversations": turns("no id", "None.")},
    ]
    put_json(folder / "llava_v1_5_mix665k.json", rows)
    return folder


def sharegpt4v(folder: Path) -> Path:
    put(folder / "a/coco2017/x.jpg", draw_jpg(1))
    put(folder / "b/sa_1.jpg", draw_jpg(2))
    put(folder / "c/web-celebrity/images/y.jpg", draw_jpg(3))
    names = ["coco/coco2017/x.jpg", "sam/images/sa_1.jpg", "web-celebrity/images/y.jpg", "share_textvqa/images/z.jpg"]
    rows = [
        {"id": Path(n).stem, "image": n, "conversations": turns("<image>\nDescribe.", f"It shows {n}.")} for n in names
    ]
    put_json(folder / "sharegpt4v_instruct_gpt4-vision_cap100k.json", rows)
    return folder


def sharegpt(folder: Path) -> Path:
    say = lambda role, value: {"from": role, "value": value}
    rows = [
        {"id": "QWJhYvA_0", "conversations": turns("Hi", "Hello.")},
        {"id": "QWJhYvA_1", "conversations": [say("gpt", "…as I said."), say("human", "Go on"), say("gpt", "So.")]},
        {"id": "s", "conversations": [say("system", "Be brief."), say("human", "Q"), say("gpt", "A")]},
        {
            "id": "tool",
            "system": "Use tools.",
            "tools": '[{"name": "add"}]',
            "conversations": [
                say("human", "1+1?"),
                say("function_call", '{"name": "add"}'),
                say("observation", "2"),
                say("gpt", "Two."),
            ],
        },
        {"id": "twice", "conversations": [say("human", "a"), say("human", "b"), say("gpt", "c")]},
        {"id": "only", "conversations": [say("human", "a")]},
        {"id": "nothing", "conversations": []},
    ]
    put_json(folder / "sharegpt.json", rows)
    return folder


def messages(folder: Path) -> Path:
    for name in ("a.jpg", "b.png"):
        put(folder / name, draw_jpg(1) if name == "a.jpg" else draw_png(2))
    user, told = (lambda c: {"role": "user", "content": c}), lambda c: {"role": "assistant", "content": c}
    url = "data:image/png;base64," + base64.b64encode(draw_png(7)).decode()
    text = lambda words: {"type": "text", "text": words}
    rows = [
        {"messages": [user("<image>Who are they?"), told("Kane and Goretzka.")], "images": ["a.jpg"]},
        {"messages": [user("<image> against <image>"), told("One.")], "images": ["b.png", "a.jpg"]},
        {"messages": [{"role": "system", "content": "Be brief."}, user("No picture."), told("None.")]},
        {
            "messages": [
                user([text("First"), {"type": "image_url", "image_url": {"url": url}}, text("then"),
                      {"type": "image_url", "image_url": "b.png"}]),
                told([text("Two pictures.")]),
            ]
        },
        {"messages": [user([{"type": "image"}, text("from the list")]), told("A")], "images": ["a.jpg"]},
        {"messages": [user("<image>"), told("picture alone")], "images": ["a.jpg"]},
        {"messages": [user("<image><image>"), told("A")], "images": ["a.jpg"]},
        {"messages": [user("no marker"), told("A")], "images": ["a.jpg"]},
        {"messages": [user([{"type": "image_url", "image_url": {"url": "https://x.org/a.jpg"}}]), told("A")]},
        {"messages": [user([{"type": "audio"}]), told("A")]},
        {"messages": [user("call"), told(None)]},
        {"messages": [user("<video>What happens?"), told("A goal.")], "videos": ["a.mp4"]},
        {"messages": [user("What is said?"), told("No.")], "audios": ["a.wav"], "videos": []},
    ]  # fmt: skip
    put_json(folder / "mllm_demo.json", rows)
    put(folder / "lines" / "mllm_demo.jsonl", "".join(json.dumps(row) + "\n" for row in rows[:2]) + "\n")
    return folder


def csv_tables(folder: Path) -> Path:
    put(folder / "pics/a.jpg", draw_jpg(1))
    put(folder / "qa.csv", '﻿id,image,question,answer\n7,a.jpg,"What, and\nwhere?",A dog\n8,,text?,yes\n9,a.jpg,short\n')
    put(folder / "captions.tsv", 'file\ttext\na.jpg\ta "quoted" dog\na.jpg\t\nb.jpg\tgone\n'.replace('"', ""))
    return folder


def parquet(path: Path, rows: list[dict], schema: pa.Schema | None = None, **settings) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, **settings)
    return path


def smoltalk(folder: Path) -> Path:
    """`full_topic` of smol-magpie-ultra is from memory: not held against a real file yet."""
    talk = lambda *texts: [{"content": t, "role": ("user", "assistant")[i % 2]} for i, t in enumerate(texts)]
    rows = [{"messages": talk(f"Q{i}", f"A{i}", "more", "less"), "source": "smol-magpie-ultra"} for i in range(5)]
    rows += [{"messages": [{"content": "Be kind.", "role": "system"}, *talk("Q", "A")], "source": "everyday"}]
    parquet(folder / "data/all/train-00000-of-00002.parquet", rows[:4], row_group_size=3)
    parquet(folder / "data/all/train-00001-of-00002.parquet", rows[4:])
    parquet(folder / "data/all/test-00000-of-00001.parquet", rows[:2])
    parquet(folder / "data/everyday-conversations/train-00000-of-00001.parquet", rows[5:])
    topics = [{**row, "full_topic": topic} for row, topic in zip(rows, ("Travel/Lakes", None))]
    parquet(folder / "data/smol-magpie-ultra/train-00000-of-00001.parquet", topics)
    return folder


IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def picture(seed: int) -> dict:
    return {"bytes": draw_jpg(seed), "path": None}


def cauldron(folder: Path) -> Path:
    texts = pa.list_(pa.struct([("user", pa.string()), ("assistant", pa.string()), ("source", pa.string())]))
    schema = pa.schema([("images", IMAGES), ("texts", texts)])
    say = lambda user, assistant: {"user": user, "assistant": assistant, "source": "AI2D"}
    rows = [
        {"images": [picture(1)], "texts": [say("Question: which?\nA. x", "Answer: A"), say("And now?", "B")]},
        {"images": [picture(2), picture(3)], "texts": [say("Compare.", "Alike.")]},
        {"images": [picture(4)], "texts": [say("", "A caption.")]},
        {"images": [picture(5)], "texts": [say("Q", "")]},
        {"images": [{"bytes": b"not an image", "path": None}], "texts": [say("Q", "A")]},
    ]
    parquet(folder / "ai2d/train-00000-of-00001-2ce340398c113b79.parquet", rows, schema)
    parquet(folder / "vqav2/train-00000-of-00001-a.parquet", rows[:1], schema)
    return folder


def finevision(folder: Path) -> Path:
    texts = pa.list_(pa.struct([("user", pa.string()), ("assistant", pa.string())]))
    kinds = ("relevance", "image_correspondence", "formatting", "visual_dependency")
    fields = [("images", IMAGES), ("texts", texts), ("source", pa.string())]
    for kind in kinds:
        fields += [(f"{kind}_ratings", pa.list_(pa.int64())), (f"{kind}_min", pa.int64())]
    say = [{"user": "What?", "assistant": "This."}, {"user": "Why?", "assistant": "So."}]
    ratings = {f"{kind}_ratings": [5, None] for kind in kinds} | {f"{kind}_min": 5 for kind in kinds}
    none = {f"{kind}_ratings": None for kind in kinds}
    rows = [
        {"images": [picture(1)], "texts": say, "source": "ai2d_merged"} | ratings,
        {"images": None, "texts": say[:1], "source": "text_only"} | none,
        {"images": None, "texts": [{"user": "What is <image>?", "assistant": "A tag."}], "source": "text_only"} | none,
        {"images": [picture(2)], "texts": [{"user": "Is <image> <image>?", "assistant": "Yes."}], "source": "a"} | none,
    ]
    parquet(folder / "ai2d_merged/train-00000-of-00001.parquet", rows, pa.schema(fields))
    return folder


def coco_captions(folder: Path, year: str = "2017") -> Path:
    """In 2014 the files' names begin with the split's. The header's fields are from memory: not held against a real
    file yet."""
    for split, ids in (("train", (9, 25, 30)), ("val", (139,))):
        front = f"COCO_{split}2014_" if year == "2014" else ""
        images = [
            {"license": 5, "file_name": f"{front}{i:012d}.jpg", "coco_url": "", "height": 8, "width": 10, "id": i}
            for i in ids
        ]
        for i in ids[:2]:
            put(folder / f"{split}{year}/{front}{i:012d}.jpg", draw_jpg(i))
        notes = [
            {"image_id": i, "id": 100 * i + k, "caption": f"caption {k} of {i}. "}
            for k in (1, 0)
            for i in ids
            if i != 30
        ]
        if split == "train":
            notes += [{"image_id": 9, "id": 999, "caption": " "}, {"image_id": 77, "id": 7700, "caption": "whose?"}]
        data = {"info": {"year": int(year)}, "licenses": [], "images": images, "annotations": notes}
        put_json(folder / f"annotations/captions_{split}{year}.json", data)
    return folder


def coco_karpathy(folder: Path) -> Path:
    rows = []
    for i, split in enumerate(["train", "restval", "val", "test", "train"]):
        where = "train2014" if split == "train" else "val2014"
        name = f"COCO_{where}_{i:012d}.jpg"
        put(folder / where / name, draw_jpg(i))
        words = [{"tokens": ["a", "cat"], "raw": f"A cat {k} {i}.", "imgid": i, "sentid": 10 * i + k} for k in range(2)]
        rows.append(
            {"filepath": where, "sentids": [10 * i, 10 * i + 1], "filename": name, "imgid": i, "split": split,
             "sentences": words, "cocoid": 1000 + i}
        )  # fmt: skip
    put_json(folder / "dataset_coco.json", {"images": rows, "dataset": "coco"})
    return folder


def read_split(folder: Path, split: str) -> list[tuple[str, dict, list[bytes], list[str]]]:
    """Key, record, images and their suffixes of every sample, read by tarfile alone."""
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, suffix = member.name.split(".", 1)
                samples.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    found = []
    for key, members in samples.items():
        record = json.loads(members.pop("json"))
        order = sorted(members, key=lambda suffix: int(suffix.split(".")[0]))
        found.append((key, record, [members[s] for s in order], order))
    return found


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.tar"))}


def run_command(*words: object) -> subprocess.CompletedProcess:
    """Run data/prepare.py as a user does, in a fresh interpreter."""
    command = [sys.executable, str(ROOT / "data/prepare.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


class Run:
    """data/prepare.py's main in a forked process of its own: to be killed, limited, or run beside another.

    Args:
        log: a file for its standard output and errors.
        limit: bytes no file may grow beyond.
    """

    def __init__(self, *words: object, log: Path, limit: int = 0):
        self.log = log
        # Forked: importing the tokenizer's library takes longer than all that is tested here.
        self.process = multiprocessing.get_context("fork").Process(target=self.main, args=(words, limit))
        self.process.start()
        self.pid = self.process.pid

    def main(self, words: tuple, limit: int) -> None:
        from data.prepare import main

        with open(self.log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(2), "w", buffering=1)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        code = main([str(word) for word in words])
        sys.stdout.flush()
        os._exit(code)

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def wait(self) -> tuple[int, str]:
        """Exit status and what it said."""
        self.process.join(200)
        assert not self.alive, f"it hangs: {self.log.read_text()}"
        return self.process.exitcode, self.log.read_text()


def told_tokenizer(tokenizer: Tokenizer) -> dict:
    return {"tokenizer": tokenizer.path, "template": tokenizer.template.name}
