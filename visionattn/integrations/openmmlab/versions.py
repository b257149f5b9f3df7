"""Which versions of the OpenMMLab packages work."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

INSTALL = 'pip install "visionattn[openmmlab]"'
# The forks' releases that are tested; the originals went stale before torch 2.6.
_OLDEST = {
    "onedl-mmengine": "0.10.12",
    "onedl-mmcv": "2.3.6",
    "onedl-mmdetection": "3.5.1",
    "onedl-mmsegmentation": "1.4.2",
}
_ORIGINALS = ("mmengine", "mmengine-lite", "mmcv", "mmcv-lite", "mmcv-full", "mmdet", "mmsegmentation")


def check_versions() -> None:
    """Refuse an installation that cannot work, with the command that installs one that does.

    Raises:
        ImportError: a package is missing or too old, or one of the unmaintained originals is installed, whose
            files have the same names as those of the fork.
    """
    originals = [f"{name} {found}" for name in _ORIGINALS if (found := _version(name))]
    if originals:
        names = " ".join(name.split()[0] for name in originals)
        raise ImportError(
            f"{', '.join(originals)} cannot work: the originals are no longer maintained, and their files "
            f"clash with those of the forks; pip uninstall {names}, then {INSTALL}"
        )
    installed = {name: _version(name) for name in _OLDEST}
    for name in ("onedl-mmengine", "onedl-mmcv"):
        if installed[name] is None:
            raise ImportError(f"{name} is not installed: {INSTALL}")
    for name, found in installed.items():
        if found is not None and Version(found) < Version(_OLDEST[name]):
            raise ImportError(f"{name} {found} cannot work, {_OLDEST[name]} is needed: {INSTALL}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
