"""Data loading whose every random draw is a function of the seed and the position in the run.

The n-th sample of an epoch is chosen and augmented from a seed made of (run seed, epoch, n). Number of
processes and workers do not enter, and a resumed run continues at its position without reading what came
before.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from visionattn.data.decode import ImageError
from visionattn.engine.config import TrainConfig
from visionattn.engine.distributed import process_count, process_index
from visionattn.errors import InputError, RunError

_PURPOSES = ("weights", "samples", "updates")


def seed_all(purpose: Literal["weights", "samples", "updates"], *entropy: int, devices: bool = True) -> None:
    """Seed python, numpy and torch as a function of a purpose and of integers such as (seed, step, process).

    Args:
        purpose: keeps the random numbers of different uses apart.
        entropy: what the random numbers shall be a function of.
        devices: seed torch's generators of all devices, not only the CPU's.
    """
    words = np.random.SeedSequence((_PURPOSES.index(purpose), *entropy)).generate_state(3).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    (torch.manual_seed if devices else torch.default_generator.manual_seed)(words[2])


class TrainSampler(Sampler[tuple[int, int, int]]):
    """The shuffled samples of one process: `(epoch, position, index)`, positions counting over all processes.

    Positions are dealt to the processes in turn, so that a given batch over all processes holds the same
    samples however many processes there are. What does not fill a whole update is left out.

    Args:
        length: number of samples.
        config: batch size, accumulation and seed.
        repeats: how often a sample comes in a row, each time augmented anew; an epoch then sees so many times
            fewer different samples (repeated augmentation: Hoffer et al., arXiv 1901.09335).

    Raises:
        InputError: there are fewer samples than one update needs.
    """

    def __init__(self, length: int, config: TrainConfig, repeats: int = 1) -> None:
        per_update = config.batch_size * config.accumulate * process_count()
        if length < per_update:
            raise InputError(
                f"the training data has {length} samples, fewer than the {per_update} of one update "
                f"(train.batch_size x train.accumulate x processes)"
            )
        self.length, self.repeats, self.config = length, repeats, config
        self.used = length // per_update * per_update
        self.epoch = self.first = 0

    def set_position(self, epoch: int, batch: int) -> None:
        """Begin the next iteration at a batch of this process in an epoch."""
        self.epoch, self.first = epoch, batch * self.config.batch_size

    def __len__(self) -> int:
        return self.used // process_count()

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        order = np.random.default_rng((self.config.seed, self.epoch)).permutation(self.length)
        first = process_index() + self.first * process_count()
        for position in range(first, self.used, process_count()):
            yield self.epoch, position, int(order[position // self.repeats])


class SeededDataset(Dataset):
    """A dataset asked by `TrainSampler`'s keys, which draws each sample under the seed of its position."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int, int]) -> Any:
        epoch, position, index = key
        with _random_state_kept():
            seed_all("samples", self.seed, epoch, position, devices=False)
            return self.dataset[index]


@contextmanager
def _random_state_kept() -> Iterator[None]:
    if get_worker_info() is not None:
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def make_train_loader(
    dataset: Dataset, config: TrainConfig, repeats: int = 1, collate: Callable[[list[Any]], Any] | None = None
) -> DataLoader:
    """The loader of a task's training data: shuffled, sharded over processes, resumable.

    Args:
        dataset: map-style samples, or an `IterableDataset`, which shards and shuffles itself and is resumed
            by reading over what was seen.
        config: batch size, workers and seed.
        repeats: see `TrainSampler`.
        collate: makes a batch of a list of samples; by default torch's own.
    """
    if isinstance(dataset, IterableDataset):
        return _loader(dataset, config.batch_size, config, collate_fn=collate, drop_last=True)
    sampler = TrainSampler(len(dataset), config, repeats)  # type: ignore[arg-type]
    seeded = SeededDataset(dataset, config.seed)
    return _loader(seeded, config.batch_size, config, collate_fn=collate, sampler=sampler, drop_last=True)


def make_eval_loader(
    dataset: Dataset, config: TrainConfig, collate: Callable[[list[Any]], Any] | None = None
) -> DataLoader:
    """The loader of a task's held-out data: in order, every sample on exactly one process, none padded.

    An `IterableDataset` deals its samples to the processes itself; timm's may repeat one to come out even.
    `collate` makes a batch of a list of samples.
    """
    batch_size = config.eval_batch_size or config.batch_size
    if isinstance(dataset, IterableDataset):
        return _loader(dataset, batch_size, config, collate_fn=collate)
    mine = range(process_index(), len(dataset), process_count())  # type: ignore[arg-type]
    return _loader(dataset, batch_size, config, collate_fn=collate, sampler=mine)


def _loader(dataset: Dataset, batch_size: int, config: TrainConfig, **kwargs: Any) -> DataLoader:
    # timm's streams count their batches by the number of workers.
    tell_workers = getattr(dataset, "set_loader_cfg", None)
    if tell_workers is not None:
        tell_workers(num_workers=config.workers)
    return _Loader(
        dataset,
        batch_size=batch_size,
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        pin_memory=torch.cuda.is_available(),
        **kwargs,
    )


class _Loader(DataLoader):
    """A loader that names the file which cannot be read any more, though it could before the run."""

    def __iter__(self) -> Any:
        return self._naming(super().__iter__())  # which draws its seed now, not at the first sample

    @staticmethod
    def _naming(samples: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from samples
        except (ImageError, FileNotFoundError) as error:
            # A worker process sends its traceback as the message, whose last line is the sentence.
            sentence = str(error).strip().splitlines()[-1].removeprefix("visionattn.data.decode.ImageError: ")
            raise RunError(f"a sample cannot be read: {sentence}") from error


def batch_count(loader: Iterable[Any]) -> int | None:
    """Batches in one pass over a loader, None where the source does not know."""
    try:
        return len(loader) or None if isinstance(loader, Sized) else None
    except TypeError:  # a DataLoader over an unsized source has __len__, which raises
        return None


def endless_batches(
    loader: Iterable[Any], updates_per_epoch: int | None, accumulate: int, step: int
) -> Iterator[Any]:
    """Batches epoch after epoch without end, as from the beginning of a run, but starting at an update.

    Args:
        loader: from `make_train_loader`, or any iterable of batches.
        updates_per_epoch: None where the source does not know; the first `step` updates are then read over.
        accumulate: batches in one update; what does not fill an update at the end of an epoch is left out.
        step: updates already made.
    """
    if updates_per_epoch is None:
        yield from itertools.islice(_epochs(loader, 0, 0, None), step * accumulate, None)
    else:
        epoch, update = divmod(step, updates_per_epoch)
        yield from _epochs(loader, epoch, update * accumulate, updates_per_epoch * accumulate)


def _epochs(loader: Iterable[Any], epoch: int, first: int, per_epoch: int | None) -> Iterator[Any]:
    while True:
        read_over = _set_position(loader, epoch, first)
        end = None if per_epoch is None else per_epoch - first + read_over
        empty = True
        for batch in itertools.islice(loader, read_over, end):
            empty = False
            yield batch
        if empty:
            raise RunError(f"the training data gave no batch in epoch {epoch}")
        epoch, first = epoch + 1, 0


def _set_position(loader: Iterable[Any], epoch: int, batch: int) -> int:
    """Point a loader at a position; returns how many batches must still be read over."""
    sampler, dataset = getattr(loader, "sampler", None), getattr(loader, "dataset", None)
    if isinstance(sampler, TrainSampler):
        sampler.set_position(epoch, batch)
        return 0
    for part in (sampler, dataset):
        set_epoch = getattr(part, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
    return batch
