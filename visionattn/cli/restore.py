"""Restore or enlarge image files: whole images, exactly, in as little memory as asked for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visionattn.cli.command import add_arguments, add_checkpoint, exit_status, new_parser, report_files

EXAMPLE = """examples:
  python tools/restore.py PHOTO.jpg --model hat_x4 --checkpoint HAT_SRx4.pth --memory-budget 2GB
  python tools/restore.py PHOTO.jpg --model HAT_SRx4.pth
  python tools/restore.py FOLDER --model runs/hat_photographs_x2 --output enlarged --side-by-side
  python tools/restore.py FOLDER --model cfsr_x4 --checkpoint CFSR_x4.pth --tile 256 --tile-overlap 64
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__, EXAMPLE)
    add = parser.add_argument
    add("images", metavar="IMAGE_OR_FOLDER", help="an image file, or a folder of them")
    add_arguments(parser)
    text = "a network, the folder of a run, or a file of weights"
    add("--model", metavar="MODEL|RUN_FOLDER|FILE", required=True, help=text)
    add_checkpoint(parser)
    add("--output", metavar="DIR", type=Path, default=Path("restored"), help="default: %(default)s")
    add("--memory-budget", metavar="SIZE", help="most memory, as 2GB or 512MiB; the result stays the same")
    add("--tile", metavar="PIXELS", type=int, help="work in tiles: for most networks an approximation")
    add("--tile-overlap", metavar="PIXELS", type=int, default=32, help="default: %(default)s")
    add("--self-ensemble", action="store_true", help="the mean over eight orientations")
    add("--half", action="store_true", help="half precision, where the network allows it")
    add("--format", choices=["png", "jpeg", "webp"], default="png", help="default: %(default)s")
    add("--side-by-side", action="store_true", help="also a picture of the input beside the result")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    with exit_status("set --memory-budget, which gives the same result in less memory"):
        sys.exit(_restore(parse_arguments(arguments)))


def _restore(arguments: argparse.Namespace) -> int:
    from visionattn.engine.yaml_io import parse_pairs
    from visionattn.inference.tiles import describe_tiles
    from visionattn.predict.files import find_pictures, open_restorer
    from visionattn.predict.restore import RestoreOptions, restore_files

    files = find_pictures(arguments.images)
    model: Any = open_restorer(arguments.model, arguments.checkpoint, parse_pairs(arguments.arguments))
    names = ("memory_budget", "tile", "tile_overlap", "self_ensemble", "half", "format", "side_by_side")
    options = RestoreOptions(**{name: getattr(arguments, name) for name in names})
    status = report_files(restore_files(model, files, arguments.output, options), len(files))
    if options.tile is not None:
        print(f"note: {describe_tiles(model.info, options.tile_overlap)}", file=sys.stderr)
    return status
