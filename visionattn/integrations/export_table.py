"""The table of what exports: every family, format, and fixed or dynamic size, tried on this machine."""

from __future__ import annotations

import platform
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import timm
import torch

from visionattn.files import replacing
from visionattn.integrations.export import (
    FORMATS,
    Exported,
    ExportError,
    Format,
    Trace,
    check_libraries,
    trace_network,
    write_trace,
)
from visionattn.models.registry.variants import ENTRIES

# One network of every family and host, and of every pattern of attention.
NETWORKS = (
    "agent_cswin_tiny",
    "agent_deit_tiny",
    "agent_pvt_tiny",
    "agent_swin_tiny",
    "biformer_tiny",
    "care_s0",
    "catanet_x2",
    "cfsr_x2",
    "craft_x2",
    "dinat_mini",
    "fcaformer_l1",
    "efficientmod_xxs",
    "halonet_h0",
    "hat_s_x2",
    "hsdt_s",
    "hsdt_ssr",
    "inline_cswin_tiny",
    "inline_deit_tiny",
    "inline_pvt_tiny",
    "inline_swin_tiny",
    "l2vit_t",
    "nat_mini",
    "nat_isotropic_small",
    "ninformer_cifar10",
    "overlock_xt",
    "pmnet_small",
    "rgt_s_x2",
    "swin_vsa_t",
    "vitaev2_vsa_s",
    "smt_t",
)


@dataclass(frozen=True)
class Row:
    """The results of exporting one network in every way.

    Attributes:
        network: its registered name; what was exported has all its parts, and fewer blocks.
        results: for every format and dynamic or not: "yes" with the sizes that the file refuses, or the
            sentence that says why there is no file.
    """

    network: str
    results: dict[tuple[Format, bool], str]


def try_exports(names: Sequence[str] = NETWORKS, formats: Sequence[Format] = tuple(FORMATS)) -> Iterator[Row]:
    """Export networks in every way.

    Args:
        names: registered networks.
        formats: which ones.

    Raises:
        ValueError: a format whose libraries are not installed.
    """
    for format in formats:
        check_libraries(format)
    for name in names:
        network = timm.create_model(name, **shortened(name))
        # Large enough for the usual way through every network: no map is less than a window.
        side = 48 if hasattr(network, "info") else 256
        cfg: Any = network.pretrained_cfg
        size = cfg["input_size"][1:] if cfg["fixed_input_size"] else (side, side)
        results: dict[tuple[Format, bool], str] = {}
        for dynamic in (False, True):
            try:
                # One trace for all formats: it takes most of the time.
                trace = trace_network(network, size=size, dynamic=dynamic)
            except ExportError as error:
                results |= {(format, dynamic): str(error) for format in formats}
            else:
                results |= {(format, dynamic): _try_format(trace, format) for format in formats}
        yield Row(
            name, {(format, dynamic): results[format, dynamic] for format, dynamic in _columns(formats)}
        )


def _try_format(trace: Trace, format: Format) -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            return _cell(write_trace(trace, Path(folder, f"net{FORMATS[format]}"), format))
        except ExportError as error:
            return str(error)


def _columns(formats: Sequence[Format]) -> list[tuple[Format, bool]]:
    return [(format, dynamic) for format in formats for dynamic in (False, True)]


def shortened(name: str) -> dict[str, Any]:
    """Arguments that leave of a network two blocks per stage, and two groups of a restoration network.

    What can be exported is a matter of the parts, and tracing takes time in proportion to their number.
    """
    arguments = ENTRIES[name].arguments
    restores = "upscale" in arguments
    short: dict[str, Any] = {}
    if "depths" in arguments:
        depths = tuple(min(depth, 2) for depth in arguments["depths"])
        short["depths"] = depths[:2] if restores else depths
    if "sub_depths" in arguments:
        short["sub_depths"] = tuple(min(depth, 2) for depth in arguments["sub_depths"])
    short |= {key: 2 for key in ("deep_depth",) if key in arguments}
    per_block = ("patch_sizes", "num_centres", "group_sizes")
    short |= {key: arguments[key][:2] for key in per_block if key in arguments}
    return short if "downsample" in arguments or "depth" not in arguments else {**short, "depth": 2}


def read_table(path: str | Path) -> list[Row]:
    """The rows of a table that `write_table` wrote; none if there is no such file."""
    if not Path(path).is_file():
        return []
    text = Path(path).read_text(encoding="utf-8")
    reasons = dict(re.findall(r"^(\d+)\. (.+)$", text, re.MULTILINE))
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    if not lines:
        return []
    named: dict[str, Format] = {format: format for format in get_args(Format)}
    columns: list[tuple[Format, bool]] = [
        (named[head.split(", ")[0]], head.endswith("dynamic")) for head in lines[0][1:]
    ]
    rows = []
    for name, *cells in lines[2:]:
        numbers = [re.fullmatch(r"no \[(\d+)\]", cell) for cell in cells]
        results: list[str] = [reasons[n.group(1)] if n else cell for n, cell in zip(numbers, cells)]
        rows.append(Row(name.strip("`"), dict(zip(columns, results))))
    return rows


def write_table(rows: Sequence[Row], path: str | Path) -> None:
    """Write rows as Markdown, in the order of their names, with the reasons below.

    Args:
        rows: of `try_exports` or `read_table`; of several rows of one network the last counts.
        path: the file; replaced by a whole one.
    """
    columns = list(rows[0].results)
    head = ["network", *(f"{format}, {'dynamic' if dynamic else 'fixed'}" for format, dynamic in columns)]
    lines = [_line(head), _line(["---"] * len(head))]
    reasons: dict[str, int] = {}
    for name, row in sorted({row.network: row for row in rows}.items()):
        cells = (row.results[column] for column in columns)
        numbered = (
            cell if cell.startswith("yes") else f"no [{reasons.setdefault(cell, len(reasons) + 1)}]"
            for cell in cells
        )
        lines.append(_line([f"`{name}`", *numbered]))
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    text = _TEXT.format(
        table="\n".join(lines),
        notes="\n".join(notes) or "Everything exports.",
        versions=f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}",
    )
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def _cell(result: Exported) -> str:
    refused = ", ".join(f"{height}x{width}" for _, height, width in result.refused)
    return f"yes, not {refused}" if refused else "yes"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


_TEXT = """# What exports

`tools/export.py` writes three formats: a `torch.export` program (`program`), ONNX (`onnx`), and a package
compiled by AOTInductor (`aoti`). Every file is loaded again and compared with the network before it is kept,
dynamic ones at four sizes. "yes" means that all outputs were equal within 1e-4 of the largest; "not 128x128",
that the file refuses such a size, because the network takes another way there than at the size of the export.

{table}

{notes}

The networks have all their parts and their published width, and two blocks per stage. Made by
`python tools/export.py --table docs/export.md` with {versions}; with `--networks NAME ...` it makes these
rows anew and keeps the others.
"""
