"""Build objects from the configuration. Every `_target_` goes through `instantiate`."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from fastvlm.config import ROOT, ImageConfig
from fastvlm.config.composition import register
from fastvlm.config.schema import Paths
from fastvlm.identity import replace_folders
from fastvlm.tokens import OWN, Tokenizer


def instantiate(config: DictConfig | dict, *, key: str, **extra) -> Any:
    """Call the constructor that a configuration names.

    Args:
        key: the configuration's key, for messages (`encoder`, `stages.align.objective`).
        extra: arguments that are not in the configuration (widths, the model); those it does not accept are dropped.

    Raises:
        ValueError: an argument is unknown (the message names the nearest known one), missing, or contradicts `extra`.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate as hydra_instantiate

    config = OmegaConf.create(config) if isinstance(config, dict) else config
    if not config.get("_target_"):
        raise ValueError(f"{key} has no _target_ (the constructor it calls)")
    parameters = check_call(config, key=key)
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        extra = {name: value for name, value in extra.items() if name in parameters}
    for name, value in extra.items():
        if isinstance(value, int) and config.get(name) not in (None, value):
            raise ValueError(
                f"{key}.{name}={config.get(name)}, but what stands beside it needs {value}: leave {key}.{name} out, "
                "it is handed on from part to part"
            )
    if missing := OmegaConf.missing_keys(config):
        raise ValueError(f"{key}.{sorted(missing)[0]} must be given: {config._target_} cannot do without")
    try:
        return hydra_instantiate(config, _convert_="all", **extra)
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError):  # the constructor's own message, without Hydra's
            raise error.__cause__ from None
        raise


def check_call(config: DictConfig, *, key: str) -> Mapping[str, inspect.Parameter]:
    """Raise ValueError for unknown arguments, nested calls included; return the constructor's parameters."""
    from hydra.utils import get_object

    for name, value in config.items():
        if isinstance(value, DictConfig):
            check_call(value, key=f"{key}.{name}")
    target = config.get("_target_")
    if not target:
        return {}
    try:
        constructor = get_object(target)
    except Exception as error:  # noqa: BLE001  whatever importing the user's module raises
        raise ValueError(f"{key}._target_={target} cannot be imported: {error}") from None
    parameters = inspect.signature(constructor).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in config:
            if not str(name).startswith("_") and name not in parameters:
                near = difflib.get_close_matches(str(name), parameters, 1)
                hint = f"; did you mean {key}.{near[0]}?" if near else f"; it takes {', '.join(parameters)}"
                raise ValueError(f"unknown key {key}.{name}: {target} has no such argument{hint}")
    return parameters


def seed_of(*parts: Any) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(parts, default=str).encode()).digest()[:4], "big")


def part_seed(config: DictConfig, part: str) -> int:
    """Return the seed of a part's initial weights: the run's, unless `part_seeds` names the part."""
    return (config.get("part_seeds") or {}).get(part, config.seed)


def build_transform(config: DictConfig):
    """Build the image transform of a stage, or of the last stage of a run opened by `load_run`."""
    from fastvlm.data.augment import Augmentation
    from fastvlm.data.transforms import ImageTransform

    options = OmegaConf.to_container(config.image, resolve=True) if config.get("image") is not None else {}
    augment = options.pop("augment", None)
    return ImageTransform(image_size=config.image_size, augment=Augmentation(**augment) if augment else None, **options)


def build_tokenizer(config: DictConfig) -> Tokenizer:
    ensure_embedded(config)
    return instantiate(config.tokenizer, key="tokenizer")


def build_model(config: DictConfig, tokenizer: Tokenizer):
    """Build the VLM of a configuration.

    Each part initialises its weights from its own seed, so exchanging one does not change the others' initial weights.
    """
    from fastvlm.models.vlm import VLM

    if config.get("vlm"):
        return instantiate(config.vlm, key="vlm", tokenizer=tokenizer, vocab_size=len(tokenizer))

    def part(name: str, **extra):
        torch.manual_seed(seed_of(part_seed(config, name), name))
        return instantiate(config[name], key=name, **extra)

    state = torch.get_rng_state()
    encoder = part("encoder")
    resampler = part("resampler", in_dim=encoder.out_dim)
    llm = part("llm", vocab_size=len(tokenizer))
    projector = part("projector", in_dim=resampler.out_dim, out_dim=llm.dim)
    torch.set_rng_state(state)
    model = VLM(encoder, resampler, projector, llm, image_token_id=tokenizer.image_id)
    model.recipe = {name: OmegaConf.to_container(config[name], resolve=True) for name in model.parts}
    return model


def build_task(config: DictConfig):
    """Build the evaluation task of a configuration."""
    return instantiate(config, key="task")


