"""The server as clients meet it: a uvicorn process, spoken to by the openai client and by raw HTTP."""

import asyncio
import base64
import http.client
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from served import ORIGIN
from tiny_vlm import IMAGE_SIZE, TOKENS_PER_IMAGE, build_model, draw_png

from fastvlm.inference.app import create_app
from fastvlm.inference.engine import Engine, Generation
from fastvlm.inference.protocol import ChatRequest
from fastvlm.inference.replies import BodyLimit, Refused
from fastvlm.inference.sampling import Sampling
from fastvlm.inference.scheduler import Busy, Job, Scheduler, Stopped
from fastvlm.inference.service import Service, refusal
from fastvlm.inference.settings import parse_settings

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def reference(tiny_tokenizer):
    return Engine(build_model(tiny_tokenizer), tiny_tokenizer, image_size=IMAGE_SIZE, max_new_tokens=12)


def data_url(seed: int) -> str:
    return "data:image/png;base64," + base64.b64encode(draw_png(seed)).decode()


def with_images(text: str, *seeds: int) -> list[dict]:
    images = [{"type": "image_url", "image_url": {"url": data_url(seed)}} for seed in seeds]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def expected(reference, text: str, *seeds: int, **options):
    content = [{"type": "image"}] * len(seeds) + [{"type": "text", "text": text}]
    images = [reference.transform(draw_png(seed)) for seed in seeds]
    return reference.generate([{"messages": [{"role": "user", "content": content}]}], [images], **options)[0]


def test_the_openai_client_gets_the_engines_answer(server, reference):
    client = server.client()
    assert list(client.models.list()) == [client.models.retrieve("tiny")]
    with pytest.raises(openai.NotFoundError, match="model 'some/other' does not exist; this server has tiny"):
        client.models.retrieve("some/other")
    reply = client.chat.completions.create(model="tiny", messages=with_images("which digit", 1, 2), max_tokens=9)
    wanted = expected(reference, "which digit", 1, 2, max_new_tokens=9)
    assert reply.choices[0].message.content == wanted.text and reply.choices[0].finish_reason == "length"
    usage = reply.usage
    assert usage.prompt_tokens == wanted.num_prompt_tokens and usage.completion_tokens == 9
    assert usage.total_tokens == usage.prompt_tokens + 9
    assert reply.model_extra["fastvlm"]["image_tokens"] == 2 * TOKENS_PER_IMAGE
    words = client.chat.completions.create(
        model="tiny", messages=[{"role": "system", "content": "what"}, {"role": "user", "content": "digit"}]
    )
    turns = [{"role": "system", "content": "what"}, {"role": "user", "content": "digit"}]
    assert words.choices[0].message.content == reference.generate([{"messages": turns}], [[]])[0].text


def test_a_stream_joins_to_the_same_answer_and_ends_with_usage_and_done(server, reference):
    wanted = expected(reference, "what word", 5)
    request = {"model": "tiny", "messages": with_images("what word", 5), "stream": True}
    chunks = list(server.client().chat.completions.create(**request))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == wanted.text
    assert [c.choices[0].finish_reason for c in chunks][-1] == "length" and chunks[-1].usage.completion_tokens == 12
    assert chunks[-1].model_extra["fastvlm"]["first_token_seconds"] > 0
    chunks = list(server.client().chat.completions.create(**request, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.prompt_tokens == wanted.num_prompt_tokens
    assert all(c.usage is None for c in chunks[:-1])
    status, raw = server.request("POST", "/v1/chat/completions", json.dumps(request))
    assert status == 200 and raw.decode().endswith("data: [DONE]\n\n")


def test_options_reach_the_engine(server, reference):
    free = expected(reference, "which digit", 7, max_new_tokens=20)
    part = free.text[4:7]
    _, stopped = server.ask(model="tiny", messages=with_images("which digit", 7), max_tokens=20, stop=[part])
    assert stopped["choices"][0]["message"]["content"] == free.text[: free.text.index(part)].strip()
    assert stopped["choices"][0]["finish_reason"] == "stop"
    draw = lambda seed: server.ask(
        model="tiny", messages=with_images("which digit", 7), temperature=1.5, top_p=0.9, top_k=50, seed=seed
    )[1]["choices"][0]["message"]["content"]
    assert draw(1) == draw(1) != draw(2)


def test_a_further_turn_finds_the_image_and_what_was_said(server):
    messages = with_images("which digit is in the picture", 30)
    _, first = server.ask(model="tiny", messages=messages)
    turns = [*messages, {"role": "assistant", "content": first["choices"][0]["message"]["content"]}]
    _, second = server.ask(model="tiny", messages=[*turns, {"role": "user", "content": "and now"}])
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["prompt_tokens"]


MISTAKES = [
    (404, "does not exist", {"model": "huge", "messages": [{"role": "user", "content": "x"}]}),
    (400, "messages", {"model": "tiny", "messages": []}),
    (400, "messages.0.role", {"model": "tiny", "messages": [{"role": "wizard", "content": "x"}]}),
    (400, "needs content", {"model": "tiny", "messages": [{"role": "user", "content": None}]}),
    (400, "only user messages", {"model": "tiny", "messages": [{**with_images("x", 1)[0], "role": "assistant"}]}),
    (400, "temperature", {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": -1}),
    (400, "top_p", {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "top_p": -0.1}),
    (400, "top_k", {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "top_k": -2}),
    (400, "n: ", {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "n": 2}),
    (400, "tools", {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "tools": [{}]}),
    (400, "max_tokens", {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 0}),
    (400, "U+D800 at character 2", {"model": "tiny", "messages": [{"role": "user", "content": "ab\ud800"}]}),
    (400, "U+DFFF", {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "text", "text": "\udfff"}]}]}),
    (400, "4 images, more than the 3", {"model": "tiny", "messages": with_images("x", 1, 2, 3, 4)}),
]
SAID = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
UNSUPPORTED = {
    "response_format": {"type": "json_object"},
    "repetition_penalty": 1.2,
    "length_penalty": 0.5,
    "min_p": 0.1,
    "best_of": 2,
    "logprobs": True,
    "presence_penalty": 1,
    "logit_bias": {"5": 100},
    "tool_choice": "required",
    "reasoning_effort": "high",
    "guided_regex": "a+",
    "temprature": 1.0,
}
HARMLESS = {
    "response_format": {"type": "text"},
    "repetition_penalty": 1.0,
    "min_p": 0,
    "reasoning_effort": None,
    "audio": None,
    "user": "somebody",
    "metadata": {"a": "b"},
    "stream_options": None,
    "tools": [],
}


