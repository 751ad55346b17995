"""The schema of what is not a constructor, the command line, and one clear line for a user's mistake.

With `build.py` the only file that knows Hydra.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fastvlm.hardware import is_first_rank

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"


@dataclass
class Lora:
    """LoRA in the language model (Hu et al., arXiv:2106.09685)."""

    lr: float = MISSING
    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])


@dataclass
class LastLayers:
    num: int = MISSING
    lr: float = MISSING


METHODS = {
    "full": ("lr",),
    "frozen": (),
    "partial": ("lr", "num"),
    "lora": ("lr",),
    "dora": ("lr",),
}
QUANTISED = ("int8", "nf4", "fp4", "torchao_int8", "torchao_fp8", "torchao_int4")
DECAYS = ("cosine", "linear", "constant", "wsd", "wsd_sqrt")


@dataclass
class Adapt:
    """How one part learns in a stage; `adapt.encoder=frozen` is short for `adapt.encoder={method: frozen}`."""

    method: str = MISSING  # full, frozen, partial (the last `num` layers), lora, dora (arXiv:2402.09353)
    lr: float | None = None
    weight_decay: float | None = None  # of matrices and tables; the optimiser's own where null
    warmup_steps: int | None = None  # the stage's where null
    num: int | None = None
    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: list[str] | None = None  # last parts of layer names; null for every layer that takes an adapter
    quantise: str | None = None  # what frozen linear layers are held in: one of QUANTISED


@dataclass
class AugmentConfig:
    """What may happen to a training image; a source says which of it its answers bear (`Source(augment=...)`)."""

    crop: list[float] | None = None  # smallest and largest share of the area that is kept, such as [0.8, 1.0]
    jitter: float = 0.0  # of brightness, contrast and saturation, such as 0.2
    mirror: bool = False


@dataclass
class ImageConfig:
    """From an image file to the views a model takes: see `ImageTransform`."""

    fit: str = "pad"  # or crop, squash
    tiles: Any = None  # grids [[rows, columns], ...] to choose from by an image's size; each tile is a view
    padding: list[int] = field(default_factory=lambda: [124, 116, 104])  # bytes; ImageNet's mean
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass
class StageConfig:
    """One training phase. conf/stage/<name>.yaml fills it; every key can be set from the command line."""

    objective: Any = MISSING  # the Stage class and what only it takes
    parts: list[str] = field(
        default_factory=lambda: ["encoder", "resampler", "projector", "llm"]
    )  # what it computes with
    mixture: Any = MISSING
    # Pattern over parameter names -> learning rate, or {lr, weight_decay, warmup_steps}; null freezes.
    trainable: dict[str, Any] = field(default_factory=dict)
    adapt: dict[str, Any] = field(default_factory=dict)  # part -> an Adapt, or the name of a method that needs no rate
    lora: Any = None  # a Lora, or null; short for adapt.llm with method lora
    last_layers: Any = None  # a LastLayers, or null; short for adapt.llm with method partial
    steps: int | None = None  # optimiser steps; or epochs
    epochs: float | None = None  # passes over as many samples as the mixture holds
    image_size: int | None = 64  # side of a view, pixels; null: the pretrained model's own (vlm), and its `image`
    image: ImageConfig = field(default_factory=ImageConfig)
    batch_size: int = 32  # rows (packs, or samples where packing is off) of one optimiser step, over all ranks
    max_tokens: int = 256  # positions of a row
    max_images: int = 16  # views of a row: an image without tiles is one, else its global view and its tiles
    packing: bool = True
    pack_window: int | None = None  # samples packed together; null: a thousand, or those of a hundred rows
    sort_window: int = 0  # without packing: samples of like length share a step within windows of so many; 0 for not
    optimizer: Any = MISSING  # from conf/optimizer
    warmup_steps: int = 20
    decay: str = "cosine"  # or linear, constant, wsd, wsd_sqrt
    decay_steps: int | None = None  # of wsd: so many at the end; a fifth of the stage where null
    final: float = 0.1  # of the peak rate, at the end
    clip: float | None = 1.0
    validate_every: int | None = None  # optimiser steps; a stage always validates at its end
    val_samples: int = 256
    seed: int | None = None  # of this stage; the run's where null
    cache_features: bool = False  # a frozen encoder's outputs are written once and read in place of images


@dataclass
class DataConfig:
    """How every stage reads; nothing here decides what is learned, but for `replan`."""

    on_change: str = "refuse"  # data changed under an interrupted stage: refuse, replan (go on), restart
    max_skipped_share: float = 0.01  # so many of the samples read may be unreadable
    cache_mb: int = 256  # of encoded samples kept in memory, in each loader process
    longest_first: bool = False  # try the longest batch after the first step: it does not fit, or it never fails


@dataclass
class Paths:
    root: str = "${project_root:}"
    runs: str = "${oc.env:FASTVLM_RUNS,${project_root:}/runs}"
    data: str = "${oc.env:FASTVLM_DATA,${project_root:}/data}"


@dataclass
class TrainConfig:
    """conf/train.yaml. `experiment` is no field on purpose: an experiment without `@package _global_` is refused."""

    name: str = MISSING
    seed: int = 0
    part_seeds: dict[str, int] = field(default_factory=dict)  # part -> seed of its first weights, where not the run's
    study: Any = None  # what an experiment asks: its arms at each scale; see experiments/README.md
    arm: str | None = None  # of the study
    scale: str = "micro"  # of the study: micro (embedded data, CPU) or paper (the paper's own sizes, data and steps)
    objective: list[str] = field(default_factory=lambda: ["test/exact_match/mean"])  # metrics a sweeper optimises
    dry_run: bool = False  # everything but the data and the training: parts without weights, sources, plan sizes
    max_steps: int | None = None  # no stage runs longer: to see whether everything works
    overwrite: bool = False  # a run directory of another configuration is replaced, not refused
    paths: Paths = field(default_factory=Paths)
    tokenizer: Any = MISSING
    encoder: Any = MISSING
    resampler: Any = MISSING
    projector: Any = MISSING
    llm: Any = MISSING
    vlm: Any = None  # a whole pretrained model in place of the four parts
    stages: dict[str, StageConfig] = field(default_factory=dict)
    task: Any = None
    data: DataConfig = field(default_factory=DataConfig)
    hardware: Any = MISSING
    logger: Any = MISSING
    log_every: int = 20
    checkpoint_every: int = 200  # optimiser steps between two points a killed stage can go on from
    num_samples: int = 8  # held-out samples whose predictions are drawn at each validation


@dataclass
class EvalConfig:
    """conf/eval.yaml."""

    checkpoint: str = MISSING
    task: Any = MISSING
    hardware: Any = MISSING
    paths: Paths = field(default_factory=Paths)
    out: str | None = None
    predictions: str | None = None  # score these answers; the model is not asked


def run_name() -> str:
    """The run directory's default name: the pipeline, and what was changed on the command line.

    The same command has the same name, so that it finds its own run again.
    """
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    silent = r"\+*(name|hardware|logger|overwrite|pipeline|paths|stages\.\w+\.cache_features)\b"
    changed = [o for o in hydra.overrides.task if not re.match(silent, o)]
    label = ",".join([hydra.runtime.choices.get("pipeline", "run"), *sorted(o.lstrip("+") for o in changed)])
    label = re.sub(r"[^A-Za-z0-9_.,=@-]+", "_", label)
    if len(label) <= 80:
        return label
    return f"{label[:70]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"


# Below these stands a constructor call: whatever the constructor takes can be set, whether or not the YAML names it.
PARTS = "encoder|resampler|projector|llm|vlm|tokenizer|task|hardware|logger|mixture"
CALLS = rf"({PARTS}|stages\.\w+\.(objective|mixture|optimizer|trainable|adapt))\."


def relax(overrides: list[str]) -> list[str]:
    """`hardware.num_workers=0` works without a plus; `build.instantiate` refuses what the constructor does not take."""
    return [f"++{o}" if re.match(CALLS + r"[\w.*]+=|stages\.\w+\.(trainable|adapt)=", o) else o for o in overrides]


def register() -> None:
    """Make schemas and resolvers known to Hydra. Safe to call twice."""
    from hydra.core.config_store import ConfigStore

    OmegaConf.register_new_resolver("project_root", lambda: str(ROOT), replace=True)
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(name="eval_schema", node=EvalConfig)


def check(config: DictConfig) -> None:
    """Rules between keys, all told at once.

    Raises:
        ValueError: with one rule a line.
    """
    wrong = []
    for name, stage in config.get("stages", {}).items():
        where = f"stages.{name}"
        if config.get("max_steps"):
            stage.steps, stage.epochs = min(stage.steps or config.max_steps, config.max_steps), None
        if (stage.steps is None) == (stage.epochs is None):
            wrong.append(f"{where}: give exactly one of steps and epochs")
        for key in ("steps", "epochs", "batch_size", "max_tokens", "image_size", "validate_every"):
            if stage.get(key) is not None and stage[key] <= 0:
                wrong.append(f"{where}.{key}={stage[key]} must be above 0")
        if stage.get("cache_features") and "encoder" not in stage.parts:
            wrong.append(f"{where}.cache_features=true, but the stage computes with {', '.join(stage.parts)} alone")
        if stage.image_size is None and not config.get("vlm"):
            wrong.append(f"{where}.image_size=null is a pretrained model's own size; give a number, or choose a vlm")
        try:
            from fastvlm.build import build_transform

            build_transform(stage if stage.image_size else OmegaConf.merge(stage, {"image_size": 1}))
        except ValueError as error:
            wrong.append(f"{where}.{error}")
        if unknown := set(stage.parts) - {"encoder", "resampler", "projector", "llm"}:
            wrong.append(f"{where}.parts: {', '.join(unknown)} is none of encoder, resampler, projector, llm")
        # OmegaConf cannot merge into an optional dataclass that is null, so these two are checked here.
        for key, schema in (("lora", Lora), ("last_layers", LastLayers)):
            if stage.get(key) is not None:
                try:
                    stage[key] = OmegaConf.merge(OmegaConf.structured(schema), stage[key])
                except OmegaConfBaseException as error:
                    takes = ", ".join(schema.__dataclass_fields__)
                    wrong.append(f"{where}.{key}: {str(error).splitlines()[0]}; it takes {takes}")
                    continue
                wrong += [f"{where}.{key}.{missing} must be given" for missing in OmegaConf.missing_keys(stage[key])]
        wrong += wrong_adapt(stage, where)
        if stage.decay not in DECAYS:
            wrong.append(f"{where}.decay={stage.decay} is none of {', '.join(DECAYS)}")
        if stage.decay_steps is not None and not stage.decay.startswith("wsd"):
            wrong.append(
                f"{where}.decay_steps is for decay=wsd and wsd_sqrt; {stage.decay} decays over the whole stage"
            )
    if "data" in config and config.data.on_change not in ("refuse", "replan", "restart"):
        wrong.append(f"data.on_change={config.data.on_change} is none of refuse, replan, restart")
    if "stages" in config and not config.stages:
        wrong.append("the pipeline has no stages; choose one, such as pipeline=three_stage")
    if wrong:
        raise ValueError("\n".join(wrong))


def wrong_adapt(stage: DictConfig, where: str) -> list[str]:
    """What is wrong with a stage's `adapt`, whose entries are brought into full form on the way."""
    wrong = []
    for part, value in list((stage.get("adapt") or {}).items()):
        here = f"{where}.adapt.{part}"
        if value is None:
            del stage.adapt[part]
            continue
        if part not in ("encoder", "resampler", "projector", "llm"):
            wrong.append(f"{here}: {part} is none of encoder, resampler, projector, llm")
            continue
        value = {"method": value} if isinstance(value, str) else value
        try:
            stage.adapt[part] = one = OmegaConf.merge(OmegaConf.structured(Adapt), value)
        except OmegaConfBaseException as error:
            takes = ", ".join(Adapt.__dataclass_fields__)
            wrong.append(f"{here}: {str(error).splitlines()[0]}; it takes {takes}")
            continue
        if OmegaConf.is_missing(one, "method") or one.method not in METHODS:
            given = "missing" if OmegaConf.is_missing(one, "method") else one.method
            wrong.append(f"{here}.method={given} is none of {', '.join(METHODS)}")
            continue
        needs = [key for key in METHODS[one.method] if one[key] is None]
        wrong += [f"{here}.{key} must be given: method={one.method} needs it" for key in needs]
        if one.method == "frozen" and one.lr is not None:
            wrong.append(f"{here}.lr={one.lr:g}, but method=frozen; set method=full, or leave the rate out")
        if one.quantise is not None and one.quantise not in QUANTISED:
            wrong.append(f"{here}.quantise={one.quantise} is none of {', '.join(QUANTISED)}")
        if one.quantise is not None and one.method == "full":
            wrong.append(f"{here}.quantise={one.quantise}, but method=full leaves nothing frozen; set method=lora")
        if one.quantise is not None and part not in ("encoder", "llm"):
            wrong.append(f"{here}.quantise: only encoder and llm are worth it; leave it out")
        clash = [key for key in (part, *(["lora", "last_layers"] if part == "llm" else [])) if given_too(stage, key)]
        wrong += [f"{here} and {where}.{'trainable.' * (key == part)}{key} both say how {part} learns; set one to null"
                  for key in clash]  # fmt: skip
    return wrong


