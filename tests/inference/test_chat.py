import io
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image
from served import Server, free_port
from tiny_checkpoints import SIDE, save_checkpoint
from tiny_vlm import IMAGE_SIZE, TOKENS_PER_IMAGE, draw_png
from transformers import AutoModelForImageTextToText, AutoProcessor

from fastvlm.inference import chat, dialogue
from fastvlm.inference.partners import Remote, to_data_url

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_chat(commands):
    place = {"env": os.environ | {"PYTHONPATH": str(ROOT)}, "cwd": ROOT.parent}
    return lambda *arguments: commands.run(["-m", "fastvlm.inference.chat", *arguments], **place)


@pytest.fixture
def picture(tmp_path) -> str:
    path = tmp_path / "picture.png"
    path.write_bytes(draw_png(0))
    return str(path)


@pytest.fixture
def load_tiny_run(monkeypatch, tiny_model, tiny_tokenizer, tmp_path):
    config = OmegaConf.create({"image_size": IMAGE_SIZE})
    monkeypatch.setattr("fastvlm.build.load_run", lambda run: (tiny_model, tiny_tokenizer, config))
    (tmp_path / "config.yaml").touch()


def test_a_users_mistake_is_one_line_and_status_2(run_chat, tmp_path, picture):
    broken, cut = tmp_path / "broken.png", tmp_path / "cut.png"
    broken.write_text("no picture")
    cut.write_bytes(Path(picture).read_bytes()[:60])
    run = f"run={tmp_path / 'run'}"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    mistakes = [
        (["run=nowhere", "--prompt", "x"], "run=nowhere"),
        ([f"run={tmp_path}", "--prompt", "x"], "config.yaml"),
        ([run, "--image", "absent.png", "--prompt", "x"], "absent.png: no such file"),
        ([run, "--image", str(broken), "--prompt", "x"], "broken.png: not an image"),
        ([run, "--image", str(cut), "--prompt", "x"], "cut.png: not an image"),
        ([run, "--image", picture, "--prompt", "<image> and <image>"], "2 <image> placeholders, but 1 images"),
        ([run, "--image", picture, "--image", picture, "--prompt", "<image>"], "1 <image> placeholders, but 2 images"),
        ([run, "--imagine", "x"], "--imagine"),
        ([run, "--device", "gramophone", "--image", picture, "--prompt", "x"], "device gramophone"),
        ([], "run=DIR"),
    ]
    for arguments, named in mistakes:
        done = run_chat(*arguments)
        assert done.returncode == 2, arguments
        assert done.stderr.count("\n") == 1 and named in done.stderr, done.stderr
        assert done.stdout == ""


