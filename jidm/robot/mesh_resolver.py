"""Files of robots: where installed packages keep them, and which mesh references may be followed.

A URDF is untrusted text. A mesh reference in it may only name a file inside the robot's own folders. Every spelling
(`..`, absolute paths, `file://`, `package://x/../..`, percent-encoding, backslashes, symbolic links) is judged by the
path it resolves to.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

from jidm.errors import MissingExtraError, UrdfError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_MAX_PARENT_LEVELS = 4
"""Levels above a URDF that are searched for a package folder."""
_PACKAGE_LEVELS = 3
"""Levels below a root that are searched for packages."""
_MAX_FOLDERS = 5000
"""Folders below a root that are searched for packages; a search from the root of a file system must end."""
_MAX_PACKAGE_XML = 2**16
"""Bytes of a package.xml that are read."""
_URDF_FOLDER_NAMES = frozenset({"urdf", "urdfs", "robots", "xacro", "xml"})
"""Customary names of folders that hold URDFs beside `meshes/`; only from these is `../meshes` allowed by default."""


class MeshResolver:
    """Finds the files of mesh references.

    Allowed by default: the URDF's own folder; the folder of its ROS package (the nearest of four folders above that
    holds a `package.xml` or has the name in a `package://` reference); for a URDF in a folder with a customary name
    such as `urdf/` also that folder's parent, because meshes usually lie beside it. Never a home folder, a folder above
    it, or the root of a file system: a URDF downloaded to `~/urdf` may not read `~`.

    A ROS package has the name that its `package.xml` states, whatever its folder is called; without a `package.xml`, the
    name of the folder. If no package of that name is found, the rest of a reference counts from the allowed folders, but
    not from those of a package that states another name.

    Args:
        roots: further folders meshes may lie in: the folder of a package, a folder above it (three levels are searched for
            `package.xml` files), or a folder below which the rest of a `package://` reference, or a relative one, continues.
    """

    def __init__(self, roots: Sequence[str | Path] = ()) -> None:
        self.roots = tuple(_realpath(Path(root)) for root in roots)
        # A robot has hundreds of meshes in a few folders, each of which is inspected once.
        self._allowed_cache: dict[Path, tuple[Path, ...]] = {}
        self._stated_names: dict[Path, str | None] = {}
        self._packages: dict[tuple[str, str, Path | None], list[tuple[Path, tuple[Path, ...]]]] = {}

    def resolve(self, reference: str, urdf_dir: str | Path | None) -> Path | None:
        """The file of a reference, symbolic links resolved; None if no allowed place holds it.

        Args:
            reference: as written: `package://name/rest`, a path relative to the URDF (or, after that, to a root), or
                an absolute or `file://` path.
            urdf_dir: folder of the URDF; None for text without a file.

        Raises:
            UrdfError: the reference leads outside the allowed folders, or to the network.
        """
        return self.search(reference, urdf_dir)[0]

    def search(self, reference: str, urdf_dir: str | Path | None) -> tuple[Path | None, tuple[Path, ...]]:
        """As `resolve`, and if it is None the paths that were tried."""
        base_dir = None if urdf_dir is None else _realpath(Path(urdf_dir))
        # Some tools decode %20, some do not: both readings must stay inside, and the existing one is used.
        candidates = dict.fromkeys(spelling.strip().replace("\\", "/") for spelling in (reference, unquote(reference)))
        tried: dict[Path, None] = {}
        paths = [self._resolve(candidate, reference, base_dir, tried) for candidate in candidates]
        found = next((path for path in paths if path is not None), None)
        return found, () if found else tuple(tried)

    def _resolve(self, candidate: str, reference: str, base_dir: Path | None, tried: dict[Path, None]) -> Path | None:
        if not candidate or "\0" in candidate:
            raise UrdfError(f"mesh {reference!r} is empty or holds a zero byte; name a mesh file")
        scheme = _SCHEME.match(candidate)
        kind = scheme[1].lower() if scheme else ""
        if kind == "package":
            return self._resolve_in_package(candidate[len("package:") :].lstrip("/"), reference, base_dir, tried)
        if kind == "file":
            candidate = _local_path(candidate[len("file:") :], reference)
        elif len(kind) == 1:
            raise UrdfError(f"mesh {reference!r} is a path of another system; write it relative to the URDF")
        elif kind:
            raise UrdfError(
                f"mesh {reference!r} is not a file: nothing is loaded from the network; download it and name the file"
            )
        allowed = (*self.roots, *self._allowed_folders(base_dir))
        if candidate.startswith("/"):
            return _first_inside([(Path(candidate), allowed)], reference, tried)
        starts = [*([base_dir] if base_dir else []), *self.roots]
        if not starts:  # nothing to search, but a path that leads out of any usual layout is refused as well
            starts, allowed = [Path("/robot/urdf")], (Path("/robot"),)
        return _first_inside([(start / candidate, allowed) for start in starts], reference, tried)

    def _resolve_in_package(
        self, rest: str, reference: str, base_dir: Path | None, tried: dict[Path, None]
    ) -> Path | None:
        package, _, inside = rest.partition("/")
        if package in ("", ".", "..") or not inside.strip("/"):
            raise UrdfError(f"mesh {reference!r} must read package://<package>/<path>; name a file in a package")
        if ".." in os.path.normpath(inside).split("/") or inside.startswith("/"):
            raise UrdfError(f"mesh {reference!r} leads outside its package; write package://<its package>/<path>")
        for search in (self._named_folders, self._searched_folders):
            key = (search.__name__, package, base_dir)
            if key not in self._packages:
                # A package folder that is a link to another place contains no resolved path, so it allows nothing.
                self._packages[key] = [(f, (*self.roots, f)) for f in dict.fromkeys(search(package, base_dir))]
            candidates = [(folder / inside, allowed) for folder, allowed in self._packages[key]]
            if (path := _first_inside(candidates, reference, tried)) is not None:
                return path
        # The path of a root may hold the beginning of the rest: package://arm/meshes/a.stl below .../meshes.
        parts = Path(inside).parts
        overlaps = [
            (root / Path(*parts[k:]), (root,))
            for root in self.roots
            for k in range(1, len(parts))
            if root.parts[-k:] == parts[:k]
        ]
        return _first_inside(overlaps, reference, tried)

    def _named_folders(self, package: str, base_dir: Path | None) -> Iterator[Path]:
        """Candidates for the folder of a package, best first; most of them do not exist."""
        yield from (root / package for root in self.roots)
        yield from (root for root in self.roots if root.name == package)
        yield from (folder / package for folder in self._allowed_folders(base_dir))
        for ancestor in _ancestors(base_dir) if base_dir else ():
            if ancestor.name == package:
                yield ancestor
            elif (ancestor / package / "package.xml").is_file():
                yield ancestor / package

    def _searched_folders(self, package: str, base_dir: Path | None) -> Iterator[Path]:
        """Folders of another name whose package.xml states this one; then those where no package of this name is needed."""
        ancestors = list(_ancestors(base_dir)) if base_dir else []
        for folder in (*self.roots, *ancestors):
            if self._stated_name(folder) == package:
                yield folder
        for folder in (folder for root in self.roots for folder in _folders_below(root, _PACKAGE_LEVELS)):
            if self._stated_name(folder) == package:
                yield folder
        for folder in (folder for ancestor in ancestors for folder in _folders_below(ancestor, 1)):
            if self._stated_name(folder) == package:
                yield folder
        # No such package: a folder of meshes without a package.xml, or one that was copied out of its package.
        own_package = next((name for folder in ancestors if (name := self._stated_name(folder)) is not None), package)
        yield from (root for root in self.roots if self._stated_name(root) in (None, package))
        if own_package == package:
            yield from self._allowed_folders(base_dir)

    def _stated_name(self, folder: Path) -> str | None:
        """The name in the folder's package.xml; None if it has none."""
        if folder not in self._stated_names:
            self._stated_names[folder] = _name_in_package_xml(folder / "package.xml")
        return self._stated_names[folder]

    def _allowed_folders(self, base_dir: Path | None) -> tuple[Path, ...]:
        if base_dir is None:
            return ()
        if base_dir not in self._allowed_cache:
            self._allowed_cache[base_dir] = tuple(_default_folders(base_dir))
        return self._allowed_cache[base_dir]


