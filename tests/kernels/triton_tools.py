"""Testing Triton kernels without a GPU: in Triton's interpreter, and compiled ahead of time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Name of a target: backend, architecture, threads in a warp, shared memory of a program in bytes.
TARGETS: dict[str, tuple[str, int | str, int, int]] = {
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers of a thread, spilled bytes, shared bytes, and whether it uses
    the matrix instructions of warp groups (Hopper)."""

    registers: int
    spilled: int
    shared: int
    wgmma: bool


def run_interpreted(tests: Path, *options: str) -> None:
    """Run a file of tests in a process of its own in which Triton interprets its kernels.

    `options` are further ones for pytest.

    Triton reads its environment once, when it is imported, and an interpreted kernel cannot be compiled: the
    two kinds of tests do not fit into one process.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(tests), *options]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def interpret_quickly() -> None:
    """Leave out the interpreter's check of every sum and product of integers: two fifths of its time."""
    from triton.runtime.interpreter import interpreter_builder

    interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)


def compile_for(target: str, kernel: Any, types: dict[str, Any], options: dict[str, Any]) -> Resources:
    """Compile a kernel for a GPU that need not be there.

    Args:
        target: a name of `TARGETS`.
        kernel: a function under `triton.jit`.
        types: Triton's type of each argument that is no `tl.constexpr`, as `"*fp16"`, `"i32"`, or a tuple of
            such and of `tl.constexpr`, in any depth. Pointers, and integers called `stride...`, are taken to
            be divisible by 16, as they are for common widths: a launch notices that by itself.
        options: what the kernel is launched with: constants, `num_warps`, `num_stages`.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants: dict[Any, Any] = {name: v for name, v in options.items() if name in kernel.arg_names}
    launch = {name: value for name, value in options.items() if name not in constants}
    aligned = {}

    def typed(kind: Any, name: str, path: tuple[int, ...]) -> Any:
        """The type of an argument; its constants and what is aligned are noted on the way."""
        if isinstance(kind, tuple):
            names = [name if name.startswith("stride") else n for n in getattr(kind, "_fields", kind)]
            parts = (typed(k, n, (*path, i)) for i, (k, n) in enumerate(zip(kind, map(str, names))))
            return type(kind)(*parts) if hasattr(kind, "_fields") else tuple(parts)
        if isinstance(kind, triton.language.constexpr):
            constants[path] = kind.value
            return "constexpr"
        if name.startswith("stride") or kind.startswith("*"):
            aligned[path] = [["tt.divisibility", 16]]
        return kind

    names = kernel.arg_names
    signature = {name: typed(types.get(name, "constexpr"), name, (i,)) for i, name in enumerate(names)}
    source = ASTSource(kernel, signature, constants, aligned)
    backend, architecture, warp, _ = TARGETS[target]
    compiled = triton.compile(source, target=GPUTarget(backend, architecture, warp), options=launch)
    if backend == "hip":
        numbers = dict(
            re.findall(r"\.(vgpr_count|vgpr_spill_count|agpr_count):\s+(\d+)", compiled.asm["amdgcn"])
        )
        registers, spilled = int(numbers["vgpr_count"]), 4 * int(numbers["vgpr_spill_count"])
        return Resources(registers, spilled, compiled.metadata.shared, False)
    usage = _resource_usage(compiled.asm["cubin"])
    return Resources(
        usage["REG"], usage["STACK"], compiled.metadata.shared, "wgmma.mma_async" in compiled.asm["ptx"]
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(str(find_spec("triton").origin)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"  # type: ignore[union-attr]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
