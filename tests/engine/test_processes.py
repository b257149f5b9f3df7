"""Several processes do what one does: losses, metrics and checkpoints; and they end when one is lost."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Started
from safetensors.torch import load_file
from test_loop import rows
from torch import nn

from visionattn import tasks
from visionattn.data import scenes
from visionattn.data.images import to_pil
from visionattn.engine import sharding
from visionattn.engine.config import parse_config
from visionattn.engine.loop import evaluate, train
from visionattn.engine.run_folder import read_state
from visionattn.engine.state import TrainingState

Work = Callable[[], Any]
KINDS = ("classification", "restoration", "detection", "segmentation")


def launch(work: Work, count: int = 2) -> list[Started]:
    """Start `work` in processes that know of each other as those of torchrun do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        Started(
            work,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(count),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        for rank in range(count)
    ]


def together(work: Work, count: int = 2) -> list[Started]:
    processes = launch(work, count)
    for process in processes:
        assert process.status() in (0, 128 + signal.SIGTERM), process.said
    return processes


def assert_equal_runs(ours: Path, theirs: Path) -> None:
    """The tables agree to 1e-6, the weights nearly so."""
    for split in ("train", "eval"):
        found, expected = rows(ours, split), rows(theirs, split)
        assert len(found) == len(expected)
        for mine, row in zip(found, expected, strict=True):
            numbers = [
                [float(value) for key, value in r.items() if value and key != "split"] for r in (mine, row)
            ]
            assert numbers[0] == pytest.approx(numbers[1], rel=1e-6, abs=1e-9)
    for name in ("last", "best"):
        weights = [load_file(folder / f"checkpoints/{name}.safetensors") for folder in (ours, theirs)]
        torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of small networks are sharded one by one, as those of large ones are."""
    monkeypatch.setattr(sharding, "_UNIT", 100)


@pytest.fixture(autouse=True, scope="module")
def _imported(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]) -> None:
    """A step of each task in this process, so that the forked ones need not import what it takes."""
    for kind in KINDS:
        train(
            make(settings(kind, data), tmp_path_factory.mktemp("first"), accumulate=1),
        )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The section of the data of each task."""
    return {
        "classification": {"source": "digits", "image_size": 32},
        "restoration": _images(tmp_path_factory),
        **_scenes(tmp_path_factory),
    }


def _scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Scenes of one size: images of several are filled up to the largest of their batch."""
    few = scenes.SceneOptions(train=16, validation=5)
    root = tmp_path_factory.mktemp("scenes") / "scenes"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "_SHAPES", ((128, 128),))
        scenes.scenes_folder(root, few)
    section = {"root": str(root), "scenes": {"train": few.train, "validation": few.validation}}
    return dict.fromkeys(("detection", "segmentation"), section)


def _images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Five images of different sizes to judge, three to train on."""
    folder, generator = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    for split, count in (("train", 3), ("eval", 5)):
        (folder / split).mkdir()
        for n in range(count):
            smooth = torch.rand(1, 3, 6, 6, generator=generator)
            image = torch.nn.functional.interpolate(smooth, (40 + n, 52 - n), mode="bicubic")[0].clamp(0, 1)
            to_pil((255 * image).to(torch.uint8)).save(folder / split / f"{n}.png")
    return {
        "source": "folders",
        "train_gt": [str(folder / "train")],
        "eval_gt": [str(folder / "eval")],
        "patch_size": 12,
        "repeat": 8,
    }


def settings(kind: str, data: dict[str, Any]) -> dict[str, Any]:
    """A few steps of a real task without randomness inside the network."""
    common = {
        "optimizer": {"name": "momentum", "lr": 0.02, "weight_decay": 0.01},
        "schedule": {"steps": 6, "warmup": 2},
        "ema": {"decay": 0.5},
    }
    train = {
        "workers": 0,
        "log_every": 1,
        "eval_every": 3,
        "save_every": 2,
        "accumulate": 2,
        "clip_grad": 1.0,
    }
    kwargs = {"embed_dim": 12, "depths": [1], "num_heads": 2, "window_size": 8, "compress_ratio": 3}
    of_hat = {**kwargs, "squeeze_factor": 6, "drop_path_rate": 0.0}
    nat = {
        "embed_dim": 16,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 2, 4],
        "kernel_size": 3,
        "mlp_ratio": 1,
    }
    backbone = {"name": "nat_mini", "kwargs": {**nat, "drop_path_rate": 0.0}}
    of_task: dict[str, Any] = {
        "classification": {"model": {"name": "test_vit", "kwargs": {"img_size": 32}}},
        "restoration": {"model": {"name": "hat_s_x2", "kwargs": of_hat}},
        # Neither samples at random nor weighs images by what else is in the batch.
        "detection": {"model": backbone, "detector": {"name": "retinanet", "fpn_channels": 16}},
        "segmentation": {
            "model": backbone,
            "augment": {"crop_size": 64, "scale": [0.8, 1.2]},
            "segmenter": {"channels": 16, "auxiliary_channels": 8},
        },
    }
    batch_size = 8 if kind == "classification" else 4
    return {
        "task": kind,
        "data": data[kind],
        **of_task[kind],
        **common,
        "train": {**train, "batch_size": batch_size},
    }


