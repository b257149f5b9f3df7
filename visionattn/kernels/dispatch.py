"""Which implementation of an operator runs, how to force one, and why.

Every operator has up to three implementations: `reference` (the formula, the specification that the others
are tested against), `torch` (fast plain PyTorch, any device) and `triton` (fused, CUDA or ROCm). The choice
is made per call from device, shape and dtype; `use_backend` or the environment variable `VISIONATTN_BACKEND`
forces one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from torch import Tensor

BACKENDS = ("reference", "torch", "triton")

_forced: str | None = None
_explaining = False


@dataclass(frozen=True)
class Operator:
    """The implementations of one operator; all take the same arguments, the query first.

    Attributes:
        name: what error messages call it.
        reference: the formula.
        torch: fast plain PyTorch.
        triton: the fused kernels, or None where there are none; imports Triton only when called.
        triton_refuses: says why the fused kernels cannot take these arguments, or None where they can.
    """

    name: str
    reference: Callable[..., Any]
    torch: Callable[..., Any]
    triton: Callable[..., Any] | None = None
    triton_refuses: Callable[..., str | None] = lambda *args: None

    def __call__(self, *args: Any) -> Any:
        """Run the implementation that `choose` names."""
        backend, reason = choose(self, *args)
        if _explaining:
            raise _Explained(Choice(self.name, backend, reason))
        return getattr(self, backend)(*args)


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
    forced = _forced or _checked(os.environ.get("VISIONATTN_BACKEND"), "VISIONATTN_BACKEND")
    refusal = _refusal(operator, *args)
    if forced == "triton" and refusal:
        raise ValueError(f"{operator.name} cannot run on triton: {refusal}")
    if forced:
        return forced, "forced"
    return ("torch", f"not triton: {refusal}") if refusal else ("triton", "fused kernel available")


def _refusal(operator: Operator, query: Tensor, *args: Any) -> str | None:
    if operator.triton is None:
        return "it has no Triton implementation"
    if query.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {query.device.type}"
    if find_spec("triton") is None:
        return "Triton is not installed"
    return operator.triton_refuses(query, *args)


def _checked(name: str | None, where: str) -> str | None:
    if name and name not in BACKENDS:
        raise ValueError(f"{where}={name!r} is no implementation; choose one of {', '.join(BACKENDS)}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one implementation for every operator called inside the `with` block.

    Args:
        name: `"reference"`, `"torch"` or `"triton"`.

    Raises:
        ValueError: an unknown name; and, at the call of an operator, an implementation that cannot take the
            arguments, with the reason.
    """
    global _forced
    previous, _forced = _forced, _checked(name, "backend")
    try:
        yield
    finally:
        _forced = previous


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """Say which implementation a call of a public kernel function would run, and why, without running it.

    Example:
        >>> print(explain(window_attention, q, k, v, 7))
        local_attention: torch (not triton: the tensors are on cpu)

    Raises:
        ValueError: what the call itself would raise for bad arguments.
    """
    global _explaining
    _explaining = True
    try:
        function(*args, **kwargs)
    except _Explained as explained:
        return explained.args[0]
    finally:
        _explaining = False
    raise TypeError(f"{function!r} is not a function of visionattn.kernels")
