"""Name what images show, restore them, or draw what is found in them, as follows from the network."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from visionattn.cli.command import add_checkpoint, new_parser, run_command

EXAMPLE = """examples:
  python tools/predict.py runs/biformer_digits IMAGE.png --top 3
  python tools/predict.py runs/hat_photographs_x2 FOLDER --output enlarged
  python tools/predict.py runs/biformer_upernet_scenes FOLDER --output found
  python tools/predict.py biformer_tiny FOLDER --checkpoint biformer_tiny_best.pth
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__, EXAMPLE)
    parser.add_argument(
        "source", metavar="MODEL|RUN_FOLDER", help="a registered network, or the folder of a run"
    )
    parser.add_argument("images", metavar="IMAGE_OR_FOLDER", help="an image file, or a folder of them")
    add_checkpoint(parser)
    parser.add_argument(
        "--output",
        metavar="DIR",
        default="predictions",
        help="folder for restored or drawn images (default: %(default)s)",
    )
    parser.add_argument("--top", type=int, default=5, help="names per image (default: %(default)s)")
    parsed = parser.parse_args(arguments)
    if parsed.top < 1:
        parser.error(f"--top must be at least 1, but is {parsed.top}")
    return parsed


def main(arguments: Sequence[str] | None = None) -> None:
    run_command(_predict, parse_arguments(arguments))


def _predict(arguments: argparse.Namespace) -> int:
    from visionattn.predict.files import predict_files

    broken = total = 0
    for file, result in predict_files(
        arguments.source,
        arguments.images,
        checkpoint=arguments.checkpoint,
        output=arguments.output,
        top=arguments.top,
    ):
        total += 1
        if isinstance(result, Exception):
            broken += 1
            print(f"skipped: {result}", file=sys.stderr)
        elif isinstance(result, list):
            print(
                f"{file}  " + "  ".join(f"{name} {probability:.1%}" for name, probability in result),
                flush=True,
            )
        else:
            print(f"{file} -> {result}", flush=True)
    if broken:
        print(f"{broken} of {total} images could not be used", file=sys.stderr)
    return 2 if broken else 0
