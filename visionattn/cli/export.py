"""Export a network to ONNX, a torch.export program, or an AOTInductor package; checked before it is kept."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from visionattn.cli.command import check_target, exit_status, new_parser

EXAMPLE = """examples:
  python tools/export.py HAT_SRx4.pth hat_x4.onnx --size 64 64
  python tools/export.py nat_mini.pth nat_mini.pt2 --dynamic
  python tools/export.py runs/biformer_digits digits.pt2 --format aoti
  python tools/export.py --table docs/export.md
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__, EXAMPLE)
    add = parser.add_argument
    text = "a file that tools/convert.py recognises, or the folder of a run"
    add("source", metavar="CHECKPOINT|RUN_FOLDER", nargs="?", help=text)
    add("target", metavar="FILE", nargs="?", help="an .onnx or .pt2 file")
    add("overrides", metavar="key=value", nargs="*", help="arguments of the network")
    formats = ("program", "onnx", "aoti")
    add("--format", choices=formats, help="default: onnx for .onnx, program for .pt2")
    add("--size", metavar=("H", "W"), type=int, nargs=2, help="default: the network's")
    add("--batch", metavar="N", type=int, default=1, help="images (default: %(default)s)")
    add("--dynamic", action="store_true", help="let batch, height and width vary")
    add("--table", metavar="FILE.md", help="try every family in every way, for an hour")
    add("--networks", metavar="NAME", nargs="+", default=[], help="rows to make anew")
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.table is None and parsed.target is None:
        parser.error("name a CHECKPOINT and a FILE, or --table")
    if any(number < 1 for number in (parsed.batch, *(parsed.size or ()))):
        parser.error("--batch and --size must be at least 1")
    return parsed


def main(arguments: Sequence[str] | None = None) -> None:
    parsed = parse_arguments(arguments)
    with exit_status():
        sys.exit((_make_table if parsed.table else _export)(parsed))


def _export(arguments: argparse.Namespace) -> None:
    from visionattn.checkpoints import identify, load_network
    from visionattn.checkpoints.identify import check_guesses
    from visionattn.engine.run_folder import find_weights
    from visionattn.engine.yaml_io import parse_pairs
    from visionattn.errors import RunError, as_input_error
    from visionattn.integrations.export import ExportError, export_network

    check_target(arguments.target, arguments.source)
    format = arguments.format or ("onnx" if arguments.target.endswith(".onnx") else "program")
    with as_input_error(f"cannot export {arguments.source}", ValueError, OSError, TypeError):
        given = parse_pairs(arguments.overrides)
        file, texts = find_weights(arguments.source)
        check_guesses(identify(file, texts), given, "it")
        network, identity = load_network(file, texts, **given)
        print(identity)
        try:
            size = tuple(arguments.size) if arguments.size else None
            options = {"size": size, "batch": arguments.batch, "dynamic": arguments.dynamic}
            print(export_network(network, arguments.target, format, **options))
        except ExportError as error:
            raise RunError(f"{arguments.target} was not written: {error}") from error


def _make_table(arguments: argparse.Namespace) -> None:
    from visionattn.engine.network import check_network_name
    from visionattn.errors import InputError, as_input_error
    from visionattn.integrations.export_table import FORMATS, NETWORKS, read_table, try_exports, write_table

    for name in arguments.networks:
        check_network_name(name)
    rows = read_table(arguments.table) if arguments.networks else []
    formats = [arguments.format] if arguments.format else list(FORMATS)
    if any({format for format, _ in row.results} != set(formats) for row in rows):
        raise InputError(f"{arguments.table} is a table of other formats than {', '.join(formats)}")
    with as_input_error("cannot make the table", ValueError, RuntimeError):
        for row in try_exports(arguments.networks or NETWORKS, formats):
            rows.append(row)
            write_table(rows, arguments.table)
            print(row.network, file=sys.stderr)
