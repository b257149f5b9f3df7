"""Partitions by content, and attention inside their parts: definitions written out, gradients, precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import packed_qkv
from torch import Tensor

from visionattn.kernels import (
    Blocks,
    Clusters,
    cluster_attention,
    dense_attention,
    kmeans_blocks,
    lsh_attention,
    lsh_codes,
    region_blocks,
    sort_blocks,
)

HEADS, DIM = 2, 4
SIZES = [(5, 6), (1, 13), (1, 1)]


def by_head(x: Tensor) -> Tensor:
    return x.flatten(1, 2).transpose(1, 2)


def maps(height: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(height + width)
    return packed_qkv(2, height, width, HEADS, DIM, dtype)


def lloyd(x: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """k-means of rows `[N, d]` by loops; labels of the last assignment and centroids."""
    for _ in range(iterations):
        labels = torch.tensor([int((centroids - row).square().sum(1).argmin()) for row in x])
        moved = torch.stack(
            [x[labels == i].mean(0) if (labels == i).any() else c for i, c in enumerate(centroids)]
        )
        if (moved - centroids).norm(dim=1).max() < 1e-4:
            break
        centroids = moved
    return labels, centroids


def test_kmeans_is_its_formula() -> None:
    x, _, _ = maps(5, 6)
    init = torch.tensor([[0, 7, 9, 9], [3, 4, 28, 29]])  # two equal ones: the second stays empty
    for iterations in (1, 3, 40):
        # One image, for the heads of an image stop together.
        found = kmeans_blocks(x[:1], 4, iterations, init)
        for head in range(HEADS):
            rows = by_head(x)[0, head]
            labels, centroids = lloyd(rows, rows[init[head]], iterations)
            assert torch.equal(found.labels[0, head].long(), labels)
            torch.testing.assert_close(found.centroids[0, head], centroids, rtol=0, atol=1e-4)
            assert torch.equal(found.counts[0, head].long(), labels.bincount(minlength=4))
    alike = kmeans_blocks(x[:1], 4, 1, init)
    assert alike.counts[0, 0, 3] == 0
    assert torch.equal(alike.centroids[0, 0, 3], by_head(x)[0, 0, 9])


def test_images_are_clustered_apart_and_earlier_centroids_go_on() -> None:
    x, _, _ = maps(5, 6)
    both = kmeans_blocks(x, 3, 20)
    for i in range(2):
        alone = kmeans_blocks(x[i : i + 1], 3, 20)
        for a, b in zip(both, alone):
            torch.testing.assert_close(a[i : i + 1], b)
    first = kmeans_blocks(x, 3, 2)
    second = kmeans_blocks(x, 3, 18, first.centroids)
    torch.testing.assert_close(second.centroids, both.centroids, rtol=0, atol=1e-3)
    assert torch.equal(second.labels, both.labels)


def test_codes_are_sides_of_directions() -> None:
    x, _, _ = maps(3, 4)
    directions = torch.randn(DIM, 3, dtype=torch.float64)
    codes = lsh_codes(x, directions)
    for row, code in zip(by_head(x).flatten(0, 2), codes.flatten().tolist()):
        plain = sum(int(row @ directions[:, r] > 0) << r for r in range(3))
        assert code == plain ^ plain >> 1


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("mask_own", [True, False])
def test_lsh_attention_is_its_formula(height: int, width: int, mask_own: bool) -> None:
    q, k, v = maps(height, width)
    pixels, block = height * width, 4
    directions = torch.randn(DIM, 5, dtype=torch.float64)
    # Drawn twice, and in any order.
    samples = torch.randint(pixels, (2, HEADS, 7))
    samples[..., -1] = samples[..., 0]
    ranks = [lsh_codes(x, directions).argsort(dim=-1, stable=True).argsort(-1) // block for x in (q, k)]
    logits = by_head(q) @ by_head(k).transpose(2, 3) * DIM**-0.5
    near = logits.masked_fill(ranks[0][..., None] != ranks[1][:, :, None], -math.inf)
    drawn = logits.gather(3, samples[:, :, None].expand(-1, -1, pixels, -1)) + math.log(pixels / 7)
    if mask_own:
        hidden = ranks[0][..., None] == ranks[1].gather(2, samples)[:, :, None]
        drawn = drawn.masked_fill(hidden, -math.inf)
    values = torch.cat((by_head(v), by_head(v).gather(2, samples[..., None].expand(-1, -1, -1, DIM))), 2)
    expected = (
        (torch.cat((near, drawn), 3).softmax(-1) @ values).transpose(1, 2).unflatten(1, (height, width))
    )
    out = lsh_attention(q, k, v, directions, block=block, samples=samples, mask_own=mask_own)
    torch.testing.assert_close(out, expected)


def test_blocks_of_everything_are_full_attention() -> None:
    q, k, v = maps(5, 6)
    directions = torch.randn(DIM, 5)
    full = dense_attention(q, k, v)
    torch.testing.assert_close(lsh_attention(q, k, v, directions, block=30, samples=0), full)
    # All samples lie in the own block and are left out.
    torch.testing.assert_close(lsh_attention(q, k, v, directions, block=64, samples=9), full)
    one = torch.randn(HEADS, 1, DIM)
    torch.testing.assert_close(cluster_attention(q, k, v, one, 99, 99), full / (1 + 1e-5))


def routed_by_loops(q: Tensor, k: Tensor, v: Tensor, centroids: Tensor, queries: int, keys: int) -> Tensor:
    out = torch.zeros_like(q).flatten(1, 2)
    for image in range(len(q)):
        for head in range(HEADS):
            a, b, c = (by_head(x)[image, head] for x in (q, k, v))
            total, count = torch.zeros_like(a), torch.zeros(len(a), 1, dtype=a.dtype)
            for centroid in centroids[head]:
                rows = (F.normalize(a, dim=1) @ centroid).argsort(descending=True)[:queries]
                others = (F.normalize(b, dim=1) @ centroid).argsort(descending=True)[:keys]
                weights = (a[rows] @ b[others].T * DIM**-0.5).softmax(-1)
                total = total.index_add(0, rows, weights @ c[others])
                count = count.index_add(0, rows, torch.ones_like(count[: len(rows)]))
            out[image, :, head] = total / (count + 1e-5)
    return out.view_as(q)


def test_cluster_attention_and_its_gradients_are_the_formula() -> None:
    centroids = torch.randn(HEADS, 3, DIM, dtype=torch.float64)
    for size in ((5, 6), (1, 13)):
        inputs = [x.detach().requires_grad_() for x in maps(*size)]
        out = cluster_attention(*inputs, centroids, 6, 4)
        expected = routed_by_loops(*inputs, centroids, 6, 4)
        torch.testing.assert_close(out, expected)
        assert out.is_contiguous()
        assert (out == 0).all(-1).any(), "some pixels are in no cluster"
        weights = torch.randn_like(out)
        grads = [torch.autograd.grad((x * weights).sum(), inputs) for x in (out, expected)]
        torch.testing.assert_close(*grads)
    assert torch.autograd.gradcheck(lambda q: cluster_attention(q, *inputs[1:], centroids, 6, 4), inputs[0])


def test_lsh_attention_has_gradients() -> None:
    inputs = [x.detach().requires_grad_() for x in maps(3, 3)]
    directions, samples = torch.randn(DIM, 4), torch.randint(9, (1, 1, 5))
    attend = partial(lsh_attention, directions=directions, block=4, samples=samples)
    assert torch.autograd.gradcheck(attend, inputs)


def test_regions_are_a_partition() -> None:
    blocks = region_blocks(5, 7, (2, 3))
    assert blocks.starts[0, 0].tolist() == [0, 6, 12, 14, 20, 26, 28, 31, 34, 35]
    assert blocks.order[0, 0, 12:14].tolist() == [6, 13]
    assert isinstance(blocks, Blocks)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "kmeans": lambda q, k, v: kmeans_blocks(q, 3, 4),
    "codes": lambda q, k, v: lsh_codes(q, torch.linspace(-1, 1, DIM * 5).view(DIM, 5)),
}
ATTENTIONS: dict[str, Callable[..., Tensor]] = {
    "lsh": lambda q, k, v: lsh_attention(
        q, k, v, torch.linspace(-1, 1, DIM * 5).view(DIM, 5), block=8, samples=torch.arange(6)[None, None]
    ),
    "cluster": lambda q, k, v: cluster_attention(
        q, k, v, torch.eye(DIM)[None, :3].expand(HEADS, -1, -1), 8, 8
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_choices_are_float32_detached_and_do_not_vary(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (x.requires_grad_() for x in maps(5, 6, dtype))
        expected = FUNCTIONS[name](q.float(), k.float(), v.float())
        with torch.autocast("cpu", torch.bfloat16):
            found = FUNCTIONS[name](q, k, v)
        for a, b in zip(*((x if isinstance(x, Clusters) else (x,)) for x in (found, expected))):
            assert torch.equal(a, b)
            assert not a.requires_grad
        again = FUNCTIONS[name](q, k, v)
        torch.testing.assert_close(again, found, rtol=0, atol=0)


@pytest.mark.parametrize("name", [*FUNCTIONS, *ATTENTIONS])
def test_compiles_whole(name: str) -> None:
    q, k, v = maps(5, 6, torch.float32)
    function = {**FUNCTIONS, **ATTENTIONS}[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), function(q, k, v))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_runs_under_autocast_and_on_an_empty_batch(name: str) -> None:
    q, k, v = maps(5, 6, torch.float32)
    expected = ATTENTIONS[name](q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ATTENTIONS[name](q, k, v).float(), expected, rtol=0.05, atol=0.05)
    half = ATTENTIONS[name](*(x.bfloat16() for x in (q, k, v)))
    assert half.dtype == torch.bfloat16
    assert ATTENTIONS[name](q[:0], k[:0], v[:0]).shape == (0, *q.shape[1:])


X, Y = torch.zeros(1, 4, 4, 2, 4), torch.zeros(4, 5)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: kmeans_blocks(X[0], 2, 1), r"x must be \[B, H, W, heads, d\]"),
        (lambda: kmeans_blocks(X.long(), 2, 1), "floating-point"),
        (lambda: kmeans_blocks(X, 0, 1), "clusters must be at least 1"),
        (lambda: kmeans_blocks(X, 17, 1), "at most the 16 pixels"),
        (lambda: kmeans_blocks(X, 2, 0), "iterations must be at least 1"),
        (lambda: kmeans_blocks(X, 2, 1, torch.zeros(2, 3)), "init must be pixel numbers"),
        (lambda: kmeans_blocks(X, 2, 1, torch.tensor([[0, 16], [0, 1]])), "name pixels 0 .. 15"),
        (lambda: lsh_codes(X, Y.T), r"directions \[d, n\]"),
        (lambda: lsh_codes(X, torch.zeros(4, 31)), "must be 1 to 30"),
        (lambda: lsh_attention(X, X, X, Y, block=0), "block must be at least 1"),
        (lambda: lsh_attention(X, X, X, Y, samples=-1), "samples must be at least 0"),
        (lambda: lsh_attention(X, X, X, Y, samples=torch.zeros(3).long()), "samples must be a number or"),
        (lambda: cluster_attention(X, X, X, torch.zeros(3, 2, 4), 1, 1), "centroids must be"),
        (lambda: cluster_attention(X, X, X, torch.zeros(2, 2, 4), 0, 1), "queries must be at least 1"),
        (lambda: cluster_attention(X, X, X, torch.zeros(2, 2, 4), 1, 0), "keys must be at least 1"),
        (lambda: region_blocks(4, 4, 0), "region_size must be"),
        (lambda: sort_blocks(torch.full((1, 1, 4), 2), 2), "must lie in 0 .. 1"),
    ],
)
def test_bad_arguments(function: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        function()
    assert "\n" not in str(caught.value)
