"""The linear layer of two libraries: the same numbers, and neither in the way of the other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from visionattn.layers import linear as module
from visionattn.layers.linear import Linear, Mlp, linear

needs_onednn = pytest.mark.skipif(module._ONEDNN is None, reason="PyTorch without oneDNN on x86")


class Operators(TorchDispatchMode):
    """The names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def uses_onednn(layer: nn.Module, x: Tensor) -> bool:
    with Operators() as operators:
        layer(x)
    return any(name.startswith("mkldnn::_linear") for name in operators.names)


def layer_and_input() -> tuple[Linear, Tensor]:
    torch.manual_seed(0)
    return Linear(24, 40), torch.randn(2, 5, 7, 24)


@needs_onednn
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (3, 24), (2, 5, 7, 24), (0, 24), (2, 0, 24)])
def test_inference_gives_the_numbers_of_pytorch(mode, bias: bool, shape: tuple[int, ...]):
    torch.manual_seed(0)
    layer, x = Linear(24, 40, bias=bias), torch.randn(shape)
    with mode():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        assert uses_onednn(layer, x) == (len(shape) > 1 and 0 not in shape)


@needs_onednn
def test_views_of_inputs_and_weights():
    torch.manual_seed(0)
    x, weight = torch.randn(9, 6, 48)[:, ::2, 24:].transpose(0, 1), torch.randn(48, 40).t()[8:, 24:]
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, None), F.linear(x, weight))


@needs_onednn
def test_weights_that_change_are_seen():
    layer, x = layer_and_input()
    with torch.no_grad():
        layer(x)
        layer.load_state_dict(nn.Linear(24, 40).state_dict())
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        layer = layer.double().float()
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_gradients_are_those_of_pytorch():
    layer, x = layer_and_input()
    assert not uses_onednn(layer, x)
    layer(x.requires_grad_()).square().sum().backward()
    grads = [x.grad, layer.weight.grad, layer.bias.grad]
    out = F.linear(x, layer.weight, layer.bias).square().sum()
    torch.testing.assert_close(grads, list(torch.autograd.grad(out, [x, layer.weight, layer.bias])))


@torch.no_grad()
def test_what_asks_for_more_than_numbers_runs_as_ever():
    layer, x = layer_and_input()
    expected = F.linear(x, layer.weight, layer.bias)
    assert not uses_onednn(layer.double(), x.double())
    assert not uses_onednn(layer.to("meta"), x.to("meta"))
    layer, _ = layer_and_input()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert not uses_onednn(layer, x)
    torch.testing.assert_close(torch.vmap(layer)(x), expected)
    _, tangent = torch.func.jvp(layer, (x,), (x,))
    torch.testing.assert_close(tangent, F.linear(x, layer.weight))
    program = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(program(x), expected)
    traced = torch.jit.trace(layer, (x,))
    assert "mkldnn" not in str(traced.inlined_graph)


@torch.no_grad()
def test_operations_are_counted():
    layer, x = layer_and_input()
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 70 * 24 * 40


@torch.no_grad()
def test_mlp():
    torch.manual_seed(0)
    mlp, x = Mlp(8, 20), torch.randn(3, 8)
    expected = F.linear(F.gelu(F.linear(x, mlp.fc1.weight, mlp.fc1.bias)), mlp.fc2.weight, mlp.fc2.bias)
    torch.testing.assert_close(mlp(x), expected)
