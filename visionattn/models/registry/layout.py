"""The authors' and our layout of a family's weights, and what the shapes of weights say of a network."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from timm.models import build_model_with_cfg
from torch import Tensor, nn

Weights = Mapping[str, Tensor]

# Under which keys training code stores weights; averaged weights are what the authors evaluate.
WRAPPERS = (
    *("params_ema", "params-ema", "model_ema", "state_dict_ema", "ema"),
    *("params", "model", "net", "state_dict", "model_state_dict", "generator"),
)
# What wrapping classes put before every name.
PREFIXES = ("module.", "_orig_mod.", "netG.", "model.")
# No file of anybody's is wrapped deeper; one that is may contain itself.
_DEEPEST = 8


class Names:
    """Renaming by rules that work in both directions, so that a family's names are written down once.

    Rules apply one after the other, and from the last to the first on the way back. In a rule, `#` stands for
    a number, `^` in front for the beginning of the name and `$` for its end. Names that no rule knows pass.

    Args:
        rules: pairs of the authors' and our form.
    """

    def __init__(self, *rules: tuple[str, str]):
        self._to_ours = [_rule(theirs, ours) for theirs, ours in rules]
        self._to_official = [_rule(ours, theirs) for theirs, ours in reversed(rules)]

    def to_ours(self, name: str) -> str:
        """Our name of an official parameter; our own names stay."""
        return _renamed(name, self._to_ours)

    def to_official(self, name: str) -> str:
        """The authors' name of our parameter."""
        return _renamed(name, self._to_official)


class _Rule(NamedTuple):
    part: str  # a piece of every name that the pattern finds: cheaper to look for
    pattern: re.Pattern[str]
    replacement: str


def _rule(found: str, written: str) -> _Rule:
    literal = found.removeprefix("^").removesuffix("$")
    pattern = re.escape(literal).replace(r"\#", r"(\d+)")
    pattern = "^" * found.startswith("^") + pattern + "$" * found.endswith("$")
    pieces = written.removeprefix("^").removesuffix("$").split("#")
    replacement = "".join(rf"\g<{i}>{piece}" if i else piece for i, piece in enumerate(pieces))
    return _Rule(max(literal.split("#"), key=len), re.compile(pattern), replacement)


def _renamed(name: str, rules: Iterable[_Rule]) -> str:
    for part, pattern, replacement in rules:
        if part in name:
            name = pattern.sub(replacement, name)
    return name


class Shapes:
    """The shapes of a state dict, and counts of what is numbered in it.

    Attributes:
        names: all names.
    """

    def __init__(self, weights: Weights):
        self._shapes = {name: tuple(value.shape) for name, value in weights.items()}
        self.names = tuple(self._shapes)

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def get(self, name: str) -> tuple[int, ...] | None:
        """The shape of a parameter, None where there is none."""
        return self._shapes.get(name)

    def length(self, prefix: str) -> int:
        """How many modules `{prefix}.0`, `{prefix}.1`, ... there are."""
        start = len(prefix) + 1
        numbers = {name[start:].split(".", 1)[0] for name in self.names if name.startswith(f"{prefix}.")}
        count = 0
        while str(count) in numbers:
            count += 1
        return count

    def lengths(self, prefix: str, suffix: str) -> tuple[int, ...]:
        """The lengths of `{prefix}.i.{suffix}` for every i."""
        return tuple(self.length(f"{prefix}.{i}.{suffix}") for i in range(self.length(prefix)))

    def first(self, pattern: str) -> str | None:
        """The first name in which a regular expression is found."""
        return next((name for name in self.names if re.search(pattern, name)), None)


@dataclass(frozen=True)
class Layout:
    """How the weights of one network class are recognised, converted and written back.

    Attributes:
        family: the name of the family.
        model_cls: the class.
        marks: regular expressions, each of which one of our names matches, that tell the class from others.
        to_ours: the authors' state dict in our names and shapes, without what is derived from sizes; our
            own state dict passes unchanged.
        arguments: the network's arguments that the weights tell, from the shapes in our layout and those in
            the file's own. A missing parameter raises KeyError: the weights are no such network.
        to_official: our weights and their network to the authors' state dict, with the buffers that their
            code stores.
        wrapper: under which key the authors' files hold the weights; None for a bare state dict.
        unlearned: arguments that no weight tells and that change the output.
    """

    family: str
    model_cls: type[nn.Module]
    marks: tuple[str, ...]
    to_ours: Callable[[Weights], dict[str, Tensor]]
    arguments: Callable[[Shapes, Shapes], dict[str, Any]]
    to_official: Callable[[Weights, Any], dict[str, Tensor]]
    wrapper: str | None = None
    unlearned: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Variant:
    """What a registered name builds.

    Attributes:
        name: what `timm.create_model` takes.
        model_cls: the class of the network.
        arguments: all its arguments with their values.
    """

    name: str
    model_cls: type[nn.Module]
    arguments: dict[str, Any] = field(default_factory=dict)


