"""Names of parameters, the authors' and ours: rules that rename both ways."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

# Rules for the classifier of a backbone, which the authors keep without the pooling before it.
CLASSIFIER = (("^head.weight$", "^head.fc.weight$"), ("^head.bias$", "^head.fc.bias$"))


class Names:
    """Renaming by rules that work in both directions, so that a family's names are written down once.

    Rules apply one after the other, and from the last to the first on the way back. In a rule, `#` stands for
    a number, `^` in front for the beginning of the name and `$` for its end. Names that no rule knows pass.

    Args:
        rules: pairs of the authors' and our form.
    """

    def __init__(self, *rules: tuple[str, str]):
        self.rules = rules
        self._to_ours = [_rule(theirs, ours) for theirs, ours in rules]
        self._to_official = [_rule(ours, theirs) for theirs, ours in reversed(rules)]

    def __add__(self, others: Names) -> Names:
        """The rules of both, these first."""
        return Names(*self.rules, *others.rules)

    def to_ours(self, name: str) -> str:
        """Our name of an official parameter; our own names stay."""
        return _renamed(name, self._to_ours)

    def to_official(self, name: str) -> str:
        """The authors' name of our parameter."""
        return _renamed(name, self._to_official)

    def official_weights(self, weights: Mapping[str, Tensor], model: Any = None) -> dict[str, Tensor]:
        """Our weights in the authors' names: the `to_official` of a `Layout` that changes names alone."""
        return {self.to_official(name): value for name, value in weights.items()}


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
