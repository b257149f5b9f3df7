"""The fused routed attention in Triton's interpreter; `test_routed_triton.py` runs this file."""

from __future__ import annotations

import itertools

import pytest
import torch
from list_cases import CASES, inputs_of
from test_routed_attention import SHAPES, make
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from visionattn.kernels import explain, routed_attention, use_backend
from visionattn.kernels.routed.fused.backward import reverse_lists

# Two tiles of queries and of keys, a head that is no power of two, on a map that cuts its regions.
LARGE = (10, 10, (9, 9), 1, 40, 2)
# More columns than the widest tile of the gradient of a bias.
WIDE = (2, 40, (2, 20), 1, 4, 1)
SINGLE_PIXELS = (2, 3, (1, 1), 2, 3, 6)


def energy_and_gradients(
    backend: str, qkv: list[Tensor], indices: Tensor, region: tuple[int, int], bias: Tensor | None = None
) -> list[Tensor]:
    """Output, log-sum-exp and the gradients of a weighted sum of both (absent where a list is empty)."""
    generator = torch.Generator().manual_seed(1)
    with use_backend(backend):
        out, lse = routed_attention(*qkv, indices, region, bias=bias, return_lse=True)
    lse = lse.masked_fill(lse == float("-inf"), 0)
    weights = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (out, lse)]
    inputs = qkv if bias is None else [*qkv, bias]
    return [out, lse, *torch.autograd.grad((out, lse), inputs, weights)]


@pytest.mark.parametrize(
    ("shape", "lists", "bias", "dtype"),
    [
        (SHAPES[0], "padded", "none", torch.float32),
        (SINGLE_PIXELS, "whole", "none", torch.float32),
        (SINGLE_PIXELS, "padded", "table", torch.float32),
        (SHAPES[3], "whole", "none", torch.float32),
        (SHAPES[4], "padded", "table", torch.float32),
        (SHAPES[4], "padded", "dense", torch.float32),
        (LARGE, "padded", "none", torch.float32),
        (WIDE, "whole", "table", torch.float32),
        (SHAPES[1], "whole", "none", torch.float16),
        (SHAPES[4], "whole", "table", torch.float16),
    ],
    ids=str,
)
def test_equals_the_formula(
    shape: tuple, lists: str, bias: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwritten(*args, **kwargs) -> Tensor:
        x = zeros(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    zeros = torch.zeros
    qkv, indices, table = make(shape, lists, bias, dtype)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    exact_table = None if table is None else table.detach().double().requires_grad_()
    expected = energy_and_gradients("reference", exact, indices, shape[2], exact_table)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", unwritten)
        result = energy_and_gradients("triton", qkv, indices, shape[2], table)
    for ours, theirs in zip(result, expected):
        assert (ours.double() - theirs).norm() <= (1e-6 if dtype == torch.float32 else 1e-3) * theirs.norm()


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_list(name: str) -> None:
    inputs, arguments = inputs_of(CASES[name], torch.float32)

    def outcome(backend: str, inputs: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        bias = leaves[3] if len(leaves) > 3 else None
        with use_backend(backend):
            out, lse = routed_attention(*leaves[:3], bias=bias, return_lse=True, **arguments)
        lse = lse.masked_fill(lse == float("-inf"), 0)
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (out, lse)]
        return [out, lse, *torch.autograd.grad((out, lse), leaves, weights)]

    expected = outcome("reference", [x.double() for x in inputs])
    for ours, theirs in zip(outcome("triton", inputs), expected):
        assert (ours.double() - theirs).norm() <= 1e-6 * theirs.norm()


def test_reverse_lists_name_every_query_once_and_in_order() -> None:
    _, indices, _ = make(SHAPES[0], "padded")
    starts, queries = reverse_lists(indices, indices.shape[2])
    for i, j in itertools.product(*map(range, indices.shape[:2])):
        for region in range(indices.shape[2]):
            listing = queries[i, j, starts[i, j, region] : starts[i, j, region + 1]].tolist()
            assert listing == [n for n, row in enumerate(indices[i, j].tolist()) if region in row]


def test_registered_with_pytorch() -> None:
    qkv, indices, _ = make((3, 4, (2, 2), 1, 4, 2), "whole", dtype=torch.float32)
    numbers = ([2, 2], [2, 2], 0.5, True, True, "triton")
    torch.library.opcheck(
        torch.ops.visionattn.routed_attention.default, (*qkv, indices, None, None, *numbers)
    )
    contiguous = [x.detach().contiguous().requires_grad_() for x in qkv]
    _, _, table = make((3, 4, (2, 2), 1, 4, 2), "whole", "table", torch.float32)
    arguments = (*contiguous, indices, None, table, *numbers)
    torch.library.opcheck(torch.ops.visionattn.routed_attention.default, arguments)


@pytest.mark.parametrize("bias", ["none", "table"])
def test_second_derivatives_are_those_of_the_pytorch_path(bias: str) -> None:
    qkv, indices, table = make((3, 4, (2, 2), 1, 4, 2), "whole", bias, torch.float32)
    inputs = qkv if table is None else [*qkv, table]

    def second(backend: str) -> tuple[Tensor, ...]:
        with use_backend(backend):
            out = routed_attention(*qkv, indices, 2, bias=table, distinct=True)
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), inputs)

    for ours, theirs in zip(second("triton"), second("torch")):
        assert (ours - theirs).norm() <= 5e-6 * theirs.norm()


