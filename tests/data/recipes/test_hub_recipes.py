"""Data sets as the hub has them: the same records as from the originals' files, and the same road to the shards."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import hub_layouts
import instruct_layouts as layouts
import pytest
from hub_server import DataHub
from instruct_layouts import told_tokenizer

from data.prepare import prepare
from data.recipes.record import Dropped, Record

SPLITS = {
    "vqav2": ["val"],
    "okvqa": ["val"],
    "aokvqa": ["train", "val"],
    "textvqa": ["train", "val"],
    "vizwiz": ["val"],
    "pope": ["test"],
    "coco_captions": ["val"],
    "coco_karpathy": ["train", "val", "test"],
}


def convert(name: str, folder: Path, split: str, **options) -> tuple[list[Record], Counter]:
    recipe = importlib.import_module(f"data.recipes.{name}")
    made = [item for part in recipe.parts(folder, split=split, **options) for item in recipe.convert(part)]
    records = [item for item in made if isinstance(item, Record)]
    assert len({record.key for record in records}) == len(records)
    return records, Counter(item.reason for item in made if isinstance(item, Dropped))


def described(record: Record) -> str:
    """What a record says, whatever its ids are."""
    meta = record.record["meta"]
    told = record.record.get("messages") or record.record["document"]
    images = [image if isinstance(image, bytes) else image.read_bytes() for image in record.images]
    return repr((told, images, *(meta.get(key) for key in ("answers", "type", "choices", "ocr_tokens"))))


@pytest.mark.parametrize(("name", "split"), [(name, split) for name, splits in SPLITS.items() for split in splits])
def test_a_copy_in_parquet_gives_the_records_of_the_originals_files(name, split, tmp_path):
    getattr(hub_layouts, name)(tmp_path / "raw", tmp_path / "copy")
    own = {"field": "answer"} if name == "okvqa" else {}  # the copy has the stems alone
    where = {"images": str(tmp_path / "raw")} if name == "coco_karpathy" else {}
    files, _ = convert(name, tmp_path / "raw", split, **own)
    copy, dropped = convert(name, tmp_path / "copy", split, **own, **where)
    left_out = [r for r in files if name == "vqav2" and r.record["id"] == 25000]
    assert Counter(map(described, copy)) == Counter(described(r) for r in files if r not in left_out)
    assert not set(dropped) - {"no answer", "correct_choice_idx is not one of the choices"} and copy


def test_a_row_of_several_questions_is_a_conversation_and_its_photograph_is_on_one_side(tmp_path):
    hub_layouts.stvqa(tmp_path / "raw", tmp_path / "copy")
    train, dropped = convert("stvqa", tmp_path / "copy", "train", holdout=0.3)
    val, more = convert("stvqa", tmp_path / "copy", "val", holdout=0.3)
    assert not dropped and not more and len(val) > 3
    assert not {r.images[0] for r in train} & {r.images[0] for r in val}
    turns = lambda records: {json.dumps(r.record["messages"]) for r in records}
    whole, _ = convert("stvqa", tmp_path / "copy", "train", holdout=0.0)
    files, _ = convert("stvqa", tmp_path / "raw", "train", holdout=0.0)
    assert turns(whole) == turns(files) == turns(train) | turns(val)
    row = {"image": hub_layouts.cell(next((tmp_path / "raw/coco-text").iterdir()))}
    row["qas"] = [{"question": "What?", "answers": ["a"]}, {"question": "Who?", "answers": ["b"]}]
    hub_layouts.put_parquet(tmp_path / "two/train-0.parquet", [row])
    (record,), _ = convert("stvqa", tmp_path / "two", "train", holdout=0.0)
    assert [m["content"] for m in record.record["messages"][1:]] == ["a", "Who?", "b"]


def test_a_split_that_a_copy_lacks_is_named_with_those_it_has(tmp_path):
    hub_layouts.vqav2(tmp_path / "raw", tmp_path / "copy")
    with pytest.raises(ValueError, match="no parquet files of split train"):
        convert("vqav2", tmp_path / "copy", "train")
    with pytest.raises(ValueError, match=r"images=\.\.\. is missing"):
        hub_layouts.coco_karpathy(tmp_path / "k", tmp_path / "kc")
        convert("coco_karpathy", tmp_path / "kc", "train")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with lmms-lab/VQAv2 in two files, liuhaotian/LLaVA-Instruct-150K and two shards of pages."""
    root = tmp_path / "hub"
    hub_layouts.vqav2(tmp_path / "vqav2", root / "lmms-lab/VQAv2")
    first = root / "lmms-lab/VQAv2/data/validation-00000-of-00001.parquet"
    first.with_name("validation-00001-of-00002.parquet").write_bytes(first.read_bytes())
    raw = layouts.llava_instruct(tmp_path / "llava")
    layouts.put(
        root / "liuhaotian/LLaVA-Instruct-150K/llava_v1_5_mix665k.json", (raw / "llava_v1_5_mix665k.json").read_bytes()
    )
    with DataHub(root) as server:
        for name, value in (("HF_ENDPOINT", server.url), ("HF_HOME", str(tmp_path / "hf"))):
            monkeypatch.setenv(name, value)
        yield server


