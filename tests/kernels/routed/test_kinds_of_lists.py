"""Routed attention with counts, query regions and key maps of their own: agreement, transforms, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agreement import assert_implementations_agree, values_and_gradients
from list_cases import CASES, attention_of, inputs_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from visionattn.kernels import routed_attention, union_regions, use_backend
from visionattn.kernels.routed.plain import columns, rows


@pytest.fixture(params=["whole", "chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks as they are, and so small that small maps take many."""
    if request.param == "chunks":
        monkeypatch.setattr(rows, "CPU_CHUNK", 200)
        monkeypatch.setattr(columns, "_CHUNK", 60)
        monkeypatch.setattr(columns, "_PARTIAL", 100)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_formula(name: str, return_lse: bool):
    inputs, arguments = inputs_of(CASES[name])
    assert_implementations_agree(attention_of(arguments, return_lse=return_lse), inputs)


@pytest.mark.parametrize("query_region", [None, 1])
def test_full_lists_of_regions_without_keys(query_region: int | None):
    (q, k, v), arguments = inputs_of(CASES["counts"]._replace(topk=1, query_region=query_region))
    arguments["counts"][0, :, :3] = 0
    attention = attention_of(arguments, full=True, distinct=True, return_lse=True)
    assert_implementations_agree(attention, [q, k, v])
    assert (attention(q, k, v)[1] == float("-inf")).any()


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", ["counts, shared lists", "pixels, large regions", "one row, pixels"])
def test_lists_are_masks(name: str, backend: str):
    """Against dense attention whose mask is written out pixel by pixel."""
    case = CASES[name]._replace(bias=None)
    (q, k, v), arguments = inputs_of(case)
    with use_backend(backend):
        out = routed_attention(q, k, v, **arguments)
    sides = [x if isinstance(x, tuple) else (x, x) for x in (case.query_region or case.region, case.region)]
    lists, counts = arguments["indices"], arguments["counts"]

    def place(i: int, size: tuple[int, int], side: tuple[int, int]) -> tuple[int, int]:
        y, x = divmod(i, size[1])
        columns = -(-size[1] // side[1])
        return y // side[0] * columns + x // side[1], y % side[0] * side[1] + x % side[1]

    for b, h in ((0, 0), (1, 1)):
        for i in range(case.size[0] * case.size[1]):
            row = lists[b, h % lists.shape[1], place(i, case.size, sides[0])[0]].tolist()
            seen = []
            for j in range(case.key_size[0] * case.key_size[1]):
                region, number = place(j, case.key_size, sides[1])
                if region in row and (counts is None or number < counts[b, h % counts.shape[1], region]):
                    seen.append(j)
            query, keys, values = q[b].flatten(0, 1)[i, h], k[b].flatten(0, 1)[:, h], v[b].flatten(0, 1)[:, h]
            weights = (keys[seen] @ query * q.shape[-1] ** -0.5).softmax(0)
            torch.testing.assert_close(out[b].flatten(0, 1)[i, h], weights @ values[seen])


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", ["counts", "one row, pixels", "other map"])
def test_second_derivatives(name: str, backend: str):
    inputs, arguments = inputs_of(CASES[name]._replace(topk=2), dim=2)
    leaves = [x[:1, :2, :6].detach().requires_grad_() for x in inputs[:3]]
    sizes = {"size": tuple(leaves[0].shape[1:3]), "key_size": tuple(leaves[1].shape[1:3])}
    _, arguments = inputs_of(CASES[name]._replace(topk=1, bias=None, **sizes))
    arguments = {n: x[:1] if isinstance(x, Tensor) else x for n, x in arguments.items()}
    with use_backend(backend):
        assert torch.autograd.gradgradcheck(attention_of(arguments), leaves)


@pytest.mark.parametrize("name", ["counts per head, padded", "pixels, large regions", "pixels, dense bias"])
def test_vmap_equals_a_loop(name: str):
    inputs, arguments = inputs_of(CASES[name])
    attention = attention_of({**arguments, "distinct": True})
    stacks = [torch.stack([x, 2 * x]) for x in inputs]

    def energy(*x: Tensor) -> Tensor:
        return attention(*x).square().sum()

    gradient = torch.func.grad(energy, tuple(range(len(inputs))))
    together = torch.func.vmap(gradient)(*stacks)
    for i in range(2):
        torch.testing.assert_close([x[i] for x in together], list(gradient(*(x[i] for x in stacks))))


@pytest.mark.parametrize("name", ["counts, shared lists", "pixels, counts, table", "other map"])
def test_compiles_whole_and_exports(name: str):
    inputs, arguments = inputs_of(CASES[name], torch.float32)
    attention = attention_of(arguments, return_lse=True)
    expected, gradients = values_and_gradients(attention, inputs, "torch")
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    results, compiled_gradients = values_and_gradients(compiled, inputs, "torch")
    torch.testing.assert_close(results, expected)
    torch.testing.assert_close(compiled_gradients, gradients)

    class Attention(torch.nn.Module):
        def forward(self, *x: Tensor) -> Any:
            return attention(*x)

    exported = torch.export.export(Attention(), tuple(inputs)).module()(*inputs)
    torch.testing.assert_close(list(exported), [x.detach() for x in expected])


@pytest.mark.parametrize("name", ["counts per head, padded", "pixels, counts, table", "other map"])
def test_registered_with_pytorch(name: str):
    inputs, arguments = inputs_of(CASES[name], torch.float32)
    bias = inputs[3].requires_grad_() if len(inputs) > 3 else None
    tensors = *(x.requires_grad_() for x in inputs[:3]), arguments["indices"], arguments["counts"], bias
    sides = [
        [x, x] if isinstance(x, int) else list(x or ())
        for x in (CASES[name].query_region, CASES[name].region)
    ]
    numbers = sides[0] or sides[1], sides[1], 0.5, True, False, "torch"
    torch.library.opcheck(torch.ops.visionattn.routed_attention.default, (*tensors, *numbers))


def test_half_precision_and_autocast():
    for name in ("counts per head, padded", "pixels, large regions"):
        inputs, arguments = inputs_of(CASES[name])
        with torch.autocast("cpu", torch.bfloat16):
            low = attention_of(arguments)(*(x.bfloat16() for x in inputs))
        exact = attention_of(arguments)(*(x.bfloat16().double() for x in inputs))
        assert low.dtype == torch.bfloat16
        assert (low.double() - exact).norm() < 7e-3 * exact.norm()


def test_flops_follow_from_shapes():
    # Every pixel of q with every place of its list: what stands in the lists is not known to a formula.
    for name in ("pixels, large regions", "counts"):
        case = CASES[name]
        inputs, arguments = inputs_of(case)
        with FlopCounterMode(display=False) as counter:
            attention_of(arguments)(*inputs)
        height, width = case.region if isinstance(case.region, tuple) else (case.region, case.region)
        pairs = 2 * case.size[0] * case.size[1] * 2 * case.topk * height * width
        assert counter.get_total_flops() == 2 * 2 * pairs * 3


def test_lists_of_one_image_serve_all():
    (q, k, v), arguments = inputs_of(CASES["counts"])
    arguments = {n: x[:1] if isinstance(x, Tensor) else x for n, x in arguments.items()}
    repeated = {n: x.expand(2, *x.shape[1:]) if isinstance(x, Tensor) else x for n, x in arguments.items()}
    assert torch.equal(routed_attention(q, k, v, **arguments), routed_attention(q, k, v, **repeated))


def test_a_compiled_graph_counts_a_repetition_once():
    (q, k, v), arguments = inputs_of(CASES["pixels"])
    twice = torch.cat([arguments["indices"]] * 2, -1)
    compiled = torch.compile(routed_attention, fullgraph=True, backend="aot_eager")
    result = compiled(q, k, v, **{**arguments, "indices": twice})
    torch.testing.assert_close(result, routed_attention(q, k, v, **arguments))


Q = torch.randn(1, 4, 6, 2, 4)
K = torch.randn(1, 3, 5, 2, 4)
LISTS = torch.zeros(1, 1, 6, 1, dtype=torch.int32)
COUNTS = torch.ones(1, 1, 6, dtype=torch.int32)


@pytest.mark.parametrize(
    ("message", "given"),
    [
        (r"indices must lie in -1 \(padding\) \.\. 5, ", {"indices": LISTS + 6}),
        (r"indices hold 6 lists, the queries have 24 regions", {"query_region_size": 1}),
        (r"query_region_size must be one or two integers", {"query_region_size": 0}),
        (r"counts must be \[1 or 1, 1 or 2, 6\]", {"counts": COUNTS[..., :5]}),
        (r"counts must be int32 or int64", {"counts": COUNTS.float()}),
        (r"counts must lie in 0 \.\. 4, the pixels of a region, got 5 to 5", {"counts": COUNTS * 5}),
        (r"counts must lie in 0 \.\. 4", {"counts": -COUNTS}),
        (r"counts are on meta", {"counts": COUNTS.to("meta")}),
        (r"a relative bias needs keys and queries of one map", {"bias": torch.zeros(2, 7, 11)}),
        (r"bias has shape \(2, 24, 24\); needed is \(2, 24, 15\)", {"bias": torch.zeros(2, 24, 24)}),
        (r"a list names the same one twice", {"indices": LISTS.expand(1, 1, 6, 2)}),
    ],
)
def test_refusals(message: str, given: dict[str, Any]):
    arguments = {"indices": LISTS, "region_size": 2, **given}
    with pytest.raises(ValueError, match=message) as caught:
        routed_attention(Q, K, K, **arguments)
    assert "\n" not in str(caught.value)


def test_unions_name_every_region_once():
    first = torch.tensor([[[[3, 1, -1], [0, -1, -1], [-1, -1, -1]]]])
    second = torch.tensor([[[[1, 2], [0, -1], [-1, -1]]], [[[5, 0], [4, 0], [-1, -1]]]], dtype=torch.int32)
    joined = union_regions(first, second)
    assert joined.dtype == torch.int32
    assert joined[:, 0].tolist() == [
        [[1, 2, 3, -1], [0, -1, -1, -1], [-1] * 4],
        [[0, 1, 3, 5], [0, 4, -1, -1], [-1] * 4],
    ]
    compiled = torch.compile(union_regions, fullgraph=True, backend="aot_eager")(first, second)
    assert torch.equal(compiled[..., :4], joined)
    assert (compiled[..., 4:] == -1).all()
    assert union_regions(torch.full((1, 1, 2, 3), -1)).shape == (1, 1, 2, 0)


@pytest.mark.parametrize(
    ("message", "lists"),
    [
        (r"needs at least one tensor of lists", []),
        (r"int32 or int64, got torch.float32", [torch.zeros(1, 1, 2, 2)]),
        (r"must agree in batch, heads and regions, got", [LISTS, LISTS[:, :, :3]]),
        (
            r"must agree in batch, heads and regions, got",
            [LISTS.expand(2, -1, -1, -1), LISTS.expand(3, -1, -1, -1)],
        ),
    ],
)
def test_refusals_of_unions(message: str, lists: list[Tensor]):
    with pytest.raises(ValueError, match=message):
        union_regions(*lists)
