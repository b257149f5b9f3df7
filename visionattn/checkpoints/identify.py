"""Say which registered network, with which arguments, a checkpoint belongs to: from its shapes."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from visionattn._compat import inside_feature_getter
from visionattn.checkpoints import loading
from visionattn.checkpoints.description import Description, believable, parse_description, prepare
from visionattn.checkpoints.loading import LoadReport, compare, load_checkpoint
from visionattn.checkpoints.reading import CheckpointError, few, read_with_metadata, unwrap_with_path
from visionattn.models.registry import variants
from visionattn.models.registry.shapes import Guess, Shapes
from visionattn.models.registry.variants import Entry, Layout, known_entries

Source = str | os.PathLike[str] | Mapping[str, Any]
# Arguments of every network that say how it is used.
_HOW = ("features_only", "out_indices")
# An argument of every backbone that no weight tells.
_POOLING = "global_pool"


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
        guessed: arguments that change the output, that neither weights nor metadata tell, and their values
            in the published network; empty for one that is as published.
    """

    name: str
    arguments: dict[str, Any]
    family: str
    wrapper: str = ""
    official: bool = True
    alternatives: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    guessed: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        arguments = "".join(f", {name}={value!r}" for name, value in self.arguments.items())
        layout = "in the authors' layout" if self.official else "in our layout"
        place = f", under {self.wrapper!r}" if self.wrapper else ""
        lines = [f'timm.create_model("{self.name}"{arguments})', f"weights {layout}{place}", *self.notes]
        return "\n".join(lines)


def identify(source: Source, metadata: Mapping[str, str] | None = None) -> Identity:
    """Which network a checkpoint belongs to, with the arguments that make its weights fit strictly.

    Our own files say it in their metadata. For others every family deduces its arguments from shapes, so that
    networks of other widths, depths, enlargements and channels than the published ones are recognised. What
    no weight tells is then taken from the nearest published network, and is in `guessed` unless the network
    is as published; where two of these have the same weights, the file's name decides, if it can.

    Args:
        source: a `.safetensors` or PyTorch file of the authors or of ours, or its content.
        metadata: texts in place of those of the file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: a file that cannot be read safely, or weights of a network that is not in the zoo.
    """
    content, texts = read_source(source)
    return _identify(content, None if isinstance(source, Mapping) else Path(source), metadata or texts)


def load_network(
    source: Source, metadata: Mapping[str, str] | None = None, **kwargs: Any
) -> tuple[nn.Module, Identity]:
    """The network that a checkpoint belongs to, with its weights, in evaluation mode.

    It states the preprocessing and names of classes that the metadata bring.

    Args:
        source: as `identify` takes it.
        metadata: texts in place of those of the file.
        kwargs: further arguments of `timm.create_model`; they win over those of the checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: as `identify` raises it.
    """
    content, texts = read_source(source)
    texts = metadata or texts
    identity = _identify(content, None if isinstance(source, Mapping) else Path(source), texts)
    network = timm.create_model(identity.name, **{**identity.arguments, **kwargs})
    load_checkpoint(network, backbone_of(content))
    prepare(network, parse_description(texts).preprocessing)
    return network.eval(), identity


def read_source(source: Source) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """Content and metadata of a file, or of what was read from one."""
    return (source, {}) if isinstance(source, Mapping) else read_with_metadata(source)


def check_guesses(identity: Identity, given: Collection[str], where: object, prefix: str = "") -> None:
    """Refuse a network that is a guess: its outputs may be others than those that were trained.

    Args:
        identity: of a checkpoint.
        given: names of the arguments that the user states.
        where: what is refused, as the user named it.
        prefix: before the name of an argument where the user can state it.

    Raises:
        CheckpointError: arguments that change the output are guessed; the sentence says how to state them.
    """
    open_ones = {name: value for name, value in identity.guessed.items() if name not in given}
    if open_ones:
        pairs = " ".join(shlex.quote(f"{prefix}{n}={_as_argument(v)}") for n, v in open_ones.items())
        raise CheckpointError(
            f"{where} resembles {identity.name}, but nothing in it tells {few(tuple(open_ones))}, which "
            f"change the output: say what it was trained with; in {identity.name} it is {pairs}"
        )


def backbone_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights inside a checkpoint; of a detector or segmenter, those of its backbone.

    Raises:
        CheckpointError: no weights are found.
    """
    return loading.backbone_of(unwrap_with_path(content)[0])


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
    stated = parse_description(metadata)
    if (foreign := _identify_foreign(weights, stated)) is not None:
        return replace(foreign, wrapper=wrapper)
    refused: list[tuple[int, str]] = []
    for layout in _layouts():
        if not layout.has_marks(map(layout.rename, weights)):
            continue
        try:
            identity, report, ours = _recognise(layout, weights, file.stem if file else "", stated)
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


def _identify_foreign(weights: Mapping[str, Tensor], stated: Description) -> Identity | None:
    """A network of timm's own, as the metadata of our files name it; None for others."""
    name, arguments = stated.architecture, dict(stated.arguments)
    if name in known_entries() or not timm.is_model(name) or not _are_believable(weights, arguments):
        return None
    identity = Identity(name, arguments, family=name, official=False)
    return None if _fit(identity, None, dict(weights)) else identity