def build(
    model_cls: type[nn.Module],
    variant: str,
    pretrained: bool,
    *,
    describe: bool = False,
    settings: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """timm's `build_model_with_cfg`; with `describe`, instead of the network, the `Variant` that it would be.

    Args:
        model_cls: the class.
        variant: the registered name.
        pretrained: load the published weights.
        describe: build nothing.
        settings: arguments of the variant that `kwargs` holds in another form.
        kwargs: of timm's function and of the class.
    """
    if not describe:
        return build_model_with_cfg(model_cls, variant, pretrained, **kwargs)
    defaults = _defaults(model_cls)
    given = {name: value for name, value in kwargs.items() if name in defaults}
    arguments = {**defaults, **given, **(settings or {})}
    return Variant(variant, model_cls, {n: v for n, v in arguments.items() if n not in _NO_ARGUMENTS})


def _defaults(model_cls: type) -> dict[str, Any]:
    """The parameters of a class, and of its base where they are handed on."""
    own = inspect.signature(model_cls).parameters
    inherited = _defaults(model_cls.__bases__[0]) if "kwargs" in own else {}
    return {**inherited, **{name: parameter.default for name, parameter in own.items()}}


# Parameters of classes that are no choice of a user who describes a network.
_NO_ARGUMENTS = ("attention", "block", "device", "dtype", "kwargs", "drop_path_rate", "drop_rate")


def unwrap(content: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """The weights inside what training code saves, and where in it they lie.

    The first known wrapper is opened, averaged weights first, or the only mapping that there is; prefixes
    that stand before every name are removed.

    Returns:
        The weights, without everything else; empty if there are none. And the keys on the way to them, joined
        by dots; "" for a bare state dict.
    """
    path: list[str] = []
    while len(path) < _DEEPEST:
        inner = [key for key, value in content.items() if isinstance(value, Mapping)]
        bare = any(isinstance(value, Tensor) for value in content.values())
        known = [key for key in WRAPPERS if key in inner]
        if not known and (bare or len(inner) != 1):
            break
        path.append(str((known or inner)[0]))
        content = content[(known or inner)[0]]
    weights = {
        name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)
    }
    while weights and (prefix := next((p for p in PREFIXES if all(n.startswith(p) for n in weights)), None)):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights, ".".join(path)


def converter(layout: Callable[[Weights], dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """A `checkpoint_filter_fn` for timm that needs nothing of the model: unwraps and converts."""

    def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
        """Rename the official parameters to ours; our own names pass unchanged."""
        return layout(unwrap(state_dict)[0])

    return checkpoint_filter_fn


def window_index(rows: Sequence[int], columns: Sequence[int] | None = None) -> Tensor:
    """Swin's index of relative positions: for every pair of pixels of a window, their entry in a table.

    Args:
        rows: height and width of the window.
        columns: those of the window of keys, where it is another one.

    Returns:
        int64 `[pixels, pixels of keys]`: query minus key, counted from the most negative offset.
    """
    queries, keys = _pixels(rows), _pixels(columns or rows)
    height, width = columns or rows
    offset = queries[:, None] - keys[None] + torch.tensor([height - 1, width - 1])
    return offset[..., 0] * (rows[1] + width - 1) + offset[..., 1]


def _pixels(size: Sequence[int]) -> Tensor:
    """Rows and columns `[height * width, 2]` of the pixels of a window."""
    return torch.cartesian_prod(*(torch.arange(side) for side in size))


def shift_mask(size: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """Swin's mask of shifted windows: -100 between pixels that do not belong together, else 0.

    Args:
        size: height and width of the map, multiples of the window's.
        window: height and width of a window.
        shift: pixels by which the map is rolled.

    Returns:
        float32 `[windows, pixels, pixels]`.
    """
    lines = []
    for side, length, step in zip(size, window, shift):
        line = torch.zeros(side)
        line[-length:], line[-step:] = 1, 2
        lines.append(line)
    region = 3 * lines[0][:, None] + lines[1]
    region = region.unflatten(1, (-1, window[1])).unflatten(0, (-1, window[0])).transpose(1, 2).flatten(2)
    region = region.flatten(0, 1)
    return torch.where(region[:, None] != region[:, :, None], -100.0, 0.0)


def window_offsets(window: Sequence[int]) -> Tensor:
    """All offsets `[(2 * height - 1) * (2 * width - 1), 2]` inside a window, as the authors store them."""
    height, width = window
    return torch.cartesian_prod(torch.arange(1 - height, height), torch.arange(1 - width, width)).float()


def window_of(area: int, offsets: int) -> tuple[int, int] | None:
    """Height and width of the window of `area` pixels and `offsets` offsets, the shorter side first."""
    both = (4 * area + 1 - offsets) // 2
    root = math.isqrt(max(both**2 - 4 * area, 0))
    sides = (both - root) // 2, (both + root) // 2
    fits = sides[0] * sides[1] == area and (2 * sides[0] - 1) * (2 * sides[1] - 1) == offsets
    return sides if fits else None


def classes_of(shapes: Shapes) -> int:
    """Classes of a backbone's classifier; 0 where there is none."""
    return next((shapes[name][0] for name in ("head.fc.weight", "head.weight") if name in shapes), 0)


CLASSIFIER = (("^head.weight$", "^head.fc.weight$"), ("^head.bias$", "^head.fc.bias$"))
