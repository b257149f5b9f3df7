"""The linear layer of two libraries: the same numbers, and neither in the way of the other."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from visionattn.kernels import explain, product, use_backend
from visionattn.kernels.product import library
from visionattn.layers.linear import Linear, Mlp

needs_onednn = pytest.mark.skipif(library._ONEDNN is None, reason="PyTorch without oneDNN on x86")


@pytest.fixture(autouse=True)
def _a_processor_with_avx512(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(library, "_HAS_AVX512", True)


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
def test_without_avx512_onednn_runs_only_where_it_is_forced(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(library, "_HAS_AVX512", False)
    layer, x = layer_and_input()
    with torch.no_grad():
        assert not uses_onednn(layer, x)
        assert "without AVX-512" in explain(product, x, layer.weight).reason
        with use_backend("cpu"):
            assert uses_onednn(layer, x)


@needs_onednn
def test_views_of_inputs_and_weights():
    torch.manual_seed(0)
    x, weight = torch.randn(9, 6, 48)[:, ::2, 24:].transpose(0, 1), torch.randn(48, 40).t()[8:, 24:]
    with torch.no_grad():
        torch.testing.assert_close(product(x, weight, None), F.linear(x, weight))


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


@needs_onednn
@pytest.mark.parametrize("frozen", ["nothing", "input", "weight", "bias"])
@pytest.mark.parametrize("sizes", [(24, 40), (40, 24)])
def test_gradients_are_those_of_pytorch(sizes: tuple[int, int], frozen: str):
    torch.manual_seed(0)
    layer, x = Linear(*sizes), torch.randn(2, 5, 7, sizes[0]).transpose(0, 1)
    leaves = {"input": x, "weight": layer.weight, "bias": layer.bias}
    wanted = [t.requires_grad_(name != frozen) for name, t in leaves.items()]
    wanted = [t for t in wanted if t.requires_grad]

    def derivatives(function) -> list[Tensor]:
        out = function(x)
        first = torch.autograd.grad(out.square().sum(), wanted, create_graph=True)
        total = torch.stack([g.square().sum() for g in first]).sum()
        second = torch.autograd.grad(total, wanted)
        return [out, *first, *second]

    assert uses_onednn(layer, x)
    expected = derivatives(lambda x: F.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(derivatives(layer), expected, atol=1e-3, rtol=1e-5)


@needs_onednn
def test_backward_passes_use_onednn():
    layer, x = layer_and_input()
    out = layer(x.requires_grad_())
    with Operators() as operators:
        out.sum().backward()
    assert sum(name.startswith("mkldnn::_linear") for name in operators.names) == 2
    assert layer.weight.grad is not None
    assert layer.weight.grad.is_contiguous()


@needs_onednn
def test_onednn_gets_matrices_and_transposed_matrices(monkeypatch: pytest.MonkeyPatch):
    operator, weights = library._ONEDNN, []

    def recorded(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        weights.append(weight)
        return operator(x, weight, *args)

    monkeypatch.setattr(library, "_ONEDNN", recorded)
    layer, x = Linear(24, 40), torch.randn(6, 48)[:, 24:]
    layer(x).sum().backward()
    assert len(weights) == 2
    assert all(w.is_contiguous() or w.t().is_contiguous() for w in weights)


def test_several_gradients_at_once():
    layer, x = layer_and_input()
    x = x[0, 0].requires_grad_()
    weights = torch.eye(40).expand(7, 40, 40).transpose(0, 1)
    (rows,) = torch.autograd.grad(layer(x), x, weights, is_grads_batched=True)
    torch.testing.assert_close(rows, layer.weight[:, None].expand(-1, 7, -1))


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4)])
def test_outputs_may_be_changed_in_place(shape: tuple[int, ...]):
    layer, x = Linear(4, 6), torch.randn(shape, requires_grad=True)
    grads = torch.autograd.grad(layer(x).relu_().sum(), [x, *layer.parameters()])
    expected = F.linear(x, layer.weight, layer.bias).relu().sum()
    torch.testing.assert_close(grads, torch.autograd.grad(expected, [x, *layer.parameters()]))


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
    tangent = torch.func.jvp(layer, (x,), (x,))[1]
    torch.testing.assert_close(tangent, F.linear(x, layer.weight))
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x))).tangent
    torch.testing.assert_close(tangent, F.linear(x, layer.weight))
    program = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(program(x), expected)
    traced: Any = torch.jit.trace(layer, (x,))
    assert "mkldnn" not in str(traced.inlined_graph)


def test_channels_that_do_not_fit_are_named():
    layer, x = layer_and_input()
    with pytest.raises(RuntimeError, match="70x23 and 24x40"):
        layer(x[..., 1:])


@torch.no_grad()
def test_operations_are_counted():
    layer, x = layer_and_input()
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 70 * 24 * 40


IMPLEMENTATIONS = [
    ("reference", torch.float64),
    ("torch", torch.float64),
    ("torch", torch.float32),
    pytest.param("cpu", torch.float32, marks=needs_onednn),
]


@pytest.mark.parametrize(("backend", "dtype"), IMPLEMENTATIONS)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_every_implementation_gives_the_numbers_of_pytorch(
    backend: str, dtype: torch.dtype, gelu: bool, bias: bool
):
    torch.manual_seed(0)
    leaves = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((3, 5, 24), (40, 24), (40,))]
    leaves = leaves if bias else leaves[:2]
    expected = F.linear(*leaves)
    expected = F.gelu(expected) if gelu else expected
    with use_backend(backend):
        out = product(*leaves, gelu=gelu)
        grads = torch.autograd.grad(out.square().sum(), leaves)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            torch.testing.assert_close(product(*leaves, gelu=gelu), expected.detach())
    torch.testing.assert_close(out, expected)
    expected_grads = torch.autograd.grad(expected.square().sum(), leaves)
    torch.testing.assert_close(grads, expected_grads, atol=1e-4, rtol=1e-5)
    assert counter.get_total_flops() == 2 * 15 * 24 * 40


def test_training_counts_three_products():
    layer, x = layer_and_input()
    for backend in ("reference", "torch", None):
        forced = use_backend(backend) if backend else nullcontext()
        with forced, FlopCounterMode(display=False) as counter:
            layer(x.requires_grad_()).sum().backward()
        assert counter.get_total_flops() == 3 * 2 * 70 * 24 * 40


@needs_onednn
def test_the_choice_is_explained_and_can_be_forced():
    layer, x = layer_and_input()
    arguments = (x, layer.weight, layer.bias)
    assert str(explain(product, *arguments)) == "product: cpu (kernel for CPUs available)"
    assert "float64" in explain(product, *(t.double() for t in arguments)).reason
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert explain(product, *arguments).backend == "torch"
    for backend in ("reference", "torch"):
        with use_backend(backend):
            assert not uses_onednn(layer, x)
    with use_backend("cpu"):
        assert uses_onednn(layer, x)
        with pytest.raises(ValueError, match="product cannot run on cpu: oneDNN is asked in float32 only"):
            layer.double()(x.double())


def test_networks_run_under_fused_kernels_with_the_products_of_pytorch():
    layer, x = layer_and_input()
    with use_backend("triton"):
        choice = explain(product, x, layer.weight, layer.bias)
        assert (choice.backend, choice.reason) == ("torch", "forced triton, for which it stands in")
        assert not uses_onednn(Mlp(24, 40), x)
