"""The arguments of a network as the shapes of its weights tell them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Guess(NamedTuple):
    """The value of an argument that weights leave open, beside those that they tell."""

    value: Any


class Shapes:
    """The shapes of a state dict, and counts of what is numbered in it.

    Attributes:
        names: all names.
    """

    def __init__(self, weights: Mapping[str, Tensor]):
        self._shapes = {name: tuple(value.shape) for name, value in weights.items()}
        self.names = tuple(self._shapes)

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def get(self, name: str, dims: int) -> tuple[int, ...] | None:
        """The shape of a parameter, None where there is none of so many dimensions, or an empty one."""
        shape = self._shapes.get(name, ())
        return shape if len(shape) == dims and 0 not in shape else None

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

    def lacking(self, needed: Mapping[str, int]) -> str:
        """The first parameter of those needed that is not there, or no such array, as half a sentence; or "".

        Args:
            needed: names and their numbers of dimensions; a name with `#` is needed for every module that is
                numbered so, and for at least one.
        """
        for pattern, dims in needed.items():
            for name in self._numbered(pattern):
                if name not in self:
                    return f"it has no {name}"
                if self.get(name, dims) is None:
                    return f"{name} has the shape {self[name]}"
        return ""

    def _numbered(self, pattern: str) -> Iterator[str]:
        prefix, mark, rest = pattern.partition(".#")
        if not mark:
            yield pattern
            return
        for i in range(max(self.length(prefix), 1)):
            yield from self._numbered(f"{prefix}.{i}{rest}")

    def first(self, pattern: str) -> str | None:
        """The first name in which a regular expression is found."""
        return next((name for name in self.names if re.search(pattern, name)), None)


def classes_of(shapes: Shapes) -> int:
    """Classes of a backbone's classifier; 0 where there is none."""
    weight = shapes.get("head.fc.weight", 2) or shapes.get("head.weight", 2)
    return weight[0] if weight else 0


def square(height: int, width: int) -> int | tuple[int, int]:
    """A size as an argument: one number where both sides are equal."""
    return height if height == width else (height, width)


def window_of(area: int, offsets: int) -> tuple[int, int] | None:
    """Height and width of the window of `area` pixels and `offsets` offsets, the shorter side first."""
    both = (4 * area + 1 - offsets) // 2
    root = math.isqrt(max(both**2 - 4 * area, 0))
    sides = (both - root) // 2, (both + root) // 2
    fits = sides[0] * sides[1] == area and (2 * sides[0] - 1) * (2 * sides[1] - 1) == offsets
    return sides if fits else None
