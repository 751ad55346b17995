"""Recipes of interleaved documents, of text and of chats, against records written by hand."""

from __future__ import annotations

import document_layouts
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_vqa_recipes import run
from tiny_world import draw_png

from data.recipes.documents import cut_text

IMAGE = {"type": "image"}
MISSING = "image missing: left out of its document"


def text(words: str) -> dict:
    return {"type": "text", "text": words}


@pytest.mark.parametrize("built", [False, True])
def test_obelics_puts_images_where_the_page_has_them_and_leaves_out_missing_ones(tmp_path, built):
    document_layouts.write_obelics(tmp_path, built=built)
    images = "" if built else str(tmp_path / "fetched")
    (page, twin), dropped = run("obelics", tmp_path / "data", "train", images=images)
    assert page.record == {
        "document": [text("A\n\nB"), IMAGE, text("C\n\nD"), IMAGE],
        "id": "https://example.org/page",
        "source": "obelics",
        "meta": {"missing_images": 1},
    }
    assert page.images == [draw_png(0), draw_png(1)] and page.notes == [MISSING]
    assert twin.record["id"] == page.record["id"] and twin.key != page.key
    assert dropped == {"no image left": 1, "another number of images than of texts": 1}


def test_obelics_images_may_carry_the_metadatas_file_name(tmp_path):
    document_layouts.write_obelics(tmp_path)
    (tmp_path / "named").mkdir()
    (tmp_path / "named/file 0.webp").write_bytes(draw_png(0))
    (page,), dropped = run("obelics", tmp_path / "data", "train", images=str(tmp_path / "named"), names="filename")
    assert page.record["document"] == [text("A\n\nB"), IMAGE, text("C\n\nD")] and page.notes == [MISSING] * 2
    assert dropped["no image left"] == 2


def test_an_error_page_saved_as_an_image_is_left_out_of_its_document(tmp_path):
    document_layouts.write_obelics(tmp_path)
    one = next((tmp_path / "fetched").glob("*/*.jpg"))
    one.write_bytes(b"<html>404</html>")
    (page, _), _ = run("obelics", tmp_path / "data", "train", images=str(tmp_path / "fetched"))
    assert page.record["document"] == [text("A\n\nB\n\nC\n\nD"), IMAGE]
    assert page.notes == ["image unreadable: left out of its document", MISSING]


def test_urls_without_a_folder_of_fetched_images_are_refused(tmp_path):
    document_layouts.write_obelics(tmp_path)
    with pytest.raises(ValueError, match="images=... is missing: this parquet holds URLs"):
        run("obelics", tmp_path / "data", "train")


def test_mmc4_puts_an_image_before_its_sentence(tmp_path):
    document_layouts.write_mmc4(tmp_path / "zip")
    document_layouts.write_mmc4_tar(tmp_path / "tar")
    records, dropped = run("mmc4", tmp_path / "zip", "train", images=str(tmp_path / "zip/images"))
    first, second, third = (r.record for r in records)
    assert first == {
        "document": [IMAGE, text("First. Second."), IMAGE, text("Third.")],
        "id": "https://example.org/a",
        "source": "mmc4",
        "meta": {"missing_images": 0, "similarities": [0.20, 0.30], "similarity": 0.20},
    }
    assert records[0].images == [draw_png(0), draw_png(1)]
    assert second["document"] == [text("One."), IMAGE, IMAGE, text("Two.")]
    assert third["document"] == first["document"]  # the plain shard holds it once more
    assert dropped == {"no image left": 1, "line is not a JSON object with text_list and image_info": 1}
    inside, dropped = run("mmc4", tmp_path / "tar", "train")
    assert [r.record for r in inside] == [first, second] and dropped == {"no image left": 1}
    assert [r.images for r in inside] == [r.images for r in records[:2]]


def test_mmc4_leaves_out_images_unlike_their_sentence(tmp_path):
    document_layouts.write_mmc4_tar(tmp_path / "tar")
    (first, second), _ = run("mmc4", tmp_path / "tar", "train", min_similarity=0.24)
    assert first.record["document"] == [text("First. Second."), IMAGE, text("Third.")]
    assert first.notes == ["image below min_similarity: left out of its document"] and not second.notes


