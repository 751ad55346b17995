"""Shards behind HTTP, S3, the Hub's protocol and other file systems: the same order and bytes from everywhere."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl

import pytest
import torch
from fault_server import FaultProxy, FaultServer, HubServer
from tiny_world import write_source

from fastvlm.data import remote
from fastvlm.data.dataset import PlannedDataset
from fastvlm.data.index import load_index
from fastvlm.data.listing import write_listing
from fastvlm.data.plan import Plan
from fastvlm.data.remote import file_name, locate_shards
from fastvlm.data.shards import ShardReader
from fastvlm.data.sidecar import build_index
from fastvlm.data.source import Mixture, Source


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "BACKOFF", 0.01)
    monkeypatch.setattr(remote, "TIMEOUT", 1)


@pytest.fixture
def folder(tmp_path, tokenizer):
    """Three shards with their indexes, and the listing."""
    write_source(tmp_path / "shards", "chat", 50)
    for shard in (tmp_path / "shards").glob("*.tar"):
        build_index(shard, tokenizer)
    write_listing(tmp_path / "shards")
    return tmp_path / "shards"


def plan_of(path, tokenizer, **options):
    mixture = Mixture({"x": Source("x", path=path)}, weights={"x": 1}, unit="tokens", window_shards=2)
    options = {"tokens_per_image": 2, "batch_size": 4, "max_tokens": 64, "num_steps": 10} | options
    return Plan(mixture, tokenizer, **options)


def batches_of(plan, tokenizer):
    dataset = PlannedDataset(plan, tokenizer=tokenizer, image_size=8)
    return [dataset[i] for i in range(len(dataset))]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys == b.keys and not a.skipped
        for name in ("input_ids", "labels", "position_ids", "segment_ids", "pixel_values"):
            assert torch.equal(getattr(a, name), getattr(b, name))


def test_a_web_server_gives_the_order_and_the_bytes_of_the_folder(folder, tokenizer):
    local = plan_of(folder, tokenizer)
    whole = batches_of(local, tokenizer)
    with FaultServer(folder) as server:
        for path in (
            server.url,
            f"{server.url}/train-{{00000..00002}}.tar",
            [f"{server.url}/train-{i:05d}.tar" for i in range(3)],
        ):
            plan = plan_of(path, tokenizer)
            assert plan.fingerprint == local.fingerprint
            assert_same(batches_of(plan, tokenizer), whole)
        assert server.count("train-00001.tar") == 1, "a cached shard is not fetched again"
        assert server.count("train-00001.tar.idx.parquet") == 1


def test_the_token_ids_of_remote_samples_come_with_their_index(folder, tokenizer, monkeypatch):
    whole = batches_of(plan_of(folder, tokenizer), tokenizer)
    with FaultServer(folder) as server:
        plan = plan_of(server.url, tokenizer)
        with monkeypatch.context() as patch:
            patch.setattr("fastvlm.data.source_index.parse_sample", lambda *a: pytest.fail("a record was read"))
            assert_same(batches_of(plan, tokenizer), whole)


def test_list_order_is_kept_and_names_without_a_split_are_train(tmp_path, tokenizer):
    write_source(tmp_path, "text", 30, max_samples=10)
    for i in range(3):
        (tmp_path / f"train-{i:05d}.tar").rename(tmp_path / f"{i:05d}.tar")
    index = load_index(f"{tmp_path}/{{00002,00000}}.tar", "train", tokenizer)
    assert [index.key(0), index.key(10)] == ["text-00020", "text-00000"]
    assert locate_shards(f"{tmp_path}/{{00002,00000}}.tar", "val") == []
    with pytest.raises(ValueError, match=r"00007.tar: no such shard"):
        load_index(f"{tmp_path}/{{00002,00007}}.tar", "train", tokenizer)
    write_source(tmp_path, "chat", 10)
    write_source(tmp_path, "chat", 10, split="testA", start=20)
    mixed = Source("x", path=[f"{tmp_path}/{name}.tar" for name in ("train-00000", "testA-00000", "00001")])
    names = lambda split: [os.path.basename(shard) for shard in mixed.load(split, tokenizer).shards]
    assert names("train") == ["train-00000.tar", "00001.tar"] and names("testA") == ["testA-00000.tar"]


@pytest.mark.parametrize("place", ["folder", "memory", "http"])
def test_a_pattern_for_train_leaves_out_the_shards_of_other_splits(tmp_path, tokenizer, place):
    import fsspec

    for number, (split, name) in enumerate(
        [("train", "00000"), ("train", "cc3m-train-0000"), ("val", "val-00000"), ("testA", "testA-00000")]
    ):
        write_source(tmp_path / "x", "text", 10, split=split, start=100 * number)
        (tmp_path / f"x/{split}-00000.tar").rename(tmp_path / f"x/{name}.tar")
    write_listing(tmp_path / "x")
    fs, bucket = fsspec.filesystem("memory"), uuid.uuid4().hex
    for file in (tmp_path / "x").iterdir():
        fs.pipe_file(f"/{bucket}/{file.name}", file.read_bytes())
    with FaultServer(tmp_path / "x") as server:
        path = {"folder": str(tmp_path / "x"), "memory": f"memory://{bucket}", "http": server.url}[place]
        source = Source("x", path=path, shards="*.tar")
        names = {split: list(map(file_name, source.load(split, tokenizer).shards)) for split in ("train", "val")}
    assert names == {"train": ["00000.tar", "cc3m-train-0000.tar"], "val": ["val-00000.tar"]}


def test_a_path_may_begin_at_home_and_one_with_a_star_names_the_key_for_it(tmp_path, monkeypatch):
    write_source(tmp_path / "x", "text", 20, max_samples=10)
    monkeypatch.setenv("HOME", str(tmp_path))
    shards = [tmp_path / f"x/train-0000{i}.tar" for i in range(2)]
    for path in ("~/x/train-{00000..00001}.tar", ["~/x/train-00000.tar", "file://~/x/train-00001.tar"]):
        assert locate_shards(path, "train") == shards
    with pytest.raises(ValueError, match=rf"takes no \*: set path={tmp_path}/x and shards='train-\*.tar'$"):
        Source("x", path="~/x/train-*.tar").has_split("train")


@pytest.mark.parametrize("names", ["{00000..00001}.tar", "*.tar"])
def test_shards_are_not_named_twice(folder, tokenizer, names):
    for path in ([f"{folder}/train-00000.tar", f"{folder}/train-00001.tar"], f"{folder}/train-{{00000..00001}}.tar"):
        source = Source("x", path=path, shards=names)
        with pytest.raises(ValueError, match=r"this path names its own; drop shards=$") as caught:
            source.load("train", tokenizer)
        assert names in str(caught.value)


def test_a_list_may_mix_local_and_remote_shards(folder, tokenizer):
    local = plan_of(folder, tokenizer)
    with FaultServer(folder) as server:
        path = [f"{folder}/train-00000.tar", f"{server.url}/train-00001.tar", f"{folder}/train-00002.tar"]
        plan = plan_of(path, tokenizer)
        assert plan.fingerprint == local.fingerprint
        assert_same(batches_of(plan, tokenizer), batches_of(local, tokenizer))
        assert {name.removesuffix(".idx.parquet") for _, name, _ in server.requests} == {"train-00001.tar"}


FAULTS = {
    "a 500 now and then": lambda method, name, count: "500" if count % 2 == 0 else "",
    "the connection goes in the middle": lambda method, name, count: "cut" if method == "GET" and count < 3 else "",
    "a length that is too small": lambda method, name, count: "short" if method == "GET" and count < 2 else "",
    "a length that is too large": lambda method, name, count: "long" if method == "GET" and count < 2 else "",
    "wrong bytes once": lambda method, name, count: "wrong" if name.endswith(".tar") and not count else "",
    "slow": lambda method, name, count: "slow",
    "a server that falls silent": lambda method, name, count: "stall" if method == "GET" and count < 1 else "",
    "no answer at all": lambda method, name, count: "empty" if count < 2 else "",
    "no HEAD": lambda method, name, count: "405" if method == "HEAD" else "",
}


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_server_does_wrong_for_a_while_changes_nothing(folder, tokenizer, fault, ranges):
    whole = batches_of(plan_of(folder, tokenizer), tokenizer)
    with FaultServer(folder, fault=FAULTS[fault], ranges=ranges) as server:
        plan = plan_of(server.url, tokenizer)
        assert_same(batches_of(plan, tokenizer), whole)
        assert len(server.requests) > 3
    names = {p.name.split("-", 1)[1] for p in (folder.parent / "cache/shards").iterdir() if p.name != ".lock"}
    assert names == {f"train-{i:05d}.tar" for i in range(3)}, "no part is left behind"


def test_a_cut_download_goes_on_where_it_ended(folder, tokenizer):
    size = (folder / "train-00000.tar").stat().st_size
    cut = lambda method, name, count: "cut" if method == "GET" and name.endswith(".tar") and count < 1 else ""
    with FaultServer(folder, fault=cut) as server:
        index = load_index(server.url, "train", tokenizer)
        index.read(0, ShardReader())
        asked = [r for m, n, r in server.requests if (m, n) == ("GET", "train-00000.tar")]
        assert asked == ["", f"bytes={size // 2}-"]
        assert server.sent["train-00000.tar"] == size


def test_a_server_that_only_fails_is_given_up_by_name(folder, tokenizer):
    with FaultServer(folder, fault=lambda *request: "503") as server:
        with pytest.raises(ValueError, match=rf"{server.url}/shards.json: .*\(503\); gave up after 5 attempts"):
            load_index(server.url, "train", tokenizer)
        with pytest.raises(ValueError, match=r"train-00000.tar: .*\(503\); gave up after 5 attempts"):
            load_index(f"{server.url}/train-{{00000..00002}}.tar", "train", tokenizer)
    with pytest.raises(ValueError, match="gave up after 5 attempts"):  # nobody listens there any more
        load_index(server.url, "train", tokenizer)


def test_a_folder_behind_http_without_a_listing_says_what_it_needs(tmp_path, tokenizer):
    (tmp_path / "empty").mkdir()
    with FaultServer(tmp_path / "empty") as server:
        with pytest.raises(ValueError, match=r"shards.json: not found; a folder behind HTTP needs shards.json"):
            load_index(server.url, "train", tokenizer)
        (tmp_path / "empty/shards.json").write_text('["train-00000.tar"]')
        with pytest.raises(ValueError, match=r"shards.json is not"):
            load_index(server.url, "train", tokenizer)
        (tmp_path / "empty/shards.json").write_text("{}")
        with pytest.raises(ValueError, match=r"no shards train-\*.tar"):
            load_index(server.url, "train", tokenizer)


def test_a_listed_shard_that_is_not_there_is_named_before_the_start(folder, tokenizer):
    (folder / "train-00001.tar").unlink()
    with FaultServer(folder) as server, pytest.raises(ValueError, match=r"train-00001.tar: not found; put it back"):
        plan_of(server.url, tokenizer)


def test_a_shard_that_goes_during_the_run_is_skipped_and_nothing_else_moves(folder, tokenizer):
    whole = batches_of(plan_of(folder, tokenizer), tokenizer)
    with FaultServer(folder) as server:
        plan = plan_of(server.url, tokenizer)
        (folder / "train-00001.tar").rename(folder / "away")
        gone = {f"chat-{i:05d}" for i in range(20, 40)}
        dataset = PlannedDataset(plan, tokenizer=tokenizer, image_size=8, max_skipped_share=1.0)
        for i, batch in enumerate(whole):
            ours = dataset[i]
            assert list(ours.keys) == [k for k in batch.keys if k not in gone]
            assert sorted(ours.skipped) == sorted(f"x/{k}" for k in batch.keys if k in gone)
            assert ours.num_answer_tokens == batch.num_answer_tokens
        assert server.count("train-00001.tar") <= 2, "not once a sample, but by the prefetcher and the reader"
        strict = PlannedDataset(plan, tokenizer=tokenizer, image_size=8)
        with pytest.raises(ValueError, match=r"could not be read, .*train-00001.tar: not found"):
            [strict[i] for i in range(10)]


def test_a_shard_replaced_after_it_was_indexed_is_skipped_sample_by_sample_and_not_kept(folder, tokenizer):
    """As of a local one, those samples are skipped that changed."""
    with FaultServer(folder, etags=False) as server:
        index, reader = load_index(server.url, "train", tokenizer), ShardReader()
        data = bytearray((folder / "train-00000.tar").read_bytes())
        data[int(index._locate(4)[2].offset[4]) + 600] ^= 1
        (folder / "train-00000.tar").write_bytes(data)
        for row in range(20):
            if row == 4:
                with pytest.raises(ValueError, match="changed after it was indexed"):
                    index.read(row, reader)
            else:
                assert index.read(row, reader).key == f"chat-{row:05d}"
        assert not list((folder.parent / "cache/shards").glob("*train-00000*"))


@pytest.mark.parametrize("left", [b"", b"half of it"])
def test_a_copy_that_the_disk_lost_is_fetched_anew_and_no_sample_is_skipped(folder, tokenizer, left):
    """Named before a power cut, and not what was written after it."""
    with FaultServer(folder) as server:
        index = load_index(server.url, "train", tokenizer)
        index.read(0, ShardReader())
        (copy,) = (folder.parent / "cache/shards").glob("*train-00000*")
        copy.write_bytes(left or bytes(copy.stat().st_size))
        reader = ShardReader()
        assert [index.read(row, reader).key for row in (3, 4)] == ["chat-00003", "chat-00004"]
        assert server.count("train-00000.tar") == 2
        assert copy.read_bytes() == (folder / "train-00000.tar").read_bytes()


def test_a_new_version_of_a_shard_is_another_shard(folder, tokenizer):
    with FaultServer(folder) as server:
        before = load_index(server.url, "train", tokenizer)
        before.read(0, ShardReader())
        write_source(folder, "chat", 50, start=1)
        write_listing(folder)
        for old in folder.glob("*.idx.parquet"):
            old.unlink()
        after = load_index(server.url, "train", tokenizer)
        assert after.checksum != before.checksum
        assert after.read(0, ShardReader()).key == "chat-00001"


def test_a_shard_without_an_index_is_indexed_from_the_cache_and_the_server_is_left_alone(folder, tokenizer):
    local = load_index(folder, "train", tokenizer)
    for old in folder.glob("*.idx.parquet"):
        old.unlink()
    with FaultServer(folder) as server:
        with pytest.raises(ValueError, match=r"train-00000.tar.idx.parquet is missing; rebuild it with `python -m"):
            load_index(server.url, "train", tokenizer, rebuild=False)
        assert load_index(server.url, "train", tokenizer).checksum == local.checksum
        assert load_index(server.url, "train", tokenizer).checksum == local.checksum
        assert server.count("train-00000.tar") == 1
    assert not list(folder.glob("*.idx.parquet"))


def test_a_remote_index_of_another_tokenizer_is_not_used(folder, tokenizer, other_tokenizer):
    with FaultServer(folder) as server:
        ours = load_index(server.url, "train", other_tokenizer)
        theirs = load_index(folder, "train", tokenizer)
    assert ours.checksum != theirs.checksum
    assert int(ours.text_tokens.sum()) != int(theirs.text_tokens.sum())


def test_shards_of_img2dataset_are_named_in_a_folder_or_behind_a_url(tmp_path, tokenizer):
    write_source(tmp_path, "text", 30, max_samples=10)
    for i in range(3):
        (tmp_path / f"train-{i:05d}.tar").rename(tmp_path / f"{i:05d}.tar")
    with FaultServer(tmp_path) as server:
        for names in ("{00000..00001}.tar", None):
            path = server.url if names else f"{server.url}/{{00000..00001}}.tar"
            source = Source("x", path=path, shards=names)
            assert source.has_split("train") and source.load("train", tokenizer).num_samples == 20
            assert (
                source.load("train", tokenizer).checksum
                == load_index(tmp_path, "train", tokenizer, names="{00000..00001}.tar").checksum
            )


@pytest.mark.parametrize("names", ["train-0000[01].tar", "train-0000?.tar", "train-*1.tar"])
def test_a_pattern_means_behind_a_url_what_it_means_in_a_folder(names, folder, tokenizer):
    local = load_index(folder, "train", tokenizer, names=names)
    with FaultServer(folder) as server:
        assert Source("x", path=server.url, shards=names).load("train", tokenizer).checksum == local.checksum


def test_a_pipe_is_a_shard_too(folder, tokenizer):
    local = plan_of(folder, tokenizer)
    plan = plan_of(f"pipe:cat {folder}/train-{{00000..00002}}.tar", tokenizer)
    assert plan.fingerprint == local.fingerprint
    assert_same(batches_of(plan, tokenizer), batches_of(local, tokenizer))
    with pytest.raises(ValueError, match=r"nowhere.tar: "):
        load_index("pipe:cat /nowhere.tar", "train", tokenizer)


def test_any_file_system_of_fsspec_will_do(folder, tokenizer):
    """`gs://` takes the same road as this one: `filesystem(protocol).glob` and `.open`."""
    import fsspec

    fs, name = fsspec.filesystem("memory"), uuid.uuid4().hex
    for file in folder.iterdir():
        fs.pipe_file(f"/{name}/{file.name}", file.read_bytes())
    local = plan_of(folder, tokenizer)
    for path in (f"memory://{name}", f"memory://{name}/train-{{00000..00002}}.tar"):
        plan = plan_of(path, tokenizer)
        assert plan.fingerprint == local.fingerprint
        assert_same(batches_of(plan, tokenizer), batches_of(local, tokenizer))


class NameNode(BaseHTTPRequestHandler):
    """Serves its server's folder as `/data` of WebHDFS."""

    def do_GET(self):
        place, asked = self.path.partition("?")[0], dict(parse_qsl(self.path.partition("?")[2]))
        file = self.server.folder / place.removeprefix("/webhdfs/v1/data").lstrip("/")
        status, answer = 200, b""
        if not file.exists():
            missing = {"exception": "FileNotFoundException", "message": place}
            status, answer = 404, json.dumps({"RemoteException": missing}).encode()
        elif asked["op"] == "LISTSTATUS":
            found = [self.describe(path) for path in file.iterdir()]
            answer = json.dumps({"FileStatuses": {"FileStatus": found}}).encode()
        elif asked["op"] == "GETFILESTATUS":
            answer = json.dumps({"FileStatus": self.describe(file)}).encode()
        else:
            answer = file.read_bytes()[int(asked["offset"]) :][: int(asked["length"])]
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def describe(self, path):
        kind = "DIRECTORY" if path.is_dir() else "FILE"
        return {"pathSuffix": path.name, "type": kind, "length": path.stat().st_size}

    def log_message(self, *args):
        pass


