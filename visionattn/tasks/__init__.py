"""Tasks: what networks are trained for and judged by; each has a configuration class and a task class."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from visionattn.engine.batches import seed_all
from visionattn.engine.config import (
    RunConfig,
    describe_options,
    merge_sections,
    override_config,
    parse_config,
    read_config,
)
from visionattn.engine.network import check_weights
from visionattn.engine.run_folder import trained_weights
from visionattn.engine.task import NamedImages, Task
from visionattn.errors import InputError, nearest

#: name -> (module, configuration class, task class); a module is imported when its task is asked for.
TASKS: dict[str, tuple[str, str, str]] = {
    "classification": ("visionattn.tasks.classification.task", "ClassificationConfig", "ClassificationTask"),
    "detection": ("visionattn.tasks.dense.detection", "DetectionConfig", "DetectionTask"),
    "segmentation": ("visionattn.tasks.dense.segmentation", "SegmentationConfig", "SegmentationTask"),
    "restoration": ("visionattn.tasks.restoration.task", "RestorationConfig", "RestorationTask"),
}
_CONFIG_CLASS, _TASK_CLASS = 1, 2  # places in a row of the table


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and validate a configuration file, or that of a run folder, for the task that it names.

    Raises:
        InputError: one sentence on what is wrong.
    """
    config = read_config(path, overrides)
    return parse_config(config, config_class(config))


def load_trained_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    checkpoint: str | Path | None = None,
    images: NamedImages | None = None,
) -> RunConfig:
    """The configuration for using what was trained: as `load_config`, with the weights to be used as start.

    Args:
        path: a configuration file; a run folder, whose best weights are then used; or the name of a network.
        overrides: as in `load_config`.
        checkpoint: weights to be used in place of those, or of the published ones.
        images: to be judged in place of those of the configuration.

    Raises:
        InputError: one sentence on what is wrong.
    """
    by_name = not Path(path).exists() and timm.is_model(str(path))
    if by_name:
        config = override_config(_network_config(str(path), checkpoint), overrides)
    else:
        config = read_config(path, overrides)
    if images is not None and any(images):
        named = _load(config, _TASK_CLASS).judge_named(images)
        config = override_config(merge_sections(config, named), overrides)
    parsed = parse_config(config, config_class(config))
    if checkpoint is None and Path(path).is_dir():
        checkpoint = trained_weights(Path(path))
    if checkpoint is None or by_name:
        return parsed
    model = parsed.model.model_copy(update={"checkpoint": str(checkpoint), "pretrained": False})
    return parsed.model_copy(update={"model": model})


def _network_config(name: str, checkpoint: str | Path | None) -> dict[str, Any]:
    """The configuration in which a registered network is judged by itself."""
    with torch.device("meta"):
        task = "restoration" if hasattr(timm.create_model(name), "info") else "classification"
    check_weights(name, checkpoint)
    model = {"name": name, "checkpoint": checkpoint and str(checkpoint), "pretrained": checkpoint is None}
    return {"task": task, "model": model, "schedule": {"steps": 1}}


def config_class(config: Mapping[str, Any]) -> type[RunConfig]:
    """The configuration class of the task that an unvalidated configuration names."""
    return _load(config, _CONFIG_CLASS)


def describe_config(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """Every option of the task that a configuration file names: type, default and meaning."""
    return describe_options(config_class(read_config(path, overrides)))


def create_task(config: RunConfig) -> Task:
    """The task that a configuration describes, with its network built and its weights loaded.

    Raises:
        InputError: the network, its arguments, its weights or the data do not exist or do not fit together.
    """
    seed_all("weights", config.train.seed)
    return _load({"task": config.task}, _TASK_CLASS)(config)


def _load(config: Mapping[str, Any], part: int) -> Any:
    name = config.get("task")
    if name is None:
        raise InputError(f"the configuration names no task: {nearest('', TASKS)}")
    if not isinstance(name, str) or name not in TASKS:
        raise InputError(f"unknown task {name!r}: {nearest(str(name), TASKS)}")
    return getattr(importlib.import_module(TASKS[name][0]), TASKS[name][part])
