"""The order of the samples and their random numbers, as functions of the position in the run."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from visionattn.engine import batches
from visionattn.engine.config import TrainConfig
from visionattn.errors import InputError, RunError


class Draws(Dataset):
    """The index and one number from each source of randomness."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(
            [index, random.random(), np.random.rand(), float(torch.rand(()))], dtype=torch.float64
        )


class Stream(IterableDataset):
    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        return iter(torch.arange(6) + 100 * self.epoch)


def config(**options: Any) -> TrainConfig:
    return TrainConfig(**{"batch_size": 4, "workers": 0, "seed": 3, **options})


def take(
    loader: Any, updates_per_epoch: int | None, accumulate: int, step: int, count: int
) -> list[torch.Tensor]:
    return list(itertools.islice(batches.endless_batches(loader, updates_per_epoch, accumulate, step), count))


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_follow_from_the_position(workers: int) -> None:
    reference = take(batches.make_train_loader(Draws(), config()), 5, 1, 0, 12)
    loader = batches.make_train_loader(Draws(), config(workers=workers))
    for step in (3, 9):  # in the middle of an epoch, and in a later one with the same workers
        torch.testing.assert_close(take(loader, 5, 1, step, 3), reference[step : step + 3], rtol=0, atol=0)


def test_epochs_are_permutations_drawn_anew() -> None:
    drawn = torch.stack(take(batches.make_train_loader(Draws(), config()), 5, 1, 0, 10))
    first, second = drawn[:5].flatten(0, 1), drawn[5:].flatten(0, 1)
    for epoch in (first, second):
        assert len(epoch[:, 0].unique()) == 20
    assert not torch.equal(first[:, 0], second[:, 0])
    assert len(drawn[..., 1:].flatten().unique()) == drawn[..., 1:].numel()


def test_processes_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    together = take(batches.make_train_loader(Draws(), config(batch_size=8)), 2, 1, 0, 4)
    monkeypatch.setattr(batches, "process_count", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(batches, "process_index", lambda rank=rank: rank)
        shares.append(take(batches.make_train_loader(Draws(), config()), 2, 1, 0, 4))
    for whole, mine, other in zip(together, *shares, strict=True):
        torch.testing.assert_close(torch.stack([mine, other], 1).flatten(0, 1), whole, rtol=0, atol=0)


def test_loading_leaves_the_random_state_alone() -> None:
    loader = batches.make_train_loader(Draws(), config())
    iterator = iter(loader)
    batches.seed_all("updates", 1, 2)
    expected = random.random(), np.random.rand(), float(torch.rand(()))
    batches.seed_all("updates", 1, 2)
    next(iterator)
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected


def test_repeats_stand_side_by_side_with_new_draws() -> None:
    drawn = torch.cat(take(batches.make_train_loader(Draws(), config(), repeats=2), 5, 1, 0, 5))
    pairs = drawn.unflatten(0, (10, 2))
    assert torch.equal(pairs[:, 0, 0], pairs[:, 1, 0])
    assert not torch.equal(pairs[:, 0, 1], pairs[:, 1, 1])


def test_held_out_samples_come_once_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "process_count", lambda: 2)
    seen = []
    for rank in (0, 1):
        monkeypatch.setattr(batches, "process_index", lambda rank=rank: rank)
        seen += [int(sample[0]) for batch in batches.make_eval_loader(Draws(), config()) for sample in batch]
    assert seen == [*range(0, 23, 2), *range(1, 23, 2)]


def test_streams_are_read_over_to_the_position() -> None:
    loader = batches.make_train_loader(Stream(), config(batch_size=2))
    everything = torch.stack(take(loader, None, 1, 0, 9))
    assert everything[3, 0] == 100
    assert torch.equal(torch.stack(take(loader, None, 1, 4, 5)), everything[4:])
    assert torch.equal(torch.stack(take(loader, 3, 1, 4, 5)), everything[4:])


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(InputError, match="has 23 samples, fewer than the 24 of one update"):
        batches.make_train_loader(Draws(), config(accumulate=6))


def test_an_empty_source_ends_the_run() -> None:
    with pytest.raises(RunError, match="no batch"):
        take([], 3, 1, 0, 1)


def test_unknown_length() -> None:
    assert batches.batch_count(iter([])) is None
    assert batches.batch_count(batches.make_train_loader(Stream(), config())) is None
    assert batches.batch_count([1, 2]) == 2