def given_too(stage: DictConfig, key: str) -> bool:
    if key in ("lora", "last_layers"):
        return stage.get(key) is not None
    return stage.trainable.get(key) is not None


def compose(config_name: str = "train", overrides: list[str] = ()) -> DictConfig:
    """Compose without a command line (tests, notebooks, tools)."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from fastvlm.study.arms import expand

    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = relax(expand(list(overrides)))
        if config_name == "train" and not any(o.startswith("name=") for o in overrides):
            overrides.append("name=composed")
        return hydra_compose(config_name, overrides)


def take_list(group: str) -> list[str]:
    """The choices of a group given as a list, `task=[vqav2,textvqa]`, with the command line left at the first of them.

    Hydra itself would merge them into one; `compose_each` makes one configuration of each.
    """
    for i, argument in enumerate(sys.argv):
        if match := re.fullmatch(rf"{group}=\[([\w\s,/-]*)\]", argument):
            names = [name.strip() for name in match[1].split(",") if name.strip()]
            if names:
                sys.argv[i] = f"{group}={names[0]}"
                return list(dict.fromkeys(names))
    return []


def compose_each(config: DictConfig, group: str, names: list[str]) -> dict[str, DictConfig]:
    """The configuration once for every choice of a group, by choice; all other overrides hold for each."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    if len(names) < 2:
        return {str(hydra.runtime.choices.get(group)): config}
    others = [o for o in hydra.overrides.task if not re.match(rf"\+*{group}=", o)]
    return {name: compose(hydra.job.config_name, [*others, f"{group}={name}"]) for name in names}


