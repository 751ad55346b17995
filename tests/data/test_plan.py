from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_world import draw_png, make_record, say, train_tokenizer, write_source

from fastvlm.data.conversation import encode_record
from fastvlm.data.dataset import PlannedDataset
from fastvlm.data.plan import Plan
from fastvlm.data.plan_report import largest_error, largest_step_error, notes, report, shares
from fastvlm.data.schedule import prefix_error
from fastvlm.data.shards import ShardWriter
from fastvlm.data.source import UNITS, Mixture, Source
from fastvlm.data.source_index import SourceIndex
from fastvlm.tokens import IGNORE_INDEX
from tests.conftest import ROOT

KINDS = ("caption", "pages", "chat", "text")
quick = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def mix(sources, *, kinds=KINDS, weights=(45, 45, 10, 3), unit="samples", window_shards=2):
    return Mixture(
        {k: Source(k, path=sources[k]) for k in kinds},
        weights=dict(zip(kinds, weights)),
        unit=unit,
        window_shards=window_shards,
    )


def plan_of(sources, tokenizer, *, mixture=None, **options):
    options = {"tokens_per_image": 4, "batch_size": 4, "max_tokens": 96, "max_images": 4, "num_steps": 12} | options
    return Plan(mixture or mix(sources), tokenizer, **options)


def steps_of(plan):
    return [plan.step(i) for i in range(plan.num_steps)]


@quick
@given(
    weights=st.lists(st.integers(1, 100), min_size=4, max_size=4), unit=st.sampled_from(UNITS), seed=st.integers(0, 9)
)
def test_every_prefix_is_within_one_samples_worth_of_its_target(sources, tokenizer, weights, unit, seed):
    plan = plan_of(sources, tokenizer, mixture=mix(sources, weights=weights, unit=unit), seed=seed)
    order, costs = plan.costs(700, unit)
    largest = max(int(s.costs(unit)[s.rows].max()) for s in plan.sources)
    for i, weight in enumerate(plan.weights):
        error = prefix_error(order, costs, i, weight)
        own = int(plan.sources[i].costs(unit)[plan.sources[i].rows].max())
        assert error.min() > -largest - 1e-6
        assert error.max() <= (1 - float(weight)) * own + 1e-6
    assert max(largest_error(plan, 700).values()) <= 1 + 1e-9
    realised = shares(plan, 700, unit)
    assert math.isclose(sum(realised.values()), 1)


def test_the_plan_is_a_function_of_its_arguments_alone(sources, tokenizer):
    mixture = mix(sources, unit="tokens")
    first, again = (plan_of(sources, tokenizer, mixture=mixture) for _ in range(2))
    assert steps_of(first) == steps_of(again)
    assert first.fingerprint == again.fingerprint
    others = [
        plan_of(sources, tokenizer, mixture=mixture, seed=1),
        plan_of(sources, tokenizer, mixture=mix(sources, unit="samples")),
        plan_of(sources, tokenizer, mixture=mix(sources, unit="tokens", weights=(45, 45, 10, 4))),
        plan_of(sources, tokenizer, mixture=mix(sources, unit="tokens", window_shards=1)),
        plan_of(sources, tokenizer, mixture=mixture, max_tokens=95),
        plan_of(sources, tokenizer, mixture=mixture, packing=False),
    ]
    assert len({p.fingerprint for p in (first, *others)}) == 7
    assert all(steps_of(p) != steps_of(first) for p in others)


