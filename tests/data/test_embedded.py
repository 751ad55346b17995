"""The embedded data set: what it shows, what it says, and that the two agree."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from data import prepare
from data.recipes.embedded import families, photos, questions, text, world
from fastvlm.data.conversation import encode_record
from fastvlm.data.index import load_index
from fastvlm.tokens import IGNORE_INDEX, Tokenizer

ROOT = Path(__file__).parents[2]
VISUAL = ("short_qa", "reading", "charts")


def question_text(content: str | list[dict]) -> str:
    """The words of a user's turn, without its image."""
    return content if isinstance(content, str) else content[-1]["text"]


@pytest.fixture(scope="module")
def built(embedded) -> Path:
    """A hundredth of the data set, built by two workers."""
    return embedded / "embedded"


@pytest.fixture(scope="module")
def tokenizer(built) -> Tokenizer:
    return Tokenizer(str(built / "tokenizer"), template="roles")


def read_shards(folder: Path, split: str) -> list[tuple[str, dict, dict[str, bytes]]]:
    """Key, record and the other members of every sample, without the reader under test elsewhere."""
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, suffix = member.name.split(".", 1)
                samples.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    return [(key, json.loads(members.pop("json")), members) for key, members in samples.items()]


def composed(family: str, split: str, count: int = 60) -> list[families.Composed]:
    return [c for c, _ in families.compose_split(family, split, seed=0, limit=count)]


def tar_hashes(path: Path) -> dict[str, str]:
    files = [*path.rglob("*.tar"), path / "tokenizer" / "tokenizer.json"]
    return {str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_one_worker_writes_the_same_bytes_as_two_and_another_seed_does_not(built, tmp_path):
    prepare.prepare("embedded", out=tmp_path / "one", scale=0.01, workers=1)
    hashes = tar_hashes(built)
    assert tar_hashes(tmp_path / "one") == hashes
    assert len(hashes) == len(families.FAMILIES) * 3 + 1
    again = [c.record for c in composed("captions", "train")]
    other = [c.record for c, _ in families.compose_split("captions", "train", seed=1, limit=60)]
    assert again == [c.record for c in composed("captions", "train")] != other


def test_every_family_and_split_is_there_indexed_and_sound(built, tokenizer):
    done = json.loads((built / "DONE.json").read_text())
    assert set(done["counts"]) == set(families.FAMILIES)
    for family, counts in done["counts"].items():
        for split, count in counts.items():
            index = load_index(built / family, split, tokenizer, rebuild=False)
            assert index.num_samples == count >= 4, (family, split)
            assert not any(index.faults.to_pylist())
            assert (index.answer_tokens > 0).all()
        assert (built / "contact_sheets" / f"{family}.png").exists()


def test_a_complete_folder_is_left_alone_and_foreign_files_are_never_replaced(built, tmp_path):
    before = (built / "DONE.json").stat().st_mtime_ns
    assert prepare.prepare("embedded", out=built, scale=0.01)["skipped"]
    assert (built / "DONE.json").stat().st_mtime_ns == before
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="holds other files"):
        prepare.prepare("embedded", out=tmp_path, scale=0.01)


