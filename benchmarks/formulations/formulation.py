"""How the authors of a family write its attention, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from visionattn.layers.linear import Linear, Mlp


def _mlp(self: Mlp, x: Tensor) -> Tensor:
    """Layer by layer."""
    return self.fc2(self.act(self.fc1(x)))


# What every formulation has of PyTorch.
_LAYERS: tuple[tuple[type[nn.Module], Callable[..., Tensor]], ...] = (
    (Linear, nn.Linear.forward),
    (Mlp, _mlp),
)


@dataclass(frozen=True)
class Formulation:
    """How the authors of a family write its attention; linear layers are PyTorch's.

    Attributes:
        module: the file, package or class in which something is replaced.
        functions: replacements by their names there: of kernels that the file imports, or, after dots, of
            methods, as `"layers.AgentAttention2d.forward"`.
        sizes: inputs (height, width) that a comparison uses unless told otherwise; empty for the input size
            of the variant.
        what: the formulation in a few words.
        per_forward: caches that the authors' network fills anew in every forward pass.
        hosts: what is replaced otherwise, or in addition, in networks of a class.
    """

    module: ModuleType | type
    functions: dict[str, Callable[..., Any]]
    sizes: tuple[tuple[int, int], ...]
    what: str
    per_forward: tuple[Callable[[], None], ...] = ()
    hosts: dict[type[nn.Module], dict[str, Callable[..., Any]]] = field(default_factory=dict)

    def prepare(self, net: nn.Module) -> None:
        """Make `net` the one that stands for ours; the networks of this library are as they come."""

    @contextmanager
    def in_place_of_kernels(self, net: nn.Module) -> Iterator[None]:
        """Inside the block, `net` and every other network of the family computes as the authors do."""

        def start_forward(*args: object) -> None:
            for clear in self.per_forward:
                clear()

        theirs = {**self.functions, **self.hosts.get(type(net), {})}
        ours = {name: attrgetter(name)(self.module) for name in theirs}
        our_layers = [(layer, layer.forward) for layer, _ in _LAYERS]
        hook = net.register_forward_pre_hook(start_forward)
        self._replace(theirs, _LAYERS)
        try:
            # Attention that a family leaves to PyTorch is written out in products there.
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            hook.remove()
            self._replace(ours, our_layers)

    def _replace(
        self,
        functions: dict[str, Callable[..., Any]],
        layers: Iterable[tuple[type[nn.Module], Callable[..., Tensor]]],
    ) -> None:
        for name, function in functions.items():
            *owner, leaf = name.split(".")
            setattr(attrgetter(".".join(owner))(self.module) if owner else self.module, leaf, function)
        for layer, forward in layers:
            layer.forward = forward
