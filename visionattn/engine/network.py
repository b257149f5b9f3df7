"""Networks as runs need them: built as a configuration names them, and judged in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from visionattn.checkpoints import load_checkpoint
from visionattn.engine.config import ModelConfig
from visionattn.errors import InputError, as_input_error, nearest


def create_network(config: ModelConfig, **kwargs: Any) -> nn.Module:
    """The network of `config` with its weights loaded.

    Args:
        config: name, keyword arguments and source of the weights.
        kwargs: further keyword arguments, for instance `num_classes`; those of `config` win.

    Raises:
        InputError: there is no such network, it does not take these arguments, the published weights cannot
            be downloaded, or the checkpoint is missing or belongs to another network.
    """
    check_network_name(config.name)
    refused = as_input_error(
        f"cannot build {config.name} with model.kwargs {config.kwargs}", ValueError, TypeError
    )
    with refused, as_input_error(f"cannot get the published weights of {config.name}", OSError):
        network = timm.create_model(config.name, pretrained=config.pretrained, **{**kwargs, **config.kwargs})
    if config.checkpoint is not None:
        load_weights(network, config.checkpoint, config.name)
    return network


def check_network_name(name: str) -> None:
    """Raise an `InputError` with the nearest names unless timm can make a network of this name."""
    from_elsewhere = ":" in name  # timm reads hf-hub:... and local-dir:... from their place
    if not from_elsewhere and not timm.is_model(name):
        raise InputError(f"unknown network {name!r}: {nearest(name, timm.list_models())}")


def check_weights(name: str, checkpoint: str | Path | None) -> None:
    """Raise an `InputError` unless a network has weights: a checkpoint, or published ones to download."""
    if checkpoint is None and not timm.is_model_pretrained(name):
        raise InputError(f"{name} has no weights that can be downloaded: give --checkpoint FILE")


def load_weights(network: nn.Module, checkpoint: str | Path, name: str) -> None:
    """Load a checkpoint file strictly into the network called `name`.

    Raises:
        InputError: the file is missing, unreadable, or of another network.
    """
    with as_input_error(f"weights of {name}", ValueError, OSError):
        load_checkpoint(network, checkpoint)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode, without gradients, inside the block; afterwards in the mode it had."""
    was_training = model.training
    model.eval()
    try:
        # Not inference_mode: a network may cache masks here that training uses afterwards.
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