def test_help_needs_no_torch_and_mistakes_name_the_nearest_word():
    code = (
        "import sys; sys.argv = ['prepare.py', '--help']; import runpy\n"
        "try: runpy.run_path('data/prepare.py', run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "source=embedded" in run.stdout
    head = subprocess.run(
        f"{sys.executable} data/prepare.py --help | head -n 1", shell=True, cwd=ROOT, capture_output=True, text=True
    )
    assert head.stdout.count("\n") == 1 and not head.stderr
    with pytest.raises(ValueError, match="did you mean embedded"):
        prepare.load_recipe("embeded")
    recipe = prepare.load_recipe("embedded")
    with pytest.raises(ValueError, match="did you mean workers"):
        prepare.parse_arguments(recipe, {"worker": "2"})
    with pytest.raises(ValueError, match="seed=one is not of type int"):
        prepare.parse_arguments(recipe, {"seed": "one"})


def test_no_scan_no_table_row_and_no_document_stands_in_two_splits():
    used: dict[str, set[int]] = {split: set() for split in world.SPLITS}
    for split in world.SPLITS:
        for family in families.TRAIN_COUNTS:
            for c in composed(family, split, 40):
                scenes = [s for s in c.shown if isinstance(s, world.Scene)]
                used[split] |= {glyph.scan for scene in scenes for glyph in scene.glyphs}
        assert used[split] <= set(world.SCANS[split])
    assert sum(len(s) for s in used.values()) == len(set().union(*used.values())) > 700
    assert [len(world.SCANS[s]) for s in world.SPLITS] == [1297, 250, 250]
    for name, rows in (("iris", 150), ("wine", 178), ("breast_cancer", 569), ("diabetes", 442)):
        tables = [world.load_table(name, split) for split in world.SPLITS]
        assert sum(len(t.columns[0]) for t in tables) == rows
    documents = text.split_documents()
    names = [name for split in documents.values() for name, _ in split]
    assert len(names) == len(set(names)) == len(text.load_documents())


def test_photograph_crops_stay_in_their_regions_and_regions_do_not_overlap():
    for name, regions in photos.REGIONS.items():
        covered = np.zeros(photos.load_photo(name).shape[:2], int)
        for split, (x0, y0, x1, y1) in regions.items():
            covered[y0:y1, x0:x1] += 1
            for seed in range(200):
                x, y, side = photos.choose_crop(name, split, Random(seed))
                assert x0 <= x and y0 <= y and x + side <= x1 and y + side <= y1
        assert covered.max() == 1
    assert photos.describe_crop("flower", (0, 0, 120)) == "a photograph of dark green leaves."
    assert photos.describe_crop("flower", (245, 160, 120)) == "a photograph of orange petals, very near."


@pytest.mark.parametrize("split", world.SPLITS)
def test_pixels_show_the_digits_the_record_names(split):
    """An independent look: 1-nearest-neighbour against all scans of the split, on the decoded picture."""
    drawn = world.World(split)
    pool = np.array(world.SCANS[split])
    truth = {i: d for d, scans in enumerate(drawn.by_digit) for i in scans}
    right = total = 0
    for family in (*VISUAL, "captions", "interleaved"):
        for c, rng in families.compose_split(family, split, seed=0, limit=25):
            pictures = families.draw(c, drawn.scans, rng)
            told = c.record["meta"].get("scenes") or [c.record["meta"]["scene"]]
            for scene, png, summary in zip(c.shown, pictures, told):
                if not isinstance(scene, world.Scene):
                    continue
                pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), np.float32)
                paper = pixels[0, -1]
                named = "".join(summary.split(" ")[1 : 1 + len(scene.groups)])
                assert len(named) == len(scene.glyphs)
                for glyph, digit in zip(scene.glyphs, named):
                    patch = pixels[glyph.y : glyph.y + glyph.size, glyph.x : glyph.x + glyph.size]
                    ink = np.abs(patch - paper).sum(-1)
                    small = np.asarray(Image.fromarray(ink / ink.max()).resize((8, 8), Image.Resampling.BOX))
                    nearest = pool[((drawn.scans[pool] - small) ** 2).sum((1, 2)).argmin()]
                    right, total = right + (truth[nearest] == int(digit)), total + 1
    assert total > 250
    # The shrunk pictures are blurred, and those for training are warped too; a wrong label would be near 0.1.
    assert right / total > (0.85 if split == "train" else 0.97)


def test_bars_in_the_pixels_have_the_heights_the_answers_rest_on():
    drawn = world.World("test")
    for c, rng in families.compose_split("charts", "test", seed=0, limit=40):
        pixels = np.asarray(Image.open(io.BytesIO(families.draw(c, drawn.scans, rng)[0])).convert("RGB"), int)
        filled = (np.abs(pixels[:72] - pixels[0, -1]).sum(-1) > 60).sum(0)  # ink per column above the axis
        starts = [x for x in range(96) if filled[x] and not (x and filled[x - 1])]
        heights = [filled[x + 2] for x in starts]
        _, labels, tallest, shortest = c.record["meta"]["scene"].split(" ")
        assert len(heights) == len(labels) == len(set(labels))
        assert labels[int(np.argmax(heights))] == tallest and labels[int(np.argmin(heights))] == shortest
        ordered = sorted(heights)
        assert ordered[-1] - ordered[-2] >= 7 and ordered[1] - ordered[0] >= 7


