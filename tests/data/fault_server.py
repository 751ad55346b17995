"""Servers on loopback that fail as they are told: one that serves a folder, with ranges, and one that stands before
another server."""

from __future__ import annotations

import hashlib
import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs


class FaultServer:
    """Serves `folder` at `url`.

    Args:
        fault: called with (method, file name, how often it was asked for before) for every request; what it returns
            happens: "" (nothing), a status such as "500", "stall" (headers, then nothing), "cut" (half of what is left,
            then the connection goes), "short" and "long" (a Content-Length half as large, or larger by 1000), "wrong"
            (a byte flipped), "slow" (a pause before every tenth), "empty" (the connection closes without an answer).
        ranges: whether the server knows them.
        etags: whether it names versions.
    """

    def __init__(
        self,
        folder: Path,
        *,
        fault: Callable[[str, str, int], str] = lambda method, name, count: "",
        ranges: bool = True,
        etags: bool = True,
    ):
        self.folder, self.fault, self.ranges, self.etags = Path(folder), fault, ranges, etags
        self.requests: list[tuple[str, str, str]] = []  # (method, file name, Range)
        self.sent: Counter[str] = Counter()  # bytes of each file that went out
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                outer.answer(self, body=False)

            def do_GET(self):
                outer.answer(self, body=True)

            do_POST = do_GET

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> FaultServer:
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    def count(self, name: str, method: str = "GET") -> int:
        return sum(m == method and n == name for m, n, _ in self.requests)

    def answer(self, handler: BaseHTTPRequestHandler, *, body: bool) -> None:
        name = handler.path.split("?")[0].lstrip("/")
        asked = handler.headers.get("Range", "")
        with self._lock:
            fault = self.fault(handler.command, name, self.count(name, handler.command))
            self.requests.append((handler.command, name, asked))
        if fault == "empty":
            handler.close_connection = True
            return
        file = self.folder / self.file_of(name)
        if fault.isdigit() or not file.is_file():
            handler.send_response(int(fault) if fault else 404)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        data = file.read_bytes()
        etag = '"' + hashlib.sha256(data).hexdigest()[:12] + '"'
        start, stop = 0, len(data)
        partial = self.ranges and asked.startswith("bytes=") and handler.headers.get("If-Range", etag) == etag
        if partial:
            first, last = asked[6:].split("-")
            start, stop = int(first), min(int(last) + 1, len(data)) if last else len(data)
            if start >= len(data):
                handler.send_response(416)
                handler.send_header("Content-Length", "0")
                handler.end_headers()
                return
        headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"} if partial else {}
        headers |= {"Accept-Ranges": "bytes"} if self.ranges else {}
        headers |= {"ETag": etag} if self.etags else {}
        self.respond(handler, name, data[start:stop], 206 if partial else 200, headers, fault=fault, body=body)

    def respond(
        self,
        handler: BaseHTTPRequestHandler,
        name: str,
        data: bytes,
        status: int,
        headers: dict[str, str],
        *,
        fault: str,
        body: bool,
        size: int | None = None,
    ) -> None:
        """Send an answer, with its fault; `size` is what it says where there is no body."""
        part = bytearray(data)
        if fault == "wrong" and body:
            part[len(part) // 2] ^= 255
        size = len(part) if size is None else size
        length = {"short": size // 2, "long": size + 1000}.get(fault, size)
        handler.send_response(status)
        handler.send_header("Content-Length", str(length))
        for key, value in headers.items():
            handler.send_header(key, value)
        handler.end_headers()
        if not body:
            return
        try:
            if fault == "stall":
                handler.wfile.flush()
                time.sleep(3)
            elif fault == "cut":  # aiohttp forgets what it holds when the connection goes, so it is given the time
                self.send(handler, name, part[: len(part) // 2])
                time.sleep(0.3)
            elif fault == "slow":
                step = max(1, len(part) // 10)
                for i in range(0, len(part), step):
                    time.sleep(0.02)
                    self.send(handler, name, part[i : i + step])
            else:
                self.send(handler, name, part[:length])
        except OSError:
            handler.close_connection = True
        if fault in ("cut", "long", "stall"):
            handler.close_connection = True

    def file_of(self, name: str) -> str:
        """Path in the folder of what is asked for."""
        return name

    def send(self, handler: BaseHTTPRequestHandler, name: str, data: bytes) -> None:
        with self._lock:
            self.sent[name] += len(data)
        handler.wfile.write(data)
        handler.wfile.flush()


class HubServer(FaultServer):
    """The part of the Hub that huggingface_hub asks when it lists and reads files of a data set: the folder stands at
    `data/` of datasets/someone/things."""

    def file_of(self, name: str) -> str:
        return name.removeprefix("datasets/someone/things/resolve/main/data/")

    def answer(self, handler: BaseHTTPRequestHandler, *, body: bool) -> None:
        name = handler.path.split("?")[0].lstrip("/")
        sent = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        api = "api/datasets/someone/things"
        if not name.startswith(api):
            return super().answer(handler, body=body)
        self.requests.append((handler.command, name, sent.decode()))
        files = [
            {
                "type": "file",
                "path": f"data/{f.name}",
                "size": f.stat().st_size,
                "oid": hashlib.sha1(f.read_bytes()).hexdigest(),
            }
            for f in sorted(self.folder.iterdir())
        ]
        rest = name.removeprefix(api).strip("/")
        if rest in ("", "revision/main"):
            found = {
                "id": "someone/things",
                "sha": "0" * 40,
                "private": False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [],
            }
        elif rest == "tree/main/data":
            found = files
        elif rest == "tree/main":
            found = [{"type": "directory", "path": "data", "size": 0, "oid": "0" * 40}]
        elif rest == "paths-info/main":
            form = parse_qs(sent.decode()) or {}
            wanted = form.get("paths") or json.loads(sent)["paths"]
            found = [f for f in files if f["path"] in wanted]
            if "data" in wanted:
                found.append({"type": "directory", "path": "data", "size": 0, "oid": "0" * 40})
        else:
            found = None
        data = json.dumps(found).encode()
        handler.send_response(200 if found is not None else 404)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)


class FaultProxy(FaultServer):
    """Stands before a server at (host, port) and passes on what it says, with faults."""

    def __init__(self, host: str, port: int, **options):
        self.upstream = (host, port)
        super().__init__(Path(), **options)

    def answer(self, handler: BaseHTTPRequestHandler, *, body: bool) -> None:
        path, _, query = handler.path.partition("?")
        name = "the list" if "list-type" in query else path.rsplit("/", 1)[-1]
        with self._lock:
            fault = self.fault(handler.command, name, self.count(name, handler.command))
            self.requests.append((handler.command, name, handler.headers.get("Range", "")))
        if fault == "empty":
            handler.close_connection = True
            return
        if fault.isdigit():
            return self.respond(handler, name, b"", int(fault), {}, fault="", body=body)
        connection = http.client.HTTPConnection(*self.upstream, timeout=30)
        try:
            connection.request(handler.command, handler.path, headers=dict(handler.headers))
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        ours = ("content-length", "transfer-encoding", "connection", "date", "server")
        headers = {key: value for key, value in answer.getheaders() if key.lower() not in ours}
        size = None if body else int(answer.getheader("Content-Length") or 0)
        self.respond(handler, name, data, answer.status, headers, fault=fault, body=body, size=size)
