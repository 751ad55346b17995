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
        (lambda: TimmEncoder("resnet18", checkpoint="/nowhere.pt"), "name a .safetensors or .pt file"),
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
