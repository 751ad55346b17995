"""Each part learns as it is told: whole, not, its last layers, or adapters that come out as plain weights."""

import pytest
import torch
from small_parts import IMAGE_ID, make_batch, small_vlm
from torch import nn

from fastvlm.callbacks.freezing import StageFreezing
from fastvlm.config import compose
from fastvlm.models.quantised import QuantisedLinear
from fastvlm.models.trainable import add_lora, last_layers, merge_lora, select_settings
from fastvlm.stages import LanguageStage

BATCH = make_batch([[[1, *[IMAGE_ID] * 4, 7, 8, 9], [10, 11]], [[12, *[IMAGE_ID] * 4, 13, 14]]], images=2)
ADAPT = {"r": 4, "alpha": 8.0, "dropout": 0.0, "targets": None, "lr": 1e-2, "quantise": None}
PARTS = ("encoder", "resampler", "projector", "llm")


def stage_of(tmp_path, adapt: dict, trainable=None, **options):
    model = small_vlm().double()
    stage = LanguageStage(model, name="test", num_steps=10, optimizer=lambda groups: torch.optim.AdamW(groups))
    freezing = StageFreezing(
        trainable or {},
        path=tmp_path / "freezing.json",
        adapt={p: {**ADAPT, **one} for p, one in adapt.items()},
        **options,
    )
    freezing.apply(stage)
    return stage, freezing


def logits(stage):
    stage.eval()
    with torch.no_grad():
        return stage.model(BATCH)


def learn(stage, freezing, steps: int = 2):
    stage.train()
    freezing.remember(stage)
    optimizer = stage.configure_optimizers()["optimizer"]
    for _ in range(steps):
        stage.training_step(BATCH)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    freezing.prove(stage)


def plain_logits(state):
    model = small_vlm().double().eval()
    model.load_state_dict(state)
    with torch.no_grad():
        return model(BATCH)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("part", ["encoder", "projector", "llm"])
def test_adapters_start_at_the_same_function_learn_alone_and_come_out_as_plain_weights(tmp_path, part, method):
    before = small_vlm().double().state_dict()
    stage, freezing = stage_of(tmp_path, {part: {"method": method}})
    torch.testing.assert_close(logits(stage), plain_logits(before), rtol=1e-9, atol=1e-9)
    assert all(name.startswith(part) and ".lora_" in name for name in stage.learning_rates)
    learn(stage, freezing)
    (moved,) = [row for row in freezing.rows if row["trainable"] and row["parameters"]]
    assert moved["part"] == part and moved["unchanged"] == moved["buffers"]
    trained = logits(stage)
    assert not torch.allclose(trained, plain_logits(before), rtol=1e-3)
    freezing.merge(stage.model)
    after = stage.model.state_dict()
    assert after.keys() == before.keys()
    torch.testing.assert_close(plain_logits(after), trained, rtol=1e-8, atol=1e-8)
    changed = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {part}


def test_lora_and_dora_are_their_equations_in_float64():
    torch.manual_seed(0)
    x = torch.randn(5, 6, dtype=torch.float64)
    for dora in (False, True):
        model = nn.Sequential(nn.Linear(6, 3)).double()
        weight, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
        tuner = add_lora(model, r=2, alpha=3.0, dropout=0.0, targets=None, dora=dora)
        a, b = torch.randn(2, 6, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
        model[0].lora_A["default"].weight.data, model[0].lora_B["default"].weight.data = a, b
        adapted = weight + 3.0 / 2 * b @ a
        if dora:  # arXiv:2402.09353, equation 5: learned magnitudes, times the direction of what LoRA makes
            magnitude = torch.rand(3, dtype=torch.float64) + 0.5
            model[0].lora_magnitude_vector["default"].weight.data = magnitude
            adapted = magnitude[:, None] * adapted / adapted.norm(dim=1, keepdim=True)
        torch.testing.assert_close(model(x), x @ adapted.T + bias, rtol=1e-10, atol=1e-10)
        merge_lora(tuner)
        torch.testing.assert_close(model[0].weight, adapted, rtol=1e-10, atol=1e-10)


def test_an_adapter_is_never_put_where_it_would_learn_nothing():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend, self.fc1 = nn.MultiheadAttention(8, 2), nn.Conv2d(8, 8, 1)
            self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 9)
            self.conv = nn.Conv2d(8, 8, 3)
            self.head.weight = self.embed.weight

    block = Block()
    add_lora(block, r=2, alpha=2.0, dropout=0.0, targets=None)
    adapted = {name.split(".")[0] for name, _ in block.named_parameters() if ".lora_A" in name}
    assert adapted == {"attend", "fc1"}
    with pytest.raises(ValueError, match=r"lora.targets: no linear layer is named out_proj; there are"):
        add_lora(Block(), r=2, alpha=2.0, dropout=0.0, targets=["out_proj"])


def test_full_frozen_and_partial_parts_learn_what_their_names_say(tmp_path):
    adapt = {"encoder": {"method": "partial", "num": 1}, "resampler": {"method": "frozen", "lr": None}}
    adapt |= {"projector": {"method": "full"}, "llm": {"method": "partial", "num": 1}}
    stage, freezing = stage_of(tmp_path, adapt)
    rates, model = stage.learning_rates, stage.model
    (layer,) = last_layers(model.encoder, 1)
    for name, _ in model.named_parameters():
        expected = name.startswith(("projector.", "llm.hf.model.layers.1.", f"encoder.{layer}."))
        assert (name in rates) == expected, name
    learn(stage, freezing)


