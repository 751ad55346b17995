"""Connections that ask nothing or read nothing, as raw sockets, and requests beyond a bound."""

import asyncio
import http.client
import json
import socket
import threading
import time
from contextlib import suppress

import pytest

uvicorn = pytest.importorskip("uvicorn")

from fastvlm.inference.connections import AskingProtocol  # noqa: E402
from fastvlm.inference.replies import RequestLimit  # noqa: E402

IDLE, SLOW = 0.8, 1.2  # seconds
MOST = 2  # requests at once
LARGE = 16 << 20  # bytes; more than the system holds of what nobody reads
HALF = b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: "


async def answer(scope, receive, send):
    await asyncio.sleep(SLOW if scope["path"] == "/slow" else 0)
    pieces = {"/large": [bytes(LARGE)], "/streamed": [bytes(1 << 16)] * (LARGE >> 16)}.get(scope["path"], [b"ok"])
    headers = [(b"content-length", str(sum(map(len, pieces))).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for number, piece in enumerate(pieces, 1):
        await send({"type": "http.response.body", "body": piece, "more_body": number < len(pieces)})


@pytest.fixture(scope="module")
def port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        app = RequestLimit(answer, max_requests=MOST)
        options = {"http": AskingProtocol, "timeout_keep_alive": IDLE, "lifespan": "off", "log_level": "error"}
        server = uvicorn.Server(uvicorn.Config(app, **options))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join(20)


def ask(connection: http.client.HTTPConnection, path: str = "/") -> int:
    connection.request("GET", path)
    reply = connection.getresponse()
    reply.read()
    return reply.status


def connect(port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", port, timeout=20)


def drip(connection: socket.socket) -> None:
    """A byte now and then, until the other side has had enough."""
    try:
        while True:
            connection.sendall(b"x")
            time.sleep(IDLE / 10)
    except OSError:
        pass


def ends(connection: socket.socket) -> bool:
    connection.settimeout(20)
    try:
        return connection.recv(100) == b""
    except ConnectionResetError:
        return True


def test_connections_that_ask_nothing_shut_nobody_out_and_are_closed(port):
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(10)]
    asked, read = connect(port), b""
    assert ask(asked) == 200
    with socket.create_connection(("127.0.0.1", port)) as body_missing:
        body_missing.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        while not read.endswith(b"ok"):
            read += body_missing.recv(1000)
        dripping = [asked.sock, body_missing, *(socket.create_connection(("127.0.0.1", port)) for _ in range(2))]
        for connection in (asked.sock, *dripping[2:]):
            connection.sendall(HALF)
        for connection in dripping:
            threading.Thread(target=drip, args=(connection,), daemon=True).start()
        assert ask(connect(port)) == 200
        assert all(map(ends, [*silent, *dripping]))
    for connection in (*silent, *dripping):
        connection.close()


def test_a_connection_that_asks_again_in_time_stays_and_an_answer_that_takes_long_is_waited_for(port):
    connection = connect(port)
    assert [ask(connection, path) for path in ("/", "/slow", "/")] == [200] * 3
    with socket.create_connection(("127.0.0.1", port)) as piped:  # the second request comes before the first's answer
        piped.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET /slow HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        piped.settimeout(20)
        assert b"".join(iter(lambda: piped.recv(1000), b"")).count(b"200 OK") == 2


@pytest.mark.parametrize("path", ["/large", "/streamed"])
def test_a_reply_that_is_not_read_holds_no_request_and_one_that_is_read_slowly_comes_whole(port, path):
    asking = f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    unread = [socket.create_connection(("127.0.0.1", port)) for _ in range(MOST)]
    for connection in unread:
        connection.sendall(asking)
    deadline = time.monotonic() + 20
    while ask(connect(port)) != 200:
        assert time.monotonic() < deadline
        time.sleep(IDLE / 4)
    time.sleep(3 * IDLE)  # an answer in one piece is over for the application before anybody has read it
    for connection in unread:
        assert len(read_all(connection)) < LARGE
    with socket.create_connection(("127.0.0.1", port)) as slow:
        slow.sendall(asking)
        assert len(read_all(slow, pause=IDLE / 8, size=LARGE // 16)) > LARGE


def read_all(connection: socket.socket, *, pause: float = 0.0, size: int = 1 << 20) -> bytes:
    """What comes until the other side ends it, with a pause after so many bytes."""
    connection.settimeout(20)
    read = b""
    with suppress(ConnectionResetError):
        while some := connection.recv(size, socket.MSG_WAITALL):
            read += some
            time.sleep(pause)
    return read


def test_requests_beyond_so_many_at_once_are_refused_and_taken_again_after():
    async def check():
        go, sent = asyncio.Event(), []

        async def app(scope, receive, send):
            await go.wait()

        async def send(message):
            sent.append(message)

        limit, scope = RequestLimit(app, max_requests=2), {"type": "http", "path": "/"}
        held = [asyncio.create_task(limit(scope, None, send)) for _ in range(2)]
        await asyncio.sleep(0)
        await limit(scope, None, send)
        assert sent[0]["status"] == 503 and (b"retry-after", b"1") in sent[0]["headers"]
        assert "2 requests at once" in json.loads(sent[1]["body"])["error"]["message"]
        held[0].cancel()
        go.set()
        await asyncio.gather(*held, return_exceptions=True)
        sent.clear()
        await limit(scope, None, send)
        assert limit.num_requests == 0 and not sent

    asyncio.run(check())
