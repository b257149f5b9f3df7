"""Networks for other runtimes: ONNX, `torch.export` programs, AOTInductor packages; checked, then kept."""

from __future__ import annotations

import importlib.util
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from visionattn.files import replacing
from visionattn.kernels import use_backend

Format = Literal["program", "onnx", "aoti"]
Size = tuple[int, int]
Shape = tuple[int, int, int]  # images, height, width
# The suffix of each format's files; both of PyTorch's are `.pt2`.
FORMATS: dict[Format, str] = {"program": ".pt2", "onnx": ".onnx", "aoti": ".pt2"}
# Reordered sums of float32 differ by less than this part of the largest output.
TOLERANCE = 1e-4

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class ExportError(RuntimeError):
    """A network that a format cannot hold, or whose exported form computes something else; one sentence."""


@dataclass(frozen=True)
class Exported:
    """An exported file that gives what the network gives.

    Attributes:
        path: the file.
        format: its format.
        sizes: (batch, height, width) of the inputs at which both were compared.
        refused: sizes that the network takes and the file's own checks do not.
        difference: the largest difference of the outputs, relative to the largest output.
        seconds: time of the export, without the comparison.
    """

    path: Path
    format: Format
    sizes: tuple[Shape, ...]
    refused: tuple[Shape, ...]
    difference: float
    seconds: float

    def __str__(self) -> str:
        equal = ", ".join(map(_named, self.sizes))
        text = f"{self.path}: {self.format}, {self.seconds:.0f} s, equal to {self.difference:.0e} at {equal}"
        return f"{text}; refuses {', '.join(map(_named, self.refused))}" if self.refused else text


def export_network(
    network: nn.Module,
    path: str | os.PathLike[str],
    format: Format,
    *,
    size: Size | None = None,
    batch: int = 1,
    dynamic: bool = False,
    tolerance: float = TOLERANCE,
) -> Exported:
    """Export a network for inference, compare the file with the network, and keep it if they agree.

    The plain PyTorch implementation of the kernels is exported, whatever runs otherwise.

    Args:
        network: a network on the CPU in float32, images `[B, C, H, W]` in.
        path: where to; an existing file is replaced only by a whole and equal one.
        format: `"program"` (`torch.export.save`), `"onnx"`, or `"aoti"` (compiled for this kind of
            machine by AOTInductor, which needs a C++ compiler).
        size: height and width of the input; by default that of the network's configuration.
        batch: images in the input.
        dynamic: let batch, height and width vary. The export follows the way that the network takes at
            `size`: other sizes are compared too, and those that take another way are refused.
        tolerance: of the comparison.

    Raises:
        ExportError: the format cannot hold the network, or gives other outputs.
        ValueError: a path with another suffix, or a format whose libraries are not installed.
    """
    path = Path(path)
    if path.suffix != FORMATS[format]:
        raise ValueError(f"files of the format {format} end in {FORMATS[format]}, but {path.name} was given")
    check_libraries(format)
    return write_trace(
        trace_network(network, size=size, batch=batch, dynamic=dynamic), path, format, tolerance
    )


def check_libraries(format: Format) -> None:
    """Raise ValueError if a format needs libraries that are not installed."""
    if format == "onnx" and (absent := [n for n in _ONNX if importlib.util.find_spec(n) is None]):
        raise ValueError(f"ONNX needs {' and '.join(absent)}: pip install 'visionattn[export]'")


@dataclass(frozen=True)
class Trace:
    """A network as a program, from which files of every format are written.

    Attributes:
        program: the program.
        wanted: what the network gives, by the (batch, height, width) of its input; the first is the
            program's own.
        channels: of the input.
        seconds: time of tracing.
    """

    program: ExportedProgram
    wanted: dict[Shape, tuple[Tensor, ...]]
    channels: int
    seconds: float


def trace_network(
    network: nn.Module, *, size: Size | None = None, batch: int = 1, dynamic: bool = False
) -> Trace:
    """The program of a network for inference; arguments as in `export_network`.

    Raises:
        ExportError: the network cannot be traced, or takes images of one size and is to take any.
    """
    network = network.eval()
    cfg: Any = network.pretrained_cfg
    if dynamic and cfg.get("fixed_input_size"):
        raise ExportError(f"{type(network).__name__} takes images of one size: export it for that one")
    channels, *usual = cfg["input_size"]
    height, width = size or usual
    # With one image, PyTorch would take the batch for a constant.
    first = (max(batch, 2) if dynamic else batch, height, width)
    others = _other_sizes(first) if dynamic else ()
    shapes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},) if dynamic else None
    with torch.no_grad(), use_backend("torch"):
        wanted = {shape: _as_tuple(network(_image(channels, shape))) for shape in (first, *others)}
        started = time.perf_counter()
        try:
            image = (_image(channels, first),)
            program = torch.export.export(network, image, dynamic_shapes=shapes, strict=False)
        except Exception as error:  # the exporter's errors have no common class
            name = type(network).__name__
            raise ExportError(f"torch.export cannot trace {name}: {_reason(error)}") from error
    return Trace(program, wanted, channels, time.perf_counter() - started)


