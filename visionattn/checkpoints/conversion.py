"""Write a checkpoint anew: as safetensors that timm reads without help, or in the layout of its authors."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from visionattn._compat import inside_feature_getter, save_timm_config
from visionattn.checkpoints.description import describe, parse_description, prepare
from visionattn.checkpoints.identify import (
    Identity,
    backbone_of,
    check_guesses,
    identify,
    layout_of,
    read_source,
)
from visionattn.checkpoints.loading import load_checkpoint, save_checkpoint, write_weights
from visionattn.checkpoints.reading import CheckpointError
from visionattn.files import replacing


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    official: bool = False,
    name: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Identity:
    """Recognise a checkpoint and write its weights in our layout, or in that of its authors.

    Numbers keep their type. The description of the network goes along. Nothing half-written is left.

    Args:
        source: a `.safetensors` or PyTorch file of the authors or of ours.
        target: a `.safetensors` file, whose metadata name the network; a folder, which timm loads as
            `local-dir:FOLDER` or, uploaded, as `hf-hub:`; with `official`, a PyTorch file or `.safetensors`.
        official: write the authors' names, shapes, stored indices and wrapper.
        name: the registered network, instead of what `identify` finds.
        arguments: of that network; without `name`, in place of those that were found.
        metadata: texts in place of those of the file.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: a file that cannot be read safely, weights of no or of another network, of one with
            arguments that neither it nor `arguments` tells, or a target of an unknown kind.
    """
    target = Path(target)
    kinds = (".pth", ".pt", ".safetensors") if official else (".safetensors", "")
    if target.suffix not in kinds:
        shown = " or ".join(kind or "nothing (a folder)" for kind in kinds)
        raise CheckpointError(f"{target} must end in {shown}")
    content, texts = read_source(source)
    texts = metadata or texts
    found = identify(source, texts) if name is None else Identity(name, {}, family="")
    check_guesses(found, arguments or (), source)
    notes = tuple(note for note in found.notes if not note.startswith("no weight tells"))
    stated = {**found.arguments, **(arguments or {})}
    identity = replace(found, arguments=stated, notes=notes, guessed={})
    try:
        wrapped = timm.create_model(identity.name, **identity.arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"cannot build {identity.name} with {identity.arguments}: {reason}") from error
    weights = backbone_of(content)
    load_checkpoint(wrapped, weights)
    prepare(wrapped, parse_description(texts).preprocessing)
    network, _ = inside_feature_getter(wrapped)
    types = {value.dtype for value in weights.values() if value.is_floating_point()}
    network.to(types.pop()) if len(types) == 1 else None
    if official:
        save_official(network, target)
    elif target.suffix:
        save_checkpoint(network, target, describe(wrapped))
    else:
        save_folder(network, target)
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
    wrapper, description = layout_of(network).wrapper, describe(network)
    if path.suffix == ".safetensors":
        write_weights(weights, path, description)
        return
    # Where a state dict says of which versions its modules are: the authors' code passes over the rest.
    named: Any = OrderedDict(weights)
    named._metadata = OrderedDict({"": {"version": 1, **description}})
    # An open file, because torch's own writer does not say when the disk is full.
    with replacing(path) as beside, beside.open("wb") as file:
        torch.save(named if wrapper is None else {wrapper: named}, file)


def save_folder(
    network: nn.Module, folder: str | os.PathLike[str], arguments: Mapping[str, Any] | None = None
) -> None:
    """Write a folder that `timm.create_model("local-dir:FOLDER")` builds and loads; a whole one or nothing.

    Args:
        network: its weights and configuration are written.
        folder: where to; it must not exist, or be empty.
        arguments: of the network beside its name and those that it was made with.

    Raises:
        CheckpointError: a folder with something in it.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is no empty folder")
    texts = describe(network, arguments)
    with replacing(folder) as beside:
        beside.mkdir()
        further: dict[str, Any] = {"made_by": texts["made_by"]}
        if "class_names" in texts:
            further["label_names"] = json.loads(texts["class_names"])
        save_timm_config(network, str(beside / "config.json"), json.loads(texts["model_args"]), further)
        save_checkpoint(network, beside / "model.safetensors", texts)
