"""Which rows make a batch, and in what order."""

import pytest

from grpo_latent.errors import ConfigError
from grpo_latent.sft.common.sampler import SeededBatchSampler

LABELLED = [index % 4 == 0 for index in range(22)]


def batches(epoch=0, seed=0, **kwargs):
    sampler = SeededBatchSampler(LABELLED, 4, seed, **kwargs)
    sampler.set_epoch(epoch)
    assert len(sampler) == len(list(sampler))
    return list(sampler)


def test_an_epoch_is_a_permutation():
    rows = [row for batch in batches() for row in batch]
    assert len(batches()) == 5 and len(set(rows)) == 20 and rows != sorted(rows)


def test_order_depends_on_seed_and_epoch_only():
    assert batches(epoch=1) == batches(epoch=1)
    assert len({str(batches(epoch, seed)) for epoch in range(3) for seed in range(3)}) == 9


def test_labelled_rows_have_their_share_of_each_batch():
    own = batches(labelled_per_batch=2)
    assert [sum(LABELLED[row] for row in batch) for batch in own] == [2] * 8
    unlabelled = [row for batch in own for row in batch if not LABELLED[row]]
    assert len(set(unlabelled)) == 16, "no row without an answer twice in an epoch"
    labelled = [row for batch in own for row in batch if LABELLED[row]]
    assert {labelled.count(row) for row in set(labelled)} == {2, 3}, "16 draws of 6 rows, evenly"


@pytest.mark.parametrize(
    ("has_answer", "batch_size", "labelled_per_batch"),
    [
        ([True] * 3, 4, None),
        ([True] * 8, 4, 1),
        ([False] * 8, 4, 1),
        ([True, False] * 4, 4, 4),
        ([True, False] * 4, 4, 5),
        ([True, False] * 4, 4, 0),
    ],
)
def test_impossible_batches_are_refused(has_answer, batch_size, labelled_per_batch):
    with pytest.raises(ConfigError, match="not enough rows"):
        SeededBatchSampler(has_answer, batch_size, 0, labelled_per_batch)
