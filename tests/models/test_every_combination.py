"""Every encoder x resampler x projector x language model in small form: a training step, a generation, save, load.

python -m pytest -m slow tests/models/test_every_combination.py     # minutes
"""

import pytest
import torch
from omegaconf import OmegaConf
from part_options import NEW_RESAMPLERS, PROJECTORS, RESAMPLERS, VARIANTS, build_projector, build_resampler, option
from safetensors.torch import load, save
from small_parts import IMAGE_ID, VOCAB, make_batch, random_ids

from fastvlm.build import instantiate
from fastvlm.config import CONF
from fastvlm.inference import packed
from fastvlm.inference.levers import apply_levers, nothing_to_do
from fastvlm.models.vlm import VLM
from fastvlm.stages import LanguageStage

SIZE = 32
# What makes an option small: the class and the form stay, sizes shrink.
VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": SIZE, "pretrained": False}
SWIGLU = VIT | {"image_size": None, "interpolate": True}
CONVNEXT = {"pretrained": False, "depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "output_stride": 8}
FASTVIT = {
    "pretrained": False,
    "layers": [1, 1, 1],
    "embed_dims": [8, 16, 32],
    "mlp_ratios": [2, 2, 2],
    "token_mixers": ["repmixer", "repmixer", "attention"],
    "downsamples": [False, True, True],
    "se_downsamples": [False] * 3,
    "pos_embs": [None] * 3,
    "cls_ratio": 1.0,
}
HF = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIZE, "patch_size": 8}
TOWER = {"config": HF | {"intermediate_size": 16}}
MICRO = {"dims": [8, 16], "depths": [1, 1], "mlp_ratio": 1.0}
CLIP = {
    "name": "every-clip",
    "pretrained": None,
}
SMALL = {
    "fastvit_micro": MICRO,
    "multi_scale_micro": {"encoder": MICRO},
    "early_exit_micro": {"encoder": {"dims": [8, 8, 16], "depths": [1, 1, 1], "mlp_ratio": 1.0}, "num_tokens": None},
    "clip_micro": TOWER,
    "siglip_micro": TOWER,
    "dinov2_micro": {"config": HF | {"mlp_ratio": 1}},
    "convnext_micro": {k: v for k, v in CONVNEXT.items() if k != "output_stride"},
    "multi_granularity_micro": {"coarse": TOWER, "fine": {"config": HF | {"mlp_ratio": 1}}},
    "fastvithd": FASTVIT | {"checkpoint": None},
    "multi_scale": {"encoder": FASTVIT | {"checkpoint": None}},
    "early_exit": {"encoder": FASTVIT | {"checkpoint": None}, "exits": [0, 1], "num_tokens": None},
    "multi_granularity": {"coarse": CLIP, "fine": VIT},
    "clip_vit_l14_336": CLIP,
    **{f"mobileclip2_{size}": FASTVIT for size in ("s0", "s3", "s4")},
    "fastvit_mci2": FASTVIT,
    **{f"{name}_384": VIT for name in ("siglip_l16", "siglip_so400m", "siglip2_l16", "siglip2_so400m")},
    "dinov2_l14": VIT,
    "dinov3_l16": SWIGLU,
    "convnext_l_320": CONVNEXT,
    "convnext_xxl": CONVNEXT,
    "timm": {"name": "test_vit", "pretrained": False, "image_size": SIZE},
}
CLIP_CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 8, "heads": 2, "layers": 1},
}
LLMS = {
    "llama_micro": {"intermediate_size": 16},
    "qwen2_micro": {"intermediate_size": 16},
    "qwen3_micro": {"intermediate_size": 16, "head_dim": 8},
    "smollm2_micro": {"intermediate_size": 16},
    "opt_micro": {"ffn_dim": 16, "word_embed_proj_dim": 16},
}
# By the first word of an option's name, the form it is an example of.
FORM_OF = {"qwen2": "qwen2_micro", "qwen3": "qwen3_micro", "llama": "llama_micro", "llama3": "llama_micro"}
FORM_OF |= {"vicuna": "llama_micro", "smollm2": "smollm2_micro", "opt": "opt_micro", "pretrained": "llama_micro"}
ALL_RESAMPLERS = [*RESAMPLERS, *VARIANTS, *NEW_RESAMPLERS]
names = lambda group: sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def small(group: str, name: str, overrides: dict):
    return OmegaConf.merge(option(group, name), overrides)


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """Of every encoder but `transformers`, whose forms are the small ones, and of every form of language model."""
    import json

    import open_clip

    file = tmp_path_factory.mktemp("clip") / "every-clip.json"
    file.write_text(json.dumps(CLIP_CONFIG))
    open_clip.add_model_config(file)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 128}
    encoders = {name: small("encoder", name, SMALL[name]) for name in names("encoder") if name != "transformers"}
    return encoders, {name: small("llm", name, sizes | more) for name, more in LLMS.items()}


def build(configs, encoder: str, resampler: str, projector: str, llm: str, *, seed: int) -> VLM:
    torch.manual_seed(seed)
    encoder = instantiate(configs[0][encoder], key="encoder")
    follows = resampler in ("identity", "pixel_shuffle")
    middle = build_resampler(resampler, in_dim=encoder.out_dim, num_tokens=None if follows else 4)
    model = instantiate(configs[1][llm], key="llm", vocab_size=VOCAB)
    end = build_projector(projector, in_dim=middle.out_dim, out_dim=model.dim)
    return VLM(encoder, middle, end, model, image_token_id=IMAGE_ID)


