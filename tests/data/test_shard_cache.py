"""The shard cache under many processes, kill -9, a small bound and a full disk."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest
from fault_server import FaultServer

from fastvlm.data import remote
from fastvlm.data.remote import Unavailable, locate_shards
from fastvlm.data.shard_cache import NoRoom, ShardCache
from fastvlm.data.shards import ShardReader

SIZE = 200_000
FETCH = """
import sys
from fastvlm.data.remote import locate_shards
from fastvlm.data.shard_cache import ShardCache
cache = ShardCache(sys.argv[1], max_bytes=int(sys.argv[3]))
for shard in locate_shards(sys.argv[2], "train"):
    cache.fetch(shard)
    print(shard.name, flush=True)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "BACKOFF", 0.01)
    monkeypatch.setattr(remote, "TIMEOUT", 1)


@pytest.fixture
def folder(tmp_path):
    """Six files of random bytes; the cache does not care what is in them."""
    (tmp_path / "there").mkdir()
    for i in range(6):
        (tmp_path / f"there/train-{i:05d}.tar").write_bytes(os.urandom(SIZE))
    return tmp_path / "there"


def shards_of(server, last=5):
    return locate_shards(f"{server.url}/train-{{00000..{last:05d}}}.tar", "train")


def kept(cache):
    return sorted(p.name.split("-", 1)[1] for p in cache.folder.iterdir() if p.name != ".lock")


