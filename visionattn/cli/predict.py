"""Name what images show, restore them, or draw what is found in them, as follows from the network."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from visionattn.cli.command import add_arguments, add_checkpoint, exit_status, new_parser, report_files

EXAMPLE = """examples:
  python tools/predict.py runs/biformer_digits IMAGE.png --top 3
  python tools/predict.py runs/biformer_digits/checkpoints/last.safetensors IMAGE.png
  python tools/predict.py runs/hat_photographs_x2 FOLDER --output enlarged
  python tools/predict.py runs/biformer_upernet_scenes FOLDER --output found
  python tools/predict.py biformer_tiny FOLDER --checkpoint biformer_tiny_best.pth
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__, EXAMPLE)
    add = parser.add_argument
    text = "a registered network, the folder of a run, or a file of weights"
    add("source", metavar="MODEL|RUN_FOLDER|FILE", help=text)
    add("images", metavar="IMAGE_OR_FOLDER", help="an image file, or a folder of them")
    add_arguments(parser)
    add_checkpoint(parser)
    text = "folder for restored or drawn images (default: %(default)s)"
    add("--output", metavar="DIR", default="predictions", help=text)
    add("--top", type=int, default=5, help="names per image (default: %(default)s)")
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.top < 1:
        parser.error(f"--top must be at least 1, but is {parsed.top}")
    return parsed


def main(arguments: Sequence[str] | None = None) -> None:
    with exit_status():
        sys.exit(_predict(parse_arguments(arguments)))


def _predict(arguments: argparse.Namespace) -> int:
    from visionattn.engine.yaml_io import parse_pairs
    from visionattn.predict.files import predict_files

    options = {name: getattr(arguments, name) for name in ("checkpoint", "output", "top")}
    options["arguments"] = parse_pairs(arguments.arguments)
    return report_files(predict_files(arguments.source, arguments.images, **options))
