"""Every linear layer and convolution is called: adapters, hooks and quantisation reach it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from compatibility import LAYERS, adapted, merged
from families import FAMILIES, STRUCTURES, TOKENS, small
from test_models import image
from torch import Tensor, nn
from torch.nn.utils import parametrize

from visionattn.heads.segmentation import UPerHead
from visionattn.integrations.timm_attention import accelerate
from visionattn.layers.linear import Linear

every_model = pytest.mark.parametrize("name", STRUCTURES)
every_family = pytest.mark.parametrize("name", FAMILIES)


def precise(name: str, **kwargs: Any) -> tuple[nn.Module, Tensor]:
    """A network and an image in float64, in which no rounding decides which regions attend to which."""
    if name in TOKENS:
        kwargs = {"global_pool": "", **kwargs}
    net = small(name, dtype=torch.float64, **kwargs).eval()
    return net, image(net, 1, dtype=torch.float64)


@every_model
def test_adapters_act_in_every_layer_and_are_trained(name: str):
    net, x = precise(name)
    wrapped = copy.deepcopy(net)
    adapters = adapted(wrapped)
    with torch.no_grad():
        expected, before = merged(net, adapters)(x), net(x)
        torch.testing.assert_close(wrapped(x), expected)
        assert not torch.allclose(expected, before, atol=0)
    wrapped(x).square().sum().backward()
    untrained = [p for p, adapter in adapters.items() if adapter.a.grad is None or not adapter.a.grad.any()]
    assert untrained == untrainable(net)


def untrainable(net: nn.Module) -> list[str]:
    """Layers on which no output depends, as their own weights without gradients say."""
    return [
        name
        for name, module in net.named_modules()
        if isinstance(module, LAYERS) and not module.weight.requires_grad
    ]


@every_family
def test_hooks_see_every_layer(name: str):
    net, x = precise(name)
    with torch.no_grad():
        expected = net(x)
    calls: dict[str, int] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[path] = calls.get(path, 0) + 1

        return hook

    layers = {path: module for path, module in net.named_modules() if isinstance(module, LAYERS)}
    seen = set(layers) - set(untrainable(net))
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        handles = [getattr(module, register)(note(path)) for path, module in layers.items()]
        with torch.no_grad():
            torch.testing.assert_close(net(x), expected)
        assert set(calls) == seen
        calls.clear()
        for handle in handles:
            handle.remove()
    for path, module in layers.items():
        module.register_full_backward_hook(note(path))
    net(x.requires_grad_()).square().sum().backward()
    assert set(calls) == seen


@every_family
def test_hooks_of_all_modules_see_every_layer(name: str):
    net, x = precise(name)
    called: set[nn.Module] = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.add(module))
    try:
        with torch.no_grad():
            net(x)
    finally:
        handle.remove()
    layers = {path: module for path, module in net.named_modules() if isinstance(module, LAYERS)}
    assert [path for path, module in layers.items() if module not in called] == untrainable(net)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@every_family
def test_parametrised_weights_and_new_forwards_count(name: str):
    net, x = precise(name)
    doubled, parametrised, rewritten = (copy.deepcopy(net) for _ in range(3))
    with torch.no_grad():
        for module in doubled.modules():
            if isinstance(module, LAYERS):
                module.weight.mul_(2)
        expected = doubled(x)
        for module in list(parametrised.modules()):
            if isinstance(module, LAYERS):
                parametrize.register_parametrization(module, "weight", Doubled())
        torch.testing.assert_close(parametrised(x), expected)
        for module in rewritten.modules():
            if isinstance(module, LAYERS):
                # As Accelerate does with modules whose weights are elsewhere until they are called.
                module.forward = brought_back(module)
        torch.testing.assert_close(rewritten(x), expected)


def brought_back(module: nn.Module) -> Callable[[Tensor], Tensor]:
    forward, weight = module.forward, 2 * module.weight.detach()
    module.weight = nn.Parameter(torch.full_like(weight, torch.nan), module.weight.requires_grad)

    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            module.weight.copy_(weight)
        out = forward(x)
        with torch.no_grad():
            module.weight.fill_(torch.nan)
        return out

    return call


def test_linear_layers_are_found_by_their_class():
    assert type(Linear(2, 3)) in {nn.Linear: 1}
    assert nn.Linear in (Linear,)
    assert type(nn.Linear(2, 3)) is not Linear
    assert Linear != nn.Conv2d

    class Derived(Linear):
        pass

    assert Derived not in (nn.Linear, Linear)


def test_adapters_act_in_accelerated_networks_of_timm():
    net = timm.create_model(
        "swinv2_tiny_window8_256", img_size=64, depths=(1, 2), embed_dim=24, num_heads=(1, 2)
    )
    net = net.double().eval()
    accelerate(net)
    wrapped = copy.deepcopy(net)
    adapters = adapted(wrapped)
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(wrapped(x), merged(net, adapters)(x))
    wrapped(x).square().sum().backward()
    assert all(adapter.a.grad is not None for adapter in adapters.values())


def test_adapters_act_in_heads():
    head = UPerHead([8, 16], channels=8, num_classes=3).double().eval()
    wrapped = copy.deepcopy(head)
    adapters = adapted(wrapped)
    maps = [torch.rand(1, 8, 16, 16).double(), torch.rand(1, 16, 8, 8).double()]
    with torch.no_grad():
        torch.testing.assert_close(wrapped(maps), merged(head, adapters)(maps))
