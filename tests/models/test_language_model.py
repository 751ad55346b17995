import pytest
import torch
from part_options import relative_error
from safetensors.torch import load_file, save_file
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
                logits, cache = llm.prefill(llm.embed(torch.tensor([[more[0][t]], [more[1][t]]])), mask, cache=cache)


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


def test_sizes_that_the_library_refuses_are_one_line():
    with pytest.raises(ValueError, match="llm: llama refuses these sizes: ") as found:
        from_config("llama", vocab_size=VOCAB, hidden_size=100, num_attention_heads=4)
    assert "\n" not in str(found.value)


def test_a_missing_model_is_one_line_with_the_fix(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="llm.path=nobody/nothing") as error:
        from_pretrained("nobody/nothing", vocab_size=VOCAB)
    assert "\n" not in str(error.value) and "name a folder" in str(error.value)


def test_rows_beyond_a_sliding_window_are_refused():
    llm = small_llm("mistral", sliding_window=8)
    with pytest.raises(ValueError, match="rows of 9 positions exceed the sliding window of 8"):
        hidden_of(llm, make_batch([random_ids(9)]))
    embeds = llm.embed(torch.as_tensor(random_ids(9)).view(1, 9))
    with pytest.raises(ValueError, match="9 positions exceed the sliding window of 8; shorten prompt or answer"):
        llm.prefill(embeds, torch.ones(1, 9, dtype=torch.long))
    llm.prefill(embeds[:, :8], torch.ones(1, 8, dtype=torch.long))


# ------------------------------------------------------------------- every architecture, every back end, one claim

TIED = {"tie_word_embeddings": True}
ARCHITECTURES = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 48},
    "qwen2": {"num_key_value_heads": 2, "intermediate_size": 48, **TIED},
    "qwen3": {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 16, **TIED},
    "smollm2": {"num_key_value_heads": 2, "intermediate_size": 48, **TIED},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "opt-350m": {"ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.0, "do_layer_norm_before": False},
}
BACK_ENDS = ("eager", "sdpa", "flex_attention", "flash_attention_2")


def architecture(name, **options):
    torch.manual_seed(0)
    model_type = {"smollm2": "llama", "opt-350m": "opt"}.get(name, name)
    # At the usual spread of random weights what a position sees hardly shows.
    spread = {"init_std" if model_type == "opt" else "initializer_range": 0.3}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **spread}
    return from_config(model_type, vocab_size=VOCAB, **(sizes | ARCHITECTURES[name] | options)).eval()


def varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, softmax_scale=None, causal=True, **_):
    """What flash-attn's function of this name computes, in float64: (T, heads, d) -> (T, heads, d)."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and causal
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = torch.empty_like(q)
    for start, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist()):
        a, b, c = (x[start:end].transpose(0, 1).double() for x in (q, k, v))
        scores = a @ b.mT * (softmax_scale or q.shape[-1] ** -0.5)
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        out[start:end] = (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ c).transpose(0, 1).to(q.dtype)
    return out


@pytest.fixture
def flash(monkeypatch):
    """flash-attn's place taken by its definition: what is tested is what we hand it."""
    refuse = lambda *_, **__: pytest.fail("attention was asked for without the ends of the samples")
    kwargs = lambda *, softmax_scale=None, is_causal=True, **_: {"softmax_scale": softmax_scale, "causal": is_causal}
    functions = ((refuse, varlen, refuse, refuse, refuse), (kwargs, refuse))
    monkeypatch.setattr("fastvlm.models.llms.language_model.is_flash_attn_2_available", lambda: True)
    target = "transformers.modeling_flash_attention_utils.lazy_import_flash_attention"
    monkeypatch.setattr(target, lambda *_, **__: functions)