def _recognise(
    layout: Layout, weights: Mapping[str, Tensor], file: str, stated: Description
) -> tuple[Identity, LoadReport | str, dict[str, Tensor]]:
    """The nearest network of a class, what does not fit it, and the weights in our layout.

    Raises:
        CheckpointError: weights that have the marks of the class and are of no network of it.
    """
    ours = loading.to_ours(layout, weights)
    shapes = Shapes(ours)
    if lacking := shapes.lacking(layout.reads):
        raise CheckpointError(f"it resembles the family {layout.family}, but {lacking}")
    if (told := _take_at_its_word(layout, ours, stated)) is not None:
        return told, "", ours
    arguments = layout.arguments(shapes, Shapes(weights))
    if arguments is None:
        raise CheckpointError(f"it resembles the family {layout.family}, but has shapes of none of it")
    identity = _choose(layout, arguments, file, stated)
    report = _fit(identity, layout, ours)
    if report and not arguments.get("num_classes", 1):
        # Backbones of the authors' detectors have neither a classifier nor the norm before it.
        rest = {name: value for name, value in identity.arguments.items() if name != "num_classes"}
        dense = replace(identity, arguments={**rest, "features_only": True})
        identity, report = (identity, report) if (worse := _fit(dense, layout, ours)) else (dense, worse)
    return identity, report, ours


def _take_at_its_word(layout: Layout, ours: dict[str, Tensor], stated: Description) -> Identity | None:
    """The network that the metadata describe, if the weights fit it; None where they do not."""
    entry = known_entries().get(stated.architecture)
    if entry is None or entry.layout is not layout or not _are_believable(ours, stated.arguments):
        return None
    known = {*entry.arguments, *_HOW}
    arguments = {
        name: value
        for name, value in stated.arguments.items()
        if name in known and (name not in entry.arguments or _plain(entry.arguments[name]) != _plain(value))
    }
    identity = Identity(entry.name, arguments, layout.family)
    return None if _fit(identity, layout, ours) else identity


def _are_believable(weights: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> bool:
    """Whether a network of such arguments is no larger than its weights allow: it is about to be built."""
    sides = (side for value in weights.values() for side in value.shape)
    return believable(arguments, max(sides, default=0))


def _choose(layout: Layout, told: dict[str, Any], file: str, stated: Description) -> Identity:
    """The nearest variant, what differs from it, and the other variants that are as near and not the same."""
    guesses = {name: _plain(v.value) for name, v in told.items() if isinstance(v, Guess)}
    # Of what the metadata say beside other weights, only what no weight could contradict.
    words = {n: _plain(v) for n, v in stated.arguments.items() if n in layout.unlearned or n in guesses}
    told = {name: value for name, value in told.items() if name not in guesses} | words
    supposed = {**guesses, **told}
    differing = {
        variant: {n: v for n, v in supposed.items() if _plain(variant.arguments.get(n)) != _plain(v)}
        for variant in _entries(layout)
    }
    nearest = min(map(len, differing.values()))
    near = [variant for variant, arguments in differing.items() if len(arguments) == nearest]
    named, how = _named(near, file, stated.architecture)
    chosen = named or near[0]
    settings = _settings(chosen, supposed)
    others = {repr(other): v for v in near if (other := _settings(v, supposed)) != settings}
    notes = [
        f"{other.name} has the same weights and differs in {_difference(other, chosen, supposed)}"
        for other in others.values()
    ]
    if others and how == "the name of the file":
        notes.insert(0, f"{chosen.name} was chosen by {how}")
    is_other = not differing[chosen].keys() <= set(layout.training)
    assumed = _guessed(layout, settings, told, guesses) if is_other else {}
    if others and not named and not is_other:
        told_apart = {
            n for v in others.values() for n, value in _settings(v, told).items() if value != settings[n]
        }
        assumed = {name: settings[name] for name in layout.unlearned if name in told_apart}
    if assumed and is_other:
        shown = ", ".join(f"{name}={value!r}" for name, value in assumed.items())
        notes.append(f"no weight tells {shown}: as in {chosen.name}")
    return Identity(
        chosen.name,
        differing[chosen],
        layout.family,
        alternatives=() if how == "the metadata" else tuple(v.name for v in others.values()),
        notes=tuple(notes),
        guessed=assumed,
    )


def _guessed(
    layout: Layout, settings: dict[str, Any], told: dict[str, Any], guesses: dict[str, Any]
) -> dict[str, Any]:
    """What neither weights nor metadata tell of a network that is not as published."""
    open_ones = [*layout.unlearned, *guesses]
    if "features_only" not in told and told.get("num_classes", 1):
        open_ones.append(_POOLING)
    return {name: settings[name] for name in open_ones if name in settings and name not in told}


def _named(near: list[Entry], file: str, architecture: str) -> tuple[Entry | None, str]:
    """The variant that the metadata or the file's name means, the longest name if several fit; and which."""
    for variant in near:
        if variant.name == architecture:
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


def _as_argument(value: Any) -> str:
    """A value as a command line takes it."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _fit(identity: Identity, layout: Layout | None, ours: dict[str, Tensor]) -> LoadReport | str:
    """Hold weights in our layout against the network: their misfits, or why there is no network."""
    try:
        # Without memory for the weights.
        options: dict[str, Any] = {"device": "meta"} if layout else {}
        with nullcontext() if layout else torch.device("meta"):
            network = timm.create_model(identity.name, **identity.arguments, **options)
    except Exception as error:  # arguments that strangers state make a network fail in any way
        return str(error).split("\n")[0] or type(error).__name__
    network, features_only = inside_feature_getter(network)
    return compare(network, loading.fit(layout, ours, network) if layout else ours, features_only)


@lru_cache
def _layouts() -> tuple[Layout, ...]:
    """The layouts of all classes."""
    return tuple(dict.fromkeys(entry.layout for entry in known_entries().values()))


@lru_cache
def _entries(layout: Layout) -> tuple[Entry, ...]:
    """The registered networks of a layout, the plainest names first."""
    found = [entry for entry in known_entries().values() if entry.layout is layout]
    return tuple(sorted(found, key=lambda entry: (len(entry.name), entry.name)))
