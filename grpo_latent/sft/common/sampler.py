"""Which rows make a batch: a function of (seed, epoch), so that a resumed run reads the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from grpo_latent.errors import ConfigError


class SeededBatchSampler(Sampler[list[int]]):
    """Cuts a seeded permutation of the rows, drawn anew each epoch, into batches.

    The incomplete last batch is left out: all steps are of one size.

    With `labelled_per_batch`, each batch has that many rows with an answer and the rest without:
    an epoch is one pass over the rows without, while the few with an answer come round as often as
    needed.

    Args:
        has_answer: one truth value per row.
        multiple_of: an epoch's batches are cut to a multiple of this.
    """

    def __init__(
        self,
        has_answer: Sequence[bool],
        batch_size: int,
        seed: int = 0,
        labelled_per_batch: int | None = None,
        multiple_of: int = 1,
    ):
        rows = np.arange(len(has_answer))
        labelled = np.asarray(has_answer, dtype=bool)
        self.batch_size = batch_size
        self.drop_last = True  # accelerate asks for it
        self.seed = seed
        self.epoch = 0
        # (rows, how many of them a batch takes), the pool that makes the epoch first
        self._pools = [(rows, batch_size)]
        if labelled_per_batch is not None:
            self._pools = [
                (rows[~labelled], batch_size - labelled_per_batch),
                (rows[labelled], labelled_per_batch),
            ]
        for pool, share in self._pools:
            self._check(pool, share, labelled_per_batch)
        pool, share = self._pools[0]
        self._num_batches = len(pool) // share // multiple_of * multiple_of
        if self._num_batches == 0:
            raise ConfigError(
                "not enough rows for one step",
                where="trainer.gradient_accumulation_steps",
                got=f"{len(pool) // share} batches",
                expected=f"{multiple_of}: those of all processes and their accumulation",
                fix="Lower trainer.gradient_accumulation_steps, or start fewer processes.",
            )

    def _check(self, pool: np.ndarray, share: int, labelled_per_batch: int | None) -> None:
        if share >= 1 and len(pool) >= (share if pool is self._pools[0][0] else 1):
            return
        raise ConfigError(
            "not enough rows for one batch",
            where="data.labelled_per_batch, trainer.per_device_train_batch_size",
            got=f"{labelled_per_batch} labelled of {self.batch_size}, from a pool of {len(pool)} "
            "rows",
            expected="at least one batch of rows, of both kinds if labelled_per_batch is set",
            fix="Lower the batch size, or leave data.labelled_per_batch null.",
        )

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        streams = []
        for pool, share in self._pools:
            # the smaller pool comes round again, each time in another order
            num_passes = -(-self._num_batches * share // len(pool))
            streams.append(np.concatenate([rng.permutation(pool) for _ in range(num_passes)]))
        for batch_idx in range(self._num_batches):
            batch = [
                stream[batch_idx * share : (batch_idx + 1) * share]
                for stream, (_, share) in zip(streams, self._pools, strict=True)
            ]
            yield np.concatenate(batch).tolist()
