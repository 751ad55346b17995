"""The pool behind the recipes: the same bytes however it is run, killed or cut short, and plain words for a mistake."""

from __future__ import annotations

import errno
import hashlib
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import time
import zlib
from datetime import datetime
from pathlib import Path

import document_layouts
import instruct_layouts as layouts
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import vqa_layouts
from instruct_layouts import Run, run_command, shard_bytes, told_tokenizer
from PIL import Image

from data.prepare import main, prepare
from data.recipes.writing import Fault, read_file
from fastvlm.data.index import load_index
from fastvlm.tokens import Tokenizer

ROWS = 240


@pytest.fixture(scope="session")
def big(tmp_path_factory) -> Path:
    """LLaVA rows enough for thirty shards; every image stands in two rows."""
    folder = tmp_path_factory.mktemp("big")
    rows = []
    for i in range(ROWS):
        name = f"coco/train2017/{i // 2:012d}.jpg"
        if i % 2 == 0:
            layouts.put(folder / name, layouts.draw_jpg(i, (96, 64)))
        rows.append({"id": str(i), "image": name, "conversations": layouts.turns("<image>\nQ?", f"A {i} " * 20)})
    rows[17]["image"] = "coco/train2017/gone.jpg"
    layouts.put_json(folder / "llava_v1_5_mix665k.json", rows)
    return folder


@pytest.fixture(scope="session")
def words(big, tokenizer) -> list[str]:
    told = told_tokenizer(tokenizer)
    return ["source=llava_instruct", f"path={big}", "rows=8", *(f"{k}={v}" for k, v in told.items())]


