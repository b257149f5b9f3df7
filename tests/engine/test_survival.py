"""Runs that are killed, stopped or out of room: what was saved stays, a resumed run ends in the same bits."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Started
from safetensors.torch import load_file
from test_loop import rows
from torch.optim import SGD

from visionattn.data import pictures
from visionattn.engine import recorder, run_folder
from visionattn.engine.loop import Result, train
from visionattn.engine.run_folder import read_state
from visionattn.engine.setup import Plan
from visionattn.engine.state import TrainingState
from visionattn.files import replacing

MakeTask = Callable[..., Any]

#: All that a checkpoint holds: average, schedule, best value, batch statistics, dropout, noise of the data.
OPTIONS: dict[str, Any] = {
    "ema": {"decay": 0.9, "warmup": True},
    "schedule": {"epochs": 4, "warmup": 0.5},
    "train": {"save_every": 2, "accumulate": 2, "batch_size": 4, "clip_grad": 5.0},
}


@pytest.fixture
def whole(make_task: MakeTask) -> tuple[Path, float]:
    """The folder of a run that nothing disturbed, and how long it took in seconds."""
    begin = time.perf_counter()
    task = make_task("whole", **OPTIONS)
    train(task)
    return task.config.run_folder, time.perf_counter() - begin


def assert_same_end(folder: Path, whole: Path) -> None:
    """Weights, the best of them, optimizer and all else in the state, and the table, to the last bit."""
    assert not list(folder.rglob(".*"))
    for name in ("last", "best"):
        ours, theirs = (load_file(place / f"checkpoints/{name}.safetensors") for place in (folder, whole))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    ours, theirs = (read_state(place / "checkpoints/last.state.pt") for place in (folder, whole))
    torch.testing.assert_close(
        [part for part in torch.utils._pytree.tree_leaves(ours) if isinstance(part, torch.Tensor)],
        [part for part in torch.utils._pytree.tree_leaves(theirs) if isinstance(part, torch.Tensor)],
        rtol=0,
        atol=0,
    )
    assert (ours["step"], ours["best"], ours["metrics"]) == (
        theirs["step"],
        theirs["best"],
        theirs["metrics"],
    )
    assert json.loads((folder / "best.json").read_text()) == json.loads((whole / "best.json").read_text())
    for split in ("train", "eval"):
        assert rows(folder, split) == rows(whole, split)


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_moments(
    make_task: MakeTask, whole: tuple[Path, float], tmp_path: Path, seed: int
) -> None:
    folder, seconds = whole
    moments = random.Random(seed)
    for _ in range(8):
        run = Started(lambda: train(make_task("killed", resume="auto", **OPTIONS)))
        run.status(moments.uniform(0, seconds))
        run.signal(signal.SIGKILL)
        assert run.status() in (-signal.SIGKILL, 0), run.said
    train(make_task("killed", resume="auto", **OPTIONS))
    assert_same_end(tmp_path / "killed", folder)


@pytest.mark.parametrize("when", ["half-written", "renamed"])
@pytest.mark.parametrize("write", [2, 4, 6, 7, 8, 9, 13, 17])
def test_killed_while_saving(
    make_task: MakeTask, whole: tuple[Path, float], tmp_path: Path, write: int, when: str
) -> None:
    def run() -> Result:
        left = write

        @contextmanager
        def dying(path: Path) -> Iterator[Path]:
            nonlocal left
            left -= 1
            with replacing(path) as beside:
                yield beside
                if left == 0 and when == "half-written":
                    os.truncate(beside, beside.stat().st_size // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        pictures.replacing = run_folder.replacing = recorder.replacing = dying
        return train(make_task("killed", **OPTIONS))

    killed = Started(run)
    assert killed.status() == -signal.SIGKILL, killed.said
    train(make_task("killed", resume="auto", **OPTIONS))
    assert_same_end(tmp_path / "killed", whole[0])


@pytest.mark.parametrize("seed", [0, 1])
def test_told_to_stop_at_random_moments(
    make_task: MakeTask, whole: tuple[Path, float], tmp_path: Path, seed: int
) -> None:
    folder, seconds = whole
    moments, stops, status = random.Random(seed), 0, None
    while status != 0:
        run = Started(lambda: train(make_task("stopped", resume="auto", **OPTIONS)))
        while run.status(0.005) is None and "step" not in run.listen():
            pass
        run.status(moments.uniform(0, seconds / 3))
        run.signal(signal.SIGTERM)
        status = run.status()
        assert status in (0, 128 + signal.SIGTERM), run.said
        assert status == 0 or "stopped by SIGTERM" in run.said
        stops += status != 0
    assert stops
    assert_same_end(tmp_path / "stopped", folder)


@pytest.mark.parametrize("name", ["last.state.pt", "last.safetensors"])
def test_out_of_room(make_task: MakeTask, whole: tuple[Path, float], tmp_path: Path, name: str) -> None:
    """No file may grow beyond a bit less than a checkpoint from the fifth step on."""
    limit = (whole[0] / "checkpoints" / name).stat().st_size - 1

    def run() -> Result:
        def add(state: TrainingState, values: dict[str, float], add: Any = TrainingState.add) -> None:
            add(state, values)
            if state.step == 5:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        TrainingState.add = add  # type: ignore[method-assign]
        return train(make_task("full", **OPTIONS))

    full = Started(run)
    assert full.status() == 1, full.said
    assert "stopped: cannot write" in full.said
    assert "file too large; what was saved before is untouched" in full.said
    assert "Traceback" not in full.said
    # At step 6 a state that is still to be judged comes first, which is a little smaller than a judged one.
    saved = 6 if name == "last.state.pt" else 4
    assert read_state(tmp_path / "full/checkpoints/last.state.pt")["step"] == saved
    assert load_file(tmp_path / "full/checkpoints/last.safetensors")
    train(make_task("full", resume="auto", **OPTIONS))
    assert_same_end(tmp_path / "full", whole[0])


def test_the_scaler_of_float16_is_resumed() -> None:
    def state() -> TrainingState:
        model = torch.nn.Linear(2, 1)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
        return TrainingState(model, None, SGD(model.parameters(), 0.1), scaler, None, Plan(1, 9, None, None))

    first, second = state(), state()
    for _ in range(4):  # grows once, and counts one step towards the next time
        first.scaler.scale(first.model(torch.ones(1, 2)).sum()).backward()
        first.scaler.step(first.optimizer)
        first.scaler.update()
    second.load_state_dict(first.state_dict())
    assert second.scaler.state_dict() == first.scaler.state_dict()
    assert second.scaler.state_dict()["scale"] == 128.0
    assert second.scaler.state_dict()["_growth_tracker"] == 1
