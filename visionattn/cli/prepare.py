"""Prepare images for training: cut them into pieces, or store them as LMDB, in BasicSR's layouts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from visionattn.cli.command import add_command, exit_status, new_parser

EXAMPLE = """examples:
  python tools/prepare.py pieces DIV2K/DIV2K_train_HR DIV2K/DIV2K_train_HR_sub
  python tools/prepare.py pieces DIV2K/DIV2K_train_LR_bicubic/X4 DIV2K/X4_sub --size 120 --step 60
  python tools/prepare.py lmdb DIV2K/X4_sub DIV2K/X4_sub.lmdb
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__, EXAMPLE)
    commands = parser.add_subparsers(dest="command", required=True, metavar="WHAT")
    pieces, lmdb = "overlapping squares of large images", "one database of the images of a folder"
    for name, text in (("pieces", pieces), ("lmdb", lmdb)):
        command = add_command(commands, name, text, EXAMPLE)
        command.add_argument("folder", metavar="FOLDER", help="image files")
        command.add_argument("output", metavar="OUTPUT", help="the folder to be made")
        if name == "pieces":
            for option, value in (("--size", 480), ("--step", 240)):
                text = "default: %(default)s"
                command.add_argument(option, metavar="PIXELS", type=int, default=value, help=text)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    with exit_status():
        sys.exit(_prepare(parse_arguments(arguments)))


def _prepare(arguments: argparse.Namespace) -> None:
    from visionattn.data.prepare import cut_pieces, make_lmdb
    from visionattn.errors import as_input_error

    kinds = (ValueError, FileNotFoundError, ModuleNotFoundError)
    with as_input_error(f"cannot make {arguments.output}", *kinds):
        if arguments.command == "lmdb":
            count = make_lmdb(arguments.folder, arguments.output)
        else:
            count = cut_pieces(arguments.folder, arguments.output, arguments.size, arguments.step)
    print(f"{count} images in {arguments.output}")
