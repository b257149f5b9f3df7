"""Say which registered network, with which arguments, a checkpoint belongs to: from its shapes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from visionattn._compat import inside_feature_getter
from visionattn.checkpoints import loading
from visionattn.checkpoints.loading import LoadReport, compare, load_checkpoint
from visionattn.checkpoints.reading import (
    CheckpointError,
    few,
    read_checkpoint,
    read_metadata,
    unwrap_with_path,
)
from visionattn.models.registry import variants
from visionattn.models.registry.shapes import Shapes
from visionattn.models.registry.variants import Entry, Layout, known_entries

Source = str | os.PathLike[str] | Mapping[str, Any]
# Of a detector's or segmenter's weights, those of its backbone.
_BACKBONE = "backbone."


@dataclass(frozen=True)
class Identity:
    """A checkpoint names a network, in these words.

    Attributes:
        name: the registered network that is nearest.
        arguments: what `timm.create_model` needs beside the name; empty for a network as published.
        family: the family.
        wrapper: keys on the way to the weights in the file, joined by dots; "" for a bare state dict.
        official: whether the weights have the authors' names and shapes, and not ours.
        alternatives: other networks that the weights fit as well, because they differ in what is not learned.
        notes: what was assumed, and how the alternatives differ, one sentence each.
    """

    name: str
    arguments: dict[str, Any]
    family: str
    wrapper: str = ""
    official: bool = True
    alternatives: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        arguments = "".join(f", {name}={value!r}" for name, value in self.arguments.items())
        layout = "in the authors' layout" if self.official else "in our layout"
        place = f", under {self.wrapper!r}" if self.wrapper else ""
        lines = [f'timm.create_model("{self.name}"{arguments})', f"weights {layout}{place}", *self.notes]
        return "\n".join(lines)


def identify(source: Source) -> Identity:
    """Which network a checkpoint belongs to, with the arguments that make its weights fit strictly.

    Every family deduces its arguments from shapes, so that networks of other widths, depths, enlargements
    and channels than the published ones are recognised. What no weight tells is taken from the metadata of
    our own files, else from the nearest published network; where two of these have the same weights, the
    file's name decides, if it can.

    Args:
        source: a `.safetensors` or PyTorch file of the authors or of ours, or its content.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: a file that cannot be read safely, or weights of a network that is not in the zoo.
    """
    if isinstance(source, Mapping):
        return _identify(source, None, {})
    return _identify(read_checkpoint(source), Path(source), read_metadata(source))


def load_network(source: Source, **kwargs: Any) -> tuple[nn.Module, Identity]:
    """The network that a checkpoint belongs to, with its weights, in evaluation mode.

    Args:
        source: as `identify` takes it.
        kwargs: further arguments of `timm.create_model`; they win over those of the checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: as `identify` raises it.
    """
    identity = identify(source)
    network = timm.create_model(identity.name, **{**identity.arguments, **kwargs})
    load_checkpoint(network, backbone_of(source if isinstance(source, Mapping) else read_checkpoint(source)))
    return network.eval(), identity


def backbone_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights inside a checkpoint; of a detector or segmenter, those of its backbone.

    Raises:
        CheckpointError: no weights are found.
    """
    weights, _ = unwrap_with_path(content)
    inner = {n.removeprefix(_BACKBONE): v for n, v in weights.items() if n.startswith(_BACKBONE)}
    return inner or weights


def layout_of(network: nn.Module) -> Layout:
    """The layout of the weights of a network of the zoo.

    Raises:
        CheckpointError: a network of another library.
    """
    layout = variants.layout_of(network)
    if layout is None:
        raise CheckpointError(f"{type(network).__name__} is no network of visionattn.models")
    return layout


def _identify(content: Mapping[str, Any], file: Path | None, metadata: Mapping[str, str]) -> Identity:
    everything, wrapper = unwrap_with_path(content)
    weights = {name: value.to("meta") for name, value in backbone_of(content).items()}
    refused: list[tuple[int, str]] = []
    for layout in _layouts():
        if not layout.has_marks(map(layout.rename, weights)):
            continue
        try:
            identity, report, ours = _recognise(layout, weights, file.stem if file else "", metadata)
        except CheckpointError as error:
            refused.append((len(str(error)), str(error)))
            continue
        if report:
            refused.append((len(str(report)), f"it resembles {identity.name}, but {report}"))
            continue
        official = ours.keys() != weights.keys() or any(ours[n].shape != weights[n].shape for n in ours)
        notes = identity.notes
        if len(weights) < len(everything):
            left = len(everything) - len(weights)
            notes = (f"the weights of the backbone in it; {left} others are left out", *notes)
        return replace(identity, wrapper=wrapper, official=official, notes=notes)
    reason = min(refused)[1] if refused else f"its weights are {few(tuple(weights))}"
    raise CheckpointError(f"{file or 'the checkpoint'} belongs to no network of this library: {reason}")