def test_a_kept_order_is_found_again_and_one_that_is_broken_or_too_short_is_planned_anew(
    sources, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr("fastvlm.data.plan.KEEP_AFTER", 0.0)
    fresh = steps_of(plan_of(sources, tokenizer, num_steps=40))
    plan_of(sources, tokenizer, cache=tmp_path, num_steps=40).extend()
    again = plan_of(sources, tokenizer, cache=tmp_path, num_steps=40)
    monkeypatch.setattr(again, "_plan_window", None)  # nothing is planned
    assert steps_of(again) == fresh
    longer = plan_of(sources, tokenizer, cache=tmp_path, num_steps=400)
    assert steps_of(longer)[:40] == fresh and longer.num_steps == 400
    (kept,) = tmp_path.iterdir()
    (kept / "row.npy").write_bytes((kept / "row.npy").read_bytes()[:-20])
    assert steps_of(plan_of(sources, tokenizer, cache=tmp_path, num_steps=40)) == fresh


def test_the_order_is_the_same_on_every_machine_and_in_every_version(sources, tokenizer):
    """Golden: the first row of a plan. It may change only together with `fastvlm.data.plan.VERSION`."""
    plan = plan_of(sources, tokenizer, packing=False, max_tokens=200)
    names = [f"{plan.sources[s].index.key(row)}" for s, row in (row[0] for row in plan.step(0).rows)]
    assert names == GOLDEN


GOLDEN = ["caption-00009", "pages-00005", "chat-00024", "caption-00003"]


def test_step_i_of_a_fresh_plan_is_step_i_of_a_running_one(sources, tokenizer):
    running = steps_of(plan_of(sources, tokenizer, num_steps=40))
    for i in (0, 7, 39):
        assert plan_of(sources, tokenizer, num_steps=40).step(i) == running[i]
    assert steps_of(plan_of(sources, tokenizer, num_steps=9)) == running[:9], "a longer plan begins as a shorter one"


@pytest.mark.parametrize("packing", [True, False])
def test_every_sample_of_a_source_is_seen_once_in_each_pass(sources, tokenizer, packing):
    plan = plan_of(sources, tokenizer, packing=packing, pack_window=64, max_tokens=200)
    order, rows = plan.arrivals(900)
    for i, source in enumerate(plan.sources):
        mine, n = rows[order == i], len(source.rows)
        for start in range(0, len(mine) - n + 1, n):
            assert sorted(mine[start : start + n].tolist()) == source.rows.tolist()
    passes = [rows[order == 0][:90].tolist(), rows[order == 0][90:180].tolist()]
    assert passes[0] != passes[1]


def test_shards_are_read_window_by_window(sources, tokenizer):
    """90 samples in 5 shards: with a window of 2, no more than 2 shards are open at once."""
    plan = plan_of(sources, tokenizer, mixture=mix(sources, kinds=("caption",), weights=(1,), window_shards=2))
    _, rows = plan.arrivals(90)
    shards = plan.sources[0].index.shard[rows].tolist()
    last = {s: len(shards) - 1 - shards[::-1].index(s) for s in set(shards)}
    first = {s: shards.index(s) for s in set(shards)}
    assert max(sum(first[s] <= i <= last[s] for s in first) for i in range(90)) == 2


@pytest.mark.parametrize("packing", [True, False])
def test_rows_keep_their_budgets_and_answer_tokens_are_exact(sources, tokenizer, packing):
    plan = plan_of(sources, tokenizer, packing=packing, max_tokens=48, max_images=3)
    dataset = PlannedDataset(plan, tokenizer=tokenizer, image_size=8)
    for i in range(plan.num_steps):
        step, batch = plan.step(i), dataset[i]
        assert len(step.rows) == plan.batch_size
        assert packing or all(len(row) == 1 for row in step.rows)
        assert batch.num_answer_tokens == step.num_answer_tokens == batch.num_learned
        assert batch.num_planned_images == step.num_images == batch.num_images
        for b, row in enumerate(step.rows):
            tokens = sum(int(plan.sources[s].length[r]) for s, r in row)
            assert tokens == int((batch.segment_ids[b] > 0).sum()) <= 48
            assert sum(int(plan.sources[s].images[r]) for s, r in row) <= 3


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2)])
def test_ranks_and_micro_batches_are_slices_of_one_order(sources, tokenizer, world, accumulate):
    plan = plan_of(sources, tokenizer, batch_size=8)
    options = {"tokenizer": tokenizer, "image_size": 8, "world_size": world, "accumulate": accumulate}
    ranks = [PlannedDataset(plan, rank=r, **options) for r in range(world)]
    assert {len(r) for r in ranks} == {plan.num_steps * accumulate}
    for i in (0, 5, plan.num_steps - 1):
        parts = [rank[i * accumulate + a] for rank in ranks for a in range(accumulate)]
        whole = Counter(plan.sources[s].index.key(row) for pairs in plan.step(i).rows for s, row in pairs)
        assert Counter(key for p in parts for key in p.keys) == whole
        assert sum(p.num_learned for p in parts) == plan.step(i).num_answer_tokens
        assert {p.num_answer_tokens for p in parts} == {plan.step(i).num_answer_tokens}
        assert {p.num_planned_images for p in parts} == {sum(p.num_images for p in parts)}
        assert {p.step for p in parts} == {i}


