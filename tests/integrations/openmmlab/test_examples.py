"""The examples as a user runs them: train, stop, resume, judge and draw, on the built-in scenes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# About two thirds of what the configurations reach. Untrained detectors reach 0.00, and a segmenter to which
# everything is background 8.12.
EXAMPLES = {
    "mask_rcnn_biformer": ["bbox_mAP_50>=0.15", "segm_mAP_50>=0.1"],
    "retinanet_agent_swin": ["bbox_mAP_50>=0.05"],
    "upernet_biformer": ["mIoU>=11"],
    "semantic_fpn_agent_swin": ["mIoU>=13"],
}


def tool(folder: Path, *arguments: object) -> str:
    """What `tools/openmmlab.py` prints when it runs in `folder`."""
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "openmmlab.py", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds data/scenes, where the configurations look for it."""
    folder = tmp_path_factory.mktemp("examples")
    tool(folder, "scenes", "data/scenes")
    return folder


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, folder: Path) -> None:
    config = ROOT / "configs" / "openmmlab" / "scenes" / f"{name}.py"
    run = folder / "runs" / name
    operators = ["--torchvision-operators"] if name in ("mask_rcnn_biformer", "retinanet_agent_swin") else []
    shortened = ["train_cfg.max_iters=100", "train_cfg.val_interval=100"]
    tool(folder, "train", config, *shortened, *operators)
    assert (run / "iter_100.pth").is_file()
    assert "resumed epoch: 0, iter: 100" in tool(folder, "train", config, "--resume", *operators)
    last = run / (run / "last_checkpoint").read_text()
    requirements = [word for bound in EXAMPLES[name] for word in ("--require", bound)]
    tool(folder, "evaluate", config, last, *requirements, *operators)
    images = sorted((folder / "data" / "scenes" / "images" / "validation").iterdir())[:2]
    tool(folder, "predict", config, last, *images, *operators)
    drawn = [path for path in run.rglob("*.png") if path.name in {image.name for image in images}]
    assert len(drawn) == 2
