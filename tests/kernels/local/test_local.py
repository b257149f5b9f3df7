"""Windows, shifted windows and overlapping windows: published values, the definition, and agreement."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from agreement import assert_implementations_agree, packed_qkv
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from visionattn.kernels import overlapping_window_attention, use_backend, window_attention
from visionattn.kernels.local.pattern import Pattern, overlapping_axis, window_axis

BACKENDS = ("reference", "torch")
# (height, width), window, shift
WINDOWS = [
    ((8, 8), 4, 0),
    ((9, 7), 4, 0),
    ((9, 7), (4, 3), (1, 2)),
    ((9, 7), 4, 3),
    ((8, 12), 4, 2),
    ((4, 4), 4, 2),
    ((5, 6), 7, 0),
    ((5, 6), 7, 3),
    ((1, 13), (1, 5), (0, 2)),
    ((16, 3), (8, 2), (4, 1)),
    ((3, 5), 1, 0),
    ((1, 1), 3, 1),
]
# (height, width), window, overlap
OVERLAPS = [
    ((8, 8), 4, 2),
    ((9, 7), 4, 1),
    ((10, 11), (4, 3), (1, 2)),
    ((7, 6), 2, 3),
    ((13, 12), 3, 4),
    ((1, 11), (1, 4), (0, 2)),
    ((5, 4), 6, 1),
    ((8, 8), 4, 0),
    ((2, 3), 1, 1),
]
BORDERS = ("zero", "mask", "clamp")


def two(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def fits(size: tuple[int, int], window: Any, overlap: Any, border: str) -> bool:
    return border != "clamp" or all(n >= w + 2 * o for n, w, o in zip(size, two(window), two(overlap)))


OVERLAPPING = [(*case, border) for case in OVERLAPS for border in BORDERS if fits(*case, border)]


def make_bias(kind: str, heads: int, window: Any, overlap: Any = 0, border: str = "mask") -> list[Tensor]:
    window, overlap = two(window), two(overlap)
    if kind == "none":
        return []
    if kind == "dense":
        keys = math.prod(w + 2 * o for w, o in zip(window, overlap))
        return [torch.randn(heads, math.prod(window), keys, dtype=torch.float64)]
    reach = [w - 1 + o * (2 if border == "clamp" else 1) for w, o in zip(window, overlap)]
    return [torch.randn(heads, *(2 * r + 1 for r in reach), dtype=torch.float64)]


# Values that follow from the definitions by hand: q = 0, so that the output is the mean of the visible v


def means(function: Any, length: int, *args: Any, **kwargs: Any) -> list[float]:
    v = torch.arange(length, dtype=torch.float64).view(1, 1, length, 1, 1)
    args = tuple((1, n) for n in args[:1]) + tuple((0, n) for n in args[1:])
    return function(torch.zeros_like(v), torch.zeros_like(v), v, *args, **kwargs).flatten().tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_hand_computed_windows(backend: str):
    with use_backend(backend):
        assert means(window_attention, 8, 4) == [1.5] * 4 + [5.5] * 4
        assert means(window_attention, 10, 4) == [1.5] * 4 + [5.5] * 4 + [8.5] * 2
        assert means(window_attention, 12, 4, shift=(0, 2)) == [0.5] * 2 + [3.5] * 4 + [7.5] * 4 + [10.5] * 2
        torus = means(window_attention, 12, 4, shift=(0, 2), mask_shift=False)
        assert torus == [5.5] * 2 + [3.5] * 4 + [7.5] * 4 + [5.5] * 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("border", "first", "second"), [("zero", 10 / 6, 25 / 6), ("mask", 2, 5), ("clamp", 2.5, 4.5)]
)
def test_hand_computed_halo(backend: str, border: str, first: float, second: float):
    with use_backend(backend):
        result = means(overlapping_window_attention, 8, 4, 1, border=border)
    assert result == pytest.approx([first] * 4 + [second] * 4, abs=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_axes_are_a_product(backend: str):
    y, x = torch.meshgrid(torch.arange(10.0), torch.arange(12.0), indexing="ij")
    v = (10 * y + x).double().view(1, 10, 12, 1, 1)
    zero = torch.zeros_like(v)
    with use_backend(backend):
        windows = window_attention(zero, zero, v, 4, shift=(0, 2))
        halo = overlapping_window_attention(zero, zero, v, (5, 4), 1, border="clamp")
    rows, columns = means(window_attention, 10, 4), means(window_attention, 12, 4, shift=(0, 2))
    expected = 10 * torch.tensor(rows)[:, None] + torch.tensor(columns)
    torch.testing.assert_close(windows.view(10, 12), expected.double())
    rows = means(overlapping_window_attention, 10, 5, 1, border="clamp")
    columns = means(overlapping_window_attention, 12, 4, 1, border="clamp")
    expected = 10 * torch.tensor(rows)[:, None] + torch.tensor(columns)
    torch.testing.assert_close(halo.view(10, 12).float(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_swin_by_roll_and_mask(backend: str):
    """The published form: roll the map, attend in windows, mask pairs that were no neighbours, roll back."""
    height, width, window, shift, heads = 8, 12, 4, 2, 2
    q, k, v = packed_qkv(2, height, width, heads, 5)
    (dense,) = make_bias("dense", heads, window)
    region = torch.zeros(height, width, dtype=torch.int64)
    for i, rows in enumerate((slice(-window), slice(-window, -shift), slice(-shift, None))):
        for j, columns in enumerate((slice(-window), slice(-window, -shift), slice(-shift, None))):
            region[rows, columns] = 3 * i + j

    def partition(x: Tensor) -> Tensor:
        return (
            x.unflatten(2, (-1, window))
            .unflatten(1, (-1, window))
            .transpose(2, 3)
            .flatten(3, 4)
            .flatten(0, 2)
        )

    queries, keys, values = (
        partition(t.roll((-shift, -shift), (1, 2)).flatten(3)).unflatten(-1, (heads, -1)).transpose(1, 2)
        for t in (q, k, v)
    )
    label = partition(region[None, ..., None]).squeeze(-1).repeat(2, 1)
    mask = (label[:, None, :, None] != label[:, None, None, :]) * -1e4
    weights = (queries @ keys.transpose(2, 3) * 5**-0.5 + dense + mask).softmax(-1)
    out = (weights @ values).transpose(1, 2).unflatten(1, (window, window))
    out = out.unflatten(0, (2, height // window, width // window)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    expected = out.roll((shift, shift), (1, 2))
    with use_backend(backend):
        torch.testing.assert_close(window_attention(q, k, v, window, shift=shift, bias=dense), expected)


# The definition, query by query


def definition(
    q: Tensor, k: Tensor, v: Tensor, window: Any, shift: Any, overlap: Any, border: str, bias: Tensor
) -> Tensor:
    """Loops over queries and keys with integer arithmetic only; `bias` is a relative table."""
    (height, width), window, shift, overlap = q.shape[1:3], two(window), two(shift), two(overlap)

    def keys_of(i: int, axis: int) -> list[int]:
        w, o, length = window[axis], overlap[axis], (height, width)[axis]
        first = (i - shift[axis]) // w * w + shift[axis] - o
        if border == "clamp":
            first = min(max(first, 0), length - w - 2 * o)
        span = range(first, first + w + 2 * o)
        return [j for j in span if border == "zero" or 0 <= j < length]

    out = torch.empty_like(v)
    center = [n // 2 for n in bias.shape[1:]]
    for y, x in itertools.product(range(height), range(width)):
        logits, values = [], []
        for j, i in itertools.product(keys_of(y, 0), keys_of(x, 1)):
            inside = 0 <= j < height and 0 <= i < width
            key = k[:, j, i] if inside else torch.zeros_like(k[:, 0, 0])
            values.append(v[:, j, i] if inside else torch.zeros_like(key))
            relative = bias[:, center[0] + j - y, center[1] + i - x]
            logits.append((q[:, y, x] * key).sum(-1) * q.shape[-1] ** -0.5 + relative)
        weights = torch.stack(logits).softmax(0)
        out[:, y, x] = (weights[..., None] * torch.stack(values)).sum(0)
    return out


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    window=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    offset=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    kind=st.sampled_from(["window", *BORDERS]),
)
def test_definition(size: Any, window: Any, offset: Any, kind: str):
    border, overlap, shift = ("mask", (0, 0), offset) if kind == "window" else (kind, offset, (0, 0))
    if not fits(size, window, overlap, border):
        return
    q, k, v = packed_qkv(1, *size, 2, 3)
    (table,) = make_bias("table", 2, window, overlap, border)
    shift = tuple(s % w for s, w in zip(shift, window))
    expected = definition(q, k, v, window, shift, overlap, border, table)
    for backend in BACKENDS:
        with use_backend(backend):
            if kind == "window":
                out = window_attention(q, k, v, window, shift=shift, bias=table)
            else:
                out = overlapping_window_attention(q, k, v, window, overlap, border=kind, bias=table)  # pyright: ignore
        torch.testing.assert_close(out, expected)


# Agreement of the implementations


@pytest.mark.parametrize("bias", ["none", "table", "dense"])
@pytest.mark.parametrize(("size", "window", "shift"), WINDOWS)
@pytest.mark.parametrize("mask_shift", [True, False])
def test_window_attention_agrees(size: Any, window: Any, shift: Any, mask_shift: bool, bias: str):
    heads, dim = 2, 1 + sum(size) % 5

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return window_attention(q, k, v, window, shift=shift, mask_shift=mask_shift, bias=bias)

    assert_implementations_agree(
        function, [*packed_qkv(2, *size, heads, dim), *make_bias(bias, heads, window)]
    )


@pytest.mark.parametrize("bias", ["none", "table", "dense"])
@pytest.mark.parametrize(("size", "window", "overlap", "border"), OVERLAPPING)
def test_overlapping_window_attention_agrees(size: Any, window: Any, overlap: Any, border: Any, bias: str):
    heads, dim = 2, 1 + sum(size) % 5

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return overlapping_window_attention(q, k, v, window, overlap, border=border, bias=bias, scale=0.7)

    inputs = [*packed_qkv(2, *size, heads, dim), *make_bias(bias, heads, window, overlap, border)]
    assert_implementations_agree(function, inputs)


@pytest.mark.parametrize("dim", [1, 2, 3, 24, 30, 60, 256])
def test_every_head_dim(dim: int):
    inputs = [*packed_qkv(1, 6, 5, 2, dim), *make_bias("table", 2, 4)]
    assert_implementations_agree(lambda q, k, v, b: window_attention(q, k, v, 4, shift=1, bias=b), inputs)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("heads", [1, 3])
def test_batch_and_heads(batch: int, heads: int):
    inputs = [*packed_qkv(batch, 6, 5, heads, 4), *make_bias("table", heads, 4)]
    assert_implementations_agree(lambda q, k, v, b: window_attention(q, k, v, 4, shift=1, bias=b), inputs)
    inputs = [*packed_qkv(batch, 6, 7, heads, 4), *make_bias("dense", heads, 2, 2)]
    for border in BORDERS:
        assert_implementations_agree(
            lambda q, k, v, b, border=border: overlapping_window_attention(
                q, k, v, 2, 2, border=border, bias=b
            ),
            inputs,
        )


def stored_bytes(window: int, shift: int, dim: int, dtype: torch.dtype) -> int:
    """What a call keeps for its gradient beyond its arguments, in bytes."""
    qkv = [x.detach().requires_grad_() for x in packed_qkv(1, 16, 18, 2, dim, dtype)]
    arguments = {qkv[0].untyped_storage().data_ptr()}
    stored: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        stored[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        window_attention(*qkv, window, shift=shift)
    return sum(size for place, size in stored.items() if place not in arguments)


def test_training_keeps_the_weights_of_small_windows_only():
    # Along the 16 pixels five windows of 3 and one of a single pixel, along the 18 six of 3.
    assert stored_bytes(3, 0, 8, torch.float32) == (5 * 3**2 + 1) * (6 * 3**2) * 2 * 4
    assert 0 < stored_bytes(3, 1, 8, torch.float32) < stored_bytes(3, 0, 8, torch.float32)
    assert stored_bytes(6, 0, 8, torch.float32) == 0
    assert stored_bytes(3, 0, 8, torch.bfloat16) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_memory_layout(backend: str):
    q, k, v = packed_qkv(2, 6, 5, 2, 4)
    strided = [t.permute(3, 1, 0, 4, 2).contiguous().permute(2, 1, 4, 0, 3) for t in (q, k, v)]
    expanded = [t[:1].expand(2, -1, -1, -1, -1) for t in (q, k, v)]
    with use_backend(backend):
        for views in (strided, expanded):
            dense = [t.clone(memory_format=torch.contiguous_format) for t in views]
            expected = window_attention(*dense, 4, shift=2)
            torch.testing.assert_close(window_attention(*views, 4, shift=2), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("border", BORDERS)
def test_second_derivatives(backend: str, border: Any):
    inputs = [*packed_qkv(1, 4, 3, 1, 2), *make_bias("table", 1, 2, (0, 0), border)]
    leaves = [x.detach().requires_grad_() for x in inputs]
    with use_backend(backend):

        def shifted(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
            return window_attention(q, k, v, 2, shift=1, bias=b)

        def overlapping(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return overlapping_window_attention(q, k, v, 1, 1, border=border)

        assert torch.autograd.gradcheck(shifted, leaves)
        assert torch.autograd.gradgradcheck(shifted, leaves)
        assert torch.autograd.gradcheck(overlapping, leaves[:3])
        assert torch.autograd.gradgradcheck(overlapping, leaves[:3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("training", [False, True])
def test_lower_precision(dtype: torch.dtype, training: bool):
    exact = packed_qkv(2, 16, 16, 2, 32)
    (table,) = make_bias("table", 2, 8)
    rounded = [t.to(dtype) for t in exact]
    expected = window_attention(*(t.double() for t in rounded), 8, shift=4, bias=table)
    out = window_attention(*(t.requires_grad_(training) for t in rounded), 8, shift=4, bias=table.to(dtype))
    assert out.dtype == dtype
    unit = {torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float32: 3e-6}[dtype]
    assert (out.double() - expected).norm() <= unit * expected.norm()


# PyTorch's transformations


class Local(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        shifted = window_attention(q, k, v, 4, shift=2, bias=table)
        return shifted + overlapping_window_attention(q, k, v, 4, 1, border="zero")


def local_inputs(batch: int, height: int, width: int) -> list[Tensor]:
    return [*packed_qkv(batch, height, width, 2, 3), *make_bias("table", 2, 4)]


@pytest.mark.slow  # half a minute each: sizes as symbols make for long expressions
@pytest.mark.parametrize("border", [None, *BORDERS])
def test_compile_with_dynamic_shapes(border: Any):
    torch.compiler.reset()
    (table,) = make_bias("table", 2, 4)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if border is None:
            return window_attention(q, k, v, 4, shift=2, bias=table)
        return overlapping_window_attention(q, k, v, 4, 1, border=border)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.inference_mode():
        for shape in ((2, 9, 10), (3, 14, 13)):
            inputs = packed_qkv(*shape, 2, 3)
            torch.testing.assert_close(compiled(*inputs), function(*inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_gradients(backend: str):
    torch.compiler.reset()
    net, inputs = Local(), [x.clone().requires_grad_() for x in local_inputs(2, 6, 9)]
    with use_backend(backend):
        out = torch.compile(net, fullgraph=True, backend="aot_eager")(*inputs)
        expected = net(*inputs)
    torch.testing.assert_close(out, expected)
    gradients = torch.autograd.grad(out.square().sum(), inputs)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_export(backend: str):
    inputs = local_inputs(2, 9, 10)
    batch = {0: torch.export.Dim("batch", min=1)}
    with use_backend(backend):
        program = torch.export.export(Local(), tuple(inputs), dynamic_shapes=(batch, batch, batch, None))
    for example in (inputs, local_inputs(3, 9, 10)):
        torch.testing.assert_close(program.module()(*example), Local()(*example))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap(backend: str):
    stacked = [torch.stack(x) for x in zip(*(local_inputs(1, 6, 7) for _ in range(3)))]
    net = Local()

    def gradient(*inputs: Tensor) -> Tensor:
        return torch.func.grad(lambda q: net(q, *inputs[1:]).square().sum())(inputs[0])

    with use_backend(backend):
        for function in (net, gradient):
            expected = torch.stack([function(*inputs) for inputs in zip(*stacked)])
            torch.testing.assert_close(torch.func.vmap(function)(*stacked), expected)


# The geometry


@pytest.mark.parametrize(("size", "window", "shift"), WINDOWS)
def test_flops_of_windows(size: Any, window: Any, shift: Any):
    window, shift = two(window), two(shift)
    axes = [window_axis(n, w, s % w) for n, w, s in zip(size, window, shift)]
    q, k, v = (t.requires_grad_() for t in packed_qkv(1, *size, 2, 3))
    with FlopCounterMode(display=False) as counter:
        window_attention(q, k, v, window, shift=shift)
    assert counter.get_total_flops() == Pattern(*axes).flops(heads=2, head_dim=3)


@pytest.mark.parametrize(("size", "window", "overlap", "border"), OVERLAPPING)
def test_flops_of_overlapping_windows(size: Any, window: Any, overlap: Any, border: Any):
    axes = [overlapping_axis(n, w, o, border) for n, w, o in zip(size, two(window), two(overlap))]
    q, k, v = (t.requires_grad_() for t in packed_qkv(1, *size, 2, 3))
    with FlopCounterMode(display=False) as counter:
        overlapping_window_attention(q, k, v, window, overlap, border=border)
    exact = Pattern(*axes).flops(heads=2, head_dim=3)
    # Windows of fewer than 4 queries a side are computed several at a time, under a mask.
    joined = min(two(window)) < 4 and max(two(overlap)) > 0
    assert counter.get_total_flops() >= exact if joined else counter.get_total_flops() == exact


# Errors

Q, K, V = packed_qkv(1, 6, 5, 2, 4)
BAD_WINDOWS: list[tuple[str, list[Any], dict[str, Any]]] = [
    (r"q must be \[B, H, W, heads, head_dim\]", [Q[0], K, V, 4], {}),
    (r"k has shape", [Q, K[:, :5], V, 4], {}),
    (r"v is torch.float32", [Q, K, V.float(), 4], {}),
    (r"floating-point", [Q.long(), K.long(), V.long(), 4], {}),
    (r"head_dim 300 is above 256", [torch.ones(1, 2, 2, 1, 300)] * 3 + [2], {}),
    (r"only the batch may be empty", [Q[:, :0], K[:, :0], V[:, :0], 4], {}),
    (r"only the batch may be empty", [Q[..., :0], K[..., :0], V[..., :0], 4], {}),
    (r"window_size must be", [Q, K, V, 0], {}),
    (r"window_size must be", [Q, K, V, (4, 4, 4)], {}),
    (r"window_size must be", [Q, K, V, 2.0], {}),
    (r"window_size must be", [Q, K, V, None], {}),
    (r"window_size must be", [Q, K, V, "44"], {}),
    (r"shift must be", [Q, K, V, 4], {"shift": -1}),
    (r"bias has shape \(2, 3, 3\); needed is", [Q, K, V, 4], {"bias": torch.zeros(2, 3, 3)}),
    (r"bias has shape", [Q, K, V, 4], {"bias": torch.zeros(1, 7, 7)}),
    (r"bias must be of a floating", [Q, K, V, 4], {"bias": torch.zeros(2, 7, 7, dtype=torch.int64)}),
    (r"bias is on meta", [Q, K, V, 4], {"bias": torch.zeros(2, 7, 7, device="meta")}),
]
BAD_OVERLAPS: list[tuple[str, list[Any], dict[str, Any]]] = [
    (r"overlap must be", [Q, K, V, 4, -1], {}),
    (r"window_size must be", [Q, K, V, 0, 1], {}),
    (r"border='wrap' is unknown; choose one of zero, mask, clamp", [Q, K, V, 4, 1], {"border": "wrap"}),
    (r"a width of at least window \+ 2 \* overlap = 6, got 5", [Q, K, V, 4, 1], {"border": "clamp"}),
    (r"bias has shape", [Q, K, V, 4, 1], {"bias": torch.zeros(2, 7, 7)}),
]


@pytest.mark.parametrize(("message", "args", "kwargs"), BAD_WINDOWS)
def test_bad_arguments_of_window_attention(message: str, args: list[Any], kwargs: dict[str, Any]):
    with pytest.raises(ValueError, match=message) as caught:
        window_attention(*args, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("message", "args", "kwargs"), BAD_OVERLAPS)
def test_bad_arguments_of_overlapping_window_attention(message: str, args: list[Any], kwargs: dict[str, Any]):
    with pytest.raises(ValueError, match=message) as caught:
        overlapping_window_attention(*args, **kwargs)
    assert "\n" not in str(caught.value)