def test_what_would_change_the_answer_and_is_not_done_is_refused_by_name(server):
    for field, value in UNSUPPORTED.items():
        status, said = server.ask(**SAID, **{field: value})
        assert status == 400 and said["error"]["message"].startswith(field), (field, status, said)
        assert said["error"]["param"].startswith(field) and "\n" not in said["error"]["message"]
    inside = [
        ("messages.0.name", {"name": "Ada"}),
        ("messages.0.tool_calls", {"tool_calls": [{"id": "1"}]}),
        ("messages.0.content", {"content": [{"type": "text", "text": "x", "weight": 2}]}),
    ]
    for field, more in inside:
        status, said = server.ask(model="tiny", messages=[{"role": "user", "content": "x"} | more])
        assert status == 400 and said["error"]["message"].startswith(field), said
    plain, asked = server.ask(**SAID)[1], server.ask(**SAID, **HARMLESS)
    assert asked[0] == 200 and asked[1]["choices"][0]["message"] == plain["choices"][0]["message"]


WRONG_INSIDE = [
    ("content.0", {"type": "input_audio", "input_audio": {}}, "a part whose type is 'text' or 'image_url'"),
    ("content.0", {"text": "x"}, "a part whose type is 'text' or 'image_url'"),
    ("content.0", "x", "a part whose type is 'text' or 'image_url'"),
    ("content.0.image_url", {"type": "image_url", "image_url": "data:image/png;base64,AA"}, "an object with url"),
    ("content.0.image_url.detail", {"type": "image_url", "image_url": {"url": "x", "detail": "original"}}, "'high'"),
    ("content.0.weight", {"type": "text", "text": "x", "weight": 2}, "this server does not know it"),
    ("content.0.<text>", {"type": "text", "text": "x", "<text>": 2}, "this server does not know it"),
    ("content.0.text", {"type": "text", "text": 5}, "a valid string"),
    ("content.0.text", {"type": "text"}, "required"),
]


def test_what_is_wrong_inside_a_request_is_said_of_the_place_where_it_is(server):
    def check(where, words, **body):
        status, said = server.ask(**SAID | body)
        error = said["error"]
        assert status == 400 and error["param"] == where, error
        assert error["message"].startswith(f"{where}: ") and words in error["message"], error

    for where, part, words in WRONG_INSIDE:
        check(f"messages.0.{where}", words, messages=[{"role": "user", "content": [part]}])
    check("messages.0.content", "a text or a list of parts", messages=[{"role": "user", "content": 5}])
    check("messages.0", "an object with role", messages=["x"])
    check("stop", "at most 4 items", stop=["a"] * 5)
    check("stop", "at least 1 character", stop="")
    check("stop", "a text or a list of up to 4 texts", stop=5)
    check("stop.1", "a valid string", stop=["a", 5])


