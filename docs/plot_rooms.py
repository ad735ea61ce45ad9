"""Draw docs/rooms.svg, the rooms of casc and what each imports: `python docs/plot_rooms.py`.

An arrow that others already imply is left out: if train imports inference and inference imports
model, train's arrow to model says nothing new. That no arrow points up is the contract in
pyproject.toml, which `just lint` checks.
"""

from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parent.parent
COLUMN, ROW, WIDTH, HEIGHT = 150, 74, 116, 36
# Column and row of each room.
PLACES = {
    "recipes": (2, 0),
    "casc.cli": (2, 1),
    "casc.verify": (0, 2), "casc.bench": (1, 2), "casc.report": (3, 2), "casc.export": (4, 2),
    "casc.train": (2, 3),
    "data_tools": (0, 4), "casc.inference": (3, 4),
    "casc.draw": (1, 5), "casc.evaluate": (2, 5), "casc.checkpoints": (4, 5),
    "casc.model": (3, 6),
    "casc.data": (1, 7), "casc.distributed": (2, 7), "casc.ops": (4, 7),
    "casc.device": (2.5, 8),
}  # fmt: skip
# Every room may import these; their arrows would say nothing.
GROUND = ("casc.arguments", "casc.config", "casc.json_files", "casc.errors", "casc.printing")


def imports() -> dict[str, set[str]]:
    """Which room imports which."""
    graph = grimp.build_graph("casc", "data_tools", "recipes")

    def room(module: str) -> str | None:
        return next((n for n in PLACES if module == n or module.startswith(f"{n}.")), None)

    found: dict[str, set[str]] = {name: set() for name in PLACES}
    for module in graph.modules:
        importer = room(module)
        for target in graph.find_modules_directly_imported_by(module) if importer else ():
            imported = room(target)
            if importer and imported and imported != importer:
                found[importer].add(imported)
    return found


def reduced(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """The arrows that no longer path implies."""

    def below(name: str) -> set[str]:
        return set().union(*({each} | below(each) for each in arrows[name]))

    return {name: to - set().union(*map(below, to)) for name, to in arrows.items()}


def lines(room: str) -> int:
    """Lines of a room's sources."""
    place = ROOT / room.replace(".", "/")
    files = place.rglob("*.*") if place.is_dir() else [place.with_suffix(".py")]
    sources = (file for file in files if file.suffix in {".py", ".js", ".css"})
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in sources)


def box(room: str, x: float, y: float) -> str:
    """A room as a box with its name and lines."""
    return (
        f'<rect x="{x - WIDTH / 2:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="5"'
        f' fill="#e3f2fd" stroke="#1565c0"/><text x="{x:g}" y="{y + 16:g}" text-anchor="middle">'
        f'{room.removeprefix("casc.")}</text><text x="{x:g}" y="{y + 29:g}" font-size="10"'
        f' text-anchor="middle" fill="#455a64">{lines(room):,} lines</text>\n'
    )


def draw() -> str:
    """The picture, as SVG."""
    at = {n: (COLUMN * (column + 0.5), 12 + ROW * row) for n, (column, row) in PLACES.items()}
    ground = 12 + ROW * 9
    parts = []
    for room, targets in reduced(imports()).items():
        x, y = at[room]
        for to, below in sorted(at[target] for target in targets):
            top, tip = y + HEIGHT, below - 2
            bend = (tip - top) / 2
            parts.append(
                f'<path d="M{x:g} {top:g} C{x:g} {top + bend:g} {to:g} {tip - bend:g} {to:g}'
                f' {tip:g}" fill="none" stroke="#78909c" marker-end="url(#tip)"/>\n'
            )
    parts += [box(room, *place) for room, place in at.items()]
    parts += [box(room, COLUMN * (i + 0.5), ground) for i, room in enumerate(GROUND)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {COLUMN * 5} {ground + 50}"'
        f' width="{COLUMN * 5}" font-family="sans-serif" font-size="13">\n'
        '<rect width="100%" height="100%" fill="#fff"/><defs><marker id="tip" viewBox="0 0 6 6"'
        ' refX="5" refY="3" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L6 3L0 6z" fill="#78909c"/></marker></defs>\n' + "".join(parts) + "</svg>\n"
    )


if __name__ == "__main__":
    (ROOT / "docs" / "rooms.svg").write_text(draw(), encoding="utf-8")
