"""Save and load a `VLM` as one folder in the format of `transformers`: configuration, weights, and a model class.

`import fastvlm.auto` registers the class, after which `AutoModelForImageTextToText.from_pretrained(folder)` loads it.
The folder also has a `remote_code.py`, so trust_remote_code=True does the same where fastvlm is installed.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastvlm.models.hub import fetch
from fastvlm.models.llms.language_model import LanguageModel
from fastvlm.models.slots import empty_slots, take_out
from fastvlm.models.splice import splice
from fastvlm.models.vlm import VLM, tiles_of

WEIGHTS = "model.safetensors"
LISTED = 5
HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
# Given by transformers' own callers, or true of every folder
IGNORED = ("trust_remote_code", "adapter_kwargs", "low_cpu_mem_usage", "use_safetensors", "max_shard_size")
REMOTE = '''"""Loads this folder with trust_remote_code=True; the parts are those of the package fastvlm: install it."""

from fastvlm.models.saved import PartsVLMConfig, PartsVLMForConditionalGeneration  # noqa: F401
'''


class PartsVLMConfig(PreTrainedConfig):
    """Configuration of a saved `VLM`.

    Args:
        parts: `encoder`, `resampler`, `projector`: the constructor's name and its arguments; `encoder_statistics`: mean
            and std of pixels; `llm`: the configuration of its causal language model.
        image_token_id: id that marks an image slot.
        image_size: side of a view in pixels.
        image: arguments of `ImageTransform`, which turns a file into views.
        tokens_per_view: number of slots per view.
    """

    model_type = "fastvlm_parts"

    def __init__(
        self,
        parts: dict | None = None,
        image_token_id: int | None = None,
        image_size: int | None = None,
        image: dict | None = None,
        tokens_per_view: int | None = None,
        **kwargs,
    ):
        self.parts, self.image_token_id = parts or {}, image_token_id
        self.image_size, self.image, self.tokens_per_view = image_size, image or {}, tokens_per_view
        super().__init__(**kwargs)

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        if "llm" not in self.parts:
            return self
        return config_of(self.parts["llm"]["config"])


class PartsVLMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """`VLM` with the interface of `transformers`.

    `pixel_values` (I, 3, H, W) are uint8 and, with tiling, `layouts` (images, 4) are given, both as returned by its
    processor.
    """

    config_class = PartsVLMConfig
    base_model_prefix = "vlm"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")

    def __init__(self, config: PartsVLMConfig, vlm: VLM | None = None):
        super().__init__(config)
        self.vlm = build_vlm(config) if vlm is None else vlm

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, dtype=None, device_map=None, **kwargs):
        """Load a model like `PreTrainedModel.from_pretrained`, but strictly: all names and shapes must match.

        Raises:
            ValueError: no such folder, weights that do not fit (lists the tensors), or something not supported: a
                `quantization_config`, a `device_map` over several devices, an unknown argument.
        """
        if kwargs.pop("quantization_config", None) is not None:
            raise ValueError("quantization_config is not taken here: its parts quantise by the stage's own keys")
        hub = {name: value for name in HUB if (value := kwargs.pop(name, None)) is not None}
        old_dtype, attention = kwargs.pop("torch_dtype", None), kwargs.pop("attn_implementation", None)
        refuse_arguments(kwargs, of="from_pretrained")
        folder = folder_of(str(pretrained_model_name_or_path), **hub)
        dtype = old_dtype if dtype is None else dtype
        config = config or PartsVLMConfig.from_pretrained(folder)
        attention = attention or config._attn_implementation  # where the auto classes put it
        config._attn_implementation = None  # it is the language model's
        model = cls(config, load_weights(build_vlm(config, attention=attention), folder))
        config._attn_implementation = attention
        if dtype not in (None, "auto"):
            model = model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        if device_map is not None:
            model = model.to(device_of(device_map))
        if (folder / "generation_config.json").exists():  # it has the tokenizer's end tokens
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model.eval()

    def save_pretrained(self, save_directory, is_main_process: bool = True, state_dict=None, **kwargs) -> None:
        """Write configuration, weights and generation settings into a folder.

        Raises:
            ValueError: an argument that is not supported, such as `push_to_hub`, or weights other than the model's own.
        """
        refuse_arguments({"state_dict": state_dict, **kwargs}, of="save_pretrained")
        if is_main_process:
            write_folder(self.vlm, self.config, Path(save_directory))
            self.generation_config.save_pretrained(save_directory)

    def get_input_embeddings(self) -> nn.Module:
        return self.vlm.llm.hf.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.vlm.llm.hf.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        return self.vlm.llm.hf.get_decoder()

    def get_image_features(self, pixel_values: Tensor, layouts: Tensor | None = None, **kwargs) -> list[Tensor]:
        """Return the visual tokens (M, D) of every view."""
        return list(self.vlm.arrange(self.vlm.encode_images(pixel_values, tiles_of(layouts)), layouts))

    def read_images(self, input_ids: Tensor, pixel_values: Tensor | None, layouts: Tensor | None, mask: Tensor | None):
        """Return embeddings with visual tokens in their slots, and the attention mask (all ones if None)."""
        vlm = self.vlm
        embeds, mask = vlm.llm.embed(input_ids), torch.ones_like(input_ids) if mask is None else mask
        if pixel_values is not None and len(pixel_values):
            visual = vlm.arrange(vlm.encode_images(pixel_values, tiles_of(layouts)), layouts)
            embeds = splice(embeds, input_ids, visual, image_token_id=vlm.image_token_id)
        return embeds, mask

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        layouts: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds, attention_mask = self.read_images(input_ids, pixel_values, layouts, attention_mask)
            if self.vlm.drops_tokens and pixel_values is not None:
                attention_mask = attention_mask * ~empty_slots(inputs_embeds, input_ids == self.vlm.image_token_id)
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
        return self.vlm.llm.hf(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    @torch.no_grad()
    def generate(self, input_ids: Tensor, pixel_values=None, layouts=None, attention_mask=None, **kwargs):
        """Return prompt and answer ids, like `GenerationMixin.generate`, whose options are all accepted."""
        embeds, mask = self.read_images(input_ids, pixel_values, layouts, attention_mask)
        if self.vlm.drops_tokens and pixel_values is not None:
            embeds, mask = take_out(empty_slots(embeds, input_ids == self.vlm.image_token_id), embeds, mask)
        kwargs.setdefault("generation_config", self.generation_config)
        written = self.vlm.llm.hf.generate(inputs_embeds=embeds, attention_mask=mask, **kwargs)
        ids = written if isinstance(written, Tensor) else written.sequences
        ids = torch.cat([input_ids.repeat_interleave(len(ids) // len(input_ids), dim=0), ids], dim=1)
        if isinstance(written, Tensor):
            return ids
        written.sequences = ids
        return written


# ------------------------------------------------------------------------------------------------------- save and load


def describe(model: VLM, *, image_size: int, image: dict | None = None) -> PartsVLMConfig:
    """Return the configuration from which the model can be rebuilt.

    Raises:
        ValueError: the model has no `recipe`, or has parts from outside this package.
    """
    recipe = getattr(model, "recipe", None)
    if recipe is None:
        raise ValueError(
            "this VLM was put together by hand: set model.recipe to {'encoder': {'_target_': ..., ...}, 'resampler': "
            "..., 'projector': ...}, as build_model does"
        )
    parts: dict[str, Any] = {}
    for name in ("encoder", "resampler", "projector"):
        parts[name] = without_weights(recipe[name], getattr(model, name))
        check_target(parts[name])
    parts["encoder_statistics"] = {"mean": list(model.encoder.mean), "std": list(model.encoder.std)}
    # Other back-ends need packages or devices that the machine which loads the model may lack.
    attention = model.llm.attention if model.llm.attention in ("eager", "sdpa") else "auto"
    parts["llm"] = {"config": model.llm.hf.config.to_dict(), "attention": attention}
    return PartsVLMConfig(
        parts=parts,
        image_token_id=model.image_token_id,
        image_size=image_size,
        image=image or {},
        tokens_per_view=model.num_visual_tokens(image_size),
        architectures=[PartsVLMForConditionalGeneration.__name__],
        auto_map={
            "AutoConfig": "remote_code.PartsVLMConfig",
            "AutoModel": "remote_code.PartsVLMForConditionalGeneration",
            "AutoModelForImageTextToText": "remote_code.PartsVLMForConditionalGeneration",
        },
    )


def without_weights(arguments: dict, part: nn.Module) -> dict:
    """Return the constructor call without its checkpoint, so that it builds the part with random weights.

    The folder holds the weights, and the original checkpoint may no longer exist.
    """
    out = {}
    for key, value in arguments.items():
        nested = isinstance(value, dict) and "_target_" in value
        out[key] = without_weights(value, getattr(part, key)) if nested else value
    if "pretrained" in out:
        out["pretrained"] = None
    out.pop("checkpoint", None)
    module, _, name = str(out["_target_"]).rpartition(".")
    if name == "from_pretrained":  # a transformers encoder: replace its path by its configuration
        fields = part.hf.config.to_dict()
        known = vars(AutoConfig.for_model(fields["model_type"]))
        own = {key: value for key, value in fields.items() if key in known and key not in ("model_type", "dtype")}
        out = {key: value for key, value in out.items() if key not in ("path", "dtype")} | {
            "_target_": f"{module}.from_config",
            "model_type": fields["model_type"],
            "config": own,
            "mean": list(part.mean),
            "std": list(part.std),
        }
    return out


def check_target(arguments: dict) -> None:
    """Raise ValueError unless all constructors are in `fastvlm.models`: the folder may be untrusted."""
    target = str(arguments.get("_target_", ""))
    if not target.startswith("fastvlm.models."):
        raise ValueError(f"config.json: _target_={target!r} is not part of fastvlm.models; only those are built")
    for value in arguments.values():
        if isinstance(value, dict) and "_target_" in value:
            check_target(value)


def construct(arguments: dict, **extra) -> nn.Module:
    """Call the constructor named in `arguments`, adding those of `extra` that it accepts."""
    import inspect

    check_target(arguments)
    module, _, name = arguments["_target_"].rpartition(".")
    constructor = getattr(importlib.import_module(module), name)
    known = inspect.signature(constructor).parameters
    extra = {key: value for key, value in extra.items() if key in known}
    nested = {
        key: construct(value) if isinstance(value, dict) and "_target_" in value else value
        for key, value in arguments.items()
        if not key.startswith("_")
    }
    if nested.get("pretrained", 0) is None and known["pretrained"].annotation in (bool, "bool"):
        nested["pretrained"] = False
    return constructor(**nested, **extra)


def refuse_arguments(given: dict, *, of: str) -> None:
    """Raise ValueError for arguments that transformers' method of that name takes and ours does not."""
    for name, value in given.items():
        if value is not None and value is not False and name not in IGNORED and not name.startswith("_"):
            raise ValueError(f"{of}({name}=...) is not supported by a saved VLM; leave {name} out")