def test_help_comes_without_loading_torch():
    code = (
        "import sys; from fastvlm.inference import chat\n"
        "try: chat.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--prompt" in done.stdout and "/image" in done.stdout


def test_one_question_prints_the_engines_answer_and_its_cost(load_tiny_run, engine, tmp_path, picture, capsys):
    chat.main([f"run={tmp_path}", "--image", picture, "--prompt", "what digit", "--max-new-tokens", "9"])
    printed, cost = capsys.readouterr().out.rsplit("\n", 2)[:2]
    content = [{"type": "image"}, {"type": "text", "text": "what digit"}]
    image = engine.transform(Path(picture).read_bytes())
    expected = engine.generate([{"messages": [{"role": "user", "content": content}]}], [[image]], max_new_tokens=9)[0]
    assert printed == expected.text
    assert f"1 image: {TOKENS_PER_IMAGE} tokens, " in cost and f"prompt: {expected.num_prompt_tokens} tokens, " in cost
    assert cost.count(" ms") == 2 and "tokens/s" in cost


def test_a_stream_prints_the_same_text(load_tiny_run, tmp_path, picture, capsys, monkeypatch):
    question = [f"run={tmp_path}", "--image", picture, "--prompt", "<image>which"]
    chat.main(question)
    whole = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    chat.main(question)
    assert capsys.readouterr().out.rsplit("\n", 2)[0] == whole.rsplit("\n", 2)[0]


@pytest.fixture
def asked(monkeypatch):
    """(roles, images, system) of every question."""
    calls, original = [], dialogue.Local.ask

    def listen(self, messages, images, options):
        calls.append(([m["role"] for m in messages], len(images)))
        return original(self, messages, images, options)

    monkeypatch.setattr(dialogue.Local, "ask", listen)
    return calls


def converse(monkeypatch, tmp_path, lines, *arguments) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    chat.main([f"run={tmp_path}", "--max-new-tokens", "4", *arguments])


def test_a_conversation_keeps_its_turns_and_survives_mistakes(
    load_tiny_run, asked, tmp_path, picture, capsys, monkeypatch
):
    lines = [
        f"/image {picture}",
        "which digit",
        "/image absent.png",
        "and this",
        "/what",
        "<image> here",
        "/clear",
        "again",
        "digit " * 400,
        "digit \udcff",
        "still here",
        "/exit",
        "not said",
    ]
    converse(monkeypatch, tmp_path, lines)
    user, both = ["user"], ["user", "assistant", "user"]
    assert asked == [(user, 1), (both, 1), (user, 0), *[(both, 0)] * 3]
    errors = capsys.readouterr().err.splitlines()
    mistakes = ("absent.png", "/what is not a command", "1 <image>", "the model ends at 256", "U+DCFF at character 6")
    assert len(errors) == len(mistakes)
    for error, named in zip(errors, mistakes):
        assert named in error


def test_a_path_inside_a_sentence_is_an_image_where_it_stands(load_tiny_run, asked, tmp_path, picture, monkeypatch):
    spaced = tmp_path / "my picture.png"
    spaced.write_bytes(Path(picture).read_bytes())
    bare = str(spaced).replace(" ", "\\ ")
    image, text = {"type": "image"}, lambda words: {"type": "text", "text": words}
    expected = {
        f"what is in {picture}?": [text("what is in "), image, text("?")],
        f"'{spaced}' and {bare}.": [image, text(" and "), image, text(".")],
        "no absent.png here": [text("no absent.png here")],
    }
    for line, parts in expected.items():
        words, found = dialogue.mentioned_images(line)
        assert dialogue.compose_content(words, num_images=len(found)) == parts
    converse(monkeypatch, tmp_path, list(expected))
    assert [images for _, images in asked] == [1, 3, 3]


def test_an_address_keeps_its_query_and_a_sentence_its_question_mark():
    for line, words, found in (
        ("in https://h/x.png?a=1&b=2 now", "in <image> now", ["https://h/x.png?a=1&b=2"]),
        ('is "https://h/x.png?a=1" it', "is <image> it", ["https://h/x.png?a=1"]),
        ("is it https://h/x.png?", "is it <image>?", ["https://h/x.png"]),
        ("https://h/x.png?a=1, and then?", "<image>, and then?", ["https://h/x.png?a=1"]),
    ):
        assert dialogue.mentioned_images(line) == (words, found)


def test_an_address_is_an_image_by_command_and_inside_a_sentence(
    load_tiny_run, pictures, engine, tmp_path, capsys, monkeypatch
):
    absent = f"http://127.0.0.1:{pictures.port}/none.png"
    lines = [
        f"/image {pictures.url(1)} {pictures.url(2)}",
        "which digit",
        "/clear",
        f"what is in {pictures.url(3)}, and then?",
        f"/image {absent}",
        f"what is in {absent}?",
    ]
    converse(monkeypatch, tmp_path, lines)
    printed = capsys.readouterr()
    answers = [line for line in printed.out.splitlines() if not line.startswith("[")]
    image, text = {"type": "image"}, lambda words: {"type": "text", "text": words}
    asked = [
        ([image, image, text("which digit")], (1, 2)),
        ([text("what is in "), image, text(", and then?")], (3,)),
    ]
    for content, seeds in asked:
        images = [engine.transform(draw_png(seed)) for seed in seeds]
        record = {"messages": [{"role": "user", "content": content}]}
        expected = engine.generate([record], [images], max_new_tokens=4)[0].text
        assert answers and "\n".join(answers).count(expected)
    errors = printed.err.splitlines()
    assert len(errors) == 2 and all(f"image {absent}: nothing to be had there" in error for error in errors)


def test_what_cannot_be_a_path_or_an_address_is_one_line_and_in_a_sentence_a_word(
    load_tiny_run, asked, tmp_path, capsys, monkeypatch
):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        threading.Thread(target=lambda: mute.accept()[0].close(), daemon=True).start()
        addresses = ["http://localhost:abc/x.png", "http://a\x01b/x.png", "http://[::1/x.png"]
        addresses += [f"http://127.0.0.1:{mute.getsockname()[1]}/x.png"]  # hangs up without a word
        for address in addresses:
            with pytest.raises(ValueError, match="nothing to be had there") as refused:
                dialogue.read_image(address)
            assert address in str(refused.value) and "\n" not in str(refused.value)
    paths = ["~nobodyofthisname/x.png", "a" * 300 + ".png", "x\0.png"]
    for path in paths:
        with pytest.raises(ValueError, match="no such file"):
            dialogue.read_image(path)
    words = [f"what is in {path}?" for path in paths]
    assert [dialogue.mentioned_images(line) for line in words] == [(line, []) for line in words]
    commands = [f"{command} {path}" for command in ("/image", "/load") for path in paths[:2]]
    converse(monkeypatch, tmp_path, [*commands, f"look at {addresses[0]} now", f"look at {paths[0]} now"])
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 5 and [images for _, images in asked] == [0]
    for mistyped in ("http://localhost:abc", "localhost:abc", "http://[::1"):
        with pytest.raises(ValueError, match="not a server's address"):
            Remote(mistyped)
    with pytest.raises(ValueError, match="no such run directory"):
        chat.main(["run=" + "a" * 300, "--prompt", "x"])


def test_an_address_that_answers_with_a_page_is_one_line(tmp_path):
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "models").write_text("<html>hello</html>")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{web.server_port}"
        with pytest.raises(ValueError, match=f"{address}: /v1/models lists no model; is it an OpenAI-compatible"):
            Remote(address)
        web.shutdown()


