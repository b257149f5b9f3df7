"""Errors that users meet as one sentence, and the nearest-name search that the sentences use."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """A name, file or value that the user gave cannot work; the message is one sentence for them."""


class RunError(RuntimeError):
    """A run cannot go on for a reason outside the program; the message is one sentence for the user."""


class WriteError(RunError):
    """A file cannot be written: the place is none, the name too long, the permission missing."""


class LostProcess(RunError):
    """Another process of the run is gone; every process that finds out says so."""


@contextmanager
def as_input_error(context: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of the given `kinds` inside the block into an `InputError` that starts with `context`.

    For calls whose only reason to fail in these ways is what the user gave: building the network that they
    named, opening the folder that they named. The original error stays attached as the cause.

    Args:
        context: what was attempted, for instance ``"cannot read data.root"``.
        kinds: the exception classes to translate; `InputError` passes unchanged, and so does a `RunError`
            that is not named itself.
    """
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        # A `WriteError` is named to be translated; `RuntimeError` means others than those of a run.
        if isinstance(error, RunError) and type(error) not in kinds:
            raise
        raise InputError(f"{context}: {one_line(error)}") from error


_NO_MEMORY = re.compile(
    r"out of memory|(can't|cannot|could not|failed to|unable to) (allocate|create a (primitive|memory))"
    r"|not enough memory|bad_alloc",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's own, or one of PyTorch and of what it calls."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
    )


def one_line(error: BaseException) -> str:
    """The message of an error with its line breaks removed, or its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def nearest(name: str, valid: Iterable[str], count: int = 3) -> str:
    """Say which of the `valid` names a wrong `name` may have meant.

    Returns:
        ``"did you mean a, b or c?"``, or ``"valid are a, b, ..."`` where none resembles it.
    """
    names = sorted(set(valid))
    close = difflib.get_close_matches(name, names, n=count, cutoff=0.55)
    if close:
        return f"did you mean {join_words(close, 'or')}?"
    shown = names[:20] + ([f"{len(names) - 20} more"] if len(names) > 20 else [])
    return f"valid are {join_words(shown, 'and')}"


def join_words(words: list[str], conjunction: str) -> str:
    """``["a", "b", "c"]`` as ``"a, b or c"``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {conjunction} {words[-1]}"
