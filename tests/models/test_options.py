"""Every file of conf/{encoder,resampler,projector,llm} builds a part that fits small neighbours."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from part_options import option
from small_parts import IMAGE_ID, SIZES, VOCAB, make_batch, random_ids, small_encoder, small_llm
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from fastvlm import build
from fastvlm.models.projectors.mlp import MLPProjector
from fastvlm.models.resamplers.avgpool import AvgPoolResampler
from fastvlm.models.resamplers.identity import IdentityResampler
from fastvlm.models.vlm import VLM

CONF = Path(__file__).parents[2] / "conf"
TOWER = {"intermediate_size": 32, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
# Full-size encoders are built without memory for their weights; what needs the hub gets none.
# Name: overrides, image size, patches, width.
LOCAL = {"pretrained": False}
FULL = {
    "fastvithd": ({"checkpoint": None}, 1024, 256, 3072),
    "multi_scale": ({"encoder": {"checkpoint": None}}, 1024, 256, 4512),
    "early_exit": ({"encoder": {"checkpoint": None}}, 1024, 256, 3072),
    "multi_granularity": ({"coarse": {"pretrained": None, "device": "meta"}, "fine": LOCAL}, 336, 576, 1024),
    "clip_vit_l14_336": ({"pretrained": None, "device": "meta"}, 336, 576, 1024),
    "mobileclip2_s0": (LOCAL, 256, 64, 1024),
    "mobileclip2_s3": (LOCAL, 512, 64, 3072),
    "mobileclip2_s4": (LOCAL, 512, 64, 4096),
    "fastvit_mci2": (LOCAL, 768, 576, 1280),
    "siglip_l16_384": (LOCAL, 384, 576, 1024),
    "siglip_so400m_384": (LOCAL, 384, 729, 1152),
    "siglip2_l16_384": (LOCAL, 384, 576, 1024),
    "siglip2_so400m_384": (LOCAL, 384, 576, 1152),
    "dinov2_l14": (LOCAL, 518, 1369, 1024),
    "dinov3_l16": (LOCAL, 512, 1024, 1024),
    "convnext_l_320": (LOCAL, 320, 100, 1536),
    "convnext_xxl": (LOCAL, 256, 64, 3072),
    "timm": ({"name": "vit_base_patch16_224", "pretrained": False}, 224, 196, 768),
}
MICRO = {
    "fastvit_micro": (64, 64, 128),
    "clip_micro": (64, 64, 128),
    "siglip_micro": (64, 64, 128),
    "dinov2_micro": (64, 64, 128),
    "convnext_micro": (64, 64, 128),
    "multi_scale_micro": (64, 64, 160),
    "multi_granularity_micro": (64, 64, 128),
    "early_exit_micro": (64, 64, 128),
}
CLIP, SIGLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)), ((0.5,) * 3, (0.5,) * 3)
IMAGENET, FASTVLM = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.0,) * 3, (1.0,) * 3)
STATISTICS = {
    "clip_vit_l14_336": CLIP,
    "clip_micro": CLIP,
    "convnext_micro": CLIP,
    "convnext_l_320": CLIP,
    "convnext_xxl": CLIP,
    "mobileclip2_s3": CLIP,
    "mobileclip2_s4": CLIP,
    "mobileclip2_s0": FASTVLM,
    "fastvit_mci2": FASTVLM,
    "fastvithd": FASTVLM,
    "multi_scale": FASTVLM,
    "early_exit": FASTVLM,
    "multi_granularity": FASTVLM,  # it applies those of its two itself
    "multi_granularity_micro": FASTVLM,
    "siglip_l16_384": SIGLIP,
    "siglip_so400m_384": SIGLIP,
    "siglip2_l16_384": SIGLIP,
    "siglip2_so400m_384": SIGLIP,
    "siglip_micro": SIGLIP,
    "timm": SIGLIP,  # of the model named above
    "dinov2_l14": IMAGENET,
    "dinov3_l16": IMAGENET,
    "dinov2_micro": IMAGENET,
    "fastvit_micro": SIGLIP,
    "multi_scale_micro": SIGLIP,
    "early_exit_micro": SIGLIP,
}
names = lambda group: sorted(path.stem for path in (CONF / group).glob("*.yaml"))
load = lambda group, name: OmegaConf.load(CONF / group / f"{name}.yaml")


def runs(encoder, resampler, projector, llm, image_size):
    model = VLM(encoder, resampler, projector, llm, image_token_id=IMAGE_ID)
    slots = [IMAGE_ID] * model.num_visual_tokens(image_size)
    batch = make_batch([[slots + random_ids(3)[0]]], images=1, image_size=image_size)
    model(batch).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", [name for name in names("encoder") if name != "transformers"])
def test_an_encoder_builds_and_reports_its_sizes_and_statistics(name):
    config = option("encoder", name)
    if name in FULL:
        overrides, size, patches, width = FULL[name]
        with torch.device("meta"):
            encoder = build.instantiate(OmegaConf.merge(config, overrides), key="encoder").eval()
            out = encoder(torch.zeros(1, 3, size, size)) if name != "early_exit" else torch.zeros(1, patches, width)
    else:
        size, patches, width = MICRO[name]
        encoder = build.instantiate(config, key="encoder")
        out = encoder(torch.zeros(1, 3, size, size))
        exits = "exit" in name
        resampler = IdentityResampler(in_dim=width) if exits else AvgPoolResampler(in_dim=width, num_tokens=4)
        runs(encoder, resampler, MLPProjector(in_dim=resampler.out_dim, out_dim=32), small_llm(), size)
    assert out.shape == (1, patches, width) == (1, encoder.num_patches(size), encoder.out_dim)
    assert (tuple(encoder.mean), tuple(encoder.std)) == STATISTICS[name]


def test_every_vision_tower_of_transformers_is_an_option(tmp_path):
    SiglipVisionModel(SiglipVisionConfig(hidden_size=32, num_hidden_layers=1, **TOWER)).save_pretrained(tmp_path)
    arguments = {"path": str(tmp_path), "mean": [0.5] * 3, "std": [0.5] * 3}
    encoder = instantiate(OmegaConf.merge(load("encoder", "transformers"), arguments))
    assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 32)


@pytest.mark.parametrize("name", names("resampler"))
def test_a_resampler_builds(name):
    encoder = small_encoder()
    resampler = instantiate(load("resampler", name), in_dim=encoder.out_dim)
    runs(encoder, resampler, MLPProjector(in_dim=resampler.out_dim, out_dim=32), small_llm(), 64)


@pytest.mark.parametrize("name", names("projector"))
def test_a_projector_builds(name):
    encoder, llm = small_encoder(), small_llm()
    resampler = AvgPoolResampler(in_dim=encoder.out_dim, num_tokens=4)
    projector = instantiate(load("projector", name), in_dim=resampler.out_dim, out_dim=llm.dim)
    runs(encoder, resampler, projector, llm, 32)


@pytest.mark.parametrize("name", names("llm"))
def test_a_language_model_builds(name, tmp_path):
    config = load("llm", name)
    if "path" in config.keys():  # noqa: SIM118 - `in` alone is false for a mandatory value
        Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCAB, num_key_value_heads=2, **SIZES)).save_pretrained(tmp_path)
        config.path = str(tmp_path)
    llm, encoder = instantiate(config, vocab_size=VOCAB + 1), small_encoder()
    resampler = AvgPoolResampler(in_dim=encoder.out_dim, num_tokens=4)
    runs(encoder, resampler, MLPProjector(in_dim=resampler.out_dim, out_dim=llm.dim), llm, 32)


def test_the_micro_options_have_the_sizes_they_say():
    count = lambda part: sum(p.numel() for p in part.parameters())
    assert 0.35e6 < count(instantiate(load("encoder", "fastvit_micro"))) < 0.65e6
    llm = instantiate(load("llm", "llama_micro"), vocab_size=1024)
    assert 1.0e6 < count(llm) < 1.2e6
    assert llm.hf.get_input_embeddings().weight is not llm.hf.get_output_embeddings().weight