def settle_views(config: DictConfig) -> None:
    """Fill in the pretrained model's image size and transform for stages whose `image_size` is null."""
    if not config.get("vlm"):
        return
    for part in ("encoder", "resampler", "projector", "llm"):
        config[part] = None
    unsettled = [stage for stage in config.stages.values() if stage.image_size is None]
    if not unsettled:
        return
    from fastvlm.models.pretrained.views import views_at

    key = "path" if config.vlm.get("path") else "clip"
    views = views_at(config.vlm[key], key=f"vlm.{key}")
    for stage in unsettled:
        stage.image_size = views.image_size
        if stage.image == OmegaConf.structured(ImageConfig):
            stage.image = OmegaConf.merge(stage.image, views.image)


def ensure_embedded(config: DictConfig) -> None:
    """Build the embedded data set if the configuration uses it and it does not exist yet (seconds, no download)."""
    folder = Path(config.paths.data) / "embedded"
    if (folder / "DONE.json").exists():
        return
    used = map(Path, strings(OmegaConf.to_container(config, resolve=True, throw_on_missing=False)))
    if not any(path.is_relative_to(folder) for path in used):
        return
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from data.prepare import prepare

    prepare("embedded", out=folder)


def strings(value: Any) -> Iterator[str]:
    """Yield every string of nested dictionaries and lists, keys left out."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)
    elif isinstance(value, str):
        yield value


def read_run(run: str | Path) -> DictConfig:
    """Read the configuration of a run; folders of its `paths` that are gone are those of the present environment.

    Raises:
        ValueError: no such run, or its config.yaml cannot be read.
    """
    path = Path(run) / "config.yaml"
    if not path.exists():
        raise ValueError(
            f"{run} holds no run (config.yaml is missing); give a directory below runs/, such as runs/latest"
        )
    config = load_yaml(path)
    gone = {name: folder for name, folder in config.get("paths", {}).items() if not Path(folder).exists()}
    if not gone:
        return config
    register()
    here = OmegaConf.to_container(OmegaConf.structured(Paths), resolve=True)
    moved = {folder: here[name] for name, folder in gone.items()}
    return OmegaConf.create(replace_folders(OmegaConf.to_container(config), moved))


def load_yaml(path: Path) -> DictConfig:
    """Load a YAML file.

    Raises:
        ValueError: the file cannot be read as YAML.
    """
    try:
        return OmegaConf.load(path)
    except (YAMLError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]}); mend or delete it") from None


def load_tokenizer(run: str | Path) -> Tokenizer:
    """Load the tokenizer of a run or of a saved model, without the model."""
    return saved_tokenizer(Path(run)) if is_saved(Path(run)) else build_tokenizer(read_run(run))


def is_saved(folder: Path) -> bool:
    """Whether a folder is a saved model in the format of `transformers` rather than a run."""
    return not (folder / "config.yaml").exists() and (folder / "config.json").exists()


def saved_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a saved model, with its own chat template."""
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    return Tokenizer(str(folder), template=kind if kind == "paligemma" else OWN, image_token=OWN)


def load_run(run: str | Path, *, device: str = "cpu"):
    """Load model (in eval mode), tokenizer and configuration of a finished run or of a saved model.

    Raises:
        ValueError: no such run, its last stage has not finished, or a handoff it refers to is missing.
    """
    from fastvlm.callbacks.handoff import load_component, read_manifest

    run = Path(run)
    if is_saved(run):
        return load_saved(run, device=device)
    config = read_run(run)
    lineage = run / "lineage.json"
    if not lineage.exists():
        raise ValueError(f"{run}: its stages have not finished; run the same train command again")
    tokenizer = build_tokenizer(config)
    model = build_model(config, tokenizer)
    for name, folder in json.loads(lineage.read_text())["components"].items():
        folder = (run / folder).resolve()
        manifest = read_manifest(folder)
        if manifest is None:
            raise ValueError(f"{folder}: the handoff that {run} names is gone; run the same train command again")
        load_component(model.parts[name], name, folder, manifest, tokenizer=tokenizer.fingerprint)
    last = seeing_stage(config.stages)
    config.image_size, config.image = last.image_size, last.get("image")
    return model.to(device).eval(), tokenizer, config


def seeing_stage(stages: DictConfig) -> DictConfig:
    """Return the last stage in which the language model reads images, else the last.

    Its image size and views are those that a finished run is asked with.
    """
    all_stages = list(stages.values())
    return next((stage for stage in reversed(all_stages) if {"encoder", "llm"} <= set(stage.parts)), all_stages[-1])


def load_saved(folder: Path, *, device: str = "cpu"):
    """Load a saved model as `load_run` does: a saved `VLM`, or a pretrained model of `transformers`."""
    from fastvlm.models.pretrained import from_pretrained
    from fastvlm.models.pretrained.views import views_at
    from fastvlm.models.saved import PartsVLMConfig, load_vlm

    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind == PartsVLMConfig.model_type:
        model, saved = load_vlm(str(folder))
        views = {"image_size": saved.image_size, "image": saved.image}
    else:
        model, own = from_pretrained(str(folder)), views_at(str(folder), key="run")
        views = {"image_size": own.image_size, "image": own.image}
    return model.to(device).eval(), saved_tokenizer(folder), OmegaConf.create(views)
