"""Checkpoints in the layout of LLaVA and ml-fastvlm become our parts with the weights they hold."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import timm
import torch
from part_options import relative_error
from safetensors.torch import load_file, save_file
from tiny_checkpoints import SIDE, clip_vision, text_config, tiny_tokenizer
from transformers import AutoProcessor, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from fastvlm.deployment.hub import main as hub
from fastvlm.deployment.hub import save_pretrained_vlm
from fastvlm.models.pretrained import from_pretrained, originals
from fastvlm.models.pretrained.views import views_at
from fastvlm.tokens import OWN

NEXT_GRIDS = [[2 * SIDE, SIDE], [SIDE, 2 * SIDE]]  # LLaVA writes (width, height)


def apple_names(trunk) -> dict[str, torch.Tensor]:
    """A timm FastViT's weights under the names that ml-fastvlm's own code gives them, one flat list of layers."""
    network, count = {}, 0
    for stage, module in enumerate(trunk.stages):
        for part in ("downsample", "pos_emb"):
            if sum(1 for _ in getattr(module, part).parameters()):
                network[stage, part], count = count, count + 1
        network[stage, "blocks"], count = count, count + 1
    out = {}
    for name, value in trunk.state_dict().items():
        if name.startswith("head."):
            continue
        if match := re.match(r"stages\.(\d+)\.(downsample|pos_emb|blocks)\.(.*)", name):
            stage, part, rest = int(match[1]), match[2], match[3]
            rest = rest.replace("pos_enc", "pe") if part == "pos_emb" else rest
            name = f"network.{network[stage, part]}.{rest}"
        for ours, theirs in (
            ("stem.", "patch_embed."),
            ("conv_kxk", "rbr_conv"),
            ("conv_scale", "rbr_scale"),
            (".identity.", ".rbr_skip."),
            ("final_conv", "conv_exp"),
            ("large_conv", "lkb_origin"),
            (".mlp.", ".convffn."),
            ("se.fc1", "se.reduce"),
            ("se.fc2", "se.expand"),
        ):
            name = name.replace(ours, theirs)
        out[re.sub(r"layer_scale(_\d)?\.gamma", r"layer_scale\1", name)] = value
    return out


def write(folder, config: dict, state: dict, tokenizer) -> str:
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous().clone() for name, value in state.items()}, folder / "model.safetensors")
    return str(folder)


def language(cls, config):
    torch.manual_seed(0)
    llm = cls(config).eval()
    return llm, {name: value for name, value in llm.state_dict().items() if "rotary" not in name}


def mm_projector(in_dim: int, out_dim: int) -> tuple[torch.nn.Sequential, dict]:
    torch.manual_seed(1)
    layers = torch.nn.Sequential(torch.nn.Linear(in_dim, out_dim), torch.nn.GELU(), torch.nn.Linear(out_dim, out_dim))
    return layers, {f"model.mm_projector.{name}": value for name, value in layers.state_dict().items()}


def plain_tokenizer():
    """Without an image token, as LLaVA's are."""
    tokenizer = tiny_tokenizer(image="<spare>")
    del tokenizer.image_token, tokenizer.image_token_id
    return tokenizer


@pytest.fixture(scope="module")
def fastvlm_checkpoint(tmp_path_factory):
    tokenizer = plain_tokenizer()
    llm, state = language(Qwen2ForCausalLM, text_config(Qwen2Config, tokenizer))
    torch.manual_seed(2)
    trunk = timm.create_model("fastvit_t8", num_classes=0).eval()
    layers, projector = mm_projector(768, 32)
    tower = {f"model.vision_tower.vision_tower.model.{name}": value for name, value in apple_names(trunk).items()}
    config = llm.config.to_dict() | {
        "model_type": "llava_qwen2",
        "architectures": ["LlavaQwen2ForCausalLM"],
        "mm_vision_tower": "mobileclip_l_64",
        "mm_hidden_size": 768,
        "mm_projector_type": "mlp2x_gelu",
        "image_aspect_ratio": "pad",
    }
    folder = write(tmp_path_factory.mktemp("ml") / "fastvlm", config, state | projector | tower, tokenizer)
    return folder, llm, trunk, layers


