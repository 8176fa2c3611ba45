"""What may import what: a room imports only from lower floors, no modules import each other in a circle, and core rooms load
no heavy packages.

Every import counts for floors and circles, wherever in a file it stands. A heavy package counts only where it is loaded with
the module: inside a function it costs nothing until it is needed.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).resolve().parents[1] / "jidm"
FLOORS = (
    ("errors",),
    ("atomic_io", "bundled", "git_lfs", "json_lines", "ray_utils", "flow"),
    ("camera", "checkpoint", "video"),
    ("robot",),
    ("datasets", "fields"),
    ("estimation",),
    ("idm",),
    ("training",),
    ("baselines",),
    ("model_registry",),
    ("evaluation", "sim", "rewards", "control", "planning", "post_training"),
    ("serving", "visualization"),
    ("cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
CORE = tuple(room for rooms in FLOORS[:7] for room in rooms if room != "ray_utils")
NEVER_IN_CORE = {
    "pybullet",
    "pybullet_data",
    "lightning",
    "pytorch_lightning",
    "torchvision",
    "ray",
    "websockets",
    "viser",
    "tensorboard",
}
SLOW_TO_LOAD = {"cv2", "av", "trimesh", "matplotlib", "scipy", "kornia", "pyarrow", "huggingface_hub", "PIL", "tqdm"}
LIGHT_CLI = {"torch", "numpy"}  # `jidm --help` answers without them


def room_of(module: str) -> str | None:
    """Room of a dotted module name below jidm; None for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def imports(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[ast.stmt, str]]:
    """Every imported dotted name with its statement; names taken from jidm itself come as `jidm.<name>`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            if base == "jidm":
                yield from ((node, f"jidm.{alias.name}") for alias in node.names)
            else:
                yield node, base


def loaded_with_the_module(tree: ast.Module) -> set[ast.AST]:
    """Statements that run when the module is imported: not in functions, not under `if TYPE_CHECKING`."""
    found: set[ast.AST] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.orelse:
                visit(child)
            return
        found.add(node)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def violations(root: Path) -> list[str]:
    """One line for every import below `root` (the folder of the package jidm) that breaks a rule."""
    found = []
    for file in sorted(root.rglob("*.py")):
        parts = ("jidm", *file.relative_to(root).with_suffix("").parts)
        room = parts[1] if parts[1] != "__init__" else None
        if room is None:  # the front door re-exports; it does so lazily, which test_imports holds
            continue
        where = file.relative_to(root.parent)
        if room not in FLOOR:
            found.append(f"{where}: room '{room}' has no floor; give it one in {Path(__file__).name}")
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        at_load = loaded_with_the_module(tree)
        for node, name in imports(tree, parts[:-1]):
            line = f"{where}:{node.lineno}"
            top = name.split(".")[0]
            if top == "jidm":
                found.extend(_floor_violation(line, room, name))
            if top in ("pybullet", "pybullet_data") and room != "sim":
                found.append(f"{line}: only sim may import {top}")
            elif node in at_load and room in CORE and top in NEVER_IN_CORE | SLOW_TO_LOAD:
                found.append(f"{line}: {room} loads {top} with the module; import it where it is used")
            elif node in at_load and room == "cli" and top in NEVER_IN_CORE | SLOW_TO_LOAD | LIGHT_CLI:
                found.append(f"{line}: the command line loads {top} before it is needed")
    return found


def _floor_violation(line: str, room: str, name: str) -> Iterator[str]:
    other = room_of(name)
    if other is None or other.startswith("__"):
        if other is None and room != "cli":
            yield f"{line}: {room} imports the package jidm; import the module that defines what it needs"
    elif other not in FLOOR:
        if room != "cli":
            yield f"{line}: {room} imports '{other}' through the front door; import the module that defines it"
    elif other != room and FLOOR[other] >= FLOOR[room]:
        yield f"{line}: {room} (floor {FLOOR[room]}) imports {other} (floor {FLOOR[other]})"


def circles(root: Path) -> list[list[str]]:
    """Groups of modules below `root` (the folder of the package jidm) that import each other, directly or in a circle."""
    files = {".".join(("jidm", *f.relative_to(root).with_suffix("").parts)): f for f in sorted(root.rglob("*.py"))}
    names = {name.removesuffix(".__init__"): name for name in files}
    graph: dict[str, set[str]] = {}
    for name, file in files.items():
        tree, package = ast.parse(file.read_text(encoding="utf-8")), tuple(name.split(".")[:-1])
        found = {names[x] for x in imported_modules(tree, package, set(names))} - {name, "jidm.__init__"}
        graph[name] = set() if name == "jidm.__init__" else found
    # What neither imports nor is imported by anything left is in no circle.
    while True:
        imported = set().union(*graph.values()) if graph else set()
        leaves = {x for x, targets in graph.items() if not targets or x not in imported}
        if not leaves:
            break
        graph = {x: targets - leaves for x, targets in graph.items() if x not in leaves}
    return [sorted(graph)] if graph else []


def imported_modules(tree: ast.AST, package: tuple[str, ...], modules: set[str]) -> Iterator[str]:
    """Which of some modules a file imports; imports for type annotations alone do not count."""
    only_types = {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.dump(branch.test)
        for statement in branch.body
        for node in ast.walk(statement)
    }
    for node, name in imports(tree, package):
        if node in only_types:
            continue
        aliases = [f"{name}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        submodules = [x for x in aliases if x in modules]
        yield from submodules
        if name in modules and len(submodules) < max(1, len(aliases)):
            yield name


def test_the_house_keeps_its_floors():
    assert not violations(ROOT), "\n".join(violations(ROOT))


def test_no_modules_import_each_other():
    assert not circles(ROOT), circles(ROOT)


def test_a_circle_is_seen(tmp_path: Path):
    _write(tmp_path, "robot/a.py", "def f():\n    from jidm.robot.b import x")
    _write(tmp_path, "robot/b.py", "from . import c")
    _write(tmp_path, "robot/c.py", "from jidm.robot import a\nimport jidm.errors")
    _write(tmp_path, "errors.py", "x = 1")
    assert circles(tmp_path / "jidm") == [["jidm.robot.a", "jidm.robot.b", "jidm.robot.c"]]


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("robot/a.py", "from jidm.estimation import x", "robot (floor 3) imports estimation (floor 5)"),
        ("camera/a.py", "def f():\n    from jidm.video import y", "camera (floor 2) imports video (floor 2)"),
        ("robot/a.py", "from ..fields import base", "robot (floor 3) imports fields (floor 4)"),
        ("robot/a.py", "from .. import estimation", "robot (floor 3) imports estimation (floor 5)"),
        ("robot/deep/a.py", "from ...estimation import x", "robot (floor 3) imports estimation (floor 5)"),
        ("atomic_io.py", "import jidm.video.io", "atomic_io (floor 1) imports video (floor 2)"),
        ("errors.py", "import jidm.robot.model", "errors (floor 0) imports robot (floor 3)"),
        ("sim/a.py", "from jidm.evaluation import x", "sim (floor 10) imports evaluation (floor 10)"),
        ("idm.py", "from jidm.training import z", "idm (floor 6) imports training (floor 7)"),
        ("estimation/a.py", "from jidm import Camera", "through the front door"),
        ("estimation/a.py", "import jidm", "imports the package jidm"),
        ("fields/a.py", "import pybullet", "only sim may import pybullet"),
        ("visualization/a.py", "def f():\n    import pybullet_data", "only sim may import pybullet_data"),
        ("video/a.py", "import torchvision.models", "loads torchvision with the module"),
        ("video/a.py", "try:\n    import cv2\nexcept ImportError:\n    cv2 = None", "loads cv2 with the module"),
        ("robot/a.py", "class A:\n    import trimesh", "loads trimesh with the module"),
        ("datasets/a.py", "from scipy.spatial import cKDTree", "loads scipy with the module"),
        ("cli/a.py", "import torch", "before it is needed"),
        ("cellar/a.py", "x = 1", "has no floor"),
    ],
)
def test_a_wrong_import_is_seen(tmp_path: Path, file: str, source: str, complaint: str):
    _write(tmp_path, file, source)
    found = violations(tmp_path / "jidm")
    assert len(found) == 1 and complaint in found[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("estimation/a.py", "from jidm.fields.base import F\nfrom jidm.errors import JidmError\nfrom .b import c"),
        ("video/a.py", "def raft():\n    import torchvision"),
        ("robot/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import trimesh"),
        ("sim/a.py", "import pybullet"),
        ("cli/a.py", "from jidm import JacobianIDM"),
        ("idm.py", "from jidm import __version__"),
    ],
)
def test_a_right_import_passes(tmp_path: Path, file: str, source: str):
    _write(tmp_path, file, source)
    assert violations(tmp_path / "jidm") == []


def _write(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / "jidm" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(source) + "\n")


HEAVY = sorted(SLOW_TO_LOAD | NEVER_IN_CORE)


@pytest.mark.parametrize(
    ("program", "allowed"),
    [
        ("import jidm", set()),
        ("import jidm; jidm.JidmError", set()),
        ("import jidm; jidm.embodiment_names()", {"numpy"}),
        ("import jidm; jidm.JacobianIDM, jidm.Embodiment, jidm.Camera, jidm.AnalyticField", {"numpy", "torch"}),
    ],
)
def test_importing_loads_nothing_heavy(program: str, allowed: set[str]):
    # What torch itself pulls in (PIL, say, in some builds) is not ours to answer for, so its modules are the baseline.
    base = "import torch, roma, jaxtyping\n" if "torch" in allowed else ""
    script = f"{base}import sys\nbefore = set(sys.modules)\n{program}\nprint(*sorted({{m.split('.')[0] for m in set(sys.modules) - before}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert not loaded & ({*HEAVY, "torch", "numpy"} - allowed)


def test_every_name_of_the_front_door_opens():
    import jidm

    assert set(jidm.__all__) == set(jidm._EXPORTS)
    for name in jidm.__all__:
        assert getattr(jidm, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Jacobean'"):
        jidm.Jacobean  # noqa: B018
