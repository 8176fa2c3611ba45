"""Robots known by name: those that come with jidm, those registered in this process, those of installed packages.

A registry is data: a descriptor is read only when its robot is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from jidm.bundled import bundled_folder
from jidm.errors import EmbodimentError, did_you_mean
from jidm.robot.descriptor import DESCRIPTOR_FILE, read_descriptor
from jidm.robot.embodiment import Embodiment
from jidm.robot.factory import embodiment_from_urdf

ENTRY_POINT_GROUP = "jidm.embodiments"
"""Packages name their robots here; the value is a folder with an embodiment.toml, an Embodiment, or a callable that
returns one of them."""

_registered: dict[str, Any] = {}


def embodiment_names() -> tuple[str, ...]:
    """All registered names, sorted; no embodiment is loaded."""
    return tuple(sorted({*_bundled(), *_registered, *_entry_points()}))


def load_embodiment(source: str | Path | Embodiment, *, mesh_roots: Sequence[str | Path] = ()) -> Embodiment:
    """An embodiment by its registered name or from a file.

    Args:
        source: a registered name, a URDF file (`.urdf` or `.xml`), or a folder with an `embodiment.toml` or that
            file. A text that is both a registered name and a path counts as the name. An Embodiment is returned
            unchanged.
        mesh_roots: further folders in which the meshes of a URDF file may lie, see `MeshResolver`.

    Raises:
        EmbodimentError: mesh_roots for another source than a URDF file, no such name (the message suggests the nearest), or the descriptor is wrong.
        UrdfError: the URDF is malformed.
        MissingExtraError: the URDF is in a package that is not installed.
    """
    if isinstance(source, (str, Path)) and _is_urdf(source):
        return embodiment_from_urdf(source, mesh_roots=mesh_roots)
    if mesh_roots:
        raise EmbodimentError(
            f"mesh_roots (--mesh-roots) is for the meshes of a URDF file, '{source}' is none; leave it out"
        )
    if isinstance(source, Embodiment):
        return source
    if isinstance(source, str) and (provider := _provider(source)) is not None:
        return _resolve(provider, source)
    path = Path(source)
    if isinstance(source, Path) or path.name == DESCRIPTOR_FILE or (path / DESCRIPTOR_FILE).is_file():
        return read_descriptor(path, _load_named)
    return _load_named(source)


def _is_urdf(source: str | Path) -> bool:
    """Whether a source is a URDF file, by the ending of its name; a registered name may end like one."""
    if Path(source).suffix.lower() not in (".urdf", ".xml"):
        return False
    return not isinstance(source, str) or source not in embodiment_names()


def register_embodiment(name: str, source: str | Path | Embodiment | Callable[[], Any]) -> None:
    """Add a robot of your own for this process; packages add theirs by the entry-point group `jidm.embodiments`.

    Args:
        name: letters, digits and `_ . + -`.
        source: folder with an `embodiment.toml` (or that file), an Embodiment, or a callable that returns either.

    Raises:
        EmbodimentError: the name is taken or holds other characters.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.+-]+", name):
        raise EmbodimentError(f"embodiment name '{name}' must be of letters, digits and _ . + -")
    if name in _bundled() or (name in _registered and _registered[name] != source):
        raise EmbodimentError(f"embodiment '{name}' exists already; register yours under another name")
    _registered[name] = source


def _load_named(name: str) -> Embodiment:
    if (provider := _provider(name)) is None:
        raise EmbodimentError(f"unknown embodiment '{name}': {did_you_mean(name, embodiment_names())}")
    return _resolve(provider, name)


def _provider(name: str) -> Any:
    """What is registered under a name: folder, file, Embodiment or callable; None if nothing is."""
    if name in _registered:
        return _registered[name]
    if name in (bundled := _bundled()):
        return bundled[name]
    if name not in (points := _entry_points()):
        return None
    try:
        return points[name].load()
    except Exception as error:  # code of another package: whatever it raises becomes one clear line here
        raise EmbodimentError(
            f"embodiment '{name}': its entry point {points[name].value} does not load: {error}; repair that package"
        ) from error


def _resolve(provider: Any, name: str) -> Embodiment:
    if callable(provider) and not isinstance(provider, Embodiment):
        provider = provider()
    if isinstance(provider, (str, Path)):
        provider = read_descriptor(provider, _load_named)
    if not isinstance(provider, Embodiment):
        raise EmbodimentError(
            f"embodiment '{name}': its provider gave {type(provider).__name__}; "
            f"it must give a folder with {DESCRIPTOR_FILE} or an Embodiment"
        )
    return provider


def _bundled() -> dict[str, Path]:
    folder = bundled_folder("embodiments")
    return {path.parent.name: path for path in folder.glob(f"*/{DESCRIPTOR_FILE}")} if folder.is_dir() else {}


def _entry_points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