def test_rate_decay_and_warm_up_of_a_part_reach_its_groups_and_its_schedule():
    stage = LanguageStage(small_vlm(), name="t", num_steps=100, warmup_steps=10, optimizer=torch.optim.AdamW)
    patterns = {
        "projector": {"lr": 1e-3, "weight_decay": 0.3, "warmup_steps": 40},
        "llm": {"lr": 2e-3},
        "encoder": 3e-3,
    }
    stage.learning_settings = select_settings(stage.model, patterns)
    stage.learning_rates = {name: one["lr"] for name, one in stage.learning_settings.items()}
    for name, p in stage.model.named_parameters():
        p.requires_grad_(name in stage.learning_rates)
    made = stage.configure_optimizers()
    for group in made["optimizer"].param_groups:
        if group["kind"] == "vector":
            assert group["weight_decay"] == 0.0
        else:  # torch's own default where the part says nothing
            assert group["weight_decay"] == (0.3 if group["name"] == "projector" else 0.01)
    for _ in range(19):
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    rates = {group["name"]: group["lr"] for group in made["optimizer"].param_groups}
    assert rates["projector"] == pytest.approx(1e-3 * 20 / 40)
    assert rates["llm"] < 2e-3 and rates["llm"] > 1.9e-3  # warm since step 10


@pytest.mark.parametrize(
    "value, message",
    [
        ({"lr": 1e-3, "wd": 0.1}, "where.llm.wd is not one of lr, weight_decay, warmup_steps"),
        ({"weight_decay": 0.1}, "where.llm has no lr; give one, or null"),
    ],
)
def test_a_mapping_of_other_keys_or_without_a_rate_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        select_settings(small_vlm(), {"llm": value}, where="where")


@pytest.mark.parametrize(
    "value, message",
    [
        ("{encoder: {method: lora}}", "stages.instruct.adapt.encoder.lr must be given: method=lora needs it"),
        ("{encoder: {method: partial, lr: 1}}", "adapt.encoder.num must be given: method=partial needs it"),
        ("{encoder: lorra}", "adapt.encoder.method=lorra is not one of full, frozen, partial, lora, dora"),
        ("{vision: frozen}", "adapt.vision: vision is not one of encoder, resampler, projector, llm"),
        ("{encoder: {method: lora, lr: 1, rank: 4}}", "rank.*it takes method, lr"),
        ("{encoder: {method: full, lr: 1, quantise: nf4}}", "method=full leaves nothing frozen; set method=lora"),
        ("{encoder: {method: lora, lr: 1, quantise: int3}}", "quantise=int3 is not one of int8, nf4"),
        ("{llm: {method: lora, lr: 1}}", "adapt.llm and stages.instruct.lora both say how llm learns; set one to null"),
        ("{projector: frozen}", "adapt.projector and stages.instruct.trainable.projector both say"),
    ],
)
def test_what_is_wrong_with_adapt_is_said_in_one_line(value, message):
    from fastvlm.config import check

    config = compose("train", ["pipeline=three_stage", f"stages.instruct.adapt={value}"])
    with pytest.raises(ValueError, match=message) as error:
        check(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["int8", "nf4", "torchao_int8"])
def test_adapters_over_quantised_weights_train_and_come_out_as_the_function_that_was_trained(tmp_path, kind):
    if kind.startswith("torchao"):
        pytest.importorskip("torchao")
    else:
        pytest.importorskip("bitsandbytes")
    model = small_vlm()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stage = LanguageStage(model, name="test", num_steps=10, optimizer=lambda groups: torch.optim.AdamW(groups))
    adapt = {"llm": {**ADAPT, "method": "lora", "quantise": kind}, "encoder": {"method": "frozen", "quantise": kind}}
    freezing = StageFreezing({}, path=tmp_path / "freezing.json", adapt=adapt)
    freezing.apply(stage)
    held = [m for m in model.modules() if isinstance(m, QuantisedLinear)]
    assert len(held) == 2 * 7 + 2  # of a decoder layer seven; of the encoder's one attention block two
    assert type(model.llm.hf.lm_head) is nn.Linear
    logits(stage)  # a forward pass in eval first: it must not spoil the gradients after it
    learn(stage, freezing)
    learned = [name for name, p in model.named_parameters() if p.requires_grad]
    assert learned and all(".lora_" in name for name in learned)
    trained = logits(stage)
    freezing.merge(model)
    after = model.state_dict()
    assert after.keys() == before.keys() and {v.dtype for v in after.values()} <= {torch.float32, torch.int64}
    torch.testing.assert_close(logits(stage), trained, rtol=1e-3, atol=1e-3 if kind != "nf4" else 2e-3)
    # Only read, so to the bit what it was, however it was held meanwhile.
    for name, value in after.items():
        if name.startswith("encoder.") and "num_batches" not in name:
            assert torch.equal(value, before[name]), name
    assert not list(tmp_path.glob(".*safetensors"))
