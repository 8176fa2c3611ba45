"""Draw the modules of jidm, their layers and imports; a test fails when the drawing is out of date.

    python docs/import_graph.py            rewrites docs/assets/import_graph.svg

Imports are read from the syntax trees, floors from `tests/test_import_boundaries.py`. An arrow that follows from two
others is left out (transitive reduction): cli imports idm through rewards, so there is no arrow from cli to idm.
"""

from __future__ import annotations

import ast
from itertools import pairwise
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SVG = Path(__file__).resolve().parent / "assets" / "import_graph.svg"

_WIDTH, _MARGIN, _LABEL = 960, 16, 64  # [px] of the drawing, around it, and of the column of floor numbers
_BOX, _FLOOR, _BEND = 26, 72, 6  # [px] height of a room, of a floor, and width of an arrow that passes one
_LETTER = 7.4  # [px] of a letter in a room's name
_SWEEPS = 8
_STYLE = """
    .ground { fill: #fbfbfd; }
    .floor { fill: #eef0f8; }
    .number { fill: #7a80a0; font: 12px sans-serif; }
    .room { fill: #ffffff; stroke: #3f51b5; stroke-width: 1.2; }
    .name { fill: #1f2544; font: 12px ui-monospace, monospace; text-anchor: middle; }
    .arrow { fill: none; stroke: #8089b8; stroke-width: 1; marker-end: url(#tip); }
"""


def floors() -> list[tuple[str, ...]]:
    """Rooms per floor, lowest first, as the test of the import boundaries states them; rooms that exist."""
    tree = ast.parse((REPOSITORY / "tests" / "test_import_boundaries.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "FLOORS":
            stated = ast.literal_eval(node.value)
            break
    else:
        raise LookupError("tests/test_import_boundaries.py states no FLOORS")
    there = {path.stem for path in (REPOSITORY / "jidm").iterdir() if path.suffix in ("", ".py")}
    return [kept for floor in stated if (kept := tuple(room for room in floor if room in there))]


def imports() -> dict[str, set[str]]:
    """Room -> rooms that it imports, wherever in a file the statement stands."""
    known = {room for floor in floors() for room in floor}
    found: dict[str, set[str]] = {room: set() for room in known}
    for file in sorted((REPOSITORY / "jidm").rglob("*.py")):
        package = file.relative_to(REPOSITORY).with_suffix("").parts
        if package[1] not in known:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            found[package[1]] |= {name.split(".")[1] for name in _modules(node, package) if name.count(".")}
    return {room: (others & known) - {room} for room, others in found.items()}


def _modules(node: ast.AST, package: tuple[str, ...]) -> list[str]:
    """Dotted names below jidm that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name.startswith("jidm.")]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = [*package[: len(package) - node.level], *([node.module] if node.module else [])]
    name = ".".join(base) if node.level else node.module or ""
    if name == "jidm":
        return [f"jidm.{alias.name}" for alias in node.names]
    return [name] if name.startswith("jidm.") else []


def reduced(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows that do not follow from others, sorted."""

    def reached(room: str) -> set[str]:
        return graph[room].union(*(reached(other) for other in graph[room]))

    return sorted(
        (room, other)
        for room, others in graph.items()
        for other in others
        if not any(other in reached(between) for between in others - {other})
    )


def _routes(rows: list[tuple[str, ...]], arrows: list[tuple[str, str]]) -> dict[tuple[str, str], list[str]]:
    """Arrow -> the nodes it passes: its two rooms, and a bend on every floor between them (Sugiyama's layers)."""
    floor = {room: number for number, row in enumerate(rows) for room in row}
    return {(a, b): [a, *(f"{a} {b} {level}" for level in range(floor[a] - 1, floor[b], -1)), b] for a, b in arrows}


def _places(rows: list[tuple[str, ...]], routes: dict[tuple[str, str], list[str]]) -> dict[str, tuple[float, float]]:
    """Node -> center x and floor; the nodes of a floor are ordered so that few arrows cross."""
    layers = [sorted(row) for row in rows]
    neighbors: dict[str, list[str]] = {room: [] for row in rows for room in row}
    for route in routes.values():
        for bend in route[1:-1]:
            layers[int(bend.split()[-1])].append(bend)
            neighbors[bend] = []
        for above, below in pairwise(route):
            neighbors[above].append(below)
            neighbors[below].append(above)
    at = {node: k / len(layer) for layer in layers for k, node in enumerate(layer)}
    for _ in range(_SWEEPS):
        for layer in layers:
            middle = {node: sum(at[x] for x in neighbors[node]) / max(1, len(neighbors[node])) for node in layer}
            layer.sort(key=lambda node: (middle[node], node))
            at |= _spread(layer)
    return {node: (at[node], float(number)) for number, layer in enumerate(layers) for node in layer}


def _spread(layer: list[str]) -> dict[str, float]:
    """Center x of the nodes of a floor, in this order, evenly apart [px]."""
    widths = [_box(node) for node in layer]
    gap = (_WIDTH - _LABEL - 2 * _MARGIN - sum(widths)) / (len(layer) + 1)
    x, found = _LABEL + _MARGIN + gap, {}
    for node, width in zip(layer, widths):
        found[node] = x + width / 2
        x += width + gap
    return found


def _box(node: str) -> float:
    """Width of a room, or of the way past one [px]."""
    return _BEND if " " in node else len(node) * _LETTER + 20


def svg() -> str:
    """The drawing."""
    rows = floors()
    routes = _routes(rows, reduced(imports()))
    places = _places(rows, routes)

    def top(floor: float) -> float:
        return _MARGIN + (len(rows) - 1 - floor) * _FLOOR + (_FLOOR - _BOX) / 2

    height = 2 * _MARGIN + len(rows) * _FLOOR
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        'aria-label="modules of jidm by layer, with an arrow from each module to those it imports">',
        f"<style>{_STYLE}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#8089b8"/></marker></defs>',
        f'<rect class="ground" width="{_WIDTH}" height="{height}" rx="8"/>',
    ]
    for number in range(len(rows)):
        y = _MARGIN + (len(rows) - 1 - number) * _FLOOR
        out.append(
            f'<rect class="floor" x="{_MARGIN}" y="{y + 4}" width="{_WIDTH - 2 * _MARGIN}" height="{_FLOOR - 8}" rx="6"/>'
            f'<text class="number" x="{_MARGIN + 12}" y="{y + _FLOOR / 2 + 4:.0f}">layer {number}</text>'
        )
    for (above, below), route in sorted(routes.items()):
        path = ""
        for node, then in pairwise(route):
            (x0, floor), (x1, lower) = places[node], places[then]
            start, end = top(floor) + _BOX, top(lower) - (1 if then == below else 0)
            bend = (end - start) * 0.6
            path += f"M{x0:.0f} {start:.0f} " if node == above else f"L{x0:.0f} {start:.0f} "
            path += f"C{x0:.0f} {start + bend:.0f} {x1:.0f} {end - bend:.0f} {x1:.0f} {end:.0f} "
        out.append(f'<path class="arrow" d="{path.strip()}"><title>{above} imports {below}</title></path>')
    for room in sorted(node for node in places if " " not in node):
        x, y, width = places[room][0], top(places[room][1]), _box(room)
        out.append(
            f'<rect class="room" x="{x - width / 2:.0f}" y="{y:.0f}" width="{width:.0f}" height="{_BOX}" rx="5"/>'
            f'<text class="name" x="{x:.0f}" y="{y + 17:.0f}">{room}</text>'
        )
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    SVG.write_text(svg(), encoding="utf-8")
