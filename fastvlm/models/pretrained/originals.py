"""Load checkpoints in the formats of github.com/haotian-liu/LLaVA and github.com/apple/ml-fastvlm as stock classes.

Their config.json names a `mm_vision_tower`. Their weights are those of the language model, `model.mm_projector`, and
sometimes `model.vision_tower` and `model.image_newline`. Their vocabulary lacks the image token, which gets the first
id after it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import timm
import torch
import transformers as hf
from safetensors.torch import load_file
from timm.models.fastvit import checkpoint_filter_fn
from torch import Tensor, nn

from fastvlm.models.hub import fetch
from fastvlm.models.pretrained.misfits import refuse_misfits, refuse_state

IMAGE_TOKEN = "<image>"
# ml-fastvlm's mm_vision_tower without the size at its end -> timm model
MOBILECLIP = {"mobileclip_l": "fastvit_mci3"}
TEXTS = {
    "llava_qwen2": "qwen2",
    "llava_llama": "llama",
    "llava": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
}


def original_config(path: str) -> dict[str, Any] | None:
    """Return the config.json of an original checkpoint in a folder; None if there is no such checkpoint."""
    file = Path(path) / "config.json"
    if not file.exists():
        return None
    config = json.loads(file.read_text())
    return config if "mm_vision_tower" in config and "vision_config" not in config else None


def load_original(path: str, *, vision_tower: str | None = None, dtype: str = "float32") -> hf.PreTrainedModel:
    """Load a checkpoint as FastVlm (FastViTHD tower), LlavaNext (with a newline vector) or Llava.

    Args:
        vision_tower: folder or hub id of the CLIP, if the checkpoint lacks its tower (LLaVA-1.5); None: the name in the
            checkpoint's configuration.

    Raises:
        ValueError: no such checkpoint, an unsupported kind, or weights that are missing or of other shapes.
    """
    config = original_config(path)
    if config is None:
        raise ValueError(f"{path} holds no LLaVA or ml-fastvlm checkpoint: its config.json names no mm_vision_tower")
    if config["model_type"] not in TEXTS:
        raise ValueError(f"{path} holds a {config['model_type']}; known are {', '.join(TEXTS)}")
    kind = config.get("mm_projector_type", "linear")
    if kind != "mlp2x_gelu":
        raise ValueError(f"{path} has mm_projector_type={kind}; transformers' classes have mlp2x_gelu")
    state = read_weights(Path(path))
    tokenizer = tokenizer_of(path)
    config["image_token"] = tokenizer.image_token_id
    text = text_config(config, rows=len(tokenizer))
    tower = str(config["mm_vision_tower"])
    if tower.split("/")[-1].startswith("mobileclip"):
        stock, wanted = fast_vlm(config, text, state, tower=tower.split("/")[-1])
    else:
        stock, wanted = llava(config, text, state, tower=vision_tower or tower, given=vision_tower is not None)
    wanted |= language(state, rows=text.vocab_size)
    refuse_state(stock, wanted, what=path)
    stock.load_state_dict(wanted, strict=False)
    stock.tie_weights()
    return stock.to(getattr(torch, dtype)).eval()


def read_weights(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"{folder} holds neither *.safetensors nor pytorch_model*.bin")
    state: dict[str, Tensor] = {}
    for file in files:
        state |= load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    return {name: value.float() for name, value in state.items()}


def tokenizer_of(path: str):
    tokenizer = fetch(
        lambda: hf.AutoTokenizer.from_pretrained(path), what=f"vlm.path={path}", mend="it needs its tokenizer's files"
    )
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    tokenizer.image_token = IMAGE_TOKEN
    tokenizer.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return tokenizer


def text_config(config: dict[str, Any], *, rows: int) -> hf.PreTrainedConfig:
    """Return the language model's configuration, with a vocabulary of at least `rows` ids."""
    kind = TEXTS[config["model_type"]]
    known = hf.AutoConfig.for_model(kind)
    given = {key: value for key, value in config.items() if hasattr(known, key) and key not in ("model_type", "dtype")}
    for key in ("transformers_version", "architectures", "torch_dtype", "auto_map", "_name_or_path"):
        given.pop(key, None)
    if "rope_theta" in config:
        given["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    given["vocab_size"] = max(rows, config["vocab_size"])
    return hf.AutoConfig.for_model(kind, **given)


def language(state: dict[str, Tensor], *, rows: int) -> dict[str, Tensor]:
    """Return the language model's weights, filling missing vocabulary rows with the mean of the existing ones."""
    out = {}
    for name, value in state.items():
        if name.startswith(("model.layers.", "model.norm.", "model.embed_tokens.")) and "rotary_emb" not in name:
            out["model.language_model." + name.removeprefix("model.")] = value
    out["lm_head.weight"] = state.get("lm_head.weight", state.get("model.embed_tokens.weight"))
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        if (value := out.get(name)) is not None and len(value) < rows:
            out[name] = torch.cat([value, value.mean(dim=0, keepdim=True).expand(rows - len(value), -1)])
    return {name: value for name, value in out.items() if value is not None}


def projector(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"0": "linear_1", "2": "linear_2"}
    found = {}
    for name, value in state.items():
        if match := re.fullmatch(r"model\.mm_projector\.(\d+)\.(weight|bias)", name):
            found[f"model.multi_modal_projector.{names.get(match[1], match[1])}.{match[2]}"] = value
    return found


def fast_vlm(config: dict, text: hf.PreTrainedConfig, state: dict[str, Tensor], *, tower: str):
    name, _, _ = tower.rpartition("_")
    if name not in MOBILECLIP:
        raise ValueError(f"mm_vision_tower={tower} is not one of {', '.join(MOBILECLIP)} with its size behind it")
    prefix = "model.vision_tower.vision_tower.model."
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    folded = "patch_embed.0.reparam_conv.weight" in own
    trunk = timm.create_model(MOBILECLIP[name], num_classes=0, inference_mode=folded)
    vision = hf.TimmWrapperConfig(
        architecture=MOBILECLIP[name], do_pooling=True, model_args={"inference_mode": True} if folded else {}
    )
    vision.hidden_size = trunk.num_features
    vlm = hf.FastVlmConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=config["image_token"],
        image_seq_length=int(tower.rpartition("_")[2]) ** 2 // trunk.feature_info[-1]["reduction"] ** 2,
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )
    stock = hf.FastVlmForConditionalGeneration(vlm)
    vision_state = {f"model.vision_tower.timm_model.{k}": v for k, v in to_timm(own, trunk).items()}
    return stock, vision_state | projector(state)


