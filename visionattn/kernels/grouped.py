"""Queries and keys of unlike numbers of heads, for every operator of heads that stand alone.

Grouped queries (GQA, https://arxiv.org/abs/2305.13245) share the heads of keys and values; fewer query heads
(SQA, https://arxiv.org/abs/2510.01817) are shared by those of the keys. Head h of the more goes with head
`h // n` of the fewer, n being how many times more they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def grouped_heads(**axes: int) -> Callable[[Function], Function]:
    """Let a function of q, k and v, `[B, H, W, heads, d]` each, take unlike numbers of heads.

    It is called once for every member of a group, with views of the maps: nothing is repeated. The result
    has the larger number of heads.

    Args:
        axes: of every other argument that has heads, its axis of heads. There the argument has as many as
            the queries, as the keys, or 1.
    """

    def decorate(function: Function) -> Function:
        names = list(inspect.signature(function).parameters)[3:]

        @wraps(function)
        def call(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not all(isinstance(x, Tensor) for x in (q, k, v)):
                return function(q, k, v, *args, **kwargs)  # which refuses them
            if q.dim() != 5 or k.dim() != 5 or k.shape != v.shape or q.shape[3] == k.shape[3]:
                return function(q, k, v, *args, **kwargs)
            few, many = _head_counts(function.__name__, q, k)
            given = {**dict(zip(names, args)), **kwargs}
            for name, axis in axes.items():
                _check_heads(function.__name__, name, given.get(name), axis, (1, few, many))

            def member(x: Any, axis: int, i: int) -> Any:
                if isinstance(x, tuple):
                    return type(x)(*(member(part, axis, i) for part in x))
                if x is None or x.shape[axis] != many:
                    return x
                return x.unflatten(axis, (few, -1)).select(axis + 1, i)

            results = []
            for i in range(many // few):
                own = {name: member(x, axes[name], i) if name in axes else x for name, x in given.items()}
                results.append(function(*(member(x, 3, i) for x in (q, k, v)), **own))
            if isinstance(results[0], Tensor):
                return torch.stack(results, 4).flatten(3, 4)
            return tuple(torch.stack(parts, 4).flatten(3, 4) for parts in zip(*results))

        return call  # type: ignore[return-value]

    return decorate


def _head_counts(function: str, q: Tensor, k: Tensor) -> tuple[int, int]:
    """The smaller and the larger number of heads."""
    few, many = min(q.shape[3], k.shape[3]), max(q.shape[3], k.shape[3])
    if not few or many % few:
        raise ValueError(
            f"{function}: q has {q.shape[3]} heads, k has {k.shape[3]}; one number must be a multiple of the "
            "other"
        )
    return few, many


def _check_heads(function: str, name: str, x: Any, axis: int, allowed: tuple[int, ...]) -> None:
    for part in x if isinstance(x, tuple) else (x,):
        if part is not None and (part.dim() <= axis or part.shape[axis] not in allowed):
            raise ValueError(
                f"{function}: {name} has shape {tuple(part.shape)}; its axis {axis} must have one of "
                f"{', '.join(map(str, allowed))} heads"
            )