def test_what_the_optimiser_has_seen_stays_close_to_the_shares_too(sources, tokenizer):
    """Packing reorders a window; the packs are put so that no step's end is far off."""
    for unit in UNITS:
        plan = plan_of(sources, tokenizer, mixture=mix(sources, weights=(4, 3, 2, 1), unit=unit), num_steps=60)
        assert largest_step_error(plan) < 3
        arrived = plan_of(sources, tokenizer, mixture=mix(sources, unit=unit), packing=False, num_steps=60)
        assert largest_step_error(arrived) <= 1


def test_a_report_in_pieces_is_that_of_all_samples_at_once(sources, tokenizer, monkeypatch):
    monkeypatch.setattr("fastvlm.data.plan.PIECE", 23)
    parts = {k: Source(k, path=sources[k], max_epochs=0.5 if k == "chat" else None) for k in KINDS}
    mixture = Mixture(parts, weights=dict(zip(KINDS, (4, 3, 2, 1))), unit="tokens")
    plan = plan_of(sources, tokenizer, mixture=mixture, num_steps=20)
    planned, columns = plan.num_samples, plan.order.columns
    (_, _), (gone, _) = plan.segments()
    worth = max(int(s.length[s.rows].max()) for s in plan.sources)
    place, ends = columns.place[:planned], columns.end[plan.batch_size : 20 * plan.batch_size + 1 : plan.batch_size] - 1
    at_steps, said, errors, realised = 0.0, report(plan), largest_error(plan, planned), shares(plan, planned)
    for i, source in enumerate(plan.sources):
        for which in (np.arange(planned), place):
            order, rows = columns.source[which], columns.row[which]
            costs = np.array([int(plan.sources[s].length[r]) for s, r in zip(order, rows)])
            halves = [(slice(None, gone), plan.segments()[0][1][i]), (slice(gone, None), plan.segments()[1][1][i])]
            error = np.abs(np.concatenate([prefix_error(order[cut], costs[cut], i, w) for cut, w in halves]))
            if which is place:
                at_steps = max(at_steps, error[ends].max())
            else:
                assert errors[source.name] == error.max() / worth
                assert realised[source.name] == costs[order == i].sum() / costs.sum()
        assert said["sources"][source.name]["planned"] == (columns.source[place] == i).sum()
    assert said["largest_step_error"] == at_steps / worth
    tokens, images = plan.row_sizes()
    for step in (0, 7, 19):
        for r, row in enumerate(plan.step(step).rows):
            assert tokens[step, r] == sum(int(plan.sources[s].length[n]) for s, n in row)
            assert images[step, r] == sum(int(plan.sources[s].images[n]) for s, n in row)


def test_long_samples_are_cut_and_those_without_an_answer_left_out_by_name(sources, tokenizer):
    plan = plan_of(sources, tokenizer, max_tokens=14, max_images=2, num_steps=3)
    found = {s.name: s for s in plan.sources}
    for kind, source in found.items():
        for row in range(source.index.num_samples):
            record, _ = make_record(kind, row)
            encoded = encode_record(record, tokenizer, tokens_per_image=4, max_tokens=14)
            learned = sum(label != IGNORE_INDEX for label in encoded.labels)
            assert (row in source.rows) == (learned > 0 and encoded.num_images <= 2)
            if row in source.rows:
                assert (len(encoded.input_ids), learned) == (source.length[row], source.answer[row])
    assert len(found["chat"].excluded["answer truncated away"])
    left = report(plan)["sources"]["chat"]
    assert left["samples"] + sum(e["count"] for e in left["excluded"].values()) == 70
    assert any("left out" in line for line in notes(plan))


def test_what_long_samples_are_cut_to_is_read_once(sources, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path))
    monkeypatch.setattr("fastvlm.data.lengths.NOTED_ROWS", 0)
    read, rows = SourceIndex.text, []

    def note(index, row, **options):
        rows.append(row)
        return read(index, row, **options)

    monkeypatch.setattr(SourceIndex, "text", note)
    plans, counts = [], []
    for max_tokens in (14, 14, 12):
        rows.clear()
        plans.append(plan_of(sources, tokenizer, max_tokens=max_tokens, max_images=2, num_steps=3))
        counts.append(len(rows))
    assert counts[0] > 0 and counts[1] == 0 and counts[2] > counts[0], "another budget is another cut"
    assert plans[0].fingerprint == plans[1].fingerprint and report(plans[0]) == report(plans[1])


