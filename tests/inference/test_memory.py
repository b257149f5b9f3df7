"""Every restoration network within a budget: the whole-image result, and no more memory than promised."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import FAMILIES, RESTORATION, small
from torch import nn

from benchmarks.measure import peak_memory
from visionattn.inference import parse_bytes, run_within
from visionattn.inference.rehearsal import without_data
from visionattn.kernels import use_backend

CPU = torch.device("cpu")
every_restorer = pytest.mark.parametrize(
    "name",
    # One of every family; the others differ in their heads.
    [name if name in FAMILIES else pytest.param(name, marks=pytest.mark.slow) for name in RESTORATION],
)


# With one thread, PyTorch unfolds inputs of convolutions below 20480 elements, which is not counted.
UNFOLDED = 9 * 20480 * 4


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network and an image with rows enough for several bands, and sides that nothing divides."""
    net = small(name).eval()
    return net, torch.rand(1, net.info.channels, 163, 19, generator=torch.Generator().manual_seed(0))


def smallest_budget(net: nn.Module, image: torch.Tensor) -> int:
    with pytest.raises(ValueError, match="needs at least") as error:
        run_within(net, image, 1)
    return parse_bytes(re.findall(r"at least (\S+)$", str(error.value))[0])


@every_restorer
def test_the_result_is_that_of_the_whole_image_in_less_memory(name: str):
    net, image = build(name)
    with torch.no_grad():
        whole = net(image)
        needed = peak_memory(lambda: net(image), CPU)
    assert needed is not None
    least = smallest_budget(net, image)
    assert least < 0.7 * needed
    for budget in (least, (least + needed) // 2):
        out = run_within(net, image, budget)
        assert out.shape == whole.shape
        assert (out - whole).abs().max() <= 1e-6 * whole.abs().max()


@every_restorer
def test_memory_stays_within_the_budget(name: str):
    net, image = build(name)
    budget = 2 * smallest_budget(net, image)
    peak = peak_memory(lambda: run_within(net, image, budget), CPU)
    assert peak is not None
    assert budget / 2 < peak <= budget + UNFOLDED


def test_a_batch_and_another_dtype():
    net = small("hat_x2").double().eval()
    images = torch.rand(3, 3, 40, 19, dtype=torch.float64)
    with torch.no_grad():
        whole = net(images)
    out = run_within(net, images, smallest_budget(net, images))
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-12)


def test_the_budget_holds_for_one_call_and_leaves_no_trace():
    net, image = build("hat_x2")
    out = run_within(net, image, "1GB")
    assert not out.requires_grad
    assert net(image).requires_grad
    with pytest.raises(ValueError, match="call eval"):
        run_within(net.train(), image, "1GB")


def test_threads_with_budgets_of_their_own_and_without_use_one_network():
    """Each gets its own result, by its own backend and in bands of its own, whatever the others do."""
    net, image = build("hat_x2")
    with torch.no_grad():
        whole = net(image)
    least, ready = smallest_budget(net, image), threading.Barrier(3)
    with use_backend("reference"):
        more = 4 * smallest_budget(net, image)
    heights: dict[str, set[int]] = {"low": set(), "high": set(), "none": set()}
    here = threading.local()

    def note(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        if not args[0].is_meta:
            heights[here.name].add(args[0].shape[1])

    net.get_submodule("layers.0.blocks.0.norm2").register_forward_pre_hook(note)

    def repeat(name: str, backend: str, run: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        here.name = name
        ready.wait()
        with use_backend(backend), torch.no_grad():
            return [run() for _ in range(3)]

    with ThreadPoolExecutor(3) as pool:
        results = [
            pool.submit(repeat, "low", "torch", lambda: run_within(net, image, least)),
            pool.submit(repeat, "high", "reference", lambda: run_within(net, image, more)),
            pool.submit(repeat, "none", "torch", lambda: net(image)),
        ]
        outputs = [result.result() for result in results]
    assert all(torch.equal(out, whole) for out in outputs[2])
    for out in (*outputs[0], *outputs[1]):
        assert (out - whole).abs().max() <= 1e-6 * whole.abs().max()
    assert max(heights["low"]) < max(heights["high"])
    assert heights["none"] == {168}


def test_the_twin_without_data_leaves_the_network_alone():
    net, _ = build("hat_x2")
    before = {name: id(value) for name, value in net.state_dict(keep_vars=True).items()}
    twin = without_data(net)
    assert twin.state_dict().keys() == net.state_dict().keys()
    assert all(value.is_meta for value in (*twin.parameters(), *twin.buffers()))
    assert {name: id(value) for name, value in net.state_dict(keep_vars=True).items()} == before
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in net.parameters()]


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("512MiB", 512 * 2**20), ("1.5 gib", 3 * 2**29), ("800M", 8 * 10**8), (12, 12)],
)
def test_sizes(text: str | int, size: int):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-2GB", "2TBs", "1,5GB", 0, -3, True, "0.1"])
def test_wrong_sizes_are_one_sentence(text: str | int):
    with pytest.raises(ValueError, match="a size in bytes reads 2GB"):
        parse_bytes(text)
