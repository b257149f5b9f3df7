"""Registers the networks with timm as soon as timm is imported, so that `import visionattn` costs nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Parts of the package that do without timm. Before any other the networks are imported, as a whole and in
# their own order: were one of their parts halfway through its import of timm, they could not use it yet.
_WITHOUT_TIMM = ("_compat", "_registration", "cli", "errors", "files", "kernels")


def register_with_timm() -> None:
    """Register the networks: at once if timm is there, else right after its import, whoever imports it."""
    if "timm" in sys.modules:
        import_module("visionattn.models")
    else:
        sys.meta_path.insert(0, _Registrar())


class _Registrar(MetaPathFinder):
    """Finds nothing by itself; notices the imports of timm and of what needs it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, rest = name.partition(".")
        if package == "visionattn" and rest.partition(".")[0] not in _WITHOUT_TIMM:
            self.register()
        if name != "timm":
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, _Registrar))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader, self)
        return spec

    def register(self) -> None:
        """Import the networks and notice nothing more."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            import_module("visionattn.models")


class _Registering(Loader):
    """Loads timm as its own loader does, then the networks."""

    def __init__(self, own: Loader, registrar: _Registrar) -> None:
        self.own, self.registrar = own, registrar

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.own
        self.own.exec_module(module)
        self.registrar.register()
