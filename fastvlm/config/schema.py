"""Schema of conf/train.yaml, conf/eval.yaml and conf/stage/: every key that is not a constructor argument."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

OBJECTIVE = "test/exact_match/mean"  # a metric of the embedded tasks


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
    weight_decay: float | None = None  # of matrices and embeddings; null: the optimiser's
    warmup_steps: int | None = None  # null: the stage's
    num: int | None = None
    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: list[str] | None = None  # last components of layer names; null: every layer that can have an adapter
    quantise: str | None = None  # storage format of frozen linear layers: one of QUANTISED in rules.py


@dataclass
class AugmentConfig:
    """Augmentation of training images; a source allows the kinds that keep its answers true (`Source(augment=...)`)."""

    crop: list[float] | None = None  # smallest and largest share of the area to keep, such as [0.8, 1.0]
    jitter: float = 0.0  # of brightness, contrast and saturation, such as 0.2
    mirror: bool = False


@dataclass
class ImageConfig:
    """How an image file becomes a model's views; see `ImageTransform`."""

    fit: str = "pad"  # or crop, squash
    tiles: Any = None  # grids [[rows, columns], ...] to choose from by an image's size; each tile is a view
    padding: list[int] = field(default_factory=lambda: [124, 116, 104])  # RGB, 0 to 255; ImageNet's mean
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass
class StageConfig:
    """One training phase, filled by conf/stage/<name>.yaml; every key can be set from the command line."""

    objective: Any = MISSING  # the Stage class and its own arguments
    parts: list[str] = field(
        default_factory=lambda: ["encoder", "resampler", "projector", "llm"]
    )  # parts that it computes with
    mixture: Any = MISSING
    # Pattern over parameter names -> learning rate, or {lr, weight_decay, warmup_steps}; null freezes.
    trainable: dict[str, Any] = field(default_factory=dict)
    adapt: dict[str, Any] = field(default_factory=dict)  # part -> an Adapt, or only a method that needs no rate
    lora: Any = None  # a Lora, or null; short for adapt.llm with method lora
    last_layers: Any = None  # a LastLayers, or null; short for adapt.llm with method partial
    steps: int | None = None  # optimiser steps; give either this or epochs
    epochs: float | None = None  # one epoch is as many samples as the mixture holds
    image_size: int | None = 64  # side of a view, pixels; null: size and `image` of the pretrained model (vlm)
    image: ImageConfig = field(default_factory=ImageConfig)
    batch_size: int = 32  # rows (packs, or samples where packing is off) of one optimiser step, over all ranks
    max_tokens: int = 256  # positions of a row
    max_images: int = 16  # views of a row: one per image, or with tiles its global view and each tile
    packing: bool = True
    pack_window: int | None = None  # samples packed together; null: 1,000, or more if they fill fewer than 100 rows
    sort_window: int = 0  # without packing: size of windows in which samples of similar length share a step; 0: off
    optimizer: Any = MISSING  # from conf/optimizer
    warmup_steps: int = 20
    decay: str = "cosine"  # or linear, constant, wsd, wsd_sqrt
    decay_steps: int | None = None  # of wsd: steps of decay at the end; null: a fifth of the stage
    final: float = 0.1  # learning rate at the end, as a share of the peak
    clip: float | None = 1.0  # gradient norm
    validate_every: int | None = None  # optimiser steps; a stage always validates at its end
    val_samples: int = 256
    seed: int | None = None  # of this stage; null: the run's
    cache_features: bool = False  # compute a frozen encoder's outputs once and read them in place of images


@dataclass
class DataConfig:
    """How every stage reads its data; nothing here changes what is learned, except `on_change=replan`."""

    on_change: str = "refuse"  # if data changed under an interrupted stage: refuse, replan (continue), restart
    max_skipped_share: float = 0.01  # the run stops if more of a source's samples or shards, or of those read, fails
    cache_mb: int = 256  # MiB of encoded samples kept in memory, in each loader process
    longest_first: bool = False  # run the largest batches after the first step, so that memory runs out then or never


@dataclass
class Paths:
    root: str = "${project_root:}"
    runs: str = "${oc.env:FASTVLM_RUNS,${project_root:}/runs}"
    data: str = "${oc.env:FASTVLM_DATA,${project_root:}/data}"


@dataclass
class TrainConfig:
    """conf/train.yaml. `experiment` is not a field, so that an experiment without `@package _global_` is refused."""

    name: str = MISSING
    seed: int = 0
    part_seeds: dict[str, int] = field(default_factory=dict)  # part -> seed of its initial weights, if not the run's
    study: Any = None  # an experiment's arms at each scale; see CONTRIBUTING.md
    arm: str | None = None  # of the study
    scale: str = "micro"  # of the study: micro (embedded data, CPU) or paper (the paper's sizes and steps)
    objective: list[str] = field(default_factory=lambda: [OBJECTIVE])  # metrics a sweeper optimises
    dry_run: bool = False  # check parts (without weights), sources and sizes; read no data, train nothing
    max_steps: int | None = None  # upper bound on every stage's steps, to test whether everything works
    overwrite: bool = False  # replace a run directory of another configuration instead of refusing it
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
    checkpoint_every: int = 200  # optimiser steps between checkpoints, from which a killed stage resumes
    num_samples: int = 8  # held-out samples whose predictions are drawn at each validation
    speed_images: int = 0  # images to measure time to first token and tokens/s with at each validation; 0: off


@dataclass
class EvalConfig:
    """conf/eval.yaml."""

    checkpoint: str = MISSING
    task: Any = MISSING
    hardware: Any = MISSING
    paths: Paths = field(default_factory=Paths)
    out: str | None = None
    predictions: str | None = None  # score the answers in this file; the model is not run
