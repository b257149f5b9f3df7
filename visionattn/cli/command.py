"""Parts of all command lines: parsers of one look, errors as one sentence, tables and bounds of metrics."""

from __future__ import annotations

import csv
import errno
import io
import math
import os
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from visionattn.errors import InputError, LostProcess, RunError, is_out_of_memory, nearest, one_line
from visionattn.files import check_folder, refuse_inputs, replacing, why_unwritable


def new_parser(description: str | None, examples: str) -> ArgumentParser:
    """A parser whose help ends with examples, each on its own line."""
    return ArgumentParser(
        description=description, epilog=examples, formatter_class=RawDescriptionHelpFormatter
    )


def add_command(commands: Any, name: str, text: str, examples: str) -> ArgumentParser:
    """The parser of one of several commands `commands` of a tool, which `text` describes."""
    return commands.add_parser(
        name, help=text, description=text, epilog=examples, formatter_class=RawDescriptionHelpFormatter
    )


def add_checkpoint(parser: ArgumentParser) -> None:
    """Let `--checkpoint` choose the weights of a network or of a run folder."""
    text = "weights; default: the best of the run, or the published ones"
    parser.add_argument("--checkpoint", metavar="FILE", help=text)


def add_arguments(parser: ArgumentParser) -> None:
    """Let `key=value` state arguments of a network that its weights do not tell."""
    text = "arguments of the network, where its weights do not tell them"
    parser.add_argument("arguments", metavar="key=value", nargs="*", help=text)


@contextmanager
def exit_status(to_save_memory: str = "give smaller images") -> Iterator[None]:
    """Turn wrong input inside of the block into exit status 2, a run that cannot go on into 1.

    Each is said in one sentence on stderr. Every other exception is a defect of the program and keeps its
    traceback. A command that comes to its end leaves the block by `sys.exit`. Names of files that the console
    cannot show are printed with escapes.

    Args:
        to_save_memory: what to do where memory runs out.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # PyTorch, which is not imported yet, then asks Linux for large pages; with small ones a light network
    # takes twice the time on a CPU, and a training step a fifth more.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        yield
    except SystemExit:  # how a command ends by itself
        distributed = sys.modules.get("torch.distributed")
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
        raise
    except InputError as error:
        _say(f"error: {error}")
        sys.exit(2)
    except RunError as error:
        _say(f"stopped: {error}", everywhere=isinstance(error, LostProcess))
        sys.exit(1)
    except OSError as error:  # as the first question about a file may raise it
        if error.errno != errno.ENAMETOOLONG:
            raise
        _say(f"error: {one_line(error)}")
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _say(f"stopped: memory ran out ({one_line(error)}); {to_save_memory}")
        sys.exit(1)


def report_files(results: Iterable[tuple[Path, Any]], count: int | None = None) -> int:
    """Say line by line what became of files, with a progress bar on a terminal.

    Args:
        results: each file with the one that was written, its names and their probabilities, or the error that
            says why it cannot be used.
        count: of the files, where it is known.

    Returns:
        The exit status: 2 where files could not be used, else 0.
    """
    from tqdm import tqdm

    total = broken = 0
    with tqdm(total=count, unit="image", disable=not sys.stderr.isatty()) as bar:
        for file, result in results:
            total += 1
            stream, line = sys.stdout, f"{file} -> {result}"
            if isinstance(result, Exception):
                broken += 1
                stream, line = sys.stderr, f"skipped: {result}"
            elif isinstance(result, list):
                line = "  ".join([str(file), *(f"{name} {share:.1%}" for name, share in result)])
            bar.write(line, file=stream)
            stream.flush()
            bar.update()
    if broken:
        print(f"{broken} of {total} images could not be used", file=sys.stderr)
    return 2 if broken else 0


def check_target(path: str | Path, *inputs: str | Path | None) -> None:
    """Refuse a place where no file can be written, or where one of the inputs lies, before work starts.

    Raises:
        InputError: one sentence on what stands in the way.
    """
    if (reason := why_unwritable(Path(path))) is not None:
        raise InputError(f"cannot write {path}: {reason}")
    check_folder(Path(path).parent)
    refuse_inputs([Path(path)], [Path(file) for file in inputs if file is not None])


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table as CSV, complete or not at all.

    Args:
        path: the file.
        rows: mappings of the same keys, which become the columns.

    Raises:
        InputError: there are no rows.
        RunError: the place cannot be written to.
    """
    if not rows:
        raise InputError(f"there are no figures of single samples to write to {path}")
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with replacing(Path(path)) as beside:
        # Names that are no text keep the bytes that they have on the disk.
        beside.write_text(table.getvalue(), encoding="utf-8", errors="surrogateescape", newline="")


class Requirement(NamedTuple):
    """A bound on a metric, as `"top1>=97"` or `"loss<=0.5"` states it."""

    name: str
    relation: str
    bound: float


def parse_requirements(texts: Sequence[str], metrics: Collection[str] = ()) -> list[Requirement]:
    """Read bounds before anything is evaluated.

    Args:
        texts: such as `"top1>=97"`.
        metrics: the names that there are; empty where they are not known yet.

    Raises:
        InputError: a bound cannot be read, or names no metric.
    """
    found = []
    for text in texts:
        parts = re.fullmatch(r"(\w+)\s*(>=|<=)\s*([-+]?\d+\.?\d*(?:[eE][-+]?\d+)?)", text.strip())
        if parts is None:
            raise InputError(f"a requirement reads METRIC>=VALUE or METRIC<=VALUE, but {text!r} was given")
        if metrics and parts[1] not in metrics:
            raise InputError(f"there is no metric {parts[1]!r} to require: {nearest(parts[1], metrics)}")
        found.append(Requirement(parts[1], parts[2], float(parts[3])))
    return found


def check_requirements(metrics: Mapping[str, float], requirements: Sequence[Requirement]) -> None:
    """Hold metrics against bounds.

    Raises:
        RunError: the metrics that do not meet their bounds, and by how much.
    """
    failed = []
    for name, relation, bound in requirements:
        value = metrics.get(name, math.nan)
        sign = 1 if relation == ">=" else -1
        if not sign * value >= sign * bound:
            shown = "has no value" if math.isnan(value) else f"is {value:.6g}"
            failed.append(f"{name} {shown}, required is {relation} {bound:g}")
    if failed:
        raise RunError("; ".join(failed))


def _say(sentence: str, everywhere: bool = False) -> None:
    # All processes of a machine meet the same wrong input; one of them says it.
    if everywhere or os.environ.get("LOCAL_RANK", "0") == "0":
        print(sentence, file=sys.stderr)
