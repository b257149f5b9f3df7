"""Benchmark results as a table, as JSON and as a page to read, with machine, date and versions."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.measure import Timing, clock_name
from visionattn.files import replacing


class Row(Protocol):
    """One line of results: a dataclass that also writes itself under the columns of its page."""

    def cells(self) -> tuple[str, ...]:
        """The line as text."""
        ...


@dataclass(frozen=True)
class Page:
    """The title, columns and explanations around the lines of one kind of benchmark.

    Attributes:
        title: the heading of the page.
        columns: the heading of each column.
        explanation: the meaning of the columns.
        notes: lines about these results.
    """

    title: str
    columns: tuple[str, ...]
    explanation: str
    notes: Sequence[str] = field(default=())


def conditions(device: torch.device) -> dict[str, str]:
    """On what, when and with which versions a measurement was made."""
    return {
        "machine": _machine(device),
        "threads": str(torch.get_num_threads()),
        "clock": clock_name(device),
        "pages": "large" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "as Linux hands them out",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("visionattn", "torch", "timm"))
        + f", Python {platform.python_version()}",
    }


def table(columns: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> str:
    """Lines as a Markdown table, aligned so that it also reads well in a terminal."""
    cells = [columns, *lines]
    widths = [max(map(len, column)) for column in zip(*cells)]
    rows = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in cells]
    rows.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(rows)


def notes(page: Page) -> str:
    """The notes of a page as a list."""
    return "\n".join(f"- {note}" for note in page.notes)


def save(page: Page, rows: Sequence[Row], facts: dict[str, str], path: Path, command: str) -> None:
    """Write the results to `path` as JSON and beside it, with the ending `.md`, to read.

    Args:
        page: title, columns and explanations.
        rows: the results, dataclasses.
        facts: the machine and versions, as `conditions` gives them.
        path: the JSON file; an existing one is replaced.
        command: the command line that gave these numbers.
    """
    results: list[Any] = [asdict(row) for row in rows]  # pyright: ignore[reportArgumentType]
    content = {"command": command, **facts, "results": results}
    text = [
        f"# {page.title}",
        f"`{command}`",
        "\n".join(f"- {name}: {fact}" for name, fact in facts.items()),
        table(page.columns, [row.cells() for row in rows]),
        page.explanation,
        notes(page),
    ]
    for file, written in (
        (path, json.dumps(content, indent=2) + "\n"),
        (path.with_suffix(".md"), "\n\n".join(filter(None, text)) + "\n"),
    ):
        with replacing(file) as beside:
            beside.write_text(written, encoding="utf-8")


def time_cell(timing: Timing) -> str:
    """Median and spread."""
    return f"{timing.median * 1e3:.1f} ms ± {timing.spread:.0%}"


def memory_cell(size: int | None) -> str:
    """Bytes in MiB."""
    if size is None:
        return "-"
    return f"{size / 2**20:.0f} MiB" if size >= 10 * 2**20 else f"{size / 2**20:.1f} MiB"


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"
