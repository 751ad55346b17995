"""Vision-language models of `transformers` with random weights, saved by their own classes and processors."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as t
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

WORDS = "what is in the image? a red square and two blue circles, on the left: yes no one three. User Assistant USER"
SIDE, FINE, PATCH = 28, 7, 14  # FINE: of CLIP and SigLIP, so that padding of tiles covers whole patches
VISION = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
TEXT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
)
TILES = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for p in m['content'] %}{% if p['type'] == 'image' %}IMAGE{% else %}{{ p['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(*, image: str, specials: tuple[str, ...] = (), template: str | None = CHATML, shown: str = ""):
    """A byte-level BPE; `shown` is what an image part becomes in the chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+|[^\n]+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([WORDS], trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet))
    backend.add_tokens(["\n\n"])
    tokenizer = t.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<pad>")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", *specials, image]}, replace_extra_special_tokens=False
    )
    tokenizer.chat_template = template and template.replace("IMAGE", shown or image)
    tokenizer.image_token = image
    tokenizer.image_token_id = tokenizer.convert_tokens_to_ids(image)
    return tokenizer


def clip_vision(**more):
    return t.CLIPVisionConfig(image_size=SIDE, patch_size=FINE, projection_dim=16, **VISION, **more)


def siglip_vision(**more):
    return t.SiglipVisionConfig(image_size=SIDE, patch_size=FINE, **VISION, **more)


def text_config(cls, tokenizer, **more):
    ids = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return cls(vocab_size=len(tokenizer) + 3, **(TEXT | ids | more))


SQUARE = {"height": SIDE, "width": SIDE}


def llava():
    tok = tiny_tokenizer(image="<image>", shown="<image>\n")
    config = t.LlavaConfig(
        vision_config=clip_vision(), text_config=text_config(t.LlamaConfig, tok), image_token_id=tok.image_token_id
    )
    images = t.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE)
    processor = t.LlavaProcessor(
        image_processor=images,
        tokenizer=tok,
        patch_size=FINE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=tok.chat_template,
    )
    return t.LlavaForConditionalGeneration(config), processor


def llava_next():
    tok = tiny_tokenizer(image="<image>", shown="<image>\n")
    config = t.LlavaNextConfig(
        vision_config=clip_vision(),
        text_config=text_config(t.MistralConfig, tok, sliding_window=None),
        image_token_id=tok.image_token_id,
        image_grid_pinpoints=TILES,
    )
    images = t.LlavaNextImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=TILES)
    processor = t.LlavaNextProcessor(
        image_processor=images,
        tokenizer=tok,
        patch_size=FINE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=tok.chat_template,
    )
    return t.LlavaNextForConditionalGeneration(config), processor


