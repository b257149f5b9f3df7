"""Which implementation runs, how one is forced, and that the choice leaves nothing behind."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch
from agreement import packed_qkv
from torch import Tensor

from visionattn.kernels import (
    BACKENDS,
    explain,
    linear_attention,
    overlapping_window_attention,
    routed_attention,
    topk_regions,
    use_backend,
    window_attention,
)
from visionattn.kernels.dispatch import Operator, choose

Q, K, V = packed_qkv(1, 6, 6, 1, 4)
LISTS = topk_regions(Q, K, 3, 2)
CALLS = {
    "local_attention": [
        lambda: explain(window_attention, Q, K, V, 3, shift=1),
        lambda: explain(window_attention, Q, K, V, 3, shift=1, mask_shift=False),
        lambda: explain(overlapping_window_attention, Q, K, V, 3, 1),
    ],
    "routed_attention": [
        lambda: explain(routed_attention, Q, K, V, LISTS, 3),
        lambda: explain(routed_attention, Q, K, V, LISTS, region_size=3, return_lse=True, distinct=True),
    ],
}
EXPLANATIONS = [pytest.param(name, call) for name, calls in CALLS.items() for call in calls]


@pytest.fixture
def forced_by_environment(monkeypatch: pytest.MonkeyPatch):
    return lambda name: monkeypatch.setenv("VISIONATTN_BACKEND", name)


@pytest.mark.parametrize(("operator", "explained"), EXPLANATIONS)
def test_explain(operator, explained):
    choice = explained()
    assert choice.operator == operator
    assert choice.backend == "torch"
    assert choice.reason.startswith("not triton: ")
    assert str(choice) == f"{operator}: torch ({choice.reason})"
    with use_backend("reference"):
        assert explained().backend == "reference"
        assert explained().reason == "forced"


def test_explain_runs_nothing_and_ends_with_the_call():
    assert explain(window_attention, Q, K, V, 3).backend == "torch"
    assert isinstance(window_attention(Q, K, V, 3), torch.Tensor)
    with pytest.raises(ValueError, match="window_size"):
        explain(window_attention, Q, K, V, 0)
    assert isinstance(window_attention(Q, K, V, 3), torch.Tensor)
    with pytest.raises(TypeError, match=r"no function|not a function"):
        explain(torch.relu, Q)


def test_use_backend_nests_and_is_undone():
    def chosen() -> str:
        return explain(window_attention, Q, K, V, 3).backend

    with use_backend("reference"):
        with use_backend("torch"):
            assert chosen() == "torch"
        assert chosen() == "reference"
        with pytest.raises(ZeroDivisionError), use_backend("torch"):
            _ = 1 / 0
        assert chosen() == "reference"
    assert chosen() == "torch"


def test_environment_variable(forced_by_environment):
    forced_by_environment("reference")
    assert explain(window_attention, Q, K, V, 3).backend == "reference"
    with use_backend("torch"):
        assert explain(window_attention, Q, K, V, 3).backend == "torch"
    forced_by_environment("")
    assert explain(window_attention, Q, K, V, 3).backend == "torch"


def test_threads_do_not_see_each_other():
    """Two threads force and explain different things, each in the middle of the other's block."""
    outcomes: dict[str, list[str]] = {}
    meeting = threading.Barrier(2, timeout=60)

    def chosen() -> str:
        return explain(window_attention, Q, K, V, 3).backend

    def work(backend: str) -> None:
        seen = outcomes[backend] = [chosen()]
        with use_backend(backend):
            meeting.wait()
            seen.append(chosen())
            meeting.wait()
        seen.append(chosen())

    def explain_slowly() -> None:
        def function() -> None:
            meeting.wait()
            meeting.wait()
            window_attention(Q, K, V, 3)

        outcomes["explained"] = [explain(function).backend]

    def compute() -> None:
        meeting.wait()
        outcomes["computed"] = [str(tuple(window_attention(Q, K, V, 3).shape))]
        meeting.wait()

    with use_backend("reference"):
        for pair in ((partial(work, "torch"), partial(work, "reference")), (explain_slowly, compute)):
            threads = [threading.Thread(target=function) for function in pair]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert outcomes == {
        "torch": ["torch", "torch", "torch"],
        "reference": ["torch", "reference", "torch"],
        "explained": ["torch"],
        "computed": [str(tuple(Q.shape))],
    }


