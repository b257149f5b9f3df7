from __future__ import annotations

import pytest

from visionattn.integrations.openmmlab import check_versions, versions

WORKING = {
    "onedl-mmengine": "0.10.12",
    "onedl-mmcv": "2.3.6",
    "onedl-mmdetection": "3.5.1",
    "onedl-mmsegmentation": "1.4.2",
}


def test_this_installation_works() -> None:
    check_versions()


@pytest.mark.parametrize(
    ("installed", "sentence"),
    [
        ({**WORKING, "onedl-mmcv": None}, "onedl-mmcv is not installed"),
        ({**WORKING, "onedl-mmdetection": "3.4.0"}, "onedl-mmdetection 3.4.0 cannot work, 3.5.1 is needed"),
        ({**WORKING, "mmcv": "2.1.0"}, "mmcv 2.1.0 cannot work.*pip uninstall mmcv, then"),
        ({"mmengine": "0.10.7", "mmdet": "3.3.0"}, "mmengine 0.10.7, mmdet 3.3.0 cannot work"),
    ],
)
def test_what_cannot_work_is_refused(
    installed: dict[str, str | None], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "_version", installed.get)
    with pytest.raises(ImportError, match=sentence) as error:
        check_versions()
    assert 'pip install "visionattn[openmmlab]"' in str(error.value)


def test_one_toolbox_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_version", {**WORKING, "onedl-mmdetection": None}.get)
    check_versions()
