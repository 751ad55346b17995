"""Golden records, written by hand, of every layout of instruction and caption data."""

from __future__ import annotations

import json

import instruct_layouts as layouts
import pytest

from data.prepare import load_recipe, parse_arguments, prepare
from data.recipes.record import LAST_LEFT_OUT, MISMATCH
from data.recipes.subsets import cut_subsets

IMAGE = {"type": "image"}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def chat(*contents) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.fixture
def made(tmp_path, tokenizer):
    """Prepare a layout; returns what DONE.json holds and the samples of a split by key."""

    def make(source: str, layout=None, *, split="train", path=None, **options):
        folder = tmp_path / "original"
        if not folder.exists():
            (layout or getattr(layouts, source))(folder)
        out = tmp_path / f"{source}-{len(list(tmp_path.iterdir()))}"
        told = layouts.told_tokenizer(tokenizer)
        done = prepare(source, out=out, path=str(folder / (path or "")), workers=1, **told, **options)
        samples = {key: (record, images, ext) for key, record, images, ext in layouts.read_split(out, split)}
        return done, samples

    return make


def dropped(done: dict, split: str = "train") -> dict[str, list]:
    return {reason: row["examples"] for reason, row in done["dropped"][split].items()}


def test_llava_pretrain_is_an_image_and_its_caption(made):
    done, samples = made("llava_pretrain")
    assert list(samples) == ["004530-0", "004531-1", "004532-2"]
    record, images, ext = samples["004531-1"]
    assert record == {
        "document": [IMAGE, text("two cats")],
        "id": "004531",
        "source": "llava_pretrain",
        "meta": {"turns": 1, "image_id": "00451/004531.jpg"},
    }
    assert images == [layouts.draw_jpg(1)] and ext == ["0.jpg"]
    _, asked = made("llava_pretrain", form="messages")
    assert asked["004531-1"][0]["messages"] == chat([text("Describe it."), IMAGE], "two cats")


def test_llava_instruct_keeps_every_usable_row_and_names_the_others(made, tmp_path):
    done, samples = made("llava_instruct", rows=4)
    assert {key: value[0].get("messages") for key, value in samples.items()} == {
        "000000000009-0": chat([IMAGE, text("What?")], "A dog.", "Where?", "Home."),
        "000000000009-1": chat([text("Look: "), IMAGE, text(" and say.")], "A dog, again."),
        "33-2": chat("Only text?", "Yes."),
        "two-3": chat([IMAGE, text(" or "), IMAGE, text("?")], "First."),
        "list-4": chat([IMAGE, text("Q")], "A"),
        "asked-13": chat([IMAGE, text("Q")], "A"),
        "row-14": chat("no id", "None."),
    }
    assert [samples[k][0]["id"] for k in samples] == ["000000000009"] * 2 + [33, "two", "list", "asked", None]
    assert [len(samples[k][1]) for k in samples] == [1, 1, 0, 2, 1, 1, 0]
    assert dropped(done) == {
        "image missing": ["gone"],
        MISMATCH: ["more", "none", "bare"],
        "empty turn": ["empty"],
        "no turns": ["wrong"],
        "unknown role": ["role"],
        "image outside its folder": ["away"],
    }
    notes = done["notes"]["train"]
    assert notes.pop(LAST_LEFT_OUT) == 1 and list(notes.values()) == [1]  # one id repeats
    lines = (tmp_path / done["path"] / "dropped.jsonl").read_text().splitlines()
    assert len(lines) == 8 and json.loads(lines[0]) == {"split": "train", "id": "gone", "reason": "image missing"}
    assert done["counts"] == {"llava_instruct": {"train": 7}}


def test_sharegpt4v_finds_each_image_under_its_root(made, tmp_path):
    layouts.sharegpt4v(tmp_path / "original")
    roots = [f"coco={tmp_path}/original/a", f"sam/images={tmp_path}/original/b", f"{tmp_path}/original/c"]
    done, samples = made("sharegpt4v", images=tuple(roots))
    assert [samples[k][1] for k in ("x-0", "sa_1-1", "y-2")] == [[layouts.draw_jpg(i)] for i in (1, 2, 3)]
    assert samples["x-0"][0]["messages"] == chat([IMAGE, text("Describe.")], "It shows coco/coco2017/x.jpg.")
    assert samples["sa_1-1"][0]["meta"]["image_id"] == "sam/images/sa_1.jpg"
    assert dropped(done) == {"image missing": ["z"]}
    with pytest.raises(ValueError, match="is not a folder"):
        made("sharegpt4v", images=("coco=/nowhere",))


