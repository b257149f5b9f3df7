"""Detection and segmentation by the command lines: training, judging, prediction, two processes, configs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from visionattn import tasks
from visionattn.data.scenes import SceneOptions, scenes_folder

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(
    path for kind in ("detection", "segmentation") for path in (ROOT / "configs" / kind).glob("*.yaml")
)
FEW = {"train": 8, "validation": 3}
SHARED = """
model:
  name: nat_mini
  kwargs: {embed_dim: 16, depths: [1, 1, 1, 1], num_heads: [1, 2, 2, 4], kernel_size: 3, mlp_ratio: 1}
schedule: {steps: 4, warmup: 1}
train: {batch_size: 2, workers: 0, clip_grad: 5.0, log_every: 1, eval_every: 2}
"""
DETECTION = """
task: detection
augment: {hflip: 0.0}
detector: {name: retinanet, fpn_channels: 16}
"""
SEGMENTATION = """
task: segmentation
augment: {crop_size: 64, hflip: 0.0}
segmenter: {name: semantic_fpn, channels: 16, fpn_channels: 16}
"""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes_folder(tmp_path_factory.mktemp("data") / "scenes", SceneOptions(**FEW))


@pytest.fixture(params=["detection", "segmentation"])
def config(request: pytest.FixtureRequest, scenes: Path, tmp_path: Path) -> Path:
    text = {"detection": DETECTION, "segmentation": SEGMENTATION}[request.param] + SHARED
    path = tmp_path / f"{request.param}.yaml"
    path.write_text(f"{text}data: {{root: {scenes}, scenes: {FEW}}}\noutput: {tmp_path}/run\n")
    return path


def test_train_resume_evaluate_predict(config: Path, run_tool, scenes: Path, tmp_path: Path):
    status, _, log = run_tool("train.py", str(config))
    assert status == 0
    assert config.stem in log
    assert (tmp_path / "run/pictures/comparison.png").is_file()
    status, _, error = run_tool("train.py", str(config))
    assert status == 2
    assert "already holds a run" in error
    status, _, log = run_tool("train.py", str(config), "resume=auto")
    assert status == 0
    assert "continues at step 4" in log

    status, printed, _ = run_tool("evaluate.py", str(tmp_path / "run"))
    assert status == 0
    metrics = dict(line.split(": ") for line in printed.splitlines())
    monitor = {"detection": "box_map", "segmentation": "miou"}[config.stem]
    assert 0 <= float(metrics[monitor]) <= 1
    status, _, error = run_tool("evaluate.py", str(tmp_path / "run"), "--require", f"{monitor}>=1.5")
    assert status == 1
    assert f"{monitor} is" in error

    images = scenes / "images/validation"
    status, printed, _ = run_tool(
        "predict.py", str(tmp_path / "run"), str(images), "--output", str(tmp_path / "out")
    )
    assert status == 0
    assert len(printed.splitlines()) == 3
    with Image.open(tmp_path / "out/000000_found.png") as picture:
        assert max(picture.size) >= 384


@pytest.mark.slow  # the two processes import the libraries anew, twice
def test_two_processes(config: Path, tmp_path: Path, run_tool):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29531",
    ]

    def run(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*launcher, str(ROOT / "tools" / tool), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=500, check=False
        )

    done = run("train.py", str(config), "train.batch_size=2")
    assert done.returncode == 0, done.stderr
    assert "on 2 x cpu" in done.stderr
    # The evaluation that two processes share equals that of one.
    shared = run("evaluate.py", str(tmp_path / "run"))
    assert shared.returncode == 0, shared.stderr
    _, alone, _ = run_tool("evaluate.py", str(tmp_path / "run"))
    ours, theirs = (dict(line.split(": ") for line in text.splitlines()) for text in (shared.stdout, alone))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert float(value) == pytest.approx(float(theirs[name]), abs=1e-6)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_is_valid_and_clips_and_warms_up(path: Path):
    config = tasks.load_config(path)
    assert config.train.clip_grad is not None
    assert config.schedule.warmup > 0
    header = path.read_text().split("\n\n")[0]
    for word in ("Command:", "Time:", "Result:"):
        assert word in header
    assert f"configs/{path.parent.name}/{path.name}" in header


@pytest.mark.slow  # networks in full size
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_network_of_every_configuration_can_be_built(path: Path):
    config = tasks.load_config(path)
    data = config.data.model_copy(update={"class_names": [str(i) for i in range(150)], "num_classes": 150})
    if data.source == "scenes":
        data = config.data
    task = tasks.create_task(config.model_copy(update={"data": data}))
    assert sum(parameter.numel() for parameter in task.parameters()) > 1e6
    assert all(torch.isfinite(parameter).all() for parameter in task.parameters())
