"""Which engines can load a folder, and why the others cannot: from their documented lists and their own code.

Sources of the lists (nothing here uses the network):
- transformers: the installed version itself;
- vLLM: docs/models/supported_models.md of github.com/vllm-project/vllm at 4b387bc, and of 0.33.0;
- llama.cpp: conversion classes of github.com/ggml-org/llama.cpp (convert_hf_to_gguf.py at a458664), autumn 2026;
- MLX-VLM: mlx_vlm/models of github.com/Blaizzy/mlx-vlm, 0.7.10.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fastvlm.models.saved import PartsVLMConfig

VLLM = {
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "Idefics3ForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "PaliGemmaForConditionalGeneration",
    "Gemma3ForConditionalGeneration",
    "InternVLForConditionalGeneration",
}
LLAMA_CPP = {
    "LlavaForConditionalGeneration",  # with a Pixtral tower only, see below
    "Idefics3ForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Gemma3ForConditionalGeneration",
}
MLX = {
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "Idefics3ForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "PaliGemmaForConditionalGeneration",
    "Gemma3ForConditionalGeneration",
}
MLX_LLAVA_TOWERS = ("clip_vision_model", "siglip_vision_model")
MLX_LLAVA_TEXTS = ("llama", "qwen2")
OURS = "its parts equal no stock class: resampler=identity or pixel_shuffle has one; or use fastvlm's own server"


@dataclass(frozen=True)
class Verdict:
    engine: str
    loads: bool
    why: str

    def __str__(self) -> str:
        return f"{'yes' if self.loads else 'no ':<4} {self.engine:<34} {self.why}"


def check_folder(folder: str | Path) -> list[Verdict]:
    """Check a model folder against every engine.

    Raises:
        ValueError: the folder has no config.json.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"check={folder}: no config.json there; name a folder that save_pretrained wrote")
    config = json.loads(path.read_text())
    name = (config.get("architectures") or [""])[0]
    ours = config.get("model_type") == PartsVLMConfig.model_type
    vision = (config.get("vision_config") or {}).get("model_type", "")
    text = (config.get("text_config") or {}).get("model_type", "")
    return [
        check_transformers(folder, name, ours=ours),
        check_serve(name, ours=ours),
        listed("vLLM 0.33", name, VLLM, ours=ours),
        check_llama_cpp(name, vision, ours=ours),
        check_mlx(name, vision, text, ours=ours),
        check_weights(folder),
    ]


def check_transformers(folder: Path, name: str, *, ours: bool) -> Verdict:
    """Check that the installed transformers has the class and builds it from the configuration (on the meta device)."""
    import torch
    import transformers

    engine = f"transformers {transformers.__version__}"
    if ours:
        return Verdict(engine, True, "after `import fastvlm.auto`, or trust_remote_code=True with fastvlm installed")
    cls = getattr(transformers, name, None)
    if cls is None:
        return Verdict(engine, False, f"it has no class {name or '(config.json names no architecture)'}")
    with torch.device("meta"):
        model = cls(transformers.AutoConfig.from_pretrained(folder))
    wanted = sum(p.numel() for p in model.parameters())
    return Verdict(engine, True, f"as {name}, {wanted / 1e6:.1f}M parameters")


def check_serve(name: str, *, ours: bool) -> Verdict:
    engine = "transformers serve"
    if ours:
        return Verdict(engine, False, f"it looks {name} up in transformers itself and takes no remote code")
    return Verdict(engine, True, "needs pip install 'transformers[serving]'")


def listed(engine: str, name: str, known: set[str], *, ours: bool) -> Verdict:
    if ours:
        return Verdict(engine, False, OURS)
    if name not in known:
        return Verdict(engine, False, f"{name} is not in its list of supported models")
    return Verdict(engine, True, f"{name} is in its list of supported models")


def check_llama_cpp(name: str, vision: str, *, ours: bool) -> Verdict:
    engine = "llama.cpp (convert_hf_to_gguf.py)"
    if name == "LlavaForConditionalGeneration" and vision != "pixtral":
        why = f"its converter takes Llava with a Pixtral tower only, not {vision}; the Idefics3 form converts"
        return Verdict(engine, False, why)
    return listed(engine, name, LLAMA_CPP, ours=ours)


def check_mlx(name: str, vision: str, text: str, *, ours: bool) -> Verdict:
    engine = "MLX-VLM 0.7.10"
    if name == "LlavaForConditionalGeneration" and vision not in MLX_LLAVA_TOWERS:
        return Verdict(engine, False, f"its Llava takes {' or '.join(MLX_LLAVA_TOWERS)}, not {vision}")
    if name == "LlavaForConditionalGeneration" and text not in MLX_LLAVA_TEXTS:
        return Verdict(engine, False, f"its Llava takes {' or '.join(MLX_LLAVA_TEXTS)} as language model, not {text}")
    if name == "FastVlmForConditionalGeneration":
        return Verdict(engine, False, "its fastvlm reads Apple's llava_qwen2 layout, not that of transformers")
    return listed(engine, name, MLX, ours=ours)


def check_weights(folder: Path) -> Verdict:
    """Check that every file an engine reads is there: weights, tokenizer, processor, generation settings."""
    wanted = ("model.safetensors", "tokenizer.json", "processor_config.json", "generation_config.json")
    instead = {
        "model.safetensors": "model.safetensors.index.json",
        "processor_config.json": "preprocessor_config.json",  # models saved before transformers 5 have only this one
    }
    missing = [n for n in wanted if not any((folder / file).exists() for file in (n, instead.get(n, n)))]
    why = f"missing: {', '.join(missing)}" if missing else "weights, tokenizer, processor"
    return Verdict("files", not missing, why)