def to_timm(state: dict[str, Tensor], trunk: nn.Module) -> dict[str, Tensor]:
    """Rename Apple's FastViT weights to timm's names, including folded models, which timm's conversion lacks."""
    state = {name.replace("lkb_reparam", "reparam_conv"): value for name, value in state.items()}
    state = {name: value for name, value in state.items() if not name.startswith("head.")}
    # Folding drops the name of a position encoding: it is network.<i>.reparam_conv.
    encodings = sorted({int(m[1]) for n in state if (m := re.match(r"network\.(\d+)\.reparam_conv\.", n))})
    moved = {re.sub(r"^(network\.\d+)\.reparam_conv\.", r"\1.pe.reparam_conv.", n): v for n, v in state.items()}
    out = {}
    for name, value in checkpoint_filter_fn(moved, trunk).items():
        out[name.replace("pos_emb.pos_enc.reparam_conv", "pos_emb.reparam_conv") if encodings else name] = value
    return out


def llava(config: dict, text: hf.PreTrainedConfig, state: dict[str, Tensor], *, tower: str, given: bool):
    prefix = "model.vision_tower.vision_tower."
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    own = {key.removeprefix("vision_model."): value for key, value in own.items()}
    own = {key: value for key, value in own.items() if not key.endswith("position_ids")}
    mend = "the checkpoint was trained on that tower and does not hold it: set vlm.vision_tower=<folder of that CLIP>"
    if own and not given and not Path(tower).is_dir():
        # The checkpoint has the tower's weights, so its sizes can be read from them without the CLIP.
        vision = clip_sizes(own)
    else:
        clip, told = fetch(
            lambda: hf.CLIPVisionModel.from_pretrained(tower, output_loading_info=True),
            what=f"mm_vision_tower={tower}",
            mend=mend,
        )
        if not own:
            refuse_misfits(told, f"mm_vision_tower={tower}")
        vision, own = clip.config, own or clip.state_dict()
    newline = state.get("model.image_newline")
    patches_only = config.get("mm_vision_select_feature", "patch") == "patch"
    common = dict(
        vision_config=vision,
        text_config=text,
        image_token_id=config["image_token"],
        vision_feature_layer=config.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="default" if patches_only else "full",
        projector_hidden_act="gelu",
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )
    side = vision.image_size
    wanted = {f"model.vision_tower.{name}": value for name, value in own.items()} | projector(state)
    if newline is not None:
        grids = config.get("image_grid_pinpoints") or [
            [side, 2 * side],
            [2 * side, side],
            [2 * side, 2 * side],
            [3 * side, side],
            [side, 3 * side],
        ]
        # LLaVA stores (width, height), transformers (height, width).
        grids = [[height, width] for width, height in grids] if config.get("image_grid_pinpoints") else grids
        stock = hf.LlavaNextForConditionalGeneration(hf.LlavaNextConfig(image_grid_pinpoints=grids, **common))
        return stock, wanted | {"model.image_newline": newline}
    tokens = (side // vision.patch_size) ** 2
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(image_seq_length=tokens, **common)), wanted


