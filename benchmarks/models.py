"""Networks with our kernels against the same networks with the attention of their authors' code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.accelerated import timm_formulation
from benchmarks.formulations import FORMULATIONS, Formulation
from benchmarks.measure import Call, Timing, peak_memory, time_in_turn
from benchmarks.report import Page, memory_cell, time_cell
from visionattn.errors import InputError, as_input_error, nearest
from visionattn.models.registry.zoo import model_names


@dataclass(frozen=True)
class Comparison:
    """One line of the table.

    Attributes:
        network: the registered name.
        input: shape of the input.
        mode: `"inference"`, or `"training"` for a forward and a backward pass; with `", compiled"` where both
            are compiled by `torch.compile`.
        ours: time with our kernels.
        authors: time with the authors' formulation.
        ratio: time of the authors' formulation divided by ours.
        our_memory: peak bytes that our pass allocates; None where the device does not tell.
        authors_memory: the same for the authors' formulation.
        difference: largest difference of the outputs, relative to the largest output.
        formulation: the authors' formulation in a few words.
    """

    network: str
    input: tuple[int, ...]
    mode: str
    ours: Timing
    authors: Timing
    ratio: float
    our_memory: int | None
    authors_memory: int | None
    difference: float
    formulation: str

    def cells(self) -> tuple[str, ...]:
        """The line under the columns of `page`."""
        return (
            self.network,
            "x".join(map(str, self.input)),
            self.mode,
            *map(time_cell, (self.ours, self.authors)),
            f"{self.ratio:.2f}x",
            *map(memory_cell, (self.our_memory, self.authors_memory)),
            f"{self.difference:.1e}",
        )


def page(rows: Sequence[Comparison]) -> Page:
    """Name the columns of these lines, and explain them."""
    return Page(
        "Our kernels against the authors' formulation",
        (
            "network",
            "input",
            "mode",
            "ours",
            "authors",
            "ratio",
            "our memory",
            "authors' memory",
            "difference",
        ),
        "Both run in one process and in turn, in the same network with the same weights; linear layers of "
        "the authors' formulation are PyTorch's own. Time: median, ± the difference of the quartiles. "
        "Ratio: time of the authors' formulation divided by ours. Memory: the most that PyTorch allocates "
        "at one time during the pass, weights and input not counted. Difference: largest difference of the "
        "outputs, relative to the largest output.",
        [
            f"{name}: {formulation}"
            for name, formulation in sorted({(row.network, row.formulation) for row in rows})
        ],
    )


def compare_models(
    names: Sequence[str],
    *,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    repeats: int = 10,
    train: bool = False,
    compiled: bool = False,
    device: torch.device | str = "cpu",
) -> Iterator[Comparison]:
    """Compare networks, all names checked before the first is measured.

    Args:
        names: registered networks.
        size: height and width of the inputs; the sizes of the family, or of the variant, by default.
        batch: images per input.
        repeats: measured rounds.
        train: forward and backward in training mode instead of inference.
        compiled: compare both compiled as well.
        device: where to run.

    Raises:
        InputError: an unknown name, a family whose formulation is not at hand, or a size that cannot work.
    """
    device = torch.device(device)
    formulations = [formulation_of(name) for name in names]
    for name, formulation in zip(names, formulations):
        torch.manual_seed(0)
        net: Any = timm.create_model(name, device=device).train(train)
        formulation.prepare(net)
        for height, width in [size] if size else formulation.sizes or [net.default_cfg["input_size"][1:]]:
            if net.default_cfg["fixed_input_size"]:
                net = timm.create_model(name, img_size=(height, width), device=device).train(train)
                formulation.prepare(net)
            image = torch.rand(batch, net.in_chans, height, width, device=device)
            with as_input_error(f"cannot run {name} at {height}x{width}", ValueError):
                for as_program in (False, True) if compiled else (False,):
                    yield compare(net, name, formulation, image, repeats, as_program)


def compare(
    net: nn.Module, name: str, formulation: Formulation, image: Tensor, repeats: int, compiled: bool = False
) -> Comparison:
    """Compare one network on one input; it trains if it is in training mode."""

    # Of a compiled network, a change of classes would make another one.
    nets = {"ours": net, "authors": copy.deepcopy(net) if compiled else net}
    start = [(buffer, buffer.clone()) for network in nets.values() for buffer in network.buffers()]

    def settings(whose: str) -> Callable[[], AbstractContextManager[object]]:
        def enter() -> AbstractContextManager[object]:
            # Training moves statistics and draws numbers: both formulations begin alike.
            torch.manual_seed(0)
            with torch.no_grad():
                for buffer, value in start:
                    buffer.copy_(value)
            return formulation.in_place_of_kernels(nets[whose]) if whose == "authors" else nullcontext()

        return enter

    one_pass = _training_pass if net.training else _inference_pass
    calls = {
        whose: one_pass(network, torch.compile(network) if compiled else network, image)
        for whose, network in nets.items()
    }
    contexts = {whose: settings(whose) for whose in nets}
    outputs, memory = {}, {}
    for whose, context in contexts.items():
        with context():
            outputs[whose] = calls[whose]()
            memory[whose] = peak_memory(calls[whose], image.device)
    timings = time_in_turn(calls, contexts, image.device, repeats)
    difference = (outputs["ours"] - outputs["authors"]).abs().max() / outputs["authors"].abs().max()
    return Comparison(
        network=name,
        input=tuple(image.shape),
        mode=f"{'training' if net.training else 'inference'}{', compiled' if compiled else ''}",
        ours=timings["ours"],
        authors=timings["authors"],
        ratio=timings["authors"].median / timings["ours"].median,
        our_memory=memory["ours"],
        authors_memory=memory["authors"],
        difference=difference.item(),
        formulation=formulation.description,
    )


def formulation_of(name: str) -> Formulation:
    """The authors' formulation for a registered network; timm's own networks run as timm ships them.

    Raises:
        InputError: an unknown name, or a family whose formulation is not at hand.
    """
    if name not in model_names() and timm.is_model(name):
        return timm_formulation(name)
    if name not in model_names():
        raise InputError(f"unknown network {name!r}: {nearest(name, model_names())}")
    family = timm.model_entrypoint(name).__module__.rsplit(".", 1)[-1]
    if family not in FORMULATIONS:
        known = ", ".join(FORMULATIONS)
        raise InputError(f"the authors' formulation of {name} is not at hand, only that of {known}")
    return FORMULATIONS[family]


def _inference_pass(net: nn.Module, call: Callable[[Tensor], Tensor], image: Tensor) -> Call:
    @torch.inference_mode()
    def run() -> Tensor:
        return call(image)

    return run


def _training_pass(net: nn.Module, call: Callable[[Tensor], Tensor], image: Tensor) -> Call:
    def run() -> Tensor:
        out = call(image)
        out.square().mean().backward()
        # Gradients left to the next pass would count in the memory of one, and against that of the other.
        net.zero_grad()
        return out.detach()

    return run
