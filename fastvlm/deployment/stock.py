"""Export our parts as a class of `transformers` if they equal one, so that other engines can serve them.

| encoder | resampler | projector | class |
|---|---|---|---|
| CLIP; SigLIP of transformers | identity | MLP without norm, two layers | LlavaForConditionalGeneration |
| timm, convolutional (FastViTHD) | identity | MLP without norm, two layers | FastVlmForConditionalGeneration |
| SigLIP of timm or transformers | pixel_shuffle | linear without bias or norm | Idefics3ForConditionalGeneration |
| the same | avgpool, no positions | linear, no bias, RMS norm (llm: gemma3_text) | Gemma3ForConditionalGeneration |

Idefics3 also needs the tokens that its processor writes (tokenizer=smolvlm).
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import torch
import transformers as hf
from PIL import Image
from torch import Tensor, nn

from fastvlm.data.conversation import encode_record
from fastvlm.deployment.towers import NoStockClass, clip_tower, is_clip, is_siglip, siglip_tower
from fastvlm.models.encoders.open_clip_encoder import OpenClipEncoder
from fastvlm.models.encoders.timm_encoder import TimmEncoder
from fastvlm.models.encoders.transformers_encoder import TransformersEncoder
from fastvlm.models.pretrained.whole import PretrainedVLM
from fastvlm.models.projectors.linear import LinearProjector
from fastvlm.models.projectors.mlp import MLPProjector
from fastvlm.models.resamplers.avgpool import AvgPoolResampler
from fastvlm.models.resamplers.identity import IdentityResampler
from fastvlm.models.resamplers.pixel_shuffle import PixelShuffleResampler
from fastvlm.models.vlm import VLM
from fastvlm.tokens import Tokenizer


def export_stock(
    model: VLM, tokenizer: Tokenizer, *, image_size: int, image: dict | None = None
) -> tuple[nn.Module, hf.ProcessorMixin, list[str]]:
    """Return the model and processor of the stock class that these parts equal, and differences outside the model.

    Args:
        image_size: side of a view, pixels.
        image: how a file becomes views: the content of a stage's `image`.

    Raises:
        NoStockClass: the parts equal no stock class.
    """
    if isinstance(model, PretrainedVLM):
        raise NoStockClass("a pretrained model has a class of its own: `restored` gives it back")
    kind = match(model)
    with torch.no_grad():
        stock, processor, notes = BUILDERS[kind](model, tokenizer, image_size, dict(image or {}))
    stock.generation_config.eos_token_id = sorted({tokenizer.end_id, tokenizer.document_end_id})
    stock.generation_config.pad_token_id = tokenizer.pad_id
    notes += prompt_notes(processor, tokenizer, image_size)
    if (image or {}).get("tiles"):
        notes.append("the stock class takes an image as one view: tiles are left out")
    return stock.eval(), processor, notes


def match(model: VLM) -> str:
    """Return the stock class that the parts equal, as a key of `BUILDERS`.

    Raises:
        NoStockClass: they equal none; says what would fit.
    """
    encoder, resampler, projector = model.encoder, model.resampler, model.projector
    siglip = is_siglip(encoder, norm=True)
    wants: list[str] = []
    if isinstance(resampler, IdentityResampler):
        if not is_llava_mlp(projector):
            wants.append("Llava and FastVlm need projector=mlp projector.norm=false projector.depth=2")
        elif is_clip(encoder) or is_siglip(encoder, norm=False):
            return "llava"
        elif isinstance(encoder, OpenClipEncoder | TransformersEncoder):
            wants.append("Llava needs CLIP or SigLIP with encoder.norm=false and encoder.class_token=false")
        elif isinstance(encoder, TimmEncoder) and encoder.num_prefix == 0 and not hasattr(encoder.model, "blocks"):
            if getattr(encoder.model, "output_fmt", "NCHW") == "NCHW":
                return "fast_vlm"
            wants.append(f"FastVlm reads maps with channels first, and those of {encoder.name} have them last")
        else:
            wants.append(
                "Llava needs a CLIP or SigLIP of open_clip or transformers, FastVlm a convolutional encoder of timm "
                "(encoder=fastvithd)"
            )
    elif isinstance(resampler, PixelShuffleResampler):
        if not (isinstance(projector, LinearProjector) and projector[1].bias is None):
            wants.append("Idefics3 needs projector=linear projector.bias=false")
        elif isinstance(projector[0], nn.Identity) and siglip:
            return "idefics3"
        else:
            wants.append("Idefics3 needs a SigLIP of timm or transformers with its norm, and no norm in its projector")
    elif isinstance(resampler, AvgPoolResampler) and resampler.positions is None:
        if model.llm.hf.config.model_type != "gemma3_text":
            wants.append("Gemma3 needs a gemma3_text as its language model")
        elif isinstance(projector, LinearProjector) and isinstance(projector[0], nn.RMSNorm) and siglip:
            return "gemma3"
        else:
            wants.append("Gemma3 needs a SigLIP and projector=linear projector.bias=false projector.norm=rms")
    else:
        wants.append("stock classes have resampler=identity or pixel_shuffle, or avgpool with positions=false")
    made = ", ".join(f"{name} {type(part).__name__}" for name, part in model.parts.items())
    raise NoStockClass(f"{made}: no class of transformers has these parts; {wants[0]}")


def is_llava_mlp(projector: nn.Module) -> bool:
    if not isinstance(projector, MLPProjector) or len(projector) != 4:
        return False
    first, act, second, norm = projector
    linear = isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    return linear and isinstance(act, nn.GELU) and isinstance(norm, nn.Identity)


# -------------------------------------------------------------------------------------------------------------- pieces


def language(model: VLM) -> tuple[hf.PreTrainedConfig, dict[str, Tensor], Tensor]:
    """Return configuration, decoder weights and head of the language model, as stock classes nest them.

    Raises:
        NoStockClass: the head has a bias, or the model another layout than Llama's.
    """
    text = model.llm.hf
    head = text.get_output_embeddings()
    if head.bias is not None:
        raise NoStockClass("llm: its head has a bias, and that of the stock classes has none")
    if not hasattr(text.base_model, "embed_tokens"):
        raise NoStockClass(f"llm: stock classes nest models laid out like Llama; {type(text).__name__} is not")
    return text.config, text.get_decoder().state_dict(), head.weight


def fill(stock: nn.Module, model: VLM, *, text: str, vision: dict[str, Tensor], connector: dict[str, Tensor]) -> None:
    """Load the weights. Only a `post_layernorm` and the head of a timm model, which are not read, may be missing.

    Raises:
        NoStockClass: other names are missing or unknown, or shapes differ.
    """
    _, decoder, head = language(model)
    state = {f"model.{text}.{name}": value for name, value in decoder.items()}
    state |= {f"model.{name}": value for name, value in (vision | connector).items()}
    state["lm_head.weight"] = head
    try:
        missing, unknown = stock.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise NoStockClass(str(error).splitlines()[-1].strip()) from None
    unread = ("post_layernorm", ".timm_model.head.")
    if odd := [*(name for name in missing if not any(part in name for part in unread)), *unknown]:
        raise NoStockClass(f"the stock class has other weights: {', '.join(sorted(odd)[:5])}")


def mlp_weights(projector: nn.Module) -> dict[str, Tensor]:
    first, second = projector[0], projector[2]
    return {
        f"multi_modal_projector.linear_{i}.{name}": value
        for i, linear in ((1, first), (2, second))
        for name, value in linear.state_dict().items()
    }


def image_processor(encoder: nn.Module, image_size: int, image: dict) -> tuple[hf.ImageProcessingMixin, list[str]]:
    """Return the stock image processor closest to our transform, and how it differs."""
    square = {"height": image_size, "width": image_size}
    common = {"image_mean": list(encoder.mean), "image_std": list(encoder.std), "resample": 2}
    fit = image.get("fit", "pad")
    if fit == "squash":
        return hf.CLIPImageProcessor(size=square, do_center_crop=False, **common), []
    if fit == "crop":
        return hf.CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=square, **common), []
    note = "an image that is not square is padded before it is resized, with the encoder's mean colour: ours pads after"
    return hf.LlavaImageProcessor(size=square, crop_size=square, do_center_crop=False, do_pad=True, **common), [note]


def plain_tokenizer(tokenizer: Tokenizer) -> hf.PreTrainedTokenizerBase:
    """Return a copy that puts no tokens around a text: the chat template writes all of them, including the first."""
    plain = deepcopy(tokenizer.hf)
    plain.add_bos_token = plain.add_eos_token = False  # each replaces the post-processor
    return plain


def prompt_notes(processor: hf.ProcessorMixin, tokenizer: Tokenizer, image_size: int) -> list[str]:
    """Return a note if a conversation has other ids from an exported processor than in training.

    Training encodes each piece of the template and each text by itself, a processor the whole conversation at once.
    """
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A red square."}]}
    record = {"messages": [question, answer, {"role": "user", "content": [{"type": "text", "text": "And this?"}]}]}
    text = processor.apply_chat_template(record["messages"], add_generation_prompt=True)
    image = Image.new("RGB", (image_size, image_size))
    written = processor(images=[image], text=[text], return_tensors="pt")["input_ids"][0].tolist()
    slots = written.count(tokenizer.image_id)
    same = written == encode_record(record, tokenizer, tokens_per_image=slots, prompt=True).input_ids
    return [] if same else [OTHER_PROMPTS]


def llava_processor(model: VLM, tokenizer: Tokenizer, image_size: int, image: dict, *, class_token: bool):
    images, notes = image_processor(model.encoder, image_size, image)
    side = int(model.num_visual_tokens(image_size) ** 0.5)
    processor = hf.LlavaProcessor(
        image_processor=images,
        tokenizer=plain_tokenizer(tokenizer),
        patch_size=image_size // side,
        vision_feature_select_strategy="default" if class_token else "full",
        num_additional_image_tokens=int(class_token),
        image_token=tokenizer.image_token,
        chat_template=tokenizer.hf.chat_template,
    )
    return processor, notes


# ------------------------------------------------------------------------------------------------------------- classes


def build_llava(model: VLM, tokenizer: Tokenizer, image_size: int, image: dict):
    text, clip = language(model)[0], is_clip(model.encoder)
    tower = clip_tower(model.encoder, image_size) if clip else siglip_tower(model.encoder, image_size)
    more = {"projection_dim": model.encoder.out_dim} if clip else {"vision_use_head": False}
    vision = (hf.CLIPVisionConfig if clip else hf.SiglipVisionConfig)(**tower.sizes, **more)
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=model.image_token_id,
        vision_feature_layer=-1,  # the layers above the one that is read are left out
        vision_feature_select_strategy="default" if clip else "full",
        projector_hidden_act="gelu",
        image_seq_length=model.num_visual_tokens(image_size),
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )
    stock = hf.LlavaForConditionalGeneration(config)
    named = {f"vision_tower.{name}": value for name, value in tower.weights.items()}
    fill(stock, model, text="language_model", vision=named, connector=mlp_weights(model.projector))
    return stock, *llava_processor(model, tokenizer, image_size, image, class_token=clip)


def build_fast_vlm(model: VLM, tokenizer: Tokenizer, image_size: int, image: dict):
    timm_model, text = model.encoder.model, language(model)[0]
    vision = hf.TimmWrapperConfig(
        architecture=model.encoder.name, do_pooling=True, model_args=dict(getattr(model.encoder, "options", {}) or {})
    )
    vision.hidden_size = model.encoder.out_dim
    config = hf.FastVlmConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=model.image_token_id,
        image_seq_length=model.num_visual_tokens(image_size),
        projector_hidden_act="gelu",
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )
    stock = hf.FastVlmForConditionalGeneration(config)
    tower = {f"vision_tower.timm_model.{name}": value for name, value in timm_model.state_dict().items()}
    fill(stock, model, text="language_model", vision=tower, connector=mlp_weights(model.projector))
    return stock, *llava_processor(model, tokenizer, image_size, image, class_token=False)


def build_idefics3(model: VLM, tokenizer: Tokenizer, image_size: int, image: dict):
    known = {*tokenizer.hf.get_vocab()} - {"<image>"} | {tokenizer.image_token}
    if lacking := [token for token in IDEFICS3_TOKENS if token not in known]:
        raise NoStockClass(
            f"tokenizer: Idefics3's processor writes {', '.join(lacking)}, which the run was trained without; "
            "train with tokenizer=smolvlm"
        )
    text, tower = language(model)[0], siglip_tower(model.encoder, image_size)
    vision = hf.Idefics3VisionConfig(**tower.sizes)
    config = hf.Idefics3Config(
        vision_config=vision,
        text_config=text,
        image_token_id=model.image_token_id,
        scale_factor=model.resampler.factor,
        pad_token_id=tokenizer.pad_id,
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )
    stock = hf.Idefics3ForConditionalGeneration(config)
    named = {f"vision_model.{name}": value for name, value in tower.weights.items()}
    connector = {"connector.modality_projection.proj.weight": model.projector[1].weight}
    fill(stock, model, text="text_model", vision=named, connector=connector)
    images = hf.Idefics3ImageProcessor(
        size={"longest_edge": image_size},
        max_image_size={"longest_edge": image_size},
        do_image_splitting=False,
        image_mean=list(model.encoder.mean),
        image_std=list(model.encoder.std),
        resample=2,
    )
    processor = hf.Idefics3Processor(
        image_processor=images,
        tokenizer=plain_tokenizer(tokenizer),
        image_seq_len=model.num_visual_tokens(image_size),
        # The processor itself writes the marks around images.
        chat_template=replace(tokenizer.template, image=("", "")).jinja(tokenizer.image_token),
    )
    notes = []
    if (fit := image.get("fit", "pad")) != "squash":
        notes.append(f"its processor squashes an image to a square; the run was trained with image.fit={fit}")
    if tokenizer.template.image != IDEFICS3_MARKS:
        notes.append(
            "its processor writes <fake_token_around_image><global-img> before an image and the first of them behind; "
            "train with tokenizer=smolvlm to have them in the prompts of training too"
        )
    return stock, processor, notes


def build_gemma3(model: VLM, tokenizer: Tokenizer, image_size: int, image: dict):
    text, tower = language(model)[0], siglip_tower(model.encoder, image_size)
    vision, tokens = hf.SiglipVisionConfig(**tower.sizes, vision_use_head=False), model.num_visual_tokens(image_size)
    config = hf.Gemma3Config(
        vision_config=vision,
        text_config=text,
        mm_tokens_per_image=tokens,
        image_token_index=model.image_token_id,
        boi_token_index=tokenizer.image_id,
        eoi_token_index=tokenizer.image_id,
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )
    stock = hf.Gemma3ForConditionalGeneration(config)
    named = {f"vision_tower.{name}": value for name, value in tower.weights.items()}
    norm, linear = model.projector
    connector = {
        "multi_modal_projector.mm_input_projection_weight": linear.weight.T,
        "multi_modal_projector.mm_soft_emb_norm.weight": norm.weight - 1,  # Gemma's norm multiplies by 1 + weight
    }
    fill(stock, model, text="language_model", vision=named, connector=connector)
    # Llava's processor writes only the slots, as in training.
    processor, notes = llava_processor(model, tokenizer, image_size, image, class_token=False)
    return stock, processor, [*notes, GEMMA3_ELSEWHERE]


GEMMA3_ELSEWHERE = (
    "with this folder's processor transformers gives the run's answers; vLLM, llama.cpp and MLX have Gemma 3's own "
    "processing, which puts marks around an image and lets its tokens see each other both ways"
)
IDEFICS3_MARKS = ("<fake_token_around_image><global-img>", "<fake_token_around_image>")
IDEFICS3_TOKENS = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
OTHER_PROMPTS = (
    "this folder's processor makes other tokens of a conversation than the run was trained with, so its answers may "
    "differ; fastvlm's own chat and server give the run's"
)
BUILDERS: dict[str, Callable] = {
    "llava": build_llava,
    "fast_vlm": build_fast_vlm,
    "idefics3": build_idefics3,
    "gemma3": build_gemma3,
}
