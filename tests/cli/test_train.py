"""The command lines as users run them: results, exit statuses, several processes, a kill in the middle."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from visionattn.cli import evaluate, train

ROOT = Path(__file__).parents[2]
TRAIN, EVALUATE = (str(ROOT / "tools" / name) for name in ("train.py", "evaluate.py"))
DEMO = str(ROOT / "configs/classification/biformer_digits.yaml")

# test_vit has no batch norm, whose statistics would differ between one process and two.
CONFIG = """
task: classification
model: {name: test_vit, kwargs: {img_size: 32}}
data: {source: digits, image_size: 32}
augment: {hflip: 0, color_jitter: 0, crop_scale: [0.7, 1]}
optimizer: {lr: 3e-3}
schedule: {epochs: 2, warmup: 0.2}
train: {batch_size: 64, workers: 1, log_every: 1, save_every: 5}
"""

KILLED = """
import os, signal, sys
from visionattn.cli.train import main
from visionattn.engine.recorder import Recorder
advance = Recorder.advance
def dying(self):
    advance(self)
    if self.state.step == 29:
        os.kill(os.getpid(), signal.SIGKILL)
Recorder.advance = dying
main(sys.argv[1:])
"""


def run(*command: str, launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*launcher, *command], capture_output=True, text=True, env=environment, timeout=300, check=False
    )


def losses(folder: Path) -> list[float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture(scope="module")
def whole(config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on one process."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = run(TRAIN, config, f"output={folder}")
    assert done.returncode == 0, done.stderr
    assert "best top1" in done.stderr
    return folder


def test_training_learns(whole: Path) -> None:
    found = losses(whole)
    assert found[-1] < 0.75 * found[0]


def test_a_killed_run_resumes_to_the_same_result(config: str, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    killed = run("-c", KILLED, config, f"output={folder}")
    assert killed.returncode == -9, killed.stderr
    resumed = run(TRAIN, config, f"output={folder}", "resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert "continues at step 25" in resumed.stderr
    assert losses(folder) == losses(whole)
    for name in ("last", "best"):
        ours, theirs = (load_file(place / f"checkpoints/{name}.safetensors") for place in (folder, whole))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_equal_one_of_the_same_batch(
    parallel: str, config: str, whole: Path, tmp_path: Path
) -> None:
    launcher = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29517",
    )
    options = ("train.batch_size=32", f"train.parallel={parallel}")
    done = run(TRAIN, config, f"output={tmp_path}/two", *options, launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert "on 2 x cpu" in done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(whole), rel=2e-3)
    # Whole weights, whatever parts of them the processes held.
    for name in ("last", "best"):
        ours, theirs = (
            load_file(folder / f"checkpoints/{name}.safetensors") for folder in (tmp_path / "two", whole)
        )
        assert {n: v.shape for n, v in ours.items()} == {n: v.shape for n, v in theirs.items()}


def test_evaluation_repeats_the_result_of_the_run(whole: Path) -> None:
    with (whole / "metrics.csv").open(newline="") as file:
        judged = {row["step"]: row for row in csv.DictReader(file) if row["split"] == "eval"}
    best = max(judged.values(), key=lambda row: float(row["top1"]))
    done = run(EVALUATE, str(whole))
    assert done.returncode == 0, done.stderr
    printed = dict(line.split(": ") for line in done.stdout.splitlines())
    assert float(printed["top1"]) == pytest.approx(float(best["top1"]), abs=1e-3)
    assert float(printed["loss"]) == pytest.approx(float(best["loss"]), rel=1e-4)


def test_exit_status_of_wrong_input() -> None:
    done = run(TRAIN, "missing.yaml")
    assert done.returncode == 2
    assert done.stderr == "error: there is no configuration file missing.yaml\n"


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ([TRAIN, DEMO, "train.batchsize=3"], "unknown key train.batchsize: did you mean train.batch_size"),
        (
            [TRAIN, DEMO, "model.name=biformer_tiney"],
            "unknown network 'biformer_tiney': did you mean biformer_tiny",
        ),
        ([TRAIN, DEMO, "model.kwargs.depth=2"], "cannot build biformer_tiny with model.kwargs"),
        ([TRAIN, DEMO, "data.num_classes=7"], "data.num_classes is 7, but the images have 10 classes"),
        ([TRAIN, DEMO, "data.source=folder", "data.root=nowhere"], "there is no folder nowhere"),
        ([EVALUATE, DEMO, "--checkpoint", "missing.pth"], "there is no checkpoint missing.pth"),
        ([EVALUATE, "{folder}"], "holds no trained weights yet"),
    ],
)
def test_wrong_input_is_one_sentence(
    command: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    tool = train if command[0] == TRAIN else evaluate
    with pytest.raises(SystemExit) as ended:
        tool.main([argument.format(folder=tmp_path) for argument in command[1:]])
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert sentence in printed
    assert printed.count("\n") == 1


def test_help_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    for tool in (train, evaluate):
        with pytest.raises(SystemExit, match="0"):
            tool.parse_arguments(["--help"])
        assert "examples:" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        train.main([DEMO, "--options"])
    listed = capsys.readouterr().out
    assert "optimizer.lr" in listed
    assert "augment.mixup" in listed


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.kwargs={depths: abc}", "model.kwargs.depths is made of numbers, as [3, 4, 6, 5], but 'abc'"),
        ("model.kwargs={embed_dim: '16'}", "model.kwargs.embed_dim is made of numbers, as 64, but '16'"),
        ("model.kwargs={num_heads: [0, 1, 1, 1]}", "cannot build nat_mini with model.kwargs"),
        ("model.kwargs={embed_dim: 0}", "cannot build nat_mini with model.kwargs|has no numbers in its"),
        ("model.kwargs={depths: [1.5, 1, 1, 1]}", "cannot build nat_mini with model.kwargs"),
        ("model.kwargs={extra_norms: 'no'}", "model.kwargs.extra_norms is made of true and false, as false"),
        ("model.kwargs=[1]", "model.kwargs should be a valid dictionary"),
        ("data.root=images", "data: root would be ignored: source=digits is built in"),
        ("data.train_split=test", "data: train_split would be ignored"),
    ],
)
def test_options_that_cannot_be_meant(
    run_tool: Callable[..., tuple[object, str, str]], override: str, sentence: str, tmp_path: Path
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        "task: classification\nmodel: {name: nat_mini}\n"
        "data: {source: digits, image_size: 32}\nschedule: {steps: 1}\ntrain: {workers: 0}\n"
    )
    status, _, errors = run_tool("train.py", str(config), override, f"output={tmp_path / 'run'}")
    assert status == 2
    assert any(part in errors for part in sentence.split("|")), errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "run").exists()