@pytest.mark.parametrize("bias", ["none", "dense"])
def test_vmap_equals_a_loop(bias: str) -> None:
    # PyTorch has no torch.func.grad through custom operators; autograd around vmap it has.
    qkv, indices, table = make((3, 4, (2, 2), 1, 4, 2), "whole", bias, torch.float32)
    stacks = [torch.stack([x.detach(), 2 * x.detach()], 1).requires_grad_() for x in qkv]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return routed_attention(q, k, v, indices, (2, 2), bias=table, distinct=True)

    with use_backend("triton"):
        together = torch.func.vmap(attention, 1, 1)(*stacks)
        alone = torch.stack([attention(*(x[:, i] for x in stacks)) for i in range(2)], 1)
    grad = torch.randn_like(alone)
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(
        torch.autograd.grad(together, stacks, grad), torch.autograd.grad(alone, stacks, grad)
    )


@pytest.mark.parametrize("repeated", [False, True])
def test_compiles_whole_and_counts_a_repetition_once(repeated: bool) -> None:
    qkv, indices, _ = make((3, 4, (2, 2), 1, 4, 2), "whole", dtype=torch.float32)
    listed = indices.clone()
    if repeated:
        listed[..., 1] = listed[..., 0]
    expected = routed_attention(*qkv, indices[..., :1] if repeated else indices, 2)
    compiled = torch.compile(routed_attention, fullgraph=True, backend="aot_eager")
    with use_backend("triton"):
        torch.testing.assert_close(compiled(*qkv, listed, 2), expected)


def test_flops_are_counted() -> None:
    qkv, indices, _ = make((4, 4, (2, 2), 3, 8, 2), "whole", dtype=torch.float32)
    with FlopCounterMode(display=False) as counter, use_backend("triton"):
        routed_attention(*qkv, indices, 2, distinct=True).sum().backward()
    pairs = 2 * 3 * 16 * 2 * 4
    assert counter.get_total_flops() == 2 * (2 + 7) * pairs * 8


def test_refusals_say_why() -> None:
    qkv, indices, table = make(SHAPES[0], "whole", "table", torch.float32)
    assert explain(routed_attention, *qkv, indices, (2, 3), bias=table).backend == "triton"
    double = [x.double() for x in qkv]
    with use_backend("triton"), pytest.raises(ValueError, match="not in torch"):
        routed_attention(*double, indices, (2, 3))
