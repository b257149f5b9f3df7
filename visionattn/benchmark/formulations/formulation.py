"""How the authors of a family write its attention, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from types import ModuleType
from typing import Any

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Formulation:
    """How the authors of a family write its attention.

    Attributes:
        module: the file, package or class in which something is replaced.
        functions: replacements by their names there: of kernels that the file imports, or, after dots, of
            methods, as `"layers.AgentAttention2d.forward"`.
        sizes: inputs (height, width) that a comparison uses unless told otherwise; empty for the input size
            of the variant.
        what: the formulation in a few words.
        per_forward: caches that the authors' network fills anew in every forward pass.
    """

    module: ModuleType | type
    functions: dict[str, Callable[..., Any]]
    sizes: tuple[tuple[int, int], ...]
    what: str
    per_forward: tuple[Callable[[], None], ...] = ()

    def prepare(self, net: nn.Module) -> None:
        """Make `net` the one that stands for ours; the networks of this library are as they come."""

    @contextmanager
    def in_place_of_kernels(self, net: nn.Module) -> Iterator[None]:
        """Inside the block, `net` and every other network of the family computes as the authors do."""

        def start_forward(*args: object) -> None:
            for clear in self.per_forward:
                clear()

        ours = {name: attrgetter(name)(self.module) for name in self.functions}
        hook = net.register_forward_pre_hook(start_forward)
        self._replace(self.functions)
        try:
            # Attention that a family leaves to PyTorch is written out in products there.
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            hook.remove()
            self._replace(ours)

    def _replace(self, functions: dict[str, Callable[..., Any]]) -> None:
        for name, function in functions.items():
            *owner, leaf = name.split(".")
            setattr(attrgetter(".".join(owner))(self.module) if owner else self.module, leaf, function)