def llava_onevision():
    tok = tiny_tokenizer(image="<image>", specials=("<video>",), shown="<image>\n")
    tiles = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [2 * SIDE, 4 * SIDE]]
    config = t.LlavaOnevisionConfig(
        vision_config=siglip_vision(vision_use_head=False),
        text_config=text_config(t.Qwen2Config, tok),
        image_token_id=tok.image_token_id,
        video_token_id=tok.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=tiles,
        vision_aspect_ratio="anyres_max_4",
    )
    images = t.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=tiles)
    processor = t.LlavaOnevisionProcessor(
        image_processor=images,
        tokenizer=tok,
        video_processor=t.LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=(SIDE // FINE) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
        image_token="<image>",
        video_token="<video>",
        chat_template=tok.chat_template,
    )
    return t.LlavaOnevisionForConditionalGeneration(config), processor


def fast_vlm():
    tok = tiny_tokenizer(image="<image>", shown="<image>\n")
    vision = t.TimmWrapperConfig(architecture="fastvit_t8", do_pooling=True, model_args={"inference_mode": True})
    vision.hidden_size = 768
    config = t.FastVlmConfig(
        vision_config=vision,
        text_config=text_config(t.Qwen2Config, tok),
        image_token_index=tok.image_token_id,
        image_seq_length=4,
    )
    images = t.CLIPImageProcessor(
        size={"shortest_edge": 64},
        crop_size={"height": 64, "width": 64},
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
    )
    processor = t.LlavaProcessor(
        image_processor=images,
        tokenizer=tok,
        patch_size=32,
        vision_feature_select_strategy="full",
        image_token="<image>",
        chat_template=tok.chat_template,
    )
    return t.FastVlmForConditionalGeneration(config), processor


def paligemma():
    tok = tiny_tokenizer(image="<image>", specials=("<bos>", "<eos>"), template=None)
    tok.bos_token, tok.eos_token = "<bos>", "<eos>"
    config = t.PaliGemmaConfig(
        vision_config=siglip_vision(vision_use_head=False, projection_dim=32).to_dict(),
        text_config=text_config(t.GemmaConfig, tok, head_dim=8).to_dict(),
        image_token_index=tok.image_token_id,
        projection_dim=32,
        hidden_size=32,
    )
    images = t.SiglipImageProcessor(size=SQUARE)
    images.image_seq_length = (SIDE // FINE) ** 2
    return t.PaliGemmaForConditionalGeneration(config), t.PaliGemmaProcessor(image_processor=images, tokenizer=tok)


SEPARATORS = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
PLACES = tuple(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7))


def idefics3(kind: str = "Idefics3"):
    side = 4 * PATCH
    tok = tiny_tokenizer(image="<image>", specials=(*SEPARATORS, *PLACES))
    vision = getattr(t, f"{kind}VisionConfig")(image_size=side, patch_size=PATCH, **VISION)
    config = getattr(t, f"{kind}Config")(
        vision_config=vision,
        text_config=text_config(t.LlamaConfig, tok),
        image_token_id=tok.image_token_id,
        scale_factor=2,
        pad_token_id=tok.pad_token_id,
    )
    images = getattr(t, f"{kind}ImageProcessor")(
        size={"longest_edge": 2 * side}, max_image_size={"longest_edge": side}, do_image_splitting=True
    )
    # SmolVLM's own processor writes the same words for images, and asks for num2words, which only videos need.
    processor = t.Idefics3Processor(
        image_processor=images, tokenizer=tok, image_seq_len=4, chat_template=tok.chat_template
    )
    return getattr(t, f"{kind}ForConditionalGeneration")(config), processor


def qwen2_vl():
    marks = ("<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
    shown = "<|vision_start|><|image_pad|><|vision_end|>"
    tok = tiny_tokenizer(image="<|image_pad|>", specials=marks, shown=shown)
    one = tok.convert_tokens_to_ids
    vision = dict(depth=2, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=PATCH)
    config = t.Qwen2VLConfig(
        vision_config=vision,
        text_config=text_config(
            t.Qwen2VLTextConfig,
            tok,
            rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        ).to_dict(),
        image_token_id=tok.image_token_id,
        video_token_id=one("<|video_pad|>"),
        vision_start_token_id=one("<|vision_start|>"),
        vision_end_token_id=one("<|vision_end|>"),
    )
    images = t.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=112 * 112)
    processor = t.Qwen2VLProcessor(
        image_processor=images,
        tokenizer=tok,
        video_processor=t.Qwen2VLVideoProcessor(),
        chat_template=tok.chat_template,
    )
    return t.Qwen2VLForConditionalGeneration(config), processor


MAKERS = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "fast_vlm": fast_vlm,
    "paligemma": paligemma,
    "idefics3": idefics3,
    "smolvlm": lambda: idefics3("SmolVLM"),
    "qwen2_vl": qwen2_vl,
}


def save_checkpoint(kind: str, folder: Path) -> Path:
    """A checkpoint of that kind, as its own class writes it, with logits that differ from token to token."""
    torch.manual_seed(0)
    model, processor = MAKERS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4 if parameter.ndim == 2 else 1.5)
            elif kind != "paligemma" and not torch.equal(parameter, torch.ones_like(parameter)):
                parameter.normal_(std=0.1)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


CLIPS_SIDE = SIDE


def save_clip(kind: str, folder: Path):
    """A CLIP or SigLIP with both towers and its processor."""
    torch.manual_seed(0)
    tok = tiny_tokenizer(image="<image>", template=None)
    text = dict(
        vocab_size=len(tok),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=tok.convert_tokens_to_ids("<|im_start|>"),
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    tok.model_max_length = 32
    vision = dict(image_size=SIDE, patch_size=PATCH, **VISION)
    if kind == "clip":
        model = t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
        processor = t.CLIPProcessor(t.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE), tok)
    else:
        model = t.SiglipModel(t.SiglipConfig(text_config=text | {"projection_size": 24}, vision_config=vision))
        processor = t.SiglipProcessor(t.SiglipImageProcessor(size=SQUARE), tok)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def save_llm(folder: Path) -> None:
    torch.manual_seed(1)
    tok = tiny_tokenizer(image="<|image|>")
    model = t.LlamaForCausalLM(text_config(t.LlamaConfig, tok))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
