"""Samples that cannot be used: looked for by all processes before a run, then refused or passed over."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor

from visionattn.data.files import shorten
from visionattn.engine.distributed import gather_objects, process_count, process_index
from visionattn.errors import InputError


def find_broken(count: int, why_broken: Callable[[int], str | None]) -> dict[int, str]:
    """The samples of which `why_broken` says something, and what it says, in the order of the samples.

    Every process asks for its share; all of them must call this.
    """
    mine = range(process_index(), count, process_count())
    with ThreadPoolExecutor() as threads:  # decoding releases the interpreter lock
        found = [(index, why) for index, why in zip(mine, threads.map(why_broken, mine), strict=True) if why]
    return dict(sorted(pair for part in gather_objects(found) for pair in part))


def refuse_or_skip(problems: Collection[str], total: int, kind: str, option: str, choice: str) -> None:
    """Say what is broken: as an error, unless the choice is to skip it and something is left.

    Args:
        problems: what is wrong with each broken sample.
        total: samples that were looked at.
        kind: what they are and what cannot be done, as ``"images cannot be read"``.
        option: by which the user chooses.
        choice: ``"error"`` or ``"skip"``.

    Raises:
        InputError: there are problems, which shall not be skipped, or nothing else is left.
    """
    if not problems:
        return
    sentence = f"{len(problems)} of {total} {kind}: {shorten(list(problems), 5)}"
    if choice == "error" or len(problems) == total:
        raise InputError(f"{sentence}; repair or remove them, or pass over them with {option}=skip")
    if process_index() == 0:
        print(f"skipped: {sentence}", file=sys.stderr)
