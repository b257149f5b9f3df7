"""The table of what exports: every family, format, and fixed or dynamic size, tried on this machine."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

from visionattn.checkpoints.identify import families
from visionattn.checkpoints.loading import replacing_whole

from .export import FORMATS, Exported, ExportError, Format, export_network


@dataclass(frozen=True)
class Row:
    """What became of one network.

    Attributes:
        network: its registered name; what was exported has all its parts, and fewer blocks.
        results: for every format and dynamic or not: the export, or the reason why there is none.
    """

    network: str
    results: dict[tuple[Format, bool], Exported | str]


def try_exports(names: Sequence[str] = (), formats: Sequence[Format] = tuple(FORMATS)) -> Iterator[Row]:
    """Export networks in every way.

    Args:
        names: registered networks; by default one of every family and host.
        formats: which ones.

    Raises:
        ValueError: a format whose libraries are not installed.
    """
    for name in names or families():
        network = timm.create_model(name, **shortened(name))
        large = 48 if hasattr(network, "info") else 256
        results: dict[tuple[Format, bool], Exported | str] = {}
        with tempfile.TemporaryDirectory() as folder:
            for format in formats:
                for dynamic in (False, True):
                    path = Path(folder) / f"{name}{FORMATS[format]}"
                    # Large enough for the usual way through every network: no map is less than a window.
                    size = (large, large)
                    try:
                        results[format, dynamic] = export_network(
                            network, path, format, size=size, dynamic=dynamic
                        )
                    except ExportError as error:
                        results[format, dynamic] = str(error)
        yield Row(name, results)


def shortened(name: str) -> dict[str, Any]:
    """Arguments that leave of a network two blocks per stage, and two groups of a restoration network.

    What can be exported is a matter of the parts, and tracing takes time in proportion to their number.
    """
    arguments = timm.model_entrypoint(name)(describe=True).arguments
    restores = "upscale" in arguments
    short: dict[str, Any] = {}
    if "depths" in arguments:
        depths = tuple(min(depth, 2) for depth in arguments["depths"])
        short["depths"] = depths[:2] if restores else depths
    short |= {key: 2 for key in ("deep_depth",) if key in arguments}
    per_block = ("patch_sizes", "num_centres", "group_sizes")
    short |= {key: arguments[key][:2] for key in per_block if key in arguments}
    return short if "downsample" in arguments or "depth" not in arguments else {**short, "depth": 2}


def write_table(rows: Sequence[Row], path: str | Path, command: str) -> None:
    """Write rows as Markdown, with the reasons below and how the table was made.

    Args:
        rows: of `try_exports`.
        path: the file; replaced by a whole one.
        command: what made it.
    """
    columns = list(rows[0].results)
    head = ["network", *(f"{format}, {'dynamic' if dynamic else 'fixed'}" for format, dynamic in columns)]
    lines = [_line(head), _line(["---"] * len(head))]
    reasons: dict[str, int] = {}
    for row in rows:
        cells = (_cell(row.results[column], reasons) for column in columns)
        lines.append(_line([f"`{row.network}`", *cells]))
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    text = _TEXT.format(
        table="\n".join(lines),
        notes="\n".join(notes) or "Everything exports.",
        command=command,
        versions=f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}",
    )
    with replacing_whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


def _cell(result: Exported | str, reasons: dict[str, int]) -> str:
    if isinstance(result, str):
        return f"no [{reasons.setdefault(result, len(reasons) + 1)}]"
    if not result.refused:
        return "yes"
    smaller = ", ".join(f"{height}x{width}" for _, height, width in result.refused)
    return f"yes, not {smaller}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


_TEXT = """# What exports

`tools/export.py` writes three formats: a `torch.export` program (`program`), ONNX (`onnx`), and a package
compiled by AOTInductor (`aoti`). Every file is loaded again and compared with the network before it is kept,
dynamic ones at four sizes. "yes" means that all outputs were equal within 1e-4 of the largest; "not 128x128",
that the file refuses such a size, because the network takes another way there than at the size of the export.

{table}

{notes}

The networks have all their parts, and two blocks per stage. Made by `{command}` with {versions}.
"""
