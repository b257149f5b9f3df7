"""Write a checkpoint anew: as safetensors that timm reads without help, or in the layout of its authors."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from visionattn._compat import inside_feature_getter, save_timm_config
from visionattn.checkpoints.identify import Identity, backbone_of, identify, layout_of
from visionattn.checkpoints.loading import load_checkpoint, save_checkpoint, write_weights
from visionattn.checkpoints.reading import CheckpointError, read_checkpoint
from visionattn.files import replacing


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    official: bool = False,
    name: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Identity:
    """Recognise a checkpoint and write its weights in our layout, or in that of its authors.

    Numbers keep their type. Nothing half-written is left.

    Args:
        source: a `.safetensors` or PyTorch file of the authors or of ours.
        target: a `.safetensors` file, whose metadata name the network; a folder, which timm loads as
            `local-dir:FOLDER` or, uploaded, as `hf-hub:`; with `official`, a PyTorch file or `.safetensors`.
        official: write the authors' names, shapes, stored indices and wrapper.
        name: the registered network, instead of what `identify` finds.
        arguments: of that network; without `name`, in place of those that were found.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: a file that cannot be read safely, weights of no or of another network, or a target
            of an unknown kind.
    """
    target = Path(target)
    kinds = (".pth", ".pt", ".safetensors") if official else (".safetensors", "")
    if target.suffix not in kinds:
        shown = " or ".join(kind or "nothing (a folder)" for kind in kinds)
        raise CheckpointError(f"{target} must end in {shown}")
    content = read_checkpoint(source)
    found = identify(source) if name is None else Identity(name, {}, family="")
    identity = replace(found, arguments={**found.arguments, **(arguments or {})})
    try:
        wrapped = timm.create_model(identity.name, **identity.arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"cannot build {identity.name} with {identity.arguments}: {reason}") from error
    weights = backbone_of(content)
    load_checkpoint(wrapped, weights)
    network, _ = inside_feature_getter(wrapped)
    types = {value.dtype for value in weights.values() if value.is_floating_point()}
    network.to(types.pop()) if len(types) == 1 else None
    if official:
        save_official(network, target)
    elif target.suffix:
        save_checkpoint(network, target, _metadata(network, identity.arguments))
    else:
        save_folder(network, target, identity.arguments)
    return identity


def official_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """The weights of a network in the names and shapes of its authors' code, with the indices that it stores.

    Raises:
        CheckpointError: a network of another library.
    """
    converted = layout_of(network).to_official(network.state_dict(), network)
    # Views would take the memory they look into with them, and buffers share it.
    return {n: v.detach().cpu().clone(memory_format=torch.contiguous_format) for n, v in converted.items()}


def save_official(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a network for its authors' code, wrapped as their files are; `.safetensors` has no wrapper.

    Raises:
        CheckpointError: a network of another library.
    """
    path, weights = Path(path), official_state_dict(network)
    wrapper = layout_of(network).wrapper
    if path.suffix == ".safetensors":
        write_weights(weights, path)
        return
    with replacing(path) as beside:
        torch.save(weights if wrapper is None else {wrapper: weights}, beside)


def save_folder(
    network: nn.Module, folder: str | os.PathLike[str], arguments: Mapping[str, Any] | None = None
) -> None:
    """Write a folder that `timm.create_model("local-dir:FOLDER")` builds and loads; a whole one or nothing.

    Args:
        network: its weights and configuration are written.
        folder: where to; it must not exist, or be empty.
        arguments: of the network beside its name, where timm did not see them when it was made.

    Raises:
        CheckpointError: a folder with something in it.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is no empty folder")
    with replacing(folder) as beside:
        save_for_hf(network, str(beside), model_args=dict(arguments or {}), safe_serialization=True)


def _metadata(network: nn.Module, arguments: Mapping[str, Any]) -> dict[str, str]:
    """timm's configuration of a network as the texts that a safetensors file can hold."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        save_timm_config(network, str(file), dict(arguments))
        config = json.loads(file.read_text())
    kept = {name: config[name] for name in _KEPT if name in config}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in kept.items()}


# Of timm's configuration, what says how to build the network and feed it.
_KEPT = ("architecture", "num_classes", "model_args", "pretrained_cfg")