def expected_answer(summary: str, question: str) -> str:
    """The answer from the scene's summary and the question's words alone, written apart from the recipe."""
    kind, *rest = summary.split(" ")
    numbers = ["zero", "one", "two", "three", "four", "five"]
    orders = ["first", "second", "third", "fourth"]
    digits = rest[0]
    if "tallest" in question or "shortest" in question:
        return rest[1] if "tallest" in question else rest[2]
    if "line" in question:
        which = rest[orders.index(next(o for o in orders if o in question))] if kind == "lines" else digits
        return " ".join(which)
    if "how many" in question or "count" in question:
        return numbers[len(digits)]
    if "largest" in question or "smallest" in question:
        return max(digits) if "largest" in question else min(digits)
    if question.startswith(("is there", "do you see")):
        return "yes" if question.rstrip("?")[-1] in digits else "no"
    if "list" in question or "name all" in question:
        return " ".join(digits)
    if " at the " in question:
        return digits[("bottom" in question) * 2 + ("right" in question)]
    return digits[orders.index(next(o for o in orders if o in question))]


@pytest.mark.parametrize("family", [*VISUAL, "text_qa"])
def test_every_answer_follows_from_the_scene(family, built):
    seen = Counter()
    for split in world.SPLITS:
        for _, record, _ in read_shards(built / family, split):
            meta, turns = record["meta"], record["messages"]
            types = [meta["type"]] if split != "train" else meta["types"]
            assert len(turns) == 2 * len(types) <= 8
            for i, kind in enumerate(types):
                asked, told = turns[2 * i], turns[2 * i + 1]
                assert (asked["role"], told["role"]) == ("user", "assistant")
                question = question_text(asked["content"])
                if family == "text_qa" and i == 0:
                    premise, _, last = (
                        question.rpartition(". ") if question.endswith("?") else (question[:-1].rpartition(". "))
                    )
                    question = last
                    assert digits_of(premise) == digits_of(" ".join(meta["scene"].split(" ")[1:]))
                assert told["content"] == expected_answer(meta["scene"], question), (meta, question)
                seen[kind] += 1
    assert set(seen) >= set(questions.FAMILY_TYPES[family])


def digits_of(words: str) -> str:
    return "".join(c for c in words if c.isdigit())


def test_descriptions_name_what_the_scene_holds():
    scene = world.World("train").grid([4, 7, 1], Random(0))
    assert questions.describe(scene) == "three digits: 4 7 1."
    assert questions.describe(world.World("train").line([4, 7, 1], Random(0))) == "one line: 4 7 1."
    for family in ("captions", "long_form"):
        for c in composed(family, "train", 100):
            if isinstance(c.shown[0], world.Scene):
                words = digits_of(families.record_texts(c.record)[-1])
                spoken = "".join(str(d) for group in c.shown[0].groups for d in group)
                assert words.startswith(spoken)


