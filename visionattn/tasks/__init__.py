"""What can be trained and judged. A task is one file with a configuration class and a task class."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from visionattn.engine.batches import seed_all
from visionattn.engine.config import (
    RunConfig,
    describe_options,
    override_config,
    parse_config,
    read_config,
)
from visionattn.engine.run_folder import trained_weights
from visionattn.engine.task import Task
from visionattn.errors import InputError, nearest

#: name -> (module, configuration class, task class); a module is imported when its task is asked for.
TASKS: dict[str, tuple[str, str, str]] = {
    "classification": ("visionattn.tasks.classification.task", "ClassificationConfig", "ClassificationTask"),
    "detection": ("visionattn.tasks.dense.detection", "DetectionConfig", "DetectionTask"),
    "segmentation": ("visionattn.tasks.dense.segmentation", "SegmentationConfig", "SegmentationTask"),
    "restoration": ("visionattn.tasks.restoration.task", "RestorationConfig", "RestorationTask"),
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and validate a configuration file, or that of a run folder, for the task that it names.

    Raises:
        InputError: one sentence on what is wrong.
    """
    config = read_config(path, overrides)
    return parse_config(config, config_class(config))


def load_trained_config(
    path: str | Path, overrides: Sequence[str] = (), checkpoint: str | Path | None = None
) -> RunConfig:
    """The configuration for using what was trained: as `load_config`, with the weights to be used as start.

    Args:
        path: a configuration file; a run folder, whose best weights are then used; or the name of a network.
        overrides: as in `load_config`.
        checkpoint: weights to be used in place of those, or of the published ones.

    Raises:
        InputError: one sentence on what is wrong.
    """
    if not Path(path).exists() and timm.is_model(str(path)):
        return _network_config(str(path), overrides, checkpoint)
    config = load_config(path, overrides)
    if checkpoint is None and Path(path).is_dir():
        checkpoint = trained_weights(Path(path))
    if checkpoint is None:
        return config
    model = config.model.model_copy(update={"checkpoint": str(checkpoint), "pretrained": False})
    return config.model_copy(update={"model": model})


def _network_config(name: str, overrides: Sequence[str], checkpoint: str | Path | None) -> RunConfig:
    """The configuration in which a registered network is judged by itself."""
    with torch.device("meta"):
        task = "restoration" if hasattr(timm.create_model(name), "info") else "classification"
    if checkpoint is None and not timm.is_model_pretrained(name):
        raise InputError(f"{name} has no weights that can be downloaded: give --checkpoint FILE")
    model = {"name": name, "checkpoint": checkpoint and str(checkpoint), "pretrained": checkpoint is None}
    config = override_config({"task": task, "model": model, "schedule": {"steps": 1}}, overrides)
    return parse_config(config, config_class(config))


def image_overrides(
    truths: str | None, inputs: str | None, template: str | None, self_ensemble: bool
) -> list[str]:
    """The overrides by which a restoration task judges images that a command line names.

    Args:
        truths: a folder or LMDB of true images; None leaves the images as they are.
        inputs: that of their inputs; None: they are made.
        template: name of an input, with {} for that of its truth.
        self_ensemble: whether to average over flips and transpositions.
    """
    given: dict[str, Any] = {}
    if truths:
        lq = [inputs] if inputs else []
        given |= {"data.source": "folders", "data.eval_gt": truths, "data.eval_lq": lq}
    if inputs:
        given["data.eval_degradations"] = None
    if template:
        given["data.eval_template"] = template
    if self_ensemble:
        given["self_ensemble"] = True
    return [
        f"{key}={json.dumps(value)}" for key, value in given.items()
    ]  # JSON is YAML, whatever a path holds


def config_class(config: Mapping[str, Any]) -> type[RunConfig]:
    """The configuration class of the task that an unvalidated configuration names."""
    name = config.get("task")
    if name is None:
        raise InputError(f"the configuration names no task: {nearest('', TASKS)}")
    return _load(name, 1)


def describe_config(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """Every option of the task that a configuration file names: type, default and meaning."""
    return describe_options(config_class(read_config(path, overrides)))


def create_task(config: RunConfig) -> Task:
    """The task that a configuration describes, with its network built and its weights loaded.

    Raises:
        InputError: the network, its arguments, its weights or the data do not exist or do not fit together.
    """
    seed_all("weights", config.train.seed)
    return _load(config.task, 2)(config)


def _load(name: Any, part: int) -> Any:
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}: {nearest(str(name), TASKS)}")
    return getattr(importlib.import_module(TASKS[name][0]), TASKS[name][part])
