"""What a stage will need is known before it begins, and is what it then needs."""

import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_parts import IMAGE_ID, make_batch, small_vlm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastvlm.callbacks.freezing import StageFreezing
from fastvlm.hardware import Hardware
from fastvlm.models.memory import Memory, estimate
from fastvlm.models.recompute import recompute_layers
from fastvlm.stages import LanguageStage, MuonAdamW

PARTS = ("encoder", "resampler", "projector", "llm")
ROWS, TOKENS = 4, 64


class Peak(TorchDispatchMode):
    """Bytes of all tensors alive, and the most there ever were; what kernels take for themselves is not seen."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.alive = set()

    def add(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return
        self.alive.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.drop, key, size)

    def drop(self, key, size):
        self.now -= size
        self.alive.discard(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor):
                self.add(one)
        return out


def both(adapt, optimizer, *, recompute: bool = False, bf16: bool = False):
    """(estimated, measured) bytes of two training steps."""
    defaults = {"r": 4, "alpha": 8.0, "dropout": 0.0, "targets": None, "lr": 1e-3, "quantise": None}
    adapt = {part: {**defaults, "method": method} for part, method in adapt.items()}
    model = small_vlm()
    if recompute:
        assert recompute_layers(model.parts) == ["llm"]
    freezing = StageFreezing({}, path=Path("unused/freezing.json"), adapt=adapt)
    expected = estimate(
        model,
        apply=lambda one: {name: row["lr"] for name, row in freezing.adapted(one).items()},
        optimizer=optimizer,
        rows=ROWS,
        tokens=TOKENS,
        images=2 * ROWS,
        image_size=32,
        parts=PARTS,
        autocast=torch.bfloat16 if bf16 else None,
    )
    assert not any(".lora_" in name for name, _ in model.named_parameters())  # the model itself was only looked at
    freezing.tuners.clear()
    stage = LanguageStage(model, name="test", num_steps=2, optimizer=optimizer)
    freezing.apply(stage)
    made = stage.configure_optimizers()["optimizer"]
    sample = [*[IMAGE_ID] * 4, *range(6, 34)]
    batch = make_batch([[sample, sample]] * ROWS, images=2 * ROWS, image_size=32)
    with Peak() as peak:
        for tensor in (*model.parameters(), *model.buffers()):
            peak.add(tensor)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = stage.training_step(batch)["loss"]
            loss.backward()
            made.step()
            made.zero_grad()
    return expected, peak.most


FULL = dict.fromkeys(PARTS, "full")


@pytest.mark.parametrize(
    "adapt, optimizer, options",
    [
        (FULL, torch.optim.AdamW, {}),
        (FULL, MuonAdamW, {}),
        (FULL, torch.optim.AdamW, {"bf16": True}),
        ({"projector": "full", "llm": "lora"}, torch.optim.AdamW, {}),
        ({"projector": "full"}, torch.optim.AdamW, {}),
    ],
    ids=["full", "muon", "bf16", "lora", "projector"],
)
def test_the_estimate_is_what_is_measured_to_fifteen_percent(adapt, optimizer, options):
    expected, measured = both(adapt, partial(optimizer), **options)
    assert measured * 0.85 < expected.total < measured * 1.15, f"{expected.total / measured:.3f}"


def test_recomputed_layers_keep_less_and_are_estimated_so_also_when_they_are_frozen():
    adapt = {"projector": "full", "encoder": "frozen"}
    kept, measured = both(adapt, partial(torch.optim.AdamW))
    recomputed, measured_too = both(adapt, partial(torch.optim.AdamW), recompute=True)
    assert recomputed.activations < 0.5 * kept.activations and measured_too < 0.8 * measured


def test_recomputing_changes_no_gradient():
    batch = make_batch([[[1, *[IMAGE_ID] * 4, 7, 8, 9], [10, 11]]], images=1)
    gradients = []
    for recompute in (False, True):
        model = small_vlm()
        if recompute:
            recompute_layers(model.parts)
        stage = LanguageStage(model, name="test", num_steps=2, optimizer=torch.optim.AdamW).train()
        stage.training_step(batch)["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_optimiser_state_counts_what_each_optimiser_keeps():
    from fastvlm.models.memory import bytes_a_number

    assert bytes_a_number(partial(torch.optim.AdamW), "matrix") == 8
    assert bytes_a_number(partial(MuonAdamW), "matrix") == 4 and bytes_a_number(partial(MuonAdamW), "vector") == 8
    assert bytes_a_number(partial(torch.optim.Adafactor), "matrix") < 0.1
    pytest.importorskip("bitsandbytes")
    from fastvlm.stages import adamw_8bit

    assert 2 <= bytes_a_number(partial(adamw_8bit), "matrix") < 2.2


def test_a_run_says_before_it_begins_what_will_not_fit_and_which_key_mends_it(tiny_config):
    from fastvlm.build import build_model, build_tokenizer, instantiate
    from fastvlm.pipeline.memory_notes import memory_notes

    config = tiny_config("pipeline=dense", "hardware.memory_gib=0.001", "stages.dense.trainable.llm=1e-3")
    model = build_model(config, build_tokenizer(config))
    line, mend = memory_notes(config, model, instantiate(config.hardware, key="hardware"))
    assert line.startswith("memory   dense: ") and line.endswith("of 0.00") and "activations" in line
    assert "dense will not fit, activations being most of it: hardware.rows_per_device=4; hardware.grad" in mend
    config.hardware.memory_gib = 100
    assert len(memory_notes(config, model, instantiate(config.hardware, key="hardware"))) == 1


@pytest.mark.parametrize(
    "largest, trained, optimizer, ranks, offered",
    [
        ("weights", "null", "adamw", 1, ["hardware.quantise=int8 (or nf4)", "BF16"]),
        ("weights", "1e-3", "adamw", 2, ["LORA", "hardware.strategy=fsdp"]),
        ("optimiser", "1e-3", "adamw", 1, ["LORA", "optimizer@stages.dense.optimizer=adamw8bit"]),
        ("optimiser", "1e-3", "adamw", 2, ["LORA", "hardware.strategy=fsdp"]),
        ("optimiser", "1e-3", "adamw8bit", 2, ["LORA"]),
    ],
)
def test_keys_are_offered_only_where_they_help(tiny_config, monkeypatch, largest, trained, optimizer, ranks, offered):
    from fastvlm.build import build_model, build_tokenizer
    from fastvlm.pipeline import memory_notes as notes

    options = [f"stages.dense.trainable.llm={trained}", f"optimizer@stages.dense.optimizer={optimizer}"]
    config = tiny_config("pipeline=dense", *options)
    model = build_model(config, build_tokenizer(config))
    sizes = dict.fromkeys(("weights", "gradients", "optimiser", "activations", "logits"), 0.0) | {largest: 2.0**30}
    monkeypatch.setattr(notes, "stage_memory", lambda *_: Memory(**sizes))
    hardware = Hardware(accelerator="cpu", devices=ranks, memory_gib=0.5)
    said = notes.memory_notes(config, model, hardware)[1].split("being most of it: ")[1]
    lora = "stages.dense.adapt.llm='{method: lora, lr: 1e-4}' in place of training it whole"
    short = {"LORA": lora, "BF16": "llm.dtype=bfloat16 for pretrained weights"}
    assert said.split("; ") == [short.get(key, key) for key in offered]


def test_ranks_that_need_more_memory_than_the_machine_has_before_they_share_the_weights_are_told(
    tiny_config, monkeypatch
):
    from fastvlm.build import build_model, build_tokenizer
    from fastvlm.pipeline.memory_notes import memory_notes

    config = tiny_config("pipeline=dense")
    model = build_model(config, build_tokenizer(config))
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    hardware = Hardware(accelerator="cpu", devices=4, strategy="fsdp", memory_gib=100)
    for spare, lines in ((0, 1), (-1, 2)):
        monkeypatch.setattr("psutil.virtual_memory", lambda spare=spare: SimpleNamespace(available=7 * size + spare))
        assert len(memory_notes(config, model, hardware)) == lines
    assert "of this machine: 4 ranks need " in memory_notes(config, model, hardware)[1]
