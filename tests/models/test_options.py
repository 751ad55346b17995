"""Every file of conf/{encoder,resampler,projector,llm} builds a part that fits small neighbours."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from small_parts import IMAGE_ID, SIZES, VOCAB, make_batch, random_ids, small_encoder, small_llm
from transformers import Qwen2Config, Qwen2ForCausalLM

from fastvlm.models.projectors.mlp import MLPProjector
from fastvlm.models.resamplers.avgpool import AvgPoolResampler
from fastvlm.models.vlm import VLM

CONF = Path(__file__).parents[2] / "conf"
# Full-size encoders are built without memory for their weights; what needs the hub gets none.
META = {
    "fastvithd": ({"checkpoint": None}, {}, 1024, 256, 3072),
    "clip_vit_l14_336": ({"pretrained": None}, {"device": "meta"}, 336, 576, 1024),
    "timm": ({"name": "vit_base_patch16_224", "pretrained": False}, {}, 224, 196, 768),
}
MICRO = {"fastvit_micro": (64, 64, 128)}
names = lambda group: sorted(path.stem for path in (CONF / group).glob("*.yaml"))
load = lambda group, name: OmegaConf.load(CONF / group / f"{name}.yaml")


def runs(encoder, resampler, projector, llm, image_size):
    model = VLM(encoder, resampler, projector, llm, image_token_id=IMAGE_ID)
    slots = [IMAGE_ID] * model.num_visual_tokens(image_size)
    batch = make_batch([[slots + random_ids(3)[0]]], images=1, image_size=image_size)
    model(batch).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", names("encoder"))
def test_an_encoder_builds_and_reports_its_sizes(name):
    if name in META:
        overrides, arguments, size, patches, width = META[name]
        with torch.device("meta"):
            encoder = instantiate(OmegaConf.merge(load("encoder", name), overrides), **arguments)
            out = encoder(torch.zeros(1, 3, size, size))
    else:
        size, patches, width = MICRO[name]
        encoder = instantiate(load("encoder", name))
        out = encoder(torch.zeros(1, 3, size, size))
        resampler = AvgPoolResampler(in_dim=encoder.out_dim, num_tokens=4)
        runs(encoder, resampler, MLPProjector(in_dim=resampler.out_dim, out_dim=32), small_llm(), size)
    assert out.shape == (1, patches, width) == (1, encoder.num_patches(size), encoder.out_dim)
    assert len(encoder.mean) == len(encoder.std) == 3


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
