"""The list of registered networks with their task, size, cost, licence and official result."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from visionattn.errors import InputError, nearest
from visionattn.kernels import use_backend
from visionattn.models.registry.variants import ENTRIES


@dataclass(frozen=True)
class ModelFacts:
    """One line of the list.

    Attributes:
        name: what `timm.create_model` takes.
        task: what the network does.
        params: learnable parameters.
        gmacs: multiply-adds of one forward pass at `input`, in 10⁹; attention products included.
        input: channels, height and width of the input that `gmacs` and `result` are for.
        license: licence of the official weights.
        result: what the authors report for those weights, "" where they report nothing.
    """

    name: str
    task: str
    params: int
    gmacs: float
    input: tuple[int, int, int]
    license: str
    result: str


SORT_KEYS = tuple(field.name for field in fields(ModelFacts))


def model_names(filter: str = "") -> list[str]:
    """Names of the networks that this library registers with timm.

    Args:
        filter: a shell pattern such as `hat_*`, or a part of the names; "" for all.

    Raises:
        InputError: no name matches; the message says which are near.
    """
    names = [name for name in timm.list_models() if name in ENTRIES]
    pattern = filter if any(sign in filter for sign in "*?[") else f"*{filter}*"
    found = fnmatch.filter(names, pattern)
    if not found:
        raise InputError(f"no network matches {filter!r}: {nearest(filter, names)}")
    return found


def list_models(filter: str = "", sort: str = "name") -> list[ModelFacts]:
    """The facts of the networks that `model_names(filter)` names.

    Args:
        filter: as `model_names` takes it.
        sort: one of `SORT_KEYS`.

    Raises:
        InputError: no name matches, or there is no such column.
    """
    if sort not in SORT_KEYS:
        raise InputError(f"cannot sort by {sort!r}: {nearest(sort, SORT_KEYS)}")
    return sorted((model_facts(name) for name in model_names(filter)), key=lambda facts: getattr(facts, sort))


def model_facts(name: str) -> ModelFacts:
    """The facts of one network; it is built without memory for its weights."""
    net: Any = timm.create_model(name, device="meta").eval()
    cfg: dict[str, Any] = net.pretrained_cfg
    return ModelFacts(
        name=name,
        task=net.info.task if hasattr(net, "info") else "classification",
        params=sum(p.numel() for p in net.parameters()),
        gmacs=count_macs(net, (1, *cfg["input_size"])) / 1e9,
        input=tuple(cfg["input_size"]),
        license=cfg.get("license") or "",
        result="; ".join(cfg.get("notes") or ()),
    )


def count_macs(net: nn.Module, shape: Sequence[int]) -> int:
    """Multiply-adds of convolutions and matrix products for a network on the meta device.

    Attention is counted as the plain PyTorch implementation computes it, whichever runs: a window that the
    border cuts counts for what is left of it, so shifted windows cost a little less than in publications.
    """
    # Fused attention would hide its products from the counter.
    with use_backend("torch"), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        counter = FlopCounterMode(display=False)
        with counter:
            net(torch.empty(*shape, device="meta"))
    return counter.get_total_flops() // 2


def format_table(rows: Sequence[ModelFacts]) -> str:
    """The facts as aligned text, one network a line."""
    cells = [("network", "task", "parameters", "GMACs", "input", "licence", "official result")]
    for row in rows:
        size = "x".join(str(n) for n in row.input)
        cells.append(
            (
                row.name,
                row.task,
                f"{row.params / 1e6:.1f} M",
                f"{row.gmacs:.1f}",
                size,
                row.license,
                row.result,
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells)]
    right = {2, 3}
    lines = (
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths)))
        for line in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def as_json(rows: Sequence[ModelFacts]) -> list[dict[str, Any]]:
    """The facts as plain values."""
    return [asdict(row) for row in rows]
