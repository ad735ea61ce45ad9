from hypothesis import given
from hypothesis import strategies as st

from data_tools.report import (
    KINDS,
    Finding,
    format_findings,
    format_ids,
    format_table,
    parse_ids,
    summarise,
)


@given(st.lists(st.integers(-50, 50) | st.integers(-(2**63), 2**63)))
def test_ids_survive_their_short_form(ids: list[int]):
    assert parse_ids(format_ids(ids)) == sorted(set(ids))


def test_ids_are_short():
    assert format_ids([9, 4, 5, 6, 12, 11]) == "4-6 9 11 12"
    assert format_ids(range(1, 100_001)) == "1-100000"
    assert format_ids([]) == ""


def test_findings_are_counted_by_kind_with_all_ids():
    findings = [Finding("crowd", i) for i in (5, 4, 3)]
    findings += [Finding("unreadable", i, f"{i}.jpg: bad\nfile") for i in range(9)]
    summary = summarise(findings)
    assert summary["crowd"] == {
        "subject": "annotation",
        "outcome": "evaluation only",
        "count": 3,
        "ids": "3-5",
        "examples": [],
    }
    assert summary["unreadable"]["count"] == 9
    assert summary["unreadable"]["examples"][1] == "1: 1.jpg: bad\\nfile"
    assert len(summary["unreadable"]["examples"]) == 5


def test_the_table_shows_every_kind_found():
    text = format_findings(summarise(Finding(kind, 7, "why") for kind in KINDS))
    for kind in KINDS.values():
        assert kind.text in text
    assert format_findings({}) == "nothing to report"


def test_columns_line_up():
    lines = format_table([["a", "count"], ["long", "7"], ["b", "1,234"]], right=[1]).split("\n")
    assert lines == ["a     count", "-----------", "long      7", "b     1,234"]
