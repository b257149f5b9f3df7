"""The way in which the authors of a family write it, as a table of classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from visionattn.layers.linear import Linear, Mlp
from visionattn.models.frames.common import Block

Classes = Mapping[type[nn.Module], type[nn.Module]]


class TheirMlp(Mlp):
    """Layer by layer."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim]` to `[..., dim]`."""
        return self.fc2(self.act(self.fc1(x)))


class TheirBlock(Block):
    """The MLP on the whole map."""

    def feed_forward(self, x: Tensor) -> Tensor:
        """`[..., dim]` to `[..., dim]`."""
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


# Every formulation computes its linear layers as PyTorch does, one after the other.
LAYERS: Classes = {Linear: nn.Linear, Mlp: TheirMlp, Block: TheirBlock}


@dataclass(frozen=True)
class Formulation:
    """The way in which the authors of a family write it; linear layers are PyTorch's.

    Attributes:
        classes: for classes of our modules their subclasses that compute the same in the authors' way.
        sizes: inputs (height, width) that a comparison uses unless told otherwise; empty for the input size
            of the variant.
        description: the formulation in a few words.
        per_forward: caches that the authors' network fills anew in every forward pass.
        hosts: classes that come in addition, or instead, in networks of a class.
        fused_attention: whether the authors call PyTorch's attention; else it is written out in products.
    """

    classes: Classes
    sizes: tuple[tuple[int, int], ...]
    description: str
    per_forward: tuple[Callable[[], None], ...] = ()
    hosts: Mapping[type[nn.Module], Classes] = field(default_factory=dict)
    fused_attention: bool = False

    def prepare(self, net: nn.Module) -> None:
        """Make `net` the one that stands for ours; the networks of this library are as they come."""

    def classes_in(self, net: nn.Module) -> Classes:
        """The classes that take the place of ours in a network."""
        return {**LAYERS, **self.classes, **self.hosts.get(type(net), {})}

    @contextmanager
    def in_place_of_kernels(self, net: nn.Module) -> Iterator[None]:
        """Inside the block `net` computes as the authors do, other networks as ever."""

        def start_forward(*args: object) -> None:
            for clear in self.per_forward:
                clear()

        theirs = self.classes_in(net)
        ours = [(module, type(module)) for module in net.modules() if type(module) in theirs]
        # A hook that comes and goes would have a compiled network compiled anew.
        hook = net.register_forward_pre_hook(start_forward) if self.per_forward else nullcontext()
        attention = nullcontext() if self.fused_attention else sdpa_kernel(SDPBackend.MATH)
        for module, kind in ours:
            module.__class__ = theirs[kind]  # pyright: ignore[reportAttributeAccessIssue]
        try:
            with hook, attention:
                yield
        finally:
            for module, kind in ours:
                module.__class__ = kind  # pyright: ignore[reportAttributeAccessIssue]