def test_a_cut_zip_is_named(tmp_path):
    document_layouts.write_mmc4(tmp_path / "zip")
    shard = next((tmp_path / "zip").glob("*.zip"))
    shard.write_bytes(shard.read_bytes()[:-30])
    with pytest.raises(ValueError, match="docs_no_face_shard_0_v2.jsonl.zip: .*; download it again"):
        run("mmc4", tmp_path / "zip", "train", images=str(tmp_path / "zip/images"))


def test_fineweb_documents_are_whole_or_cut_at_paragraphs(tmp_path, tokenizer):
    document_layouts.write_fineweb(tmp_path)
    records, dropped = run("fineweb_edu", tmp_path, "train")
    assert dropped == {"no text": 1}
    assert records[0].record == {
        "document": [text("The digit shown here.\n\nIs a small grey seven.")],
        "id": "<urn:uuid:00000000>",
        "source": "fineweb_edu",
        "meta": {
            "url": "http://example.org/0",
            "dump": "CC-MAIN-2013-20",
            "language": "en",
            "language_score": 0.9,
            "score": 2.5,
            "int_score": 3,
        },
    }
    pieces, _ = run("fineweb_edu", tmp_path, "train", max_chars=30)
    words = [r.record["document"][0]["text"] for r in pieces]
    assert words == ["The digit shown here.", "Is a small grey seven.", "above nine and below three"]
    assert [r.record["meta"].get("piece") for r in pieces] == [0, 1, None]
    assert pieces[0].record["id"] == pieces[1].record["id"]
    records, dropped = run("fineweb_edu", tmp_path, "train", min_score=3.0)
    assert len(records) == 1 and dropped["score below min_score"] == 1
    short, _ = run("fineweb_edu", tmp_path, "train", max_tokens=16, cut_tokenizer=tokenizer.path)
    assert len(short) > 2
    assert all(len(tokenizer.encode_text(r.record["document"][0]["text"])) <= 14 for r in short)
    with pytest.raises(ValueError, match="max_tokens=16 needs cut_tokenizer"):
        run("fineweb_edu", tmp_path, "train", max_tokens=16)


@given(st.text(alphabet="ab \n.", max_size=80), st.integers(3, 20))
def test_pieces_keep_every_word_and_the_limit(words, limit):
    pieces = cut_text(words, limit)
    assert "".join("".join(pieces).split()) == "".join(words.split())
    assert all(0 < len(piece) <= limit for piece in pieces)
    if len(words.strip()) <= limit:
        assert pieces == ([words.strip()] if words.strip() else [])


@given(st.lists(st.text(alphabet="abc", min_size=1, max_size=6), min_size=1, max_size=12), st.integers(6, 30))
def test_a_paragraph_that_fits_is_never_cut(paragraphs, limit):
    pieces = cut_text("\n\n".join(paragraphs), limit)
    assert [p for piece in pieces for p in piece.split("\n\n")] == paragraphs


@pytest.mark.parametrize("lines", [False, True])
def test_lmsys_chats_are_chosen_by_language_moderation_and_redaction(tmp_path, lines):
    document_layouts.write_lmsys(tmp_path / "chats", lines=lines)
    (first, second), dropped = run("lmsys_chat", tmp_path / "chats", "train")
    assert first.record == {
        "messages": [
            {"role": "user", "content": "What does <image> mean in HTML?"},
            {"role": "assistant", "content": "Nothing."},
        ],
        "id": "33f01939a744455c869cb234afca47f0",
        "source": "lmsys_chat",
        "meta": {"model": "vicuna-13b", "language": "English", "redacted": False, "turns": 1},
    }
    assert second.record["meta"]["turns"] == 2 and second.record["meta"]["redacted"]
    assert dropped == {"another language": 1, "flagged by moderation": 1, "empty turn": 1}
    records, _ = run("lmsys_chat", tmp_path / "chats", "train", languages="all", flagged="keep", redacted="drop")
    assert [r.record["id"][-1] for r in records] == ["0", "1", "2"]


def test_the_limit_holds_where_a_whole_measures_more_than_its_parts():
    measure = lambda words: len(words) + words.count("\n") * 5  # a line break costs nothing at a unit's end
    words = "\n".join("abcd" for _ in range(9))
    uneven = lambda text: measure(text.strip())
    pieces = cut_text(words, 12, uneven)
    assert all(uneven(piece) <= 12 for piece in pieces) and "".join(pieces).replace("\n", "") == "abcd" * 9
