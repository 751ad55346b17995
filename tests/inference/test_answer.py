import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Rust
from tokenizers import decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from fastvlm.inference.answer import Answer
from fastvlm.tokens import Tokenizer

TEXT = st.text(alphabet=st.sampled_from("ab .\né字🙂"), max_size=25)


def write(tokenizer, ids, *, stop=(), max_new_tokens=1000):
    """Feed ids one by one; the pieces a viewer would have seen, and the answer."""
    answer = Answer(tokenizer, stop_ids=frozenset({tokenizer.end_id}), stop=stop, max_new_tokens=max_new_tokens)
    shown = [""]
    for token in ids:
        answer.add(token)
        settled = answer.settled_text()
        assert settled.startswith(shown[-1]), "text that was shown may not change"
        shown.append(settled)
    return answer, shown


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT, stop=st.lists(st.text(alphabet="ab .\n字", min_size=1, max_size=3), max_size=2))
def test_what_is_shown_is_a_growing_start_of_the_final_text(tiny_tokenizer, text, stop):
    answer, shown = write(tiny_tokenizer, tiny_tokenizer.encode_text(text), stop=stop)
    assert answer.text().startswith(shown[-1])
    assert "\ufffd" not in shown[-1]
    assert (answer.finish_reason == "stop") == any(s in text for s in stop)
    if answer.finish_reason != "stop":
        assert answer.text() == text.strip()
        assert answer.raw_text() == text
    else:
        # The answer ends with the token that completes a stop string, before the first one that is then complete.
        read = tiny_tokenizer.hf.decode(answer.token_ids)
        before = tiny_tokenizer.hf.decode(answer.token_ids[:-1])
        assert not any(s in before for s in stop)
        raw = read[: min(read.find(s) for s in stop if s in read)]
        assert answer.text() == raw.strip() and answer.raw_text() == raw


def test_half_a_character_is_not_shown(tiny_tokenizer):
    ids = tiny_tokenizer.encode_text("a🙂")
    assert len(ids) == 5  # one byte each
    _, shown = write(tiny_tokenizer, ids)
    assert shown == ["", "a", "a", "a", "a", "a🙂"]


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_clear(tiny_tokenizer):
    ids = [tiny_tokenizer.encode_text(c)[0] for c in "a##b###c"]
    answer, shown = write(tiny_tokenizer, ids, stop=("###",))
    assert shown == ["", "a", "a", "a", "a##b", "a##b", "a##b", "a##b", "a##b"]
    assert answer.text() == "a##b" and answer.finish_reason == "stop" and len(answer.token_ids) == 7


def test_raw_text_keeps_the_space_that_sentencepieces_decoders_drop_before_the_first_word(tmp_path):
    words = ["▁a", "▁return", "▁▁▁", "\n", "<unk>"]
    rust = Rust(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    rust.decoder = decoders.Sequence(strip)  # Llama 2's
    PreTrainedTokenizerFast(tokenizer_object=rust, unk_token="<unk>").save_pretrained(tmp_path)
    answer, _ = write(Tokenizer(str(tmp_path), template="vicuna"), [2, 1, 0, 3], stop=["\n"])
    assert answer.raw_text() == "    return a" and answer.text() == "return a"


@pytest.fixture(scope="module")
def llama2(tmp_path_factory):
    """Words, and bytes that are tokens of their own, with Llama 2's decoder."""
    words = ["<unk>", "▁a", "b", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {word: i for i, word in enumerate(words)}
    rust = Rust(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    rust.decoder = decoders.Sequence(strip)
    folder = tmp_path_factory.mktemp("llama2")
    PreTrainedTokenizerFast(tokenizer_object=rust, unk_token="<unk>").save_pretrained(folder)
    return Tokenizer(str(folder), template="vicuna")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(said=st.lists(st.sampled_from([" a", "b", *"é字🙂".encode(), 0xFF]), max_size=12))
def test_a_byte_that_fits_no_character_takes_none_of_its_neighbours_with_it(llama2, said):
    name = lambda one: f"<0x{one:02X}>" if isinstance(one, int) else one.replace(" ", "▁")
    answer, shown = write(llama2, llama2.hf.convert_tokens_to_ids([name(one) for one in said]))
    whole = b"".join(bytes([one]) if isinstance(one, int) else one.encode() for one in said).decode(errors="replace")
    assert answer.raw_text() == whole and answer.text() == whole.removeprefix(" ").strip()
    assert answer.text().startswith(shown[-1]) and not shown[-1].endswith("\ufffd")


def test_nothing_is_added_after_the_end(tiny_tokenizer):
    a = tiny_tokenizer.encode_text("a")[0]
    answer, _ = write(tiny_tokenizer, [a, tiny_tokenizer.end_id, a, a])
    assert answer.token_ids == [a] and answer.finish_reason == "end"
    answer, _ = write(tiny_tokenizer, [a, a, a], max_new_tokens=2)
    assert answer.token_ids == [a, a] and answer.finish_reason == "length"
