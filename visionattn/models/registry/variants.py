"""A family's variants as one table: register them with timm, and say which weights belong to them."""

from __future__ import annotations

import argparse
import hashlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models import FeatureListNet, build_model_with_cfg, register_model, resolve_pretrained_cfg
from torch import Tensor, nn

from visionattn.models.registry.shapes import Shapes
from visionattn.models.registry.unwrap import unwrap

Weights = Mapping[str, Tensor]
# Arguments of classes that are no choice of somebody who describes a network.
_NO_CHOICES = ("device", "dtype", "kwargs", "drop_path_rate", "drop_rate")
# Arguments that every network takes beside those that describe it.
_CHOICES = ("drop_path_rate", "drop_rate", "features_only", "out_indices")


def _same(value: Any, *_: Any) -> Any:
    return value


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """How the weights of one network class are recognised, converted and written back.

    Weights are converted in two steps, names first, so that a file of another family is recognised as such
    before any of its tensors is touched. Weights in our layout pass all steps unchanged.

    Attributes:
        family: the name of the family.
        model_cls: the class.
        marks: regular expressions, each of which one of our names matches, that tell the class from others.
        rename: our name of a parameter of the authors.
        convert: weights in our names to our shapes, without what is derived from sizes.
        fit: weights in our layout to the sizes of a network, where they were learned for others.
        reads: our parameters that `arguments` takes for granted, and their numbers of dimensions; `#` stands
            for every number. It is asked about weights that have all of them.
        arguments: the network's arguments that the weights tell, from the shapes in our layout and those in
            the file's own; None where they are no such network after all. What they leave open is a `Guess`.
        to_official: our weights and their network to the authors' state dict, with the buffers that their
            code stores.
        wrapper: under which key the authors' files hold the weights; None for a bare state dict.
        unlearned: arguments that no weight tells and that change the output.
        training: arguments that change nothing but training.
    """

    family: str
    model_cls: type[nn.Module]
    marks: tuple[str, ...]
    rename: Callable[[str], str] = _same
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] = _same
    fit: Callable[[dict[str, Tensor], Any], dict[str, Tensor]] = _same
    reads: Mapping[str, int]
    arguments: Callable[[Shapes, Shapes], dict[str, Any] | None]
    to_official: Callable[[Weights, Any], dict[str, Tensor]]
    wrapper: str | None = None
    unlearned: tuple[str, ...] = ()
    training: tuple[str, ...] = ()

    def has_marks(self, names: Iterable[str]) -> bool:
        """Whether weights of these names, ours, may be of this class."""
        text = "\n".join(names)
        return all(re.search(mark, text, re.MULTILINE) for mark in self.marks)

    def to_ours(self, official: Weights) -> dict[str, Tensor]:
        """The authors' weights in our names and shapes; our own pass unchanged."""
        return self.convert({self.rename(name): value for name, value in official.items()})

    def checkpoint_filter_fn(self, state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
        """Unwrap, convert and fit a file to the sizes of the network: the filter that timm calls."""
        return self.fit(self.to_ours(unwrap(state_dict)[0]), model)


class Variant:
    """A row of a family's table.

    Args:
        doc: the docstring of the function that makes it: its parameters, GMACs, what is special.
        arguments: of the class, where they differ from its defaults.
    """

    def __init__(self, doc: str, **arguments: Any):
        self.doc = doc
        self.arguments = arguments


@dataclass(frozen=True, eq=False)
class Entry:
    """A registered network.

    Attributes:
        name: what `timm.create_model` takes.
        layout: its class, and how its weights are recognised.
        arguments: all arguments that describe it, with their values.
    """

    name: str
    layout: Layout
    arguments: dict[str, Any]


# All registered networks by their names; filled when `visionattn.models` is imported.
ENTRIES: dict[str, Entry] = {}
# Networks that timm registers, and whose official weights are known here.
ADOPTED: dict[str, Entry] = {}


def register(
    module: str,
    layout: Layout,
    variants: Mapping[str, Variant],
    *,
    builder: Callable[..., Any] = build_model_with_cfg,
    options: Mapping[str, Any] | None = None,
    prepare: Callable[..., dict[str, Any]] = dict,
    name_downloads: bool = False,
) -> None:
    """Make and register a function for every variant, as if it stood in the module under the variant's name.

    The functions take `pretrained` and the arguments of the class; `default_cfgs` of the module, as timm
    defines it, must be there.

    Args:
        module: `__name__` of the family's module.
        layout: of the class that the variants are of.
        variants: the rows by their registered names.
        builder: called as timm's `build_model_with_cfg`.
        options: arguments that variants have beside those of the class, with their defaults.
        prepare: what these arguments are to the class: called with all of them, gives arguments of the class.
        name_downloads: whether downloads are called as the variant, because the addresses do not end in the
            name of a file, or all in the same.
    """
    options = dict(options or {})
    defaults = {**_defaults(layout.model_cls), **options}

    def entrypoint(name: str, row: Variant) -> Callable[..., Any]:
        def make(pretrained: bool = False, **kwargs: Any) -> Any:
            given = {key: value for key, value in kwargs.items() if key in {*defaults, *_CHOICES}}
            kwargs = {**options, **row.arguments, **kwargs}
            kwargs |= prepare(**{option: kwargs.pop(option) for option in options})
            if pretrained and name_downloads:
                kwargs["pretrained_cfg_overlay"] = _download(name, **kwargs)
            convert = layout.checkpoint_filter_fn
            # Beside their weights the authors' files hold the options of their training.
            allowed = torch.serialization.safe_globals([argparse.Namespace])
            with allowed if pretrained else nullcontext():
                made = builder(layout.model_cls, name, pretrained, pretrained_filter_fn=convert, **kwargs)
            _record(made, given)
            return made

        make.__name__ = make.__qualname__ = name
        make.__module__ = module
        make.__doc__ = row.doc
        make.__annotations__["return"] = layout.model_cls.__name__
        return make

    for name, row in variants.items():
        setattr(sys.modules[module], name, register_model(entrypoint(name, row)))
        ENTRIES[name] = Entry(name, layout, {**defaults, **row.arguments})


def adopt(layout: Layout, variants: Mapping[str, Mapping[str, Any]]) -> None:
    """Let the official weights of networks that timm registers be recognised, loaded and converted.

    "Our" layout of the weights is then timm's.

    Args:
        layout: of timm's class.
        variants: their arguments, where they differ from the defaults of the class, by timm's names.
    """
    defaults = _defaults(layout.model_cls)
    ADOPTED.update({name: Entry(name, layout, {**defaults, **row}) for name, row in variants.items()})


def known_entries() -> dict[str, Entry]:
    """All networks whose weights are known."""
    return {**ENTRIES, **ADOPTED}


def _record(network: Any, given: Mapping[str, Any]) -> None:
    """Keep with a network what it was made with, for those who save it, and the size that it was made for."""
    network.made_with = dict(given)
    size = given.get("img_size")
    if size is not None and isinstance(getattr(network, "pretrained_cfg", None), dict):
        sides = (size, size) if isinstance(size, int) else tuple(size)
        channels = network.pretrained_cfg["input_size"][0]
        network.pretrained_cfg |= {"input_size": (channels, *sides), "pool_size": None}


def _download(
    name: str,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **_: Any,
) -> dict[str, Any]:
    """Fetch the published weights of a variant once; the overlay of its configuration that names the file."""
    overlay = dict(pretrained_cfg_overlay or {})
    cfg = resolve_pretrained_cfg(name, pretrained_cfg, overlay)
    if cfg.file or cfg.state_dict or cfg.hf_hub_id or not isinstance(cfg.url, str) or not cfg.url:
        return overlay
    folder = Path(cache_dir or os.path.join(torch.hub.get_dir(), "checkpoints"))
    # The address is part of the name, so that no file is taken for that of another address.
    file = folder / f"{name}.{hashlib.sha256(cfg.url.encode()).hexdigest()[:8]}.pth"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(cfg.url, str(file))
    return {**overlay, "file": str(file)}


def layout_of(network: nn.Module) -> Layout | None:
    """The layout of a network's weights; None for one of another library.

    Networks that were not made by their registered name have the first layout of their class.
    """
    entries = known_entries()
    entry = entries.get(getattr(network, "pretrained_cfg", {}).get("architecture", ""))
    # What timm makes of its networks for `features_only=True` has the parts, and another class.
    if entry and type(network) in (entry.layout.model_cls, FeatureListNet):
        return entry.layout
    return next((e.layout for e in entries.values() if e.layout.model_cls is type(network)), None)


def _defaults(model_cls: type) -> dict[str, Any]:
    """The arguments of a class that have a default, and those of its base where they are handed on."""
    own = inspect.signature(model_cls).parameters
    inherited = _defaults(model_cls.__bases__[0]) if "kwargs" in own else {}
    given = {name: p.default for name, p in own.items() if p.default is not inspect.Parameter.empty}
    return {name: value for name, value in {**inherited, **given}.items() if name not in _NO_CHOICES}
