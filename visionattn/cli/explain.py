"""See what a network looks at: `lam` draws the local attribution map of a super-resolution network."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from visionattn.cli.command import add_arguments, add_checkpoint, add_command, exit_status, new_parser

EXAMPLE = """examples:
  python tools/explain.py lam coffee --model hat_x4 --checkpoint HAT_SRx4.pth
  python tools/explain.py lam PHOTO.png --model runs/hat_photographs_x2 --place 120 80 --window 20
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__, EXAMPLE)
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    text = "the pixels of the input on which a window of the output depends, and the diffusion index"
    lam = add_command(commands, "lam", text, EXAMPLE)
    add = lam.add_argument
    add("image", metavar="IMAGE|PHOTOGRAPH", help="a file (the input), or a built-in photograph (is reduced)")
    add_arguments(lam)
    text = "a network, the folder of a run, or a file of weights"
    add("--model", metavar="MODEL|RUN_FOLDER|FILE", required=True, help=text)
    add_checkpoint(lam)
    add("--place", metavar=("ROW", "COLUMN"), type=int, nargs=2, help="in the input; default: most detail")
    add("--window", metavar="PIXELS", type=int, default=16, help="of the output (default: %(default)s)")
    add("--context", metavar="PIXELS", type=int, default=64, help="of the input (default: %(default)s)")
    add("--output", metavar="DIR", type=Path, default=Path("explained"), help="default: %(default)s")
    # Argparse looks for key=value right behind the image alone.
    parsed, rest = parser.parse_known_args(arguments)
    if strays := [text for text in rest if text.startswith("-") or "=" not in text]:
        parser.error(f"unrecognized arguments: {' '.join(strays)}")
    parsed.arguments += rest
    if parsed.window < 2 or parsed.context < 1:
        parser.error("--window must be at least 2 and --context at least 1")
    return parsed


def main(arguments: Sequence[str] | None = None) -> None:
    with exit_status("lower --context"):
        sys.exit(_explain(parse_arguments(arguments)))


def _explain(arguments: argparse.Namespace) -> None:
    from visionattn.engine.yaml_io import parse_pairs
    from visionattn.predict.explain import explain_image
    from visionattn.predict.files import open_restorer

    explained = explain_image(
        open_restorer(arguments.model, arguments.checkpoint, parse_pairs(arguments.arguments)),
        arguments.image,
        arguments.output,
        place=tuple(arguments.place) if arguments.place else None,
        window=arguments.window,
        context=arguments.context,
    )
    print(f"diffusion index {explained.attribution.diffusion_index:.2f}")
    print(f"{explained.picture}\n{explained.numbers}")