def test_label_maps_agree_with_the_pictures(built):
    for _, record, members in read_shards(built / "cells", "train"):
        pixels = np.asarray(Image.open(io.BytesIO(members["0.png"])).convert("RGB"), int)
        labels = np.asarray(Image.open(io.BytesIO(members["0.labels.png"])).convert("RGB"))
        assert pixels.shape == (96, 96, 3) and labels.shape == (12, 12, 3)
        kinds, colours = labels[..., 0], labels[..., 1]
        assert ((kinds > 0) == (colours > 0)).all() and kinds.max() < len(world.CLASS_NAMES)
        scene = record["meta"]["scene"].split(" ")
        named = {1 + int(d) for group in scene[1 : 3 if scene[0] == "lines" else 2] for d in group}
        assert set(kinds.ravel().tolist()) - {0, world.BAR} == named
        assert (world.BAR in kinds) == (scene[0] == "chart")
        for y, x in np.argwhere(kinds == 0):  # the middle of an unlabelled cell is bare paper
            assert (pixels[8 * y + 4, 8 * x + 4] == pixels[0, -1]).all()
        for y, x in np.argwhere(kinds > 0):
            cell = pixels[8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
            inked = cell[4, 4]
            if np.abs(inked - pixels[0, -1]).sum() > 200:  # the strongest channel of its ink is the labelled colour
                assert inked.argmax() == colours[y, x] - 1


def test_a_label_belongs_to_the_box_that_covers_the_cells_centre():
    for c in composed("cells", "val", 60):
        labels = world.label_map(c.shown[0])
        for y in range(12):
            for x in range(12):
                inside = [
                    1 + g.digit
                    for g in c.shown[0].glyphs
                    if g.x <= 8 * x + 4 < g.x + g.size and g.y <= 8 * y + 4 < g.y + g.size
                ]
                inside += [
                    world.BAR
                    for b in c.shown[0].bars
                    if b.x <= 8 * x + 4 < b.x + b.width and b.y <= 8 * y + 4 < b.y + b.height
                ]
                assert labels[y, x, 0] == (inside[0] if inside else 0)


def blind_table(train: Iterable[dict], test: Iterable[dict]) -> dict[str, dict[str, float]]:
    """What guessing without the picture reaches on single-question records, per `meta.type`.

    `majority` is the share of the commonest answer in the test records themselves; `prior` is the accuracy of the best
    answer to the question's very words among the training turns, all that a model without the picture can learn;
    `best` the larger one. The row `mean` averages over types.
    """
    seen: dict[str, Counter] = defaultdict(Counter)
    for record in train:
        turns = record["messages"]
        for asked, told in zip(turns[::2], turns[1::2]):
            seen[question_text(asked["content"])][told["content"]] += 1
    by_type: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for record in test:
        asked, told = record["messages"]
        by_type[record["meta"]["type"]].append((question_text(asked["content"]), told["content"]))
    table = {}
    for kind, pairs in by_type.items():
        majority = Counter(told for _, told in pairs).most_common(1)[0][1] / len(pairs)
        guesses = {q: seen[q].most_common(1)[0][0] for q, _ in pairs if seen[q]}
        prior = sum(guesses.get(q) == told for q, told in pairs) / len(pairs)
        table[kind] = {"n": len(pairs), "majority": majority, "prior": prior, "best": max(majority, prior)}
    columns = ("n", "majority", "prior", "best")
    table["mean"] = {c: sum(row[c] for row in table.values()) / len(table) for c in columns}
    return table


def test_evaluation_questions_are_balanced_and_blind_guessing_stays_low():
    """On the full evaluation sets: at least 100 of each type in test, 60 in val; the 12-type mean is at most .18."""
    train = [c.record for family in VISUAL for c in composed(family, "train", 2500)]
    for split, least in (("val", 60), ("test", 100)):
        test = [c.record for family in VISUAL for c in composed(family, split, 10**6)]
        table = blind_table(train, test)
        assert set(table) == {*questions.TYPES, "mean"}
        assert all(row["n"] >= least for row in table.values())
        assert table["mean"]["best"] <= 0.18
        assert table["has"]["best"] <= 0.55 and table["count"]["best"] <= 0.3


def test_a_digit_is_one_token_wherever_it_stands(tokenizer):
    assert len(tokenizer) == 1024
    for digit in "0123456789":
        (alone,) = tokenizer.encode_text(digit)
        assert tokenizer.encode_text(f" {digit}") == [alone]
        assert tokenizer.encode_text(f"three digits: {digit} 7 1.")[-4] == alone
    for word in ("yes", "no", "one", "two", "three", "four", "five"):
        assert len(tokenizer.encode_text(word)) == 1, word
    for words in ("Hello  World\n  12 é’s", "a chart with three bars. labels: 4 7 1.", "x<|image|>y"):
        assert tokenizer.decode(tokenizer.encode_text(words)) == words
    assert tokenizer.image_id not in tokenizer.encode_text("x<|image|>y")


def test_records_encode_with_an_answer_and_text_chunks_stay_short(built, tokenizer):
    for family in families.FAMILIES:
        for key, record, members in read_shards(built / family, "test"):
            encoded = encode_record(record, tokenizer, tokens_per_image=16)
            assert any(label != IGNORE_INDEX for label in encoded.labels), key
            assert encoded.num_images == sum(name.endswith(".png") and "labels" not in name for name in members)
            if family == "text":
                assert len(encoded.input_ids) <= text.MAX_TOKENS + 1
            limit = 64 if "type" in record["meta"] else 200
            assert len(encoded.input_ids) <= limit
