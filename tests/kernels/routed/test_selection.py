"""The regions that are selected, against the definitions written out."""

from __future__ import annotations

import math

import pytest
import torch

from visionattn.kernels import (
    BACKENDS,
    antidiagonal_regions,
    merge_attention,
    neighborhood_attention,
    routed_attention,
    topk_regions,
    use_backend,
)


def test_equal_affinities_take_the_lowest_index() -> None:
    q = torch.zeros(1, 6, 6, 2, 4)
    assert topk_regions(q, q, 2, 3).tolist() == [[[[0, 1, 2]] * 9]]


@pytest.mark.parametrize("region", [(2, 3), (4, 4), (3, 2)], ids=str)
def test_routing_is_the_formula_and_stands_above_autocast(region: tuple[int, int]) -> None:
    height, width = 8, 6
    q, k = torch.randn(2, 2, height, width, 2, 4, generator=torch.Generator().manual_seed(1))
    rows, columns = -(-height // region[0]), -(-width // region[1])

    def mean(x: torch.Tensor, i: int) -> torch.Tensor:
        y, x0 = i // columns * region[0], i % columns * region[1]
        return x[:, y : y + region[0], x0 : x0 + region[1]].double().mean((1, 2)).flatten(1)

    descriptors = [torch.stack([mean(x, i) for i in range(rows * columns)], 1) for x in (q, k)]
    affinity = descriptors[0] @ descriptors[1].transpose(1, 2)
    expected = affinity.argsort(-1, descending=True)[:, None, :, :2]
    assert torch.equal(topk_regions(q, k, region, 2).long(), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(topk_regions(q, k, region, 2).long(), expected)
    assert topk_regions(q, k, region, 1000).shape[-1] == rows * columns


def expected_shares(q: torch.Tensor, k: torch.Tensor, region: tuple[int, int], stride: int) -> torch.Tensor:
    """XAttention's estimate by loops, for one image and head `[H, W, d]`."""
    height, width, dim = q.shape
    rows, columns = -(-height // region[0]), -(-width // region[1])

    def pixel(x: torch.Tensor, number: int, i: int) -> torch.Tensor | None:
        y = number // columns * region[0] + i // region[1]
        x0 = number % columns * region[1] + i % region[1]
        inside = i < region[0] * region[1] and y < height and x0 < width
        return x[y, x0] if inside else None

    groups = math.ceil(region[0] * region[1] / stride)
    real = [
        (number, group)
        for number in range(rows * columns)
        for group in range(groups)
        if any(pixel(k, number, group * stride + i) is not None for i in range(stride))
    ]
    shares = torch.zeros(rows * columns, rows * columns, dtype=q.dtype)
    for number, group in real:
        logits = []
        for other, key_group in real:
            pairs = (
                (pixel(q, number, group * stride + stride - 1 - i), pixel(k, other, key_group * stride + i))
                for i in range(stride)
            )
            total = sum(float(a @ b) for a, b in pairs if a is not None and b is not None)
            logits.append(total / stride / math.sqrt(dim))
        for weight, (other, _) in zip(torch.tensor(logits, dtype=q.dtype).softmax(0), real):
            shares[number, other] += weight
    return shares / shares.sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("height", "width", "region", "stride"),
    [(4, 6, (2, 3), 3), (5, 6, (2, 4), 3), (4, 4, (2, 2), 8), (3, 3, (1, 1), 1), (4, 4, (4, 4), 4)],
)
@pytest.mark.parametrize("threshold", [1e-6, 0.6, 0.95])
def test_antidiagonal_lists_are_the_shortest_that_hold_the_threshold(
    height: int, width: int, region: tuple[int, int], stride: int, threshold: float
) -> None:
    q, k = 3 * torch.randn(2, 2, height, width, 2, 4, dtype=torch.float64)
    lists = antidiagonal_regions(q, k, region, threshold, stride=stride)
    for image in range(2):
        for head in range(2):
            shares = expected_shares(q[image, :, :, head], k[image, :, :, head], region, stride)
            for row, listed in zip(shares, lists[image, head].tolist()):
                best = row.argsort(descending=True).tolist()
                count = next(n for n in range(1, len(best) + 1) if row[best[:n]].sum() >= threshold - 1e-12)
                assert listed == best[:count] + [-1] * (lists.shape[-1] - count)


def test_antidiagonal_lists_feed_the_attention() -> None:
    q, k, v = torch.randn(3, 1, 6, 6, 2, 4)
    lists = antidiagonal_regions(q, k, 2, 0.5, stride=2, max_regions=4)
    assert lists.dtype == torch.int32
    assert lists.shape[-1] <= 4
    out = routed_attention(q, k, v, lists, 2)
    with use_backend("reference"):
        torch.testing.assert_close(out, routed_attention(q, k, v, lists, 2))
        everything = antidiagonal_regions(q, k, 2, 1.0, stride=2)
        assert everything.shape[-1] == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 0.0}, "threshold must be"),
        ({"threshold": 1.5}, "threshold must be"),
        ({"stride": 0}, "stride must be"),
        ({"max_regions": 0}, "max_regions must be"),
        ({"q": torch.zeros(1, 4, 4, 4)}, "of one shape"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    x = torch.zeros(1, 4, 4, 1, 4)
    with pytest.raises(ValueError, match=message):
        antidiagonal_regions(**{"q": x, "k": x, "region_size": 2, "threshold": 0.5, **change})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_backends_take_the_same_decisions(dtype: torch.dtype) -> None:
    q, k = torch.randn(2, 2, 14, 21, 2, 32).to(dtype)
    decisions = []
    for backend in BACKENDS:
        with use_backend(backend):
            decisions.append((topk_regions(q, k, 7, 3), antidiagonal_regions(q, k, 7, 0.7)))
    for regions, others in decisions[1:]:
        assert torch.equal(regions, decisions[0][0])
        assert torch.equal(others, decisions[0][1])


def test_a_local_and_a_routed_branch_are_one_attention() -> None:
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 8, 8, 2, 4, dtype=torch.float64))
    # Neighborhoods in blocks of their own size are windows, and return a log-sum-exp.
    local, local_lse = neighborhood_attention(q, k, v, 4, stride=4, return_lse=True)
    lists = topk_regions(q, k, 4, 4)
    # The own region stands in the local branch already.
    far = torch.where(lists == torch.arange(4)[:, None], -1, lists)[..., :3]
    routed, routed_lse = routed_attention(q, k, v, far, 4, return_lse=True)
    out, lse = merge_attention([local, routed], [local_lse, routed_lse])
    own = torch.arange(4, dtype=torch.int32).view(1, 1, 4, 1)
    union = torch.cat((own, far), -1)
    expected, expected_lse = routed_attention(q, k, v, union, 4, return_lse=True)
    torch.testing.assert_close((out, lse), (expected, expected_lse))
    grads = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, expected)]
    torch.testing.assert_close(*grads)
