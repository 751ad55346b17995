"""What a run runs on: refusals in one line, the first rank however it was started, micro-batches from a limit."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from fastvlm.config import CONF
from fastvlm.hardware import STRATEGIES, Hardware, is_first_rank


def cpu(**options):
    return Hardware(accelerator="cpu", precision="32-true", **options)


@pytest.mark.parametrize(
    "rows, ranks, accumulate, batch, expected",
    [
        (None, 1, 1, 8, 1),
        (None, 1, 4, 8, 4),
        (8, 1, 1, 8, 1),
        (3, 1, 1, 8, 4),  # 8 rows in 2 of 4 would be too many, so 4 of 2
        (2, 2, 1, 8, 2),
        (1, 1, 1, 7, 7),
        (100, 1, 2, 8, 2),
    ],
)
def test_micro_batches_are_the_fewest_that_keep_the_limit(rows, ranks, accumulate, batch, expected):
    hardware = cpu(devices=ranks, rows_per_device=rows, accumulate=accumulate)
    found = hardware.micro_batches(batch)
    assert found == expected and batch % (found * ranks) == 0
    assert rows is None or batch // (found * ranks) <= rows


@pytest.mark.parametrize(
    "env, first",
    [
        ({}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_JOB_NAME": "train"}, False),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "train"}, True),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "bash", "LOCAL_RANK": "1"}, False),
    ],
)
def test_there_is_one_first_rank(monkeypatch, env, first):
    for key in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_JOB_NAME"):
        monkeypatch.delenv(key, raising=False)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    assert is_first_rank() == first


def test_under_slurm_nodes_and_devices_are_the_jobs(monkeypatch):
    for key, value in {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_NUM_NODES": "2"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    hardware = cpu(num_nodes="auto")
    assert (hardware.devices, hardware.num_nodes, hardware.num_ranks, hardware.strategy) == (4, 2, 8, "ddp")
    (plugin,) = hardware.plugins()
    assert not plugin.auto_requeue  # the same command goes on from the stage's own checkpoint
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    assert cpu(num_nodes="auto").num_ranks == 1 and not cpu().plugins()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"strategy": "fsdp1"}, "hardware.strategy=fsdp1 is not one of auto, ddp, fsdp, deepspeed_zero3"),
        ({"rows_per_device": 0}, "hardware.rows_per_device=0 must be at least 1"),
        ({"accumulate": 0}, "hardware.accumulate=0 must be at least 1"),
        ({"devices": 0}, "hardware.devices=0 must be at least 1"),
        ({"threads": 0}, "hardware.threads=0 must be at least 1"),
        ({"precision": "bf16-true"}, "precision=bf16-true is not one of .*; set bf16-mixed, and llm.dtype=bfloat16 if"),
        ({"precision": "16-mixed", "strategy": "fsdp"}, "16-mixed is nothing for hardware.strategy=fsdp; set bf16-mix"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        Hardware(**{"accelerator": "cpu", "precision": "32-true"} | options)


@pytest.mark.parametrize("major, precision", [(7, "16-mixed"), (8, "bf16-mixed")])
def test_a_gpu_that_only_imitates_bf16_runs_in_fp16(monkeypatch, major, precision):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(major=major))
    monkeypatch.setattr("torch.cuda._check_bf16_tensor_supported", lambda _: True)
    assert Hardware(accelerator="gpu").precision == precision


def test_fsdp_shards_over_all_ranks_and_writes_one_file():
    strategy = cpu(devices=2, num_nodes=2, strategy="fsdp").trainer()["strategy"]
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (4, 1)
    assert not strategy._save_distributed_checkpoint


def test_deepspeed_that_is_missing_or_asked_for_half_precision_is_refused_in_one_line(monkeypatch):
    real, found = importlib.util.find_spec, {"deepspeed": None}
    find = lambda name, *more: found[name] if name in found else real(name, *more)
    monkeypatch.setattr("importlib.util.find_spec", find)
    with pytest.raises(ValueError, match=r"needs deepspeed: pip install '\.\[deepspeed\]'; hardware.strategy=fs"):
        cpu(devices=2, strategy="deepspeed_zero3")
    found["deepspeed"] = "there"
    with pytest.raises(ValueError, match="16-mixed is nothing for hardware.strategy=deepspeed_zero3; set bf16-mixed"):
        Hardware(accelerator="cpu", precision="16-mixed", strategy="deepspeed_zero3")


def test_deepspeed_shards_weights_in_fp32_and_multiplies_in_bf16():
    hardware = cpu(devices=2, strategy="fsdp")
    hardware.strategy, hardware.precision = "deepspeed_zero3", "bf16-mixed"
    told = hardware.deepspeed()
    assert hardware.shards and told["zero_optimization"]["stage"] == 3
    assert told["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert not {"bf16", "fp16", "gradient_accumulation_steps"} & set(told)  # Lightning and the plan say these


@pytest.mark.parametrize(
    "override, message",
    [
        ("optimizer@stages.dense.optimizer=muon", "stages.dense.optimizer: MuonAdamW needs whole matrices.*=adamw, or"),
        ("stages.dense.adapt.llm={method: lora, lr: 1, quantise: nf4}", "stages.dense.adapt.llm.quantise: .* few bits"),
        ("hardware.quantise=int8", "hardware.quantise: .* few bits; set it to null, or share"),
        ("data.longest_first=true", "data.longest_first=true: .* cannot try a step; set it false"),
    ],
)
def test_what_deepspeeds_flat_shards_cannot_do_is_said_before_a_stage_begins(tiny_config, override, message):
    from fastvlm.config import check

    config = tiny_config("pipeline=dense", "stages.dense.trainable.llm=null", override)
    check(config)
    with pytest.raises(ValueError, match=message):
        begin(config, "dense", strategy="deepspeed_zero3")


def test_an_optimiser_that_steps_no_shards_is_refused_with_fsdp_before_a_stage_begins(tiny_config):
    config = tiny_config("pipeline=dense", "optimizer@stages.dense.optimizer=adamw8bit")
    with pytest.raises(ValueError, match=r"stages.dense.optimizer: .* steps no shards .*dense.optimizer=adamw"):
        begin(config, "dense", strategy="fsdp")
    with pytest.raises(AttributeError, match="has no attribute 'data'"):  # what comes after the check
        begin(tiny_config("pipeline=dense"), "dense", strategy="fsdp")


def begin(config, name, *, strategy):
    from fastvlm.pipeline.training import Training

    hardware = SimpleNamespace(strategy=strategy, quantise=config.hardware.get("quantise"))
    pipeline = SimpleNamespace(hardware=hardware, config=config)
    Training(SimpleNamespace(name=name, config=config.stages[name], folder=None, pipeline=pipeline))


@pytest.mark.parametrize("wrote", ["auto", "fsdp", "deepspeed_zero3"])
def test_a_stage_goes_on_only_with_a_strategy_that_numbers_the_optimisers_state_alike(tmp_path, wrote):
    from fastvlm.pipeline.strategies import check_resumed
    from fastvlm.stages import LanguageStage

    path = tmp_path / "step=4.ckpt"
    if wrote == "deepspeed_zero3":
        path.mkdir()
    else:
        stage = LanguageStage(torch.nn.Linear(1, 1), name="dense", num_steps=8, optimizer=torch.optim.AdamW)
        stage.whole = [stage.model] if wrote == "fsdp" else []
        state = {"optimizer_states": [{}]}
        stage.on_save_checkpoint(state)
        torch.save(state, path)
    alike = {"auto", "ddp"} if wrote == "auto" else {wrote}
    for strategy in STRATEGIES:
        if strategy in alike:
            check_resumed(path, strategy=strategy)
        else:
            with pytest.raises(ValueError, match=f"step=4.ckpt holds .*strategy={wrote} keeps it; go on with that, or"):
                check_resumed(path, strategy=strategy)


def test_a_checkpoint_counts_when_it_is_written_to_its_end(tmp_path):
    from fastvlm.pipeline.stage_folder import newest_checkpoint

    torch.save({}, tmp_path / "step=2.ckpt")
    (tmp_path / "step=3.ckpt").write_bytes((tmp_path / "step=2.ckpt").read_bytes()[:-1])  # cut short
    (tmp_path / "step=4.ckpt").mkdir()
    assert newest_checkpoint(tmp_path).name == "step=2.ckpt"
    (tmp_path / "step=4.ckpt" / "latest").write_text("checkpoint")
    assert newest_checkpoint(tmp_path).name == "step=4.ckpt"


@pytest.mark.parametrize("path", sorted((CONF / "hardware").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_hardware_file_names_what_there_is(path):
    from omegaconf import OmegaConf

    from fastvlm.models.quantised import KINDS

    config = OmegaConf.load(path)
    assert config.get("strategy", "auto") in STRATEGIES
    assert config.get("quantise") in (None, *KINDS)