@pytest.mark.parametrize("name", ["v=1/pics", "new, all/pics", "coco=v=1,2/pics"])
def test_a_folder_of_images_may_have_commas_and_equals_signs_in_its_name(name, made, tmp_path):
    layouts.put(
        tmp_path / "original/rows.jsonl",
        json.dumps({"image": "a.jpg", "conversations": layouts.turns("<image>\nQ", "A")}),
    )
    layouts.put(tmp_path / name / "a.jpg", layouts.draw_jpg(1))
    given = parse_arguments(load_recipe("sharegpt4v"), {"path": "rows.jsonl", "images": str(tmp_path / name)})
    _, samples = made("sharegpt4v", **given)
    assert [images for _, images, _ in samples.values()] == [[layouts.draw_jpg(1)]]


def test_sharegpt_text_with_tools_and_a_first_answer(made):
    done, samples = made("sharegpt")
    system = {"role": "system", "content": "Be brief."}
    assert samples["qwjhyva_1-1"][0]["messages"] == chat("Go on", "So.")
    assert samples["s-2"][0]["messages"] == [system, *chat("Q", "A")]
    tool = samples["tool-3"][0]
    assert tool["messages"][0] == {"role": "system", "content": "Use tools."}
    assert tool["messages"][1:] == chat("1+1?", '{"name": "add"}', "2", "Two.")
    assert tool["meta"]["tools"] == '[{"name": "add"}]'
    assert dropped(done) == {"turns do not alternate": ["twice"], "no answer": ["only"], "no turns": ["nothing"]}


