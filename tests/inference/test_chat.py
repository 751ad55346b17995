import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tiny_vlm import IMAGE_SIZE, TOKENS_PER_IMAGE, draw_png

from fastvlm.inference import chat

ROOT = Path(__file__).parents[2]


def run_chat(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "fastvlm.inference.chat", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
    )


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


def test_a_users_mistake_is_one_line_and_status_2(tmp_path, picture):
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
        ([run, "--device", "gramophone", "--image", picture, "--prompt", "x"], "--device gramophone"),
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


def test_a_conversation_keeps_its_turns_and_survives_mistakes(load_tiny_run, tmp_path, picture, capsys, monkeypatch):
    asked = []
    original = chat.answer

    def listen(engine, record, images, **options):
        asked.append(([m["role"] for m in record["messages"]], len(images)))
        return original(engine, record, images, **options)

    monkeypatch.setattr(chat, "answer", listen)
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
        "still here",
        "/exit",
        "not said",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    chat.main([f"run={tmp_path}", "--max-new-tokens", "4"])
    user, both = ["user"], ["user", "assistant", "user"]
    assert asked == [(user, 1), (both, 1), (user, 0), (both, 0), (both, 0)]
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4
    for error, named in zip(errors, ("absent.png", "/what is not a command", "1 <image>", "the model ends at 256")):
        assert named in error


def test_placeholders_say_where_images_stand():
    image = {"type": "image"}
    text = lambda words: {"type": "text", "text": words}
    assert chat.compose_content("a", num_images=2) == [image, image, text("a")]
    assert chat.compose_content("a<image>b <image>", num_images=2) == [text("a"), image, text("b "), image]
    assert chat.compose_content("a", num_images=0) == [text("a")]
