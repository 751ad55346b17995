"""Data that changed under an interrupted stage: what was seen is known by content, and is not seen again too early."""

from collections import Counter

import pytest
from tiny_world import make_record, write_source

from fastvlm.data.plan import Plan
from fastvlm.data.plan_report import largest_error, packing_efficiency
from fastvlm.data.replan import Seen, changes, describe, seen_before, write_order
from fastvlm.data.shards import ShardWriter
from fastvlm.data.source import Mixture, Source


def make_plan(folder, tokenizer, *, weights=None, **options):
    sources = {k: Source(k, path=folder / k, **options.pop(k, {})) for k in ("caption", "text")}
    mixture = Mixture(sources, weights=weights or {"caption": 2, "text": 1}, unit="samples", window_shards=2)
    # Without packing: inside a packing window samples trade places, over the end of a pass too.
    defaults = {"tokens_per_image": 4, "batch_size": 4, "max_tokens": 96, "max_images": 4, "num_steps": 40}
    defaults["packing"] = False
    return Plan(mixture, tokenizer, **defaults | options)


def keys_of(plan, steps):
    pairs = [pair for i in steps for row in plan.step(i).rows for pair in row]
    return [(plan.names[s], plan.sources[s].index.key(row)) for s, row in pairs]


@pytest.fixture
def folder(tmp_path):
    for kind in ("caption", "text"):
        write_source(tmp_path / kind, kind, 60)
    return tmp_path


def rewrite(folder, *, keep, add):
    """Other shards: some samples gone, some new, all in another order."""
    with ShardWriter(folder / "caption", "train", max_samples=17) as writer:
        for i in [*reversed(keep), *add]:
            record, images = make_record("caption", i)
            writer.write(f"caption-{i:05d}", record, images)


def interrupt(folder, tokenizer, tmp, step, **options):
    plan = make_plan(folder, tokenizer, **options)
    plan.extend()
    write_order(plan, tmp)
    return plan, seen_before(tmp, step)


@pytest.mark.parametrize("step", [1, 2, 9, 20])
def test_after_a_replan_no_sample_comes_again_before_every_other_has_come(folder, tokenizer, tmp_path, step):
    before, seen = interrupt(folder, tokenizer, tmp_path, step)
    came = Counter(keys_of(before, range(step)))
    assert sum(came.values()) == sum(int(n.sum()) for _, n in seen.sources.values())
    rewrite(folder, keep=[i for i in range(60) if i % 7], add=range(100, 110))
    plan = make_plan(folder, tokenizer, after=seen, num_steps=60)
    left = Counter({key: came[key] for key in keys_of_source(plan)})
    old = [key for key in left if int(key[1][-5:]) < 60]
    for key in keys_of(plan, range(step, 60)):
        if key in old:
            rest = [left[k] for k in old if k[0] == key[0]]
            assert left[key] == min(rest), f"{key} came again while others of its source were still to come"
            left[key] += 1


def test_the_rest_of_an_epoch_holds_what_its_begin_did_not(folder, tokenizer, tmp_path):
    options = {"num_steps": None, "epochs": 2, "packing": True, "weights": {"caption": 1, "text": 0}}
    before, seen = interrupt(folder, tokenizer, tmp_path, 2, **options)
    came = keys_of(before, range(2))
    assert 0 < len(came) < 60
    rewrite(folder, keep=range(60), add=range(100, 110))
    plan = make_plan(folder, tokenizer, after=seen, **options)
    came += keys_of(plan, range(2, plan.num_steps))
    for epochs in (1, 2):
        assert set(Counter(came[: 70 * epochs]).values()) == {epochs}


def keys_of_source(plan):
    return [(s.name, s.index.key(row)) for s in plan.sources for row in s.rows.tolist()]


def test_steps_that_are_over_are_empty_and_shares_are_exact_from_there_on(folder, tokenizer, tmp_path):
    _, seen = interrupt(folder, tokenizer, tmp_path, 9)
    plan = make_plan(folder, tokenizer, after=seen, weights={"caption": 1, "text": 3})
    assert not keys_of(plan, range(9)) and len(keys_of(plan, range(9, 40))) == 31 * 4
    assert max(largest_error(plan, 100).values()) <= 1
    assert packing_efficiency(plan)["samples_per_row"] == 1


def test_a_source_with_max_epochs_counts_what_was_seen_before(folder, tokenizer, tmp_path):
    options = {"text": {"max_epochs": 1}}
    before, seen = interrupt(folder, tokenizer, tmp_path, 3, **options)
    plan = make_plan(folder, tokenizer, after=seen, weights={"caption": 1, "text": 1}, **options)
    texts = Counter(k for k in keys_of(before, range(3)) + keys_of(plan, range(3, 40)) if k[0] == "text")
    assert len(texts) == 60 and set(texts.values()) == {1}


def test_what_was_seen_survives_the_disk_and_a_second_replan(folder, tokenizer, tmp_path):
    _, seen = interrupt(folder, tokenizer, tmp_path, 9)
    seen.save(tmp_path)
    assert Seen.load(tmp_path).digest == seen.digest
    second = make_plan(folder, tokenizer, after=seen)
    again = tmp_path / "again"
    again.mkdir()
    write_order(second, again)
    twice = seen_before(again, 12)
    count = lambda s: sum(int(n.sum()) for _, n in s.sources.values())
    assert count(twice) == count(seen) + len(keys_of(second, range(9, 12))) and twice.step == 12
    assert make_plan(folder, tokenizer, after=twice).fingerprint != second.fingerprint


def test_changes_are_named(folder, tokenizer):
    before = describe(make_plan(folder, tokenizer))
    assert changes(before, make_plan(folder, tokenizer, weights={"caption": 1, "text": 1})) == [
        "share of caption 0.6667 -> 0.5",
        "share of text 0.3333 -> 0.5",
    ]
    rewrite(folder, keep=range(50), add=[])
    (line,) = changes(before, make_plan(folder, tokenizer))
    assert line == f"shards of caption ({folder / 'caption'}) changed: 60 -> 50 samples"
    (line,) = changes(before, make_plan(folder, tokenizer, text={"max_samples": 9}))[1:]
    assert line == "other samples of text are chosen: 60 -> 9"
