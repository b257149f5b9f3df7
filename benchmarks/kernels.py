"""Every implementation of our kernels against every peer that is installed, on named shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import CASES, Case
from benchmarks.measure import Call, Timing, peak_memory, time_in_turn
from benchmarks.peers import peers_of
from benchmarks.report import Page, memory_cell, time_cell
from visionattn.errors import InputError, nearest, one_line
from visionattn.kernels import BACKENDS, explain, use_backend

# Above so many pairs of pixels and heads, dense attention over them takes tens of gigabytes and minutes.
_MOST_PAIRS = 2**28


@dataclass(frozen=True)
class Measurement:
    """One line of the table: one implementation of one kernel, or why it does not run.

    Attributes:
        kernel: the name of the shape.
        implementation: `"ours: ..."`, or the peer.
        mode: `"forward"` or `"forward+backward"`.
        time: of one call; None where it does not run.
        ratio: this time divided by that of the implementation of ours that runs unless forced.
        memory: peak bytes that the call allocates; None where the device does not tell.
        error: of the outputs, in training the worst of outputs and gradients, from the reference: norm of
            the difference relative to the norm.
        reason: why it does not run, or "".
    """

    kernel: str
    implementation: str
    mode: str
    time: Timing | None
    ratio: float | None
    memory: int | None
    error: float | None
    reason: str

    def cells(self) -> tuple[str, ...]:
        """The line under the columns of `page`."""
        if self.time is None or self.ratio is None:
            return (self.kernel, self.implementation, self.mode, "-", "-", "-", "-")
        return (
            self.kernel,
            self.implementation,
            self.mode,
            time_cell(self.time),
            f"{self.ratio:.2f}x",
            memory_cell(self.memory),
            "-" if self.error is None else f"{self.error:.1e}",
        )


@dataclass(frozen=True)
class _Run:
    """One implementation on one input: a call, and what it computed."""

    call: Call
    results: list[Tensor]


def check_names(names: Sequence[str]) -> list[Case]:
    """The named shapes, all of them for no names.

    Raises:
        InputError: an unknown name.
    """
    for name in names:
        if name not in CASES:
            raise InputError(f"unknown shape {name!r}: {nearest(name, CASES)}")
    return [CASES[name] for name in names or CASES]


def compare_kernels(
    names: Sequence[str] = (),
    *,
    batch: int = 1,
    repeats: int = 10,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Iterator[Measurement]:
    """Measure the named shapes, each forward alone and with its backward pass; see `Measurement`.

    Args:
        names: shapes of `CASES`; without names all that fit the device.
        batch: images.
        repeats: measured rounds.
        device: where to run.
        dtype: of the inputs.

    Raises:
        InputError: an unknown name.
    """
    device = torch.device(device)
    for case in check_names(names):
        if case.is_large and device.type == "cpu" and not names:
            reason = "left out: minutes and gigabytes on a CPU; name it to run it all the same"
            yield Measurement(case.name, "all", "forward", None, None, None, None, reason)
            continue
        for training in (False, True):
            yield from _measure(case, batch, repeats, device, dtype, training)


def _measure(
    case: Case, batch: int, repeats: int, device: torch.device, dtype: torch.dtype, training: bool
) -> Iterator[Measurement]:
    mode = "forward+backward" if training else "forward"
    inputs = case.inputs(batch, device, dtype, training)
    chosen = explain(case.ours, *inputs).backend
    expected = _expected(case, inputs, training)
    runs: dict[str, _Run] = {}
    reasons: dict[str, str] = {}
    for name, function in _functions(case, inputs):
        try:
            runs[name] = _prepare(function, inputs, training)
        # A peer may fail in its own way, and the table says how; ours have no reason to.
        except Exception as error:
            if name == f"ours: {chosen}":
                raise
            reasons[name] = f"{type(error).__name__}: {one_line(error)[:200]}"
    calls = {name: run.call for name, run in runs.items()}
    memory = {name: peak_memory(call, device) for name, call in calls.items()}
    timings = time_in_turn(calls, dict.fromkeys(calls, nullcontext), device, repeats)
    ours = timings[f"ours: {chosen}"].median
    for name, run in runs.items():
        error = _error(run.results, expected) if expected is not None else None
        time = timings[name]
        yield Measurement(case.name, name, mode, time, time.median / ours, memory[name], error, "")
    for name, reason in reasons.items():
        yield Measurement(case.name, name, mode, None, None, None, None, reason)


def _functions(case: Case, inputs: list[Tensor]) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """All implementations; each refuses by an exception when it is called."""
    for backend in reversed(BACKENDS):
        if backend == "reference" and case.pairs(inputs) > _MOST_PAIRS:
            continue

        def ours(*args: Tensor, backend: str = backend) -> Tensor:
            with use_backend(backend):
                return case.ours(*args)

        yield f"ours: {backend}", ours
    yield from peers_of(case, inputs).items()


def _prepare(function: Callable[..., Tensor], inputs: list[Tensor], training: bool) -> _Run:
    """Run once, so that what compiles has compiled."""
    generator = torch.Generator(inputs[0].device).manual_seed(1)

    def forward() -> list[Tensor]:
        with torch.inference_mode():
            return [function(*inputs)]

    def forward_and_backward() -> list[Tensor]:
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    shape = inputs[0].shape
    grad = torch.randn(shape, generator=generator, device=inputs[0].device).to(inputs[0].dtype)
    call = forward_and_backward if training else forward
    return _Run(call, call())


def _expected(case: Case, inputs: list[Tensor], training: bool) -> list[Tensor] | None:
    """The results of the reference in float32; where it is too large, of the PyTorch path."""
    exact = [x.detach().float().requires_grad_(x.requires_grad) for x in inputs]
    backend = "reference" if case.pairs(inputs) <= _MOST_PAIRS else "torch"

    def function(*args: Tensor) -> Tensor:
        with use_backend(backend):
            return case.ours(*args)

    return _prepare(function, exact, training).results


def _error(results: list[Tensor], expected: list[Tensor]) -> float:
    """The worst norm of a difference relative to the norm of what is expected."""
    pairs = ((ours.float(), theirs) for ours, theirs in zip(results, expected))
    return max(((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in pairs)


def page(rows: Sequence[Measurement]) -> Page:
    """Name the columns of these lines, and explain them."""
    cases = [CASES[name] for name in dict.fromkeys(row.kernel for row in rows)]
    notes = [f"{case.name}: {case.description}" for case in cases]
    notes += [
        f"{row.kernel}, {row.implementation}, {row.mode} did not run: {row.reason}"
        for row in rows
        if row.reason
    ]
    return Page(
        "Our kernels against their peers",
        ("kernel", "implementation", "mode", "time", "ratio", "memory", "error"),
        "All implementations of a kernel run in one process and in turn on the same inputs, views of one "
        "packed projection. Time: median, ± the difference of the quartiles. Ratio: time divided by that of "
        "the implementation of ours that runs unless forced. Memory: the most that PyTorch allocates at one "
        "time during the call. Error: norm of the difference from the reference divided by its norm, in "
        "training the worst of the output and all gradients, that of the bias included; it is large for "
        "dense attention to all pairs, which is another function and stands there for its time.",
        notes,
    )
