"""Parts of whole pretrained models learn as they are told: full, their last layers, adapters, over few bits or not."""

import pytest
import torch
from tiny_checkpoints import MAKERS, save_checkpoint
from transformers import AutoModelForImageTextToText

from fastvlm.batch import Batch
from fastvlm.callbacks.freezing import StageFreezing
from fastvlm.models.pretrained import from_pretrained
from fastvlm.models.quantised import quantised_layers
from fastvlm.stages import LanguageStage
from fastvlm.tokens import IGNORE_INDEX

ADAPT = {"r": 2, "alpha": 4.0, "dropout": 0.0, "targets": None, "lr": 1e-2, "quantise": None}
PARTS = ("encoder", "projector", "llm")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folders = {}

    def get(kind: str):
        if kind not in folders:
            folders[kind] = save_checkpoint(kind, tmp_path_factory.mktemp(kind))
        return folders[kind]

    return get


def question(model) -> Batch:
    """An image and a word, answered in three."""
    side = model.encoder.image_size or (64 if model.encoder.patch == 32 else 56)
    slots = [model.image_token_id] * model.num_visual_tokens(side)
    row = torch.tensor([[30, *slots, 31, 32, 33, 34]])
    labels = row.masked_fill(torch.arange(row.shape[1]) < row.shape[1] - 3, IGNORE_INDEX)
    torch.manual_seed(0)
    return Batch(
        input_ids=row,
        labels=labels,
        position_ids=torch.arange(row.shape[1])[None],
        segment_ids=torch.ones_like(row),
        source_ids=torch.zeros_like(row),
        pixel_values=torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8),
        num_answer_tokens=3,
        sources=("only",),
        layouts=None,
    )


def learned(model, tmp_path, **adapt):
    """The stage behind two steps, adapters still in, and the freezing that put them there."""
    stage = LanguageStage(model, name="test", num_steps=2, optimizer=lambda groups: torch.optim.AdamW(groups))
    adapt = {part: ADAPT | one for part, one in adapt.items()}
    freezing = StageFreezing({}, path=tmp_path / "freezing.json", adapt=adapt)
    freezing.apply(stage)
    freezing.remember(stage)
    batch, optimizer = question(model), stage.configure_optimizers()["optimizer"]
    for _ in range(2):
        stage.training_step(batch)["loss"].backward()
        assert all(p.grad is not None for p in stage.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    freezing.prove(stage)  # a frozen tensor that moved raises
    return stage, freezing


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(question(model))


def check(folder, tmp_path, part: str, **how) -> None:
    model = from_pretrained(str(folder))
    before, first = {name: w.clone() for name, w in model.state_dict().items()}, logits(model)
    stage, freezing = learned(model, tmp_path, **{part: how})
    assert {name.split(".")[0] for name in stage.learning_rates} == {part}
    if how["method"] in ("lora", "dora"):
        assert all(".lora_" in name for name in stage.learning_rates)
    assert bool(quantised_layers(getattr(model, part))) == bool(how.get("quantise"))
    exact = not how.get("quantise")
    trained = logits(model.double() if exact else model)  # merging changes nothing but rounding
    assert not torch.allclose(trained.float(), first, rtol=1e-4, atol=1e-6)
    freezing.merge(model)
    torch.testing.assert_close(logits(model), trained, rtol=0 if exact else 1e-3, atol=1e-9 if exact else 1e-3)
    after = model.float().state_dict()
    assert after.keys() == before.keys()
    assert {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])} == {part}
    stock = AutoModelForImageTextToText.from_pretrained(folder)
    stock.load_state_dict(model.restored().state_dict())  # strict: the class's own names and shapes


@pytest.mark.parametrize("kind", MAKERS)
def test_each_part_learns_alone_by_adapters_and_is_handed_on_in_its_own_class(kind, checkpoint, tmp_path):
    for part in PARTS:
        check(checkpoint(kind), tmp_path, part, method="lora")


@pytest.mark.parametrize("kind", MAKERS)
def test_last_layers_and_whole_parts_learn_alone(kind, checkpoint, tmp_path):
    check(checkpoint(kind), tmp_path, "encoder", method="partial", num=1)
    check(checkpoint(kind), tmp_path, "llm", method="partial", num=1)
    check(checkpoint(kind), tmp_path, "projector", method="full")


@pytest.mark.parametrize("kind", ["llava", "fast_vlm", "qwen2_vl"])
def test_adapters_learn_over_frozen_weights_of_few_bits(kind, checkpoint, tmp_path):
    pytest.importorskip("bitsandbytes")
    check(checkpoint(kind), tmp_path, "llm", method="lora", quantise="nf4")
    if kind != "fast_vlm":  # its tower is convolutions
        check(checkpoint(kind), tmp_path, "encoder", method="dora", quantise="int8")