def make(content: dict[str, Any], folder: Path, processes: int = 1, **options: Any) -> Any:
    """The task of `content` in a run folder, its batch shared out among processes."""
    options = {"batch_size": content["train"]["batch_size"] // processes, **options}
    resume = options.pop("resume", None)
    content = {**content, "output": str(folder), "resume": resume, "train": {**content["train"], **options}}
    task = tasks.create_task(parse_config(content, tasks.config_class(content)))
    _make_independent(task.model)
    return task


def _make_independent(network: nn.Module) -> None:
    """Replace what depends on chance or on the whole batch, of which every process has a part."""
    for name, module in network.named_children():
        if isinstance(module, nn.BatchNorm2d):
            setattr(network, name, nn.GroupNorm(1, module.num_features))
        elif isinstance(module, nn.Dropout2d):
            setattr(network, name, nn.Identity())
        else:
            _make_independent(module)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(kind: str, data: dict[str, Any], tmp_path: Path) -> None:
    content = settings(kind, data)
    together(lambda: train(make(content, tmp_path / "one")), 1)
    for parallel in ("ddp", "fsdp"):
        together(lambda: train(make(content, tmp_path / parallel, 2, parallel=parallel)))  # noqa: B023
        assert_equal_runs(tmp_path / parallel, tmp_path / "one")


def stopping(step: int, work: Work) -> Work:
    """`work`, the last process of which is told to stop at a step."""

    def run() -> Any:
        def add(state: TrainingState, values: dict[str, float], add: Any = TrainingState.add) -> None:
            add(state, values)
            if state.step == step and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
                os.kill(os.getpid(), signal.SIGTERM)

        TrainingState.add = add  # type: ignore[method-assign]
        return work()

    return run


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((2, "fsdp"), (1, "ddp")),
        ((1, "ddp"), (2, "fsdp")),
        # says nothing that the two above do not imply, as long as all is well
        pytest.param((2, "fsdp"), (2, "ddp"), marks=pytest.mark.slow),
    ],
)
def test_a_run_continues_in_another_form(
    first: tuple[int, str], second: tuple[int, str], data: dict[str, Any], tmp_path: Path
) -> None:
    content = settings("classification", data)
    together(lambda: train(make(content, tmp_path / "whole")), 1)
    folder = tmp_path / "run"
    stopped = together(
        stopping(2, lambda: train(make(content, folder, first[0], parallel=first[1]))), first[0]
    )
    assert all(process.status() == 128 + signal.SIGTERM for process in stopped)
    assert read_state(folder / "checkpoints/last.state.pt")["step"] == 3
    together(lambda: train(make(content, folder, second[0], parallel=second[1], resume="auto")), second[0])
    assert_equal_runs(folder, tmp_path / "whole")


def test_sharded_runs_resume_bit_for_bit(data: dict[str, Any], tmp_path: Path) -> None:
    content = settings("classification", data)
    options = {"parallel": "fsdp", "amp": "bf16", "accumulate": 1, "eval_every": None}
    together(lambda: train(make(content, tmp_path / "whole", 2, **options)))
    together(stopping(3, lambda: train(make(content, tmp_path / "run", 2, **options))))
    together(lambda: train(make(content, tmp_path / "run", 2, resume="auto", **options)))
    for name in ("last", "best"):
        ours, theirs = (
            load_file(tmp_path / run / f"checkpoints/{name}.safetensors") for run in ("run", "whole")
        )
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert rows(tmp_path / "run", "train") == rows(tmp_path / "whole", "train")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_only_the_first_process_writes(parallel: str, data: dict[str, Any], tmp_path: Path) -> None:
    def watched() -> Any:
        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            writes = event in ("os.rename", "os.mkdir", "os.remove") or (
                event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
            if writes and str(arguments[0]).startswith(str(tmp_path)):
                print("WROTE", event, arguments, file=sys.stderr)

        sys.addaudithook(watch)
        return train(make(settings("classification", data), tmp_path / "run", 2, parallel=parallel))

    first, second = together(watched)
    assert "WROTE" in first.said
    assert "WROTE" not in second.said


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_the_loss_of_a_process_ends_the_run(
    parallel: str, how: str, data: dict[str, Any], tmp_path: Path
) -> None:
    """Killed or hanging, the others say so and end."""
    timeout = 3

    def work() -> Any:
        def add(state: TrainingState, values: dict[str, float], add: Any = TrainingState.add) -> None:
            add(state, values)
            if state.step == 3 and os.environ["RANK"] == "0":
                print("NOW", file=sys.stderr)
            if state.step == 3 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), getattr(signal, how))

        TrainingState.add = add  # type: ignore[method-assign]
        content = settings("classification", data)
        return train(make(content, tmp_path / "run", 2, parallel=parallel, timeout=timeout))

    first, second = launch(work)
    while first.status(0.01) is None and "NOW" not in first.listen():
        pass
    begin = time.perf_counter()
    assert first.status(60) == 1, first.said
    assert time.perf_counter() - begin < timeout + 20  # the machine may be busy
    second.signal(signal.SIGKILL)
    assert "stopped: process 0 of 2 waited for another that ended or was silent" in first.said
    assert "Traceback" not in first.said
    # Whole weights are saved before both processes judge them; shards want both for that too.
    saved = 3 if parallel == "ddp" else 2
    assert read_state(tmp_path / "run/checkpoints/last.state.pt")["step"] == saved


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_shared_out(kind: str, count: int, data: dict[str, Any], tmp_path: Path) -> None:
    """The same metrics on every process, of a number of samples that the processes do not divide."""
    content = settings(kind, data)

    def judge() -> None:
        metrics = evaluate(make(content, tmp_path / "unused"))
        print({name: round(value, 6) for name, value in metrics.items()}, file=sys.stderr)

    alone = together(judge, 1)[0].said
    assert "{" in alone
    assert {process.said for process in together(judge, count)} == {alone}
