import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvlm.inference.fetching import ImageFetcher, is_public


class Files(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Host"]))
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1/secret")
            self.end_headers()
            return
        if self.path == "/together":  # three requests or none
            self.server.barrier.wait(10)
        try:
            if self.path == "/slow-headers":
                self.drip(b"HTTP/1.1 200 OK\r\nX-Long: ")
            self.send_response(200)
            self.end_headers()
            if self.path == "/slow-body":
                self.drip()
        except OSError:
            return  # who asked has left
        self.wfile.write(b"x" * (5000 if self.path == "/large" else 10))

    def drip(self, start: bytes = b""):
        """A byte now and then, without an end: no single read takes long."""
        self.wfile.write(start)
        while True:
            self.wfile.write(b"x")
            time.sleep(0.02)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def files():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    server.asked, server.barrier, server.daemon_threads = [], threading.Barrier(3), True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def fetcher(files, *addresses, **options):
    """Knows `pictures.example` at the test server's port; the name resolves to these addresses."""
    port = files.server_address[1]
    resolve = lambda host, port, **_: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]
    return ImageFetcher(hosts=[f"pictures.example:{port}"], resolve=resolve, max_bytes=1000, **options), port


def test_an_allowed_host_is_asked_under_its_name_at_the_address_that_was_looked_at(files):
    fetch, port = fetcher(files, "127.0.0.1", private=True)
    assert fetch(f"http://pictures.example:{port}/a.png?b=1") == b"x" * 10
    assert files.asked[-1] == ("/a.png?b=1", f"pictures.example:{port}")


@pytest.mark.parametrize(
    "addresses", [("127.0.0.1",), ("93.184.215.14", "10.0.0.1"), ("::ffff:127.0.0.1",), ("fe80::1",)]
)
def test_a_name_that_leads_into_a_private_network_is_refused_without_a_connection(files, addresses):
    before = len(files.asked)
    fetch, port = fetcher(files, *addresses)
    with pytest.raises(ValueError, match="private network"):
        fetch(f"http://pictures.example:{port}/a.png")
    assert len(files.asked) == before


def test_a_name_is_resolved_once_so_that_it_cannot_change_its_mind(files):
    looked = []
    port = files.server_address[1]

    def resolve(host, port, **_):
        looked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    fetch = ImageFetcher(hosts=[f"pictures.example:{port}"], resolve=resolve, private=True)
    fetch(f"http://pictures.example:{port}/a.png")
    assert looked == ["pictures.example"]


def test_redirects_are_not_followed_and_bytes_are_bounded(files):
    fetch, port = fetcher(files, "127.0.0.1", private=True)
    with pytest.raises(ValueError, match="answered 302; redirects are not followed"):
        fetch(f"http://pictures.example:{port}/moved")
    assert files.asked[-1][0] == "/moved"
    with pytest.raises(ValueError, match="more than 1000 bytes"):
        fetch(f"http://pictures.example:{port}/large")


@pytest.mark.parametrize("path", ["slow-headers", "slow-body"])
def test_a_host_that_sends_a_byte_now_and_then_is_given_up_at_the_deadline(files, path):
    fetch, port = fetcher(files, "127.0.0.1", private=True, timeout=0.3)
    with pytest.raises(ValueError, match=r"'pictures.example' took more than 0.3 s"):
        fetch(f"http://pictures.example:{port}/{path}")


def test_a_name_that_is_not_found_out_is_given_up_at_the_deadline():
    never = threading.Event()
    fetch = ImageFetcher(hosts=["pictures.example"], resolve=lambda *_, **__: never.wait(20), timeout=0.2)
    with pytest.raises(ValueError, match=r"took more than 0.2 s"):
        fetch("http://pictures.example/a.png")
    assert not never.is_set()
    never.set()


def test_a_host_that_never_greets_is_given_up_at_the_deadline():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        resolve = lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]
        fetch = ImageFetcher(hosts=[f"pictures.example:{port}"], resolve=resolve, private=True, timeout=0.2)
        for scheme in ("http", "https"):
            with pytest.raises(ValueError, match=r"took more than 0.2 s"):
                fetch(f"{scheme}://pictures.example:{port}/a.png")