def run(*words: object) -> subprocess.CompletedProcess:
    """In an interpreter of its own: the hub's address is read when its library is imported."""
    command = [sys.executable, "data/prepare.py", *map(str, words)]
    return subprocess.run(command, cwd=layouts.ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", ["true", "false"])
def test_a_hub_id_goes_through_prepare_and_its_workers(hub, streaming, tmp_path, tokenizer):
    """`datasets` asks a server on loopback; workers are fresh interpreters behind its client."""
    told = [f"{k}={v}" for k, v in told_tokenizer(tokenizer).items()]
    words = [
        "source=vqav2",
        "path=lmms-lab/VQAv2",
        f"streaming={streaming}",
        "rows=4",
        *told,
    ]
    out = f"out={tmp_path / 'out'}"
    done = run(*words, out, "workers=2", "splits=val")
    assert done.returncode == 0, done.stderr
    kept = [record["messages"] for _, record, _, _ in layouts.read_split(tmp_path / "out", "val")]
    files, _ = convert("vqav2", tmp_path / "vqav2", "val")
    wanted = [r.record["messages"] for r in files if r.record["id"] != 25000]
    assert sorted(map(json.dumps, kept)) == sorted(map(json.dumps, 2 * wanted))
    assert any("resolve" in line for line in hub.asked)
    again = run(*words, out, "workers=2", "splits=val")
    assert again.returncode == 0 and "complete already" in again.stdout
    lacking = run(*words, f"out={tmp_path / 'train'}", "splits=train")
    assert lacking.returncode == 2 and lacking.stderr.count("\n") == 1
    assert "no split train (it has validation); leave it out with splits=..." in lacking.stderr


@pytest.mark.slow
def test_rows_in_a_file_of_the_hub_are_fetched_once_and_need_their_images(hub, tmp_path, tokenizer):
    told = [f"{k}={v}" for k, v in told_tokenizer(tokenizer).items()]
    name = "liuhaotian/LLaVA-Instruct-150K"
    for path in (name, f"hf://datasets/{name}/llava_v1_5_mix665k.json"):
        out = tmp_path / path.replace("/", "-")
        words = ["source=llava_instruct", f"path={path}", f"out={out}", "workers=1", *told]
        done = run(*words, f"images={tmp_path / 'llava'}")
        assert done.returncode == 0, done.stderr
        raw = prepare("llava_instruct", out=tmp_path / "raw", path=str(tmp_path / "llava"), **told_tokenizer(tokenizer))
        assert json.loads((out / "DONE.json").read_text())["counts"] == raw["counts"]
    assert sum(line.startswith("GET") and "mix665k" in line for line in hub.asked) == 1
    refused = run("source=llava_instruct", f"path={name}", f"out={tmp_path / 'x'}", *told)
    assert refused.returncode == 2 and f"images=... is missing: {name} gives the rows alone" in refused.stderr
    for path, words in (
        ("nobody/nothing", "no such file or folder here, and the hub says"),
        (f"hf://datasets/{name}/gone.json", "none of gone.json there"),
        ("hf://models/x", "not of the form hf://datasets/org/name/file.json"),
    ):
        refused = run("source=sharegpt", f"path={path}", f"out={tmp_path / 'x'}", *told)
        assert refused.returncode == 2 and words in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr


@pytest.mark.parametrize(("kind", "forked"), [("hub", False), ("json", True)])
def test_workers_are_forked_but_behind_the_hubs_client(kind, forked, tmp_path):
    from unittest.mock import patch

    from data.recipes import assembly
    from data.recipes.record import Part
    from data.recipes.writing import Job

    jobs = [Job("vqav2", "val", i, Part("org/name", i, i + 1, {"kind": kind}), tmp_path, ("", "")) for i in range(2)]
    with patch.object(assembly, "open_pool", side_effect=InterruptedError) as opened, pytest.raises(InterruptedError):
        list(assembly.finished(jobs, 2))
    assert opened.call_args.kwargs == {"fork": forked}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mmc4", "takes no hub id: get its shards"),
        ("gqa", "takes no hub id: get its JSON"),
        ("csv", "name a table there"),
    ],
)
def test_what_the_hub_does_not_have_is_said_in_a_line(name, words, tmp_path):
    with pytest.raises(ValueError, match=f"path=some/thing does not exist; {name} .*{words}"):
        prepare(name, out=tmp_path / "out", path="some/thing")


def test_every_recipe_takes_a_hub_id_or_says_what_to_take():
    from data.prepare import list_recipes, load_recipe

    for name in set(list_recipes()) - {"embedded", "laion"}:
        recipe = load_recipe(name)
        ways = [bool(getattr(recipe, key, None)) for key in ("HUB", "HUB_FILES", "NOT_ON_HUB")]
        assert sum(ways) == 1, name


@pytest.mark.parametrize("name", ["chartqa", "docvqa", "obelics", "fineweb_edu", "lmsys_chat"])
def test_every_recipe_of_parquet_takes_streaming_false(name):
    """It is among the keys of the command, and reaches what reads the hub."""
    from unittest.mock import patch

    from data.prepare import load_recipe, parse_arguments
    from data.recipes import rows

    recipe = load_recipe(name)
    given = parse_arguments(recipe, {"path": "org/name", "streaming": "false"})
    assert given["streaming"] is False
    with patch.object(rows, "cut_hub", return_value=["part"]) as cut:
        assert recipe.parts(Path("org/name"), split="train", streaming=given["streaming"]) == ["part"]
    assert cut.call_args.kwargs["streaming"] is False


def test_every_recipe_with_a_hub_id_has_the_key():
    from data.prepare import list_keys, list_recipes, load_recipe

    recipes = {name: load_recipe(name) for name in list_recipes()}
    lacking = [n for n, r in recipes.items() if getattr(r, "HUB", False) and "streaming" not in list_keys(r)]
    assert not lacking
