"""Argument checks that every operator shares: one clear sentence before any work."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_HEAD_DIM = 256


def check_qkv(name: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int]:
    """Check heads-last maps `[B, H, W, heads, d]` of one shape, dtype and device; returns (H, W).

    Raises:
        ValueError: what does not fit, and what was given.
    """
    for letter, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 5:
            raise ValueError(
                f"{name}: {letter} must be [B, H, W, heads, head_dim], got shape {tuple(t.shape)}"
            )
        if t.shape != q.shape:
            raise ValueError(f"{name}: {letter} has shape {tuple(t.shape)}, q has {tuple(q.shape)}")
        if t.device != q.device or t.dtype != q.dtype:
            raise ValueError(f"{name}: {letter} is {t.dtype} on {t.device}, q is {q.dtype} on {q.device}")
    if not all(q.shape[1:]):
        raise ValueError(f"{name}: only the batch may be empty, got shape {tuple(q.shape)}")
    if not torch.is_floating_point(q):
        raise ValueError(f"{name}: q, k and v must be of a floating-point dtype, got {q.dtype}")
    if q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"{name}: head_dim {q.shape[-1]} is above {MAX_HEAD_DIM}")
    return q.shape[1], q.shape[2]


def check_bias(name: str, bias: Tensor, q: Tensor, table: tuple[int, ...], dense: tuple[int, ...]) -> None:
    """Check that a bias has the shape `table` or `dense` and goes with the queries.

    Raises:
        ValueError: what does not fit, and what was given.
    """
    if tuple(bias.shape) not in (table, dense):
        raise ValueError(
            f"{name}: bias has shape {tuple(bias.shape)}; needed is a relative table {table} "
            f"or a dense bias {dense}"
        )
    if bias.device != q.device:
        raise ValueError(f"{name}: bias is on {bias.device}, the queries are on {q.device}")
    if not torch.is_floating_point(bias):
        raise ValueError(f"{name}: bias must be of a floating-point dtype, got {bias.dtype}")


def pair(name: str, value: int | tuple[int, int], minimum: int = 1) -> tuple[int, int]:
    """`(y, x)` of one number for both axes or a pair.

    Raises:
        ValueError: not one or two integers of at least `minimum`.
    """
    both = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    # Anything but integers is refused; under compilation a size may also be a symbol for one.
    if len(both) != 2 or not all(isinstance(n, (int, torch.SymInt)) and n >= minimum for n in both):
        raise ValueError(f"{name} must be one or two integers of at least {minimum}, got {value!r}")
    return both
