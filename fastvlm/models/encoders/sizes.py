"""Checks of image size, layer and pixel statistics that the encoders of pretrained models share."""

from __future__ import annotations


def grid_of(
    image_size: int, *, stride: int, name: str, fixed: int | None = None, divides: bool = True
) -> tuple[int, int]:
    """Return rows and columns of the patches, `stride` pixels each, of a square image.

    Args:
        fixed: the only size with positions, in pixels; None: any size.
        divides: whether the size must be a multiple of the stride; else the remainder at the border is ignored.

    Raises:
        ValueError: the size is not supported; the message says what to set instead.
    """
    if fixed not in (None, image_size):
        raise ValueError(
            f"image_size={image_size}, but {name} has positions for {fixed}; set encoder.image_size={image_size} to "
            "interpolate them once, or encoder.interpolate=true for whatever size comes"
        )
    if image_size < stride or (divides and image_size % stride):
        raise ValueError(
            f"image_size={image_size} is not a multiple of the {stride} pixels of {name}; the nearest: "
            f"{max(1, image_size // stride) * stride} and {(image_size // stride + 1) * stride}"
        )
    return image_size // stride, image_size // stride


def layer_of(layer: int, depth: int, *, name: str) -> int:
    """Return `layer`, which may be negative, as an index from 0.

    Raises:
        ValueError: there is no such layer.
    """
    if not -depth <= layer < depth:
        raise ValueError(f"encoder.layer={layer}, but {name} has {depth} layers: {-depth} to {depth - 1}")
    return layer % depth


def statistics(mean, std, *, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel, for values in [0, 1].

    Raises:
        ValueError: either is None or not three numbers, or a deviation is not above 0.
    """
    for key, values in (("mean", mean), ("std", std)):
        if values is None:
            raise ValueError(
                f"{name} does not say how its images were normalised; set encoder.{key}, such as [0.5, 0.5, 0.5]"
            )
        if len(values) != 3 or (key == "std" and min(values) <= 0):
            raise ValueError(f"encoder.{key}={list(values)} is not three numbers{' above 0' if key == 'std' else ''}")
    return tuple(map(float, mean)), tuple(map(float, std))
