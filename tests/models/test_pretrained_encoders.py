import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

from fastvlm.models.encoders.open_clip_encoder import OpenClipEncoder
from fastvlm.models.encoders.timm_encoder import TimmEncoder

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def small_clip(tmp_path):
    """A CLIP with random weights, known to open_clip by name, and its checkpoint."""
    import json

    (tmp_path / "small-clip.json").write_text(json.dumps(CLIP))
    open_clip.add_model_config(tmp_path / "small-clip.json")
    torch.manual_seed(0)
    clip = open_clip.create_model("small-clip").eval()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    return clip, str(tmp_path / "clip.pt")


@pytest.mark.parametrize("prefix", ["", "visual.trunk.", "model.vision_tower.timm_model."])
@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "fastvit_t8"])
def test_a_timm_checkpoint_gives_the_original_classes_features(tmp_path, name, prefix):
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=7).eval()
    state = {f"{prefix}{key}": value.clone() for key, value in theirs.state_dict().items()}
    save_file(state | ({"other.weight": torch.zeros(1)} if prefix else {}), tmp_path / "model.safetensors")
    torch.manual_seed(1)
    ours = TimmEncoder(name, checkpoint=str(tmp_path / "model.safetensors")).eval()
    size = ours.image_size or 2 * ours.stride
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features = theirs.forward_features(images)
        features = features.flatten(2).mT if features.ndim == 4 else features[:, theirs.num_prefix_tokens :]
        patches = ours(images)
    assert patches.shape == (2, ours.num_patches(size), ours.out_dim)
    torch.testing.assert_close(patches, features, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match="these are not weights of this model"):
        TimmEncoder("test_convnext", checkpoint=str(tmp_path / "vit.safetensors"))


SMALL_VIT = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8}


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("class_token", [False, True])
def test_a_clip_in_its_published_format_loads_into_timms_transformer(small_clip, layer, class_token):
    keys = {"layer": layer, "class_token": class_token}
    options = {"checkpoint": small_clip[1], "image_size": 32, **SMALL_VIT, **keys}
    ours = TimmEncoder("vit_base_patch16_clip_224", **options).eval()
    theirs = OpenClipEncoder("small-clip", pretrained=small_clip[1], **keys).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)
        last = small_clip[0].visual.forward_intermediates(images, normalize_intermediates=True, output_fmt="NLC")
    if layer == -1:  # the norm stands behind the last layer
        torch.testing.assert_close(theirs(images)[:, -16:], last["image_intermediates"][-1])
    assert ours.num_patches(32) == theirs.num_patches(32) == 16 + class_token


def test_a_dinov2_in_its_published_format_loads_and_its_registers_are_left_out(tmp_path):
    options = {"image_size": 32, **SMALL_VIT}
    theirs = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, img_size=32, **SMALL_VIT).eval()
    state = {k.replace("reg_token", "register_tokens"): v for k, v in theirs.state_dict().items()}
    # Meta's positions have a place for the class token, timm's carry it in the token itself.
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 32), state["pos_embed"]], dim=1)
    torch.save(state | {"mask_token": torch.zeros(1, 32)}, tmp_path / "dinov2.pth")
    ours = TimmEncoder("vit_small_patch14_reg4_dinov2", checkpoint=str(tmp_path / "dinov2.pth"), **options).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs.forward_features(images)[:, 5:])


