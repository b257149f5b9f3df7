"""Compare the time and memory of our kernels with what a user would run instead."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from visionattn.cli.command import add_command, exit_status, new_parser

EXAMPLE = """examples:
  python tools/benchmark.py models biformer_tiny hat_s_x4
  python tools/benchmark.py models biformer_tiny --size 512 512 --batch 8 --train --repeats 20
  python tools/benchmark.py kernels na7 window16
  python tools/benchmark.py scaling inline_pvt_tiny l2vit_t --sides 224 448 896
  python tools/benchmark.py memory hat_x4 --size 512 512 --budgets 1GB 2GB
  python tools/benchmark.py selectors runs/hat_photographs_x2
  python tools/benchmark.py simulate
  python tools/benchmark.py simulate --size 128 128 --kernel 13 --query-tile 4 8 --key-tile 8 8
"""
_SIZE = ("H", "W")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name, by default those of this process, and exit."""
    with exit_status():
        sys.exit(_run(parse_arguments(arguments)))


def _run(options: argparse.Namespace) -> None:
    from benchmarks.commands import COMMANDS  # here, so that --help does not wait for it

    COMMANDS[options.command](options)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command; by default of this process."""
    parser = new_parser(__doc__, EXAMPLE)
    parser.prog = "benchmark.py"
    commands = parser.add_subparsers(required=True, metavar="WHAT", dest="command")

    text = "networks with our kernels against the attention of their authors' code"
    models = add_command(commands, "models", text, EXAMPLE)
    models.add_argument("names", metavar="NAME", nargs="+", help="a registered network")
    models.add_argument("--size", metavar=_SIZE, type=_count, nargs=2, help="default: that of the family")
    models.add_argument("--train", action="store_true", help="forward and backward instead of inference")
    models.add_argument("--compile", action="store_true", help="compare both compiled as well")

    text = "our kernels against PyTorch's, the published formulations and NATTEN, on named shapes"
    kernels = add_command(commands, "kernels", text, EXAMPLE)
    kernels.add_argument("names", metavar="NAME", nargs="*", help="a shape; default: all that fit the device")
    kernels.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))

    scaling = add_command(
        commands, "scaling", "time and memory of networks against the number of pixels", EXAMPLE
    )
    scaling.add_argument("names", metavar="NAME", nargs="+", help="a registered network")
    text = "heights and widths, ascending (default: 224 448 896)"
    scaling.add_argument("--sides", metavar="N", type=_count, nargs="+", default=(224, 448, 896), help=text)

    text = "large pictures: the authors' formulation, our networks, our networks within memory budgets"
    memory = add_command(commands, "memory", text, EXAMPLE)
    memory.add_argument("names", metavar="NAME", nargs="+", help="restoration networks, key=value for them")
    memory.add_argument("--size", metavar=_SIZE, type=_count, nargs=2, required=True)
    memory.add_argument("--budgets", metavar="SIZE", nargs="*", default=[], help="such as 2GB")
    text = "what takes more is counted, not run (default: %(default)s)"
    memory.add_argument("--limit", metavar="SIZE", default="12GB", help=text)

    text = "ways to attend to a part of a map, on a layer of a trained restoration network"
    selectors = add_command(commands, "selectors", text, EXAMPLE)
    selectors.add_argument("run", metavar="RUN", help="a run folder of tools/train.py")
    text = "an attention layer of its network (default: %(default)s)"
    selectors.add_argument("--layer", metavar="NAME", default="layers.0.blocks.0.attn", help=text)
    for name, meaning, default in (
        ("side", "height and width of the maps", 64),
        ("region", "of a region", 8),
    ):
        text = f"{meaning} in pixels (default: {default})"
        selectors.add_argument(f"--{name}", metavar="N", type=_count, default=default, help=text)

    for measuring in (models, kernels, scaling, memory, selectors):
        numbers = {
            "threads": ("CPU threads", 1),
            "repeats": ("rounds", {memory: 1, selectors: 3}.get(measuring, 10)),
        }
        numbers |= {"batch": ("images", 1)} if measuring in (models, kernels) else {}
        for name, (meaning, default) in numbers.items():
            text = f"{meaning} (default: {default})"
            measuring.add_argument(f"--{name}", metavar="N", type=_count, default=default, help=text)
        measuring.add_argument("--device", help="default: a GPU where there is one")
        measuring.add_argument("--output", metavar="FILE.json", type=_json, help="default: in benchmarks/")

    text = "tiles that a fused kernel of a local pattern visits; without options the known tilings"
    simulate = add_command(commands, "simulate", text, EXAMPLE)
    for name in ("size", "query-tile", "key-tile"):
        simulate.add_argument(f"--{name}", metavar=_SIZE, type=_count, nargs=2)
    for name in ("kernel", "stride", "dilation", "window"):
        simulate.add_argument(f"--{name}", metavar="N", type=_count)
    simulate.add_argument("--shift", metavar="N", type=int, help="where windows begin")
    simulate.add_argument("--causal", dest="is_causal", action="store_const", const=True)
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, but is {text}")
    return int(text)


def _json(text: str) -> Path:
    if not text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"must end in .json, but is {text}")
    return Path(text)