def test_null_is_taken_wherever_a_field_may_be_left_out_and_nowhere_else(server):
    image = {"type": "image_url", "image_url": {"url": data_url(1), "detail": None}}
    options = {"stream_options": {"include_usage": None}, "stop": None, "temperature": None, "stream": None}
    status, reply = server.ask(**SAID | {"messages": [{"role": "user", "content": [image]}]}, **options)
    assert status == 200, reply
    for field in ("model", "messages"):
        status, said = server.ask(**SAID | {field: None})
        assert status == 400 and said["error"]["param"] == field, said


@pytest.mark.parametrize("key", ["max_tokens", "max_completion_tokens"])
def test_an_answer_may_be_asked_longer_than_server_and_model_let_it_be(server, reference, key):
    """Harnesses ask for 32,768 tokens of every model."""
    for text in ("x", "digit " * 80):
        status, reply = server.ask(model="tiny", messages=[{"role": "user", "content": text}], **{key: 32768})
        assert status == 200, reply
        used, choice = reply["usage"], reply["choices"][0]
        room = min(200, 256 - used["prompt_tokens"])
        assert used["completion_tokens"] == room and choice["finish_reason"] == "length"
        assert choice["message"]["content"] == expected(reference, text, max_new_tokens=room).text


def test_a_prompt_that_leaves_the_model_no_room_is_refused(reference):
    service = Service(reference, parse_settings(["run=tiny", "max_prompt_tokens=400"]))

    try:
        fitting = asyncio.run(ask(service, [{"role": "user", "content": "digit " * 240}]))
        assert 0 < len(fitting.token_ids) == 256 - fitting.num_prompt_tokens < 256 // 4
        with pytest.raises(Refused, match="the model ends at 256"):
            asyncio.run(ask(service, [{"role": "user", "content": "digit " * 260}]))
    finally:
        service.scheduler.stop()


async def ask(service: Service, messages: list[dict]) -> Generation:
    body = ChatRequest(model="tiny", messages=messages)
    asked = service.ask(body, *await service.prepare(body))
    while (told := await asked.next())[0] == "text":
        pass
    return told[1]


def test_a_prompt_is_made_into_tokens_once_and_not_while_others_are_answered(reference, monkeypatch):
    wanted = expected(reference, "which digit", 1, 2, max_new_tokens=9).token_ids
    service = Service(reference, parse_settings(["run=tiny"]))
    monkeypatch.delattr("fastvlm.inference.engine.encode_record")
    try:
        assert asyncio.run(ask(service, with_images("which digit", 1, 2))).token_ids[:9] == wanted
    finally:
        service.scheduler.stop()


def test_a_reply_of_the_openai_client_is_taken_back_as_it_came(server):
    client, messages = server.client(), [{"role": "user", "content": "digit"}]
    message = client.chat.completions.create(model="tiny", messages=messages, max_tokens=3).choices[0].message
    assert message.model_dump()["tool_calls"] is None, "it has fields that ask for nothing"
    turns = [*messages, message.model_dump(), {"role": "user", "content": "and"}]
    assert client.chat.completions.create(model="tiny", messages=turns, max_tokens=3).usage.completion_tokens == 3
    image = {"type": "image_url", "image_url": {"url": data_url(1), "detail": "low"}}
    assert server.ask(model="tiny", messages=[{"role": "user", "content": [image]}], max_tokens=3)[0] == 200


ADDRESSES = [
    ("file:///etc/passwd", "scheme 'file' is not allowed"),
    ("http://127.0.0.1:1/x.png", "not on this server's allow-list"),
    ("https://example.org/x.png", "not on this server's allow-list"),
    ("ftp://example.org/x.png", "scheme 'ftp' is not allowed"),
    ("data:text/html;base64,AAAA", "of type text/html"),
    ("data:image/png;base64,@@@@", "its base64 is broken"),
    ("data:image/png;base64,AAAA", "not an image"),
    ("data:image/png;base64," + base64.b64encode(draw_png(1)[:90]).decode(), "broken image"),
    ("data:image/png;base64," + "A" * 80_000, "more than 50000 bytes"),
    ("nonsense", "scheme 'none' is not allowed"),
    ("", "scheme"),
]


def test_a_clients_mistake_is_one_line_and_a_4xx_and_the_service_goes_on(server):
    def check(status, said, named, wanted):
        assert status == wanted, (named, status, said)
        assert named in said["error"]["message"] and "\n" not in said["error"]["message"], said

    for wanted, named, body in MISTAKES:
        check(*server.ask(**body), named, wanted)
    for url, named in ADDRESSES:
        content = [{"type": "image_url", "image_url": {"url": url}}]
        check(*server.ask(model="tiny", messages=[{"role": "user", "content": content}]), named, 400)
    for body in (b"", b"{", b"[" * 20_000, b"\xff\xfe", b'{"model": "\\ud800", "messages": [1]}', b"null", b"[]"):
        status, raw = server.request("POST", "/v1/chat/completions", body)
        assert 400 <= status < 500 and "message" in json.loads(raw)["error"], body[:20]
    assert server.request("POST", "/v1/chat/completions", b"x" * 300_001)[0] == 413
    chunked = {"Transfer-Encoding": "chunked", "Content-Type": "application/json"}
    assert server.request("POST", "/v1/chat/completions", iter([b"x" * 100_000] * 4), chunked)[0] == 413
    assert server.get("/nowhere")[0] == 404 and server.get("/v1/chat/completions")[0] == 405
    assert server.get("/..%2fapp.py")[0] == 404
    assert server.ask(model="tiny", messages=with_images("still here", 1))[0] == 200