def config_of(fields: dict) -> PreTrainedConfig:
    fields = {key: value for key, value in fields.items() if key not in ("transformers_version", "dtype")}
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def build_vlm(config: PartsVLMConfig, *, attention: str | None = None) -> VLM:
    """Build the model of a configuration, with random weights; `attention` replaces its language model's."""
    parts = config.parts
    state = torch.get_rng_state()
    encoder = construct(parts["encoder"])
    statistics = parts["encoder_statistics"]
    encoder.mean, encoder.std = tuple(statistics["mean"]), tuple(statistics["std"])
    resampler = construct(parts["resampler"], in_dim=encoder.out_dim)
    hf = AutoModelForCausalLM.from_config(config_of(parts["llm"]["config"]))
    llm = LanguageModel(hf, attention=attention or parts["llm"].get("attention", "auto"))
    if attention is not None:
        hf.config._attn_implementation = attention  # of its own `forward` and `generate`
    projector = construct(parts["projector"], in_dim=resampler.out_dim, out_dim=llm.dim)
    torch.set_rng_state(state)
    model = VLM(encoder, resampler, projector, llm, image_token_id=config.image_token_id)
    model.recipe = {name: parts[name] for name in ("encoder", "resampler", "projector")}
    return model


def write_folder(model: VLM, config: PartsVLMConfig, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, str(folder / WEIGHTS), metadata={"format": "pt"})
    config.save_pretrained(folder)
    (folder / "remote_code.py").write_text(REMOTE)


