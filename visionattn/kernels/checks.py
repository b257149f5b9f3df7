"""Argument checks that every operator shares: one clear sentence before any work."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
_LAYOUT = "[B, H, W, heads, head_dim]"
_TURNED = "[B, heads, H, W, head_dim] is x.permute(0, 2, 3, 1, 4) here"
# More heads than any published network has; as many as columns, they are columns.
_USUAL_HEADS = 32


def check_tensor(operator: str, name: str, value: object, needed: object) -> None:
    """Check that an argument of an operator is a tensor at all.

    Raises:
        TypeError: it is not; the message says what is `needed`, a layout or a shape.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{operator}: {name} must be a tensor {needed}, got {type(value).__name__}")


def check_maps(name: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int]:
    """Check heads-last maps `[B, H, W, heads, d]`; returns the pixels of q, and those of k and v.

    Maps of k and v have one size, which may be another than that of q; the rest is the same in all.

    Raises:
        ValueError: what does not fit, and what was given.
    """
    for letter, t in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, letter, t, _LAYOUT)
        if t.dim() != 5:
            raise ValueError(f"{name}: {letter} must be {_LAYOUT}, got shape {tuple(t.shape)}{_hint(t)}")
        if (t.shape[0], *t.shape[3:]) != (q.shape[0], *q.shape[3:]):
            raise ValueError(
                f"{name}: {letter} has shape {tuple(t.shape)}, q has {tuple(q.shape)}; batch, heads and "
                "head_dim must be the same"
            )
        if t.device != q.device or t.dtype != q.dtype:
            raise ValueError(f"{name}: {letter} is {t.dtype} on {t.device}, q is {q.dtype} on {q.device}")
        if not all(t.shape[1:]):
            raise ValueError(f"{name}: only the batch may be empty, got shape {tuple(t.shape)}")
    if k.shape != v.shape:
        raise ValueError(f"{name}: v has shape {tuple(v.shape)}, k has {tuple(k.shape)}")
    if not torch.is_floating_point(q):
        raise ValueError(f"{name}: q, k and v must be of a floating-point dtype, got {q.dtype}")
    if q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"{name}: head_dim {q.shape[-1]} is above {MAX_HEAD_DIM}")
    if not torch.compiler.is_compiling() and q.shape[1] <= _USUAL_HEADS < q.shape[2] == q.shape[3]:
        warnings.warn(
            f"{name}: shape {tuple(q.shape)} means a map of {q.shape[1]}x{q.shape[2]} with {q.shape[3]} "
            f"heads; if it is heads-first, {_TURNED}",
            stacklevel=3,
        )
    return q.shape[1] * q.shape[2], k.shape[1] * k.shape[2]


def check_qkv(name: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int]:
    """Check heads-last maps `[B, H, W, heads, d]` of one shape, dtype and device; returns (H, W).

    Raises:
        ValueError: what does not fit, and what was given.
    """
    for letter, t in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, letter, t, _LAYOUT)
        if t.dim() == q.dim() == 5 and t.shape != q.shape:
            raise ValueError(f"{name}: {letter} has shape {tuple(t.shape)}, q has {tuple(q.shape)}")
    check_maps(name, q, k, v)
    return known(q.shape[1]), known(q.shape[2])


def known(side: int) -> int:
    """A side of a map as a number: while `torch.jit.trace` runs it is a tensor, which no geometry takes."""
    return int(side) if isinstance(side, Tensor) and torch.jit.is_tracing() else side


def check_weights(name: str, weights: Tensor, v: Tensor, keys: int) -> tuple[int, int]:
    """Check weights `[B, H, W, heads, keys]` and their values `[B, H, W, heads, d]`; returns (H, W).

    Raises:
        ValueError: what does not fit, and what was given.
    """
    if v.dim() != 5 or not all(v.shape[1:]):
        raise ValueError(f"{name}: v must be [B, H, W, heads, head_dim], got shape {tuple(v.shape)}")
    if tuple(weights.shape) != (*v.shape[:4], keys):
        raise ValueError(
            f"{name}: weights have shape {tuple(weights.shape)}; needed is {(*v.shape[:4], keys)}, a weight "
            "for each key of each pixel"
        )
    if weights.device != v.device or weights.dtype != v.dtype:
        raise ValueError(
            f"{name}: weights are {weights.dtype} on {weights.device}, v is {v.dtype} on {v.device}"
        )
    if not torch.is_floating_point(v):
        raise ValueError(f"{name}: weights and v must be of a floating-point dtype, got {v.dtype}")
    if v.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"{name}: head_dim {v.shape[-1]} is above {MAX_HEAD_DIM}")
    return v.shape[1], v.shape[2]


def check_bias(name: str, bias: Tensor, q: Tensor, table: tuple[int, ...], dense: tuple[int, ...]) -> None:
    """Check that a bias has the shape `table` or `dense` and goes with the queries.

    Raises:
        ValueError: what does not fit, and what was given.
    """
    check_tensor(name, "bias", bias, f"{table} or {dense}")
    if tuple(bias.shape) not in (table, dense):
        raise ValueError(
            f"{name}: bias has shape {tuple(bias.shape)}; needed is a relative table {table} "
            f"or a dense bias {dense}{_heads_hint(bias, q)}"
        )
    check_dense_bias(name, "bias", bias, tuple(bias.shape), q)


def check_dense_bias(operator: str, name: str, bias: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    """Check that a bias, called `name` by the operator, has this shape and goes with the queries.

    Raises:
        ValueError: what does not fit, and what was given.
    """
    check_tensor(operator, name, bias, shape)
    if tuple(bias.shape) != shape:
        raise ValueError(f"{operator}: {name} has shape {tuple(bias.shape)}; needed is {shape}")
    if bias.device != q.device:
        raise ValueError(f"{operator}: {name} is on {bias.device}, the queries are on {q.device}")
    if not torch.is_floating_point(bias):
        raise ValueError(f"{operator}: {name} must be of a floating-point dtype, got {bias.dtype}")


def pair(name: str, value: int | tuple[int, int], minimum: int = 1) -> tuple[int, int]:
    """`(y, x)` of one number for both axes or a pair.

    Raises:
        ValueError: not one or two integers of at least `minimum`.
    """
    both = tuple(map(known, value)) if isinstance(value, (tuple, list)) else (known(value),) * 2
    # Anything but integers is refused; under compilation a size may also be a symbol for one.
    if len(both) != 2 or not all(isinstance(n, (int, torch.SymInt)) and n >= minimum for n in both):
        raise ValueError(f"{name} must be one or two integers of at least {minimum}, got {value!r}")
    return both


def heads_first_hint(q: Tensor) -> str:
    """How heads-first queries are turned, where a map that is too low could be one of them."""
    return f"; if q is heads-first, {_TURNED}" if q.shape[1] < q.shape[2] == q.shape[3] else ""


def _hint(t: Tensor) -> str:
    """How tensors of other layouts become heads-last maps."""
    if t.dim() == 4:
        return "; a sequence [B, heads, N, head_dim] is x.transpose(1, 2)[:, None] here, a map of height 1"
    return ""


def _heads_hint(bias: Tensor, q: Tensor) -> str:
    """That the queries may be heads-first, where the bias has as many heads as they have rows."""
    if q.dim() == 5 and bias.dim() == 3 and q.shape[3] != bias.shape[0] == q.shape[1]:
        return f"; if q is heads-first, {_TURNED}"
    return ""