def test_images_come_from_allowed_hosts_and_from_no_others(server, pictures, reference):
    def asking(*urls):
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content = [*parts, {"type": "text", "text": "which digit"}]
        return server.ask(model="tiny", messages=[{"role": "user", "content": content}])

    status, reply = asking(pictures.url(1), data_url(2), pictures.url(3))
    assert status == 200 and sorted(pictures.asked[-2:]) == ["/1.png", "/3.png"]
    assert reply["choices"][0]["message"]["content"] == expected(reference, "which digit", 1, 2, 3).text
    before = len(pictures.asked)
    for url in (pictures.url(1, host="127.0.0.1"), "http://localhost/1.png", "http://localhost:1/1.png"):
        status, reply = asking(pictures.url(1), url)
        assert status == 400 and "not on this server's allow-list" in reply["error"]["message"]
    assert len(pictures.asked) == before


def test_pages_of_named_origins_may_call_the_server_and_no_others(server):
    def allowed(origin: str) -> tuple[int, str | None, str | None]:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
        connection.request("OPTIONS", "/v1/chat/completions", headers={"Origin": origin, **wanted})
        asked = connection.getresponse()
        asked.read()
        connection.request("GET", "/v1/models", headers={"Origin": origin})
        given = connection.getresponse()
        given.read()
        connection.close()
        name = "Access-Control-Allow-Origin"
        return asked.status, asked.headers[name], given.headers[name]

    for origin in (ORIGIN, "https://b.example"):
        assert allowed(origin) == (200, origin, origin)
    before = server.metric("refused_413_total")
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("POST", "/v1/chat/completions", b"x" * 300_001, headers={"Origin": ORIGIN})
    refused = connection.getresponse()
    assert refused.status == 413 and refused.headers["Access-Control-Allow-Origin"] == ORIGIN
    connection.close()
    assert server.metric("refused_413_total") == before + 1
    for origin in ("https://evil.example", f"{ORIGIN}.evil.example", "null"):
        assert allowed(origin) == (400, None, None)


def test_a_prompt_of_more_tokens_than_allowed_is_refused_before_anything_is_computed(server):
    messages = with_images("digit " * 230, 77)
    before = server.metric("image_store_bytes")
    for path, more in (("chat/completions", []), ("attention", [{"role": "assistant", "content": "digit " * 300}])):
        body = {"model": "tiny", "messages": [*messages, *more]}
        status, raw = server.request("POST", f"/v1/{path}", json.dumps(body))
        said = json.loads(raw)["error"]["message"]
        assert status == 400 and "4 of images), more than the" in said and "this server reads" in said, said
    assert server.metric("image_store_bytes") == before


def test_too_many_pixels_are_refused_before_they_are_unpacked(server):
    file = BytesIO()
    Image.new("L", (301, 300)).save(file, "png")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}]
    status, said = server.ask(model="tiny", messages=[{"role": "user", "content": content}])
    assert status == 400 and "301 x 300 pixels" in said["error"]["message"]


def draw_file(seed: int) -> bytes:
    """A picture of any size, shape and format the server takes."""
    rng = np.random.default_rng(seed)
    width, height = (int(rng.integers(8, 300)) for _ in range(2))
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    file = BytesIO()
    coarse.resize((width, height), Image.Resampling.NEAREST).save(file, ("png", "jpeg", "webp", "bmp")[seed % 4])
    return file.getvalue() if file.tell() < 50_000 else draw_file(seed + 1000)


def as_part(file: bytes) -> dict:
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(file).decode()}}


