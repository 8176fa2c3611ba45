"""Files of robots: where installed packages keep them, and which mesh references may be followed.

A URDF is text from strangers. A mesh reference in it may name a file inside the robot's own folders and nothing else,
in whatever spelling: `..`, absolute paths, `file://`, `package://x/../..`, percent-encoding and symbolic links are
all judged by where they end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

from jidm.errors import MissingExtraError, UrdfError

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):")
# A package folder may lie this many levels above the file that names it.
_LEVELS = 4


class MeshLocator:
    """Finds the files that mesh references name.

    Args:
        roots: folders meshes may lie in, besides the URDF's own folder and that folder's parent (the usual
            `urdf/` beside `meshes/`).
    """

    def __init__(self, roots: Sequence[str | Path] = ()) -> None:
        self.roots = tuple(Path(root).resolve() for root in roots)

    def resolve(self, reference: str, urdf_dir: Path | None) -> Path | None:
        """The file a reference names; None if there is no such file where one may be.

        Args:
            reference: as written: `package://name/rest`, a relative path, or an absolute or `file://` path that lies
                inside an allowed root.
            urdf_dir: folder of the URDF; None for text without a file.

        Raises:
            UrdfError: the reference leads outside the allowed roots, or to the network.
        """
        home = None if urdf_dir is None else Path(urdf_dir).resolve()
        written = unquote(reference.strip()).replace("\\", "/")
        if not written or "\0" in written:
            raise UrdfError(f"mesh reference {reference!r} is empty or holds a zero byte; name a mesh file")
        scheme = _SCHEME.match(written)
        kind = scheme.group(1).lower() if scheme else ""
        allowed = [*self.roots, *([home, home.parent] if home else [])]
        if kind == "package":
            return self._in_package(reference, written[len("package:") :].lstrip("/"), home)
        if kind == "file":
            written = "/" + written[len("file:") :].lstrip("/")
        elif kind:
            raise UrdfError(f"mesh '{reference}' names the network or an unknown scheme; use a file or package://")
        if written.startswith("/"):
            return self._inside(reference, [Path(written)], allowed)
        # A relative reference is relative to the file; explicit roots are tried after it.
        starts = [*([home] if home else []), *self.roots]
        return self._inside(reference, [start / written for start in starts], allowed)

    def _in_package(self, reference: str, rest: str, home: Path | None) -> Path | None:
        package, _, inside = rest.partition("/")
        if package in ("", ".", "..") or not inside:
            raise UrdfError(f"mesh '{reference}' must read package://<package>/<path>")
        candidates: list[tuple[Path, Path]] = []
        for root in self.roots:
            candidates.append((root / package / inside, root / package))
            if root.name == package:
                candidates.append((root / inside, root))
        for parent in [home, *home.parents][: _LEVELS + 1] if home else []:
            if parent.name == package:
                candidates.append((parent / inside, parent))
            elif (parent / package).is_dir():
                candidates.append((parent / package / inside, parent / package))
        found = [self._inside(reference, [path], [folder]) for path, folder in candidates]
        if not candidates:  # nothing to look in, but an escape is refused all the same
            self._inside(reference, [Path("/package") / package / inside], [Path("/package") / package])
        return next((path for path in found if path is not None), None)

    @staticmethod
    def _inside(reference: str, paths: Sequence[Path], allowed: Sequence[Path]) -> Path | None:
        for path in paths:
            real = path.resolve()
            if not any(real.is_relative_to(root.resolve()) for root in allowed):
                raise UrdfError(
                    f"mesh '{reference}' leads outside the robot's folders; move it there, or pass mesh_roots= with "
                    "the folder it lies in"
                )
            if real.is_file():
                return real
        return None


def package_file(spec: str) -> Path:
    """A file shipped by an installed package, without importing the package.

    Args:
        spec: "example_robot_data:<robot folder>/<path>" or "<any package>:<path inside it>", for instance
            "pybullet_data:kuka_iiwa/model.urdf".

    Raises:
        MissingExtraError: the package is not installed.
        UrdfError: it is, but has no such file.
    """
    package, _, inside = spec.partition(":")
    folder = _package_folder(package)
    path = (folder / inside).resolve()
    if not inside or not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise UrdfError(f"package '{package}' has no file '{inside}'; is another version of it installed?")
    return path


def package_roots(spec: str) -> tuple[Path, ...]:
    """Folders in which meshes of a `package_file` may lie."""
    folder = _package_folder(spec.partition(":")[0])
    # example-robot-data refers to its meshes as package://example-robot-data/robots/...
    return (folder.parent.parent, folder) if folder.name == "robots" else (folder,)


def _package_folder(package: str) -> Path:
    if package == "example_robot_data":
        # Its data lie beside its compiled module: <site-packages>/cmeel.prefix/share/example-robot-data/robots.
        spec = find_spec("cmeel_pth") or find_spec("example_robot_data") or find_spec("cmeel")
        for root in _site_packages(spec.origin if spec else None):
            folder = root / "cmeel.prefix" / "share" / "example-robot-data" / "robots"
            if folder.is_dir():
                return folder
        raise MissingExtraError("this robot's description", "example-robot-data", "sim")
    spec = find_spec(package)
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places:
        wheel = "pybullet" if package == "pybullet_data" else package
        raise MissingExtraError("this robot's description", wheel, "sim")
    return Path(places[0])


def _site_packages(origin: str | None) -> list[Path]:
    import sys

    roots = [Path(entry) for entry in sys.path if entry]
    if origin is not None:
        roots.insert(0, Path(origin).parent)
    return roots
