"""Read the settings of `ImageTransform` that match a pretrained model's own image processor."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from transformers import AutoConfig, AutoImageProcessor, PreTrainedConfig
from transformers.image_utils import OPENAI_CLIP_MEAN

from fastvlm.models.hub import fetch
from fastvlm.models.pretrained.originals import original_config, processor_of


@dataclass(frozen=True)
class Views:
    """How a pretrained model's images become views.

    Args:
        mean, std: pixel statistics, for values in [0, 1].
        image_size: side of a view in pixels.
        image: keys of a stage's `image` (`ImageConfig`).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    image: dict = field(default_factory=dict)


def views_at(path: str, *, key: str = "vlm.path") -> Views:
    """Return the views of the model at a path, without reading its weights."""
    if (raw := original_config(path)) is not None:
        return original_views(raw)
    mend = "name a folder with config.json, or a hub id while online"
    return read_views(path, fetch(lambda: AutoConfig.from_pretrained(path), what=f"{key}={path}", mend=mend))


def read_views(path: str, config: PreTrainedConfig) -> Views:
    """Read a model's views from its configuration and its image processor's.

    Args:
        path: the model's folder or hub id.

    Raises:
        ValueError: there is no image processor.
    """
    if original_config(path) is not None:
        processor = processor_of(config, path).image_processor
    else:
        processor = fetch(
            lambda: AutoImageProcessor.from_pretrained(path),
            what=f"vlm.path={path}",
            mend="the folder needs its preprocessor_config.json or processor_config.json",
        )
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    padding = [int(255 * value) for value in mean]  # what these processors pad with
    kind, vision = config.model_type, getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None)
    if kind in ("llava_next", "llava_onevision"):
        grids = sorted({(height // size, width // size) for height, width in config.image_grid_pinpoints})
        image = {"fit": "squash", "tiles": [list(grid) for grid in grids], "padding": [0, 0, 0]}
    elif kind in ("idefics3", "smolvlm"):
        largest = max(1, round(processor.size["longest_edge"] / size))
        sides = range(1, largest + 1)
        image = {"fit": "squash", "tiles": [[r, c] for r in sides for c in sides], "padding": [0, 0, 0]}
    elif kind == "qwen2_vl":
        unit = vision.patch_size * vision.spatial_merge_size
        size = max(unit, min(448, int(processor.size["longest_edge"] ** 0.5)) // unit * unit)
        image = {"fit": "squash"}
    elif kind == "fast_vlm":
        edges = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
        size = edges.get("height") or edges["shortest_edge"]
        image = {"fit": "pad", "padding": padding} if getattr(processor, "do_pad", False) else {"fit": "crop"}
    elif kind == "paligemma":
        image = {"fit": "squash"}
    elif getattr(processor, "do_pad", False):
        image = {"fit": "pad", "padding": padding}
    else:
        image = {"fit": "crop" if getattr(processor, "do_center_crop", False) else "squash"}
    return Views(mean=mean, std=std, image_size=size, image=image)


def original_views(raw: dict) -> Views:
    """Read the views, without mean and std, from an original LLaVA or ml-fastvlm configuration."""
    name = str(raw["mm_vision_tower"])
    end = re.search(r"(\d+)$", name)
    if end is None:
        raise ValueError(f"mm_vision_tower={name} does not end in its image size; set the stages' image_size")
    size, image = int(end[1]), {"fit": "crop"}
    if raw.get("image_aspect_ratio") == "pad":  # with the mean of its processor: FastViTHD's is 0, else CLIP's
        mean = (0, 0, 0) if name.split("/")[-1].startswith("mobileclip") else OPENAI_CLIP_MEAN
        image = {"fit": "pad", "padding": [int(255 * value) for value in mean]}
    if raw.get("image_aspect_ratio") == "anyres":
        grids = sorted({(height // size, width // size) for width, height in raw["image_grid_pinpoints"]})
        image = {"fit": "squash", "tiles": [list(grid) for grid in grids], "padding": [0, 0, 0]}
    return Views(mean=(), std=(), image_size=size, image=image)
