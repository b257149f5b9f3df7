"""Networks as runs need them: built as a configuration names them, and judged in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from visionattn.checkpoints import identify, load_checkpoint
from visionattn.checkpoints.description import parse_description, prepare
from visionattn.checkpoints.identify import check_guesses
from visionattn.checkpoints.reading import read_metadata
from visionattn.engine.config import ModelConfig, check_kinds
from visionattn.engine.run_folder import find_weights
from visionattn.errors import InputError, as_input_error, nearest
from visionattn.models.registry.variants import ENTRIES

# What a network of a detector or segmenter was made with, and one that stands alone is not.
_AS_BACKBONE = ("features_only", "out_indices")


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
    if config.name in ENTRIES:
        check_kinds("model.kwargs", config.kwargs, ENTRIES[config.name].arguments)
    # Whatever a network does with arguments that are none of its own is the fault of who gave them.
    kinds = (Exception,) if config.kwargs else (ValueError, TypeError)
    refused = as_input_error(f"cannot build {config.name} with model.kwargs {config.kwargs}", *kinds)
    with refused, as_input_error(f"cannot get the published weights of {config.name}", OSError):
        network: Any = timm.create_model(
            config.name, pretrained=config.pretrained, **{**kwargs, **config.kwargs}
        )
    if not hasattr(network, "made_with"):
        network.made_with = {**kwargs, **config.kwargs}  # as our own networks record it
    if (empty := next((n for n, p in network.named_parameters() if not p.numel()), None)) is not None:
        raise InputError(f"{config.name} with model.kwargs {config.kwargs} has no numbers in its {empty}")
    if config.checkpoint is not None:
        load_weights(network, config.checkpoint, config.name)
    return network


def identify_weights(
    source: str | Path, name: str | None = None, arguments: Mapping[str, Any] | None = None, prefix: str = ""
) -> ModelConfig:
    """The network that weights belong to, as a configuration, with these weights as its start.

    Args:
        source: a file, or the folder of a run.
        name: the network, where the user names it; the metadata of the file must not contradict.
        arguments: of the network, which the user states.
        prefix: before the names of arguments where the user can state them, for the sentence that asks.

    Raises:
        InputError: the file cannot be used, belongs to another network, or does not tell arguments that
            change the output.
    """
    given = dict(arguments or {})
    file, texts = find_weights(source)
    with as_input_error(f"cannot use {source}", ValueError, OSError):
        stated = parse_description(texts)
        if name is None:
            identity = identify(file, texts)
            check_guesses(identity, given, "it", prefix)
            name, found = identity.name, identity.arguments
        elif stated.architecture in ("", name):
            found = {n: value for n, value in stated.arguments.items() if n not in _AS_BACKBONE}
        else:
            raise InputError(f"{source} holds weights of {stated.architecture}, not of {name}")
    return ModelConfig(name=name, kwargs={**found, **given}, checkpoint=str(file))


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

    It then states the preprocessing that the file brings, and the names of its classes.

    Raises:
        InputError: the file is missing, unreadable, or of another network.
    """
    with as_input_error(f"weights of {name}", ValueError, OSError):
        load_checkpoint(network, checkpoint)
        prepare(network, parse_description(read_metadata(checkpoint)).preprocessing)


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