@pytest.mark.parametrize("kinds", [("caption",), KINDS])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("layout", [{}, {"pack_window": 64}, {"packing": False}, {"packing": False, "sort_window": 64}])
def test_rows_hold_every_sample_as_often_as_there_were_epochs(sources, tokenizer, kinds, unit, layout):
    mixture = Mixture({k: Source(k, path=sources[k]) for k in kinds}, weights=None, unit=unit)
    plan = plan_of(sources, tokenizer, mixture=mixture, num_steps=None, epochs=3, **layout)
    samples = [pair for step in steps_of(plan) for row in step.rows for pair in row]
    for epochs in (1, 2, 3):
        assert set(Counter(samples[: epochs * plan.epoch_samples]).values()) == {epochs}
    assert len(samples) - 3 * plan.epoch_samples < sum(map(len, plan.step(plan.num_steps - 1).rows))


def test_only_steps_that_two_epochs_share_hold_samples_of_very_different_length(sources, tokenizer):
    """130 samples in steps of 4: the first and the third epoch end inside a step."""
    layout = {"packing": False, "sort_window": 64, "mixture": mix(sources, kinds=("caption", "text"), weights=(9, 4))}
    plan = plan_of(sources, tokenizer, num_steps=None, epochs=3, **layout)
    lengths = np.array([[int(plan.sources[s].length[n]) for ((s, n),) in step.rows] for step in steps_of(plan)])
    assert set(np.flatnonzero(np.ptp(lengths, axis=1) > 10)) <= {130 // 4, 390 // 4}


def test_an_epoch_is_as_many_samples_as_the_sources_hold(sources, tokenizer):
    plan = plan_of(sources, tokenizer, num_steps=None)
    assert plan.epoch_samples == 250
    planned = sum(len(row) for step in steps_of(plan) for row in step.rows)
    last = sum(len(row) for row in plan.step(plan.num_steps - 1).rows)
    assert planned >= 250 > planned - last
    assert plan_of(sources, tokenizer, num_steps=None, epochs=1).num_steps == plan.num_steps
    longer = plan_of(sources, tokenizer, num_steps=plan.num_steps * 3)
    assert longer.fingerprint != plan.fingerprint, "its windows end elsewhere"
    positions = [longer.position(i) for i in range(longer.num_steps)]
    assert positions[0] == (0, 0)
    begun = [p for p, q in zip(positions[1:], positions) if p[0] != q[0]]
    assert begun == [(k, 0) for k in range(1, positions[-1][0] + 1)] and len(begun) >= 2
    assert positions == sorted(positions)
    planned = longer.order.num_samples
    epoch, step = longer.position(longer.num_steps)
    assert (epoch, step) > positions[-1] and longer.order.num_samples == planned, "the end is a place too"
    longest = report(longer)
    for name, source in longest["sources"].items():
        seen = sum(plan.sources[s].name == name for step in steps_of(longer) for row in step.rows for s, _ in row)
        assert seen == source["planned"]
        assert source["epochs"] == seen / source["samples"]


def test_a_subset_is_part_of_a_larger_one_and_types_select(tmp_path, sources, tokenizer):
    rows = []
    for count in (10, 30, None):
        source = Source("caption", path=sources["caption"], max_samples=count)
        rows.append(set(source.select(source.load("train", tokenizer))[0].tolist()))
    assert [len(r) for r in rows] == [10, 30, 90]
    assert rows[0] < rows[1] < rows[2]
    chat = Source("chat", path=sources["chat"], types=["name"])
    assert len(chat.select(chat.load("train", tokenizer))[0]) == 70
    with pytest.raises(ValueError, match=r"no sample .* is of types=\['colour'\]; it has \['name'\]"):
        wrong = Source("chat", path=sources["chat"], types=["colour"])
        wrong.select(wrong.load("train", tokenizer))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"caption": 1, "txt": 1}}, "weights.txt: no such source; did you mean text"),
        ({"weights": {"caption": 1}}, "has no text"),
        ({"weights": {"caption": 1, "text": -1}}, "weights.text=-1 must be a number of 0 or more"),
        ({"weights": {"caption": 0, "text": 0}}, "all 0"),
        ({"unit": "token"}, "did you mean tokens"),
        ({"window_shards": 0}, "window_shards=0"),
        ({"sources": {}}, "sources is empty"),
    ],
)
def test_mistakes_in_a_mixture_are_named_with_their_key_and_fix(sources, change, message):
    arguments = {"sources": {k: Source(k, path=sources[k]) for k in ("caption", "text")}} | {
        "weights": {"caption": 1, "text": 1},
        "unit": "samples",
    }
    with pytest.raises(ValueError, match=message):
        Mixture(**(arguments | change))


