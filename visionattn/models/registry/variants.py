"""A family's variants as one table: register them with timm, and say which weights belong to them."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import FeatureListNet, build_model_with_cfg, register_model
from torch import Tensor, nn

from visionattn.models.registry.shapes import Shapes
from visionattn.models.registry.unwrap import unwrap

Weights = Mapping[str, Tensor]
# Arguments of classes that are no choice of somebody who describes a network.
_NO_CHOICES = ("device", "dtype", "kwargs", "drop_path_rate", "drop_rate")


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
            the file's own; None where they are no such network after all.
        to_official: our weights and their network to the authors' state dict, with the buffers that their
            code stores.
        wrapper: under which key the authors' files hold the weights; None for a bare state dict.
        unlearned: arguments that no weight tells and that change the output.
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
    cache_each: bool = False,
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
        cache_each: whether downloads of every variant have a folder of their own, because all files have the
            same name.
    """
    options = dict(options or {})
    defaults = {**_defaults(layout.model_cls), **options}

    def entrypoint(name: str, row: Variant) -> Callable[..., Any]:
        def make(pretrained: bool = False, **kwargs: Any) -> Any:
            kwargs = {**options, **row.arguments, **kwargs}
            kwargs |= prepare(**{option: kwargs.pop(option) for option in options})
            if cache_each and not kwargs.get("cache_dir"):
                kwargs["cache_dir"] = os.path.join(torch.hub.get_dir(), "checkpoints", name)
            convert = layout.checkpoint_filter_fn
            return builder(layout.model_cls, name, pretrained, pretrained_filter_fn=convert, **kwargs)

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