def test_a_retry_that_fails_leaves_the_conversation_and_its_options_as_they_were(engine, monkeypatch):
    options = {"temperature": 1.0, "max_new_tokens": 4, "seed": 3}
    talk = dialogue.Dialogue(dialogue.Local(engine), options=options, streamed=False)
    talk.say("digit")
    messages = list(talk.messages)

    def fail(*_):
        raise ValueError("the connection broke")

    monkeypatch.setattr(talk, "_answer", fail)
    with pytest.raises(ValueError, match="connection broke"):
        talk.take("/retry")
    assert talk.options["seed"] == 3 and talk.messages == messages


def test_a_conversation_that_cannot_be_saved_leaves_the_earlier_one_as_it_was(engine, tmp_path, capsys):
    kept = tmp_path / "kept.json"
    options = {"temperature": 0.0, "max_new_tokens": 4}
    talk = dialogue.Dialogue(dialogue.Local(engine), options=options, streamed=False, system="é – 日本")
    talk.take(f"/save {kept}")
    before = kept.read_bytes()
    assert "é – 日本".encode() in before
    talk.take("/system \udcff")
    for path in (str(kept), str(tmp_path / "absent" / "kept.json"), str(tmp_path), str(tmp_path / ("a" * 300))):
        with pytest.raises(ValueError, match=f"/save {path}: cannot be written") as refused:
            talk.take(f"/save {path}")
        assert "\n" not in str(refused.value) and ".part" not in str(refused.value)
    assert kept.read_bytes() == before and list(tmp_path.iterdir()) == [kept]
    talk.take(f"/load {kept}")
    assert talk.system == "é – 日本"