@pytest.mark.parametrize("rounds", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_32_clients_at_once_with_images_of_all_sizes_are_each_answered_as_if_alone_in_bounded_memory(
    server, reference, rounds
):
    """...while others send broken requests and leave. Later rounds, with other images, need no more than the first."""

    def question(seed: int) -> list[dict]:
        files = [draw_file(100 * seed + i) for i in range(seed % 4)]
        content = [*map(as_part, files), {"type": "text", "text": "digit " * (1 + seed % 9)}]
        return [{"role": "user", "content": content}]

    def alone(seed: int) -> str:
        files = [draw_file(100 * seed + i) for i in range(seed % 4)]
        content = [*[{"type": "image"}] * len(files), {"type": "text", "text": "digit " * (1 + seed % 9)}]
        images = reference.read_images(files)
        record = {"messages": [{"role": "user", "content": content}]}
        return reference.generate([record], [images], max_new_tokens=4 + seed % 12)[0].text

    def malformed(seed: int) -> list[bytes]:
        cut = {**SAID, "messages": [{"role": "user", "content": [as_part(draw_file(seed)[: 40 + seed])]}]}
        wrong = {**SAID, "messages": question(seed), "temperature": -1}
        unknown = {**SAID, "messages": question(seed), "seed": "x" * 10_000, f"field{seed}": [[[]]] * 50}
        many = {**SAID, "messages": [{"role": "user", "content": [as_part(draw_file(seed))] * 4}]}
        bodies = [json.dumps(body).encode() for body in (cut, wrong, unknown, many)]
        return [*bodies, bodies[0][:-9], b"\xff" * 1000, b"[" * 5000, b"x" * 300_001]

    answers: dict[int, str] = {}
    statuses: list[int] = []

    def ask(seed: int) -> None:
        status, reply = server.ask(model="tiny", messages=question(seed), max_tokens=4 + seed % 12)
        answers[seed] = reply["choices"][0]["message"]["content"] if status == 200 else f"{status} {reply}"

    def client(seed: int) -> None:
        for body in malformed(seed)[seed % 2 :: 2]:
            statuses.append(server.request("POST", "/v1/chat/completions", body)[0])
        if seed % 8 == 3:
            leave_early(server, "/v1/chat/completions", stream=bool(seed % 2))
        ask(seed)

    failed, peaks = server.metric("refused_500_total"), [server.metric("peak_memory_bytes")]
    for number in range(rounds):
        threads = [threading.Thread(target=client, args=(32 * number + i,)) for i in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_for(lambda: server.metric("active") == server.metric("waiting") == 0)
        peaks.append(server.metric("peak_memory_bytes"))
    for seed, answer in answers.items():
        assert answer == alone(seed), seed
    assert len(answers) == 32 * rounds and len(statuses) == 4 * 32 * rounds and set(statuses) == {400, 413}
    assert server.metric("refused_500_total") == failed and server.process.poll() is None
    bounds = {"file_store_bytes": 1 << 20, "image_store_bytes": 1 << 20, "prefix_store_bytes": 1 << 22}
    assert all(0 < server.metric(name) <= bound for name, bound in bounds.items())
    assert peaks[1] - peaks[0] <= 64 << 20 and peaks[-1] - peaks[1] <= 16 << 20, peaks


def leave_early(server, path: str, *, stream: bool = False, when: str = "at once") -> None:
    """Asks and goes away at once, when the answer is being written, or when its first piece has come."""
    messages = with_images("word", 3)
    messages += [{"role": "assistant", "content": "digit"}] if "attention" in path else []
    body = json.dumps({"model": "tiny", "messages": messages, "max_tokens": 200, "stream": stream}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        if when == "first piece":
            assert b"200 OK" in connection.recv(1 << 12)
        elif when == "written":
            wait_for(lambda: server.metric("active") == 1)


def wait_for(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("path", "stream", "when"),
    [
        ("/v1/chat/completions", True, "first piece"),
        ("/v1/chat/completions", False, "written"),
        ("/v1/chat/completions", False, "at once"),
        ("/v1/chat/completions", True, "at once"),
        ("/v1/attention", False, "at once"),
    ],
)
def test_a_client_that_leaves_is_no_failure_and_its_answer_is_not_written_to_its_end(server, path, stream, when):
    names = ("clients_left_total", "answers_cancelled_total", "answers_total", "refused_500_total", "refused_499_total")
    before = {name: server.metric(name) for name in names}
    left = lambda: server.metric("clients_left_total") - before["clients_left_total"]
    quick = "attention" in path  # may be answered before anybody sees that the client is gone
    for _ in range(40 if quick else 3):
        leave_early(server, path, stream=stream, when=when)
        if left() >= 3:
            break
    wait_for(lambda: left() >= 3)
    wait_for(lambda: server.metric("active") == server.metric("waiting") == 0)
    more = {name: server.metric(name) - before[name] for name in names}
    # Who goes at once may be gone before the question is asked.
    cancelled = [3] if when != "at once" else range(4)
    assert more.pop("answers_cancelled_total") in cancelled
    assert more.pop("clients_left_total") == 3 or quick
    assert more == {
        "answers_total": 0,
        "refused_500_total": 0,
        "refused_499_total": 0,
    }
    assert "failed" not in server.process.output()[1]


def test_a_client_that_leaves_before_a_stream_begins_has_its_answer_cancelled_and_is_counted(reference, monkeypatch):
    app, services, stream = create_app(reference, parse_settings(["run=tiny"])), [], Service.stream

    def begin(self, *given, **more):  # by now the first event has come, and nothing of the reply been sent
        services.append(self)
        return stream(self, *given, **more)

    monkeypatch.setattr(Service, "stream", begin)
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "digit"}], "max_tokens": 200, "stream": True}
    given = iter([{"type": "http.request", "body": json.dumps(asked).encode(), "more_body": False}])

    async def receive() -> dict:
        while not services:
            if message := next(given, None):
                return message
            await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        await asyncio.sleep(0.01)  # as a server whose buffer is full
        sent.append(message)

    sent: list[dict] = []
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers, "query_string": b""}
    try:
        asyncio.run(app(scope, receive, send))
        wait_for(lambda: app.state.scheduler.num_active == 0)
        scheduler, (service,) = app.state.scheduler, services
        assert sent == [] and (scheduler.num_cancelled, scheduler.num_done, service.num_left) == (1, 0, 1)
    finally:
        app.state.scheduler.stop()


