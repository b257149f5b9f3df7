"""The table of what works with the networks says what is so."""

from __future__ import annotations

from pathlib import Path

import pytest
from compatibility import REASONS, USES, read_table, result, write_table
from families import FAMILIES

TABLE = Path(__file__).parents[2] / "docs" / "compatibility.md"
COMMITTED = read_table(TABLE)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("use", USES)
def test_a_cell_of_the_table(name: str, use: str):
    assert result(name, use) == COMMITTED[name, use]


def test_the_table_has_every_family_and_use(tmp_path: Path):
    assert set(COMMITTED) == {(name, use) for name in FAMILIES for use in USES}
    assert {use for use, _ in REASONS} <= set(USES)
    write_table(COMMITTED, tmp_path / "table.md")
    assert read_table(tmp_path / "table.md") == COMMITTED


def test_a_failure_without_a_reason_is_a_fault(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise RuntimeError("it fell over")

    monkeypatch.setitem(USES, "deepcopy", USES["deepcopy"]._replace(check=fail))
    with pytest.raises(AssertionError, match=r"deepcopy of cfsr_x2 fails without a reason.*it fell over"):
        result("cfsr_x2", "deepcopy")
