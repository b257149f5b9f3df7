"""Running a network within a budget of memory, with the same result."""

from __future__ import annotations

import re

from torch import Tensor, nn

from visionattn.inference.rehearsal import perform, rehearse, without_data

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_bytes(size: str | int) -> int:
    """A number of bytes from `"2GB"`, `"1.5 GiB"`, `"512MiB"`, `"800M"` or a plain number.

    Raises:
        ValueError: anything else.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    parts = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?)?B?\s*", str(size).upper())
    number = float(parts[1]) * _UNITS[parts[2] or ""] if parts else 0
    if number < 1:
        raise ValueError(f"a size in bytes reads 2GB, 512MiB or 1000000, but {size!r} was given")
    return int(number)


def format_bytes(size: int) -> str:
    """A number of bytes in MB or GB, rounded up: as a budget it is not too small."""
    unit, name = (10**9, "GB") if size >= 10**9 else (10**6, "MB")
    return f"{-(-100 * size // unit) / 100:g}{name}"


def run_within(net: nn.Module, x: Tensor, memory_budget: str | int) -> Tensor:
    """`net(x)` without gradients, computed in bands of rows where it would otherwise need too much memory.

    The budget is for the tensors that exist at one time beside the input and the weights: features that a
    later layer needs in full, the output, and what layers hold in between, which is computed in bands as
    large as the rest allows. What libraries take for themselves is not known and not counted.

    Args:
        net: a restoration network of this library, in evaluation mode.
        x: images `[B, C, H, W]`.
        memory_budget: bytes, as `parse_bytes` takes them.

    Raises:
        ValueError: the budget cannot be read, or is too small; the message says the smallest. Or the network
            is in training mode.
    """
    budget = parse_bytes(memory_budget)
    if net.training:
        raise ValueError("a memory budget is for inference: call eval() on the network first")
    twin, image = without_data(net), x.detach().to("meta")
    heights, needed = rehearse(lambda: twin(image), budget)
    if needed > budget:
        raise ValueError(
            f"a memory budget of {format_bytes(budget)} is too small for images of {tuple(x.shape)}: "
            f"this network needs at least {format_bytes(needed)}"
        )
    with perform(heights):
        return net(x)