@pytest.fixture(scope="session")
def whole(words, tmp_path_factory) -> dict[str, bytes]:
    """The shards of one undisturbed run by one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main([*words, f"out={out}", "workers=1"]) == 0
    return shard_bytes(out)


def left_over(out: Path) -> list[str]:
    """Names beside the folder that a run has left."""
    return sorted(p.name for p in out.parent.iterdir() if p.name.startswith("."))


def test_two_workers_write_the_bytes_of_one_and_all_of_it_can_be_read(words, whole, tokenizer, tmp_path):
    out = tmp_path / "out"
    done = run_command(*words, f"out={out}", "workers=2")
    assert done.returncode == 0, done.stderr
    assert shard_bytes(out) == whole and len(whole) == ROWS // 8
    index = load_index(out, "train", tokenizer, rebuild=False)
    assert index.num_samples == ROWS - 1 and not any(index.faults.to_pylist())
    listed = json.loads((out / "shards.json").read_text())["train"]
    assert {row["name"]: row["size"] for row in listed} == {name: len(data) for name, data in whole.items()}
    assert sum(row["samples"] for row in listed) == ROWS - 1
    assert "train dropped 1: image missing (for example 17)" in done.stdout
    assert json.loads((out / "DONE.json").read_text())["dropped"]["train"]["image missing"]["count"] == 1
    assert (out / "dropped.jsonl").read_text() == '{"split": "train", "id": "17", "reason": "image missing"}\n'
    assert left_over(out) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(words, whole, tmp_path, workers, capsys):
    out, work = tmp_path / "out", tmp_path / ".out.work"
    run = Run(*words, f"out={out}", f"workers={workers}", log=tmp_path / "log")
    while len(list(work.glob("train-*.json"))) < 3:
        assert run.alive, "it ended before it could be killed"
        time.sleep(0.002)
    run.kill()
    assert not out.exists()
    reports = sorted(work.glob("train-*.json"))
    # One done shard is damaged after the kill: it must be written again, and only it.
    shard = reports[0].with_suffix(".tar")
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    assert main([*words, f"out={out}", "workers=2"]) == 0
    sound = int(capsys.readouterr().err.split(" of 30 shards were there")[0].split("\n")[-1])
    assert len(reports) - 1 <= sound < ROWS // 8
    assert shard_bytes(out) == whole
    assert left_over(out) == []


def test_two_runs_at_once_give_one_folder_and_both_succeed(words, whole, tmp_path):
    out = tmp_path / "out"
    runs = [Run(*words, f"out={out}", "workers=2", log=tmp_path / f"log{i}") for i in range(2)]
    ended = [run.wait() for run in runs]
    assert [code for code, _ in ended] == [0, 0], ended
    assert sorted("complete already" in told for _, told in ended) == [False, True]
    assert shard_bytes(out) == whole and left_over(out) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_leaves_no_half_written_file(words, whole, tmp_path, workers):
    """The kernel refuses to let a file grow beyond the limit, as a full disk or a quota would."""
    out, work = tmp_path / "out", tmp_path / ".out.work"
    limit = min(map(len, whole.values())) // 2
    code, told = Run(*words, f"out={out}", f"workers={workers}", log=tmp_path / "log", limit=limit).wait()
    assert code == 2 and told.count("\n") == 1, told
    assert "while writing; 0 of 30 shards are whole" in told and "run the same command again" in told
    assert not out.exists() and [p.name for p in work.iterdir()] == ["stamp.txt"]
    assert main([*words, f"out={out}"]) == 0
    assert shard_bytes(out) == whole and left_over(out) == []


def test_a_disk_that_fills_up_keeps_the_whole_shards_and_goes_on_with_more_room(words, whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(map(len, whole.values())) // 2
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk], capture_output=True).returncode:
        pytest.skip("a small tmpfs needs the right to mount")
    try:
        out, work = disk / "out", disk / ".out.work"
        code, told = Run(*words, f"out={out}", "workers=2", log=tmp_path / "log").wait()
        assert code == 2 and told.count("\n") == 1, told
        assert "no space left on device while writing" in told and not out.exists()
        shards = {p.name for p in work.glob("*.tar")}
        assert {p.name.replace(".json", ".tar") for p in work.glob("train-*.json")} <= shards
        assert all((work / name).read_bytes() in whole.values() for name in shards) and shards
        subprocess.run(["mount", "-o", f"remount,size={6 * size}", disk], check=True)
        assert main([*words, f"out={out}"]) == 0
        assert shard_bytes(out) == whole
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_killed_worker_is_one_line_and_the_run_can_go_on(words, whole, tmp_path):
    out, work = tmp_path / "out", tmp_path / ".out.work"
    run = Run(*words, f"out={out}", "workers=2", log=tmp_path / "log")
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    while not list(work.glob("train-*.json")) or not (found := children.read_text().split()):
        assert run.alive
        time.sleep(0.002)
    os.kill(int(found[0]), signal.SIGKILL)
    code, told = run.wait()
    assert code == 2 and told.count("\n") == 1 and "a worker process was killed" in told, told
    assert main([*words, f"out={out}"]) == 0
    assert shard_bytes(out) == whole


def test_half_done_work_of_another_command_is_thrown_away(words, tmp_path, capsys):
    out, work = tmp_path / "out", tmp_path / ".out.work"
    work.mkdir()
    (work / "stamp.txt").write_text("of another command")
    (work / "train-000000.tar").write_text("not ours")
    assert main([*words, f"out={out}"]) == 0
    assert "starting anew" in capsys.readouterr().err and not work.exists()


@pytest.mark.parametrize("val", [0.1, 0.5])
def test_no_image_stands_on_both_sides_of_a_held_out_split(big, tokenizer, tmp_path, val):
    settings = {"path": str(big), "val": val, "rows": 16, **told_tokenizer(tokenizer)}
    done = prepare("llava_instruct", out=tmp_path / "out", workers=1, **settings)
    sides = {
        split: [record["meta"]["image_id"] for _, record, _, _ in layouts.read_split(tmp_path / "out", split)]
        for split in ("train", "val")
    }
    assert not set(sides["train"]) & set(sides["val"])
    assert len(sides["train"]) + len(sides["val"]) == ROWS - 1
    assert abs(len(sides["val"]) / ROWS - val) < 0.1
    assert done["dropped"]["val"] == {} and done["dropped"]["train"]["image missing"]["count"] == 1


def write_pages(folder: Path, names: list[list[str]]) -> Path:
    """A conversation a list of images; every image is drawn once."""
    rows = []
    for i, images in enumerate(names):
        for name in images:
            if not (folder / name).exists():
                layouts.put(folder / name, layouts.draw_jpg(int(Path(name).stem)))
        rows.append({"id": i, "image": images, "conversations": layouts.turns("<image>" * len(images), "A")})
    return layouts.put_json(folder / "rows.json", rows)


def read_images(out: Path, split: str) -> list[list[str]]:
    images = [record["meta"]["image_id"] for _, record, _, _ in layouts.read_split(out, split)]
    return [[i] if isinstance(i, str) else i for i in images]


def test_records_of_several_images_are_held_out_like_others_and_train_loses_none(tokenizer, tmp_path, capsys):
    rows = write_pages(tmp_path, [[f"{3 * i + k}.jpg" for k in range(3)] for i in range(100)])
    told = [f"{k}={v}" for k, v in told_tokenizer(tokenizer).items()]
    out = tmp_path / "out"
    assert main(["source=llava_instruct", f"path={rows}", "val=0.2", f"out={out}", "rows=30", *told]) == 0
    val = len(read_images(out, "val"))
    assert 10 < val < 30 and len(read_images(out, "train")) == 100 - val
    assert f"held out {val} of 100 records: {val} % (val=0.2)" in capsys.readouterr().out
    done = json.loads((out / "DONE.json").read_text())
    assert done["dropped"] == {"train": {}, "val": {}}


@pytest.mark.parametrize("workers", [1, 2])
def test_train_leaves_out_what_shares_an_image_with_val_and_nothing_else(tokenizer, tmp_path, workers):
    pages = [[f"{i}.jpg", f"{(i + 1) % 40}.jpg"] for i in range(40)] + [[f"{i}.jpg"] for i in range(50)]
    rows = write_pages(tmp_path, pages)
    settings = {"path": str(rows), "val": 0.3, "rows": 16, "workers": workers, **told_tokenizer(tokenizer)}
    done = prepare("llava_instruct", out=tmp_path / "out", **settings)
    train, val = (read_images(tmp_path / "out", split) for split in ("train", "val"))
    held_out = {image for images in val for image in images}
    assert sorted(train) == sorted(p for p in pages if p not in val and not held_out & set(p))
    assert done["dropped"]["val"] == {} and list(done["dropped"]["train"]) == ["shares an image with val"]
    assert done["held_out"] == {"kept": len(val), "of": 90, "val": 0.3}
    alone = prepare("llava_instruct", out=tmp_path / "alone", splits=("train",), **settings)
    assert read_images(tmp_path / "alone", "train") == train and "val" not in alone["counts"]["llava_instruct"]
    assert {p.name for p in (tmp_path / "alone").glob("*.tar")} == {
        p.name for p in (tmp_path / "out").glob("train*tar")
    }


def test_a_record_of_one_image_is_held_out_by_the_first_bytes_of_its_hash():
    from data.recipes.held_out import choose_side, hash_images
    from data.recipes.record import Record

    for i in range(50):
        item = Record("k", {"id": i}, [Path(f"/a/coco/{i}.jpg")])
        point = int.from_bytes(hashlib.sha256(f"coco/{i}.jpg".encode()).digest()[:8], "big") / 2**64
        for val in (0.1, 0.5):
            assert (choose_side(item, hash_images(item), val) == "val") == (point < val)


def test_a_train_shard_made_without_other_images_than_val_has_now_is_made_again(big, tokenizer, tmp_path):
    from data.recipes.assembly import cut
    from data.recipes.held_out import write_held_out
    from data.recipes.writing import do_part

    told = told_tokenizer(tokenizer)
    settings = (["train"], {}, (told["tokenizer"], told["template"]), 0.5, 60)
    job = cut(importlib.import_module("data.recipes.llava_instruct"), tmp_path, "llava_instruct", str(big), *settings)[
        0
    ]
    job.held_out = write_held_out(tmp_path / "held_out.bin", [])
    first = do_part(job)
    assert not first["again"] and do_part(job)["again"]
    image = layouts.read_split(tmp_path, "train")[0][1]["meta"]["image_id"]
    known = hashlib.sha256("/".join(Path(image).parts[-2:]).encode()).hexdigest()[:16]
    job.held_out = write_held_out(tmp_path / "held_out.bin", [known])
    second = do_part(job)
    assert not second["again"] and second["kept"] < first["kept"]


def test_faults_of_rows_are_counted_when_val_alone_is_asked_for(tokenizer, tmp_path):
    rows = [{"id": str(i), "conversations": layouts.turns("Q", "A")} for i in range(40)]
    rows += [{"id": f"bad {i}", "conversations": layouts.turns(" ", "A")} for i in range(5)]
    path = layouts.put_json(tmp_path / "rows.json", rows)
    settings = {"path": str(path), "val": 0.5, "rows": 20, **told_tokenizer(tokenizer)}
    for splits in (("val",), ("train",), ("train", "val")):
        done = prepare("sharegpt", out=tmp_path / "-".join(splits), splits=splits, **settings)
        counted = {split: sum(row["count"] for row in reasons.values()) for split, reasons in done["dropped"].items()}
        assert counted == dict.fromkeys(splits, 0) | {splits[0]: 5}


def png_header(width: int, height: int) -> bytes:
    """A PNG of one pixel that says it has more."""
    file = io.BytesIO()
    Image.new("1", (1, 1)).save(file, "png")
    data = bytearray(file.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def clear_gif() -> bytes:
    """The left half red, the right one transparent over a palette of black."""
    image = Image.new("P", (6, 5), 1)
    image.putpalette([0, 0, 0, 200, 0, 0])
    image.paste(0, (3, 0, 6, 5))
    file = io.BytesIO()
    image.save(file, "gif", transparency=0)
    return file.getvalue()


def prepare_images(folder: Path, tokenizer, files: dict[str, bytes], *more: dict) -> tuple[dict, dict[str, list]]:
    """A conversation an image; why which were dropped, and what was kept: suffix and bytes by name."""
    rows = []
    for name, data in files.items():
        if not (folder / name).exists():
            layouts.put(folder / name, data)
        rows.append({"id": name, "image": name, "conversations": layouts.turns("<image>\nQ", "A")})
    (folder / "rows.json").write_text(json.dumps([*rows, *more]))
    settings = {"path": str(folder / "rows.json"), **told_tokenizer(tokenizer)}
    done = prepare("llava_instruct", out=folder / "out", workers=1, **settings)
    kept = {r["id"]: (ext, images) for _, r, images, ext in layouts.read_split(folder / "out", "train")}
    return {reason: row["examples"] for reason, row in done["dropped"]["train"].items()}, kept


def test_images_of_other_kinds_are_mended_or_named(tokenizer, tmp_path):
    files = {"a.gif": clear_gif(), "b.jpg": b"no image", "c.png": png_header(50000, 50000), "e.jpg": b""}
    files["d.png"] = layouts.draw_jpg(1)
    lost = {"id": "surrogate", "conversations": layouts.turns("Q \ud83d", "A")}
    dropped, kept = prepare_images(tmp_path, tokenizer, files, lost)
    assert {name: suffix for name, (suffix, _) in kept.items()} == {"a.gif": ["0.png"], "d.png": ["0.jpg"]}
    picture = Image.open(io.BytesIO(kept["a.gif"][1][0]))
    assert picture.mode == "RGB"
    assert [picture.getpixel((x, 2)) for x in (0, 5)] == [(200, 0, 0), (255, 255, 255)]  # not the palette's black
    assert dropped == {
        "image unreadable": ["b.jpg", "e.jpg"],
        "image too large": ["c.png"],
        "text is not Unicode": ["surrogate"],
    }


def test_what_the_index_would_refuse_is_dropped_and_the_run_ends(tokenizer, tmp_path):
    """Between the index's 64 megapixels and Pillow's 89, and above its 64 MiB: written, neither could be indexed."""
    with open(tmp_path / "file.png", "wb") as file:
        file.write(layouts.draw_png(1))
        file.truncate((64 << 20) + 1)
    files = {"wide.png": png_header(10000, 7000), "file.png": b"", "good.png": layouts.draw_png(2)}
    dropped, kept = prepare_images(tmp_path, tokenizer, files)
    assert dropped == {"image too large": ["wide.png", "file.png"]} and list(kept) == ["good.png"]


def test_an_image_that_may_not_be_read_is_dropped_as_one_that_cannot_be_opened(tmp_path):
    (tmp_path / "a.png").write_bytes(layouts.draw_png(1))
    (tmp_path / "a.png").chmod(0)
    user = os.geteuid()
    try:
        os.seteuid(user or 65534)  # root may read everything
        with pytest.raises(Fault, match="image unreadable"):
            read_file(tmp_path / "a.png", 1 << 20)
    finally:
        os.seteuid(user)


def test_no_image_starts_another_program(tokenizer, tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    started = []
    draw = lambda *arguments, **settings: started.append(1) or Image.new("RGB", (9, 9)).im
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", draw)
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    dropped, _ = prepare_images(tmp_path, tokenizer, {"page.png": page, "good.png": layouts.draw_png(2)})
    assert dropped == {"image unreadable": ["page.png"]} and not started


def test_a_row_that_no_reader_takes_is_named_and_not_tried_for_ever(tokenizer, tmp_path, monkeypatch):
    from fastvlm.data import sidecar

    def refuse(raw, tokenizer):
        raise ValueError("no reader takes it")

    monkeypatch.setattr(sidecar, "describe_sample", refuse)
    with pytest.raises(ValueError, match=r"rows.json: a row makes a sample .* no reader takes it\); take that row out"):
        prepare_images(tmp_path, tokenizer, {"good.png": layouts.draw_png(2)})


def test_another_tokenizer_makes_new_indexes_and_leaves_the_shards(words, other_tokenizer, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*words, f"out={out}"]) == 0
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    told = [word for word in words if not word.startswith(("tokenizer=", "template="))]
    told += [f"{k}={v}" for k, v in told_tokenizer(other_tokenizer).items()]
    assert main([*told, f"out={out}"]) == 0 and "complete already" in capsys.readouterr().out
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")} == before
    assert load_index(out, "train", other_tokenizer, rebuild=False).num_samples == ROWS - 1


def test_an_image_token_of_ones_own_is_that_of_the_index(words, tokenizer, tmp_path, capsys):
    out = tmp_path / "out"
    for image_token in ("<image>", "<picture>"):  # for new shards, and for those that are there
        assert main([*words, f"image_token={image_token}", f"out={out}"]) == 0
        ours = Tokenizer(tokenizer.path, template=tokenizer.template.name, image_token=image_token)
        assert load_index(out, "train", ours, rebuild=False).num_samples == ROWS - 1
    assert "complete already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "line"),
    [
        (["path=/nowhere/x.json"], "path=/nowhere/x.json does not exist; name the file or the folder"),
        (["path=mine/rows.json"], "does not exist; name the file or the folder of the data set, or its hub id"),
        (["rowss=3"], "did you mean rows?"),
        (["rows=x"], "rows=x is not of type int"),
        (["rows=-1"], "rows=-1 must be 1 or more"),
        (["rows=0"], "rows=0 must be 1 or more"),
        (["rewrite=on"], "rewrite=on is not of type bool"),
        (["rewrite=ture"], "rewrite=ture is not of type bool"),
        (["splits=train,val"], "llava_instruct has no split val, it has ['train']; hold one out with val=0.01"),
        (["val=1.5"], "val=1.5 must be a share"),
        (["source=llava_instuct"], "did you mean llava_instruct?"),
        (["source=coco_captions", "val=0.1"], "this recipe has no key val"),
        (["tokenizer=/nowhere"], "no tokenizer there"),
        (["rows"], "is not key=value"),
    ],
)
def test_a_mistake_is_one_line(words, tmp_path, extra, line, capsys):
    given = dict(word.split("=", 1) for word in [*words, f"out={tmp_path / 'out'}"])
    if extra[0].startswith("source=coco"):
        given.pop("rows")
    given |= dict(word.split("=", 1) for word in extra if "=" in word)
    assert main([*(f"{k}={v}" for k, v in given.items()), *(w for w in extra if "=" not in w)]) == 2
    told = capsys.readouterr().err
    assert line in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_images_that_come_later_are_found_by_the_same_command_and_by_a_rewrite(tokenizer, tmp_path, capsys):
    told = [f"{k}={v}" for k, v in told_tokenizer(tokenizer).items()]
    rows = [{"id": str(i), "image": f"{i}.jpg", "conversations": layouts.turns("<image>\nQ?", "A")} for i in range(2)]
    layouts.put_json(tmp_path / "rows.json", rows)
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    given = ["source=llava_instruct", f"path={tmp_path / 'rows.json'}", f"images={pictures}", f"out={out}", *told]
    assert main(given) == 2 and "2 image missing" in capsys.readouterr().err
    layouts.put(pictures / "0.jpg", layouts.draw_jpg(0))
    assert main(given) == 0
    kept = lambda: json.loads((out / "DONE.json").read_text())["counts"]["llava_instruct"]["train"]
    assert kept() == 1
    layouts.put(pictures / "1.jpg", layouts.draw_jpg(1))
    assert main([*given, "rewrite=true"]) == 0 and kept() == 2


def test_a_rewrite_takes_no_parts_of_a_killed_run_that_was_none(tokenizer, tmp_path, monkeypatch):
    told = [f"{k}={v}" for k, v in told_tokenizer(tokenizer).items()]
    rows = [{"id": str(i), "image": f"{i}.jpg", "conversations": layouts.turns("<image>\nQ?", "A")} for i in range(2)]
    layouts.put_json(tmp_path / "rows.json", rows)
    layouts.put(tmp_path / "pictures" / "0.jpg", layouts.draw_jpg(0))
    out = tmp_path / "out"
    given = ["source=llava_instruct", f"path={tmp_path / 'rows.json'}", f"images={tmp_path / 'pictures'}", *told]
    given += [f"out={out}", "workers=1"]

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data.recipes.assembly.publish", stop)
        assert main(given) == 130
    layouts.put(tmp_path / "pictures" / "1.jpg", layouts.draw_jpg(1))
    assert main([*given, "rewrite=true"]) == 0
    assert json.loads((out / "DONE.json").read_text())["counts"]["llava_instruct"]["train"] == 2


def test_a_folder_of_another_command_is_kept_unless_it_is_to_be_rewritten(tokenizer, tmp_path, capsys):
    told = [f"{k}={v}" for k, v in told_tokenizer(tokenizer).items()]
    for name in "ab":
        row = json.dumps({"id": name, "conversations": layouts.turns("Q", f"A {name}")})
        (tmp_path / f"{name}.jsonl").write_text(row + "\n")
    out = tmp_path / "out"
    given = lambda name: ["source=sharegpt", f"path={tmp_path / name}.jsonl", f"out={out}", *told]
    assert main(given("a")) == 0
    before = shard_bytes(out)
    assert main(given("b")) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "holds what another command made" in line and "a.jsonl" in line and shard_bytes(out) == before
    assert main([*given("b"), "rewrite=true"]) == 0 and shard_bytes(out) != before


def test_an_image_name_that_is_too_long_costs_its_row_alone(tokenizer, tmp_path):
    told = [f"{k}={v}" for k, v in told_tokenizer(tokenizer).items()]
    chat = [{"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "A"}]
    rows = [{"messages": chat, "images": ["A" * 400]}, {"messages": [{**chat[0], "content": "Q"}, chat[1]]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    assert main(["source=messages", f"path={tmp_path / 'rows.jsonl'}", f"out={out}", *told]) == 0
    done = json.loads((out / "DONE.json").read_text())
    assert done["counts"]["messages"]["train"] == 1 and done["dropped"]["train"]["image missing"]["count"] == 1


def test_a_row_whose_id_is_no_json_costs_its_row_alone(tokenizer, tmp_path):
    told = [f"{k}={v}" for k, v in told_tokenizer(tokenizer).items()]
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    (tmp_path / "in").mkdir()
    for name, id in (("a", "x"), ("b", datetime(2026, 1, 1))):
        pq.write_table(pa.Table.from_pylist([{"id": id, "messages": chat}]), tmp_path / "in" / f"{name}.parquet")
    out = tmp_path / "out"
    assert main(["source=messages", f"path={tmp_path / 'in'}", f"out={out}", *told]) == 0
    done = json.loads((out / "DONE.json").read_text())
    assert (
        done["counts"]["messages"]["train"] == 1 and sum(row["count"] for row in done["dropped"]["train"].values()) == 1
    )


def test_a_broken_input_is_one_line_with_file_and_row_and_all_dropped_is_refused(tokenizer, tmp_path, capsys):
    told = [f"{k}={v}" for k, v in told_tokenizer(tokenizer).items()]
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"id": 1, "conversations": layouts.turns("Q", "A")})
    path.write_text("\n".join([good] * 5 + ['{"id": 2, "conv'] + [good]))
    settings = ["source=sharegpt", f"path={path}", f"out={tmp_path / 'out'}", *told]
    assert main([*settings, "rows=2"]) == 2
    assert f"{path}: row 5 is not JSON" in (line := capsys.readouterr().err) and line.count("\n") == 1
    path.write_text(json.dumps({"id": 1, "conversations": []}) + "\n")
    assert main(settings) == 2
    assert "no sample of split train is usable (1 no turns)" in capsys.readouterr().err


def test_a_finished_folder_says_that_its_input_has_changed_and_keeps_what_it_holds(tokenizer, tmp_path, capsys):
    path, out = tmp_path / "rows.jsonl", tmp_path / "out"
    row = json.dumps({"id": 1, "conversations": layouts.turns("Q", "A")}) + "\n"
    path.write_text(row)
    words = [
        "source=sharegpt",
        f"path={path}",
        f"out={out}",
        *(f"{k}={v}" for k, v in told_tokenizer(tokenizer).items()),
    ]
    again = lambda *more: (main([*words, *more]), capsys.readouterr())
    assert again()[0] == 0
    before = shard_bytes(out)
    code, said = again()
    assert code == 0 and "complete already" in said.out and not said.err
    path.write_text(2 * row)
    code, said = again()
    assert code == 2 and said.err.count("\n") == 1 and "complete already" not in said.out
    assert f"{path} has {2 * len(row)} bytes and had {len(row)}; it is left as it is, and rewrite=true" in said.err
    assert shard_bytes(out) == before
    code, said = again("rewrite=true")
    assert code == 0 and "2 records" in said.out and again()[0] == 0
    os.utime(path, ns=(0, 0))
    assert f"{path} is older" in again()[1].err
    path.unlink()  # the data set is cleared away: the shards are what is left of it
    code, said = again()
    assert code == 0 and "complete already" in said.out


def test_one_more_file_in_a_folder_of_many_is_a_change_and_one_beside_a_named_file_is_none(tokenizer, tmp_path):
    raw = layouts.smoltalk(tmp_path / "raw")
    told = {"workers": 1, "splits": ("train",), **told_tokenizer(tokenizer)}
    prepare("smoltalk", out=raw / "shards/all", path=str(raw), **told)
    assert prepare("smoltalk", out=raw / "shards/all", path=str(raw), **told)["skipped"]  # its indexes are no input
    named = raw / "data/all/train-00000-of-00002.parquet"
    prepare("smoltalk", out=tmp_path / "one", path=str(named), **told)
    (raw / "data/all/train-00002-of-00003.parquet").write_bytes(named.read_bytes())
    assert prepare("smoltalk", out=tmp_path / "one", path=str(named), **told)["skipped"]
    with pytest.raises(ValueError, match="train-00002-of-00003.parquet is new"):
        prepare("smoltalk", out=raw / "shards/all", path=str(raw), **told)


def test_a_folder_written_inside_the_data_set_is_never_read(tokenizer, tmp_path):
    told = {"workers": 1, **told_tokenizer(tokenizer)}
    rows = [{"messages": [{"role": r, "content": "x"} for r in ("user", "assistant")], "source": "s"}] * 3
    layouts.parquet(tmp_path / "smoltalk/train-00000-of-00001.parquet", rows)
    layouts.parquet(tmp_path / "smoltalk/test-00000-of-00001.parquet", rows[:2])
    layouts.put_json(tmp_path / "chats/rows.json", [{"id": 1, "conversations": layouts.turns("Q", "A")}])
    layouts.put(tmp_path / "chats/.shards.work/train-000000.json", "{}")  # of a run that was killed
    page = {"text_list": ["a"], "image_info": [], "url": "u"}
    layouts.put(tmp_path / "pages/a.jsonl", json.dumps(page) + "\n")
    layouts.coco_captions(tmp_path / "coco")
    data = {
        "smoltalk": ("smoltalk", {"train": 3, "test": 2}),
        "sharegpt": ("chats", {"train": 1}),
        "mmc4": ("pages", {"train": 1}),
        "coco_captions": ("coco", {"train": 4, "val": 1}),
    }
    for source, (folder, counts) in data.items():
        more = {"min_images": 0} if source == "mmc4" else {}
        out = {"out": tmp_path / folder / "shards", "path": str(tmp_path / folder)}
        for again in ({}, {"rewrite": True}, {}):
            done = prepare(source, **out, **told, **more, **again)
            assert done["counts"][source] == counts, (source, again)


def test_questions_prepared_inside_their_folder_are_not_taken_for_changed_ones(tokenizer, tmp_path):
    raw = vqa_layouts.write_vqav2(tmp_path / "vqa")
    settings = {"out": raw / "shards", "path": str(raw), "workers": 1, "splits": ("val",), **told_tokenizer(tokenizer)}
    prepare("vqav2", **settings)
    prepare("vqav2", rewrite=True, **settings)
    assert prepare("vqav2", **settings)["skipped"]


@pytest.mark.parametrize("folder", ["test", "train", "validation"])
def test_a_data_set_whose_folder_is_called_like_a_split_keeps_its_splits_apart(tokenizer, tmp_path, folder):
    rows = [{"messages": [{"role": r, "content": "x"} for r in ("user", "assistant")], "source": "s"}] * 5
    for split, count in (("train", 5), ("test", 3)):
        layouts.parquet(tmp_path / folder / f"{split}-00000-of-00001.parquet", rows[:count])
        layouts.parquet(tmp_path / "by folder" / folder / split / "0000.parquet", rows[:count])
    for number, path in enumerate((tmp_path / folder, tmp_path / "by folder" / folder)):
        done = prepare("smoltalk", out=tmp_path / f"out{number}", path=str(path), **told_tokenizer(tokenizer))
        assert done["counts"]["smoltalk"] == {"train": 5, "test": 3}


def test_two_splits_are_never_made_of_one_file_of_unknown_split(tokenizer, tmp_path):
    rows = [{"messages": [{"role": r, "content": "x"} for r in ("user", "assistant")], "source": "s"}] * 5
    path = layouts.parquet(tmp_path / "rows.parquet", rows)
    told = {"workers": 1, **told_tokenizer(tokenizer)}
    with pytest.raises(ValueError, match="rows.parquet: .* so train and test would hold the same rows.*splits="):
        prepare("smoltalk", out=tmp_path / "out", path=str(path), **told)
    done = prepare("smoltalk", out=tmp_path / "out", path=str(path), splits=("test",), **told)
    assert done["counts"]["smoltalk"] == {"test": 5}


def test_the_temporary_folder_of_another_name_is_left_alone(words, tmp_path):
    other = tmp_path / ".out.5.4711.tmp"  # of a run with out=out.5
    for folder in (other, tmp_path / ".out.4711.tmp", tmp_path / ".out.4711.old.tmp"):
        layouts.put(folder / "x", "x")
    assert main([*words, f"out={tmp_path / 'out'}"]) == 0
    assert left_over(tmp_path / "out") == [other.name]


@pytest.mark.parametrize("new", [True, False])
def test_a_run_killed_between_two_renames_loses_neither_folder(words, whole, tmp_path, new, capsys):
    out = tmp_path / "out"
    assert main([*words, f"out={out}"]) == 0
    out.rename(tmp_path / ".out.4711.old.tmp")
    if new:
        shutil.copytree(tmp_path / ".out.4711.old.tmp", tmp_path / ".out.4711.tmp")
    (tmp_path / (".out.4711.tmp" if new else ".out.4711.old.tmp") / "mark").touch()
    capsys.readouterr()
    assert main([*words, f"out={out}"]) == 0 and "is complete already" in capsys.readouterr().out
    assert (out / "mark").exists() and shard_bytes(out) == whole


def test_a_folder_that_cannot_be_written_is_one_line_that_names_it(words, tmp_path, capsys):
    layouts.put(tmp_path / "file", "x")
    for out, line in (
        (
            tmp_path / "file/x",
            f"out={tmp_path}/file/x: {tmp_path}/file: file exists; name a folder that can be written",
        ),
        (Path("/proc/x"), "out=/proc/x: /proc/"),
        (tmp_path / "file", f"out={tmp_path}/file is a file; name a folder"),
    ):
        assert main([*words, f"out={out}"]) == 2
        told = capsys.readouterr().err
        assert line in told and told.count("\n") == 1, told


@pytest.mark.parametrize("source", ["sharegpt", "laion"])
def test_a_disk_that_is_full_at_the_very_end_is_one_line(tokenizer, tmp_path, source, monkeypatch, capsys):
    from data import prepare as module

    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "DONE.json")

    monkeypatch.setattr(module, "write_done", refuse)
    if source == "laion":
        path = document_layouts.write_img2dataset(tmp_path / "raw")
    else:
        path = layouts.sharegpt(tmp_path / "raw") / "sharegpt.json"
    told = [f"{k}={v}" for k, v in told_tokenizer(tokenizer).items()]
    settings = [f"source={source}", f"path={path}", f"out={tmp_path / 'out'}", "workers=1", *told]
    assert main(settings) == 2
    line = "error: no space left on device while writing DONE.json: make room and run the same command again\n"
    assert capsys.readouterr().err == line
    monkeypatch.undo()
    assert main(settings) == 0


def test_a_change_of_the_recipes_code_is_said_and_that_of_another_recipes_is_not(
    tokenizer, tmp_path, monkeypatch, capsys
):
    import shutil

    from data.recipes import inputs

    copy = tmp_path / "recipes"
    shutil.copytree(inputs.HERE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(inputs, "HERE", copy)
    path = layouts.sharegpt(tmp_path / "raw") / "sharegpt.json"
    settings = {"out": tmp_path / "out", "path": str(path), "workers": 1, **told_tokenizer(tokenizer)}
    prepare("sharegpt", **settings)
    capsys.readouterr()
    for module, told in (("vqav2", False), ("conversations", True)):
        with open(copy / f"{module}.py", "a") as file:
            file.write("changed = True\n")
        assert prepare("sharegpt", **settings)["skipped"]
        assert ("sharegpt's code has changed since; rewrite=true" in capsys.readouterr().err) is told
