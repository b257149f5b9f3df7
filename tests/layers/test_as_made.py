"""When a weight may be used without its layer, and how tensors of five axes move."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from visionattn.layers.as_made import is_as_made, joining_axes
from visionattn.layers.linear import Linear


class Quantised(Tensor):
    """A weight whose numbers are not what they seem."""


def quantise(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantised))


def hook_all(layer: nn.Module) -> None:
    nn.modules.module.register_module_forward_hook(lambda *_: None)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "forward hook": lambda layer: layer.register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda layer: layer.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda layer: layer.register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
    "hook of all modules": hook_all,
    "parametrisation": lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity()),
    "spectral norm": nn.utils.parametrizations.spectral_norm,
    "old weight norm": nn.utils.weight_norm,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "a forward of its own": lambda layer: setattr(layer, "forward", layer.forward),
    "a quantised weight": quantise,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change: str):
    for layer in (Linear(2, 3), nn.Conv2d(2, 3, 1)):
        kind = type(layer)
        assert is_as_made(kind, layer)
        before = nn.modules.module._global_forward_hooks.copy()
        try:
            CHANGES[change](layer)
            assert not is_as_made(kind, layer)
            assert not is_as_made(kind, kind(2, 3, 1), layer)
        finally:
            nn.modules.module._global_forward_hooks.clear()
            nn.modules.module._global_forward_hooks.update(before)


def test_other_classes_are_seen():
    class Derived(nn.Conv2d):
        pass

    assert not is_as_made(nn.Conv2d, Derived(2, 3, 1))
    assert not is_as_made(nn.Conv2d, nn.Conv1d(2, 3, 1))
    assert not is_as_made(Linear, nn.Identity())
    assert is_as_made(Linear, nn.Linear(2, 3), Linear(2, 3, bias=False))
    assert is_as_made(nn.GELU, nn.GELU())


def test_a_counter_of_flops_sees_what_runs():
    layer = Linear(2, 3)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert is_as_made(Linear, layer)


def test_weights_in_the_place_of_others_are_plain():
    layer = Linear(2, 3)
    seen = []
    layer.register_parameter("spare", None)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            seen.append(is_as_made(Linear, self.layer))
            return self.layer(x)

    torch.func.functional_call(Net(), {"layer.weight": torch.ones(3, 2)}, torch.ones(1, 2))
    assert seen == [True]


def test_tensors_of_five_axes_move_as_such_of_four():
    to_channels_last = joining_axes(lambda t: t.to(memory_format=torch.channels_last))
    five, four = torch.randn(2, 3, 3, 4, 5), torch.randn(2, 3, 4, 5)
    moved = to_channels_last(five)
    assert torch.equal(moved, five)
    assert moved.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert to_channels_last(four).is_contiguous(memory_format=torch.channels_last)
    assert joining_axes(Tensor.double)(five).dtype == torch.float64