@pytest.mark.parametrize("attention", BACK_ENDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_samples_do_not_see_each_other(name, attention, flash):
    llm = architecture(name, attention=attention)
    samples = random_ids(5, 7, 1, 3)
    packed = make_batch([samples, samples[1:3]], length=20)
    # flex_attention compiles itself, which on a CPU takes longer than the test; uncompiled it computes the same.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        logits = llm.head(hidden_of(llm, packed))
        llm.hf.config._attn_implementation = "eager"
        for row, ids in ((0, samples), (1, samples[1:3])):
            start = 0
            for sample in ids:
                alone = llm.hf(input_ids=torch.tensor([sample]), use_cache=False).logits[0]
                assert relative_error(logits[row, start : start + len(sample)], alone) < 1e-5
                start += len(sample)
    assert logits.isfinite().all()


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_slots_left_empty_inside_a_sample_part_nothing(attention, flash):
    """Segment 0 in the midst of a sample, as `slots.hide` leaves it."""
    llm = architecture("qwen2", attention=attention)
    ids = torch.tensor(random_ids(9))
    whole = torch.tensor([[1, 1, 0, 0, 1, 1, 2, 2, 2]])
    positions = torch.tensor([[0, 1, 0, 0, 2, 3, 0, 1, 2]])
    with torch.no_grad():
        logits = llm.head(llm.hidden(llm.embed(ids), positions, whole))
        for kept in ([0, 1, 4, 5], [6, 7, 8]):
            llm.hf.config._attn_implementation = "eager"
            alone = llm.hf(input_ids=ids[:, kept], use_cache=False).logits[0]
            torch.testing.assert_close(logits[0, kept], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_decodes_from_its_cache_what_it_computes_at_once(name):
    llm, prompts = architecture(name), random_ids(6, 3)
    ids, mask = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, 6 - len(prompt) :], mask[row, 6 - len(prompt) :] = torch.tensor(prompt), 1
    with torch.no_grad():
        logits, cache = llm.prefill(llm.embed(ids), mask)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        logits, _ = llm.prefill(llm.embed(torch.tensor([[7], [8]])), mask, cache=cache)
        for row, more in enumerate(([7], [8])):
            full = llm.hf(input_ids=torch.tensor([prompts[row] + more]), use_cache=False).logits[0, -1]
            torch.testing.assert_close(logits[row], full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_saves_and_loads_with_the_original_class(name, tmp_path):
    llm = architecture(name)
    llm.hf.save_pretrained(tmp_path)
    ids = torch.tensor(random_ids(7))
    with torch.no_grad():
        ours, theirs = from_pretrained(str(tmp_path), vocab_size=VOCAB).eval(), type(llm.hf).from_pretrained(tmp_path)
        logits = ours.head(hidden_of(ours, make_batch([ids.tolist()])))
        torch.testing.assert_close(logits, theirs.eval()(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_that_lacks_tensors_or_has_other_shapes_is_refused_with_the_list(tmp_path):
    architecture("qwen2").hf.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    key = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in state.items() if k != key}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks 1 of \d+ tensors: {key}; they would be random"):
        from_pretrained(str(tmp_path), vocab_size=VOCAB)
    save_file(state | {key: torch.zeros(3, 5)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 tensors of other shapes: {key} is \(3, 5\) there and \(48, 32\) here"):
        from_pretrained(str(tmp_path), vocab_size=VOCAB)


def test_an_id_that_cannot_be_fetched_names_the_offline_alternatives(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="llm.path=Qwen/Qwen3-0.6B: .*name a folder .* llm=qwen2_micro") as error:
        from_pretrained("Qwen/Qwen3-0.6B", vocab_size=VOCAB)
    assert "\n" not in str(error.value)


def test_flash_attention_says_what_it_needs():
    with pytest.raises(ValueError, match="needs the package flash-attn .* choose llm.attention=sdpa"):
        small_llm(attention="flash_attention_2")


def test_an_unknown_compile_mode_is_refused():
    with pytest.raises(ValueError, match="llm.compile=fast is not one of true, false, default"):
        small_llm(compile="fast")


@pytest.mark.slow
def test_a_compiled_model_has_the_same_logits_gradients_and_names():
    batches = [make_batch([random_ids(5, 4)]), make_batch([random_ids(3, 8)])]
    found = []
    for compiled in (False, True):
        llm = small_llm(compile=compiled)
        logits = [llm.head(hidden_of(llm, batch)) for batch in batches]
        sum(one.square().sum() for one in logits).backward()
        learned = {name: p.grad for name, p in llm.named_parameters() if p.grad is not None}
        found.append(learned | {f"logits {i}": one.detach() for i, one in enumerate(logits)})
    plain, compiled = found
    assert plain.keys() == compiled.keys()
    # By the tensor: an element that is small because large terms cancel differs by more than its own rounding.
    assert max(relative_error(compiled[key], value) for key, value in plain.items()) < 1e-5


@pytest.mark.slow
def test_compiled_flex_attention_does_not_mix_packed_samples():
    llm, samples = architecture("qwen2", attention="flex_attention"), random_ids(5, 7)
    with torch.no_grad():
        logits = llm.head(hidden_of(llm, make_batch([samples], length=128)))
        llm.hf.config._attn_implementation = "eager"
        alone = llm.hf(input_ids=torch.tensor([samples[1]]), use_cache=False).logits[0]
    assert relative_error(logits[0, 5:12], alone) < 1e-5