def test_mistakes_in_a_source_are_one_line_with_their_key(tmp_path, sources):
    """In a process of its own: here types are checked before the constructor sees them."""
    cases = {
        "source x: filters.score=3 takes min, max and missing": {"filters": {"score": 3}},
        "source x: filters.score.min='3' must be a number": {"filters": {"score": {"min": "3"}}},
        "source x: filters.score: min=3 is above max=1": {"filters": {"score": {"min": 3, "max": 1}}},
        "source x: filters=score must be": {"filters": "score"},
        "source x: max_samples=2.5 must be a whole number": {"max_samples": 2.5},
        "source x: repeat='2' must be a number above 0": {"repeat": "2"},
        "source x: max_epochs=True must be a number": {"max_epochs": True},
    }
    code = "import json, sys\nfrom fastvlm.data.source import Mixture, Source\nfor one in json.loads(sys.argv[1]):\n"
    code += "    try: Source('x', path='.', **one)\n    except ValueError as error: print(error)\n"
    code += "try: Mixture({'x': Source('x', path='.')}, weights={'x': None}, unit='samples')\n"
    code += "except ValueError as error: print(error)"
    asked = json.dumps(list(cases.values()))
    done = subprocess.run([sys.executable, "-c", code, asked], capture_output=True, text=True, check=True, cwd=ROOT)
    expected = [*cases, "mixture.weights.x=None must be a number of 0 or more"]
    assert [a.startswith(b) for a, b in zip(done.stdout.splitlines(), expected, strict=True)] == [True] * 8, done.stdout


def test_a_bound_of_null_is_none_and_one_type_needs_no_list(sources, tokenizer):
    bounds = {"num_images": {"min": 2, "max": None}}
    pages = Source("pages", path=sources["pages"], filters=bounds)
    index = pages.load("train", tokenizer)
    assert pages.select(index)[0].tolist() == np.flatnonzero(index.num_images >= 2).tolist()
    chat = Source("chat", path=sources["chat"], types="name")
    assert len(chat.select(chat.load("train", tokenizer))[0]) == 70


def test_a_folder_may_be_written_as_users_write_it(sources, tokenizer, monkeypatch):
    monkeypatch.setenv("HOME", str(sources["caption"].parent))
    for path in ("~/caption", f"file://{sources['caption']}"):
        assert Source("caption", path=path).load("train", tokenizer).num_samples == 90


def test_a_weight_however_small_is_no_weight_of_zero(sources):
    assert min(mix(sources, weights=(1, 1, 1, 1e-12)).shares) > 0


def test_a_source_of_weight_zero_is_left_out(sources):
    mixture = mix(sources, weights=(1, 0, 3, 0))
    assert mixture.names == ("caption", "chat")
    assert mixture.weights == {"caption": 0.25, "chat": 0.75}


def test_rows_that_do_not_divide_and_ends_of_plans_are_named(sources, tokenizer):
    plan = plan_of(sources, tokenizer, batch_size=6)
    with pytest.raises(ValueError, match=r"batch_size=6 .*accumulate=2; make it a multiple of 4"):
        PlannedDataset(plan, tokenizer=tokenizer, image_size=8, world_size=2, accumulate=2)
    with pytest.raises(IndexError, match="step 12 of a plan of 12 steps"):
        plan.step(12)
    for key in ("batch_size", "max_images"):
        with pytest.raises(ValueError, match=f"{key}=0 must be 1 or more"):
            plan_of(sources, tokenizer, **{key: 0})


def test_a_dataset_travels_to_a_spawned_process(sources, tokenizer):
    dataset = PlannedDataset(plan_of(sources, tokenizer, num_steps=3), tokenizer=tokenizer, image_size=8)
    copy = pickle.loads(pickle.dumps(dataset))
    for i in range(3):
        assert copy[i].keys == dataset[i].keys
        assert torch.equal(copy[i].input_ids, dataset[i].input_ids)


def test_two_sources_whose_keys_differ_only_by_name_have_orders_of_their_own(tmp_path, tokenizer):
    folders = {name: write_source(tmp_path / name, "text", 30) for name in "ab"}
    plan = plan_of(folders, tokenizer, mixture=mix(folders, kinds=("a", "b"), weights=(1, 1)), num_steps=2)
    order, rows = plan.arrivals(60)
    assert rows[order == 0].tolist() != rows[order == 1].tolist()
    assert np.array_equal(np.sort(rows[order == 0]), np.sort(rows[order == 1]))


