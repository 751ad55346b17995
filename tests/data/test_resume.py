"""A killed run goes on with the next batch, to the bit; loader processes change nothing."""

from __future__ import annotations

import contextlib
import re
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from fastvlm.data.datamodule import MixtureDataModule
from fastvlm.data.replan import seen_before, write_order
from fastvlm.data.shards import ShardWriter
from fastvlm.data.source import Mixture, Source
from fastvlm.data.transforms import ImageTransform
from fastvlm.pipeline.held_out import held_out_records
from fastvlm.pipeline.training import Checkpoints
from fastvlm.tokens import IGNORE_INDEX

STEPS = 9


class Killed(Exception):
    pass


class Bigram(L.LightningModule):
    """Predicts the next token from this one; the smallest thing whose weights depend on every batch and their order."""

    def __init__(self, *, vocab_size: int, die_at: tuple[int, int] | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(vocab_size, vocab_size)
        self.die_at, self.seen, self.validated = die_at, [], []

    def training_step(self, batch, batch_idx):
        if self.die_at == (self.global_step, batch_idx):
            raise Killed
        self.seen.append((batch.step, batch.keys, batch.num_answer_tokens))
        logits = self.table(batch.input_ids[:, :-1])
        targets = batch.labels[:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets, ignore_index=IGNORE_INDEX, reduction="sum"
        )
        return loss / batch.num_answer_tokens * self.trainer.accumulate_grad_batches

    def validation_step(self, batch, batch_idx):
        assert batch.num_answer_tokens >= batch.num_learned
        self.validated.append(self.global_step)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def mix(sources, *, unit="samples", **weights):
    weights = dict.fromkeys(sources, 1) | weights
    return Mixture({k: Source(k, path=sources[k]) for k in sources}, weights=weights, unit=unit)


def data_of(sources, tokenizer, *, accumulate=1, workers=0, steps=STEPS, batch_size=4, **weights):
    return MixtureDataModule(
        mix(sources, unit="tokens", **weights),
        tokenizer=tokenizer,
        image_size=8,
        tokens_per_image=2,
        batch_size=batch_size,
        max_tokens=64,
        num_steps=steps,
        accumulate=accumulate,
        num_workers=workers,
        val_samples=8,
        pack_window=50,
    )


def fit(
    sources,
    tokenizer,
    folder,
    *,
    data=None,
    die_at=None,
    accumulate=1,
    workers=0,
    resume=None,
    every=2,
    steps=STEPS,
    also=(),
):
    data = data or data_of(sources, tokenizer, accumulate=accumulate, workers=workers, steps=steps)
    model = Bigram(vocab_size=len(tokenizer), die_at=die_at)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=every, save_top_k=-1, filename="{step}"), *also],
        val_check_interval=4 * accumulate,
        num_sanity_val_steps=0,
    )
    with contextlib.suppress(Killed):
        trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=False if resume else None)
    return model, trainer


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("die", "workers"), [((3, 0), 0), ((5, 0), 0), ((6, 1), 1), ((8, 0), 0)])
def test_a_killed_run_sees_the_same_batches_and_ends_with_the_same_weights(
    sources, tokenizer, tmp_path, accumulate, die, workers
):
    whole, _ = fit(sources, tokenizer, tmp_path / "whole", accumulate=accumulate)
    step, micro = die
    killed, _ = fit(
        sources,
        tokenizer,
        tmp_path / "killed",
        accumulate=accumulate,
        die_at=(step, step * accumulate + min(micro, accumulate - 1)),
        workers=workers,
    )
    saved = step - step % 2
    checkpoint = tmp_path / "killed" / f"step={saved}.ckpt"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*resum.*")  # Lightning has nothing to say about the loader
        resumed, trainer = fit(sources, tokenizer, tmp_path / "killed", accumulate=accumulate, resume=str(checkpoint))
    assert trainer.global_step == STEPS
    assert len(whole.seen) == STEPS * accumulate
    assert resumed.seen == whole.seen[saved * accumulate :]
    assert killed.seen == whole.seen[: len(killed.seen)]
    assert torch.equal(resumed.table.weight, whole.table.weight)


