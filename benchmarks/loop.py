"""Speed of a stage under Lightning, with all its callbacks, relative to a plain PyTorch loop on the same batches.

    python benchmarks/loop.py                    # about three minutes on two cores
    python benchmarks/loop.py stage=instruct steps=100 rounds=3 logger=none

Both run in turn in one process; the ratio of the medians is printed. On both sides, start-up, the first steps and the
final validation are not timed; reading data, gradient clipping and the learning rate schedule are.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

WARM = 20  # steps that are not timed


def lightning_seconds(config) -> float:
    """Train under Lightning; return wall seconds from the start of step WARM to the final validation."""
    import lightning as L

    from fastvlm.pipeline import Pipeline

    marks: list[float] = []

    class Clock(L.Callback):
        def on_train_batch_start(self, *_) -> None:
            marks.append(time.perf_counter())

        def on_validation_start(self, *_) -> None:
            marks.append(time.perf_counter())

    plain = L.Trainer

    def with_clock(*, callbacks, **options):
        return plain(callbacks=[*callbacks, Clock()], **options)

    L.Trainer = with_clock
    try:
        Pipeline(config).run()
    finally:
        L.Trainer = plain
    return marks[-1] - marks[WARM]


def bare_seconds(config) -> float:
    """Train the same model with the same batches, precision, clipping, optimiser and schedule in a plain loop.

    Returns:
        Wall seconds from step WARM to the end.
    """
    import torch

    from fastvlm.build import instantiate
    from fastvlm.callbacks.freezing import StageFreezing
    from fastvlm.data.dataset import PlannedDataset
    from fastvlm.pipeline import Pipeline
    from fastvlm.pipeline.stage_run import StageRun

    run = Pipeline(config)
    run.hardware.apply()
    run.build()
    ((name, options),) = config.stages.items()
    data = StageRun(run, name=name, config=options).data
    stage = instantiate(
        options.objective,
        key="objective",
        model=run.model,
        name=name,
        num_steps=data.plan.num_steps,
        optimizer=instantiate(options.optimizer, key="optimizer"),
        warmup_steps=options.warmup_steps,
    )
    StageFreezing(dict(options.trainable), path=Path("unused"), name=name).apply(stage)
    made = stage.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    dataset = PlannedDataset(data.plan, tokenizer=run.tokenizer, image_size=options.image_size)
    bf16 = run.hardware.precision == "bf16-mixed"
    for step in range(data.plan.num_steps):
        if step == WARM:
            start = time.perf_counter()
        batch = dataset[step]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss_sum, denominator, _, _ = stage.objective(batch)
        optimizer.zero_grad()
        (loss_sum / denominator).backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], options.clip)
        optimizer.step()
        schedule.step()
    return time.perf_counter() - start


def main() -> None:
    options = dict(stage="align", steps="120", rounds="3", logger="mlflow")
    for argument in sys.argv[1:]:
        key, _, value = argument.partition("=")
        if key not in options:
            sys.exit(f"error: unknown key {key}; there are {', '.join(options)}")
        options[key] = value
    from fastvlm.config import compose

    name, steps = options["stage"], int(options["steps"])
    theirs, ours = [], []
    for number in range(int(options["rounds"])):
        with tempfile.TemporaryDirectory() as folder:
            config = compose(
                "train",
                [
                    f"pipeline={name}",
                    "~task",
                    f"stages.{name}.steps={steps}",
                    f"stages.{name}.trainable.llm=1e-3",
                    *(["stages.instruct.lora=null"] if name == "instruct" else []),
                    f"paths.runs={folder}",
                    "hardware.accelerator=cpu",
                    "hardware.num_workers=0",
                    "num_samples=0",
                    f"logger={options['logger']}",
                    f"name=round{number}",
                ],
            )
            ours.append(lightning_seconds(config))
            theirs.append(bare_seconds(config))
        print(
            f"round {number}: stage {ours[-1]:.2f} s, bare loop {theirs[-1]:.2f} s, {theirs[-1] / ours[-1]:.3f}",
            flush=True,
        )
    ratio = statistics.median(theirs) / statistics.median(ours)
    print(f"speed of the stage over the bare loop, {steps - WARM} steps of {name}: {ratio:.3f} (median of {len(ours)})")


if __name__ == "__main__":
    main()
