"""The folder of a run. Every file in it is complete at any moment: written beside its place, then renamed.

config.yaml                 the resolved configuration
environment.json            versions, device, command line and git commit of every start
metrics.csv, tensorboard/   the course of the run
best.json                   the best evaluation: metric, value, step, file
checkpoints/best.safetensors, last.safetensors      weights (the average, where there is one) to load anywhere
checkpoints/last.state.pt   all that is needed to go on
pictures/
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from visionattn.checkpoints import save_checkpoint
from visionattn.checkpoints.reading import as_texts, read_metadata
from visionattn.data.pictures import write_png
from visionattn.engine.config import RunConfig
from visionattn.engine.yaml_io import dump_yaml, read_yaml
from visionattn.errors import InputError, WriteError, as_input_error
from visionattn.files import check_folder, remove_half_written, replacing

if TYPE_CHECKING:
    from PIL.Image import Image

_STATE = "checkpoints/last.state.pt"
_CONFIG = "config"  # under which the metadata of weights hold the configuration of their run
_STARTS = "environment.json"
_VERSIONED = ("visionattn", "torch", "torchvision", "timm", "accelerate", "numpy", "pillow")


class RunFolder:
    """The files of one run.

    Args:
        path: the folder; made when something is first written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def find_state(self, resume: str | None) -> Path | None:
        """The training state to continue from, None to start afresh.

        Raises:
            InputError: `resume` names a folder without a state, or the run exists and shall not be continued.
        """
        own = self.path / _STATE
        if resume is None and own.exists():
            raise InputError(
                f"{self.path} already holds a run: continue it with resume=auto or choose another output"
            )
        if resume in (None, "auto"):
            return own if own.exists() else None
        other = Path(resume) / _STATE
        if not other.is_file():
            raise InputError(f"cannot resume from {resume}: there is no {other}")
        return other

    def start(self, config: RunConfig, device: str) -> None:
        """Write what a reader needs to repeat the run, and remove what a killed one left half-written."""
        with as_input_error(f"cannot write the run folder {self.path}", OSError, WriteError):
            check_folder(self.path)
            if (self.path / "config.yaml").exists() and not (self.path / _STARTS).exists():
                raise InputError(f"{self.path} holds a config.yaml that no run wrote: choose another output")
            remove_half_written(self.path)
            # In this order: a configuration without it is none of a run.
            self.write_json(_STARTS, [*self._starts(), _environment(device)])
            self.write_text("config.yaml", dump_yaml(config.model_dump(mode="json")))

    def _starts(self) -> list[Any]:
        """The starts before this one.

        Raises:
            InputError: the file is not one that a run wrote.
        """
        file = self.path / _STARTS
        with as_input_error(f"cannot read {file}, which is none of a run", ValueError):
            starts = json.loads(file.read_bytes()) if file.exists() else []
            if not isinstance(starts, list):
                raise ValueError(f"it holds a {type(starts).__name__}")
        return starts

    def write_text(self, name: str, text: str) -> None:
        """Write a text file of the folder."""
        with replacing(self.path / name) as beside:
            beside.write_text(text, encoding="utf-8")

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file of the folder."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")

    def write_weights(
        self, which: str, model: nn.Module, weights: Mapping[str, Tensor] | None, facts: Mapping[str, Any]
    ) -> Path:
        """Write `checkpoints/{which}.safetensors`, which says of itself all that is needed to use it.

        Args:
            which: `"best"` or `"last"`.
            model: the network.
            weights: its state dict, where it is sharded and cannot say it alone.
            facts: what to keep with the weights.

        Returns:
            The path within the folder.
        """
        name = Path("checkpoints") / f"{which}.safetensors"
        with replacing(self.path / name) as beside:
            save_checkpoint(model, beside, as_texts(facts), weights)
        return name

    def write_state(self, state: Mapping[str, Any]) -> None:
        """Write the training state, the one file from which a run continues."""
        # An open file, because torch's own writer does not say when the disk is full.
        with replacing(self.path / _STATE) as beside, beside.open("wb") as file:
            torch.save(dict(state), file)

    def write_pictures(self, pictures: Mapping[str, Image]) -> None:
        """Write `pictures/{name}.png`."""
        for name, picture in pictures.items():
            write_png(picture, self.path / "pictures" / f"{name}.png")


def read_state(path: Path) -> dict[str, Any]:
    """The training state in a file.

    Raises:
        InputError: the file is not one.
    """
    with as_input_error(f"cannot read the training state {path}", Exception):
        return torch.load(path, map_location="cpu", weights_only=True)


def describe_run(config: RunConfig) -> dict[str, str]:
    """What weights keep of the run that they come from: its configuration, but for where it wrote."""
    return as_texts({_CONFIG: config.model_dump(mode="json", exclude={"output", "resume"})})


def run_of(weights: Path) -> dict[str, Any] | None:
    """The configuration of the run that a file of weights comes from; None where nothing tells it.

    Files of former versions do not say it themselves; in their run folder its configuration does.

    Raises:
        InputError: a damaged file.
    """
    with as_input_error(f"cannot use {weights}", ValueError, OSError):
        texts = read_metadata(weights)
        if _CONFIG in texts:
            return _mapping(json.loads(texts[_CONFIG]), f"the configuration in {weights}")
    beside = weights.resolve().parent.parent / "config.yaml"
    if weights.resolve().parent.name == "checkpoints" and beside.is_file():
        return read_yaml(beside)
    return None


def find_weights(source: str | Path) -> tuple[Path, dict[str, str]]:
    """The weights that a file, the folder of a run, or a folder of timm stands for, and what describes them.

    Returns:
        The file, and its metadata; for files of former versions those that their run folder tells.

    Raises:
        InputError: there are none, or the file is damaged.
    """
    path = Path(source)
    if path.is_dir():
        own = path / "model.safetensors"
        path = own if own.is_file() and not (path / "config.yaml").is_file() else trained_weights(path)
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}")
    with as_input_error(f"cannot use {path}", ValueError, OSError):
        texts = read_metadata(path)
    if "architecture" not in texts and (config := run_of(path)) is not None:
        texts |= _described_by(config)
    return path, texts


def _described_by(config: Mapping[str, Any]) -> dict[str, str]:
    """The description of the network of a run, as far as its configuration tells."""
    model, data = (_mapping(config.get(name) or {}, name) for name in ("model", "data"))
    arguments = dict(model.get("kwargs") or {})
    if config.get("task") == "classification" and data.get("num_classes"):
        arguments.setdefault("num_classes", data["num_classes"])
    return as_texts({"architecture": model.get("name", ""), "model_args": arguments})


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where} must hold `key: value` pairs, but is a {type(value).__name__}")
    return value


def trained_weights(folder: Path) -> Path:
    """The best weights of a run folder, or the last where none were judged.

    Raises:
        InputError: the folder holds none.
    """
    for which in ("best", "last"):
        weights = folder / "checkpoints" / f"{which}.safetensors"
        if weights.is_file():
            return weights
    raise InputError(f"{folder} holds no trained weights yet (checkpoints/best.safetensors)")


def _environment(device: str) -> dict[str, Any]:
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "folder": os.getcwd(),
        "git_commit": _git_commit(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _VERSIONED},
        "device": device,
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "threads": torch.get_num_threads(),
    }


def _git_commit() -> str | None:
    """The commit of the source in use, None where it is not a git work tree."""
    source = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=source, capture_output=True, text=True, check=False,
        )  # fmt: skip
    except FileNotFoundError:  # no git on this machine
        return None
    return found.stdout.strip() or None