def device_of(device_map: Any) -> str | int | torch.device:
    """Return the one device that a `device_map` names; `auto` is a GPU if there is one.

    Raises:
        ValueError: it names several.
    """
    if isinstance(device_map, dict):
        if set(device_map) != {""}:
            raise ValueError("device_map: this model is not split over devices; name one, such as cuda:0")
        device_map = device_map[""]
    return ("cuda" if torch.cuda.is_available() else "cpu") if device_map == "auto" else device_map


def folder_of(path: str, *, subfolder: str = "", **hub) -> Path:
    """Return a local folder: `path` itself, or the downloaded snapshot of a hub id, or the `subfolder` of either.

    Args:
        hub: arguments of `snapshot_download`, such as `revision`.

    Raises:
        ValueError: `path` is neither a folder nor a hub id that can be downloaded.
    """
    if Path(path).is_dir():
        return Path(path) / subfolder
    from huggingface_hub import snapshot_download

    mend = "name a folder that save_pretrained wrote, or a hub id while online"
    patterns = [f"{subfolder}/*"] if subfolder else None
    snapshot = fetch(lambda: snapshot_download(path, allow_patterns=patterns, **hub), what=path, mend=mend)
    return Path(snapshot) / subfolder


def load_weights(model: VLM, folder: Path) -> VLM:
    """Load the folder's weights into the model and return it in eval mode.

    Raises:
        ValueError: the weights are missing or do not fit the model; the message lists the tensors.
    """
    path = folder / WEIGHTS
    if not path.exists():
        raise ValueError(f"{folder} holds no {WEIGHTS}; save the model there again")
    with safe_open(path, framework="pt") as stored:
        found = {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    wrong = [f"{k} is {found[k]} there and {wanted[k]} here" for k in found if k in wanted and found[k] != wanted[k]]
    wrong += [f"{key} is not in this model" for key in sorted(found.keys() - wanted.keys())]
    if not wrong:
        missing, _ = load_model(model, str(path), strict=False)
        wrong = [f"{key} is missing" for key in sorted(missing)]
    if wrong:
        more = f" and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        raise ValueError(f"{path} does not fit its config.json: {'; '.join(wrong[:LISTED])}{more}")
    return model.eval()


def load_vlm(path: str) -> tuple[VLM, PartsVLMConfig]:
    """Load the model of a folder or hub id in eval mode, and its configuration.

    Raises:
        ValueError: there is no model, it is of another type, or its weights do not fit.
    """
    folder = folder_of(path)
    if not (folder / "config.json").exists():
        raise ValueError(f"{path} holds no config.json; name a folder that save_pretrained wrote")
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind != PartsVLMConfig.model_type:
        raise ValueError(f"{path} holds a {kind}, no {PartsVLMConfig.model_type}; load it by vlm=auto vlm.path={path}")
    config = PartsVLMConfig.from_pretrained(folder)
    return load_weights(build_vlm(config), folder), config
