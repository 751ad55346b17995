"""Load a pretrained vision-language model as the four parts of `VLM`, by the `model_type` of its configuration."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from fastvlm.models.hub import fetch
from fastvlm.models.llms.language_model import LanguageModel
from fastvlm.models.pretrained.connectors import BlockResampler, Connector, MergerConnector, Separated, SpatialUnpad
from fastvlm.models.pretrained.language import DecoderWithHead, MRoPELanguageModel, PrefixLanguageModel, with_head
from fastvlm.models.pretrained.misfits import refuse_misfits
from fastvlm.models.pretrained.originals import load_original, original_config
from fastvlm.models.pretrained.towers import LayerTower, Qwen2VLTower, WholeTower
from fastvlm.models.pretrained.views import read_views
from fastvlm.models.pretrained.whole import PretrainedVLM
from fastvlm.models.resamplers.identity import IdentityResampler
from fastvlm.models.resamplers.pixel_shuffle import PixelShuffleResampler

OFFLINE = "name a folder with config.json, its weights and its processor's files, or a hub id while online"


def from_pretrained(
    path: str,
    *,
    model_type: str | None = None,
    vision_tower: str | None = None,
    vocab_size: int | None = None,
    attention: str = "auto",
    gradient_checkpointing: bool = False,
    dtype: str = "float32",
) -> PretrainedVLM:
    """Load a pretrained vision-language model.

    Args:
        path: a folder that `save_pretrained` wrote, a folder with an original LLaVA or ml-fastvlm checkpoint, or a hub
            id.
        model_type: the required `model_type`; None: any of `FAMILIES`.
        vision_tower: folder or hub id of the CLIP for an original LLaVA checkpoint without it (LLaVA-1.5).
        vocab_size: the tokenizer's length; the embedding is enlarged if a template adds tokens.
        attention: as in `LanguageModel`.
        gradient_checkpointing: recompute the language model's layers in the backward pass.
        dtype: dtype of the weights in memory; with float32, mixed precision trains float32 master weights.

    Raises:
        ValueError: no model there, another or an unsupported `model_type`, or weights that are missing or of other
            shapes.
    """
    if original_config(path) is not None:
        hf = grown(load_original(path, vision_tower=vision_tower, dtype=dtype), vocab_size)
        model = take_apart(hf, path=path, attention=attention)
        return checkpointed(model, gradient_checkpointing).eval()
    known_config(path, model_type=model_type)
    hf, told = fetch(
        lambda: AutoModelForImageTextToText.from_pretrained(
            path, dtype=getattr(torch, dtype), output_loading_info=True, ignore_mismatched_sizes=True
        ),
        what=f"vlm.path={path}",
        mend=OFFLINE,
    )
    refuse_misfits(told, f"vlm.path={path}")
    model = take_apart(grown(hf, vocab_size), path=path, attention=attention)
    return checkpointed(model, gradient_checkpointing).eval()


def known_config(path: str, *, model_type: str | None = None) -> PreTrainedConfig:
    """Load a model's configuration and check its `model_type`.

    Raises:
        ValueError: no model there, or another or an unsupported `model_type`.
    """
    config = fetch(lambda: AutoConfig.from_pretrained(path), what=f"vlm.path={path}", mend=OFFLINE)
    if model_type not in (None, config.model_type):
        raise ValueError(
            f"vlm.path={path} holds a {config.model_type}, not a {model_type}; use vlm={option_for(config.model_type)}"
        )
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"vlm.path={path} holds a {config.model_type}; known are {', '.join(FAMILIES)}. A language model alone is "
            "llm=pretrained, a vision tower alone encoder=timm or an open_clip encoder"
        )
    return config


def without_weights(
    path: str,
    *,
    model_type: str | None = None,
    attention: str = "auto",
    gradient_checkpointing: bool = False,
    dtype: str = "float32",
    **others: object,
) -> PretrainedVLM:
    """Build the model of `from_pretrained` on the meta device, from its configuration alone.

    Original LLaVA and ml-fastvlm checkpoints are loaded and then moved to the meta device.

    Raises:
        ValueError: as `from_pretrained`, except for errors of the weights.
    """
    if original_config(path) is not None:
        return from_pretrained(path, attention=attention, dtype=dtype, **others).to("meta")
    config = known_config(path, model_type=model_type)
    with torch.device("meta"):
        hf = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype))
    return checkpointed(take_apart(hf, path=path, attention=attention), gradient_checkpointing).to("meta").eval()


def grown(hf: PreTrainedModel, vocab_size: int | None) -> PreTrainedModel:
    if vocab_size is not None and vocab_size > hf.get_input_embeddings().weight.shape[0]:
        hf.resize_token_embeddings(vocab_size)
    return hf


def checkpointed(model: PretrainedVLM, wanted: bool) -> PretrainedVLM:
    if wanted:
        model.llm.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def take_apart(hf: PreTrainedModel, *, path: str, attention: str = "auto") -> PretrainedVLM:
    """Split a model of one of the `FAMILIES` into parts, which reuse its modules without copying.

    Args:
        path: folder or hub id with its processor's files.
    """
    return FAMILIES[hf.config.model_type](hf, path, attention)


def option_for(model_type: str) -> str:
    options = {"llava": "llava_1_5", "llava_next": "llava_1_6", "fast_vlm": "fastvlm"}
    return options.get(model_type, model_type if model_type in FAMILIES else "auto")


# ----------------------------------------------------------------------------------------------------------- families


def tower_of(hf: PreTrainedModel, path: str, **options) -> nn.Module:
    """Return the encoder for a LLaVA-style model's vision tower: CLIP, SigLIP or a timm model."""
    config, tower, views = hf.config, hf.model.vision_tower, read_views(path, hf.config)
    kind = config.vision_config.model_type
    common = {"mean": views.mean, "std": views.std}
    if kind == "timm_wrapper":
        stride = tower.timm_model.feature_info[-1]["reduction"]
        return WholeTower(tower, out_dim=tower.timm_model.num_features, patch=stride, image_size=None, **common)
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        raise ValueError(f"vlm.path={path} has a {kind} as its vision tower; CLIP, SigLIP and timm's are known")
    layers = options.pop("layers", None) or config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else list(layers)
    keep = options.pop("class_token", None)
    keep = config.vision_feature_select_strategy == "full" if keep is None else keep
    has_class = kind == "clip_vision_model"
    if has_class and keep:
        raise ValueError(
            f"vlm.path={path}: vision_feature_select_strategy=full keeps CLIP's class token, which no grid has"
        )
    size = config.vision_config.image_size
    return LayerTower(tower, layers=layers, class_token=False, image_size=size, **options, **common)


