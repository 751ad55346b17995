"""Insert visual tokens into the image slots of a text."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor


def splice(
    text: Float[Tensor, "B S D"],
    input_ids: Int[Tensor, "B S"],
    visual: Float[Tensor, "I M D"],
    *,
    image_token_id: int,
) -> Float[Tensor, "B S D"]:
    """Return the text embeddings with the m-th visual token of the i-th image at that image's m-th slot.

    Images are ordered as their slots are: row by row, left to right. Each has M consecutive slots.

    Raises:
        ValueError: slots and visual tokens differ in number, or an image's slots are not consecutive within one row.
    """
    images, per_image, dim = visual.shape
    rows, length = input_ids.shape
    slots = (input_ids.flatten() == image_token_id).nonzero().squeeze(1)  # flat positions, ascending
    if len(slots) != images * per_image:
        raise ValueError(
            f"{len(slots)} image slots in the text but {images * per_image} visual tokens ({images} images of "
            f"{per_image}): the data's tokens_per_image must be {per_image} and every image must have its slots"
        )
    if images == 0:
        return text
    first, last = slots.view(images, per_image)[:, [0, -1]].unbind(1)
    torn = (last - first != per_image - 1) | (first // length != last // length)
    if torn.any():
        i = int(torn.nonzero()[0])
        raise ValueError(
            f"image {i} of {images}: its {per_image} slots start in row {int(first[i]) // length} and are not "
            f"consecutive, so slots and images are misaligned though both count {len(slots)}"
        )
    flat = text.reshape(rows * length, dim).index_copy(0, slots, visual.reshape(-1, dim).to(text.dtype))
    return flat.view(rows, length, dim)