def process(*args, **options):
    command = [sys.executable, "-c", FETCH, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_many_processes_fetch_each_shard_once(folder, tmp_path):
    with FaultServer(folder, fault=lambda *request: "slow") as server:
        started = [process(tmp_path / "cache", f"{server.url}/train-{{00000..00005}}.tar", 10 * SIZE) for _ in range(4)]
        for one in started:
            out, err = one.communicate(timeout=60)
            assert one.returncode == 0, err
            assert out.split() == [f"train-{i:05d}.tar" for i in range(6)]
        assert [server.count(f"train-{i:05d}.tar") for i in range(6)] == [1] * 6
        cache = ShardCache()
        for i, shard in enumerate(shards_of(server)):
            assert cache.path(shard).read_bytes() == (folder / f"train-{i:05d}.tar").read_bytes()


def test_what_a_killed_process_left_is_completed_by_the_next(folder, tmp_path):
    with FaultServer(folder, fault=lambda method, *request: "slow" if method == "GET" else "") as server:
        one = process(tmp_path / "cache", f"{server.url}/train-00000.tar", 10 * SIZE)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            parts = list((tmp_path / "cache/shards").glob("*.part-*"))
            if parts and parts[0].stat().st_size > 0:
                break
            time.sleep(0.005)
        one.send_signal(signal.SIGKILL)
        one.wait()
        (part,) = parts
        there = part.stat().st_size
        assert 0 < there < SIZE
        cache, (shard,) = ShardCache(), shards_of(server, last=0)
        cache.fetch(shard)
        assert cache.path(shard).read_bytes() == (folder / "train-00000.tar").read_bytes()
        assert not part.exists()
        assert server.requests[-1][2] == f"bytes={there}-"


def test_the_bound_holds_and_the_shard_unused_for_longest_goes(folder):
    with FaultServer(folder) as server:
        cache, shards = ShardCache(max_bytes=3 * SIZE + 1000), shards_of(server)
        for i, shard in enumerate(shards[:3]):
            cache.fetch(shard)
            os.utime(cache.path(shard), (1000 + i, 1000 + i))
        os.close(cache.open(shards[0]))  # used again
        cache.fetch(shards[3])
        assert kept(cache) == ["train-00000.tar", "train-00002.tar", "train-00003.tar"]
        cache.fetch(shards[4])
        assert kept(cache) == ["train-00000.tar", "train-00003.tar", "train-00004.tar"]


def test_a_shard_in_use_is_never_evicted_and_without_room_it_is_read_from_the_server(folder, caplog):
    with FaultServer(folder) as server:
        shards, cache = shards_of(server), ShardCache(max_bytes=2 * SIZE)
        first, second = ShardReader(cache=cache), ShardReader(cache=cache)
        first.read(shards[0], 0, 10)
        first.read(shards[1], 0, 10)
        with pytest.raises(NoRoom, match=f"all that is in it is in use, and {SIZE} bytes more .*FASTVLM_CACHE_GB"):
            cache.fetch(shards[2])
        data = (folder / "train-00002.tar").read_bytes()
        assert [second.read(shards[2], k, 100) for k in (0, 5000)] == [data[:100], data[5000:5100]]
        assert caplog.text.count("shards are read without the cache") == 1
        assert kept(cache) == ["train-00000.tar", "train-00001.tar"]
        assert server.sent["train-00002.tar"] == 200
        first.close()
        cache.fetch(shards[2])
        assert kept(cache) == ["train-00001.tar", "train-00002.tar"]


def test_a_cache_smaller_than_all_shards_suffices_as_long_as_it_holds_those_in_use(folder, caplog):
    with FaultServer(folder) as server:
        shards, reader = shards_of(server), ShardReader(cache=ShardCache(max_bytes=2 * SIZE))
        for i, shard in enumerate(shards):
            data = (folder / f"train-{i:05d}.tar").read_bytes()
            assert all(reader.read(shard, k, 10) == data[k : k + 10] for k in range(120))
        assert not caplog.text and set(server.sent.values()) == {SIZE}
        for k in range(400):  # three shards in turn, of which the cache holds two
            reader.read(shards[3 + k % 3], k, 10)
        assert caplog.text.count("shards are read without the cache") == 1
        assert sum(server.sent.values()) < 8 * SIZE
        reader.close()


def test_a_part_that_nobody_completes_goes_like_any_other(folder):
    with FaultServer(folder) as server:
        shards, cache = shards_of(server), ShardCache(max_bytes=2 * SIZE)
        cache.folder.mkdir(parents=True)
        part = cache.folder / f"{cache.path(shards[5]).name}.part-{SIZE}"
        part.write_bytes(b"x" * 10)
        os.utime(part, (1, 1))
        cache.fetch(shards[0])
        with part.open("rb") as held:
            fcntl.flock(held, fcntl.LOCK_EX)  # somebody is at it: it counts as what it will be
            with pytest.raises(NoRoom):
                os.close(cache.open(shards[0]))
                reader = ShardReader(cache=cache)
                reader.read(shards[0], 0, 1)
                cache.fetch(shards[1])
        cache.fetch(shards[1])
        assert not part.exists()


def test_a_shard_larger_than_the_cache_evicts_nothing(folder):
    with FaultServer(folder) as server:
        (folder / "train-00005.tar").write_bytes(os.urandom(4 * SIZE))
        shards, cache = shards_of(server), ShardCache(max_bytes=3 * SIZE)
        cache.fetch(shards[0])
        with pytest.raises(NoRoom, match=f"a shard of {4 * SIZE} bytes is more than the cache holds"):
            cache.fetch(shards[5])
        assert kept(cache) == ["train-00000.tar"]


READ = """
import resource, sys
from fastvlm.data.remote import locate_shards
from fastvlm.data.shard_cache import ShardCache
from fastvlm.data.shards import ShardReader
if sys.argv[3] != "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
(shard,) = locate_shards(sys.argv[1], "train")
data = ShardReader(cache=ShardCache(sys.argv[2])).read(shard, 512, 1000)
sys.stdout.buffer.write(data)
"""


def test_on_a_full_disk_shards_are_read_from_the_server_and_nothing_broken_stays(folder, tmp_path):
    """Full twice: a limit on the size of files, and, where one may be mounted, a file system of 128 KiB."""
    python = [sys.executable, "-c", READ]
    data = (folder / "train-00000.tar").read_bytes()[512:1512]
    with FaultServer(folder) as server:
        url = f"{server.url}/train-00000.tar"
        (tmp_path / "small").mkdir()
        runs = {"limit": [*python, url, str(tmp_path / "cache"), str(SIZE // 2)]}
        mount = f"mount -t tmpfs -o size=128k none {tmp_path}/small"
        if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode == 0:
            check = f'&& find {tmp_path}/small -name "*.tar*" | grep . && exit 9 || true'
            inner = f'{mount} && "$@" {check}'
            runs["disk"] = ["unshare", "-rm", "sh", "-c", inner, "sh", *python, url, str(tmp_path / "small"), "0"]
        for command in runs.values():
            done = subprocess.run(command, capture_output=True, timeout=60)
            assert (done.returncode, done.stdout) == (0, data), done.stderr
            assert b"the disk of the shard cache is full" in done.stderr
            assert b"shards are read without the cache for a minute" in done.stderr
        assert kept(ShardCache(tmp_path / "cache")) == []


def test_a_cache_folder_that_cannot_be_written_is_named_and_shards_are_read_without(folder, tmp_path, caplog):
    (tmp_path / "file").write_text("")  # root may write anywhere, but not below a file
    with FaultServer(folder) as server:
        (shard,) = shards_of(server, last=0)
        reader = ShardReader(cache=ShardCache(tmp_path / "file"))
        assert reader.read(shard, 0, 100) == (folder / "train-00000.tar").read_bytes()[:100]
    assert f"{tmp_path}/file/shards: Not a directory; shards are read without" in caplog.text


def test_a_file_that_grew_is_refused(folder):
    with FaultServer(folder, etags=False) as server:
        (shard,) = shards_of(server, last=0)
        (folder / "train-00000.tar").write_bytes(os.urandom(SIZE + 512))
        cache = ShardCache()
        with pytest.raises(Unavailable, match=f"more than the {SIZE} bytes it had; was it replaced"):
            cache.fetch(shard)


def test_a_bound_that_is_no_number_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("FASTVLM_CACHE_GB", "many")
    with pytest.raises(ValueError, match="FASTVLM_CACHE_GB=many must be a number above 0"):
        ShardCache()