@pytest.mark.slow
def test_a_folder_of_the_original_class_is_asked_in_the_terminal_and_through_the_server(run_chat, commands, tmp_path):
    """What both say is what the original class generates."""
    folder = save_checkpoint("llava", tmp_path / "llava")
    picture = str(tmp_path / "picture.png")
    Image.open(io.BytesIO(draw_png(0))).crop((0, 0, SIDE, SIDE)).save(picture)  # no pixel is scaled
    processor = AutoProcessor.from_pretrained(folder)
    stock = AutoModelForImageTextToText.from_pretrained(folder).eval()
    content = [{"type": "image"}, {"type": "text", "text": "what is in the image?"}]
    words = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=Image.open(picture), text=words, return_tensors="pt")
    begun = inputs["input_ids"].shape[1]
    written = stock.generate(**inputs, max_new_tokens=8, do_sample=False)[0, begun:]
    expected = processor.tokenizer.decode(written, skip_special_tokens=True).strip()
    question = ["--image", picture, "--prompt", "what is in the image?", "--max-new-tokens", "8"]
    local = run_chat(f"run={folder}", *question)
    assert local.returncode == 0, local.stderr
    port = free_port()
    process = commands.start(
        ["-m", "fastvlm.inference.server", f"run={folder}", f"port={port}", "name=original"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT.parent,
    )
    running = Server.of(process, port)
    try:
        remote = run_chat(f"http://127.0.0.1:{port}", *question)
        assert remote.returncode == 0, remote.stderr
        assert json.loads(running.get("/v1/models")[1])["data"][0]["id"] == "original"
        shown = {"type": "image_url", "image_url": {"url": to_data_url(Path(picture).read_bytes())}}
        messages = [{"role": "user", "content": [shown]}, {"role": "assistant", "content": "a red square"}]
        status, raw = running.request("POST", "/v1/attention", json.dumps({"model": "original", "messages": messages}))
        assert status == 200 and len(json.loads(raw)["images"]) == 1
    finally:
        running.stop()
    for done in (local, remote):
        assert done.stdout.rsplit("\n", 2)[0].strip() == expected, (done.stdout, expected)


def test_commands_change_what_is_asked(load_tiny_run, asked, tmp_path, picture, capsys, monkeypatch):
    kept = tmp_path / "kept.json"
    lines = [
        "/system the word",
        f"/image {picture} {picture}",
        "which digit",
        f"/save {kept}",
        "/set temperature=2 top_k=9",
        "/retry",
        "/system",
        "/retry",
        "/clear",
        f"/load {kept}",
        "and now",
        "/set temperature=-1",
        "/set tempo=1",
        "/set",
        f"/load {picture}",
        "/load",
        "/save",
        "/clear",
        "/retry",
    ]
    converse(monkeypatch, tmp_path, lines)
    told = ["system", "user"]
    assert asked == [(told, 2), (told, 2), (["user"], 2), (["system", "user", "assistant", "user"], 2)]
    captured = capsys.readouterr()
    named = [
        "temperature=-1",
        "/set tempo",
        "not a conversation",
        "no such file",
        "/save needs",
        "no message to answer",
    ]
    errors = captured.err.splitlines()
    assert len(errors) == len(named) and all(word in error for word, error in zip(named, errors))
    assert "temperature=0.0" in captured.out, "what /load brought back"
    assert json.loads(kept.read_text())["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png")


SAVED = {
    "system": "the word",
    "options": {"temperature": 1, "top_k": 9, "seed": -4, "stop": ["."]},
    "messages": [{"role": "user", "content": "digit"}, {"role": "assistant", "content": "word"}],
}
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": to_data_url(draw_png(0)[:50])}}]}
NOT_SAVED = [
    ({"options": {"temperature": "hot"}}, "temperature=hot: temperature takes a number"),
    ({"options": {"temperature": None}}, "temperature=None: temperature takes a number"),
    ({"options": {"temperature": True}}, "temperature=True: temperature takes a number"),
    ({"options": {"temperature": math.inf}}, "temperature=inf: temperature is 0"),
    ({"options": {"top_p": math.nan}}, "top_p=nan: top_p is from 0"),
    ({"options": {"top_k": 1.5}}, "top_k=1.5: top_k takes a number"),
    ({"options": {"max_new_tokens": 0}}, "max_new_tokens=0: max_new_tokens is from 1"),
    ({"options": {"seed": 2**62 + 1}}, "seed=4611686018427387905: seed is from"),
    ({"options": {"stop": "x"}}, "stop=x: stop takes texts"),
    ({"options": {"tempo": 1}}, "tempo: there are temperature"),
    ({"options": [1]}, "its options are not an object"),
    ({"system": 5}, "its system prompt is not text"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "not questions, each with its answer"),
    ({"messages": [*SAVED["messages"], {"role": "user", "content": "x"}]}, "not questions, each with its answer"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "no messages as a chat has them"),
    ({"messages": [IMAGE, SAVED["messages"][1]]}, "image 1: not an image that can be read"),
]


def test_load_takes_what_set_takes_and_what_it_refuses_changes_nothing(engine, tmp_path):
    file = tmp_path / "kept.json"
    usual = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 4, "seed": 0, "stop": []}
    talk = dialogue.Dialogue(dialogue.Local(engine), options=usual, streamed=False, system="before")
    for change, words in NOT_SAVED:
        file.write_text(json.dumps(SAVED | change))
        with pytest.raises(ValueError, match="not a conversation that /save wrote") as refused:
            talk.take(f"/load {file}")
        assert words in str(refused.value) and "\n" not in str(refused.value)
        assert (talk.options, talk.system, talk.messages) == (usual, "before", [])
    assignments = {
        "temperature=inf": "temperature is 0",
        "temperature=hot": "temperature takes a number",
        "top_p=1.5": "top_p is from 0",
        "seed=10000000000000000000000": "seed is from",
        "top_k=-1": "top_k is from 0",
        "seed=": "seed takes a number",
    }
    for assignment, words in assignments.items():
        with pytest.raises(ValueError, match=f"/set {assignment}.*: {words}"):
            talk.take(f"/set {assignment}")
        assert talk.options == usual
    file.write_text(json.dumps(SAVED | {"system": None}))
    talk.take(f"/load {file}")
    assert talk.system == "" and talk.options == usual | SAVED["options"] and talk.messages == SAVED["messages"]
    talk.take("/set top_p=0")
    assert talk.options == usual | SAVED["options"] | {"top_p": 0.0}