def explain(error: BaseException, config_name: str) -> str:
    """A composition error as one line with the nearest right name."""
    text = str(error)
    cause = error.__cause__
    full = f"{text}\n{cause}" if cause is not None else text
    if match := re.search(r"Could not find '([^']+)'", full):
        group, _, choice = match[1].rpartition("/")
        folder = CONF / group
        options = sorted(p.stem for p in folder.glob("*.yaml")) if folder.is_dir() else []
        if group == "experiment":
            from fastvlm.study.arms import STUDIES

            options = sorted(p.parent.name for p in STUDIES.glob("*/study.yaml"))
        near = difflib.get_close_matches(choice, options, 1, 0.3)
        hint = f"; did you mean {group}={near[0]}?" if near else ""
        return f"{group or config_name}={choice} is no option{hint} Options: {', '.join(options) or 'none'}"
    if match := re.search(r"Could not override '([^']+)'", full):
        return f"unknown key {match[1]}{nearest(match[1].split('@')[0], config_name)}"
    if match := re.search(r"In '([^']+)':.*?(?:Key '([^']+)'|full_key: (\S+))", full, re.S):
        key = re.search(r"full_key: (\S+)", full)
        name = key[1] if key else match[2]
        reason = re.search(r"(Value '.*|Key '.*)", full)
        hint = nearest(name, config_name)
        return f"conf/{match[1]}.yaml: {reason[1] if reason else 'unknown key'} at {name}{hint}"
    reason = text.splitlines()[0] if text else type(error).__name__
    detail = str(cause).splitlines()[0] if cause is not None and str(cause) else ""
    key = re.search(r"full_key: (\S+)", full)
    return " ".join(
        filter(None, [reason, f"({detail})" if detail and detail not in reason else "", f"at {key[1]}" if key else ""])
    )


