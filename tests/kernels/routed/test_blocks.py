"""Attention between blocks of any shape: agreement, empty blocks, transforms, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agreement import assert_implementations_agree, packed_qkv, values_and_gradients
from torch import Tensor

from visionattn.kernels import Blocks, block_attention, sort_blocks, use_backend


def dense(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, labels: Tensor, key_labels: Tensor) -> Any:
    """Output and log-sum-exp of dense attention masked by the blocks of every pair of pixels."""
    heads = q.shape[3]
    queries, keys, values = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    lists, labels, key_labels = (x.expand(len(q), heads, *x.shape[2:]) for x in (lists, labels, key_labels))
    rows = lists.gather(2, labels[..., None].long().expand(-1, -1, -1, lists.shape[3]))
    seen = (rows[..., None, :] == key_labels[:, :, None, :, None]).any(-1)
    logits = (queries @ keys.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    lse = logits.logsumexp(-1)
    out = (logits - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp() @ values
    return tuple(x.transpose(1, 2).unflatten(1, q.shape[1:3]) for x in (out, lse))


def make(name: str) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Maps, lists of blocks, and the labels of the pixels of q and of k; block 1 of both is empty."""
    torch.manual_seed(0)
    size, key_size, sets, key_sets, list_sets = {
        "shared": ((6, 7), (6, 7), 1, 1, 1),
        "per head": ((6, 7), (6, 7), 2, 2, 2),
        "mixed, other map": ((5, 4), (3, 11), 2, 1, 1),
        "one row": ((1, 19), (1, 13), 1, 2, 2),
    }[name]
    (q, _, _), (_, k, v) = packed_qkv(2, *size, 2, 3), packed_qkv(2, *key_size, 2, 3)
    labels = torch.randint(0, 4, (2, sets, size[0] * size[1]))
    key_labels = torch.randint(0, 6, (2, key_sets, key_size[0] * key_size[1]), dtype=torch.int32)
    labels[labels == 1], key_labels[key_labels == 1] = 3, 5
    lists = torch.rand(2, list_sets, 4, 6).argsort(-1)[..., :3].int()
    lists[torch.rand(lists.shape) < 0.2] = -1
    lists[0, 0, 2], lists[0, 0, 3] = torch.tensor([1, -1, -1]), -1
    return [q, k, v], lists, labels, key_labels


NAMES = ["shared", "per head", "mixed, other map", "one row"]


@pytest.mark.parametrize("tile", [1, 4, 64])
@pytest.mark.parametrize("name", NAMES)
def test_equals_masked_attention(name: str, tile: int):
    inputs, lists, labels, key_labels = make(name)
    blocks = sort_blocks(labels, 4), sort_blocks(key_labels, 6)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return block_attention(q, k, v, lists, *blocks, tile=tile, return_lse=True)

    expected, gradients = values_and_gradients(
        lambda q, k, v: dense(q, k, v, lists, labels, key_labels), inputs, "torch"
    )
    outputs, found = values_and_gradients(attention, inputs, "torch")
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(found, [x.nan_to_num() for x in gradients])
    assert_implementations_agree(attention, inputs)


def test_sorted_blocks():
    labels = torch.tensor([[[2, 0, 2, 3, 0]]])
    blocks = sort_blocks(labels, 5)
    assert blocks.order.tolist() == [[[1, 4, 0, 2, 3]]]
    assert blocks.starts.tolist() == [[[0, 2, 2, 4, 5, 5]]]
    assert blocks.order.dtype == blocks.starts.dtype == torch.int32


@pytest.mark.parametrize("name", ["shared", "mixed, other map"])
def test_compiles_whole(name: str):
    inputs, lists, labels, key_labels = make(name)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_attention(q, k, v, lists, sort_blocks(labels, 4), sort_blocks(key_labels, 6), tile=4)

    expected = values_and_gradients(attention, inputs, "torch")
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(values_and_gradients(compiled, inputs, "torch"), expected)


