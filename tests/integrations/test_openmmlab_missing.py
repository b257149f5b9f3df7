from __future__ import annotations

import importlib.util

import pytest


@pytest.mark.skipif(importlib.util.find_spec("mmengine") is not None, reason="mmengine is installed")
def test_the_command_that_installs_it_is_named() -> None:
    with pytest.raises(ImportError, match=r'onedl-mmengine is not installed: pip install "visionattn\['):
        importlib.import_module("visionattn.integrations.openmmlab")
