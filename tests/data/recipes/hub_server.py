"""The part of the Hub that `datasets` and `huggingface_hub` ask for data sets, on loopback, over a folder."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

COMMIT = "5" * 40


class DataHub:
    """Serves the data sets `<org>/<name>/` of `folder`, each at one commit, at `url`."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer.answer(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> DataHub:
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        words = unquote(handler.path.split("?")[0]).strip("/").split("/")
        sent = handler.rfile.read(int(handler.headers.get("Content-Length", 0))).decode()
        self.asked.append(f"{handler.command} {handler.path}")
        if words[:2] == ["api", "datasets"] and (self.folder / "/".join(words[2:4])).is_dir():
            found = self.describe("/".join(words[2:4]), words[4:], sent)
            self.send(handler, 200 if found is not None else 404, json.dumps(found).encode())
        elif words[0] == "datasets" and words[3:4] == ["resolve"]:
            root, file = self.folder / "/".join(words[1:3]), "/".join(words[5:])
            if (root / file).is_file():
                self.send(handler, 200, (root / file).read_bytes())
            else:
                self.send(handler, 404, b"", error="EntryNotFound" if root.is_dir() else "RepoNotFound")
        else:
            self.send(handler, 404, b"")

    def describe(self, name: str, rest: list[str], sent: str) -> object:
        root = self.folder / name
        rows = [self.describe_file(root, file) for file in sorted(root.rglob("*"))]
        if not rest or rest[0] == "revision":
            files = [{"rfilename": row["path"]} for row in rows if row["type"] == "file"]
            return {"id": name, "sha": COMMIT, "private": False, "disabled": False, "tags": [], "siblings": files}
        if rest[0] == "tree":
            within = "/".join(rest[2:])
            return [row for row in rows if row["path"].startswith(f"{within}/" if within else "")]
        if rest[0] == "paths-info":
            wanted = (parse_qs(sent) or json.loads(sent or "{}")).get("paths", [])
            return [row for row in rows if row["path"] in wanted]
        return None

    def describe_file(self, root: Path, file: Path) -> dict:
        kind = {"type": "directory", "size": 0, "oid": "0" * 40}
        if file.is_file():
            data = file.read_bytes()
            kind = {"type": "file", "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        return {"path": file.relative_to(root).as_posix(), **kind}

    def send(self, handler: BaseHTTPRequestHandler, status: int, data: bytes, *, error: str = "RepoNotFound") -> None:
        start, stop = 0, len(data)
        asked = handler.headers.get("Range", "")
        if status == 200 and asked.startswith("bytes="):
            first, last = asked[6:].split("-")
            start, stop, status = int(first), min(int(last) + 1, stop) if last else stop, 206
        handler.send_response(status)
        if status == 206:
            handler.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        if status == 404:
            handler.send_header("X-Error-Code", error)
        handler.send_header("X-Repo-Commit", COMMIT)
        handler.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        handler.send_header("Accept-Ranges", "bytes")
        handler.send_header("Content-Length", str(stop - start))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(data[start:stop])
