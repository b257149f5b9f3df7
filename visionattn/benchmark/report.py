"""Benchmark results as a table, as JSON and as a page to read, with machine, date and versions."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from visionattn.engine.run_folder import replacing

from .measure import clock_name
from .models import Comparison

_COLUMNS = (
    "network",
    "input",
    "mode",
    "ours",
    "authors",
    "ratio",
    "our memory",
    "authors' memory",
    "difference",
)


def conditions(device: torch.device) -> dict[str, str]:
    """On what, when and with which versions a measurement was made."""
    return {
        "machine": _machine(device),
        "threads": str(torch.get_num_threads()),
        "clock": clock_name(device),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("visionattn", "torch", "timm"))
        + f", Python {platform.python_version()}",
    }


def table(rows: Sequence[Comparison]) -> str:
    """The comparisons as a Markdown table, aligned so that it also reads well in a terminal."""
    cells = [_COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def save(rows: Sequence[Comparison], facts: dict[str, str], path: Path, command: str) -> None:
    """Write the results to `path` as JSON and beside it, with the ending `.md`, to read.

    Args:
        rows: the comparisons.
        facts: what `conditions` said.
        path: the JSON file; an existing one is replaced.
        command: the command line that gave these numbers.
    """
    content: dict[str, Any] = {"command": command, **facts, "results": [asdict(row) for row in rows]}
    page = [
        "# Our kernels against the authors' formulation",
        f"`{command}`",
        "\n".join(f"- {name}: {fact}" for name, fact in facts.items()),
        table(rows),
        "Both run in one process and in turn, in the same network with the same weights. Time: median, ± the "
        "difference of the quartiles. Ratio: time of the authors' formulation divided by ours. Memory: the "
        "most that PyTorch allocates at one time during the pass, weights and input not counted. Difference: "
        "largest difference of the outputs, relative to the largest output.",
        "\n".join(f"- {name}: {what}" for name, what in sorted({(r.network, r.formulation) for r in rows})),
    ]
    for file, text in (
        (path, json.dumps(content, indent=2) + "\n"),
        (path.with_suffix(".md"), "\n\n".join(page) + "\n"),
    ):
        with replacing(file) as beside:
            beside.write_text(text, encoding="utf-8")


def _cells(row: Comparison) -> tuple[str, ...]:
    return (
        row.network,
        "x".join(map(str, row.input)),
        row.mode,
        *(f"{t.median * 1e3:.1f} ms ± {t.spread:.0%}" for t in (row.ours, row.authors)),
        f"{row.ratio:.2f}x",
        *("-" if n is None else f"{n / 2**20:.0f} MiB" for n in (row.our_memory, row.authors_memory)),
        f"{row.difference:.1e}",
    )


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"