def test_a_source_with_max_epochs_is_served_so_often_and_the_others_go_on_in_their_proportions(sources, tokenizer):
    once = {k: Source(k, path=sources[k], max_epochs=1 if k == "text" else None) for k in KINDS}
    mixture = Mixture(once, weights={"caption": 20, "pages": 20, "chat": 20, "text": 40}, unit="samples")
    plan = plan_of(sources, tokenizer, mixture=mixture, num_steps=None, epochs=3, packing=False)
    order, _ = plan.costs(int(plan.order.columns.end[plan.num_steps * 4]), "samples")
    text = KINDS.index("text")
    held = len(plan.sources[text].rows)
    last = int(np.flatnonzero(order == text)[-1])
    assert np.count_nonzero(order == text) == held
    served = [row for source, row in plan.first_samples(len(order)) if source == text]
    assert sorted(served) == plan.sources[text].rows.tolist()  # every sample once
    counts = np.bincount(order[last + 1 :], minlength=4)
    assert counts[text] == 0 and max(abs(counts[:3] - counts.sum() / 3)) <= 1
    assert max(largest_error(plan, len(order)).values()) <= 1 + 1e-9
    (note,) = (line for line in notes(plan) if "used up" in line)
    assert note.startswith(f"text used up (max_epochs) after {last + 1} samples") and "caption 33.3%" in note
    assert report(plan)["segments"][1] == [last + 1, pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])]


def test_a_mixture_that_is_used_up_serves_every_sample_and_refuses_more_steps(sources, tokenizer):
    once = {k: Source(k, path=sources[k], max_epochs=1) for k in KINDS}
    mixture = Mixture(once, weights=dict.fromkeys(KINDS, 1), unit="tokens")
    plan = plan_of(sources, tokenizer, mixture=mixture, num_steps=None, epochs=2)
    seen = [pair for step in steps_of(plan) for row in step.rows for pair in row]
    assert sorted(seen) == sorted((i, row) for i, s in enumerate(plan.sources) for row in s.rows.tolist())
    assert all(len(step.rows) == 4 for step in steps_of(plan))  # the last is filled with empty rows
    dataset = PlannedDataset(plan, tokenizer=tokenizer, image_size=8)
    assert sum(len(dataset[i].keys) for i in range(len(dataset))) == len(seen)
    assert report(plan)["packing"]["padding"] < 1
    with pytest.raises(ValueError, match=r"steps=9999: .* together they last \d+ steps"):
        plan_of(sources, tokenizer, mixture=mixture, num_steps=9999)


def test_without_weights_an_epoch_holds_every_sample_as_often_as_its_source_is_repeated(sources, tokenizer):
    twice = {k: Source(k, path=sources[k], repeat=2 if k == "chat" else 1) for k in KINDS}
    plan = plan_of(sources, tokenizer, mixture=Mixture(twice, weights=None, unit="samples"), num_steps=None, epochs=1)
    seen = Counter(plan.first_samples(plan.epoch_samples))
    held = {(i, row): 2 if s.name == "chat" else 1 for i, s in enumerate(plan.sources) for row in s.rows.tolist()}
    assert seen == held
    hardly = {"text": Source("text", path=sources["text"], repeat=1e-6)}
    plan = plan_of(sources, tokenizer, mixture=Mixture(hardly, weights=None, unit="samples"), num_steps=2)
    assert plan.epoch_samples == 1 and plan.position(0) == (0, 0), "an epoch has a sample"


def lines_of(sources, tokenizer, *, weights, unit="samples", num_steps=None, **options):
    """What a plan of captions (90), chat (70) and text (40) says, with options of the captions."""
    made = {k: Source(k, path=sources[k], **(options if k == "caption" else {})) for k in ("caption", "chat", "text")}
    length = {"num_steps": num_steps, "epochs": 1 if num_steps is None else None}
    plan = plan_of({}, tokenizer, mixture=Mixture(made, weights=weights, unit=unit), packing=False, **length)
    return plan, notes(plan)