def _recognise(
    layout: Layout, weights: Mapping[str, Tensor], file: str, metadata: Mapping[str, str]
) -> tuple[Identity, LoadReport | str, dict[str, Tensor]]:
    """The nearest network of a class, what does not fit it, and the weights in our layout.

    Raises:
        CheckpointError: weights that have the marks of the class and are of no network of it.
    """
    ours = loading.to_ours(layout, weights)
    shapes = Shapes(ours)
    if lacking := shapes.lacking(layout.reads):
        raise CheckpointError(f"it resembles the family {layout.family}, but {lacking}")
    arguments = layout.arguments(shapes, Shapes(weights))
    if arguments is None:
        raise CheckpointError(f"it resembles the family {layout.family}, but has shapes of none of it")
    identity = _choose(layout, arguments, file, metadata)
    report = _fit(identity, layout, ours)
    if report and not arguments.get("num_classes", 1):
        # Backbones of the authors' detectors have neither a classifier nor the norm before it.
        rest = {name: value for name, value in identity.arguments.items() if name != "num_classes"}
        dense = replace(identity, arguments={**rest, "features_only": True})
        identity, report = (identity, report) if (worse := _fit(dense, layout, ours)) else (dense, worse)
    return identity, report, ours


def _choose(layout: Layout, told: dict[str, Any], file: str, metadata: Mapping[str, str]) -> Identity:
    """The nearest variant, what differs from it, and the other variants that are as near and not the same."""
    told = {**told, **_stated(layout, metadata)}
    differing = {
        variant: {n: v for n, v in told.items() if _plain(variant.arguments.get(n)) != _plain(v)}
        for variant in _entries(layout)
    }
    nearest = min(map(len, differing.values()))
    near = [variant for variant, arguments in differing.items() if len(arguments) == nearest]
    named, how = _named(near, file, metadata)
    chosen = named or near[0]
    settings = _settings(chosen, told)
    others = {repr(other): v for v in near if (other := _settings(v, told)) != settings}
    notes = [
        f"{other.name} has the same weights and differs in {_difference(other, chosen, told)}"
        for other in others.values()
    ]
    if others and how == "the name of the file":
        notes.insert(0, f"{chosen.name} was chosen by {how}")
    assumed = {n: settings[n] for n in layout.unlearned if n in settings and n not in told}
    if differing[chosen] and assumed:
        shown = ", ".join(f"{name}={value!r}" for name, value in assumed.items())
        notes.append(f"no weight tells {shown}: as in {chosen.name}")
    return Identity(
        chosen.name,
        differing[chosen],
        layout.family,
        alternatives=() if how == "the metadata" else tuple(v.name for v in others.values()),
        notes=tuple(notes),
    )


def _stated(layout: Layout, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Of the arguments in the metadata, those that no weight tells: the others are not to be trusted."""
    try:
        arguments = json.loads(metadata.get("model_args", "{}"))
    except ValueError as error:
        raise CheckpointError(f"the model_args in the metadata are no JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise CheckpointError("the model_args in the metadata are no JSON object")
    return {name: _plain(value) for name, value in arguments.items() if name in layout.unlearned}


def _named(near: list[Entry], file: str, metadata: Mapping[str, str]) -> tuple[Entry | None, str]:
    """The variant that the metadata or the file's name means, the longest name if several fit; and which."""
    for variant in near:
        if variant.name == metadata.get("architecture"):
            return variant, "the metadata"
    found = [(len(name), variant) for variant in near for name in _file_names(variant) if _word(name, file)]
    best = max(found, key=lambda pair: pair[0], default=None)
    return (best[1], "the name of the file") if best else (None, "")


def _file_names(variant: Entry) -> Iterator[str]:
    """The registered name, and the names of the published files."""
    yield variant.name
    for tag in timm.list_pretrained(f"{variant.name}.*"):
        cfg = timm.get_pretrained_cfg(tag)
        if cfg and isinstance(cfg.url, str) and cfg.url.endswith(".pth"):
            yield Path(cfg.url).stem


def _word(name: str, text: str) -> bool:
    return re.search(rf"(?<![a-z0-9]){re.escape(name.lower())}(?![a-z0-9])", text.lower()) is not None


def _settings(variant: Entry, told: dict[str, Any]) -> dict[str, Any]:
    """All arguments of the network, what the weights tell in place of this variant's."""
    return {name: _plain(value) for name, value in {**variant.arguments, **told}.items()}


def _difference(variant: Entry, chosen: Entry, told: dict[str, Any]) -> str:
    theirs, ours = _settings(variant, told), _settings(chosen, told)
    return ", ".join(f"{n}={v!r} (not {ours.get(n)!r})" for n, v in theirs.items() if v != ours.get(n))


def _plain(value: Any) -> Any:
    """A value that compares by content: sequences as tuples."""
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def _fit(identity: Identity, layout: Layout, ours: dict[str, Tensor]) -> LoadReport | str:
    """Hold weights in our layout against the network: their misfits, or why there is no network."""
    try:
        network = timm.create_model(identity.name, **identity.arguments, device="meta")
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error).split("\n")[0]
    network, features_only = inside_feature_getter(network)
    return compare(network, loading.fit(layout, ours, network), features_only)


@lru_cache
def _layouts() -> tuple[Layout, ...]:
    """The layouts of all classes."""
    return tuple(dict.fromkeys(entry.layout for entry in known_entries().values()))


@lru_cache
def _entries(layout: Layout) -> tuple[Entry, ...]:
    """The registered networks of a layout, the plainest names first."""
    found = [entry for entry in known_entries().values() if entry.layout is layout]
    return tuple(sorted(found, key=lambda entry: (len(entry.name), entry.name)))
