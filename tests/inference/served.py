"""A server of the tiny model in a process of its own, as clients meet it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tiny_vlm import draw_png

HERE = Path(__file__).parent
LIMITS = ("max_rows=4", "max_waiting=40", "max_images=3", "max_body_bytes=300000", "max_image_bytes=50000")
ORIGIN = "https://pages.example"
LIMITS += ("max_pixels=90000", "max_prompt_tokens=200", "max_new_tokens=200", "default_new_tokens=12")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Pictures:
    """`/<seed>.png` are the tiny model's pictures."""

    def __init__(self):
        asked = self.asked = []

        class Files(BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                seed = self.path.strip("/").removesuffix(".png")
                self.send_response(200 if seed.isdigit() else 404)
                self.end_headers()
                if not seed.isdigit():
                    return
                self.wfile.write(draw_png(int(seed)))

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Files)
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def url(self, seed: int, host: str = "localhost") -> str:
        return f"http://{host}:{self.port}/{seed}.png"

    def stop(self) -> None:
        self.http.shutdown()


class Server:
    def __init__(self, commands, tokenizer_path: str, *settings: str):
        self.port = free_port()
        command = [str(HERE / "serve_tiny.py"), str(tokenizer_path), str(self.port), *settings]
        self.process = commands.start(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
        self._wait()

    @classmethod
    def of(cls, process, port: int) -> Server:
        """A server that was started otherwise."""
        running = cls.__new__(cls)
        running.process, running.port = process, port
        running._wait()
        return running

    def _wait(self) -> None:
        for _ in range(600):
            try:
                assert self.get("/health")[0] == 200
                return
            except OSError:
                assert self.process.poll() is None, self.process.output()[1]
                time.sleep(0.1)
        raise TimeoutError("the server did not start")

    def request(self, method: str, path: str, body=None, headers=None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            headers = headers or {"Content-Type": "application/json"}
            connection.request(method, path, body, headers, encode_chunked="Transfer-Encoding" in headers)
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, bytes]:
        return self.request("GET", path)

    def ask(self, **body) -> tuple[int, dict]:
        status, reply = self.request("POST", "/v1/chat/completions", json.dumps(body))
        return status, json.loads(reply)

    def metric(self, name: str) -> float:
        lines = self.get("/metrics")[1].decode().splitlines()
        return next((float(line.split()[1]) for line in lines if line.startswith(f"fastvlm_{name} ")), 0.0)

    def client(self):
        import openai

        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=20.0) is not None