def generate(model: VLM, batch, num: int = 3) -> list[int]:
    """Greedy, from the cache, after the first row's first sample."""
    length = int((batch.segment_ids[0] == 1).sum())
    embeds = model.embed(batch)[:1, :length]
    logits, cache = model.llm.prefill(embeds, torch.ones(1, length, dtype=torch.long))
    answer = []
    for step in range(num):
        answer.append(int(logits.argmax()))
        mask = torch.ones(1, length + step + 1, dtype=torch.long)
        logits, cache = model.llm.prefill(model.llm.embed(torch.tensor([answer[-1:]])), mask, cache=cache)
    return answer


def check(configs, *parts: str) -> None:
    model = build(configs, *parts, seed=0).train()
    slots = [IMAGE_ID] * model.num_visual_tokens(SIZE)
    a, b, c = random_ids(2, 3, 2)
    batch = make_batch([[a + slots + b], [slots + c, c]], images=2, image_size=SIZE)
    stage = LanguageStage(model, name="every", num_steps=1, optimizer=torch.optim.SGD)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = stage.measure(batch)["loss"]
    loss.backward()
    assert loss.isfinite() and [name for name, p in model.named_parameters() if p.grad is None] == []
    optimizer.step()
    # Tied tensors are stored once, as safetensors wants it.
    seen, tensors = set(), {}
    for name, value in model.state_dict().items():
        if value.data_ptr() not in seen or not value.numel():
            seen.add(value.data_ptr())
            tensors[name] = value
    file = save({name: value.contiguous() for name, value in tensors.items()})
    other = build(configs, *parts, seed=1)
    missing, unexpected = other.load_state_dict(load(file), strict=False)
    assert not unexpected and {name.split(".")[-2] for name in missing} <= {"lm_head"}
    model.eval(), other.eval()
    with torch.no_grad():
        assert torch.equal(model(batch), other(batch))
        answer = generate(model, batch)
        assert len(answer) == 3 and answer == generate(other, batch)


def test_every_option_has_a_small_form():
    assert set(SMALL) == set(names("encoder")) - {"transformers"}
    assert {FORM_OF[name.split("_")[0]] for name in names("llm")} == set(LLMS)


# These differ in numbers alone from another option: MobileCLIP2 from FastViTHD, one SigLIP from another.
SAME_FORM = {"mobileclip2_s0", "mobileclip2_s3", "mobileclip2_s4", "fastvit_mci2", "convnext_xxl"}
SAME_FORM |= {"siglip_so400m_384", "siglip2_l16_384", "siglip2_so400m_384"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("encoder", sorted(set(SMALL) - SAME_FORM))
def test_every_resampler_projector_and_language_model_behind(configs, encoder):
    failed = []
    for resampler in [*RESAMPLERS, *NEW_RESAMPLERS]:
        for projector in PROJECTORS:
            for llm in LLMS:
                try:
                    check(configs, encoder, resampler, projector, llm)
                except Exception as error:  # noqa: BLE001  all combinations are told at once
                    failed.append(f"{encoder} {resampler} {projector} {llm}: {type(error).__name__} {error}"[:300])
    assert not failed, f"{len(failed)}:\n" + "\n".join(failed[:20])


def pairwise() -> list[tuple[str, str, str, str]]:
    """Every option at least once, with other neighbours each time."""
    axes = [sorted(SMALL), ALL_RESAMPLERS, list(PROJECTORS), list(LLMS)]
    return [tuple(axis[(i * (k + 1)) % len(axis)] for k, axis in enumerate(axes)) for i in range(len(SMALL))]


@pytest.mark.parametrize("parts", pairwise(), ids=lambda parts: "-".join(parts).replace(" ", "_"))
def test_a_few_of_the_combinations(configs, parts):
    check(configs, *parts)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_exact_levers_leave_every_part_its_logits_and_bf16_nearly(configs, monkeypatch):
    monkeypatch.setattr(packed, "SMALLEST", 1)
    first = [min(group) for group in (SMALL, [*RESAMPLERS, *NEW_RESAMPLERS], PROJECTORS, LLMS)]
    groups = (sorted(SMALL), [*RESAMPLERS, *NEW_RESAMPLERS], list(PROJECTORS), list(LLMS))
    failed = []
    for i, group in enumerate(groups):
        for name in group:
            parts = [*first[:i], name, *first[i + 1 :]]
            try:
                model = build(configs, *parts, seed=0).eval()
                slots = [IMAGE_ID] * model.num_visual_tokens(SIZE)
                a, b = random_ids(2, 2)
                batch = make_batch([[a + slots + b]], images=1, image_size=SIZE)
                with torch.no_grad():
                    expected, answer = model(batch), generate(model, batch)
                    for lever in ("reparameterize", "channels_last", "depthwise", "packed"):
                        if not nothing_to_do(model, lever):
                            apply_levers(model, [lever])
                    torch.testing.assert_close(model(batch), expected, atol=1e-4, rtol=1e-4)
                    assert generate(model, batch) == answer
                    apply_levers(model, "bf16")
                    error = (model(batch).float() - expected).norm() / expected.norm()
                    assert error < 0.05, f"bf16: {error}"
            except Exception as error:  # noqa: BLE001  all parts are told at once
                failed.append(f"{' '.join(parts)}: {type(error).__name__} {error}"[:300])
    assert not failed, f"{len(failed)}:\n" + "\n".join(failed)