def test_a_run_killed_twice_between_two_checkpoints_goes_on_from_the_first_of_them(sources, tokenizer, tmp_path):
    def run(folder, **options):
        saves = {"save_on_train_epoch_end": False, "enable_version_counter": False}
        also = [Checkpoints(folder, filename="{step}", every_n_train_steps=4, **saves)]
        return fit(sources, tokenizer, tmp_path / "others", accumulate=2, also=also, **options)[0]

    whole, checkpoint = run(tmp_path / "whole"), tmp_path / "killed" / "step=4.ckpt"
    run(checkpoint.parent, die_at=(6, 12))
    run(checkpoint.parent, die_at=(6, 12), resume=str(checkpoint))
    resumed = run(checkpoint.parent, resume=str(checkpoint))
    assert resumed.seen == whole.seen[4 * 2 :] and torch.equal(resumed.table.weight, whole.table.weight)


def test_two_integers_and_a_fingerprint_say_where_the_data_stand(sources, tokenizer, tmp_path):
    data = data_of(sources, tokenizer, steps=40)
    fit(sources, tokenizer, tmp_path, data=data, steps=40, every=20)
    for step in (20, 40):
        checkpoint = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        epoch, within = data.plan.position(step)
        state = checkpoint["MixtureDataModule"]
        assert state == {"epoch": epoch, "step": within, "plan": data.plan.fingerprint}
    assert epoch > 0, "two integers are needed"
    del checkpoint["MixtureDataModule"]  # as checkpoints were before
    torch.save(checkpoint, tmp_path / "older.ckpt")
    _, trainer = fit(sources, tokenizer, tmp_path, steps=41, resume=str(tmp_path / "older.ckpt"))
    assert trainer.global_step == 41


def test_another_mixture_is_refused_by_a_plain_trainer_or_planned_from_the_samples_seen(sources, tokenizer, tmp_path):
    first, checkpoint = data_of(sources, tokenizer), str(tmp_path / "step=2.ckpt")
    first.setup()
    write_order(first.plan, tmp_path)
    killed, _ = fit(sources, tokenizer, tmp_path, data=first, die_at=(3, 3))
    with pytest.raises(ValueError, match=rf"epoch 0, step 2 of plan {first.plan.fingerprint}, .*replan") as caught:
        fit(sources, tokenizer, tmp_path, data=data_of(sources, tokenizer, text=5), resume=checkpoint)
    assert "\n" not in str(caught.value)
    second = data_of(sources, tokenizer, text=5)
    second.replan(seen_before(tmp_path, 2))
    resumed, trainer = fit(sources, tokenizer, tmp_path / "second", data=second, resume=checkpoint)
    assert trainer.global_step == STEPS and len(resumed.seen) == STEPS - 2
    before, after = ([key for _, keys, _ in seen for key in keys] for seen in (killed.seen[:2], resumed.seen[:2]))
    assert before and after and not {*before} & {*after}, "what was seen does not come again at once"
    again = str(tmp_path / "second" / "step=8.ckpt")
    assert fit(sources, tokenizer, tmp_path, data=second, resume=again)[1].global_step == STEPS
    with pytest.raises(ValueError, match="goes on from step 2, but training stands at step 0"):
        fit(sources, tokenizer, tmp_path, data=second)
    validated = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    other = data_of(sources, tokenizer, text=5)
    assert validated.validate(killed, datamodule=other, ckpt_path=checkpoint, verbose=False) == [{}]


def test_a_checkpoint_of_the_last_step_leaves_nothing_to_do(sources, tokenizer, tmp_path):
    whole, _ = fit(sources, tokenizer, tmp_path, steps=8)
    again, trainer = fit(sources, tokenizer, tmp_path, steps=8, resume=str(tmp_path / "step=8.ckpt"))
    assert again.seen == [] and trainer.global_step == 8
    assert torch.equal(again.table.weight, whole.table.weight)


def test_loader_processes_change_no_batch(sources, tokenizer, tmp_path):
    runs = [fit(sources, tokenizer, tmp_path / str(n), workers=n)[0] for n in (0, 1, 2)]
    assert runs[0].seen == runs[1].seen == runs[2].seen
    assert all(torch.equal(run.table.weight, runs[0].table.weight) for run in runs[1:])


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 1)])
@pytest.mark.parametrize("saved", [2, 4])  # at 4 it validates too
def test_a_checkpoint_of_a_steps_end_goes_on_with_other_micro_batches(
    sources, tokenizer, tmp_path, before, after, saved
):
    whole, _ = fit(sources, tokenizer, tmp_path / "whole", accumulate=after)
    fit(sources, tokenizer, tmp_path, accumulate=before, die_at=(5, 5 * before))
    data = data_of(sources, tokenizer, accumulate=after)
    again = {"data": data, "accumulate": after, "resume": str(tmp_path / f"step={saved}.ckpt")}
    resumed, trainer = fit(sources, tokenizer, tmp_path / "again", **again)
    assert trainer.global_step == STEPS and resumed.seen == whole.seen[saved * after :]
    assert trainer.fit_loop.epoch_loop.batch_progress.total.completed == STEPS * after
    assert resumed.validated == [step for step in whole.validated if step > saved]
    assert torch.allclose(resumed.table.weight, whole.table.weight, atol=1e-5)
    third, _ = fit(sources, tokenizer, tmp_path, accumulate=before, resume=str(tmp_path / "again" / "step=6.ckpt"))
    assert len(third.seen) == (STEPS - 6) * before
    assert torch.allclose(third.table.weight, whole.table.weight, atol=1e-5)


