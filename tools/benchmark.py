"""Compare the time and memory of our kernels with what a user would run instead."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

EXAMPLE = """examples:
  python tools/benchmark.py models biformer_tiny hat_s_x4
  python tools/benchmark.py models biformer_tiny --size 512 512 --batch 8 --train --repeats 20
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    shape = {"epilog": EXAMPLE, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__, **shape)
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    text = "networks with our kernels against the attention of their authors' code"
    models = commands.add_parser("models", help=text, description=text, **shape)
    models.set_defaults(command=compare_models)
    models.add_argument("names", metavar="NAME", nargs="+", help="a registered network")
    models.add_argument("--size", metavar=("H", "W"), type=int, nargs=2, help="default: that of the family")
    models.add_argument("--batch", metavar="N", type=int, default=1, help="images (default: %(default)s)")
    models.add_argument(
        "--threads", metavar="N", type=int, default=1, help="CPU threads (default: %(default)s)"
    )
    models.add_argument("--repeats", metavar="N", type=int, default=10, help="default: %(default)s")
    models.add_argument("--train", action="store_true", help="forward and backward instead of inference")
    models.add_argument("--device", help="default: a GPU where there is one")
    models.add_argument(
        "--output", metavar="FILE.json", type=Path, help="default: benchmarks/models_DEVICE[_train].json"
    )
    parsed = parser.parse_args(arguments)
    for name in ("batch", "threads", "repeats"):
        if getattr(parsed, name) < 1:
            parser.error(f"--{name} must be at least 1, but is {getattr(parsed, name)}")
    if parsed.output and parsed.output.suffix != ".json":
        parser.error(f"--output must end in .json, but is {parsed.output}")
    return parsed


def compare_models(arguments: argparse.Namespace) -> None:
    import torch

    from visionattn.benchmark import models, report

    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows = []
    for row in models.compare_models(
        arguments.names,
        size=tuple(arguments.size) if arguments.size else None,
        batch=arguments.batch,
        repeats=arguments.repeats,
        train=arguments.train,
        device=device,
    ):
        rows.append(row)
        print(f"{row.network} {row.input[2]}x{row.input[3]}: {row.ratio:.2f}x", file=sys.stderr)
    print(report.table(rows))
    default = f"benchmarks/models_{device.type}{'_train' if arguments.train else ''}.json"
    command = shlex.join(["python", "tools/benchmark.py", *sys.argv[1:]])
    report.save(rows, report.conditions(device), arguments.output or Path(default), command)


if __name__ == "__main__":
    parsed = parse_arguments()  # first, so that --help does not wait for imports
    from visionattn.engine.cli import run_command

    run_command(lambda: parsed.command(parsed))
