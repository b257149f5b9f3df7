"""A service calls one network from several threads: each call gives what it gives alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import FAMILIES, STRUCTURES, small
from test_models import image, min_size
from torch import Tensor
from torch._subclasses import FakeTensorMode

from visionattn.inference import run_within
from visionattn.kernels import explain, use_backend, window_attention

THREADS, CALLS = 4, 4


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Python changes threads a thousand times as often as usual."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.usefixtures("hasty_threads")
@pytest.mark.parametrize(
    "name", [n if n in FAMILIES else pytest.param(n, marks=pytest.mark.slow) for n in STRUCTURES]
)
def test_threads_with_pictures_of_two_sizes_get_their_own_results(name: str):
    net = small(name).eval()
    least = min_size(net)
    # Networks of one size only get it twice.
    inputs = [
        image(net, 1, (max(rows, least), max(columns, least))) for rows, columns in ((40, 32), (32, 48))
    ]
    ready = threading.Barrier(THREADS)

    def within(x: Tensor) -> Tensor:
        return run_within(net, x, "1GB")

    # With a budget a network is rehearsed, while the others use it.
    calls = [within if hasattr(net, "info") else net, net, net, net]
    with torch.inference_mode():
        expected = {call: [call(x) for x in inputs] for call in calls}

    def serve(number: int) -> list[bool]:
        call, turns = calls[number], [(number + turn) % 2 for turn in range(CALLS)]
        ready.wait()
        with torch.inference_mode():
            return [torch.equal(call(inputs[turn]), expected[call][turn]) for turn in turns]

    with ThreadPoolExecutor(THREADS) as pool:
        for equal in pool.map(serve, range(THREADS)):
            assert equal == [True] * CALLS


@pytest.mark.parametrize("name", [name for name in STRUCTURES if name.startswith("agent")])
def test_biases_that_are_kept_are_those_of_the_weights(name: str):
    """Neither other sizes nor other weights, nor a pass without numbers, leave wrong biases behind."""
    net, twin = small(name).eval(), small(name).eval()
    sizes = [image(net, 1, (64, 48)), image(net, 1, (48, 80))]
    with torch.inference_mode():
        expected = [twin(x) for x in sizes]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        net(sizes[0])
    with torch.no_grad():
        for x, wanted in zip(sizes * 2, expected * 2):
            assert torch.equal(net(x), wanted)
        for parameter in net.parameters():
            parameter.mul_(1.25)
        changed = small(name).eval()
        changed.load_state_dict(net.state_dict())
        assert torch.equal(net(sizes[1]), changed(sizes[1]))


def test_one_block_serves_several_threads_at_once():
    q = torch.randn(1, 4, 4, 1, 2)
    block, inside, left = use_backend("reference"), threading.Barrier(2), threading.Barrier(2)

    def chosen() -> str:
        return explain(window_attention, q, q, q, 2).backend

    def work(number: int) -> list[str]:
        with block:
            inside.wait()
            seen = [chosen()]
            if number:
                left.wait()
        if not number:
            left.wait()
        return [*seen, chosen()]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [["reference", "torch"]] * 2
    with block:
        with block:
            assert chosen() == "reference"
        assert chosen() == "reference"
    assert chosen() == "torch"