def test_images_of_a_request_are_fetched_side_by_side_and_one_failure_ends_all(files):
    fetch, port = fetcher(files, "127.0.0.1", private=True, timeout=20.0)
    at = lambda path: f"http://pictures.example:{port}/{path}"
    data = "data:image/png;base64,AAAA"
    assert fetch.all([at("together"), data, at("together"), at("together")]) == [b"x" * 10, b"\0" * 3, *[b"x" * 10] * 2]
    before = time.monotonic()
    with pytest.raises(ValueError, match="answered 302"):
        fetch.all([at("slow-body"), at("moved")])
    assert time.monotonic() - before < 15, "the other's 20 s are not waited for"


def test_a_deadline_that_has_passed_is_a_line_and_concerns_only_what_is_fetched(files):
    fetch, port = fetcher(files, "127.0.0.1", private=True, timeout=1e-9)
    data = "data:image/png;base64,AAAA"
    assert fetch.all([data, data.replace("data", "DATA")]) == [b"\0" * 3] * 2 and fetch.all([]) == []
    with pytest.raises(ValueError, match=r"image_url: the images took more than 1e-09 s"):
        fetch.all([data, f"http://pictures.example:{port}/a.png"])


def test_nothing_is_fetched_where_one_address_is_not_allowed(files):
    fetch, port = fetcher(files, "127.0.0.1", private=True)
    before = len(files.asked)
    for bad in ("http://elsewhere.example/a.png", "data:image/png;base64,@@"):
        with pytest.raises(ValueError, match="image_url"):
            fetch.all([f"http://pictures.example:{port}/a.png", bad])
    assert len(files.asked) == before


def test_where_one_of_a_hosts_addresses_is_silent_the_next_is_asked(files):
    fetch, port = fetcher(files, "127.0.0.9", "127.0.0.1", private=True)
    assert fetch(f"http://pictures.example:{port}/a.png") == b"x" * 10


def test_what_is_not_allowed_by_name_is_refused(files):
    fetch, port = fetcher(files, "127.0.0.1", private=True)
    for url in (
        f"http://127.0.0.1:{port}/a.png",
        "http://pictures.example/a.png",
        f"http://pictures.example.evil.org:{port}/a.png",
        f"http://user:word@pictures.example:{port}/a.png",
        f"gopher://pictures.example:{port}/a.png",
        f"http://pictures.example:{port}/a b.png",
        "http://[::1/a.png",
        "http://pictures.example:99999/a.png",
    ):
        with pytest.raises(ValueError, match="image_url") as error:
            fetch(url)
        assert "\n" not in str(error.value)


def test_wildcards_cover_names_below_and_not_the_name_itself():
    fetch = ImageFetcher(hosts=["*.example.org", "cdn.net"])
    assert fetch.allows("a.example.org", None) and fetch.allows("A.B.Example.org.", 443) and fetch.allows("cdn.net", 80)
    assert not fetch.allows("example.org", None) and not fetch.allows("evilexample.org", None)
    assert not fetch.allows("cdn.net", 8080) and not ImageFetcher().allows("cdn.net", None)


def test_addresses_that_are_not_of_the_open_internet_are_known():
    for address in ("10.1.2.3", "127.0.0.1", "169.254.169.254", "192.168.0.1", "100.64.0.1", "0.0.0.0", "224.0.0.1"):
        assert not is_public(address), address
    for address in ("::1", "fe80::1%eth0", "fd00::1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "::"):
        assert not is_public(address), address
    for address in ("::127.0.0.1", "::8.8.8.8", "fec0::1", "64:ff9b:1::7f00:1", "64:ff9b:1::808:808", "240.0.0.1"):
        assert not is_public(address), address
    assert is_public("8.8.8.8") and is_public("2606:4700:4700::1111") and is_public("64:ff9b::808:808")


@given(st.text(max_size=60))
def test_any_text_for_an_address_is_refused_in_one_line_or_read(text):
    for url in (text, "data:" + text, "http://" + text):
        try:
            data = ImageFetcher()(url)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1
        else:
            assert isinstance(data, bytes)
