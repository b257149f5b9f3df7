"""Train, judge and use the zoo's backbones inside mmdetection and mmsegmentation."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from visionattn.cli.command import check_requirements, exit_status, new_parser, parse_requirements
from visionattn.errors import as_input_error

EXAMPLE = """examples:
  python tools/openmmlab.py scenes data/scenes
  python tools/openmmlab.py train configs/openmmlab/scenes/upernet_biformer.py train_cfg.max_iters=300
  python tools/openmmlab.py evaluate configs/openmmlab/scenes/upernet_biformer.py FILE.pth
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__, EXAMPLE)
    commands = parser.add_subparsers(dest="command", required=True, metavar="WHAT")
    scenes = commands.add_parser("scenes", help="write the built-in scenes")
    scenes.add_argument("folder", type=Path)
    for name, text in (
        ("train", "train a detector or segmenter"),
        ("evaluate", "judge a checkpoint"),
        ("predict", "draw what a checkpoint finds in images"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("config", metavar="CONFIG.py")
        if name != "train":
            command.add_argument("checkpoint", metavar="FILE.pth", type=Path)
        if name == "predict":
            command.add_argument("images", metavar="IMAGE", type=Path, nargs="+")
        else:
            command.add_argument("options", metavar="KEY=VALUE", nargs="*", help="in place of the config's")
        if name == "evaluate":
            command.add_argument("--require", metavar="'METRIC>=VALUE'", action="append", default=[])
        command.add_argument("--output", metavar="FOLDER", type=Path, help="default: runs/NAME of the config")
        if name == "train":
            command.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
        text = "for mmdetection without mmcv's compiled operators"
        command.add_argument("--torchvision-operators", action="store_true", help=text)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    with exit_status():
        sys.exit(_run(parse_arguments(arguments)))


def _run(arguments: argparse.Namespace) -> None:
    if arguments.command == "scenes":
        from visionattn.data.scenes import scenes_folder

        with as_input_error(f"cannot write the scenes to {arguments.folder}", OSError, ModuleNotFoundError):
            print(scenes_folder(arguments.folder))
        return
    requirements = parse_requirements(getattr(arguments, "require", ()))
    with as_input_error(f"cannot {arguments.command} with OpenMMLab", ImportError):
        from visionattn.integrations import openmmlab
        from visionattn.integrations.openmmlab import runs

    if arguments.torchvision_operators:
        openmmlab.use_torchvision_operators()
    config = runs.read_config(arguments.config, getattr(arguments, "options", ()))
    folder = arguments.output or Path("runs", Path(arguments.config).stem)
    launcher = "pytorch" if "LOCAL_RANK" in os.environ else "none"
    if arguments.command == "train":
        runs.train(config, folder, arguments.resume, launcher)
    elif arguments.command == "evaluate":
        check_requirements(runs.evaluate(config, arguments.checkpoint, folder, launcher), requirements)
    else:
        runs.predict(config, arguments.checkpoint, arguments.images, folder)
