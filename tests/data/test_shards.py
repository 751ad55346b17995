from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image
from tiny_world import draw_png, make_record, write_source

from fastvlm.data.decode import measure_image
from fastvlm.data.shards import ShardReader, ShardWriter, parse_sample, scan_shard


def read_all(shard):
    reader, out = ShardReader(max_open=1), []
    for span in scan_shard(shard)[0]:
        members = {suffix: reader.read(str(shard), offset, size) for suffix, offset, size in span.members}
        out.append(parse_sample(span.key, members))
    return out


def test_webdataset_reads_what_we_write(tmp_path):
    write_source(tmp_path, "pages", 7, max_samples=3)
    shards = sorted(str(p) for p in tmp_path.glob("train-*.tar"))
    assert len(shards) == 3
    theirs = list(webdataset.WebDataset(shards, shardshuffle=False))
    for i, sample in enumerate(theirs):
        record, images = make_record("pages", i)
        assert sample["__key__"] == f"pages-{i:05d}"
        assert json.loads(sample["json"]) == record
        assert [sample[f"{k}.png"] for k in range(len(images))] == images
    assert len(theirs) == 7


def test_we_read_what_webdataset_writes(tmp_path):
    shard = tmp_path / "train-00000.tar"
    with webdataset.TarWriter(str(shard)) as writer:
        for i in range(5):
            record, images = make_record("pages", i)
            writer.write({"__key__": f"k{i}", "json": record} | {f"{k}.png": v for k, v in enumerate(images)})
    for i, sample in enumerate(read_all(shard)):
        assert (sample.record, sample.images) == make_record("pages", i)
        assert sample.key == f"k{i}"


def test_img2dataset_triples_are_documents_of_an_image_and_its_caption(tmp_path):
    shard = tmp_path / "train-00000.tar"
    jpg = draw_png(1)
    with webdataset.TarWriter(str(shard)) as writer:
        writer.write({"__key__": "000000012", "jpg": jpg, "txt": "a grey seven\n", "json": {"url": "x", "width": 8}})
    (sample,) = read_all(shard)
    assert sample.record == {
        "document": [{"type": "image"}, {"type": "text", "text": "a grey seven"}],
        "meta": {"url": "x", "width": 8},
    }
    assert sample.images == [jpg]


def test_no_image_of_a_shard_of_somebody_else_is_lost_to_the_spelling_or_the_kind_of_its_name(tmp_path):
    shard, pixels = tmp_path / "train-00000.tar", Image.fromarray(np.zeros((6, 10, 3), np.uint8))
    kinds = {"a": ("JPG", "JPEG"), "b": ("Gif", "GIF"), "c": ("tif", "TIFF"), "d": ("bmp", "BMP"), "e": ("png", "PNG")}
    with tarfile.open(shard, "w") as tar:
        for key, (suffix, kind) in kinds.items():
            file = io.BytesIO()
            pixels.save(file, kind)
            for name, data in ((f"{key}.{suffix}", file.getvalue()), (f"{key}.TXT", b"the digit")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    for sample in read_all(shard):
        assert [part["type"] for part in sample.record["document"]] == ["image", "text"]
        assert measure_image(sample.images[0]) == (10, 6)
    with pytest.raises(ValueError, match="k has no image that can be read: k.heic is of none of the formats known"):
        parse_sample("k", {"heic": b"picture", "txt": b"a caption"})


def test_the_same_samples_give_the_same_bytes(tmp_path):
    for name in "ab":
        write_source(tmp_path / name, "chat", 5)
    assert (tmp_path / "a/train-00000.tar").read_bytes() == (tmp_path / "b/train-00000.tar").read_bytes()


def test_a_writer_replaces_its_split_and_leaves_nothing_when_it_fails(tmp_path):
    write_source(tmp_path, "text", 9, max_samples=2)
    write_source(tmp_path, "text", 3, max_samples=2)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["train-00000.tar", "train-00001.tar"]
    before = (tmp_path / "train-00000.tar").read_bytes()
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, "train") as writer:
        writer.write("a", {"document": "x"})
        raise KeyboardInterrupt
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["train-00000.tar", "train-00001.tar"]
    assert (tmp_path / "train-00000.tar").read_bytes() == before


def test_label_maps_stand_beside_their_images(tmp_path):
    record = {"document": [{"type": "image"}, {"type": "text", "text": "x"}, {"type": "image"}]}
    with ShardWriter(tmp_path, "train") as writer:
        writer.write("a", record, [draw_png(1), draw_png(2)], [draw_png(3), draw_png(4)])
    (sample,) = read_all(tmp_path / "train-00000.tar")
    assert sample.images == [draw_png(1), draw_png(2)]
    assert sample.label_maps == [draw_png(3), draw_png(4)]


@pytest.mark.parametrize(
    ("key", "record", "images", "message"),
    [
        ("A.b", {"document": "x"}, [], "must match"),
        ("a", {"document": "x", "messages": []}, [], "exactly one"),
        ("a", {"document": [{"type": "image"}]}, [], "1 image parts and 0 images"),
    ],
)
def test_a_writer_refuses_what_no_reader_could_read(tmp_path, key, record, images, message):
    with pytest.raises(ValueError, match=message), ShardWriter(tmp_path, "train") as writer:
        writer.write(key, record, images)


def test_more_than_ten_images_keep_their_order(tmp_path):
    record = {"document": [{"type": "image"}] * 12}
    with ShardWriter(tmp_path, "train") as writer:
        writer.write("a", record, [draw_png(i) for i in range(12)])
    (sample,) = read_all(tmp_path / "train-00000.tar")
    assert sample.images == [draw_png(i) for i in range(12)]
