"""Train what a configuration describes, on one process or, launched by torchrun or accelerate, on many."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from visionattn.cli.command import exit_status, new_parser

EXAMPLE = """examples:
  python tools/train.py configs/classification/biformer_digits.yaml
  python tools/train.py configs/classification/biformer_digits.yaml train.batch_size=16 optimizer.lr=5e-4
  python tools/train.py configs/classification/biformer_digits.yaml resume=auto
  python tools/train.py configs/detection/biformer_mask_rcnn_scenes.yaml
  torchrun --nproc-per-node 8 tools/train.py configs/classification/biformer_tiny_imagenet.yaml data.root=DIR
  torchrun --nproc-per-node 8 tools/train.py CONFIG train.parallel=fsdp
  sbatch tools/slurm.sbatch CONFIG
  python tools/train.py configs/classification/biformer_digits.yaml --options

exit status: 0 the run is complete; 1 it cannot go on (loss not finite, full disk, lost process);
2 wrong input, nothing was done; 143 or 130 SIGTERM or Ctrl-C came, all is saved: continue with resume=auto
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__, EXAMPLE)
    parser.add_argument("config", metavar="CONFIG", help="a YAML file of configs/, or a run folder")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="options in place of CONFIG's")
    parser.add_argument("--options", action="store_true", help="list every option with default and meaning")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    with exit_status("lower train.batch_size, for which train.accumulate makes up"):
        sys.exit(_train(parse_arguments(arguments)))


def _train(arguments: argparse.Namespace) -> int:
    from visionattn import tasks

    if arguments.options:
        print(tasks.describe_config(arguments.config, arguments.overrides))
        return 0

    from visionattn.engine.loop import train

    task = tasks.create_task(tasks.load_config(arguments.config, arguments.overrides))
    stopped_by = train(task).stopped_by
    # The shell's convention for a program that a signal ended, so that a supervisor knows it is not complete.
    return 0 if stopped_by is None else 128 + stopped_by
