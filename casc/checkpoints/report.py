"""What a conversion did: one row per tensor, one line per convention."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

How = Literal[
    "matched", "renamed", "transposed", "reordered", "copied", "created", "left over", "missing"
]
# What happened last counts most: a tensor that was renamed and reordered is "reordered".
_ORDER: tuple[How, ...] = ("matched", "renamed", "copied", "transposed", "reordered", "created")
HOWS: tuple[How, ...] = (*_ORDER, "left over", "missing")


class Row(NamedTuple):
    """One tensor."""

    how: How
    source: str | None
    """Its name in what was read; None where it was created or is missing."""
    target: str | None
    """Its name in what was written; None where it was left over or is missing."""
    shape: tuple[int, ...]
    note: str = ""


class Convention(NamedTuple):
    """Something that two programs do differently, or could."""

    what: str
    value: str
    """As it is in the source, and what became of it."""
    known: Literal["file", "given", "assumed", "fixed"]
    """From the file; from a flag; assumed, as the file doesn't say; or by the format's nature."""
    flag: str = ""
    """What to say it with, where it was assumed."""


class Report(NamedTuple):
    """All that a conversion did."""

    source: str
    target: str
    rows: list[Row]
    conventions: list[Convention]
    settings: list[str]
    """What to write in the other program's config, for it to compute the same."""
    differences: list[str]
    """What the other program can't be made to do, accepted by flag."""

    def __str__(self) -> str:
        lines = [f"{self.source} -> {self.target}"]
        for how in HOWS:
            rows = [row for row in self.rows if row.how == how]
            lines += [f"  {how:<10} {len(rows):>4}  {text}" if i == 0 else f"{'':<18}{text}"
                      for i, text in enumerate(_grouped(rows))]  # fmt: skip
        lines.append("conventions")
        for c in self.conventions:
            known = {"file": "as the file says", "given": "as given", "fixed": ""}.get(c.known)
            origin = f"assumed; {c.flag}" if known is None else known
            lines.append(f"  {c.what:<17} {c.value}" + (f"  [{origin}]" if origin else ""))
        for title, texts in (("set there", self.settings), ("differs there", self.differences)):
            lines += [title, *(f"  {text}" for text in texts)] if texts else []
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Everything, each tensor by itself."""
        return {
            "source": self.source,
            "target": self.target,
            "counts": {how: sum(row.how == how for row in self.rows) for how in HOWS},
            "tensors": [{**row._asdict(), "shape": list(row.shape)} for row in self.rows],
            "conventions": [c._asdict() for c in self.conventions],
            "settings": self.settings,
            "differences": self.differences,
        }


def chain(first: Iterable[Row], second: Iterable[Row]) -> list[Row]:
    """The rows of two conversions in a row, by the names in between."""
    first, second = list(first), list(second)
    between = {row.target: row for row in first if row.target is not None}
    used = {row.source for row in second}
    done = [_joined(between[row.source], row) if row.source in between else row for row in second]
    rest = [row for row in first if row.target is None or row.target not in used]
    return done + rest


def _joined(first: Row, second: Row) -> Row:
    note = "; ".join(note for note in (first.note, second.note) if note)
    if second.target is None or first.source is None:
        if first.source is None and second.target is None:
            return second._replace(note=note)
        how = "left over" if second.target is None else first.how
        return Row(how, first.source, second.target, second.shape, note)
    how = max((first.how, second.how), key=_ORDER.index)
    if how in ("matched", "renamed"):
        how = "matched" if first.source == second.target else "renamed"
    return Row(how, first.source, second.target, second.shape, note)


def _grouped(rows: Sequence[Row]) -> list[str]:
    """Rows that differ in numbers only as one line, in order of first appearance."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((_part(row), row.note), []).append(row)
    return [
        (f"{part}.* x{len(found)}" if len(found) > 1 else _whole(found[0]))
        + (f" ({note})" if note else "")
        for (part, note), found in groups.items()
    ]


def _part(row: Row) -> str:
    source, target = (_begin(name) if name else "" for name in (row.source, row.target))
    if not source or not target or source == target:
        return source or target
    return f"{source}.* -> {target}"


def _whole(row: Row) -> str:
    names = dict.fromkeys(name for name in (row.source, row.target) if name)
    return " -> ".join(names)


def _begin(name: str) -> str:
    parts = name.split(".")[: 3 if ".bottom_up." in name else 2]
    return ".".join("*" if part.isdigit() else part for part in parts)
