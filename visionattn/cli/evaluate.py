"""Judge a network on the held-out data of a configuration or of a run, or on images that are named."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from visionattn.cli.command import (
    add_checkpoint,
    check_requirements,
    check_target,
    exit_status,
    new_parser,
    parse_requirements,
    write_rows,
)

EXAMPLE = """examples:
  python tools/evaluate.py runs/biformer_digits
  python tools/evaluate.py runs/biformer_digits --require 'top1>=97'
  python tools/evaluate.py runs/biformer_digits --checkpoint runs/biformer_digits/checkpoints/last.safetensors
  python tools/evaluate.py configs/classification/biformer_tiny_imagenet.yaml --checkpoint FILE data.root=DIR
  python tools/evaluate.py hat_x4 --checkpoint HAT_SRx4.pth --data Set5/HR --inputs Set5/LR_bicubic/X4 \\
      --template '{}x4' --self-ensemble --csv set5.csv
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__, EXAMPLE)
    add = parser.add_argument
    text = "a YAML file, the folder of a run, a file of weights, or a network"
    add("source", metavar="CONFIG|RUN_FOLDER|FILE|MODEL", help=text)
    add("overrides", metavar="key=value", nargs="*", help="options in place of its own")
    add_checkpoint(parser)
    add("--data", metavar="DIR", help="restoration: the true images, a folder or *.lmdb")
    add("--inputs", metavar="DIR", help="their inputs; default: bicubic reduction, or data.degradations")
    add("--template", metavar="STEM", help="name of an input, {} being that of its truth: '{}x4'")
    text = "restoration: average over flips and transpositions (x8)"
    add("--self-ensemble", action="store_true", help=text)
    add("--csv", metavar="FILE", help="write the figures of every image")
    text = "end with status 1 unless the metric reaches the value; may be given several times"
    add("--require", metavar="METRIC>=VALUE", action="append", default=[], help=text)
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.inputs and not parsed.data:
        parser.error("--inputs needs the true images: --data DIR")
    return parsed


def main(arguments: Sequence[str] | None = None) -> None:
    with exit_status("lower train.eval_batch_size"):
        sys.exit(_evaluate(parse_arguments(arguments)))


def _evaluate(arguments: argparse.Namespace) -> None:
    from visionattn import tasks
    from visionattn.engine.distributed import process_index
    from visionattn.engine.loop import evaluate
    from visionattn.engine.task import NamedImages

    parse_requirements(arguments.require)
    if arguments.csv:
        config_file = Path(arguments.source, "config.yaml")
        check_target(arguments.csv, arguments.source, config_file, arguments.checkpoint)
    named = NamedImages(arguments.data, arguments.inputs, arguments.template, arguments.self_ensemble)
    config = tasks.load_trained_config(arguments.source, arguments.overrides, arguments.checkpoint, named)
    task = tasks.create_task(config)
    requirements = parse_requirements(arguments.require, task.metrics)
    metrics = evaluate(task)
    if process_index() == 0:
        print("\n".join(f"{name}: {value:.6g}" for name, value in metrics.items()))
        if arguments.csv:
            write_rows(arguments.csv, task.rows)
    check_requirements(metrics, requirements)
