"""The parts of the page that are about the run itself: settings, machine, what went wrong."""

from collections.abc import Iterator
from typing import Any

from casc.checkpoints.format import upgrade_recipe
from casc.config import differences, to_json
from casc.draw.html import escape, table
from casc.report.history import History
from casc.report.sections import note, when
from casc.train.recipe import Recipe

_MESSAGES = 200


def recipe(history: History) -> str:
    """All settings, those that aren't the default first."""
    if not history.recipe:
        return note("The folder has no recipe.")
    changed = differences(to_json(Recipe(name="")), history.recipe)
    changed.pop("name", None)
    rows = [
        [(_flag(name), name), (_shown(new), _shown(new)), (_shown(old), _shown(old))]
        for name, (old, new) in changed.items()
        if new is not None or old is not None
    ]
    every = [
        [(_flag(name), name), (_shown(value), _shown(value))]
        for name, value in _leaves(history.recipe)
    ]
    other = "".join(
        note(f"From step {part.step:,} on, until it was continued, the run had {text}.")
        for part in history.parts
        if (text := _others(upgrade_recipe(part.facts.get("recipe") or {}), history.recipe))
    )
    return (
        other
        + table("What differs from the defaults", ["setting", "value", "default"], rows)
        + f"<details><summary>All {len(every)} settings</summary>"
        + table("All settings", ["setting", "value"], every, filtered="Find a setting")
        + "</details>"
    )


def environment(history: History) -> str:
    """Versions and machines, a column for each part of the run that had others."""
    described: list[tuple[list[int], dict[str, Any]]] = []
    for part in history.parts:
        facts = part.facts
        about = {
            "casc": facts.get("casc"),
            "torch": facts.get("torch"),
            **(facts.get("environment") or {}),
            "kind of device": facts.get("device"),
            "processes": facts.get("world"),
        }
        if described and described[-1][1] == about:
            described[-1][0].append(part.step)
        else:
            described.append(([part.step], about))
    if not described:
        return note("The log doesn't say where it ran.")
    names = list(dict.fromkeys(name for _, about in described for name in about))
    rows = [
        [(name, name), *((_known(about.get(name)),) * 2 for _, about in described)]
        for name in names
    ]
    heads = ["", *(f"from step {steps[0]:,}" for steps, _ in described)]
    return table("Versions and machine, as the log has them", heads, rows)


def messages(history: History) -> str:
    """Warnings, errors and stops."""
    if not history.messages:
        return "<p>The log has no warnings and no errors.</p>"
    latest = history.messages[-_MESSAGES:]
    cut = len(history.messages) - len(latest)
    head = f"<p>The last {len(latest)} of {len(history.messages)}.</p>" if cut else ""
    items = "".join(
        f"<li><time>{escape(when(r['time']))}</time> {escape(r.get('text', r['kind']))}</li>"
        for r in latest
    )
    return f'{head}<ul class="messages">{items}</ul>'


def _others(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Settings of another part of the run; those that its casc didn't know yet are left out."""
    known = dict(_leaves(before))
    return ", ".join(
        f"{_flag(name)} {_shown(known[name])}"
        for name, value in _leaves(now)
        if name in known and known[name] != value
    )


def _known(value: object) -> str:
    return "not recorded" if value is None else _shown(value)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(entry)}" for key, entry in value.items())
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def _leaves(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, entry in value.items():
        if isinstance(entry, dict):
            yield from _leaves(entry, f"{prefix}{key}.")
        else:
            yield prefix + key, entry