@pytest.fixture
def small_tower(monkeypatch):
    monkeypatch.setitem(originals.MOBILECLIP, "mobileclip_l", "fastvit_t8")


def test_an_ml_fastvlm_checkpoint_becomes_our_parts(fastvlm_checkpoint, small_tower):
    folder, llm, trunk, layers = fastvlm_checkpoint
    model = from_pretrained(folder)
    assert model.config.model_type == "fast_vlm" and model.encoder.mean == (0.0, 0.0, 0.0)
    views = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        patches = trunk.forward_features(views / 255).flatten(2).transpose(1, 2)
        assert relative_error(model.encode_images(views), layers(patches)) <= 1e-5
        ids = torch.randint(6, 200, (1, 9))
        positions, ones = torch.arange(9)[None], torch.ones_like(ids)
        ours = model.llm.head(model.llm.hidden(model.llm.embed(ids), positions, ones))
        assert relative_error(ours[..., : llm.config.vocab_size], llm(ids).logits) <= 1e-5
    assert model.image_token_id == len(plain_tokenizer()) and model.llm.vocab_size > model.image_token_id
    views = views_at(folder)
    assert (views.image_size, views.image) == (64, {"fit": "pad", "padding": [0, 0, 0]})


def test_the_import_command_writes_a_folder_of_the_stock_class_with_the_same_logits(
    fastvlm_checkpoint, small_tower, tmp_path, capsys
):
    folder = fastvlm_checkpoint[0]
    hub(["import=" + folder, f"out={tmp_path / 'imported'}"])
    said = capsys.readouterr().out
    assert "imported: FastVlmForConditionalGeneration" in said and "yes  transformers" in said
    assert views_at(str(tmp_path / "imported")) == replace(views_at(folder), mean=(0.0,) * 3, std=(1.0,) * 3)
    ours, again = from_pretrained(folder), from_pretrained(str(tmp_path / "imported"))
    views, ids = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), torch.randint(6, 200, (1, 9))
    with torch.no_grad():
        assert relative_error(again.encode_images(views), ours.encode_images(views)) <= 1e-5
        positions, ones = torch.arange(9)[None], torch.ones_like(ids)
        logits = [m.llm.head(m.llm.hidden(m.llm.embed(ids), positions, ones)) for m in (again, ours)]
    assert relative_error(*logits) <= 1e-5


def test_what_a_checkpoint_lacks_is_listed(fastvlm_checkpoint):
    folder = fastvlm_checkpoint[0]  # its tower is a small one, under the large one's name
    with pytest.raises(ValueError, match=r"weights do not fit its config.json: .* is .* here"):
        from_pretrained(folder)


@pytest.mark.parametrize("unpad", [False, True])
def test_an_original_llava_becomes_our_parts(unpad, tmp_path):
    tokenizer = plain_tokenizer()
    llm, state = language(LlamaForCausalLM, text_config(LlamaConfig, tokenizer))
    torch.manual_seed(2)
    clip = CLIPVisionModel(clip_vision(hidden_act="quick_gelu")).eval()
    clip.save_pretrained(tmp_path / f"clip-vit-{SIDE}")
    layers, projector = mm_projector(24, 32)
    config = llm.config.to_dict() | {
        "model_type": "llava_llama",
        "mm_vision_tower": f"openai/clip-vit-{SIDE}",
        "mm_hidden_size": 24,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "anyres" if unpad else "pad",
    }
    if unpad:  # LLaVA-1.6 holds its tower, and a vector for line ends
        config |= {"mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": NEXT_GRIDS}
        state["model.image_newline"] = torch.randn(32)
        names = clip.state_dict().items()
        state |= {f"model.vision_tower.vision_tower.vision_model.{name}": value for name, value in names}
    folder = write(tmp_path / "llava", config, state | projector, tokenizer)
    model = from_pretrained(folder, vision_tower=str(tmp_path / f"clip-vit-{SIDE}"))
    assert model.config.model_type == ("llava_next" if unpad else "llava")
    views = torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
    with torch.no_grad():
        hidden = clip(model.normalise(views), output_hidden_states=True).hidden_states[-2][:, 1:]
        tokens = layers(hidden)
        assert relative_error(model.encode_images(views), tokens) <= 1e-5
        if unpad:
            sequence = model.arrange(tokens, torch.tensor([[1, 2, 28, 56]])).flatten(0, 1)
            newline = state["model.image_newline"]
            expected = torch.cat([tokens[0], *(torch.cat([*tokens[1:, r], newline[None]]) for r in rows_of(4))])
            assert torch.equal(sequence[-len(expected) :], expected) and not sequence[: -len(expected)].any()
    hub([f"import={folder}", f"out={tmp_path / 'out'}", f"vision_tower={tmp_path / f'clip-vit-{SIDE}'}"])
    again = from_pretrained(str(tmp_path / "out"))
    with torch.no_grad():
        assert relative_error(again.encode_images(views), tokens) <= 1e-5
    views = views_at(folder)
    assert views.image_size == SIDE
    assert views.image.get("tiles") == ([[1, 2], [2, 1]] if unpad else None)
    assert views.image["padding"] == ([0, 0, 0] if unpad else [122, 116, 104])
    if not unpad:
        assert views_at(str(tmp_path / "out")).image == views.image