def plain_language(hf: PreTrainedModel, attention: str, cls: type[LanguageModel] = LanguageModel) -> LanguageModel:
    decoder = hf.model.text_model if hasattr(hf.model, "text_model") else hf.model.language_model
    return cls(with_head(decoder, hf.lm_head), attention=attention)


def build_llava(hf: PreTrainedModel, path: str, attention: str) -> PretrainedVLM:
    """Build LLaVA-1.5 (arXiv 2310.03744), LLaVA-1.6, LLaVA-OneVision (2408.03326) or FastVLM (2412.13303)."""
    config = hf.config
    encoder, llm = tower_of(hf, path), plain_language(hf, attention)
    newline = getattr(hf.model, "image_newline", None)
    projector = Connector(hf.model.multi_modal_projector, out_dim=llm.dim, newline=newline)
    arrangement = None
    if newline is not None:
        limit = getattr(config, "vision_aspect_ratio", None)
        size = config.vision_config.image_size
        arrangement = SpatialUnpad(
            projector.newline,
            max_tiles=int(limit.removeprefix("anyres_max_")) if limit else None,
            one_tile=[size, size] in [list(pair) for pair in config.image_grid_pinpoints],
        )

    def restore(model: PretrainedVLM) -> nn.Module:
        hf.model.vision_tower = model.encoder.whole()
        return hf

    resampler = IdentityResampler(in_dim=encoder.out_dim)
    return PretrainedVLM(
        encoder,
        resampler,
        projector,
        llm,
        image_token_id=config.image_token_id,
        arrangement=arrangement,
        config=config,
        restore=restore,
    )


