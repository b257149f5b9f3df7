"""Routed attention in plain PyTorch against the formula: values, derivatives, transforms, memory, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from visionattn.kernels import explain, routed_attention, use_backend
from visionattn.kernels.routed.plain import rows as pytorch

# height, width, region, heads, head_dim, topk: one region, regions of one pixel, all regions, cut borders.
SHAPES = [
    (6, 9, (2, 3), 3, 4, 2),
    (7, 5, (3, 2), 1, 5, 3),
    (4, 4, (1, 1), 2, 3, 9),
    (3, 3, (3, 3), 2, 8, 1),
    (5, 1, (2, 1), 1, 4, 3),
    (8, 8, (4, 4), 2, 24, 4),
]
BIASES = ["none", "table", "dense"]


def make(
    shape: tuple, lists: str = "whole", bias: str = "none", dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """q, k, v, index lists (`"whole"`: without padding, one per region; `"padded"`: one per head, one list
    empty) and bias."""
    height, width, region, heads, dim, topk = shape
    generator = torch.Generator().manual_seed(0)
    regions = -(-height // region[0]) * -(-width // region[1])
    qkv = torch.randn(2, height, width, 3, heads, dim, generator=generator, dtype=dtype).requires_grad_()
    list_heads = 1 if lists == "whole" else heads
    indices = torch.rand(2, list_heads, regions, regions, generator=generator).argsort(-1)[..., :topk].int()
    if lists == "padded":
        indices[torch.rand(indices.shape, generator=generator) < 0.3] = -1
        indices[0, 0, 0] = -1
    sides = {"table": (2 * height - 1, 2 * width - 1), "dense": (height * width, height * width)}
    table = None
    if bias != "none":
        table = torch.randn(heads, *sides[bias], generator=generator, dtype=dtype).requires_grad_()
    return list(qkv.unbind(3)), indices, table


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One or a few lists at a time, so that small maps take many chunks."""
    monkeypatch.setattr(pytorch, "CPU_CHUNK", 100)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("lists", ["whole", "padded"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(shape: tuple, lists: str, bias: str) -> None:
    qkv, indices, table = make(shape, lists, bias)
    inputs = [*qkv] if table is None else [*qkv, table]
    kwargs: dict[str, Any] = {"bias": table, "scale": 0.3, "distinct": lists == "whole"}
    with use_backend("reference"):
        expected, expected_lse = routed_attention(*qkv, indices, shape[2], return_lse=True, **kwargs)
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, inputs, grad, retain_graph=True)
    with use_backend("torch"):
        out = routed_attention(*qkv, indices, shape[2], **kwargs)
        with_lse, lse = routed_attention(*qkv, indices, shape[2], return_lse=True, **kwargs)
        with torch.no_grad():
            inference = routed_attention(*qkv, indices, shape[2], **kwargs)
    torch.testing.assert_close(lse, expected_lse)
    torch.testing.assert_close(inference, expected)
    for result in (out, with_lse):
        torch.testing.assert_close(result, expected)
        assert result.is_contiguous()
        torch.testing.assert_close(torch.autograd.grad(result, inputs, grad), expected_grads)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("lists", ["whole", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precisions(dtype: torch.dtype, lists: str) -> None:
    qkv, indices, _ = make(SHAPES[0], lists)
    low = [x.detach().to(dtype).requires_grad_() for x in qkv]
    exact = [x.detach().double().requires_grad_() for x in low]
    expected = routed_attention(*exact, indices, SHAPES[0][2])
    out = routed_attention(*low, indices, SHAPES[0][2])
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, low, grad)
    expected_grads = torch.autograd.grad(expected, exact, grad.double())
    assert out.dtype == dtype
    bound = {torch.float32: 1e-6, torch.bfloat16: 7e-3, torch.float16: 1e-3}[dtype]
    for ours, theirs in zip((out, *grads), (expected, *expected_grads)):
        assert (ours.double() - theirs).norm() <= bound * theirs.norm()


@pytest.mark.parametrize("lists", ["whole", "padded"])
def test_first_and_second_derivatives(lists: str) -> None:
    qkv, indices, table = make((3, 4, (2, 2), 1, 2, 1), lists, "table")

    def attention(*x: Tensor) -> Tensor:
        return routed_attention(*x[:3], indices, (2, 2), bias=x[3], distinct=lists == "whole")

    assert torch.autograd.gradcheck(attention, (*qkv, table))
    assert torch.autograd.gradgradcheck(attention, (*qkv, table))


def test_vmap_equals_a_loop() -> None:
    qkv, indices, _ = make(SHAPES[0])
    stacks = [torch.stack([x.detach(), 2 * x.detach()], 1) for x in qkv]

    def energy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return routed_attention(q, k, v, indices, SHAPES[0][2], distinct=True).square().sum()

    gradient = torch.func.grad(energy, (0, 1, 2))
    together = torch.func.vmap(gradient, 1)(*stacks)
    for i in range(2):
        alone = gradient(*(x[:, i] for x in stacks))
        torch.testing.assert_close([x[i] for x in together], list(alone))


@pytest.mark.parametrize("lists", ["whole", "padded"])
def test_compiles_and_exports_whole(lists: str) -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> Tensor:
            return routed_attention(q, k, v, indices, (2, 3), distinct=lists == "whole")

    qkv, indices, _ = make(SHAPES[0], lists)
    expected = Attention()(*qkv, indices)
    compiled = torch.compile(Attention(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*qkv, indices), expected)
    inputs = (*(x.detach() for x in qkv), indices)
    torch.testing.assert_close(torch.export.export(Attention(), inputs).module()(*inputs), expected.detach())


def test_training_keeps_its_arguments_only() -> None:
    qkv, indices, _ = make((8, 8, (2, 2), 2, 4, 8))
    stored: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        stored[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        routed_attention(*qkv, indices, 2, distinct=True)
    assert sum(stored.values()) == qkv[0].untyped_storage().nbytes() + indices.untyped_storage().nbytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": torch.zeros(2, 1, 9, 2, dtype=torch.int32)}, "names the same one twice"),
        ({"indices": torch.full((2, 1, 9, 1), 9)}, "must lie in -1"),
        ({"indices": torch.zeros(2, 1, 8, 2, dtype=torch.int32)}, "the queries have 9 regions"),
        ({"indices": torch.zeros(2, 1, 9, 2)}, "must be int32 or int64"),
        ({"bias": torch.zeros(3, 5, 5)}, "bias has shape"),
        ({"region_size": 0}, "region_size must be"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    qkv, indices, _ = make(SHAPES[0])
    with pytest.raises(ValueError, match=message):
        routed_attention(*qkv, **{"indices": indices, "region_size": (2, 3), **change})


def test_explain_names_the_backend() -> None:
    qkv, indices, _ = make(SHAPES[0])
    assert explain(routed_attention, *qkv, indices, (2, 3)).backend == "torch"