def _local_path(rest: str, reference: str) -> str:
    """Path of a `file:` address, whose part before `file:` has been cut off."""
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        if host not in ("", "localhost") or not slash:
            raise UrdfError(f"mesh {reference!r} names the host {host!r}; write file:/// and an absolute path")
        return f"/{path.lstrip('/')}"
    return f"/{rest.lstrip('/')}"


def _default_folders(base_dir: Path) -> Iterator[Path]:
    """Folders that a URDF in `base_dir` may refer to by default."""
    yield base_dir
    ancestors = list(_ancestors(base_dir))
    package = next((folder for folder in (base_dir, *ancestors) if (folder / "package.xml").is_file()), None)
    if package is not None:
        yield package
    if base_dir.name.lower() in _URDF_FOLDER_NAMES and base_dir.parent in ancestors:
        yield base_dir.parent


def _ancestors(folder: Path) -> Iterator[Path]:
    """The folder and a few above it, up to but without home folders and the root of the file system."""
    try:
        user_home = _realpath(Path.home())
    except RuntimeError:  # a user without a home
        user_home = Path("/nonexistent")
    for ancestor in (folder, *folder.parents)[: _MAX_PARENT_LEVELS + 1]:
        # The first condition matters on a drive that holds no home folder.
        if ancestor.parent == ancestor or user_home.is_relative_to(ancestor):
            return
        yield ancestor