class SaveInside(L.Callback):
    """Writes a checkpoint after the first micro-batch of a step."""

    def __init__(self, path, *, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.step * trainer.accumulate_grad_batches:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("accumulate", [1, 2, 3, 6])  # with 3, a second step begins at the third micro-batch too
def test_a_checkpoint_inside_a_step_is_refused_whatever_the_micro_batches(sources, tokenizer, tmp_path, accumulate):
    def run(accumulate, **options):
        data = data_of(sources, tokenizer, accumulate=accumulate, batch_size=6, steps=5)
        return fit(sources, tokenizer, tmp_path, data=data, accumulate=accumulate, steps=5, **options)

    path = str(tmp_path / "inside.ckpt")
    run(2, also=[SaveInside(path, step=1)])
    with pytest.raises(ValueError, match="micro-batch 3 and step 1, inside a step; resume from one written at a"):
        run(accumulate, resume=path)


def test_validation_is_balanced_and_fixed(sources, tokenizer):
    mixture = mix(sources, caption=8)
    options = {"image_size": 8, "tokens_per_image": 2, "batch_size": 4, "max_tokens": 64, "num_steps": 1}
    seen = []
    for seed in (0, 1):
        data = MixtureDataModule(mixture, tokenizer=tokenizer, val_samples=20, seed=seed, **options)
        data.setup()
        batches = list(data.val_dataloader())
        seen.append([key for b in batches for key in b.keys])
        assert all(b.input_ids.shape[0] == 4 for b in batches)
        assert {b.sources for b in batches} == {mixture.names}
    assert seen[0] == seen[1]
    assert sorted(key.split("-")[0] for key in seen[0]) == sorted(list(sources) * 5)
    data = MixtureDataModule(mixture, tokenizer=tokenizer, val_samples=0, **options)
    data.setup()
    assert data.val_dataloader() == []


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ({"filters": {"score": {"min": 2}}}, "split val, has the number filters.score"),
        ({"filters": {"text_tokens": {"min": 5}}}, "10 filtered by text_tokens.; loosen its filters .text_tokens."),
        ({"types": ["name"]}, r"split val, is of types=\['name'\]"),
    ],
)
def test_a_source_whose_validation_split_is_filtered_away_is_left_out_of_it_by_name(
    sources, tokenizer, tmp_path, caplog, wanted, why
):
    words = {"train": "the small grey seven", "val": "seven"}
    for split, meta in (("train", {"score": 3, "type": "name"}), ("val", {})):
        with ShardWriter(tmp_path, split) as writer:
            for i in range(10):
                writer.write(f"{split}-{i}", {"document": words[split], "meta": meta})
    options = {"image_size": 8, "tokens_per_image": 2, "batch_size": 4, "max_tokens": 64, "num_steps": 1}
    narrow, plain = Source("s", path=tmp_path, **wanted), Source("chat", path=sources["chat"])

    def setup(**there):
        mixture = Mixture(there, weights=dict.fromkeys(there, 1), unit="samples")
        data = MixtureDataModule(mixture, tokenizer=tokenizer, val_samples=8, where="stages.base.", **options)
        data.setup()
        return data

    with caplog.at_level("WARNING"):
        data = setup(s=narrow, chat=plain)
    (line,) = caplog.messages
    assert line.startswith("s takes no part in validation: source s") and re.search(why, line)
    assert [key for batch in data.val_dataloader() for key in batch.keys if not key.startswith("chat")] == []
    assert len(data.val_plan.pairs) == 8 and len(data.plan.sources) == 2
    transform = ImageTransform(image_size=8)
    assert len(held_out_records(data.mixture, tokenizer, 4, transform=transform)) == 4
    with pytest.raises(ValueError, match=f"nothing is left to validate with; s .*{why}.*set stages.base.val_samples=0"):
        setup(s=narrow)