def job(engine, *, tokens: int, text: str = "digit", temperature: float = 0.0):
    told = queue.Queue()
    record = {"messages": [{"role": "user", "content": text}]}
    options = {"sampling": Sampling(temperature), "max_new_tokens": tokens, "stop": (), "seed": 0}
    return Job(record=record, images=[], tell=lambda *event: told.put(event), **options), told


def last_event(told):
    while (event := told.get(timeout=30))[0] == "text":
        pass
    return event


def test_questions_beyond_the_queue_are_refused_and_a_failing_one_concerns_nobody_else(reference, monkeypatch):
    decode, gate, told = reference._decode, threading.Event(), []
    steps = [lambda *given: gate.wait(30) and decode(*given)]
    monkeypatch.setattr(reference, "_decode", lambda *given: steps[-1](*given))
    scheduler = Scheduler(reference, max_rows=2, max_waiting=3)
    try:
        with pytest.raises(Busy):
            for _ in range(20):
                asked, events = job(reference, tokens=5)
                scheduler.submit(asked)
                told.append(events)
        assert 4 <= len(told) <= 6, "the one being read, up to one more row, and three that wait"
        gate.set()
        assert {last_event(events)[0] for events in told} == {"done"}
        bad, bad_told = job(reference, tokens=5, text="digit " * 400)
        good, good_told = job(reference, tokens=5)
        scheduler.submit(bad)
        scheduler.submit(good)
        kind, error = last_event(bad_told)
        assert kind == "error" and "the model ends at 256" in str(error) and last_event(good_told)[0] == "done"
        # A step that fails ends the answers in it; the scheduler goes on.
        steps.append(lambda *given: 1 / 0)
        broken, broken_told = job(reference, tokens=5)
        scheduler.submit(broken)
        assert isinstance(last_event(broken_told)[1], ZeroDivisionError)
        steps.append(decode)
        again, again_told = job(reference, tokens=5)
        scheduler.submit(again)
        assert last_event(again_told)[0] == "done" and scheduler.num_active == 0
    finally:
        scheduler.stop()


@pytest.mark.parametrize(
    "temperatures", [(1.0, 1.0, 1.0), (1.0, 1e-38, 0.0), (0.0, 1.0, 1.5), (0.0, 0.0, 0.0), (1.0, 0.0, 1.0)]
)
@pytest.mark.parametrize("when", ["at its first token", "at a later one"])
def test_an_answer_whose_next_token_cannot_be_drawn_ends_alone(reference, monkeypatch, temperatures, when):
    texts, failing = ("digit", "what word", "which"), 1
    wanted = [
        reference.generate(
            [{"messages": [{"role": "user", "content": text}]}], [[]], temperature=heat, max_new_tokens=12
        )[0].text
        for text, heat in zip(texts, temperatures)
    ]
    logits, decode, gate, lengths = reference._next_logits, reference._decode, threading.Event(), []

    def read(embeds, *given):
        gate.wait(30)
        lengths.append(embeds.shape[1])
        return decode(embeds, *given)

    def spoil(hidden):
        given = logits(hidden)
        if len(hidden) == 3 and when == "at a later one":
            given[failing] = torch.nan
        if when == "at its first token" and lengths[-1] > 1 and sum(length > 1 for length in lengths) == 1 + failing:
            given[:] = torch.nan  # prompts are read one by one
        return given

    monkeypatch.setattr(reference, "_decode", read)
    monkeypatch.setattr(reference, "_next_logits", spoil)
    scheduler = Scheduler(reference, max_rows=3, max_waiting=3)
    try:
        told = []
        for text, temperature in zip(texts, temperatures):
            asked, events = job(reference, tokens=12, text=text, temperature=temperature)
            scheduler.submit(asked)
            told.append(events)
        gate.set()
        for i, events in enumerate(told):
            kind, value = last_event(events)
            if i == failing:
                assert kind == "error" and isinstance(value, FloatingPointError), value
            else:
                assert kind == "done" and value.text == wanted[i]
        wait_for(lambda: scheduler.num_active == 0)
        assert scheduler.num_done == 2
    finally:
        scheduler.stop()


