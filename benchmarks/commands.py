"""The commands, each with the options that `command_line` reads."""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import kernels, memory, models, report, scaling, selector_claims, selectors, simulation
from visionattn.engine.yaml_io import parse_pairs
from visionattn.errors import InputError, as_input_error


def compare_models(options: Namespace) -> None:
    """Networks against the authors' formulation; prints and saves a table."""
    device = _prepare(options)
    rows = models.compare_models(
        options.names,
        size=tuple(options.size) if options.size else None,
        batch=options.batch,
        repeats=options.repeats,
        train=options.train,
        compiled=options.compile,
        device=device,
    )
    _run(rows, models.page, device, options, f"models_{device.type}{'_train' if options.train else ''}")


def compare_kernels(options: Namespace) -> None:
    """Kernels against their peers; prints and saves a table."""
    kernels.check_names(options.names)
    device, dtype = _prepare(options), getattr(torch, options.dtype)
    rows = kernels.compare_kernels(
        options.names, batch=options.batch, repeats=options.repeats, device=device, dtype=dtype
    )
    ending = "" if dtype == torch.float32 else f"_{options.dtype}"
    _run(rows, kernels.page, device, options, f"kernels_{device.type}{ending}")


def measure_memory(options: Namespace) -> None:
    """Restoration networks on one large picture; prints and saves a table.

    Among the names, `key=value` stands for arguments of the networks.
    """
    device = _prepare(options)
    rows = memory.measure_memory(
        [text for text in options.names if "=" not in text],
        size=tuple(options.size),
        budgets=options.budgets,
        limit=options.limit,
        repeats=options.repeats,
        threads=options.threads,
        device=device,
        **parse_pairs([text for text in options.names if "=" in text]),
    )
    _run(rows, memory.page, device, options, f"memory_{device.type}")


def measure_scaling(options: Namespace) -> None:
    """Networks at several sizes; prints and saves a table."""
    device = _prepare(options)
    rows = scaling.measure_growth(options.names, options.sides, repeats=options.repeats, device=device)
    _run(rows, scaling.page, device, options, f"scaling_{device.type}")


def compare_selectors(options: Namespace) -> None:
    """Ways to attend to a part of a map, on a trained network; prints and saves a table, and draws it."""
    if options.side % options.region:
        raise InputError(f"--region must divide the side {options.side}, but is {options.region}")
    device, region = _prepare(options), (options.region, options.region)
    model, layer = selectors.open_layer(options.run, options.layer, device)
    maps = selectors.read_maps(model, layer, options.side)
    claims: list[str] = []

    def rows() -> Iterator[selectors.Row]:
        found = []
        for row in selectors.measure_selectors(maps, region, repeats=options.repeats):
            found.append(row)
            yield row
        growing = partial(selectors.read_maps, model, layer)
        claims.extend(selector_claims.check_claims(found, maps, region, lambda side: growing(side)[0]))

    page = partial(selectors.page, claims=claims)
    found, output = _run(rows(), page, device, options, f"selectors_{device.type}")
    selectors.plot(found, output.with_suffix(".png"))


def simulate(options: Namespace) -> None:
    """The cost of tilings; prints a table."""
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(options).items()
        if value is not None and name != "command"
    }
    if given and ("window" in given) == ("kernel" in given):
        raise InputError("options describe one pattern: give --kernel or --window, and the rest as needed")
    for window, name in ((True, "stride"), (True, "dilation"), (True, "is_causal"), (False, "shift")):
        if name in given and ("window" in given) == window:
            owner = "--kernel" if window else "--window"
            raise InputError(f"--{name.removeprefix('is_')} goes with {owner} only")
    tilings = [simulation.Tiling(**{**simulation.DEFAULT, **given})] if given else simulation.TILINGS
    print(report.table(simulation.COLUMNS, simulation.lines(tilings)))


def _prepare(options: Namespace) -> torch.device:
    torch.set_num_threads(options.threads)
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with as_input_error(f"cannot use device {name!r}", RuntimeError, AssertionError):
        return torch.zeros(0, device=name).device


def _run(
    rows: Iterable[Any],
    page: Callable[[list[Any]], report.Page],
    device: torch.device,
    options: Namespace,
    name: str,
) -> tuple[list[Any], Path]:
    """Print and save the rows; returns them, and the JSON file."""
    found = []
    for row in rows:
        found.append(row)
        print("  ".join(row.cells()), file=sys.stderr)
    print(report.table(page(found).columns, [row.cells() for row in found]))
    print(f"\n{report.notes(page(found))}")
    command = shlex.join(["python", "tools/benchmark.py", *sys.argv[1:]])
    output = options.output or Path("benchmarks") / f"{name}.json"
    report.save(page(found), found, report.conditions(device), output, command)
    return found, output


COMMANDS: dict[str, Callable[[Namespace], None]] = {
    "models": compare_models,
    "kernels": compare_kernels,
    "memory": measure_memory,
    "scaling": measure_scaling,
    "selectors": compare_selectors,
    "simulate": simulate,
}
