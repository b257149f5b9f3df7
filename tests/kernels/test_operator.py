"""What every operator has from its registration: FLOPs on every path, opcheck, vmap, leaves of torch.fx."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from agreement import packed_qkv
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from visionattn.kernels import (
    agent_attention,
    dense_attention,
    grid_attention,
    linear_attention,
    neighborhood_attention,
    overlapping_window_attention,
    routed_attention,
    use_backend,
    window_attention,
)

# Batch, height, width, heads, head dim.
SHAPE = (2, 6, 5, 2, 8)
PIXELS = 30


class Case(NamedTuple):
    """A public function, and its operations per pass: exactly its formula."""

    function: Callable[..., Any]
    forward: int
    backward: int


def products(pixels: int, keys: int, count: int) -> int:
    """Operations of so many products of queries and keys."""
    return 2 * count * SHAPE[0] * SHAPE[3] * SHAPE[4] * pixels * keys


def lists() -> Tensor:
    """Two of the four regions of 3x3 pixels for each; keys beyond the map count."""
    return torch.tensor([[0, 1], [3, 1], [2, 0], [1, 2]], dtype=torch.int32).expand(2, 1, 4, 2)


CASES = {
    "dense": Case(
        lambda q, k, v: dense_attention(q, k[:, :4], v[:, :4]),
        products(PIXELS, 20, 2),
        products(PIXELS, 20, 7),
    ),
    "dense with lse": Case(
        lambda q, k, v: dense_attention(q, k, v, return_lse=True)[0],
        products(PIXELS, PIXELS, 2),
        products(PIXELS, PIXELS, 7),
    ),
    "agent": Case(
        lambda q, k, v: agent_attention(q, q[:, :2, :2], k, v),
        2 * products(PIXELS, 4, 2),
        2 * products(PIXELS, 4, 7),
    ),
    "routed": Case(
        lambda q, k, v: routed_attention(q, k, v, lists(), 3, distinct=True),
        products(PIXELS, 18, 2),
        products(PIXELS, 18, 7),
    ),
    "routed with lse": Case(
        lambda q, k, v: routed_attention(q, k, v, lists(), 3, return_lse=True)[0],
        products(PIXELS, 18, 2),
        products(PIXELS, 18, 7),
    ),
    "windows": Case(
        lambda q, k, v: window_attention(q, k, v, (3, 5)),
        products(PIXELS, 15, 2),
        products(PIXELS, 15, 5),
    ),
    "overlapping windows": Case(
        lambda q, k, v: overlapping_window_attention(q, k, v, (3, 5), (1, 0)),
        products(PIXELS, 25, 2),
        products(PIXELS, 25, 5),
    ),
    "grid": Case(
        lambda q, k, v: grid_attention(q, k, v, (3, 5)),
        products(PIXELS, 15, 2),
        products(PIXELS, 15, 5),
    ),
    "neighborhood with lse": Case(
        lambda q, k, v: neighborhood_attention(q, k, v, 3, return_lse=True)[0],
        products(PIXELS, 9, 2),
        products(PIXELS, 9, 5),
    ),
    "linear": Case(linear_attention, products(PIXELS, 8, 2), products(PIXELS, 8, 5)),
}


def qkv(dtype: torch.dtype = torch.float32, grad: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    return [x.requires_grad_(grad) for x in packed_qkv(*SHAPE, dtype=dtype)]


def counted(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_flops_are_the_formula_on_every_path(name: str, backend: str):
    case = CASES[name]
    inputs, leaves = qkv(), qkv(grad=True)
    compiled = torch.compile(case.function, backend="aot_eager")
    with use_backend(backend):
        with torch.no_grad():
            assert counted(lambda: case.function(*inputs)) == case.forward
            assert counted(lambda: case.function(*leaves)) == case.forward
        with torch.inference_mode():
            assert counted(lambda: case.function(*inputs)) == case.forward
        assert counted(lambda: case.function(*leaves)) == case.forward
        training = counted(lambda: case.function(*leaves).sum().backward())
        assert training == case.forward + case.backward
        compiled(*inputs)
        assert counted(lambda: compiled(*inputs)) == case.forward


@pytest.mark.parametrize("name", CASES)
def test_counting_changes_no_numbers(name: str):
    function = CASES[name].function
    outcomes = []
    for counting in (False, True):
        leaves = qkv(torch.float64, grad=True)
        if counting:
            with FlopCounterMode(display=False):
                out = function(*leaves)
                grads = torch.autograd.grad(out.square().sum(), leaves)
        else:
            out = function(*leaves)
            grads = torch.autograd.grad(out.square().sum(), leaves)
        outcomes.append((out, *grads))
    torch.testing.assert_close(outcomes[1], outcomes[0])


@pytest.mark.parametrize("name", CASES)
def test_one_node_in_compiled_programs_and_parts_in_exported_ones(name: str):
    torch.compiler.reset()
    function = CASES[name].function
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(function, fullgraph=True, backend=keep)
    torch.testing.assert_close(compiled(*qkv()), function(*qkv()))
    assert "visionattn" in graphs[0].code

    class Module(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return function(q, k, v)

    program = torch.export.export(Module(), tuple(qkv()))
    torch.testing.assert_close(program.module()(*qkv()), function(*qkv()))
    if hasattr(torch.compiler, "is_exporting"):
        assert "visionattn" not in program.graph_module.code


@pytest.mark.parametrize("name", CASES)
def test_leaves_of_torch_fx(name: str):
    class Module(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return CASES[name].function(q, k, v)

    traced = torch.fx.symbolic_trace(Module())
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert any(getattr(target, "__module__", "").startswith("visionattn.kernels.") for target in called)
    torch.testing.assert_close(traced(*qkv()), Module()(*qkv()))
