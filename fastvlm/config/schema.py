"""Schema of conf/train.yaml, conf/eval.yaml and conf/stage/: what can be configured beside constructor arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


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
    quantise: str | None = None  # what frozen linear layers are held in: one of QUANTISED in rules.py


@dataclass
class AugmentConfig:
    """Augmentation of training images; a source allows the kinds that keep its answers true (`Source(augment=...)`)."""

    crop: list[float] | None = None  # smallest and largest share of the area that is kept, such as [0.8, 1.0]
    jitter: float = 0.0  # of brightness, contrast and saturation, such as 0.2
    mirror: bool = False


@dataclass
class ImageConfig:
    """From an image file to a model's views: see `ImageTransform`."""

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
    """How every stage reads its data; none of it changes what is learned, except `on_change=replan`."""

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
    speed_images: int = 0  # asked about at each validation: time to first token, tokens/s as metrics; 0 for not


@dataclass
class EvalConfig:
    """conf/eval.yaml."""

    checkpoint: str = MISSING
    task: Any = MISSING
    hardware: Any = MISSING
    paths: Paths = field(default_factory=Paths)
    out: str | None = None
    predictions: str | None = None  # score these answers; the model is not asked