def _folders_below(folder: Path, levels: int) -> Iterator[Path]:
    """Folders below a folder, level by level and sorted, links not followed; the search ends after some thousands."""
    level, seen = [folder], 0
    for _ in range(levels):
        following: list[Path] = []
        for parent in level:
            try:
                with os.scandir(parent) as entries:
                    names = sorted(
                        e.name for e in entries if not e.name.startswith(".") and e.is_dir(follow_symlinks=False)
                    )
            except OSError:  # no permission
                continue
            following += (parent / name for name in names)
            if len(following) + seen > _MAX_FOLDERS:
                yield from following[: _MAX_FOLDERS - seen]
                return
        yield from following
        seen += len(following)
        level = following


def _name_in_package_xml(path: Path) -> str | None:
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import ParseError, fromstring

    try:
        with path.open("rb") as file:
            name = fromstring(file.read(_MAX_PACKAGE_XML)).findtext("name")
    except (OSError, ParseError, DefusedXmlException, ValueError, LookupError):
        return None
    return name.strip() or None if name else None


def _first_inside(
    candidates: Sequence[tuple[Path, Sequence[Path]]], reference: str, tried: dict[Path, None]
) -> Path | None:
    """The first candidate that is a file inside its allowed folders; None if there is none.

    Candidates inside their folders that are no files are added to `tried`.

    A candidate outside its folders is an error if it exists, or if no other candidate lies inside.
    """
    some_inside = some_outside = False
    for path, allowed in candidates:
        real = _realpath(path)
        if any(real.is_relative_to(folder) for folder in allowed):
            if os.path.isfile(real):
                return real
            some_inside = True
            tried[real] = None
        elif os.path.lexists(path):
            raise _outside_error(reference, exists=True)
        else:
            some_outside = True
    if some_outside and not some_inside:
        raise _outside_error(reference, exists=False)
    return None


def _outside_error(reference: str, *, exists: bool) -> UrdfError:
    remedy = (
        "move it there, or pass mesh_roots= (--mesh-roots) with the folder it lies in"
        if exists
        else "there is no such file either; write its path relative to the URDF, inside its folder"
    )
    return UrdfError(f"mesh {reference!r} leads outside the robot's folders; {remedy}")


def _realpath(path: Path) -> Path:
    # Unlike Path.resolve, it does not raise on loops of links; such a path is then no file.
    return Path(os.path.realpath(path))


def package_file(spec: str) -> Path:
    """A file of an installed package, found without importing the package.

    Args:
        spec: "<package>:<path inside it>", for instance "pybullet_data:kuka_iiwa/model.urdf"; paths of
            "example_robot_data" start in its folder of robots: "example_robot_data:panda_description/urdf/panda.urdf".

    Raises:
        MissingExtraError: a package of the extra `robots` or `sim` is not installed.
        UrdfError: another package is not installed, or the package has no such file.
    """
    package, _, inside = spec.partition(":")
    folder = _package_folder(package)
    path = _realpath(folder / inside)
    if not inside or not path.is_relative_to(folder) or not os.path.isfile(path):
        raise UrdfError(f"package '{package}' has no file '{inside}'; is another version of it installed?")
    return path


def package_roots(spec: str) -> tuple[Path, ...]:
    """Folders in which meshes of a `package_file` may lie: the roots of its `MeshResolver`."""
    package = spec.partition(":")[0]
    folder = _package_folder(package)
    # example-robot-data names its meshes package://example-robot-data/robots/..., so the root lies two folders up.
    return (folder.parent.parent, folder) if package == _EXAMPLE_ROBOT_DATA else (folder,)


_EXAMPLE_ROBOT_DATA = "example_robot_data"
_EXTRA_PACKAGES = {_EXAMPLE_ROBOT_DATA: ("example-robot-data", "robots"), "pybullet_data": ("pybullet", "sim")}


def _package_folder(package: str) -> Path:
    folder = _example_robot_data_folder() if package == _EXAMPLE_ROBOT_DATA else _top_level_folder(package)
    if folder is not None:
        return _realpath(folder)
    if package in _EXTRA_PACKAGES:
        raise MissingExtraError("this robot's description", *_EXTRA_PACKAGES[package])
    raise UrdfError(f"package '{package}' is not installed; pip install it, or name the URDF by its path")


def _example_robot_data_folder() -> Path | None:
    """<site-packages>/cmeel.prefix/share/example-robot-data/robots of the wheel, or its place under conda and ROS."""
    inside = Path("share", "example-robot-data", "robots")
    folders = [Path(sys.prefix) / inside, *(Path(entry) / "cmeel.prefix" / inside for entry in sys.path if entry)]
    with contextlib.suppress(PackageNotFoundError):
        folders.insert(0, Path(str(distribution("example-robot-data").locate_file("cmeel.prefix"))) / inside)
    return next((folder for folder in folders if folder.is_dir()), None)


def _top_level_folder(package: str) -> Path | None:
    if not package.isidentifier():  # for a dotted name find_spec would import the parent
        raise UrdfError(f"'{package}' is no package; write <package>:<path>, for instance pybullet_data:r2d2.urdf")
    try:
        spec = find_spec(package)
    except (ValueError, ImportError):  # a module without a spec, as __main__
        return None
    folders = list(spec.submodule_search_locations or []) if spec else []
    return Path(folders[0]) if folders else None
