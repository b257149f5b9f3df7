"""What can be trained and judged. A task is one file with a configuration class and a task class."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visionattn.engine.config import RunConfig, describe_options, parse_config, read_config
from visionattn.engine.errors import InputError, nearest
from visionattn.engine.loading import seed_all
from visionattn.engine.run_folder import trained_weights
from visionattn.engine.task import Task

#: name -> (module, configuration class, task class); a module is imported when its task is asked for.
TASKS: dict[str, tuple[str, str, str]] = {
    "classification": ("visionattn.tasks.classification", "ClassificationConfig", "ClassificationTask"),
    "detection": ("visionattn.tasks.detection", "DetectionConfig", "DetectionTask"),
    "segmentation": ("visionattn.tasks.segmentation", "SegmentationConfig", "SegmentationTask"),
    "restoration": ("visionattn.tasks.restoration", "RestorationConfig", "RestorationTask"),
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
        path: a configuration file, or a run folder, whose best weights are then used.
        overrides: as in `load_config`.
        checkpoint: weights to be used in place of those.
    """
    config = load_config(path, overrides)
    if checkpoint is None and Path(path).is_dir():
        checkpoint = trained_weights(Path(path))
    if checkpoint is None:
        return config
    model = config.model.model_copy(update={"checkpoint": str(checkpoint), "pretrained": False})
    return config.model_copy(update={"model": model})


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