def test_the_coldest_draw_and_the_largest_seed_are_answered(load_tiny_run, asked, tmp_path, capsys, monkeypatch):
    converse(monkeypatch, tmp_path, ["/set temperature=1e-40 seed=4611686018427387904", "digit", "/retry"])
    assert len(asked) == 2 and capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="temperature=inf: temperature is 0"):
        chat.main([f"run={tmp_path}", "--temperature", "inf", "--prompt", "x"])


def test_a_conversation_with_a_server_says_what_one_with_its_engine_says(
    load_tiny_run, server, tmp_path, picture, capsys, monkeypatch
):
    lines, address = [f"/image {picture}", "which digit", "and then"], f"http://127.0.0.1:{server.port}"
    converse(monkeypatch, tmp_path, lines)
    local = capsys.readouterr().out.splitlines()
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    chat.main([address, "--max-new-tokens", "4"])
    remote = capsys.readouterr().out.splitlines()
    costs = [i for i, line in enumerate(local) if line.startswith("[")]
    assert len(costs) == 2 and len(local) == len(remote)
    tokens = lambda line: re.findall(r"(\d+) tokens[, ]", line)
    for i, (ours, theirs) in enumerate(zip(local, remote)):
        assert tokens(ours) == tokens(theirs) if i in costs else ours == theirs
    with pytest.raises(ValueError, match="more than the 200"):
        chat.main([address, "--prompt", "digit " * 230])
    with pytest.raises(ValueError, match="no server answers there"):
        chat.main(["http://127.0.0.1:9", "--prompt", "x"])


def test_placeholders_say_where_images_stand():
    image = {"type": "image"}
    text = lambda words: {"type": "text", "text": words}
    assert dialogue.compose_content("a", num_images=2) == [image, image, text("a")]
    assert dialogue.compose_content("a<image>b <image>", num_images=2) == [text("a"), image, text("b "), image]
    assert dialogue.compose_content("a", num_images=0) == [text("a")]
