"""Rules between keys that a schema cannot express."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fastvlm.config.composition import typed_overrides
from fastvlm.config.schema import Adapt, LastLayers, Lora

PARTS = ("encoder", "resampler", "projector", "llm")
METHODS = {  # how a part learns -> keys it requires
    "full": ("lr",),
    "frozen": (),
    "partial": ("lr", "num"),
    "lora": ("lr",),
    "dora": ("lr",),
}
QUANTISED = ("int8", "nf4", "fp4", "torchao_int8", "torchao_fp8", "torchao_int4")
DECAYS = ("cosine", "linear", "constant", "wsd", "wsd_sqrt")
ON_CHANGE = ("refuse", "replan", "restart")


def check(config: DictConfig, *, images: bool = True) -> None:
    """Report all broken rules at once; expand `max_steps` and the short forms of a stage in place.

    Args:
        images: also check the stages' `image`, which imports torch.

    Raises:
        ValueError: one line per broken rule.
    """
    wrong = []
    if OmegaConf.is_missing(config, "checkpoint"):
        wrong.append("checkpoint=<run directory> must be given, such as checkpoint=runs/latest")
    if config.get("max_steps") is not None and config.max_steps < 1:
        wrong.append(f"max_steps={config.max_steps} must be at least 1, or null for the stages' own steps")
    for name, stage in config.get("stages", {}).items():
        if config.get("max_steps"):
            stage.steps, stage.epochs = min(stage.steps or config.max_steps, config.max_steps), None
        if calls := list(wrong_calls(stage, where=f"stages.{name}")):
            wrong += calls
            continue
        wrong += wrong_stage(stage, where=f"stages.{name}", pretrained=bool(config.get("vlm")))
        wrong += wrong_image(stage, where=f"stages.{name}") if images else ()
    if config.get("speed_images", 0) < 0:
        wrong.append(f"speed_images={config.speed_images} must be a number of images, or 0 to measure no speed")
    if "data" in config and config.data.on_change not in ON_CHANGE:
        wrong.append(f"data.on_change={config.data.on_change} is not one of {', '.join(ON_CHANGE)}")
    if "stages" in config and not config.stages:
        wrong.append("the pipeline has no stages; choose one, such as pipeline=three_stage")
    for key in ("log_every", "checkpoint_every"):
        if config.get(key, 1) < 1:
            wrong.append(f"{key}={config[key]} must be at least 1")
    if unknown := sorted(set(config.get("part_seeds", {})) - set(PARTS)):
        wrong.append(f"part_seeds.{unknown[0]}={config.part_seeds[unknown[0]]}: the parts are {', '.join(PARTS)}")
    if config.get("vlm"):
        own = [o.lstrip("+") for o in typed_overrides() if re.match(rf"\+*({'|'.join(PARTS)})[.=@]", o)]
        wrong += [f"vlm brings its own parts; leave {' '.join(own)} out"] if own else []
    if wrong:
        raise ValueError("\n".join(wrong))


def wrong_calls(stage: DictConfig, *, where: str) -> Iterator[str]:
    """Yield what is wrong with the constructor calls of a stage: missing, or a name in place of a mapping."""
    for key in ("objective", "mixture", "optimizer"):
        if OmegaConf.is_missing(stage, key):
            yield f"{where}.{key} must be given; conf/stage/ has stages in full"
        elif isinstance(stage[key], str):
            name, wanted = stage[key], f"choose a file of conf/{key}/ by {key}@{where}.{key}={stage[key]}"
            if key == "objective":
                wanted = f"name the class by {where}.objective._target_={name}"
            yield f"{where}.{key} is a mapping, {name} is a name: {wanted}"


def wrong_stage(stage: DictConfig, *, where: str, pretrained: bool) -> Iterator[str]:
    """Yield what is wrong with a stage; `pretrained`: its model brings its own image size."""
    if (stage.steps is None) == (stage.epochs is None):
        yield f"{where}: give exactly one of steps and epochs"
    for key in ("steps", "epochs", "batch_size", "max_tokens", "image_size", "validate_every"):
        if stage.get(key) is not None and stage[key] <= 0:
            yield f"{where}.{key}={stage[key]} must be above 0"
    for key in ("warmup_steps", "decay_steps", "final", "val_samples", "sort_window"):
        if stage.get(key) is not None and stage[key] < 0:
            yield f"{where}.{key}={stage[key]} must not be below 0"
    if stage.clip is not None and stage.clip <= 0:
        yield f"{where}.clip={stage.clip:g} must be above 0, or null to leave gradients as they are"
    if stage.get("cache_features") and "encoder" not in stage.parts:
        yield f"{where}.cache_features=true, but the stage computes with {', '.join(stage.parts)} alone"
    if stage.image_size is None and not pretrained:
        yield f"{where}.image_size=null is a pretrained model's own size; give a number, or choose a vlm"
    if unknown := set(stage.parts) - set(PARTS):
        yield f"{where}.parts: {', '.join(unknown)} is not one of {', '.join(PARTS)}"
    yield from wrong_patterns(stage, where=where)
    yield from wrong_short_forms(stage, where=where)
    yield from wrong_adapt(stage, where=where)
    if stage.decay not in DECAYS:
        yield f"{where}.decay={stage.decay} is not one of {', '.join(DECAYS)}"
    if stage.decay_steps is not None and not stage.decay.startswith("wsd"):
        yield f"{where}.decay_steps is for decay=wsd and wsd_sqrt; {stage.decay} decays over the whole stage"


def wrong_patterns(stage: DictConfig, *, where: str) -> Iterator[str]:
    """Yield patterns of `trainable` that match no part and rates that are not numbers, before any stage has run."""
    for pattern, rate in stage.trainable.items():
        if isinstance(rate, str | bool):
            yield f"{where}.trainable.{pattern}={rate} is not a learning rate; give a number, or null to freeze"
        part = str(pattern).split(".")[0]
        if part not in PARTS and not set(part) & set("*?["):
            near = difflib.get_close_matches(part, PARTS, 1, 0.4)
            hint = f"; the nearest name is {near[0]}" if near else f"; the parts are {', '.join(PARTS)}"
            yield f"{where}.trainable: the pattern {pattern!r} matches no parameter of the model{hint}"


def wrong_image(stage: DictConfig, *, where: str) -> Iterator[str]:
    from fastvlm.build import build_transform

    try:
        build_transform(stage if stage.image_size else OmegaConf.merge(stage, {"image_size": 1}))
    except ValueError as error:
        yield f"{where}.{error}"


def wrong_short_forms(stage: DictConfig, *, where: str) -> Iterator[str]:
    """Yield what is wrong with `lora` and `last_layers`: OmegaConf cannot merge into a dataclass that may be null."""
    for key, schema in (("lora", Lora), ("last_layers", LastLayers)):
        if stage.get(key) is None:
            continue
        try:
            stage[key] = OmegaConf.merge(OmegaConf.structured(schema), stage[key])
        except OmegaConfBaseException as error:
            yield not_taken(f"{where}.{key}", schema, error)
            continue
        for missing in OmegaConf.missing_keys(stage[key]):
            yield f"{where}.{key}.{missing} must be given"


def wrong_adapt(stage: DictConfig, *, where: str) -> Iterator[str]:
    """Yield what is wrong with `adapt`, and expand its entries to their full form."""
    for part, value in list((stage.get("adapt") or {}).items()):
        here = f"{where}.adapt.{part}"
        if value is None:
            del stage.adapt[part]
            continue
        if part not in PARTS:
            yield f"{here}: {part} is not one of {', '.join(PARTS)}"
            continue
        value = {"method": value} if isinstance(value, str) else value
        try:
            stage.adapt[part] = OmegaConf.merge(OmegaConf.structured(Adapt), value)
        except OmegaConfBaseException as error:
            yield not_taken(here, Adapt, error)
            continue
        yield from wrong_method(stage, part, where=where)


def wrong_method(stage: DictConfig, part: str, *, where: str) -> Iterator[str]:
    """Yield what is wrong with how one part learns; its entry in `adapt` is in full form."""
    here, adapt = f"{where}.adapt.{part}", stage.adapt[part]
    given = "missing" if OmegaConf.is_missing(adapt, "method") else adapt.method
    if given not in METHODS:
        yield f"{here}.method={given} is not one of {', '.join(METHODS)}"
        return
    for key in METHODS[adapt.method]:
        if adapt[key] is None:
            yield f"{here}.{key} must be given: method={adapt.method} needs it"
    if adapt.method == "frozen" and adapt.lr is not None:
        yield f"{here}.lr={adapt.lr:g}, but method=frozen; set method=full, or leave the rate out"
    if adapt.quantise is not None:
        if adapt.quantise not in QUANTISED:
            yield f"{here}.quantise={adapt.quantise} is not one of {', '.join(QUANTISED)}"
        if adapt.method == "full":
            yield f"{here}.quantise={adapt.quantise}, but method=full leaves nothing frozen; set method=lora"
        if part not in ("encoder", "llm"):
            yield f"{here}.quantise: only encoder and llm are worth it; leave it out"
    if stage.trainable.get(part) is not None:
        yield f"{here} and {where}.trainable.{part} both say how {part} learns; set one to null"
    for key in ("lora", "last_layers"):
        if part == "llm" and stage.get(key) is not None:
            yield f"{here} and {where}.{key} both say how {part} learns; set one to null"


def not_taken(where: str, schema: type, error: OmegaConfBaseException) -> str:
    return f"{where}: {str(error).splitlines()[0]}; it takes {', '.join(schema.__dataclass_fields__)}"
