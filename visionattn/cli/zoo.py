"""List the networks: task, parameters, multiply-adds at the default input, licence, official result."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from visionattn.cli.command import exit_status, new_parser

EXAMPLE = """examples:
  python tools/zoo.py
  python tools/zoo.py hat --sort params
  python tools/zoo.py 'biformer_*' --json
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__, EXAMPLE)
    add = parser.add_argument
    add("filter", metavar="FILTER", nargs="?", default="", help="a pattern, or part of the names")
    text = "name, task, params, gmacs, input, license or result (default: %(default)s)"
    add("--sort", metavar="COLUMN", default="name", help=text)
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    with exit_status():
        sys.exit(_list(parse_arguments(arguments)))


def _list(arguments: argparse.Namespace) -> None:
    from visionattn.models.registry import zoo

    rows = zoo.list_models(arguments.filter, arguments.sort)
    print(json.dumps(zoo.as_json(rows), indent=2) if arguments.json else zoo.format_table(rows))