def nearest(key: str, config_name: str) -> str:
    try:
        plain = OmegaConf.to_container(compose(config_name), resolve=False)
    except Exception:  # noqa: BLE001  the configuration itself is broken: no hint to give
        return ""
    keys = list(dotted(plain))
    near = difflib.get_close_matches(key.lstrip("+~"), keys, 1, 0.6)
    groups = [p.name for p in CONF.iterdir() if p.is_dir()]
    near = near or difflib.get_close_matches(key.lstrip("+~"), groups, 1, 0.6)
    return f"; did you mean {near[0]}?" if near else f"; see `python {config_name}.py --cfg job` for every key"


def dotted(node, prefix: str = ""):
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{prefix}{key}"
            yield from dotted(value, f"{prefix}{key}.")


def command(config_name: str, task: Callable[[DictConfig], Any]) -> None:
    """Run `task` under Hydra's command line; a user's mistake is one line on stderr and exit status 2."""
    import hydra

    from fastvlm.study.arms import expand

    register()
    typed = list(sys.argv)
    try:
        sys.argv[1:] = relax(expand(sys.argv[1:]))
    except ValueError as error:
        refuse(str(error))
    # Exceptions reach us whole, and we say what they mean; cells and ranks inherit both variables.
    show_traceback = "HYDRA_FULL_ERROR" in os.environ and "FASTVLM_ONE_LINE" not in os.environ
    if not show_traceback:
        os.environ |= {"HYDRA_FULL_ERROR": "1", "FASTVLM_ONE_LINE": "1"}

    def checked(config: DictConfig):
        try:
            config = with_arm(config)
            check(config)
            value = task(config)
        except ValueError as error:
            if show_traceback:
                raise
            refuse(str(error))
        except (RuntimeError, EOFError, OSError) as error:
            if show_traceback or not loader_died(error):
                raise
            what = str(error).splitlines()[0].strip() if str(error) else type(error).__name__
            refuse(
                f"a loader process was killed ({what}); out of memory? The same command goes on from the last "
                f"checkpoint: {shlex.join(typed)}"
            )
        except KeyboardInterrupt:
            print(f"\ninterrupted; the same command goes on from here: {shlex.join(typed)}", file=sys.stderr)
            sys.exit(130)
        if (result := os.environ.get("FASTVLM_CELL_RESULT")) and is_first_rank():
            Path(result).write_text(json.dumps({"value": value}))
        return value

    try:
        hydra.main(config_path=str(CONF), config_name=config_name, version_base="1.3")(checked)()
    except KeyboardInterrupt:  # a sweep: its cells have said nothing of it
        print(f"\ninterrupted; finished cells are kept, the same command goes on: {shlex.join(typed)}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if show_traceback:
            raise
        if type(error).__module__.startswith(("hydra", "omegaconf")):
            refuse(explain(error, config_name))
        if isinstance(error, ValueError):  # a sweep whose cells failed
            refuse(str(error))
        raise


def with_arm(config: DictConfig) -> DictConfig:
    """The configuration with its study's arm applied: a launcher that runs cells in processes of its own (joblib,
    submitit) hands them on as they were composed, without it.

    Raises:
        ValueError: a study without an arm.
    """
    study = config.get("study")
    if study is None or study.get("applied"):
        return config
    if config.arm is None:
        if config.dry_run:
            return config
        have = ", ".join(study.get(config.scale, {}).get("arms", {}))
        raise ValueError(f"experiment={study.name} is a grid: add -m for all its cells, or arm=<one of {have}>")
    return compose("train", typed_overrides())


def typed_overrides() -> list[str]:
    """The overrides of the command that runs, without Hydra's own; none outside one."""
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def loader_died(error: BaseException) -> bool:
    """Whether a process of a DataLoader was killed: torch says so, or what it was handing over ends in the middle."""
    if isinstance(error, RuntimeError):
        return re.match(r"DataLoader worker \(pid.* (killed|exited)", str(error)) is not None
    frames = [frame.filename.replace(os.sep, "/") for frame in traceback.extract_tb(error.__traceback__)]
    in_loader = any(name.endswith("torch/utils/data/dataloader.py") for name in frames)
    handing = any("/multiprocessing/" in name for name in frames)
    return in_loader and handing and isinstance(error, (EOFError, ConnectionError, FileNotFoundError))


def refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
