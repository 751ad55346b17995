"""What a request brings is read side by side, and what is certainly too long is not read at all."""

import asyncio
import base64
import dataclasses
import re
import socket
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vlm import draw_png
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from fastvlm.inference import reading
from fastvlm.inference.reading import Reader
from fastvlm.inference.settings import Settings, parse_settings
from fastvlm.inference.text_bound import TextBound
from fastvlm.tokens import LONG

DATA = "data:image/png;base64," + base64.b64encode(draw_png(1)).decode()


def asked(text: str, *, images: int = 0) -> dict:
    content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}]}


def test_those_who_wait_for_other_hosts_hold_up_nobody_else(engine):
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        host = f"localhost:{silent.getsockname()[1]}"
        options = (f"allow_hosts={host}", "allow_private=true", "fetch_seconds=60")
        reader = Reader(engine, parse_settings(["run=tiny", *options]))
        record = asked("which digit", images=1)
        away = lambda: reader.read(record, [f"http://{host}/1.png"], max_tokens=200)

        async def check():
            waiting = [asyncio.create_task(away()) for _ in range(48)]
            await asyncio.sleep(0.1)
            for urls in ([], [DATA]):
                images, input_ids = await asyncio.wait_for(
                    reader.read(asked("which digit", images=len(urls)), urls, max_tokens=200), timeout=20
                )
                assert len(images) == len(urls) and input_ids
            assert not any(task.done() for task in waiting)
            silent.close()
            for task in asyncio.as_completed(waiting):
                with pytest.raises(ValueError, match="did not give the image"):
                    await task

        asyncio.run(check())


def test_a_text_that_takes_long_to_encode_holds_up_no_other(engine, monkeypatch):
    reader, gate = Reader(engine, parse_settings(["run=tiny"])), threading.Event()
    encode = reading.TokenizerThread._encode
    slow = lambda self, record, slots: (len(str(record)) < LONG or gate.wait(20)) and encode(self, record, slots)
    monkeypatch.setattr(reading.TokenizerThread, "_encode", slow)
    many = 10**6

    async def check():
        long = asyncio.create_task(reader.read(asked("digit " * LONG), [], max_tokens=many))
        await asyncio.sleep(0.05)
        assert (await asyncio.wait_for(reader.read(asked("digit"), [], max_tokens=many), timeout=15))[1]
        assert not long.done()
        gate.set()
        assert len((await long)[1]) >= LONG

    asyncio.run(check())


def test_what_is_too_long_by_its_characters_is_never_made_into_tokens(engine, monkeypatch):
    reader = Reader(engine, parse_settings(["run=tiny"]))
    monkeypatch.setattr(reading.TokenizerThread, "_encode", lambda *_: pytest.fail("it was encoded"))
    with pytest.raises(ValueError, match=r"has 6000000 characters, in tokens more than the 200 this server reads"):
        asyncio.run(reader.read(asked("a b" * 2_000_000), [], max_tokens=200))


def test_a_long_text_becomes_the_ids_that_a_short_one_does_and_other_threads_go_on(tiny_tokenizer):
    text = "which digit is é 日本 ? " * (LONG // 20)
    assert tiny_tokenizer.encode_text(text) == tiny_tokenizer.hf.backend_tokenizer.encode(text).ids
    with pytest.raises(ValueError, match="U\\+D800 at character"):
        tiny_tokenizer.encode_text(text + "\ud800")


@settings(max_examples=200, deadline=None)
@given(st.text() | st.text("digt which?é"), st.integers(0, 3))
def test_no_text_that_fits_exceeds_the_bound(tiny_tokenizer, text, repeats):
    texts = [text * 10**repeats, text]
    tokens = sum(len(tiny_tokenizer.encode_text(one)) for one in texts)
    bound = TextBound(tiny_tokenizer.hf.backend_tokenizer)
    assert bound.longest is not None and not bound.exceeded(texts, max_tokens=tokens)


def test_the_bound_is_the_longest_token_and_composed_characters_count_as_one():
    vocab = {symbol: i for i, symbol in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    pair = {**vocab, "aa": 256, "aaaa": 257}
    plain = bound_of(models.BPE(pair, [("a", "a"), ("aa", "aa")]))
    assert plain.longest == 4 and not plain.exceeded(["a" * 40], max_tokens=10)
    assert plain.exceeded(["a" * 40, "a"], max_tokens=10)
    composing = bound_of(models.BPE(pair, [("a", "a"), ("aa", "aa")]), normalizer=normalizers.NFC())
    assert not composing.exceeded(["e\u0301" * 40], max_tokens=10) and composing.exceeded(["e" * 80], max_tokens=10)


def test_nothing_is_said_of_a_tokenizer_that_leaves_characters_out():
    symbols = pre_tokenizers.ByteLevel.alphabet()
    whole, part = ({s: i for i, s in enumerate(some)} for some in (symbols, symbols[1:]))
    spaces = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()])
    apart = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()])
    unknowing = [
        bound_of(models.BPE(part, [])),
        bound_of(models.BPE(whole, []), pre_tokenizer=None),
        bound_of(models.BPE(whole, []), pre_tokenizer=spaces),
        bound_of(models.BPE(whole, []), pre_tokenizer=apart),
        bound_of(models.BPE(whole, []), normalizer=normalizers.Strip()),
        bound_of(models.BPE(whole, []), normalizer=normalizers.Replace(" ", "")),
        bound_of(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")),
        bound_of(models.Unigram([("a", 0.0)], unk_id=0)),
    ]
    for bound in unknowing:
        assert bound.longest is None and not bound.exceeded(["a" * 10**6], max_tokens=1)
    fallback = {f"<0x{byte:02X}>": byte for byte in range(256)}
    spm = bound_of(
        models.BPE(fallback, [], byte_fallback=True),
        pre_tokenizer=None,
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    )
    assert spm.longest == len("<0x00>")


def bound_of(model, *, pre_tokenizer=..., normalizer=None) -> TextBound:
    fast = Tokenizer(model)
    if pre_tokenizer is not None:
        fast.pre_tokenizer = pre_tokenizers.ByteLevel() if pre_tokenizer is ... else pre_tokenizer
    if normalizer is not None:
        fast.normalizer = normalizer
    return TextBound(fast)


def test_a_port_that_cannot_be_is_refused_before_a_model_is_loaded():
    with pytest.raises(ValueError, match="port=70000: port must be at most 65535"):
        parse_settings(["run=x", "port=70000"])
    assert parse_settings(["run=x", "port=65535"]).port == 65535


def test_the_help_of_the_server_names_every_key():
    named = re.findall(r"^ {8}([\w, ]+):", Settings.__doc__, flags=re.M)
    assert ", ".join(named).split(", ") == [field.name for field in dataclasses.fields(Settings)]
