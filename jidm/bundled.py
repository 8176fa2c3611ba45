"""Where the files are that come with jidm."""

from __future__ import annotations

from pathlib import Path


def bundled_folder(kind: str) -> Path:
    """The folder "checkpoints" or "embodiments" that comes with jidm: inside the wheel, or at the top of the repository."""
    package = Path(__file__).parent
    inside, beside = package / f"_{kind}", package.parent / kind
    return inside if inside.is_dir() else beside