def rows_of(side: int):
    return [slice(r * side, (r + 1) * side) for r in range(side)]


def test_a_tower_without_all_its_weights_is_refused(tmp_path):
    tokenizer = plain_tokenizer()
    llm, state = language(LlamaForCausalLM, text_config(LlamaConfig, tokenizer))
    tower = tmp_path / "clip"
    CLIPVisionModel(clip_vision(hidden_act="quick_gelu")).save_pretrained(tower)
    weights = load_file(tower / "model.safetensors")
    gone = next(name for name in weights if "fc1.weight" in name)
    save_file({k: v for k, v in weights.items() if k != gone}, tower / "model.safetensors", metadata={"format": "pt"})
    config = llm.config.to_dict() | {
        "model_type": "llava_llama",
        "mm_vision_tower": "openai/clip",
        "mm_projector_type": "mlp2x_gelu",
    }
    folder = write(tmp_path / "llava", config, state | mm_projector(24, 32)[1], tokenizer)
    with pytest.raises(ValueError, match=f"mm_vision_tower={tower}.*fc1.weight is missing"):
        from_pretrained(folder, vision_tower=str(tower))


def test_a_fine_tuned_original_is_saved_with_a_processor(tmp_path):
    tokenizer = plain_tokenizer()
    llm, state = language(LlamaForCausalLM, text_config(LlamaConfig, tokenizer))
    tower = tmp_path / f"clip-vit-{SIDE}"
    CLIPVisionModel(clip_vision(hidden_act="quick_gelu")).save_pretrained(tower)
    config = llm.config.to_dict() | {
        "model_type": "llava_llama",
        "mm_vision_tower": f"openai/clip-vit-{SIDE}",
        "mm_projector_type": "mlp2x_gelu",
    }
    folder = write(tmp_path / "llava", config, state | mm_projector(24, 32)[1], tokenizer)
    model = from_pretrained(folder, vision_tower=str(tower))
    out = tmp_path / "out"
    out.mkdir()
    own = SimpleNamespace(template=SimpleNamespace(name=OWN))
    assert save_pretrained_vlm(model, own, {"vlm": {"path": folder}}, out) == "LlavaForConditionalGeneration"
    assert AutoProcessor.from_pretrained(out).image_processor.size
    from_pretrained(str(out))


def test_a_llava_without_its_tower_names_the_key(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    tokenizer = plain_tokenizer()
    llm, state = language(LlamaForCausalLM, text_config(LlamaConfig, tokenizer))
    config = llm.config.to_dict() | {
        "model_type": "llava_llama",
        "mm_vision_tower": "openai/nothing-336",
        "mm_projector_type": "mlp2x_gelu",
    }
    folder = write(tmp_path / "llava", config, state | mm_projector(24, 32)[1], tokenizer)
    with pytest.raises(ValueError, match="mm_vision_tower=openai/nothing-336: .*set vlm.vision_tower=<folder"):
        from_pretrained(folder)