def build_paligemma(hf: PreTrainedModel, path: str, attention: str) -> PretrainedVLM:
    config = hf.config
    depth = config.vision_config.num_hidden_layers
    encoder = tower_of(hf, path, layers=[depth], class_token=False, norm=True)
    llm = plain_language(hf, attention, PrefixLanguageModel)

    def restore(model: PretrainedVLM) -> nn.Module:
        hf.model.vision_tower = model.encoder.whole()
        return hf

    projector = Connector(hf.model.multi_modal_projector, out_dim=llm.dim)
    resampler = IdentityResampler(in_dim=encoder.out_dim)
    ids = {"image_token_id": config.image_token_id}
    return PretrainedVLM(encoder, resampler, projector, llm, **ids, config=config, restore=restore)


def build_idefics3(hf: PreTrainedModel, path: str, attention: str) -> PretrainedVLM:
    """Build Idefics3 (arXiv 2408.12637) or SmolVLM (arXiv 2504.05299)."""
    config, views = hf.config, read_views(path, hf.config)
    vision = config.vision_config
    encoder = WholeTower(
        hf.model.vision_model,
        mean=views.mean,
        std=views.std,
        patch=vision.patch_size,
        out_dim=vision.hidden_size,
        image_size=vision.image_size,
    )
    llm = plain_language(hf, attention)
    resampler = PixelShuffleResampler(in_dim=encoder.out_dim, factor=config.scale_factor)
    projector = Connector(hf.model.connector.modality_projection, out_dim=llm.dim)
    tokenizer = fetch(lambda: AutoTokenizer.from_pretrained(path), what=f"vlm.path={path}", mend=OFFLINE)
    image = tokenizer.convert_ids_to_tokens(config.image_token_id)
    per_view = resampler.num_tokens_out(encoder.num_patches(vision.image_size))

    @cache
    def words(rows: int, columns: int) -> list[int]:
        text = tile_words(rows, columns, image * per_view)
        return tokenizer(text, add_special_tokens=False).input_ids

    return PretrainedVLM(
        encoder,
        resampler,
        projector,
        llm,
        image_token_id=config.image_token_id,
        arrangement=Separated(words, embed=llm.embed, image_id=config.image_token_id),
        config=config,
        restore=lambda model: hf,
    )


def tile_words(rows: int, columns: int, view: str) -> str:
    """Return an image's text as written by Idefics3's and SmolVLM's processors: tiles by row, then the global view."""
    around, whole = "<fake_token_around_image>", "<global-img>"
    lines = ["".join(f"{around}<row_{r + 1}_col_{c + 1}>{view}" for c in range(columns)) + "\n" for r in range(rows)]
    return "".join(lines) + ("\n" if rows else "") + f"{around}{whole}{view}{around}"


def build_qwen2_vl(hf: PreTrainedModel, path: str, attention: str) -> PretrainedVLM:
    config, views, visual = hf.config, read_views(path, hf.config), hf.model.visual
    merger, visual.merger = visual.merger, nn.Identity()
    encoder = Qwen2VLTower(visual, mean=views.mean, std=views.std, image_size=None)
    llm = MRoPELanguageModel(DecoderWithHead(hf.model.language_model, hf.lm_head), attention=attention)

    def restore(model: PretrainedVLM) -> nn.Module:
        visual.merger = merger
        return hf

    return PretrainedVLM(
        encoder,
        BlockResampler(in_dim=encoder.out_dim, factor=encoder.merge),
        MergerConnector(merger, out_dim=llm.dim),
        llm,
        image_token_id=config.image_token_id,
        image_axes=True,
        config=config,
        restore=restore,
    )


FAMILIES: dict[str, Callable[[PreTrainedModel, str, str], PretrainedVLM]] = {
    "llava": build_llava,
    "llava_next": build_llava,
    "llava_onevision": build_llava,
    "fast_vlm": build_llava,
    "paligemma": build_paligemma,
    "idefics3": build_idefics3,
    "smolvlm": build_idefics3,
    "qwen2_vl": build_qwen2_vl,
}