def test_the_coldest_temperatures_and_an_empty_nucleus_are_answered_as_greedy_ones(server):
    plain = server.ask(**SAID)[1]["choices"][0]["message"]
    for temperature, top_p in ((5e-324, 5e-324), (1e-40, 5e-324), (1e-38, 5e-324), (2.0, 0)):
        status, reply = server.ask(**SAID, temperature=temperature, top_p=top_p)
        assert status == 200 and reply["choices"][0]["message"] == plain


def test_a_top_k_of_minus_one_keeps_every_token_as_0_does(server):
    drawn = [server.ask(**SAID, temperature=2.0, seed=1, top_k=top_k) for top_k in (-1, 0, None)]
    assert all(status == 200 and reply["choices"] == drawn[0][1]["choices"] for status, reply in drawn)


def test_work_that_is_called_for_goes_on_piece_by_piece_between_the_steps_of_answers(reference, monkeypatch):
    """...and ends when nobody waits for it."""
    seen, decode, gate = [], reference._decode, threading.Event()
    monkeypatch.setattr(reference, "_decode", lambda *given: seen.append("step") or gate.wait(30) and decode(*given))

    def pieces(count, name="piece"):
        for _ in range(count):
            seen.append(name)
            yield
        return name

    async def ask():
        answer, told = job(reference, tokens=20)
        scheduler.submit(answer)
        wait_for(lambda: "step" in seen)
        others = [asyncio.create_task(scheduler.call(pieces(5))) for _ in range(2)]
        await asyncio.sleep(0)  # they are called for
        later, later_told = job(reference, tokens=5)
        scheduler.submit(later)
        gate.set()
        assert [await other for other in others] == ["piece"] * 2
        for events in (told, later_told):
            assert (await asyncio.to_thread(last_event, events))[0] == "done"
        between = [seen[i + 1 : i + 3] for i, name in enumerate(seen) if name == "piece"]
        assert len(between) == 10 and all("step" in pair for pair in between), seen
        # Who stops waiting ends the work.
        endless = asyncio.create_task(scheduler.call(pieces(10**9, "endless")))
        await asyncio.to_thread(wait_for, lambda: "endless" in seen)
        endless.cancel()
        await asyncio.to_thread(wait_for, lambda: scheduler.num_waiting == 0)
        with pytest.raises(ValueError, match="a mistake"):
            await scheduler.call(mistake())

    def mistake():
        raise ValueError("a mistake")
        yield

    scheduler = Scheduler(reference, max_rows=2, max_waiting=3)
    try:
        asyncio.run(ask())
    finally:
        scheduler.stop()


def test_a_scheduler_that_stops_tells_everybody_who_waits(reference, monkeypatch):
    gate, decode = threading.Event(), reference._decode
    monkeypatch.setattr(reference, "_decode", lambda *given: gate.wait(30) and decode(*given))

    async def ask():
        scheduler = Scheduler(reference, max_rows=1, max_waiting=3)
        asked = [job(reference, tokens=50) for _ in range(2)]
        for question, _ in asked:
            scheduler.submit(question)
        call = asyncio.create_task(scheduler.call(_ for _ in ()))
        await asyncio.sleep(0.01)
        ending = asyncio.get_running_loop().run_in_executor(None, scheduler.stop)
        wait_for(lambda: scheduler._stopping)
        gate.set()
        with pytest.raises(Stopped):
            await asyncio.wait_for(call, timeout=20)
        await ending
        for _, told in asked:
            assert isinstance(last_event(told)[1], Stopped)
        with pytest.raises(Busy):
            await scheduler.call(_ for _ in ())

    asyncio.run(ask())


def test_an_answer_that_a_stop_cuts_off_is_a_503_and_no_failure():
    assert refusal(Stopped("the server stops")).status == 503
    assert refusal(ValueError("one line\nanother")).message == "one line"
    assert isinstance(refusal(ZeroDivisionError()), ZeroDivisionError)


