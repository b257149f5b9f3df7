"""Training, judging and using what a configuration of mmdetection or mmsegmentation describes."""

# pyright: reportMissingImports=false
# The toolboxes are installed in an environment of their own.
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.runner import Runner

from visionattn.engine.yaml_io import parse_value
from visionattn.errors import InputError


def read_config(file: str | Path, options: Sequence[str] = ()) -> Config:
    """A configuration, with `options` in place of its own values.

    Args:
        file: a configuration of mmengine.
        options: `KEY=VALUE`, the key with dots, the value as in YAML.

    Raises:
        InputError: there is no such file, or an option that cannot be read.
    """
    if not Path(file).is_file():
        raise InputError(f"there is no configuration {file}")
    config = Config.fromfile(file)
    for option in options:
        key, given, value = option.partition("=")
        if not given:
            raise InputError(f"an option reads KEY=VALUE, but {option!r} was given")
        config.merge_from_dict({key: parse_value(value, key)})
    return config


def train(config: Config, folder: Path, resume: bool = False, launcher: str = "none") -> None:
    """Train as the configuration says.

    Args:
        config: names the networks, data and schedules of the training.
        folder: where logs, checkpoints and pictures go.
        resume: go on from the last checkpoint in `folder`, if there is one.
        launcher: `"pytorch"` under torchrun.
    """
    config.work_dir, config.resume, config.launcher = str(folder), resume, launcher
    Runner.from_cfg(config).train()


def evaluate(config: Config, checkpoint: Path, folder: Path, launcher: str = "none") -> dict[str, float]:
    """Judge a checkpoint on the configuration's test data.

    Args:
        config: names the network.
        checkpoint: a file of a run.
        folder: where logs go.
        launcher: `"pytorch"` under torchrun.

    Returns:
        The metrics by name, for instance `bbox_mAP_50` or `mIoU`.

    Raises:
        InputError: there is no such checkpoint.
    """
    if not checkpoint.is_file():
        raise InputError(f"there is no checkpoint {checkpoint}")
    config.work_dir, config.load_from, config.launcher = str(folder), str(checkpoint), launcher
    metrics = Runner.from_cfg(config).test()
    return {name.rsplit("/", 1)[-1]: value for name, value in metrics.items()}


def predict(config: Config, checkpoint: Path, images: Sequence[Path], folder: Path) -> None:
    """Draw what a checkpoint finds in images, as pictures under `folder`.

    Raises:
        InputError: there is no such image.
    """
    missing = [str(image) for image in images if not image.is_file()]
    if missing:
        raise InputError(f"there is no image {', '.join(missing)}")
    if config.default_scope == "mmseg":
        from mmseg.apis import MMSegInferencer as Inferencer
    else:
        from mmdet.apis import DetInferencer as Inferencer
    inferencer = Inferencer(config, str(checkpoint))
    inferencer([str(image) for image in images], out_dir=str(folder))
