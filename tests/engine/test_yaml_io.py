"""One dialect of YAML for writing and reading: what is dumped comes back, in value and in kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from visionattn.engine.yaml_io import dump_value, dump_yaml, parse_value, read_yaml

LIKE_NUMBERS = st.from_regex(r"[-+0-9.eExXobn_:~<=!yt]{1,8}", fullmatch=True)
TEXTS = st.text() | LIKE_NUMBERS
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=6)


@given(st.dictionaries(TEXTS, VALUES, max_size=4))
def test_what_is_dumped_comes_back(content: dict[str, Any]) -> None:
    for text in (dump_yaml(content), dump_value(content)):
        assert repr(parse_value(text, "a")) == repr(content)


@given(TEXTS)
def test_other_readers_see_texts_too(text: str) -> None:
    assert yaml.safe_load(dump_yaml({"a": text})) == {"a": text}


@pytest.mark.parametrize(
    "text", ["1e3", "2e5", "1.5e3", "1e-3", "5E10", "12e+3", "010", "0o17", "1:30", "no", "~", "="]
)
def test_texts_that_look_like_something_else(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(dump_yaml({"names": [text]}))
    assert read_yaml(tmp_path / "a.yaml") == {"names": [text]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000", 1000),
        ("1:30", "1:30"),
        ("no", "no"),
    ],
)
def test_what_users_write(text: str, value: Any) -> None:
    assert repr(parse_value(text, "a")) == repr(value)
