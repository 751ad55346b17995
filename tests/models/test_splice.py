import pytest
import torch
from small_parts import IMAGE_ID, random_ids

from fastvlm.models.splice import splice

SLOT = IMAGE_ID


def call(rows, images, per_image, dim=3):
    ids = torch.tensor(rows)
    text = torch.randn(*ids.shape, dim)
    visual = torch.arange(1.0, images * per_image * dim + 1).view(images, per_image, dim)
    return text, visual, splice(text, ids, visual, image_token_id=SLOT)


def test_visual_tokens_stand_in_their_slots_in_order_and_text_is_untouched():
    rows = [[9, SLOT, SLOT, 8, SLOT, SLOT], [7, 6, SLOT, SLOT, 9, 9]]
    text, visual, out = call(rows, 3, 2)
    ids = torch.tensor(rows)
    assert torch.equal(out[ids == SLOT], visual.flatten(0, 1))
    assert torch.equal(out[ids != SLOT], text[ids != SLOT])


def test_images_without_text_between_them_are_allowed():
    _, visual, out = call([[SLOT, SLOT, SLOT, SLOT, 9]], 2, 2)
    assert torch.equal(out[0, :4], visual.flatten(0, 1))


def test_no_image_leaves_the_text():
    text, _, out = call(random_ids(4, 4), 0, 2)
    assert torch.equal(out, text)


@pytest.mark.parametrize(
    ("rows", "images", "per_image", "counts"),
    [
        ([[9, SLOT, 9]], 1, 2, ("1 image slots", "2 visual tokens")),
        ([[SLOT, SLOT, SLOT]], 1, 2, ("3 image slots", "2 visual tokens")),
        ([[9, 9]], 1, 2, ("0 image slots", "2 visual tokens")),
        ([[9, SLOT, SLOT]], 0, 2, ("2 image slots", "0 visual tokens")),
        ([[SLOT, SLOT]], 2, 2, ("2 image slots", "4 visual tokens")),
    ],
)
def test_a_miscount_is_refused_with_both_numbers(rows, images, per_image, counts):
    with pytest.raises(ValueError) as error:
        call(rows, images, per_image)
    assert all(count in str(error.value) for count in counts)


@pytest.mark.parametrize(
    "rows",
    [
        [[SLOT, SLOT, SLOT, 9], [9, 9, 9, SLOT]],  # equal in sum, wrong in each row
        [[9, 9, 9, SLOT], [SLOT, 9, SLOT, SLOT]],  # consecutive in memory, but across two rows
        [[SLOT, 9, SLOT, 9], [9, 9, SLOT, SLOT]],  # torn apart
    ],
)
def test_slots_that_only_add_up_are_refused(rows):
    with pytest.raises(ValueError, match="misaligned though both count 4"):
        call(rows, 2, 2)


def test_gradients_reach_text_and_images():
    ids = torch.tensor([[9, SLOT, SLOT, 8]])
    text, visual = torch.randn(1, 4, 3, requires_grad=True), torch.randn(1, 2, 3, requires_grad=True)
    splice(text, ids, visual, image_token_id=SLOT).sum().backward()
    assert torch.equal(text.grad[0, :, 0], torch.tensor([1.0, 0, 0, 1]))
    assert torch.equal(visual.grad, torch.ones(1, 2, 3))
