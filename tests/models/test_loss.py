import pytest
import torch
from small_parts import make_batch, random_ids, small_llm

from fastvlm.models.loss import answer_loss, sum_by_source


def run(llm, batch, **options):
    hidden = llm.hidden(llm.embed(batch.input_ids), batch.position_ids, batch.segment_ids)
    return answer_loss(hidden, batch.labels, llm.head, segment_ids=batch.segment_ids, **options)


def test_the_loss_is_transformers_cross_entropy_on_unpacked_rows():
    llm = small_llm()
    batch = make_batch([[ids] for ids in random_ids(9, 6, 9)])
    batch.labels[:, :3] = -100
    theirs = llm.hf(
        input_ids=batch.input_ids, attention_mask=(batch.segment_ids > 0).long(), labels=batch.labels, use_cache=False
    ).loss
    ours = run(llm, batch)
    torch.testing.assert_close(ours.sum / len(ours.losses), theirs, rtol=1e-6, atol=1e-6)


def test_a_packed_row_costs_what_its_samples_cost_alone():
    llm, (a, b) = small_llm(), random_ids(5, 7)
    packed, alone = run(llm, make_batch([[a, b]])), run(llm, make_batch([[a], [b]]))
    assert len(packed.losses) == len(alone.losses) == 4 + 6  # the first token of a sample has nothing before it
    torch.testing.assert_close(packed.sum, alone.sum, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 1000])
def test_chunks_change_neither_loss_nor_gradient(chunk_tokens):
    llm, batch = small_llm(), make_batch([[ids] for ids in random_ids(9, 6)])
    results = []
    for size in (1000, chunk_tokens):
        llm.zero_grad()
        loss = run(llm, batch, chunk_tokens=size)
        loss.sum.backward()
        results.append((loss.sum.detach(), torch.cat([p.grad.flatten() for p in llm.parameters()])))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_the_head_sees_only_positions_that_predict_a_learned_token():
    llm, batch = small_llm(), make_batch([random_ids(9)])
    batch.labels[:, :7] = -100
    seen = []
    hidden = llm.hidden(llm.embed(batch.input_ids), batch.position_ids, batch.segment_ids)
    answer_loss(hidden, batch.labels, lambda x: seen.append(x) or llm.head(x), segment_ids=batch.segment_ids)
    assert torch.equal(torch.cat(seen), hidden[0, 6:8])


def test_a_batch_with_nothing_learned_still_reaches_every_parameter():
    llm, batch = small_llm(), make_batch([random_ids(9)])
    batch.labels[:] = -100
    loss = run(llm, batch)
    loss.sum.backward()
    assert loss.sum == 0 and len(loss.losses) == 0
    assert all(p.grad is not None and not p.grad.any() for p in llm.parameters())


def test_losses_are_counted_for_the_source_of_the_learned_token():
    llm, batch = small_llm(), make_batch([random_ids(4, 5), random_ids(6, seed=1)])
    batch.source_ids[0, :4], batch.source_ids[0, 4:], batch.source_ids[1, :6] = 2, 0, 2
    loss = run(llm, batch)
    sums, counts = sum_by_source(loss.losses, batch.source_ids.flatten()[loss.index], num_sources=3)
    assert counts.tolist() == [4, 0, 3 + 5]
    torch.testing.assert_close(sums.sum(), loss.sum.detach())
    torch.testing.assert_close(sums[0], loss.losses[3:7].sum())
