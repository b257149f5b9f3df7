"""Tasks: what networks are trained for and judged by; each has a configuration class and a task class."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from visionattn.checkpoints.reading import is_checkpoint
from visionattn.engine.batches import seed_all
from visionattn.engine.config import (
    ModelConfig,
    RunConfig,
    describe_options,
    merge_sections,
    override_config,
    parse_config,
    read_config,
)
from visionattn.engine.network import check_weights, identify_weights
from visionattn.engine.run_folder import run_of, trained_weights
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
        path: a configuration file; a run folder, whose best weights are then used; a file of weights; or the
            name of a network.
        overrides: as in `load_config`.
        checkpoint: weights to be used in place of those, or of the published ones.
        images: to be judged in place of those of the configuration.

    Raises:
        InputError: one sentence on what is wrong.
    """
    weights = checkpoint
    if is_checkpoint(path):
        if checkpoint is not None:
            raise InputError(f"{path} and --checkpoint {checkpoint} are both weights: give one of them")
        config, weights = _weights_config(Path(path), overrides), path
    elif not Path(path).exists() and timm.is_model(str(path)):
        config, weights = override_config(_network_config(str(path), checkpoint, overrides), overrides), None
    else:
        config = read_config(path, overrides)
        if checkpoint is None and Path(path).is_dir():
            weights = trained_weights(Path(path))
    if images is not None and any(images):
        named = _load(config, _TASK_CLASS).judge_named(images)
        config = override_config(merge_sections(config, named), overrides)
    parsed = parse_config(config, config_class(config))
    if weights is None:
        return parsed
    model = parsed.model.model_copy(update={"checkpoint": str(weights), "pretrained": False})
    return parsed.model_copy(update={"model": model})


def _weights_config(file: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration of the run that weights come from; of others, one in which they are judged."""
    if (config := run_of(file)) is not None:
        return override_config(config, overrides)
    stated = _stated_kwargs(overrides)
    return override_config(_sole_config(identify_weights(file, None, stated, "model.kwargs.")), overrides)


def _network_config(name: str, checkpoint: str | Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration in which a registered network is judged by itself."""
    check_weights(name, checkpoint)
    if checkpoint is None:
        return _sole_config(ModelConfig(name=name, pretrained=True))
    return _sole_config(identify_weights(checkpoint, name, _stated_kwargs(overrides)))


def _sole_config(model: ModelConfig) -> dict[str, Any]:
    with torch.device("meta"):
        restores = hasattr(timm.create_model(model.name), "info")
    task = "restoration" if restores else "classification"
    return {"task": task, "model": model.model_dump(mode="json"), "schedule": {"steps": 1}}


def _stated_kwargs(overrides: Sequence[str]) -> dict[str, Any]:
    """The arguments of the network that a user states among overrides."""
    model = override_config({}, overrides).get("model")
    kwargs = model.get("kwargs") if isinstance(model, dict) else None
    return dict(kwargs) if isinstance(kwargs, dict) else {}


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
