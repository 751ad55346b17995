"""Every vision tower of transformers: the original class saves, ours loads, the features are the same."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from fastvlm.models.encoders.transformers_encoder import from_config, from_pretrained

SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
WIDE = SIZE | {"intermediate_size": 48}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
TOWERS = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**WIDE)),
    "clip with text": lambda: CLIPModel(CLIPConfig(vision_config=WIDE, text_config=TEXT)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**WIDE)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(mlp_ratio=2, **SIZE)),
    "dinov2 with registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(mlp_ratio=2, **SIZE)),
    "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(num_register_tokens=4, **WIDE)),
    "vit": lambda: ViTModel(ViTConfig(**WIDE)),
}


@pytest.fixture(scope="module", params=TOWERS)
def saved(request, tmp_path_factory):
    """The original tower and the folder it was saved to."""
    torch.manual_seed(0)
    model = TOWERS[request.param]().eval()
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    model.save_pretrained(folder)
    return getattr(model, "vision_model", model), str(folder)


@pytest.mark.parametrize("layer", [-1, -2, 0])
def test_a_layer_is_the_original_classes_hidden_state(saved, layer):
    tower, folder = saved
    images = torch.randn(2, 3, 32, 32)
    ours = from_pretrained(folder, layer=layer, norm=False, **HALF).eval()
    with torch.no_grad():
        theirs = tower(images, output_hidden_states=True).hidden_states[layer if layer < 0 else layer + 1]
        patches = ours(images)
    assert patches.shape == (2, ours.num_patches(32), ours.out_dim) == (2, 16, 32)
    torch.testing.assert_close(patches, theirs[:, -16:], rtol=1e-5, atol=1e-5)


def test_the_norm_stands_behind_the_last_layer_only_and_the_class_token_in_front(saved):
    tower, folder = saved
    images = torch.randn(2, 3, 32, 32)
    final = next(getattr(tower, n) for n in ("post_layernorm", "layernorm", "norm") if hasattr(tower, n))
    with torch.no_grad():
        states = tower(images, output_hidden_states=True).hidden_states
        theirs = final(states[-1])
        torch.testing.assert_close(from_pretrained(folder, **HALF).eval()(images), theirs[:, -16:])
        if theirs.shape[1] == 16:
            with pytest.raises(ValueError, match="class_token=true, but siglip_vision_model has no class token"):
                from_pretrained(folder, class_token=True, **HALF)
            return
        ours = from_pretrained(folder, class_token=True, layer=-2, **HALF).eval()
        assert ours.num_patches(32) == 17 and ours.grid(32) == (4, 4)
        torch.testing.assert_close(ours(images), torch.cat([states[-2][:, :1], states[-2][:, -16:]], dim=1))


def test_positions_are_interpolated_as_the_library_does_and_only_when_asked(saved):
    tower, folder = saved
    images = torch.randn(1, 3, 48, 48)
    asks = type(tower).__name__ in ("CLIPVisionModel", "SiglipVisionModel", "ViTModel")
    with torch.no_grad():
        theirs = tower(images, **({"interpolate_pos_encoding": True} if asks else {}), output_hidden_states=True)
        for key in ({"interpolate": True}, {"image_size": 48}):
            patches = from_pretrained(folder, layer=-2, **key, **HALF).eval()(images)
            torch.testing.assert_close(patches, theirs.hidden_states[-2][:, -36:])
    with pytest.raises(ValueError, match="image_size=48, but .* has positions for 32; set encoder.image_size=48"):
        from_pretrained(folder, **HALF)(images)


def test_no_parameter_stays_that_no_patch_depends_on(saved):
    ours = from_pretrained(saved[1], layer=-2, **HALF)
    ours(torch.randn(1, 3, 32, 32)).sum().backward()
    assert [name for name, p in ours.named_parameters() if p.grad is None] == []


def test_gradient_checkpointing_changes_no_gradient(saved):
    images, grads = torch.randn(1, 3, 32, 32), []
    for recompute in (False, True):
        ours = from_pretrained(saved[1], gradient_checkpointing=recompute, **HALF).train()
        torch.manual_seed(0)  # DINOv3 stretches its positions at random
        ours(images).square().sum().backward()
        grads.append([p.grad for p in ours.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


def test_statistics_come_from_the_checkpoints_processor_or_must_be_given(tmp_path):
    TOWERS["clip"]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not say how its images were normalised; set encoder.mean"):
        from_pretrained(str(tmp_path))
    stated = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    ours = from_pretrained(str(tmp_path))
    assert (ours.mean, ours.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert from_pretrained(str(tmp_path), **HALF).mean == (0.5, 0.5, 0.5)


def test_a_checkpoint_that_lacks_tensors_or_has_other_shapes_is_refused_with_the_list(tmp_path):
    TOWERS["siglip"]().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    key = next(k for k in state if k.endswith("layers.1.mlp.fc1.bias"))
    save_file({k: v for k, v in state.items() if k != key}, file, {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 1 of \d+ tensors: encoder.layers.1.mlp.fc1.bias; they would be random"
    ):
        from_pretrained(str(tmp_path), **HALF)
    assert from_pretrained(str(tmp_path), layer=0, **HALF).out_dim == 32  # layers that are not used may be missing
    save_file(state | {key: torch.zeros(7)}, file, {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"other shapes: encoder.layers.1.mlp.fc1.bias is \(7,\) there and \(48,\) here"
    ):
        from_pretrained(str(tmp_path), **HALF)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: from_config("clip_vision", config={}, **HALF), "encoder.model_type=clip_vision is not a model type"),
        (
            lambda: from_config("dinov2", config={"hiden_size": 8}, **HALF),
            "hiden_size is not .*did you mean hidden_size",
        ),
        (lambda: from_config("dinov2", config=SIZE | {"mlp_ratio": 2}, mean=[0.5], std=[1.0] * 3), "not three numbers"),
        (
            lambda: from_config("dinov2", config=SIZE | {"mlp_ratio": 2}, layer=3, **HALF),
            "dinov2 has 3 layers: -3 to 2",
        ),
        (lambda: from_config("convnext", config={}, **HALF), "not a plain vision transformer .* use encoder=timm"),
    ],
)
def test_a_wrong_key_is_one_line_with_the_fix(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_an_id_that_cannot_be_fetched_is_one_line_with_the_offline_alternatives(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="encoder.path=nobody/nothing: .*name a folder .*encoder=clip_micro") as error:
        from_pretrained("nobody/nothing")
    assert "\n" not in str(error.value)
