"""The commands of `tools/benchmark.py`; their arguments are its options."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import kernels, memory, models, report, scaling, simulation
from visionattn.engine.yaml_io import parse_pairs
from visionattn.errors import InputError, as_input_error


def compare_models(
    names: Sequence[str],
    size: Sequence[int] | None,
    train: bool,
    batch: int,
    threads: int,
    repeats: int,
    device: str | None,
    output: Path | None,
) -> None:
    """Networks against the authors' formulation; prints and saves a table."""
    where = _prepare(threads, device)
    rows = models.compare_models(
        names,
        size=(size[0], size[1]) if size else None,
        batch=batch,
        repeats=repeats,
        train=train,
        device=where,
    )
    name = f"models_{where.type}{'_train' if train else ''}"
    _run(rows, models.page, where, output or Path("benchmarks") / f"{name}.json")


def compare_kernels(
    names: Sequence[str],
    dtype: str,
    batch: int,
    threads: int,
    repeats: int,
    device: str | None,
    output: Path | None,
) -> None:
    """Kernels against their peers; prints and saves a table."""
    kernels.check_names(names)
    where = _prepare(threads, device)
    rows = kernels.compare_kernels(
        names, batch=batch, repeats=repeats, device=where, dtype=getattr(torch, dtype)
    )
    name = f"kernels_{where.type}{'' if dtype == 'float32' else f'_{dtype}'}"
    _run(rows, kernels.page, where, output or Path("benchmarks") / f"{name}.json")


def measure_memory(
    names: Sequence[str],
    size: Sequence[int],
    budgets: Sequence[str],
    limit: str,
    threads: int,
    repeats: int,
    device: str | None,
    output: Path | None,
) -> None:
    """Restoration networks on one large picture; prints and saves a table.

    Among the names, `key=value` stands for arguments of the networks.
    """
    overrides = [text for text in names if "=" in text]
    where = _prepare(threads, device)
    rows = memory.measure_memory(
        [text for text in names if "=" not in text],
        size=(size[0], size[1]),
        budgets=budgets,
        limit=limit,
        repeats=repeats,
        threads=threads,
        device=where,
        **parse_pairs(overrides),
    )
    _run(rows, memory.page, where, output or Path("benchmarks") / f"memory_{where.type}.json")


def measure_scaling(
    names: Sequence[str],
    sides: Sequence[int],
    threads: int,
    repeats: int,
    device: str | None,
    output: Path | None,
) -> None:
    """Networks at several sizes; prints and saves a table."""
    where = _prepare(threads, device)
    rows = scaling.measure_growth(names, sides, repeats=repeats, device=where)
    _run(rows, scaling.page, where, output or Path("benchmarks") / f"scaling_{where.type}.json")


def simulate(**options: Any) -> None:
    """The cost of tilings; prints a table."""
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in options.items()
        if value is not None
    }
    if given and ("window" in given) == ("kernel" in given):
        raise InputError("options describe one pattern: give --kernel or --window, and the rest as needed")
    for window, name in ((True, "stride"), (True, "dilation"), (True, "is_causal"), (False, "shift")):
        if name in given and ("window" in given) == window:
            owner = "--kernel" if window else "--window"
            raise InputError(f"--{name.removeprefix('is_')} goes with {owner} only")
    tilings = [simulation.Tiling(**{**simulation.DEFAULT, **given})] if given else simulation.TILINGS
    print(report.table(simulation.COLUMNS, simulation.lines(tilings)))


def _prepare(threads: int, device: str | None) -> torch.device:
    torch.set_num_threads(threads)
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with as_input_error(f"cannot use device {name!r}", RuntimeError, AssertionError):
        return torch.zeros(0, device=name).device


def _run(
    rows: Iterable[Any], page: Callable[[list[Any]], report.Page], device: torch.device, output: Path
) -> None:
    found = []
    for row in rows:
        found.append(row)
        print("  ".join(row.cells()), file=sys.stderr)
    print(report.table(page(found).columns, [row.cells() for row in found]))
    print(f"\n{report.notes(page(found))}")
    command = shlex.join(["python", "tools/benchmark.py", *sys.argv[1:]])
    report.save(page(found), found, report.conditions(device), output, command)


COMMANDS = {
    "models": compare_models,
    "kernels": compare_kernels,
    "memory": measure_memory,
    "scaling": measure_scaling,
    "simulate": simulate,
}