def write_trace(trace: Trace, path: Path, format: Format, tolerance: float = TOLERANCE) -> Exported:
    """Write a program as a file, compare the file with the network, and keep it if they agree.

    Raises:
        ExportError: the format cannot hold the program, or gives other outputs.
    """
    started = time.perf_counter()
    with torch.no_grad(), replacing(path) as beside:
        named = beside.with_name(f"{beside.name}{path.suffix}")  # AOTInductor insists on its suffix
        try:
            _WRITERS[format](trace.program, _image(trace.channels, next(iter(trace.wanted))), named)
            seconds = trace.seconds + time.perf_counter() - started
            refused, difference = _compare(_READERS[format](named), trace, tolerance)
            os.replace(named, beside)
        finally:
            named.unlink(missing_ok=True)
    compared = tuple(shape for shape in trace.wanted if shape not in refused)
    return Exported(path, format, compared, refused, difference, seconds)


def _other_sizes(first: Shape) -> tuple[Shape, ...]:
    """Sizes that a dynamic file should take: larger, not square, not divisible, one image, smaller."""
    _, height, width = first
    return (1, height + 32, width + 64), (3, height + 11, width + 5), (2, height // 2, width // 2)


def _compare(
    run: Callable[[Tensor], tuple[Tensor, ...]], trace: Trace, tolerance: float
) -> tuple[tuple[Shape, ...], float]:
    """The sizes that the program's own checks refuse, and the largest relative difference at the others."""
    refused, largest, checked, first = [], 0.0, trace.program.module(), next(iter(trace.wanted))
    for shape, expected in trace.wanted.items():
        image = _image(trace.channels, shape)
        try:
            # ONNX drops the conditions under which the program holds: what it refuses is not to be trusted.
            checked(image)
        except Exception as error:
            if shape == first:
                raise ExportError(f"the program refuses its own input: {_reason(error)}") from error
            refused.append(shape)
            continue
        try:
            outputs = run(image)
        except Exception as error:
            raise ExportError(f"the exported file fails at {_named(shape)}: {_reason(error)}") from error
        for ours, theirs in zip(outputs, expected, strict=True):
            if ours.shape != theirs.shape:
                shapes = f"{tuple(ours.shape)}, the network {tuple(theirs.shape)}"
                raise ExportError(f"at {_named(shape)} the file gives {shapes}")
            difference = ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12)).item()
            if not difference <= tolerance:
                raise ExportError(f"at {_named(shape)} the outputs differ by {difference:.1e} of the largest")
            largest = max(largest, difference)
    # A file for two sizes would be no dynamic one.
    if len(trace.wanted) > 1 and all(shape in refused for shape in list(trace.wanted)[1:3]):
        raise ExportError(
            f"the program refuses all larger sizes than {_named(first)}, because the network takes another "
            "way there: export it at a larger size"
        )
    return tuple(refused), largest


def _write_program(program: ExportedProgram, image: Tensor, path: Path) -> None:
    try:
        # An open file, because torch's own writer does not say when the disk is full.
        with path.open("wb") as file:
            torch.export.save(program, file)
    except OSError:
        raise
    except Exception as error:  # the serializer's errors have no common class
        raise ExportError(f"torch.export cannot save the program: {_reason(error)}") from error


def _write_onnx(program: ExportedProgram, image: Tensor, path: Path) -> None:
    try:
        exported = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["image"])
    except Exception as error:
        raise ExportError(f"ONNX cannot express the network: {_reason(error)}") from error
    assert exported is not None  # without a file name the exporter returns the program
    exported.save(path, external_data=False)


def _write_aoti(program: ExportedProgram, image: Tensor, path: Path) -> None:
    from torch._inductor import aoti_compile_and_package

    try:
        aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:
        raise ExportError(f"AOTInductor cannot compile the network: {_reason(error)}") from error


def _read_program(path: Path) -> Callable[[Tensor], tuple[Tensor, ...]]:
    module = torch.export.load(path).module()
    return lambda image: _as_tuple(module(image))


def _read_onnx(path: Path) -> Callable[[Tensor], tuple[Tensor, ...]]:
    from onnxruntime import InferenceSession

    session: Any = InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: tuple(torch.from_numpy(out) for out in session.run(None, {name: image.numpy()}))


def _read_aoti(path: Path) -> Callable[[Tensor], tuple[Tensor, ...]]:
    from torch._inductor import aoti_load_package

    module: Any = aoti_load_package(str(path))
    return lambda image: _as_tuple(module(image))


_WRITERS: dict[Format, Callable[[ExportedProgram, Tensor, Path], None]] = {
    "program": _write_program,
    "onnx": _write_onnx,
    "aoti": _write_aoti,
}
_READERS: dict[Format, Callable[[Path], Callable[[Tensor], tuple[Tensor, ...]]]] = {
    "program": _read_program,
    "onnx": _read_onnx,
    "aoti": _read_aoti,
}
_ONNX = ("onnx", "onnxscript", "onnxruntime")


def _image(channels: int, shape: Shape) -> Tensor:
    batch, height, width = shape
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(0))


def _as_tuple(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _named(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _reason(error: BaseException, limit: int = 200) -> str:
    """The first line of what caused an error, without colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = (_COLOURS.sub("", str(error)).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= limit else f"{text[:limit]}..."