def clip_sizes(state: dict[str, Tensor]) -> hf.CLIPVisionConfig:
    """Infer the configuration of an OpenAI CLIP tower, whose heads are 64 wide, from the shapes of its weights."""
    patch = state["embeddings.patch_embedding.weight"]
    side = int((len(state["embeddings.position_embedding.weight"]) - 1) ** 0.5)
    layers = {int(m[1]) for name in state if (m := re.match(r"encoder\.layers\.(\d+)\.", name))}
    width = patch.shape[0]
    return hf.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len(layers),
        num_attention_heads=max(1, width // 64),
        image_size=side * patch.shape[-1],
        patch_size=patch.shape[-1],
        projection_dim=width,
        hidden_act="quick_gelu",
    )


def processor_of(config: hf.PreTrainedConfig, path: str) -> hf.ProcessorMixin:
    """Return the processor for `load_original`'s model, which preprocesses like the original (`image_aspect_ratio`)."""
    tokenizer = tokenizer_of(path)
    raw = original_config(path) or {}
    pad = raw.get("image_aspect_ratio") == "pad"
    if config.model_type == "fast_vlm":
        size = int(str(raw["mm_vision_tower"]).rpartition("_")[2])
        mean, std, patch, strategy, extra = [0.0] * 3, [1.0] * 3, None, "full", 0
    else:
        size = config.vision_config.image_size
        mean, std = hf.image_utils.OPENAI_CLIP_MEAN, hf.image_utils.OPENAI_CLIP_STD
        patch, strategy, extra = config.vision_config.patch_size, config.vision_feature_select_strategy, 1
    square = {"height": size, "width": size}
    common = dict(image_mean=list(mean), image_std=list(std))
    rest = dict(tokenizer=tokenizer, image_token=IMAGE_TOKEN, chat_template=tokenizer.chat_template)
    if config.model_type == "llava_next":
        images = hf.LlavaNextImageProcessor(
            size={"shortest_edge": size}, crop_size=square, image_grid_pinpoints=config.image_grid_pinpoints, **common
        )
        cls = hf.LlavaNextProcessor
    else:
        kind = hf.LlavaImageProcessor if pad else hf.CLIPImageProcessor
        more = {"do_pad": True} if pad else {}
        images, cls = kind(size={"shortest_edge": size}, crop_size=square, **common, **more), hf.LlavaProcessor
    if patch is None:
        patch = size // int(config.image_seq_length**0.5)
    return cls(
        image_processor=images,
        patch_size=patch,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=extra,
        **rest,
    )