def test_text_data_sets_keep_rows_that_speak_of_an_image_tag(tokenizer, tmp_path):
    asked = "What does <image> do in SVG?"
    rows = [{"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "<image> embeds."}]}]
    layouts.parquet(tmp_path / "smoltalk/train-0.parquet", rows)
    rows = [{"id": "a", "system": "Say <image>.", "conversations": layouts.turns(asked, "<image> embeds.")}]
    layouts.put_json(tmp_path / "sharegpt/rows.json", rows)
    for source in ("smoltalk", "sharegpt"):
        settings = {"path": str(tmp_path / source), "splits": ("train",), **layouts.told_tokenizer(tokenizer)}
        done = prepare(source, out=tmp_path / source / "out", workers=1, **settings)
        assert done["dropped"] == {"train": {}}
        ((_, record, images, _),) = layouts.read_split(tmp_path / source / "out", "train")
        *system, user, assistant = record["messages"]
        assert (user["content"], assistant["content"], images) == (asked, "<image> embeds.", [])
        assert not system or system == [{"role": "system", "content": "Say <image>."}]


def test_messages_of_both_forms_keep_their_images_in_order(made):
    done, samples = made("messages", path="mllm_demo.json")
    a, b = layouts.draw_jpg(1), layouts.draw_png(2)
    assert samples["row-0"][0]["messages"] == chat([IMAGE, text("Who are they?")], "Kane and Goretzka.")
    assert samples["row-1"][0]["messages"] == chat([IMAGE, text(" against "), IMAGE], "One.")
    assert samples["row-1"][1:] == ([b, a], ["0.png", "1.jpg"])
    assert samples["row-2"][0]["messages"][0] == {"role": "system", "content": "Be brief."}
    parts = [text("First"), IMAGE, text("then"), IMAGE]
    assert samples["row-3"][0]["messages"] == chat(parts, "Two pictures.")
    assert samples["row-3"][1] == [layouts.draw_png(7), b]
    assert samples["row-4"][0]["messages"] == chat([IMAGE, text("from the list")], "A")
    assert samples["row-5"][0]["messages"] == chat([IMAGE], "picture alone")
    assert dropped(done) == {
        MISMATCH: ["row 6", "row 7"],
        "image is a web address": ["row 8"],
        "content part of an unknown type": ["row 9"],
        "text is not a string": ["row 10"],
        "video: only images are read": ["row 11"],
        "audio: only images are read": ["row 12"],
    }
    _, lines = made("messages", path="lines/mllm_demo.jsonl", images=(done["path"] + "/../original",))
    assert [lines[k][0] for k in lines] == [samples[k][0] for k in ("row-0", "row-1")]


def test_csv_tables_of_questions_and_of_captions(made, tmp_path):
    pics = (str(tmp_path / "original/pics"),)
    layouts.csv_tables(tmp_path / "original")
    done, samples = made("csv", path="qa.csv", images=pics)
    assert samples["7-0"][0]["messages"] == chat([IMAGE, text("What, and\nwhere?")], "A dog")
    assert samples["8-1"][0]["messages"] == chat("text?", "yes") and samples["8-1"][0]["meta"] == {"turns": 1}
    assert dropped(done) == {"another number of fields than the header": ["9"]}
    done, samples = made("csv", path="captions.tsv", images=pics, image="file", caption="text")
    assert [value[0]["document"] for value in samples.values()] == [[IMAGE, text("a quoted dog")]]
    assert dropped(done) == {"empty turn": ["row 1"], "image missing": ["row-2"]}
    with pytest.raises(ValueError, match="no columns question and answer, nor caption, in its header .file, text"):
        made("csv", path="captions.tsv", images=pics)


@pytest.mark.parametrize("mistyped", [{}, {"image": "foto"}], ids=["default", "told"])
def test_a_csv_table_is_text_alone_only_where_it_is_told_so(mistyped, made, tmp_path):
    layouts.put(tmp_path / "original/qa.csv", "file_name,question,answer,\na.jpg,what?,yes,more\n")
    name = mistyped.get("image", "image")
    with pytest.raises(ValueError, match=rf"qa.csv: no column {name} in its header \(file_name, .*set image= "):
        made("csv", path="qa.csv", **mistyped)
    _, samples = made("csv", path="qa.csv", image="")
    assert [(record["messages"], images) for record, images, _ in samples.values()] == [(chat("what?", "yes"), [])]


def test_smoltalk_has_subsets_and_a_test_split(made):
    done, samples = made("smoltalk")
    assert done["counts"] == {"smoltalk": {"train": 6, "test": 2}}
    assert samples["smol-magpie-ultra-4"][0] == {
        "messages": chat("Q4", "A4", "more", "less"),
        "id": None,
        "source": "smoltalk",
        "meta": {"turns": 2, "subset": "smol-magpie-ultra"},
    }
    assert samples["everyday-5"][0]["messages"][0] == {"role": "system", "content": "Be kind."}
    done, _ = made("smoltalk", name="everyday-conversations", splits=("train",))
    assert done["counts"] == {"smoltalk": {"train": 1}}
    _, samples = made("smoltalk", name="smol-magpie-ultra", splits=("train",))
    topics = {key: record["meta"].get("topic") for key, (record, *_) in samples.items()}
    assert topics == {"smol-magpie-ultra-0": "Travel/Lakes", "smol-magpie-ultra-1": None}


def test_blank_columns_are_no_fault_and_a_column_that_stands_twice_is_named(made, tmp_path):
    folder = tmp_path / "original"
    layouts.put(folder / "blank.csv", "image,question,answer,,\n,what?,yes,,\n")
    done, samples = made("csv", path="blank.csv")
    assert len(samples) == 1 and not dropped(done)
    layouts.put(folder / "twice.csv", "question,answer,answer\nq,a,b\n")
    with pytest.raises(ValueError, match="twice.csv: column answer stands twice in its header"):
        made("csv", path="twice.csv")


def test_parquet_above_parquet_is_not_read_twice(made, tmp_path):
    original = layouts.cauldron(tmp_path / "nested")
    inner = next(original.glob("ai2d/*.parquet"))
    (original / "train-00000-of-00001.parquet").write_bytes(inner.read_bytes())
    with pytest.raises(ValueError, match="parquet lies in . and below it, in ai2d, and would be read twice"):
        cut_subsets(original, source="cauldron", split="train", name=(), streaming=False, rows=100)
    assert cut_subsets(original, source="cauldron", split="train", name=("ai2d",), streaming=False, rows=100)


def test_cauldron_puts_the_images_before_the_first_question(made):
    done, samples = made("cauldron")
    assert samples["ai2d-0-0"][0]["messages"] == chat(
        [IMAGE, text("Question: which?\nA. x")], "Answer: A", "And now?", "B"
    )
    assert samples["ai2d-0-1"][0]["messages"] == chat([IMAGE, IMAGE, text("Compare.")], "Alike.")
    assert samples["ai2d-0-1"][1] == [layouts.draw_jpg(2), layouts.draw_jpg(3)]
    assert samples["ai2d-0-2"][0]["messages"] == chat([IMAGE], "A caption.")
    assert samples["vqav2-1-0"][0]["meta"] == {"turns": 2, "subset": "vqav2", "origin": "AI2D"}
    assert dropped(done) == {"empty turn": ["ai2d row 3"], "image unreadable": ["ai2d-0-4"]}
    _, one = made("cauldron", name=("vqav2",))
    assert list(one) == ["vqav2-0-0"]
    with pytest.raises(ValueError, match="no subset coco .it has ai2d, vqav2"):
        made("cauldron", name=("coco",))


def test_finevision_keeps_the_ratings_of_every_turn_and_rows_without_images(made):
    done, samples = made("finevision")
    kinds = ("relevance", "image_correspondence", "formatting", "visual_dependency")
    record, images, _ = samples["ai2d_merged-0-0"]
    assert record["messages"] == chat([IMAGE, text("What?")], "This.", "Why?", "So.") and len(images) == 1
    assert record["meta"]["ratings"] == {kind: [5, None] for kind in kinds}
    record, images, _ = samples["ai2d_merged-0-1"]
    assert record["messages"] == chat("What?", "This.") and images == []
    assert record["meta"]["origin"] == "text_only" and record["meta"]["ratings"] == {kind: [None] for kind in kinds}
    # These layouts have no markers.
    assert samples["ai2d_merged-0-2"][0]["messages"] == chat("What is <image>?", "A tag.")
    assert samples["ai2d_merged-0-3"][0]["messages"] == chat([IMAGE, text("Is <image> <image>?")], "Yes.")
    assert not dropped(done) and sum(done["notes"]["train"].values()) == 2


def test_coco_captions_one_document_a_caption_for_training_one_an_image_for_validation(made):
    done, samples = made("coco_captions")
    assert {key: value[0]["document"][1]["text"] for key, value in samples.items()} == {
        "9-0": "caption 0 of 9.",
        "9-1": "caption 1 of 9.",
        "25-0": "caption 0 of 25.",
        "25-1": "caption 1 of 25.",
    }
    assert samples["9-1"][0] == {
        "document": [IMAGE, text("caption 1 of 9.")],
        "id": 901,
        "source": "coco_captions",
        "meta": {"image_id": 9},
    }
    assert samples["9-1"][1] == [layouts.draw_jpg(9)]
    assert dropped(done) == {
        "caption of an image that is not listed": ["7700"],
        "caption is empty or not a string": ["999"],
        "image without a caption": ["30"],
    }
    _, val = made("coco_captions", split="val")
    assert val["139-0"][0]["meta"]["answers"] == ["caption 0 of 139.", "caption 1 of 139."]
    _, samples = made("coco_captions", captions="all", splits=("train",))
    assert samples["25-0"][0]["document"] == [IMAGE, text("caption 0 of 25.\ncaption 1 of 25.")]
    _, samples = made("coco_captions", captions="first", splits=("train",))
    assert [value[0]["document"][1]["text"] for value in samples.values()] == ["caption 0 of 9.", "caption 0 of 25."]
    with pytest.raises(ValueError, match="captions_train2014.json is missing"):
        made("coco_captions", year="2014")
    with pytest.raises(ValueError, match="captions=some is not one of each, first, all"):
        made("coco_captions", captions="some")


def test_coco_of_2014_is_found_under_its_longer_names(tokenizer, tmp_path):
    raw = layouts.coco_captions(tmp_path / "raw", "2014")
    told = {"path": str(raw), "year": "2014", "workers": 1, **layouts.told_tokenizer(tokenizer)}
    done = prepare("coco_captions", out=tmp_path / "out", **told)
    assert done["counts"] == {"coco_captions": {"train": 4, "val": 1}}
    assert not [reason for reason in dropped(done) if "image missing" in reason]
    key, record, images, _ = layouts.read_split(tmp_path / "out", "val")[0]
    assert key == "139-0" and images == [layouts.draw_jpg(139)] and record["meta"]["image_id"] == 139


def test_karpathys_restval_belongs_to_train_and_test_is_written(made):
    done, samples = made("coco_karpathy")
    assert done["counts"] == {"coco_karpathy": {"train": 6, "val": 1, "test": 1}}
    assert [value[0]["meta"]["image_id"] for value in samples.values()] == [1000, 1000, 1001, 1001, 1004, 1004]
    assert samples["1001-1"][0]["document"] == [IMAGE, text("A cat 1 1.")]
    done, _ = made("coco_karpathy", restval=False)
    assert done["counts"]["coco_karpathy"]["train"] == 4
    _, test = made("coco_karpathy", split="test")
    assert test["1003-0"][0]["meta"] == {"image_id": 1003, "question_id": 1003, "answers": ["A cat 0 3.", "A cat 1 3."]}
