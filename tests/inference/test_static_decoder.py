"""Tokens through memory that does not move: the same numbers as memory that grows. Graphs themselves need a GPU."""

import pytest
import torch
from test_engine import draw_prompts
from tiny_vlm import IMAGE_SIZE

from fastvlm.inference import static_decoder
from fastvlm.inference.engine import Engine
from fastvlm.inference.fast_decoder import FastDecoder
from fastvlm.inference.kv_cache import KVCache
from fastvlm.inference.levers import apply_levers
from fastvlm.inference.static_decoder import StaticDecoder
from fastvlm.models.llms.language_model import from_config

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def small_llm(device: str):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    llm = from_config("qwen2", vocab_size=50, num_key_value_heads=2, initializer_range=0.3, **sizes)
    return llm.to(device).eval()


@pytest.mark.parametrize("device", DEVICES)
def test_single_tokens_give_the_hidden_states_of_a_growing_cache(device, monkeypatch):
    monkeypatch.setattr(static_decoder, "COLUMNS", 8)  # so that the memory is outgrown twice
    fast = FastDecoder(small_llm(device))
    static, ours, theirs = StaticDecoder(fast), KVCache(), KVCache()
    mask = torch.ones(3, 24, dtype=torch.long, device=device)
    mask[1, :5], mask[2, :9] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    embeds = torch.randn(3, 24, 32, device=device)
    with torch.inference_mode():
        for start, end in ((0, 4), *((i, i + 1) for i in range(4, 12)), (12, 15), *((i, i + 1) for i in range(15, 24))):
            given = embeds[:, start:end], positions[:, start:end], mask[:, :end]
            expected, theirs = fast.decode(*given, theirs)
            hidden, ours = static.decode(*given, ours)
            torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)
            for mine, reference in zip(ours.layers, theirs.layers):
                torch.testing.assert_close(mine.keys, reference.keys, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(mine.values, reference.values, atol=1e-5, rtol=1e-5)
    assert [key[1] for key in static._steps] == [8, 16, 24]


@pytest.mark.parametrize("device", DEVICES)
def test_two_caches_that_take_turns_keep_their_own_columns(device):
    fast = FastDecoder(small_llm(device))
    static = StaticDecoder(fast)
    embeds = torch.randn(2, 10, 32, device=device)
    at = lambda i: torch.tensor([[i]], device=device)
    with torch.inference_mode():
        caches = [(KVCache(), KVCache()) for _ in range(2)]
        for row, pair in enumerate(caches):
            for decoder, cache in zip((static, fast), pair):
                decoder.decode(embeds[row : row + 1, :3], torch.arange(3, device=device)[None], None, cache)
        for i in range(3, 10):
            for row, pair in enumerate(caches):
                ours, theirs = (
                    decoder.decode(embeds[row : row + 1, i : i + 1], at(i), None, cache)[0]
                    for decoder, cache in zip((static, fast), pair)
                )
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert len(static._steps) == 1, "both decode one row over as many columns, and share the memory"


@pytest.mark.parametrize("device", DEVICES)
def test_answers_are_those_of_the_growing_cache_while_rows_join_and_leave(
    device, engine, tiny_model, tiny_tokenizer, monkeypatch
):
    monkeypatch.setattr(static_decoder, "COLUMNS", 16)
    records, images = draw_prompts(12, seed=8)
    expected = [g.token_ids for g in engine.generate(records, images)]
    other = Engine(
        tiny_model,
        tiny_tokenizer,
        image_size=IMAGE_SIZE,
        max_new_tokens=12,
        device=device,
        image_store_bytes=1 << 20,
        prefix_store_bytes=1 << 20,
    )
    other.fast = StaticDecoder(other.fast)
    try:
        for _ in range(2):  # the second time from kept keys, and then one row at a time beside the others
            rows, waiting = other.rows(), [other.row(r, other.encode_images(i)) for r, i in zip(records, images)]
            every = list(waiting)
            while waiting or len(rows):
                rows.add([waiting.pop(0) for _ in range(min(2, len(waiting)))])
                for _ in range(3):
                    rows.step()
            assert [row.answer.token_ids for row in every] == expected
    finally:
        tiny_model.to("cpu")


def test_the_lever_is_refused_on_a_cpu_in_one_line(tiny_model):
    with pytest.raises(ValueError, match="^levers=graphs: there are no graphs on a CPU$"):
        apply_levers(tiny_model, "graphs")


@pytest.mark.gpu
def test_the_lever_decodes_by_graphs_and_changes_no_answer(tiny_model, tiny_tokenizer):
    records, images = draw_prompts(6, seed=3)
    options = {"image_size": IMAGE_SIZE, "max_new_tokens": 12, "device": "cuda"}
    expected = [g.token_ids for g in Engine(tiny_model, tiny_tokenizer, **options).generate(records, images)]
    try:
        apply_levers(tiny_model, "graphs")
        engine = Engine(tiny_model, tiny_tokenizer, **options)
        assert isinstance(engine.fast, StaticDecoder)
        assert [g.token_ids for g in engine.generate(records, images)] == expected
        assert all(step._graph is not None for step in engine.fast._steps.values())
    finally:
        tiny_model.llm.graphs = False
        tiny_model.to("cpu")
