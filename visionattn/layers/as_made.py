"""What users do to the layers of a network: change them, or move them.

They wrap linear layers and convolutions in low-rank adapters, give them hooks, quantise them. All of that
acts where a layer is called. A network that uses a weight without its layer first asks `is_as_made`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from visionattn._compat import has_hooks, is_plain_tensor


def is_as_made(kind: type[nn.Module], *modules: nn.Module) -> bool:
    """Whether calling these modules does no more than their class says, so that their weights tell all.

    False for a module of another class, an adapter, a quantised or a parametrised layer for instance, and for
    one with hooks, with a `forward` of its own, or with a weight or bias that is no plain tensor. PyTorch's
    own linear layer counts as ours.
    """
    for module in modules:
        if type(module) not in (kind,) or has_hooks(module):
            return False
        tensors = (module._parameters.get(name) for name in ("weight", "bias"))
        if not all(t is None or is_plain_tensor(t) for t in tensors):
            return False
    return True


def joining_axes(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function for `nn.Module._apply` that sees tensors of five axes as such of four, the first two joined.

    So a whole network moves to `torch.channels_last`: PyTorch refuses tensors of five axes there.
    """

    def call(t: Tensor) -> Tensor:
        return function(t.flatten(0, 1)).unflatten(0, t.shape[:2]) if t.dim() == 5 else function(t)

    return call
