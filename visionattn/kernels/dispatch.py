"""Which implementation of an operator runs, how to force one, and why.

An operator has a table of implementations: `reference` (the formula, the specification that the others are
tested against), `torch` (fast plain PyTorch, any device), `cpu` (kernels for CPUs) and `triton` (fused, CUDA
or ROCm); the last two where there are any. The choice is made per call from device, shape and dtype;
`use_backend` or the environment variable `VISIONATTN_BACKEND` forces one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ContextDecorator
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from importlib.util import find_spec
from threading import local
from typing import Any

import torch
from torch import Tensor

# Triton 3.2, which PyTorch 2.6 brings, cannot pass the records that the fused kernels take.
_HAS_RECORDS = torch.__version__ >= "2.7"

BACKENDS = ("reference", "torch", "cpu", "triton")

_forced: ContextVar[str | None] = ContextVar("visionattn_backend", default=None)
# How to leave the `use_backend` blocks that this thread is in, the innermost last.
_entered: ContextVar[tuple[Token[str | None], ...]] = ContextVar("visionattn_blocks", default=())
_explaining: ContextVar[bool] = ContextVar("visionattn_explaining", default=False)


class _Forced:
    """Reads `_forced` through a property of C, which Dynamo calls and guards (torch 2.6 to 2.15).

    So a compiled program is used only under the choice that it was compiled under. Where nothing is forced,
    the property is this object itself: `ContextVar.get` takes it for its default.
    """

    backend = property(_forced.get)


class _Traced(local):
    """The choice of a `use_backend` block inside a compiled function, where no `ContextVar` can be set."""

    def __init__(self) -> None:
        self.backend: str | None = None


_FORCED, _TRACED = _Forced(), _Traced()


@dataclass(frozen=True)
class Operator:
    """The implementations of one operator; all take the same arguments, a tensor first.

    Attributes:
        name: what error messages call it.
        implementations: one function per backend; `reference` and `torch` always.
        refusals: per backend, says why it cannot take these arguments, or None where it can.
        stand_ins: what runs in place of a forced backend that the operator lacks.
        drawbacks: per backend, says why it is not chosen unless it is forced, or None where it is.
    """

    name: str
    implementations: Mapping[str, Callable[..., Any]]
    refusals: Mapping[str, Callable[..., str | None]] = field(default_factory=dict)
    stand_ins: Mapping[str, str] = field(default_factory=dict)
    drawbacks: Mapping[str, Callable[..., str | None]] = field(default_factory=dict)

    def __call__(self, *args: Any) -> Any:
        """Run the implementation that `choose` names."""
        backend, reason = choose(self, *args)
        if not torch.compiler.is_compiling() and _explaining.get():
            raise _Explained(Choice(self.name, backend, reason))
        return self.implementations[backend](*args)


@dataclass(frozen=True)
class Choice:
    """The answer of `explain`: which implementation runs, and why."""

    operator: str
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operator}: {self.backend} ({self.reason})"


class _Explained(Exception):
    """Carries a `Choice` out of a call that is not to be run."""


def choose(operator: Operator, *args: Any) -> tuple[str, str]:
    """The implementation for these arguments and the reason.

    Raises:
        ValueError: a forced implementation does not exist or cannot take the arguments.
    """
    forced = _forced_backend()
    if forced is not None:
        return _forced_choice(operator, forced, *args)
    reasons = ""
    for backend, reason in (("triton", "fused kernel available"), ("cpu", "kernel for CPUs available")):
        if backend in operator.implementations:
            refusal = _refusal(operator, backend, *args)
            if refusal is None and backend in operator.drawbacks:
                refusal = operator.drawbacks[backend](*args)
            if refusal is None:
                return backend, reason
            reasons += f"; not {backend}: {refusal}" if reasons else f"not {backend}: {refusal}"
    return "torch", reasons


def _forced_choice(operator: Operator, forced: str, *args: Any) -> tuple[str, str]:
    if forced not in operator.implementations and forced in operator.stand_ins:
        return operator.stand_ins[forced], f"forced {forced}, for which it stands in"
    refusal = _refusal(operator, forced, *args)
    if refusal:
        raise ValueError(f"{operator.name} cannot run on {forced}: {refusal}")
    return forced, "forced"


def _forced_backend() -> str | None:
    if torch.compiler.is_compiling() and _TRACED.backend is not None:
        return _TRACED.backend
    backend = _FORCED.backend
    if isinstance(backend, str):
        return backend
    return _checked(os.environ.get("VISIONATTN_BACKEND"), "VISIONATTN_BACKEND") or None


def _refusal(operator: Operator, backend: str, x: Tensor, *args: Any) -> str | None:
    if backend not in operator.implementations:
        return f"it has no {backend} implementation"
    if backend == "cpu" and x.device.type != "cpu":
        return f"the tensors are on {x.device.type}"
    if backend == "triton" and x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {x.device.type}"
    if backend == "triton" and find_spec("triton") is None:
        return "Triton is not installed"
    if backend == "triton" and not _HAS_RECORDS:
        return "the Triton of PyTorch 2.6 is too old; the fused kernels need PyTorch 2.7"
    refuses = operator.refusals.get(backend)
    return refuses and refuses(x, *args)


def _checked(name: str | None, where: str) -> str | None:
    if name and name not in BACKENDS:
        raise ValueError(f"{where}={name!r} is no implementation; choose one of {', '.join(BACKENDS)}")
    return name


class use_backend(ContextDecorator):
    """Force one implementation for every operator called inside the `with` block, in this thread.

    Operators for which no such implementation would make sense run what stands in for it: matrix products
    under `"triton"` are PyTorch's.

    Args:
        name: `"reference"`, `"torch"`, `"cpu"` or `"triton"`.

    Raises:
        ValueError: an unknown name; and, at the call of an operator, an implementation that it lacks or that
            cannot take the arguments, with the reason.
    """

    def __init__(self, name: str):
        _checked(name, "backend")
        self.name = name
        self._traced: list[str | None] = []

    def _recreate_cm(self) -> use_backend:
        """A block of its own for every call of a decorated function, whatever its thread."""
        return use_backend(self.name)

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():
            self._traced.append(_TRACED.backend)
            _TRACED.backend = self.name
        else:
            _entered.set((*_entered.get(), _forced.set(self.name)))

    def __exit__(self, *error: object) -> None:
        if torch.compiler.is_compiling():
            _TRACED.backend = self._traced.pop()
        else:
            *outer, token = _entered.get()
            _forced.reset(token)
            _entered.set(tuple(outer))


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """Say which implementation a call of a public kernel function would run, and why, without running it.

    Example:
        >>> print(explain(window_attention, q, k, v, 7))
        local_attention: torch (not triton: the tensors are on cpu)

    Raises:
        ValueError: what the call itself would raise for bad arguments.
    """
    token = _explaining.set(True)
    try:
        function(*args, **kwargs)
    except _Explained as explained:
        return explained.args[0]
    finally:
        _explaining.reset(token)
    raise TypeError(f"{function!r} is not a function of visionattn.kernels")
