"""A task of a few parameters with every kind of randomness, on which the engine is tested in milliseconds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from visionattn.engine.batches import make_eval_loader, make_train_loader, seed_all
from visionattn.engine.config import RunConfig, parse_config
from visionattn.engine.distributed import gather_objects
from visionattn.engine.task import Task


class NoisyLine(Dataset):
    """Points of a line, disturbed anew at every look with the random numbers of python, numpy and torch."""

    def __init__(self, noise: float) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(50, 8, generator=generator)
        self.y = self.x.sum(1, keepdim=True)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = random.random() + np.random.rand() + torch.randn(8)
        return self.x[index] + self.noise * noise.float(), self.y[index]


class ToyTask(Task):
    monitor = "error"
    higher_is_better = False

    def __init__(self, config: RunConfig, noise: float = 0.05) -> None:
        super().__init__()
        self.config, self.noise = config, noise
        dropout = config.model.kwargs.get("dropout", 0.1)
        self.model = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(dropout), nn.Linear(16, 1)
        )
        if config.model.kwargs.get("batch_norm", True) is False:
            self.model[1] = nn.Identity()
        self.bad_steps: set[int] = set()
        self.calls = 0

    def loss(self, batch: Any) -> dict[str, Tensor]:
        x, y = batch
        self.calls += 1
        if self.calls in self.bad_steps:
            x = x * float("nan")
        difference = self.model(x).float() - y
        return {"loss": difference.square().mean(), "absolute": difference.abs().mean()}

    def evaluate(self, loader: Iterable[Any]) -> dict[str, float]:
        errors = [abs(float(d)) for x, y in loader for d in self.model(x).float() - y]
        errors = [error for part in gather_objects(errors) for error in part]
        return {"error": sum(errors) / len(errors), "count": len(errors)}

    def predict(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    def train_loader(self) -> Iterable[Any]:
        return make_train_loader(NoisyLine(self.noise), self.config.train)

    def eval_loader(self) -> Iterable[Any]:
        return make_eval_loader(NoisyLine(0.0), self.config.train)

    def pictures(self) -> dict[str, Image.Image]:
        return {"grey": Image.new("L", (4, 4), 128)}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_task(tmp_path: Path) -> Callable[..., ToyTask]:
    """Makes a toy task whose run folder has a name; sections as keywords."""

    def make(name: str = "run", noise: float = 0.05, **sections: Any) -> ToyTask:
        train = {"batch_size": 8, "workers": 0, "log_every": 1, **sections.pop("train", {})}
        content = {
            "task": "toy",
            "model": {"name": "toy"},
            "optimizer": {"lr": 0.01},
            "schedule": {"epochs": 3, "warmup": 0.5},
            "output": str(tmp_path / name),
            **sections,
            "train": train,
        }
        config = parse_config(content, RunConfig)
        seed_all("weights", config.train.seed)
        return ToyTask(config, noise)

    return make