def test_attention_says_which_regions_an_answer_and_each_token_looked_at(server):
    messages = [*with_images("which digit", 1, 2), {"role": "assistant", "content": "the digit"}]
    status, raw = server.request("POST", "/v1/attention", json.dumps({"model": "tiny", "messages": messages}))
    assert status == 200, raw
    views = json.loads(raw)["images"]
    assert len(views) == 2
    for view in views:
        patches = view["rows"] * view["columns"]
        assert len(view["answer"]) == patches and len(view["tokens"]) == TOKENS_PER_IMAGE
        assert abs(sum(view["answer"]) - 1) < 0.01 and all(abs(sum(token) - 1) < 0.01 for token in view["tokens"])
        # Average pooling of the tiny model: each token is the mean of its own block and of nothing else.
        side = view["columns"] // 2
        for i, token in enumerate(view["tokens"]):
            inside = {
                r * view["columns"] + c
                for r in range(i // 2 * side, (i // 2 + 1) * side)
                for c in range(i % 2 * side, (i % 2 + 1) * side)
            }
            assert {p for p, share in enumerate(token) if share > 1e-6} == inside
    for body, named in (
        ({"model": "tiny", "messages": messages[:1]}, "must end with the assistant's answer"),
        ({"model": "tiny", "messages": [{"role": "user", "content": "x"}]}, "no image"),
        ({"model": "tiny", "messages": [*messages[:1], {"role": "assistant", "content": "\ud800"}]}, "U+D800"),
    ):
        status, raw = server.request("POST", "/v1/attention", json.dumps(body))
        assert status == 400 and named in json.loads(raw)["error"]["message"]


def test_the_page_comes_with_its_parts_and_no_others(server):
    for path, start in (("/", b"<!doctype html>"), ("/page.js", b'"use strict"'), ("/page.css", b":root")):
        status, raw = server.get(path)
        assert status == 200 and raw.startswith(start)
        assert b"http://" not in raw and b"https://" not in raw, "the page depends on nothing from elsewhere"
    assert server.get("/app.py")[0] == 404


def test_settings_mistakes_are_one_line():
    mistakes = {
        "prot=1": "did you mean port=",
        "port=x": "port takes int",
        "allow_private=maybe": "true or false",
        "max_rows=0": "max_rows must be at least 1",
    }
    for argument, named in mistakes.items():
        with pytest.raises(ValueError, match=named):
            parse_settings(["run=x", argument])
    with pytest.raises(ValueError, match="run=DIR"):
        parse_settings([])


def test_a_request_that_does_not_come_is_given_up():
    sent = []

    async def app(scope, receive, send):
        raise AssertionError("the application is not asked")

    async def ask(*messages) -> None:
        waiting = iter(messages)

        async def receive():
            return next(waiting, None) or await asyncio.sleep(60)

        async def send(message):
            sent.append(message)

        limit = BodyLimit(app, max_bytes=10, seconds=0.05)
        await limit({"type": "http", "method": "POST", "headers": []}, receive, send)

    asyncio.run(ask({"type": "http.request", "body": b"x", "more_body": True}))
    assert sent[0]["status"] == 408
    sent.clear()
    asyncio.run(ask({"type": "http.request", "body": b"x" * 11}))
    assert sent[0]["status"] == 413
    sent.clear()
    asyncio.run(ask({"type": "http.disconnect"}))
    assert sent == []


def test_the_servers_description_names_its_model_and_limits_and_its_examples_are_answered(server):
    schema = json.loads(server.get("/openapi.json")[1])
    for name in ("ChatRequest", "AttentionRequest"):
        fields = schema["components"]["schemas"][name]["properties"]
        assert fields["model"]["enum"] == ["tiny"] and "ends at 200" in fields["max_tokens"]["description"]
    for path in ("/v1/chat/completions", "/v1/attention"):
        example = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["example"]
        status, raw = server.request("POST", path, json.dumps(example))
        assert status == 200 and '"image_url"' in json.dumps(example), raw


@pytest.mark.slow
def test_fuzzed_requests_bring_no_server_error_and_many_of_them_reach_the_engine(server):
    """schemathesis draws requests from the server's own description, valid ones and broken ones; `fuzz_hooks.py` puts
    pictures where it drew addresses."""
    names = ("answers_total", "refused_500_total", "image_store_bytes")
    before = {name: server.metric(name) for name in names}
    command = [
        *(str(Path(sys.executable).parent / "schemathesis"), "run", f"http://127.0.0.1:{server.port}/openapi.json"),
        *(
            "--checks",
            "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        ),
        *("--max-examples", "60", "--seed", "1", "--phases", "examples,coverage,fuzzing", "--no-color"),
    ]
    hooks = {"SCHEMATHESIS_HOOKS": "fuzz_hooks", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=os.environ | hooks)
    assert done.returncode == 0, done.stdout[-4000:]
    assert server.process.poll() is None and server.get("/health")[0] == 200
    wait_for(lambda: server.metric("active") == server.metric("waiting") == 0)
    more = {name: server.metric(name) - before[name] for name in names}
    assert more["refused_500_total"] == 0 and more["answers_total"] >= 50 and more["image_store_bytes"] > 0, more