def test_partitions_of_one_image_serve_all():
    (q, k, v), lists, labels, key_labels = make("shared")
    one = block_attention(q, k, v, lists[:1], sort_blocks(labels[:1], 4), sort_blocks(key_labels[:1], 6))
    labels, key_labels = (x[:1].expand(2, -1, -1) for x in (labels, key_labels))
    all_ = block_attention(
        q, k, v, lists[:1].expand(2, -1, -1, -1), sort_blocks(labels, 4), sort_blocks(key_labels, 6)
    )
    assert torch.equal(one, all_)


def test_empty_batch_and_second_derivatives():
    (q, k, v), lists, labels, key_labels = make("shared")
    none = [x[:0] for x in (q, k, v, lists, labels, key_labels)]
    out = block_attention(*none[:4], sort_blocks(none[4], 4), sort_blocks(none[5], 6))
    assert out.shape == (0, *q.shape[1:])
    leaves = [x[1:, :2, :3, :1, :2].detach().requires_grad_() for x in (q, k, v)]
    blocks = sort_blocks(labels[1:, :, :6], 4), sort_blocks(key_labels[1:, :, :6], 6)
    with use_backend("torch"):
        assert torch.autograd.gradgradcheck(
            lambda *x: block_attention(*x, lists[1:], *blocks, tile=2), leaves
        )


def test_is_deterministic():
    inputs, lists, labels, key_labels = make("per head")
    blocks = sort_blocks(labels, 4), sort_blocks(key_labels, 6)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_attention(q, k, v, lists, *blocks, tile=4)

    first = values_and_gradients(attention, inputs, "torch")
    for one, other in zip(first, values_and_gradients(attention, inputs, "torch")):
        assert all(map(torch.equal, one, other))


Q = torch.randn(1, 2, 3, 2, 4)
LABELS = torch.tensor([[[0, 0, 1, 1, 0, 1]]])
BLOCKS = ORDER, STARTS = sort_blocks(LABELS, 2)
LISTS = torch.tensor([[[[0], [1]]]])


@pytest.mark.parametrize(
    ("message", "given"),
    [
        (r"tile must be at least 1, got 0", {"tile": 0}),
        (
            r"query_blocks.order must name each of the 6 pixels once",
            {"query_blocks": Blocks(0 * ORDER, STARTS)},
        ),
        (
            r"key_blocks has order \(1, 1, 5\) .* 6 pixels",
            {"key_blocks": Blocks(ORDER[..., :5], STARTS)},
        ),
        (r"key_blocks.starts must ascend from 0 to 6", {"key_blocks": Blocks(ORDER, STARTS.flip(-1))}),
        (r"key_blocks.starts must ascend from 0 to 6", {"key_blocks": Blocks(ORDER, STARTS[..., :2])}),
        (r"query_blocks.order must be int32", {"query_blocks": Blocks(ORDER.float(), STARTS)}),
        (
            r"query_blocks.order must be \[1 or 1, 1 or 2, n\]",
            {"query_blocks": Blocks(ORDER[0], STARTS)},
        ),
        (r"lists must lie in -1 \(padding\) \.\. 1", {"lists": LISTS + 1}),
        (r"lists must be \[1 or 1, 1 or 2, rows, n\]", {"lists": LISTS[0]}),
        (
            r"lists hold 3 lists, the queries have 2 regions or blocks",
            {"lists": LISTS.expand(1, 1, 2, 1)[:, :, [0, 1, 1]]},
        ),
        (r"a list names the same one twice", {"lists": LISTS.expand(1, 1, 2, 2)}),
    ],
)
def test_refusals(message: str, given: dict[str, Any]):
    arguments = {"lists": LISTS, "query_blocks": BLOCKS, "key_blocks": BLOCKS, **given}
    with pytest.raises(ValueError, match=message) as caught:
        block_attention(Q, Q, Q, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("message", "labels"),
    [
        (r"labels must lie in 0 \.\. 1", LABELS + 1),
        (r"labels must lie in 0 \.\. 1", LABELS - 1),
        (r"labels must be \[B or 1, 1 or heads, pixels\] of int32 or int64", LABELS.float()),
    ],
)
def test_refusals_of_labels(message: str, labels: Tensor):
    with pytest.raises(ValueError, match=message):
        sort_blocks(labels, 2)
