"""Dense attention: the PyTorch path against the formula, derivatives, tracing, bad arguments."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from agreement import assert_implementations_agree
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from visionattn.kernels import dense_attention, explain, merge_attention, use_backend
from visionattn.kernels.dense.library import DENSE_ATTENTION
from visionattn.kernels.dense.plain import attention as plain

# Sizes of the map of queries and of that of keys: one pixel, sequences, few of one for many of the other.
SIZES = [
    ((1, 1), (1, 1)),
    ((1, 7), (1, 90)),
    ((9, 8), (2, 3)),
    ((7, 5), (7, 5)),
    ((9, 8), (10, 7)),
    ((1, 3), (2, 2)),
]


def inputs(
    queries: tuple[int, int], keys: tuple[int, int], biased: bool = False, heads: int = 2, dim: int = 6
) -> list[Tensor]:
    """Queries, keys, values, and a bias: strided views of projections, as networks have them."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    q, k, v = random(2, *queries, 3, heads, dim)[:, :, :, 1], *random(2, *keys, 2, heads, dim).unbind(3)
    bias = [random(heads, queries[0] * queries[1], keys[0] * keys[1])] if biased else []
    return [x.requires_grad_() for x in (q, k, v, *bias)]


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_the_formula(sizes, biased, return_lse):
    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None):
        return dense_attention(q, k, v, bias=bias, scale=0.3, return_lse=return_lse)

    assert_implementations_agree(function, [x.detach() for x in inputs(*sizes, biased)])


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("sizes", [((1, 2), (1, 3)), ((2, 3), (1, 2)), ((1, 2), (1, 66))], ids=str)
def test_derivatives(sizes, biased, return_lse):
    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None):
        return dense_attention(q, k, v, bias=bias, return_lse=return_lse)

    leaves = [x[:1] if i < 3 else x for i, x in enumerate(inputs(*sizes, biased, heads=1, dim=2))]
    leaves = [x.detach().requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def operator(*args: object):
    return torch.ops.visionattn.dense_attention(*args, "torch")


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_registered_with_pytorch(biased, return_lse):
    q, k, v, *bias = inputs((3, 4), (2, 3), biased)
    table = bias[0] if biased else None
    torch.library.opcheck(
        torch.ops.visionattn.dense_attention, (q, k, v, table, 0.4, return_lse, "torch")
    )
    grad = torch.ones(1, dtype=q.dtype).expand(q.shape)
    grad_lse = torch.randn(q.shape[:4], dtype=q.dtype) if return_lse else None
    tensors = [None if x is None else x.detach() for x in (q, k, v, table)]
    torch.library.opcheck(
        torch.ops.visionattn.dense_attention_backward,
        (grad, grad_lse, None, None, *tensors, 0.4, return_lse, "torch", [True, True, False, biased]),
    )


@pytest.mark.parametrize("biased", [False, True])
def test_derivatives_of_the_operator(biased):
    leaves = [x.detach().requires_grad_() for x in inputs((1, 3), (2, 2), biased, heads=1, dim=2)]

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None):
        return operator(q, k, v, bias, 0.4, True)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("biased", [False, True])
def test_vmap_of_the_operator(biased):
    samples = [[x.detach() + i for x in inputs((3, 4), (2, 3), biased)] for i in range(2)]
    stacks = [torch.stack(parts) for parts in zip(*samples)]

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None):
        return operator(q, k, v, bias, 0.4, True)

    expected = [function(*sample) for sample in samples]
    torch.testing.assert_close(
        torch.vmap(function)(*stacks), tuple(torch.stack(parts) for parts in zip(*expected))
    )


@pytest.mark.parametrize("counting", [False, True])
def test_transforms_of_torch_func(counting):
    samples = [[x.detach() + i for x in inputs((1, 70), (1, 70))] for i in range(2)]

    def gradient(*tensors: Tensor) -> Tensor:
        loss = lambda q: dense_attention(q, *tensors[1:]).square().sum()  # noqa: E731
        return torch.func.grad(loss)(tensors[0])

    with FlopCounterMode(display=False) if counting else nullcontext():
        together = torch.vmap(gradient)(*(torch.stack(parts) for parts in zip(*samples)))
        torch.testing.assert_close(together, torch.stack([gradient(*sample) for sample in samples]))


def test_one_pass_may_be_taken_twice_and_partly():
    q, k, v = inputs((1, 70), (1, 70))
    assert k.shape[2] > plain._FEW
    loss = dense_attention(q, k.detach(), v).square().sum()
    first = torch.autograd.grad(loss, [q, v], retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, [q, v]), first)


def test_parts_of_the_keys_merge():
    q, k, v = (x.detach() for x in inputs((3, 4), (2, 8)))
    parts = [dense_attention(q, k[:, i : i + 1], v[:, i : i + 1], return_lse=True) for i in range(2)]
    merged, lse = merge_attention(*zip(*parts))
    torch.testing.assert_close((merged, lse), dense_attention(q, k, v, return_lse=True))


def test_compiles_whole_with_dynamic_sizes_and_exports():
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense_attention(q, k, v)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in SIZES[2:5]:
        arguments = inputs(*sizes)
        torch.testing.assert_close(compiled(*arguments), function(*arguments))

    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return dense_attention(q, k, v)

    arguments = tuple(x.detach() for x in inputs((9, 8), (9, 8)))
    program = torch.export.export(Module(), arguments)
    torch.testing.assert_close(program.module()(*arguments), function(*arguments))


def test_explain():
    q, k, v = inputs((2, 2), (3, 3))
    assert str(explain(dense_attention, q, k, v)).startswith("dense_attention: torch (not triton: ")
    with use_backend("cpu"), pytest.raises(ValueError, match="dense_attention cannot run on cpu: it has no"):
        DENSE_ATTENTION(q, k, v, None, 1.0, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 4, 2, 8)}, r"q must be \[B, H, W, heads, head_dim\]"),
        ({"k": torch.zeros(1, 2, 2, 2, 9)}, "k has shape .* batch, heads and head_dim must be the same"),
        ({"v": torch.zeros(1, 2, 3, 2, 8)}, r"v has shape \(1, 2, 3, 2, 8\), k has \(1, 2, 2, 2, 8\)"),
        ({"v": torch.zeros(1, 2, 2, 2, 8).double()}, "v is torch.float64"),
        ({"k": torch.zeros(1, 0, 2, 2, 8)}, "only the batch may be empty"),
        ({"bias": torch.zeros(2, 4, 12)}, r"bias has shape \(2, 4, 12\); needed is \(2, 12, 4\)"),
        ({"bias": torch.zeros(2, 12, 4).long()}, "bias must be of a floating-point dtype"),
        ({"bias": torch.zeros(2, 12, 4, device="meta")}, "bias is on meta"),
    ],
)
def test_refuses(change, message):
    arguments = {name: torch.zeros(1, 2, 2, 2, 8) for name in "kv"}
    with pytest.raises(ValueError, match=message):
        dense_attention(**{"q": torch.zeros(1, 3, 4, 2, 8), **arguments, **change})
