"""Which robots are known by name. A registry is data: nothing is read before it is asked for."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from jidm.errors import EmbodimentError, did_you_mean
from jidm.robot.descriptor import DESCRIPTOR_FILE, read_descriptor
from jidm.robot.embodiment import Embodiment

ENTRY_POINT_GROUP = "jidm.embodiments"
"""Packages name their robots here; the value is a folder with an embodiment.toml, an Embodiment, or a callable that
returns one of them."""

_registered: dict[str, Any] = {}


def bundled_folder() -> Path:
    """The folder of the descriptors that come with jidm: inside the wheel, or at the top of the repository."""
    package = Path(__file__).parents[1]
    inside, beside = package / "_embodiments", package.parent / "embodiments"
    return inside if inside.is_dir() else beside


def names() -> tuple[str, ...]:
    """All known names, sorted."""
    return tuple(sorted({*_bundled(), *_registered, *_entry_points()}))


def load(name: str) -> Embodiment:
    """The embodiment of that name; see `Embodiment.load`."""
    if name in _registered:
        return resolve(_registered[name], name)
    if name in (bundled := _bundled()):
        return resolve(bundled[name], name)
    if name in (points := _entry_points()):
        try:
            provider = points[name].load()
        except Exception as error:  # other people's package: whatever it raises is one clear line here
            raise EmbodimentError(
                f"embodiment '{name}': its entry point {points[name].value} does not load: {error}; mend that package"
            ) from error
        return resolve(provider, name)
    raise EmbodimentError(f"unknown embodiment '{name}': {did_you_mean(name, names())}")


def register(name: str, source: str | Path | Embodiment | Callable[[], Any]) -> None:
    """Add a robot for this process; see `Embodiment.register`."""
    if not re.fullmatch(r"[A-Za-z0-9_.+-]+", name):
        raise EmbodimentError(f"embodiment name '{name}' must be of letters, digits and _ . + -")
    if name in _bundled() or (name in _registered and _registered[name] != source):
        raise EmbodimentError(f"embodiment '{name}' exists already; register yours under another name")
    _registered[name] = source


def resolve(source: Any, name: str) -> Embodiment:
    """An embodiment from whatever a registration or entry point holds: folder, file, Embodiment or callable."""
    if callable(source) and not isinstance(source, Embodiment):
        source = source()
    if isinstance(source, (str, Path)):
        source = read_descriptor(source)
    if not isinstance(source, Embodiment):
        raise EmbodimentError(
            f"embodiment '{name}': its provider gave {type(source).__name__}; it must give a folder with {DESCRIPTOR_FILE} or an Embodiment"
        )
    return source


def _bundled() -> dict[str, Path]:
    folder = bundled_folder()
    return {path.parent.name: path for path in folder.glob(f"*/{DESCRIPTOR_FILE}")} if folder.is_dir() else {}


def _entry_points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