def test_positions_of_a_checkpoint_are_interpolated_once_or_in_every_pass(small_clip):
    images = torch.randn(1, 3, 64, 64)
    options = {"checkpoint": small_clip[1], **SMALL_VIT}
    once = TimmEncoder("vit_base_patch16_clip_224", image_size=64, **options).eval()
    always = TimmEncoder("vit_base_patch16_clip_224", image_size=32, interpolate=True, **options).eval()
    clip = OpenClipEncoder("small-clip", pretrained=small_clip[1], interpolate=True).eval()
    fixed = OpenClipEncoder("small-clip", pretrained=small_clip[1], image_size=64).eval()
    with torch.no_grad():
        patches = [encoder(images) for encoder in (once, always, clip, fixed)]
    for other in patches[1:]:
        torch.testing.assert_close(other, patches[0], rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_other_shapes_or_with_gaps_is_refused_with_the_list(tmp_path):
    state = {k: v.clone() for k, v in timm.create_model("test_convnext", num_classes=0).state_dict().items()}
    first, second = [key for key in state if key.endswith("conv_dw.bias")][:2]
    save_file(state | {first: torch.zeros(3), second: torch.zeros(5)}, tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match=rf"2 tensors of other shapes: {first} is \(3,\) there and .*{second} is \(5,\)"
    ):
        TimmEncoder("test_convnext", checkpoint=str(tmp_path / "a.safetensors"))
    save_file({k: v for k, v in state.items() if k not in (first, second)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=rf"lacks 2 of \d+ tensors: {first}, {second}"):
        TimmEncoder("test_convnext", checkpoint=str(tmp_path / "b.safetensors"))


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "fastvit_t8", "vit_tiny_patch16_dinov3_qkvb"])
def test_nothing_of_a_timm_model_stays_that_no_patch_depends_on(name):
    small = {"depth": 2, "embed_dim": 24, "num_heads": 2} if "dinov3" in name else {}
    ours = TimmEncoder(name, **small)
    ours(torch.randn(2, 3, ours.image_size or 64, ours.image_size or 64)).square().sum().backward()
    assert [name for name, p in ours.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("layer", [-1, -2, 0])
def test_an_open_clip_checkpoint_gives_the_original_classes_features(small_clip, layer):
    clip, path = small_clip
    images = torch.randn(2, 3, 32, 32)
    ours = OpenClipEncoder("small-clip", pretrained=path, layer=layer, norm=False).eval()
    with torch.no_grad():
        theirs = clip.visual.forward_intermediates(images, output_fmt="NLC")["image_intermediates"][layer]
        patches = ours(images)
    assert patches.shape == (2, ours.num_patches(32), ours.out_dim) == (2, 16, 32)
    torch.testing.assert_close(patches, theirs)
    assert (ours.mean, ours.std) == (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)


def test_nothing_of_an_open_clip_model_stays_that_no_patch_depends_on(small_clip):
    ours = OpenClipEncoder("small-clip", pretrained=small_clip[1], layer=-2)
    ours(torch.randn(1, 3, 32, 32)).sum().backward()
    assert [name for name, p in ours.named_parameters() if p.grad is None] == []


def test_open_clip_positions_are_interpolated_to_another_image_size(small_clip):
    ours = OpenClipEncoder("small-clip", pretrained=small_clip[1], image_size=64)
    assert ours(torch.randn(1, 3, 64, 64)).shape == (1, ours.num_patches(64), 32) == (1, 64, 32)


@pytest.mark.parametrize(
    ("build", "fix"),
    [
        (lambda: TimmEncoder("resnet18", pretrained=True), "set encoder.checkpoint to a local file"),
        (lambda: TimmEncoder("no_such_model"), "set encoder.checkpoint to a local file"),
        (lambda: TimmEncoder("resnet18", checkpoint="/nowhere.pt"), "no such file; name a .safetensors"),
        (lambda: TimmEncoder("resnet18", layer=-2), "encoder.layer: resnet18 is not a plain transformer"),
        (lambda: TimmEncoder("vit_base_patch16_siglip_224", class_token=True, depth=1), "has no class token"),
        (lambda: TimmEncoder("test_vit", mean=[0.5]), "encoder.mean=.* is not three numbers"),
        (lambda: OpenClipEncoder("RN50-none"), "set encoder.pretrained to a local checkpoint file"),
    ],
)
def test_weights_that_are_not_to_be_had_are_one_line_with_the_fix(offline, build, fix):
    with pytest.raises(ValueError, match=fix) as error:
        build()
    assert "\n" not in str(error.value) and "encoder." in str(error.value)


def test_image_sizes_an_encoder_cannot_take_are_refused(small_clip):
    with pytest.raises(ValueError, match="image_size=64, but small-clip has positions for 32"):
        OpenClipEncoder("small-clip").num_patches(64)
    with torch.device("meta"):
        vit, convolutional = TimmEncoder("vit_tiny_patch16_224"), TimmEncoder("fastvit_mci3")
    with pytest.raises(ValueError, match="image_size=64, but vit_tiny_patch16_224 has positions for 224"):
        vit.num_patches(64)
    with pytest.raises(ValueError, match="image_size=100 is not a multiple of the 64 pixels of fastvit_mci3"):
        convolutional.num_patches(100)


def test_a_layer_that_is_not_there_is_refused(small_clip):
    with pytest.raises(ValueError, match="encoder.layer=3, but small-clip has 3 layers: -3 to 2"):
        OpenClipEncoder("small-clip", layer=3)