def test_a_file_system_whose_host_stands_in_the_url_is_asked_there(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for start in (0, 500):  # two hosts with files of the same names
        local = load_index(write_source(tmp_path / str(start), "chat", 30, start=start), "train", tokenizer)
        with ThreadingHTTPServer(("127.0.0.1", 0), NameNode) as server:
            server.folder = tmp_path / str(start)
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            url = f"webhdfs://127.0.0.1:{server.server_port}/data"
            for path in (url, f"{url}/train-{{00000..00001}}.tar"):
                index, reader = load_index(path, "train", tokenizer), ShardReader()
                assert index.checksum == local.checksum and index.read(29, reader).key == f"chat-{start + 29:05d}"
            with pytest.raises(ValueError, match=r"train-00009.tar: not found; put it back"):
                load_index(f"{url}/train-00009.tar", "train", tokenizer)
            server.shutdown()


@pytest.fixture(scope="module")
def bucket(tmp_path_factory, tokenizer):
    """An S3 server with the shards of a folder in a bucket: (its host and port, the folder, the bucket's URL)."""
    import s3fs
    from moto.server import ThreadedMotoServer

    folder = write_source(tmp_path_factory.mktemp("s3") / "shards", "chat", 50)
    for shard in folder.glob("*.tar"):
        build_index(shard, tokenizer)
    write_listing(folder)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    place, name = server.get_host_and_port(), f"b{uuid.uuid4().hex[:12]}"
    with pytest.MonkeyPatch.context() as patch:
        for key, value in S3.items():
            patch.setenv(key, value)
        s3fs.S3FileSystem.clear_instance_cache()
        fs = s3fs.S3FileSystem(endpoint_url="http://{}:{}".format(*place))
        fs.mkdir(name)
        fs.put(str(folder), f"{name}/data", recursive=True)
        yield place, folder, f"s3://{name}/data"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


S3 = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
S3["AWS_MAX_ATTEMPTS"] = "1"  # of botocore's own: its pauses between two are seconds long


@pytest.fixture
def s3(bucket, monkeypatch):
    """Where the bucket's server is asked for: give the URL of a proxy to have it asked there."""
    import s3fs

    def ask(url: str) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        s3fs.S3FileSystem.clear_instance_cache()

    ask("http://{}:{}".format(*bucket[0]))
    return ask


def test_an_s3_server_gives_the_order_and_the_bytes_of_the_folder(bucket, s3, tokenizer):
    _, folder, url = bucket
    local = plan_of(folder, tokenizer)
    for path in (url, f"{url}/train-{{00000..00002}}.tar"):
        plan = plan_of(path, tokenizer)
        assert plan.fingerprint == local.fingerprint
        assert_same(batches_of(plan, tokenizer), batches_of(local, tokenizer))
    shard = locate_shards(url, "train")[0]
    assert shard.version and shard.size == (folder / "train-00000.tar").stat().st_size
    assert remote.read_range(shard, 512, 100) == (folder / "train-00000.tar").read_bytes()[512:612]
    with pytest.raises(ValueError, match=r"no shards val-\*.tar"):
        load_index(url, "val", tokenizer)
    with pytest.raises(ValueError, match=r"train-00009.tar: not found"):
        load_index(f"{url}/train-{{00000,00009}}.tar", "train", tokenizer)


# S3 has no server without HEAD; two faults of the shards alone, because every one of them takes its time.
S3_FAULTS = {name: fault for name, fault in FAULTS.items() if name != "no HEAD"}
for name in ("the connection goes in the middle", "a server that falls silent"):
    S3_FAULTS[name] = lambda method, file, count, fault=FAULTS[name]: (
        fault(method, file, count) if file.endswith(".tar") else ""
    )


@pytest.mark.parametrize("fault", S3_FAULTS)
def test_what_an_s3_server_does_wrong_for_a_while_changes_nothing(bucket, s3, tokenizer, fault, tmp_path):
    place, folder, url = bucket
    whole = batches_of(plan_of(folder, tokenizer), tokenizer)
    happened = []

    def fail(method: str, file: str, count: int) -> str:
        happened.append(S3_FAULTS[fault](method, file, count))
        return happened[-1]

    with FaultProxy(*place, fault=fail) as proxy:
        s3(proxy.url)
        plan = plan_of(url, tokenizer)
        assert_same(batches_of(plan, tokenizer), whole)
        assert any(happened) and proxy.count("train-00001.tar")
    names = {p.name.split("-", 1)[1] for p in (tmp_path / "cache/shards").iterdir() if p.name != ".lock"}
    assert names == {f"train-{i:05d}.tar" for i in range(3)}, "no part is left behind"


def test_an_s3_server_that_only_fails_is_given_up_by_name(bucket, s3, tokenizer):
    place, _, url = bucket
    with FaultProxy(*place, fault=lambda *request: "503") as proxy:
        s3(proxy.url)
        with pytest.raises(ValueError, match=rf"{url}: .*; gave up after 5 attempts"):
            load_index(url, "train", tokenizer)


def test_a_gcs_server_gives_the_order_and_the_bytes_of_the_folder(folder, tokenizer, monkeypatch):
    from gcp_storage_emulator.server import create_server

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    # Read when gcsfs is imported: the emulator has no gRPC, where gcsfs first asks what kind of bucket it is.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import gcsfs

    with create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket"):
        gcsfs.GCSFileSystem.clear_instance_cache()
        fs = gcsfs.GCSFileSystem()
        for file in folder.iterdir():
            fs.put_file(str(file), f"bucket/data/{file.name}")
        local = plan_of(folder, tokenizer)
        for path in ("gs://bucket/data", "gs://bucket/data/train-{00000..00002}.tar"):
            plan = plan_of(path, tokenizer)
            assert plan.fingerprint == local.fingerprint
            assert_same(batches_of(plan, tokenizer), batches_of(local, tokenizer))
        shard = locate_shards("gs://bucket/data", "train")[0]
        assert shard.version and shard.size == (folder / "train-00000.tar").stat().st_size
        assert remote.read_range(shard, 512, 100) == (folder / "train-00000.tar").read_bytes()[512:612]
        with pytest.raises(ValueError, match=r"no shards val-\*.tar"):
            load_index("gs://bucket/data", "val", tokenizer)
        with pytest.raises(ValueError, match=r"train-00009.tar: not found"):
            load_index("gs://bucket/data/train-{00000,00009}.tar", "train", tokenizer)
    gcsfs.GCSFileSystem.clear_instance_cache()


@pytest.mark.parametrize("tried_first", [None, 19])
def test_the_shards_of_the_next_window_come_while_this_one_is_read(tmp_path, tokenizer, tried_first):
    write_source(tmp_path / "shards", "text", 160, max_samples=10)
    for shard in (tmp_path / "shards").glob("*.tar"):
        build_index(shard, tokenizer)
    write_listing(tmp_path / "shards")
    with FaultServer(tmp_path / "shards") as server:
        plan = plan_of(server.url, tokenizer, num_steps=20, packing=False)  # 80 samples: 4 windows of 2 shards
        dataset = PlannedDataset(plan, tokenizer=tokenizer, image_size=8)
        order = []
        for step in range(plan.num_steps):
            for _, row in (pair for pairs in plan.step(step).rows for pair in pairs):
                name = plan.sources[0].index.files[row // 10].name
                order += [name] if name not in order else []
        assert len(order) == 8

        def fetched():
            return {n for m, n, _ in server.requests if n.endswith(".tar") and m == "GET"}

        if tried_first is not None:
            dataset[tried_first]
        before = fetched() - set(order[:4])
        dataset[0]
        for _ in range(500):
            if len(fetched()) == 4 + len(before):
                break
            threading.Event().wait(0.01)
        assert fetched() == before | set(order[:4]), "one window and the next, and no more"
        for step in range(1, 20):
            dataset[step]
        for _ in range(200):
            if fetched() == set(order):
                break
            threading.Event().wait(0.01)
        assert fetched() == set(order)
        assert all(server.count(name) == 1 for name in order)


HUB = """
import json, sys
from pathlib import Path
from fastvlm.data.index import load_index
from fastvlm.data.shards import ShardReader
from fastvlm.tokens import Tokenizer
tokenizer = Tokenizer(sys.argv[1], template="roles")
for path in ("hf://datasets/someone/things/data", "hf://datasets/someone/things/data/train-{00000..00002}.tar"):
    index = load_index(path, "train", tokenizer)
    reader = ShardReader()
    keys = [index.read(row, reader).key for row in range(index.num_samples)]
    print(json.dumps([index.checksum, keys, index.files[0].version != ""]))
"""


def test_the_hub_gives_the_order_and_the_bytes_of_the_folder(folder, tokenizer, tmp_path):
    """A server that speaks what huggingface_hub asks of the Hub: tree, paths-info, resolve."""
    local = load_index(folder, "train", tokenizer)
    with HubServer(folder) as server:
        environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "x"}
        run = subprocess.run(
            [sys.executable, "-c", HUB, str(tokenizer.path)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert run.returncode == 0, run.stderr + str(server.requests)
    for line in run.stdout.splitlines():
        assert json.loads(line) == [local.checksum, [f"chat-{i:05d}" for i in range(50)], True]