def test_compiled_programs_follow_the_choice():
    torch.compiler.reset()
    compiled_for = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        compiled_for.append("reference" if "'reference'" in graph.code else "torch")
        return graph

    def function(q: Tensor) -> Tensor:
        return linear_attention(q, q, q)

    def with_a_block(q: Tensor) -> Tensor:
        with use_backend("reference"):
            q = linear_attention(q, q, q)
        return linear_attention(q, q, q)

    compiled = torch.compile(function, fullgraph=True, backend=keep)
    for _ in range(2):
        compiled(Q)
        with use_backend("reference"):
            torch.testing.assert_close(compiled(Q), function(Q))
        assert compiled_for == ["torch", "reference"]
    thread = threading.Thread(target=compiled, args=(Q,))
    with use_backend("reference"):
        thread.start()
        thread.join()
    assert compiled_for == ["torch", "reference"]
    blocks = torch.compile(with_a_block, fullgraph=True, backend=keep)
    torch.testing.assert_close(blocks(Q), with_a_block(Q))
    assert explain(linear_attention, Q, Q, Q).backend == "torch"


@use_backend("reference")
def _chosen_by_a_decorator() -> str:
    return explain(window_attention, Q, K, V, 3).backend


def test_use_backend_decorates():
    assert [_chosen_by_a_decorator(), _chosen_by_a_decorator()] == ["reference", "reference"]


def test_unknown_names(forced_by_environment):
    with pytest.raises(
        ValueError, match="backend='cuda' is no implementation; choose one of reference, torch, "
    ):
        use_backend("cuda").__enter__()
    forced_by_environment("cuda")
    with pytest.raises(ValueError, match="VISIONATTN_BACKEND='cuda' is no implementation"):
        window_attention(Q, K, V, 3)


def test_an_impossible_choice_says_why(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("visionattn.kernels.dispatch.find_spec", lambda name: object())
    with (
        use_backend("triton"),
        pytest.raises(ValueError, match="local_attention cannot run on triton: the tensors are on cpu"),
    ):
        window_attention(Q, K, V, 3)
    toy = Operator("toy", {"reference": lambda query: query, "torch": lambda query: query})
    with use_backend("triton"), pytest.raises(ValueError, match="toy cannot run on triton: it has no"):
        choose(toy, Q)


def test_choice_of_a_fused_implementation(monkeypatch: pytest.MonkeyPatch):
    def plain(query, *args):
        return query

    def refuses(query, *args):
        return "head_dim is odd" if query.shape[-1] % 2 else None

    operator = Operator("toy", dict.fromkeys(("reference", "torch", "triton"), plain), {"triton": refuses})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("visionattn.kernels.dispatch._HAS_RECORDS", True)
    monkeypatch.setattr("visionattn.kernels.dispatch.find_spec", lambda name: None)
    assert choose(operator, Q) == ("torch", "not triton: the tensors are on cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose(operator, Q) == ("torch", "not triton: Triton is not installed")
    monkeypatch.setattr("visionattn.kernels.dispatch.find_spec", lambda name: object())
    assert choose(operator, Q) == ("triton", "fused kernel available")
    assert choose(operator, Q[..., :3]) == ("torch", "not triton: head_dim is odd")
    monkeypatch.setattr("visionattn.kernels.dispatch._HAS_RECORDS", False)
    assert choose(operator, Q)[1].startswith("not triton: the Triton of PyTorch 2.6 is too old")
    monkeypatch.setattr("visionattn.kernels.dispatch._HAS_RECORDS", True)
    with use_backend("triton"), pytest.raises(ValueError, match="toy cannot run on triton: head_dim is odd"):
        choose(operator, Q[..., :3])


def test_names_of_the_implementations():
    assert BACKENDS == ("reference", "torch", "cpu", "triton")
