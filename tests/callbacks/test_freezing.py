"""Patterns decide what learns; frozen means no gradient, eval mode, and unchanged bytes."""

import lightning as L
import pytest
import torch
from torch import nn

from fastvlm.callbacks.freezing import StageFreezing
from fastvlm.models.trainable import add_lora, apply_trainable, last_layers, merge_lora, select_trainable, set_mode


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.projector = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
        self.llm = nn.Module()
        self.llm.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        x = self.projector(self.encoder(x))
        for layer in self.llm.layers:
            x = layer(x)
        return x


def test_the_longest_matching_pattern_decides_and_null_excludes():
    rates = select_trainable(Net(), {"llm": 1.0, "llm.layers.2": 2.0, "llm.layers.0": None, "*.bias": 3.0})
    assert rates["llm.layers.1.weight"] == 1.0
    assert rates["llm.layers.2.weight"] == 2.0
    assert "llm.layers.0.weight" not in rates
    assert rates["encoder.0.bias"] == 3.0


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name():
    with pytest.raises(
        ValueError, match=r"stages.align.trainable: the pattern 'projecter' .*nearest name is projector"
    ):
        select_trainable(Net(), {"projecter": 1e-3}, where="stages.align.trainable")


def test_nothing_to_learn_is_refused():
    with pytest.raises(ValueError, match="nothing to learn"):
        select_trainable(Net(), {"encoder": None})


def test_frozen_modules_stay_in_eval_with_their_buffers():
    net = Net()
    apply_trainable(net, select_trainable(net, {"projector": 1e-3}))
    set_mode(net, True)
    assert not any(m.training for m in net.encoder.modules())
    assert all(m.training for m in net.projector.modules())  # its dropout, which has no parameters, trains with it
    before = {k: v.clone() for k, v in net.state_dict().items() if k.startswith("encoder")}
    net(torch.randn(8, 4)).sum().backward()
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert all(p.grad is None for p in net.encoder.parameters())


def test_last_layers_names_the_last_and_refuses_too_many():
    assert last_layers(Net().llm, 2) == ["layers.1", "layers.2"]
    with pytest.raises(ValueError, match=r"instruct.last_layers.num=4, but the language model has 3"):
        last_layers(Net().llm, 4, where="stages.instruct.last_layers")


def test_the_proof_catches_a_frozen_parameter_and_a_frozen_buffer_that_moved(tmp_path):
    for name in ("encoder.0.weight", "encoder.1.running_mean"):
        net = Net()
        stage = L.LightningModule()
        stage.model, stage.learning_rates = net, {}
        proof = StageFreezing({"projector": 1e-3}, path=tmp_path / "freezing.json", name="align")
        proof.apply(stage)
        set_mode(net, True)
        proof.remember(stage)
        proof.prove(stage)
        tensor = dict([*net.named_parameters(), *net.named_buffers()])[name]
        tensor.data.view(-1)[0] += 1e-7
        with pytest.raises(RuntimeError, match=name):
            proof.prove(stage)


def test_lora_starts_at_the_same_function_learns_alone_and_merges_to_what_it_learned():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.q_proj, model.other = nn.Linear(6, 6), nn.Linear(6, 6)
    x = torch.randn(5, 6)
    before = model(x)
    tuner = add_lora(model, r=2, alpha=4.0, dropout=0.0, targets=["q_proj"])
    torch.testing.assert_close(model(x), before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "q_proj.lora_A.default.weight",
        "q_proj.lora_B.default.weight",
    }
    model.q_proj.lora_B["default"].weight.data.normal_()
    adapted = model(x)
    assert not torch.allclose(adapted, before)
    merge_lora(tuner)
    assert type(model.q_proj) is nn.Linear
    torch.testing.assert_close(model(x), adapted)


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_over_weights_of_16_bits_keep_32_and_move_by_a_small_rate(dora):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6, dtype=torch.bfloat16))
    add_lora(model, r=2, alpha=4.0, dropout=0.0, targets=["0"], dora=dora)
    learns = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    before = {name: p.detach().clone() for name, p in learns.items()}
    optimizer = torch.optim.Adam([p.requires_grad_() for p in learns.values()], lr=2e-5)
    for _ in range(2):
        out = model(torch.randn(5, 6, dtype=torch.bfloat16))
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        optimizer.step()
    assert all(p.dtype == torch.float32 for p in learns.values())
    assert not any(torch.equal(p, before[name]) for name, p in learns.items())


@pytest.mark.parametrize("name", ["align", "instruct", "a stage with a long name"])
def test_an_adapters_first_weights_follow_the_seed_whatever_the_stages_name(tmp_path, name):
    def first_weights(seed):
        stage = L.LightningModule()
        stage.model, stage.seed = Net(), seed
        lora = {"method": "lora", "lr": 1e-3, "r": 2, "alpha": 4.0, "dropout": 0.0, "targets": ["0"]}
        StageFreezing({}, adapt={"projector": lora}, path=tmp_path / "freezing.json", name=name).apply(stage)
        (weight,) = (p for key, p in stage.model.named_parameters() if "lora_A" in key)
        return weight

    assert torch.equal(first_weights(0), first_weights(0)) and not torch.equal(first_weights(0), first_weights(1))


def test_lora_on_a_layer_that_is_not_there_lists_those_that_are():
    with pytest.raises(ValueError, match=r"lora.targets: no linear layer is named qproj; there are 0"):
        add_lora(nn.Sequential(nn.Linear(2, 2)), r=1, alpha=1.0, dropout=0.0, targets=["qproj"])