def test_a_capped_or_repeated_source_is_one_line_that_says_its_share_and_its_passes_before_the_first_step(
    sources, tokenizer
):
    _, quiet = lines_of(sources, tokenizer, weights=None)
    assert not quiet, "an ordinary plan says nothing"
    # 30 of 140 samples in place of 90 of 200, in 140 samples.
    _, lines = lines_of(sources, tokenizer, weights=None, max_samples=30)
    assert lines == ["caption: max_samples=30 of 90: 21.4% of samples in place of 45.0%, 1.00 passes over 30 samples"]
    _, lines = lines_of(sources, tokenizer, weights=None, repeat=3)
    (line,) = lines  # 270 of 380
    assert line == "caption: repeat=3: 71.1% of samples in place of 45.0%, 3.00 passes over 90 samples"
    # Weights hold whatever a source has: what a cap changes is how often the same samples come.
    weights = {"caption": 2, "chat": 1, "text": 1}
    plan, lines = lines_of(sources, tokenizer, weights=weights, max_samples=20, num_steps=40)
    assert lines == ["caption: max_samples=20 of 90: 50.0% of samples, 4.00 passes over 20 samples"]
    assert report(plan)["sources"]["caption"]["epochs"] == 4
    _, lines = lines_of(sources, tokenizer, weights=weights, max_samples=500, num_steps=40)
    assert not lines, "a cap above what there is caps nothing"
    _, lines = lines_of(sources, tokenizer, weights=weights, max_epochs=1, num_steps=40)
    assert not lines, "nor is the source used up in 160 samples"


@pytest.mark.parametrize("unit", UNITS)
def test_the_line_of_a_bounded_source_has_the_shares_of_the_report(sources, tokenizer, unit):
    weights = {"caption": 2, "chat": 1, "text": 1}
    plan, lines = lines_of(sources, tokenizer, weights=weights, unit=unit, max_epochs=1, num_steps=90)
    said = report(plan)["sources"]["caption"]
    share = said["share"][unit][str(plan.num_samples)]
    assert share < 0.45 and said["epochs"] == 1
    (line,) = (line for line in lines if "used up" not in line)
    expected = f"caption: max_epochs=1: {share:.1%} of {unit} in place of 50.0%, 1.00 passes over 90 samples"
    assert line == expected and len(lines) == 2


def test_filters_keep_what_lies_within_and_the_report_names_the_rest(tokenizer, tmp_path):
    with ShardWriter(tmp_path, "train") as writer:
        for i in range(10):
            record, images = make_record("caption", i)
            turns = {"relevance": [i % 5 + 1, None, 5]} if i != 9 else {}
            writer.write(f"c{i}", record | {"meta": {"ratings": turns, "similarity": i / 10, "page_id": 7}}, images)
    kept = lambda filters: plan_of(
        {},
        tokenizer,
        num_steps=1,
        mixture=Mixture({"c": Source("c", path=tmp_path, filters=filters)}, weights={"c": 1}, unit="samples"),
    ).sources[0]
    keys = lambda source: [source.index.key(row) for row in source.rows.tolist()]
    assert keys(kept({"relevance": {"min": 3}})) == ["c2", "c3", "c4", "c7", "c8"]
    assert keys(kept({"relevance": {"min": 3, "missing": "keep"}})) == ["c2", "c3", "c4", "c7", "c8", "c9"]
    assert keys(kept({"page_id": {"min": 8, "missing": "keep"}})) == [f"c{i}" for i in range(10)]
    assert keys(kept({"similarity": {"min": 0.25, "max": 0.5}})) == ["c3", "c4", "c5"]
    assert keys(kept({"num_images": {"min": 1}, "width": {"max": 8}})) == [f"c{i}" for i in range(10)]
    both = kept({"relevance": {"min": 3}, "similarity": {"max": 0.3}})
    assert {why: len(gone) for why, gone in both.excluded.items()} == {
        "filtered by relevance": 5,
        "filtered by similarity": 3,
    }
    with pytest.raises(ValueError, match="no sample .* has the number filters.page_id; there are .* similarity"):
        kept({"page_id": {"min": 1}})
    with pytest.raises(ValueError, match="filters.relevance=.* takes min, max and missing"):
        kept({"relevance": {"least": 3}})


@pytest.mark.parametrize("number", ["text_tokens", "answer_tokens"])
def test_filters_by_length_keep_the_samples_whose_encoded_length_lies_within(sources, tokenizer, number):
    def length(row: int) -> int:
        encoded = encode_record(make_record("chat", row)[0], tokenizer, tokens_per_image=0)
        return len(encoded.input_ids) if number == "text_tokens" else sum(i != IGNORE_INDEX for i in encoded.labels)

    lengths = [length(row) for row in range(70)]
    low, high = sorted(lengths)[15], sorted(lengths)[50]
    source = Source("chat", path=sources["chat"], filters={number: {"min": low, "max": high}})
    plan = plan_of({}, tokenizer, mixture=Mixture({"chat": source}, weights={"chat": 1}, unit="samples"), num_steps=1)
    kept = [row for row in range(70) if low <= lengths[row] <= high]
    assert plan.sources[0].rows.tolist() == kept and 30 < len(kept) < 70
    (reason,) = plan.sources[0].excluded
    assert reason == f"filtered by {number}" and len(plan.sources[0].excluded[reason]) == 70 - len(kept)


