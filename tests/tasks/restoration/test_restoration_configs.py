"""Every restoration configuration is valid, names a network that exists, and says what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

import visionattn  # noqa: F401  (registers the networks)
from visionattn import tasks
from visionattn.tasks.restoration.config import RestorationConfig
from visionattn.tasks.restoration.data import _degradation

FOLDER = Path(__file__).parents[3] / "configs/restoration"
CONFIGS = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_is_complete(path: Path):
    config = tasks.load_config(path)
    assert isinstance(config, RestorationConfig)
    with torch.device("meta"):
        network = timm.create_model(config.model.name, **config.model.kwargs)
    for split in ("train", "validation"):
        _degradation(config, network.info, split)  # its steps fit the network
    header = path.read_text().partition("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f"tools/train.py configs/restoration/{path.name}" in header
    assert "# Takes:" in header or "# Data and time:" in header
    assert "# Result: " in header
    if config.data.source == "folders":
        assert "not run here" in header


def test_every_family_has_a_recipe():
    families = {path.stem.split("_")[0] for path in CONFIGS}
    assert families == {"hat", "rgt", "craft", "catanet", "cfsr", "hsdt", "pmnet"}
