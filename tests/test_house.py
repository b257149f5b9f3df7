"""The plan of the house: who may import whom, how large a file and a folder may be, what the wheel holds."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "visionattn"
# From the ground up. A module imports from lower floors, and from its own without circles.
FLOORS = (
    ("errors", "files", "_compat"),
    ("kernels",),
    ("layers",),
    ("models.registry",),
    ("models.frames",),
    ("models.hosts",),
    ("models", "heads"),
    ("checkpoints", "data", "inference"),
    ("engine", "integrations"),
    ("tasks", "predict"),
    ("cli",),
)
# Above all floors, beside the top `__init__`: what it needs to register the networks.
ROOF = ("", "_registration")
MOST_LINES, MOST_FILES, MOST_LINES_OF_A_TOOL = 500, 16, 12


def name_of(path: Path) -> str:
    """The dotted name of a file of the repository."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports_in(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name) of every import, in functions and by name too; "" is the module as a whole.

    Those for the type checker alone, under `if TYPE_CHECKING`, import nothing and are left out.
    """
    for child in ast.iter_child_nodes(node):
        if (
            isinstance(child, ast.If)
            and isinstance(child.test, ast.Name)
            and child.test.id == "TYPE_CHECKING"
        ):
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name, "") for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from ((child.module or "", alias.name) for alias in child.names)
        else:
            if isinstance(child, ast.Call) and ast.unparse(child.func).endswith("import_module"):
                name = getattr(child.args[0], "value", None)  # of a constant; what is computed is not seen
                yield from [(name, "")] if isinstance(name, str) else []
            yield from imports_in(child)


@cache
def only_hands_on(module: str) -> bool:
    """Whether a package's `__init__` holds nothing but imports and dunder names."""
    if MODULES[module].name != "__init__.py":
        return False
    return all(
        isinstance(line, ast.Import | ast.ImportFrom)
        or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
        or (isinstance(line, ast.Assign) and all(ast.unparse(t).startswith("__") for t in line.targets))
        for line in tree_of(module).body
    )


def sources(module: str, name: str) -> set[str]:
    """The modules of the package behind an import: through an `__init__` that only hands names on."""
    if f"{module}.{name}" in MODULES:
        module, name = f"{module}.{name}", ""
    if module not in MODULES:
        return set()
    if module == "visionattn" or not only_hands_on(module):
        return {module}
    handed_on = [(m, n) for m, n in imports_in(tree_of(module)) if not name or name == (n or m)]
    return {source for m, n in handed_on for source in sources(m, n)} or {module}


@cache
def imported_by(module: str) -> frozenset[str]:
    """Modules of the package that a file imports anywhere in it."""
    found = set().union(*(sources(m, n) for m, n in imports_in(tree_of(module))))
    return frozenset(found - {module})


def floor_of(module: str) -> int:
    """The number of a module's floor."""
    inside = module.removeprefix("visionattn").removeprefix(".")
    fitting = [
        (len(room), number)
        for number, rooms in enumerate(FLOORS)
        for room in rooms
        if f"{inside}.".startswith(f"{room}.")
    ]
    assert fitting or inside in ROOF, f"{module} stands on no floor of the plan"
    return max(fitting)[1] if fitting else len(FLOORS)


def circles() -> list[set[str]]:
    """Groups of modules each of which imports every other, directly or by way of others (Tarjan)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for other in imported_by(module):
            if other not in order:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == order[module]:
            group = set(stack[stack.index(module) :])
            del stack[stack.index(module) :]
            found.extend([group] if len(group) > 1 else [])

    for module in MODULES:
        if module not in order and not only_hands_on(module):
            visit(module)
    return found


def test_nothing_imports_upward() -> None:
    upward = [
        f"{MODULES[module].relative_to(ROOT)}: {module} -> {other}"
        for module in MODULES
        for other in sorted(imported_by(module))
        if floor_of(other) > floor_of(module)
    ]
    assert not upward, "\n".join(upward)


def test_nothing_goes_in_a_circle() -> None:
    assert not circles(), "\n".join(
        f"{module} -> {other}"
        for group in circles()
        for module in sorted(group)
        for other in sorted(imported_by(module) & group)
    )


def test_nobody_imports_the_top_package() -> None:
    guilty = [module for module in MODULES if "visionattn" in imported_by(module)]
    assert not guilty, guilty


def test_the_package_knows_nothing_that_stands_beside_it() -> None:
    beside = {"benchmarks", "tools", "tests", "configs"}
    guilty = [m for m in MODULES if beside & {name.split(".")[0] for name, _ in imports_in(tree_of(m))}]
    assert not guilty, guilty


def test_kernels_are_usable_alone() -> None:
    kernels = [module for module in MODULES if f"{module}.".startswith("visionattn.kernels.")]
    for module in kernels:
        roots = {name.split(".")[0] for name, _ in imports_in(tree_of(module))}
        assert roots.isdisjoint({"timm", "torchvision", "safetensors"}), module
        bases = {
            ast.unparse(base)
            for node in ast.walk(tree_of(module))
            if isinstance(node, ast.ClassDef)
            for base in node.bases
        }
        assert not {base for base in bases if base.split(".")[-1] == "Module"}, module
    # Without the top package, which brings the networks along.
    code = f"""
import sys, types
sys.modules["visionattn"] = top = types.ModuleType("visionattn")
top.__path__ = [{str(PACKAGE)!r}]
import visionattn.kernels
others = [name for name in sys.modules if name.startswith("visionattn.")]
others = {{name.split(".")[1] for name in others}} - {{"kernels", "errors", "files", "_compat"}}
print(sorted(others | ({{"timm"}} & set(sys.modules))))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_no_file_is_long() -> None:
    folders = (PACKAGE, ROOT / "benchmarks", ROOT / "tools")
    files = [f for folder in folders for ending in ("py", "c", "h") for f in folder.rglob(f"*.{ending}")]
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    long = {str(f.relative_to(ROOT)): count for f, count in lengths.items() if count > MOST_LINES}
    assert not long, long


def test_no_folder_is_crowded() -> None:
    folders = [
        PACKAGE,
        *(path for path in PACKAGE.rglob("*") if path.is_dir() and path.name != "__pycache__"),
    ]
    counts = {
        str(folder.relative_to(ROOT)): sum(path.is_file() for path in folder.iterdir())
        for folder in folders
        if folder != PACKAGE / "models"
    }
    crowded = {folder: count for folder, count in counts.items() if count > MOST_FILES}
    assert not crowded, crowded


def test_tools_only_call_the_command_line() -> None:
    for path in sorted((ROOT / "tools").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= MOST_LINES_OF_A_TOOL, path.name
        tree = ast.parse(text)
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)], (
            path.name
        )
        ours = {m for m, _ in imports_in(tree) if m.split(".")[0] in ("visionattn", "benchmarks")}
        assert all(m.startswith(("visionattn.cli", "benchmarks")) for m in ours), path.name


def test_the_wheel_holds_the_package_alone() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r"^\[tool\.setuptools\.packages\.find\]\n((?:.+\n)+)", text, re.MULTILINE)
    assert found is not None
    assert found[1] == 'include = ["visionattn*"]\n'
    beside = [
        path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name.startswith("visionattn")
    ]
    assert beside == ["visionattn"]