def test_a_system_prompt_stands_before_every_conversation_and_in_the_planned_lengths(sources, tokenizer):
    styled = Source("chat", path=sources["chat"], system="a small digit")
    plan = plan_of(sources, tokenizer, mixture=Mixture({"chat": styled}, weights={"chat": 1}, unit="tokens"))
    dataset = PlannedDataset(plan, tokenizer=tokenizer, image_size=8)
    plain = plan_of(sources, tokenizer, mixture=mix(sources, kinds=("chat",), weights=(1,)))
    for row in plan.sources[0].rows[:20].tolist():
        sample = dataset.read(0, row)
        assert tokenizer.hf.decode(sample.input_ids).startswith("<|system|>a small digit<|user|>")
        assert len(sample.input_ids) == plan.sources[0].length[row]
        assert plan.sources[0].answer[row] == plain.sources[0].answer[row]
    assert plan.fingerprint != plain.fingerprint
    with pytest.raises(ValueError, match="source text: system='x' needs conversations and .* holds documents"):
        document = Source("text", path=sources["text"], system="x")
        plan_of(sources, tokenizer, mixture=Mixture({"text": document}, weights={"text": 1}, unit="tokens"))


def any_record(rng: np.random.Generator) -> tuple[dict, list[bytes]]:
    """A document or conversation whose images and texts, some of them empty, stand anywhere."""
    images: list[bytes] = []

    def parts() -> list[dict]:
        found = []
        for _ in range(int(rng.integers(0, 5))):
            if rng.random() < 0.5:
                images.append(draw_png(len(images)))
                found.append({"type": "image"})
            else:
                found.append({"type": "text", "text": say(rng, 0, 9)})
        return found

    if rng.random() < 0.5:
        return {"document": parts()}, images
    roles = (["system"] if rng.random() < 0.3 else []) + ["user", "assistant"] * int(rng.integers(1, 3))
    roles = roles[::-1] if rng.random() < 0.2 else roles
    return {"messages": [{"role": role, "content": parts()} for role in roles]}, images


@pytest.mark.parametrize("system", [None, "a small digit"])
@pytest.mark.parametrize("blind", [True, False])
@pytest.mark.parametrize("template", ["roles", "smolvlm", "paligemma"])
def test_planned_lengths_are_those_of_the_encoded_record_with_its_images_and_without_them(
    tmp_path, template, blind, system
):
    tokenizer = train_tokenizer(tmp_path / "tokenizer", template=template)
    records = [any_record(np.random.default_rng([i, 7])) for i in range(120)]
    records = [one for one in records if system is None or "messages" in one[0]]
    with ShardWriter(tmp_path / "shards", "train") as writer:
        for i, (record, images) in enumerate(records):
            writer.write(f"k{i}", record, images)
    source = Source("x", path=tmp_path / "shards", images=not blind, system=system)
    mixture = Mixture({"x": source}, weights={"x": 1}, unit="answer_tokens")
    short = 24 if system is None else 48
    for max_tokens in (short, 10_000):
        budget = {"max_tokens": max_tokens, "max_images": 1000, "num_steps": 20}
        plan = plan_of({}, tokenizer, mixture=mixture, **budget)
        measured, learned = plan.sources[0], []
        for row, (record, _) in enumerate(records):
            encoded = encode_record(source.edit(record), tokenizer, tokens_per_image=4, max_tokens=max_tokens)
            learned.append(sum(label != IGNORE_INDEX for label in encoded.labels))
            assert measured.length[row] == len(encoded.input_ids) and measured.answer[row] == learned[row]
            assert measured.images[row] == encoded.num_images
        assert measured.rows.tolist() == np.flatnonzero(learned).tolist()
        assert (max_tokens == short) == (measured.num_truncated > 0)
        dataset = PlannedDataset(plan, tokenizer=tokenizer, image_size=8)
        for batch in (dataset[i] for i in range(20)):
            assert batch.num_answer_tokens == int((batch.labels != IGNORE_INDEX).sum()) and not batch.skipped
