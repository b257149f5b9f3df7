"""The ways through a map: in which order the heads of a recurrent operator meet its pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Order = Literal["row", "row-reversed", "column", "column-reversed"]
ORDERS = get_args(Order)


def check_order(name: str, order: Order | Sequence[Order], heads: int) -> tuple[Order, ...]:
    """One order per head.

    Raises:
        ValueError: an unknown order, or not one for all heads or one for each.
    """
    orders: tuple[Any, ...] = (order,) * heads if isinstance(order, str) else tuple(order)
    unknown = next((o for o in orders if o not in ORDERS), None)
    if unknown is not None:
        raise ValueError(f"{name}: order={unknown!r} is unknown; choose one of {', '.join(ORDERS)}")
    if len(orders) != heads:
        raise ValueError(f"{name}: order names {len(orders)} orders for {heads} heads")
    return orders


def as_text(orders: Sequence[str]) -> str:
    """The orders as an argument of an operator of PyTorch; `as_orders` is the inverse."""
    return ",".join(orders)


def as_orders(text: str) -> tuple[str, ...]:
    """The inverse of `as_text`."""
    return tuple(text.split(","))


def runs(orders: Sequence[str]) -> list[tuple[int, int, str]]:
    """Neighbouring heads of one order: the first, the one behind the last, and the order."""
    borders = [i for i in range(len(orders)) if i == 0 or orders[i] != orders[i - 1]]
    return [(a, b, orders[a]) for a, b in zip(borders, [*borders[1:], len(orders)])]


def pixels(height: int, width: int, order: str, device: torch.device) -> Tensor:
    """The numbers of the pixels, `y * width + x`, in the order in which they are met; `[height * width]`."""
    index = torch.arange(height * width, device=device).view(height, width)
    index = (index.mT if order.startswith("column") else index).flatten()
    return index.flip(0) if order.endswith("-reversed") else index


def to_sequences(x: Tensor, orders: Sequence[str]) -> Tensor:
    """The pixels of `[B, H, W, heads, ...]` in the order of each head, `[B, L, heads, ...]`."""
    height, width = x.shape[1:3]
    flat = x.flatten(1, 2)
    parts = [
        flat[:, :, a:b] if order == "row" else flat[:, pixels(height, width, order, x.device), a:b]
        for a, b, order in runs(orders)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def to_map(x: Tensor, orders: Sequence[str], height: int, width: int) -> Tensor:
    """The inverse of `to_sequences`, contiguous."""
    parts = []
    for a, b, order in runs(orders):
        index = None if order == "row" else pixels(height, width, order, x.device).argsort()
        parts.append(x[:, :, a:b] if index is None else x[:, index, a:b])
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
    return whole.unflatten(1, (height, width)).contiguous()


def line_by_line(
    function: Callable[..., Tensor],
    maps: Sequence[Tensor | None],
    per_head: Sequence[Tensor | None],
    orders: Sequence[str],
    *numbers: Any,
) -> Tensor:
    """`function(*maps, *per_head, orders, *numbers)` with a zero state at every new row, or column.

    Every line is an image of height 1 then. Heads that go along rows and heads that go along columns are two
    calls.
    """
    batch, height, width = next(x for x in maps if x is not None).shape[:3]
    outs, places = [], []
    for kind in ("row", "column"):
        heads = [i for i, order in enumerate(orders) if order.startswith(kind)]
        if not heads:
            continue
        chosen: Any = slice(None) if len(heads) == len(orders) else heads
        own = [None if x is None else x.expand(batch, height, width, -1, -1)[:, :, :, chosen] for x in maps]
        lines = [x.transpose(1, 2) if x is not None and kind == "column" else x for x in own]
        images = [None if x is None else x.flatten(0, 1).unsqueeze(1) for x in lines]
        along = tuple(orders[i].replace("column", "row") for i in heads)
        out = function(*images, *(None if x is None else x[chosen] for x in per_head), along, *numbers)
        out = out.squeeze(1).unflatten(0, (batch, -1 if batch else height if kind == "row" else width))
        outs.append(out.transpose(1, 2) if kind == "column" else out)
        places += heads
    if len(outs) == 1:
        return outs[0].contiguous()
    order = sorted(range(len(places)), key=places.__getitem__)
    return torch.cat(outs, 3)[:, :, :, order].contiguous()
