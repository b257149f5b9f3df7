"""Say which network a checkpoint belongs to; write it for timm, or back for its authors' code."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from visionattn.cli.command import check_target, exit_status, new_parser

EXAMPLE = """examples:
  python tools/convert.py HAT_SRx4.pth
  python tools/convert.py HAT_SRx4.pth hat_x4.safetensors
  python tools/convert.py nat_mini.pth FOLDER             # then timm.create_model("local-dir:FOLDER")
  python tools/convert.py hat_x4.safetensors HAT_SRx4.pth --to-official
  python tools/convert.py weights.pth out.safetensors --model dinat_mini dilations=ade20k
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__, EXAMPLE)
    add = parser.add_argument
    text = "a .safetensors or PyTorch file, or the folder of a run"
    add("source", metavar="CHECKPOINT|RUN_FOLDER", help=text)
    add("target", metavar="TARGET", nargs="?", help="a .safetensors file, or a folder; none to tell only")
    add("overrides", metavar="key=value", nargs="*", help="arguments of the network")
    text = "write the authors' names and shapes (.pth, .safetensors)"
    add("--to-official", action="store_true", help=text)
    add("--model", metavar="NAME", help="the registered network, instead of the one found")
    add("--json", action="store_true", help="print what was found as JSON")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    with exit_status():
        sys.exit(_convert(parse_arguments(arguments)))


def _convert(arguments: argparse.Namespace) -> None:
    from visionattn.checkpoints import Identity, convert_checkpoint, identify
    from visionattn.engine.network import check_network_name
    from visionattn.engine.run_folder import find_weights
    from visionattn.engine.yaml_io import parse_pairs
    from visionattn.errors import as_input_error

    if arguments.model:
        check_network_name(arguments.model)
    settings = parse_pairs(arguments.overrides)
    if arguments.target is not None and not Path(arguments.target).is_dir():
        check_target(arguments.target, arguments.source)
    with as_input_error(f"cannot convert {arguments.source}", ValueError, OSError):
        file, texts = find_weights(arguments.source)
        if arguments.target is None:
            identity: Identity = identify(file, texts)
        else:
            options = {"official": arguments.to_official, "name": arguments.model, "arguments": settings}
            identity = convert_checkpoint(file, arguments.target, **options, metadata=texts)
    print(json.dumps(asdict(identity), indent=2) if arguments.json else identity)
