import pytest
import torch
from small_parts import SIZES, VOCAB, make_batch, random_ids, small_llm
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from fastvlm.models.llms import from_config, from_pretrained

BOTH = pytest.mark.parametrize("model_type", ["llama", "qwen2"])
ATTENTION = pytest.mark.parametrize("attention", ["eager", "sdpa"])


def hidden_of(llm, batch):
    return llm.hidden(llm.embed(batch.input_ids), batch.position_ids, batch.segment_ids)


@BOTH
@ATTENTION
def test_a_packed_row_is_its_samples_one_by_one(model_type, attention):
    llm, samples = small_llm(model_type, attention=attention), random_ids(5, 7, 1, 3)
    packed = make_batch([samples], length=20)
    logits = llm.head(hidden_of(llm, packed))
    weights = torch.randn(16, VOCAB)
    (logits[0, :16] * weights).sum().backward()
    together = [p.grad.clone() for p in llm.parameters()]
    llm.zero_grad()
    start = 0
    for ids in samples:
        alone = llm.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        torch.testing.assert_close(logits[0, start : start + len(ids)], alone, rtol=1e-5, atol=1e-5)
        (alone * weights[start : start + len(ids)]).sum().backward()
        start += len(ids)
    torch.testing.assert_close([p.grad for p in llm.parameters()], together, rtol=1e-5, atol=1e-5)


@BOTH
@ATTENTION
def test_right_padding_is_transformers_own_masking(model_type, attention):
    llm, batch = small_llm(model_type, attention=attention), make_batch([[ids] for ids in random_ids(4, 9, 6)])
    theirs = llm.hf(input_ids=batch.input_ids, attention_mask=(batch.segment_ids > 0).long(), use_cache=False).logits
    real = batch.segment_ids > 0
    torch.testing.assert_close(llm.head(hidden_of(llm, batch))[real], theirs[real], rtol=1e-5, atol=1e-5)


@ATTENTION
def test_padding_is_finite_forward_and_backward(attention):
    llm = small_llm(attention=attention)
    batch = make_batch([random_ids(3), []], length=8)  # the second row is padding only
    hidden = hidden_of(llm, batch)
    hidden.square().sum().backward()
    assert hidden.isfinite().all()
    assert all(p.grad.isfinite().all() for p in llm.parameters() if p.grad is not None)


def test_flex_attention_gets_the_same_mask():
    from torch.nn.attention.flex_attention import create_mask

    llm, batch = small_llm(), make_batch([random_ids(3, 4), random_ids(5)], length=9)
    embeds = llm.embed(batch.input_ids)
    llm.attention = "sdpa"
    dense = llm._mask(batch.segment_ids, embeds)
    llm.attention = "flex_attention"
    block = llm._mask(batch.segment_ids, embeds)
    assert torch.equal(create_mask(block.mask_mod, 2, 1, 9, 9, device="cpu"), dense)


def test_auto_is_eager_for_short_rows_on_a_cpu():
    llm = small_llm()
    hidden_of(llm, make_batch([random_ids(3)]))
    assert llm.hf.config._attn_implementation == "eager"
    hidden_of(llm, make_batch([random_ids(513)]))
    assert llm.hf.config._attn_implementation == "sdpa"


@ATTENTION
@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_decoding_equals_the_full_forward(attention, side):
    llm = small_llm("qwen2", attention=attention).eval()
    prompts, more = random_ids(3, 6), random_ids(4, 4, seed=1)
    ids, mask = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        where = slice(0, len(prompt)) if side == "right" else slice(6 - len(prompt), 6)
        ids[row, where], mask[row, where] = torch.tensor(prompt), 1
    with torch.no_grad():
        logits, cache = llm.prefill(llm.embed(ids), mask)
        for t in range(5):
            for row, prompt in enumerate(prompts):
                full = llm.hf(input_ids=torch.tensor([prompt + more[row][:t]]), use_cache=False).logits[0, -1]
                torch.testing.assert_close(logits[row], full, rtol=1e-5, atol=1e-5)
            if t < 4:
                mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
                logits, cache = llm.step(torch.tensor([more[0][t], more[1][t]]), mask, cache)


def test_a_mask_of_another_length_than_the_cache_is_refused():
    llm = small_llm()
    with pytest.raises(ValueError, match="attention_mask covers 4 positions, the cache 0 \\+ 3"):
        llm.decode(torch.zeros(1, 3, 32), torch.arange(3)[None], torch.ones(1, 4, dtype=torch.long))


@pytest.mark.parametrize(("config", "original"), [(LlamaConfig, LlamaForCausalLM), (Qwen2Config, Qwen2ForCausalLM)])
def test_a_checkpoint_of_the_original_class_loads_and_grows_to_the_tokenizer(tmp_path, config, original):
    theirs = original(config(vocab_size=VOCAB, num_key_value_heads=2, **SIZES))
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(str(tmp_path), vocab_size=VOCAB + 3)
    assert ours.vocab_size == VOCAB + 3 and ours.dim == 32
    ids = torch.tensor(random_ids(7))
    with torch.no_grad():
        logits = ours.head(hidden_of(ours, make_batch([ids.tolist()])))
        torch.testing.assert_close(logits[..., :VOCAB], theirs(ids).logits, rtol=1e-5, atol=1e-5)
    assert from_pretrained(str(tmp_path), vocab_size=VOCAB - 9).vocab_size == VOCAB


def test_gradient_checkpointing_changes_no_gradient():
    batch, grads = make_batch([random_ids(5, 4)]), []
    for recompute in (False, True):
        llm = small_llm(gradient_checkpointing=recompute).train()
        hidden_of(llm, batch).square().sum().backward()
        grads.append([p.grad for p in llm.hf.model.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_type": "lama"}, "llm.model_type=lama is not a model type"),
        ({"model_type": "llama", "num_layer": 3}, "llm.num_layer is not an argument of LlamaConfig"),
        ({"model_type": "llama", "attention": "fast", **SIZES}, "llm.attention=fast is not one of"),
    ],
)
def test_a_misspelt_key_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        from_config(vocab_size=VOCAB, **arguments)


def test_a_missing_model_is_one_line_with_the_fix(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="llm.path=nobody/nothing") as error:
        from_pretrained("nobody/nothing", vocab_size=VOCAB)
    assert "\n" not in str(error.value) and "name a folder" in str(error.value)


def test_rows_beyond_a_sliding_window_are_refused():
    llm = small_llm("mistral", sliding_window=8)
    with pytest.raises(ValueError, match="rows of 9 positions exceed the sliding window of 8"):
        hidden_of(llm, make_batch([random_ids(9)]))
