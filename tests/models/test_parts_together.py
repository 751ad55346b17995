"""Any resampler with any projector in the tiny model: a training step, then the same logits after save and load."""

from itertools import product

import pytest
import torch
from part_options import NEW_RESAMPLERS, PROJECTORS, RESAMPLERS, VARIANTS, build_projector, build_resampler
from safetensors.torch import load_model, save_model
from small_parts import IMAGE_ID, make_batch, random_ids, small_encoder, small_llm

from fastvlm.models.loss import answer_loss
from fastvlm.models.trainable import apply_trainable, select_trainable
from fastvlm.models.vlm import VLM

PAIRS = list(product([*RESAMPLERS, *VARIANTS, *NEW_RESAMPLERS], PROJECTORS))


def build(resampler: str, projector: str, *, seed: int = 0) -> VLM:
    encoder, llm = small_encoder(), small_llm()
    follows = resampler in ("identity", "pixel_shuffle")
    torch.manual_seed(seed)
    middle = build_resampler(resampler, in_dim=encoder.out_dim, num_tokens=None if follows else 4)
    end = build_projector(projector, in_dim=middle.out_dim, out_dim=llm.dim)
    return VLM(encoder, middle, end, llm, image_token_id=IMAGE_ID)


def batch_for(model: VLM):
    slots = [IMAGE_ID] * model.num_visual_tokens(32)
    a, b, c = random_ids(3, 4, 2)
    return make_batch([[a + slots + b], [slots + c, c]], images=2, image_size=32)


@pytest.mark.parametrize(("resampler", "projector"), PAIRS, ids=lambda name: name.replace(" ", "_"))
def test_a_step_lowers_the_loss_and_a_loaded_model_has_the_same_logits(resampler, projector, tmp_path):
    model = build(resampler, projector).train()
    # The rates of the stock stages name the resampler, whether or not it has parameters.
    rates = select_trainable(model, {"resampler": 1e-3, "projector": 1e-3})
    apply_trainable(model, rates)
    batch = batch_for(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    measure = lambda: answer_loss(model.hidden(batch), batch.labels, model.llm.head, segment_ids=batch.segment_ids).sum
    first = measure()
    first.backward()
    assert [name for name in rates if model.get_parameter(name).grad is None] == []
    optimizer.step()
    assert first.isfinite() and measure() < first
    save_model(model, str(tmp_path / "model.safetensors"))
    other = build(resampler, projector, seed=1)
    load_model(other, str(tmp_path / "model.safetensors"))
    with torch.no_grad():
        assert torch.equal(model.eval()(batch), other.eval()(batch))


def test_a_misspelt_part_is_still_refused_beside_one_without_parameters():
    model = build("identity", "mlp")
    with pytest.raises(ValueError, match="'resampler.weight' matches no parameter"):
        select_trainable(model, {"resampler.weight": 1e-3, "projector": 1e-3})
    with pytest.raises(ValueError, match="leaves nothing to learn"):
        select_trainable(model, {"resampler": 1e-3})
