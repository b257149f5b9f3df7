"""Judge a network on the held-out data of a configuration or of a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

EXAMPLE = """examples:
  python tools/evaluate.py runs/biformer_digits
  python tools/evaluate.py runs/biformer_digits --require 'top1>=97'
  python tools/evaluate.py runs/biformer_digits --checkpoint runs/biformer_digits/checkpoints/last.safetensors
  python tools/evaluate.py configs/classification/biformer_tiny_imagenet.yaml --checkpoint FILE data.root=DIR
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="CONFIG|RUN_FOLDER", help="a YAML file, or the folder of a run")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="options in place of its own")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights; default: the best of the run folder")
    parser.add_argument(
        "--require",
        metavar="METRIC>=VALUE",
        action="append",
        default=[],
        help="end with status 1 unless the metric reaches the value; may be given several times",
    )
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> None:
    from visionattn import tasks
    from visionattn.engine.cli import check_requirements
    from visionattn.engine.distributed import process_index
    from visionattn.engine.loop import evaluate

    config = tasks.load_trained_config(arguments.source, arguments.overrides, arguments.checkpoint)
    metrics = evaluate(tasks.create_task(config))
    if process_index() == 0:
        print("\n".join(f"{name}: {value:.6g}" for name, value in metrics.items()))
    check_requirements(metrics, arguments.require)


if __name__ == "__main__":
    parsed = parse_arguments()  # first, so that --help does not wait for imports
    from visionattn.engine.cli import run_command

    run_command(lambda: main(parsed))
