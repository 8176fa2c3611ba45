"""Mesh references may only name files in the robot's own folders, in any spelling; packages are found without import."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import material
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jidm.errors import MissingExtraError, UrdfError
from jidm.robot import mesh_resolver
from jidm.robot.mesh_resolver import MeshResolver, package_file, package_roots
from jidm.robot.urdf.reader import read_urdf


@pytest.fixture
def arm(tmp_path: Path) -> Path:
    """ws/arm/{urdf,meshes}, a URDF folder beside meshes, in a workspace that holds a secret and another package."""
    for name in ("ws/arm/urdf/deep", "ws/arm/meshes", "ws/other/meshes"):
        (tmp_path / name).mkdir(parents=True)
    for name in (
        "ws/arm/meshes/link.stl",
        "ws/arm/urdf/near.stl",
        "ws/other/meshes/o.stl",
        "ws/secret.stl",
        "secret.stl",
    ):
        (tmp_path / name).write_text("solid")
    return tmp_path / "ws" / "arm"


# ---- allowed references ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "file"),
    [
        ("near.stl", "urdf/near.stl"),
        ("./near.stl", "urdf/near.stl"),
        ("deep/../near.stl", "urdf/near.stl"),
        ("../meshes/link.stl", "meshes/link.stl"),
        ("..\\meshes\\link.stl", "meshes/link.stl"),
        ("../meshes/%6Cink.stl", "meshes/link.stl"),
        ("  ../meshes/link.stl ", "meshes/link.stl"),
        ("package://arm/meshes/link.stl", "meshes/link.stl"),
        ("PACKAGE://arm/meshes/link.stl", "meshes/link.stl"),
        ("package:///arm/meshes/link.stl", "meshes/link.stl"),
        ("package://arm/meshes/../urdf/near.stl", "urdf/near.stl"),
        ("package://deep/../near.stl", None),  # leaves the package it names
        ("package://arm/meshes/gone.stl", None),
        ("package://unknown/meshes/link.stl", "meshes/link.stl"),  # of a folder without a package.xml
        ("package://unknown/meshes/gone.stl", None),
        ("gone.stl", None),
        ("../meshes", None),  # a folder is no mesh
        ("x" * 5000, None),
    ],
)
def test_references_inside_the_robots_folders(arm: Path, reference: str, file: str | None) -> None:
    locator = MeshResolver()
    if reference == "package://deep/../near.stl":
        with pytest.raises(UrdfError, match="outside its package"):
            locator.resolve(reference, arm / "urdf")
        return
    assert locator.resolve(reference, arm / "urdf") == (None if file is None else arm / file)


def test_absolute_and_file_references_inside_an_allowed_folder(arm: Path) -> None:
    mesh = arm / "meshes" / "link.stl"
    for spelling in (f"{mesh}", f"file://{mesh}", f"file:{mesh}", f"file://localhost{mesh}", f"FILE://{mesh}"):
        assert MeshResolver().resolve(spelling, arm / "urdf") == mesh
        assert MeshResolver([arm / "meshes"]).resolve(spelling, None) == mesh
    assert MeshResolver().resolve(f"{arm}/meshes/gone.stl", arm / "urdf") is None


def test_names_with_spaces_percent_signs_and_other_scripts(arm: Path) -> None:
    for name in ("a b.stl", "100%.stl", "50%20.stl", "Gelenk_ü.stl", "手首.stl"):
        (arm / "meshes" / name).write_text("solid")
        assert MeshResolver().resolve(f"../meshes/{name}", arm / "urdf") == arm / "meshes" / name
    assert MeshResolver().resolve("../meshes/a%20b.stl", arm / "urdf") == arm / "meshes" / "a b.stl"


def test_explicit_roots_add_to_the_robots_folders(arm: Path) -> None:
    workspace = arm.parent
    other = workspace / "other" / "meshes" / "o.stl"
    assert MeshResolver([workspace]).resolve("package://other/meshes/o.stl", arm / "urdf") == other
    assert MeshResolver([workspace / "other"]).resolve("package://other/meshes/o.stl", None) == other
    assert MeshResolver([workspace / "other"]).resolve("meshes/o.stl", arm / "urdf") == other
    assert MeshResolver([workspace]).resolve("../../other/meshes/o.stl", arm / "urdf") == other
    # The file's own folder comes first, and the search below a root does not turn a valid reference into an escape.
    assert MeshResolver([arm]).resolve("../meshes/link.stl", arm / "urdf") == arm / "meshes" / "link.stl"
    assert MeshResolver([arm]).resolve("../meshes/gone.stl", arm / "urdf") is None


def test_a_ros_package_is_recognized_by_its_package_xml(arm: Path) -> None:
    """From urdf/deep the package's meshes are two folders up: refused, unless a package.xml marks the package."""
    with pytest.raises(UrdfError, match="outside the robot's folders"):
        MeshResolver().resolve("../../meshes/link.stl", arm / "urdf" / "deep")
    (arm / "package.xml").write_text("<package/>")
    assert MeshResolver().resolve("../../meshes/link.stl", arm / "urdf" / "deep") == arm / "meshes" / "link.stl"
    # A sibling folder is searched only if it is a package as well.
    assert MeshResolver().resolve("package://other/meshes/o.stl", arm / "urdf") is None
    (arm.parent / "other" / "package.xml").write_text("<package/>")
    found = MeshResolver().resolve("package://other/meshes/o.stl", arm / "urdf")
    assert found == arm.parent / "other" / "meshes" / "o.stl"


def package(folder: Path, name: str) -> Path:
    (folder / "meshes").mkdir(parents=True)
    (folder / "meshes" / "b.stl").write_text("solid")
    text = f"<package format='3'><!-- <name>other</name> --><maintainer email='a@b.c'>x</maintainer><name> {name} </name></package>"
    (folder / "package.xml").write_text(text)
    return folder / "meshes" / "b.stl"


def test_a_package_has_the_name_in_its_package_xml(tmp_path: Path) -> None:
    """A downloaded archive unpacks into my_arm-main/; the package is my_arm."""
    mesh = package(tmp_path / "src" / "my_arm-main", "my_arm")
    folder = mesh.parents[1]
    for urdf_dir in (folder, folder / "urdf", folder / "robots" / "deep"):
        urdf_dir.mkdir(parents=True, exist_ok=True)
        assert MeshResolver().resolve("package://my_arm/meshes/b.stl", urdf_dir) == mesh
    assert MeshResolver().resolve("package://my_arm-main/meshes/b.stl", folder / "urdf") == mesh
    # From elsewhere: the package itself, the folder above, the workspace, the meshes.
    away = tmp_path / "away"
    away.mkdir()
    assert MeshResolver().resolve("package://my_arm/meshes/b.stl", away) is None
    for root in (folder, folder.parent, tmp_path, mesh.parent):
        assert MeshResolver([root]).resolve("package://my_arm/meshes/b.stl", away) == mesh, root
        assert MeshResolver([root]).resolve("package://my_arm/meshes/b.stl", None) == mesh, root
    # A sibling of another name; but a package is never taken for another.
    package(tmp_path / "src" / "hand-v2", "my_hand")
    assert MeshResolver().resolve("package://my_hand/meshes/b.stl", folder / "urdf") == (
        tmp_path / "src" / "hand-v2" / "meshes" / "b.stl"
    )
    for roots in ([], [folder]):
        assert MeshResolver(roots).resolve("package://third/meshes/b.stl", folder / "urdf") is None


def test_the_package_of_that_name_comes_before_any_folder_with_such_a_file(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    (plain / "meshes").mkdir(parents=True)
    (plain / "meshes" / "b.stl").write_text("solid")
    assert MeshResolver().resolve("package://my_arm/meshes/b.stl", plain) == plain / "meshes" / "b.stl"
    right = package(tmp_path / "ws" / "src" / "arm-2.1", "my_arm")
    assert MeshResolver([plain, tmp_path / "ws"]).resolve("package://my_arm/meshes/b.stl", plain) == right


@pytest.mark.parametrize(
    "text", ["", "<package", "<package/>", "<!DOCTYPE p><package><name>arm2</name></package>", "\0"]
)
def test_a_broken_package_xml_states_no_name(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "arm"
    package(folder, "arm")
    (folder / "package.xml").write_text(text)
    assert MeshResolver().resolve("package://arm/meshes/b.stl", folder) == folder / "meshes" / "b.stl"


def test_a_missing_mesh_tells_where_it_was_searched(arm: Path) -> None:
    found, tried = MeshResolver([arm.parent / "other"]).search("package://arm/meshes/gone.stl", arm / "urdf")
    assert found is None
    assert arm / "meshes" / "gone.stl" in tried and arm.parent / "other" / "meshes" / "gone.stl" in tried
    assert all(path.name == "gone.stl" and not path.exists() for path in tried)
    (tried[0].parent).mkdir(parents=True, exist_ok=True)
    tried[0].write_text("solid")  # the remedy of the message
    assert MeshResolver([arm.parent / "other"]).resolve("package://arm/meshes/gone.stl", arm / "urdf") == tried[0]


def test_the_search_below_a_root_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(30):
        (tmp_path / f"d{k:02}").mkdir()
    monkeypatch.setattr(mesh_resolver, "_MAX_FOLDERS", 10)
    assert len(list(mesh_resolver._folders_below(tmp_path, 3))) == 10
    assert list(mesh_resolver._folders_below(tmp_path / "gone", 3)) == []


def test_the_parent_folder_is_allowed_only_for_a_folder_of_urdfs(arm: Path) -> None:
    (arm / "urdf").rename(arm / "downloads")
    with pytest.raises(UrdfError, match="pass mesh_roots="):
        MeshResolver().resolve("../meshes/link.stl", arm / "downloads")
    assert MeshResolver([arm]).resolve("../meshes/link.stl", arm / "downloads") == arm / "meshes" / "link.stl"


def test_home_folders_are_never_allowed(arm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(arm))
    for reference in ("../meshes/link.stl", "package://arm/meshes/link.stl", f"{arm}/meshes/link.stl"):
        try:
            found = MeshResolver().resolve(reference, arm / "urdf")
        except UrdfError:
            found = None
        assert found is None
    (arm / "package.xml").write_text("<package/>")
    with pytest.raises(UrdfError, match="outside"):
        MeshResolver().resolve("../meshes/link.stl", arm / "urdf")
    assert MeshResolver().resolve("near.stl", arm / "urdf") == arm / "urdf" / "near.stl"


# ---- refused references ----------------------------------------------------------------------------------------------

ESCAPES = [
    "../../secret.stl",
    "../../../secret.stl",
    "../../gone/and/away.stl",
    "meshes/../../../secret.stl",
    "..\\..\\secret.stl",
    "%2e%2e/%2e%2e/secret.stl",
    "..%2f..%2fsecret.stl",
    "..%5c..%5csecret.stl",
    "{root}/secret.stl",
    "{root}/ws/arm/../../secret.stl",
    "/etc/passwd",
    "//etc/passwd",
    "file:///etc/passwd",
    "file:/etc/passwd",
    "file://{root}/secret.stl",
    "file://localhost{root}/secret.stl",
    "file://%2Fetc/passwd",
    "File:///etc/passwd",
    "file://server/share/mesh.stl",
    "file://server{root}/ws/arm/meshes/link.stl",
    "\\\\server\\share\\mesh.stl",
    "C:\\Windows\\mesh.stl",
    "c:/mesh.stl",
    "package://arm/../../secret.stl",
    "package://arm/../other/meshes/o.stl",
    "package://arm/meshes/../../../secret.stl",
    "package://arm/%2e%2e/%2e%2e/secret.stl",
    "package://arm/..%2f..%2fsecret.stl",
    "package://arm/..\\..\\secret.stl",
    "package://../secret.stl",
    "package://./../secret.stl",
    "package://..",
    "package://unknown/../../secret.stl",
    "package:////etc/passwd",
    "package://arm//etc/passwd",
    "package://arm",
    "package://",
    "http://example.com/mesh.stl",
    "https://example.com/mesh.stl",
    "HTTPS://example.com/mesh.stl",
    "ht%74p://example.com/mesh.stl",
    "ftp://example.com/mesh.stl",
    "model://arm/mesh.stl",
    "data:model/stl;base64,AAAA",
    "   ",
    "%00",
    "near.stl%00.png",
    "near.stl\0.png",
]


@pytest.mark.parametrize("rooted", [False, True])
@pytest.mark.parametrize("reference", ESCAPES)
def test_escapes_are_refused_in_every_spelling(arm: Path, reference: str, rooted: bool) -> None:
    reference = reference.format(root=arm.parent.parent) if "{root}" in reference else reference
    locator = MeshResolver([arm] if rooted else [])
    if reference in ("package:////etc/passwd", "package://arm//etc/passwd"):
        # Too many slashes: a package called etc, a path in arm; neither is the file at the root.
        with contextlib.suppress(UrdfError):
            assert locator.resolve(reference, arm / "urdf") is None
        return
    with pytest.raises(UrdfError) as refusal:
        locator.resolve(reference, arm / "urdf")
    assert "\n" not in str(refusal.value)
    assert "mesh" in str(refusal.value)


def test_links_out_of_the_robots_folders_are_refused(arm: Path) -> None:
    root = arm.parent.parent
    (arm / "meshes" / "link_out.stl").symlink_to(root / "secret.stl")
    (arm / "meshes" / "out").symlink_to(root)
    (arm.parent / "alias").symlink_to(root)
    (arm / "meshes" / "loop.stl").symlink_to(arm / "meshes" / "loop.stl")
    (arm / "meshes" / "fine.stl").symlink_to(arm / "meshes" / "link.stl")
    urdf = arm / "urdf"
    for locator in (MeshResolver(), MeshResolver([arm])):
        for reference in (
            "../meshes/link_out.stl",
            "../meshes/out/secret.stl",
            f"file://{arm}/meshes/out/secret.stl",
            "package://arm/meshes/link_out.stl",
            "package://arm/meshes/out/secret.stl",
        ):
            with pytest.raises(UrdfError, match="outside the robot's folders"):
                locator.resolve(reference, urdf)
        assert locator.resolve("../meshes/fine.stl", urdf) == arm / "meshes" / "link.stl"
        assert locator.resolve("../meshes/loop.stl", urdf) is None
    # A package folder that is a link leads out of the root as well.
    with pytest.raises(UrdfError, match="outside"):
        MeshResolver([arm.parent]).resolve("package://alias/secret.stl", urdf)
    assert MeshResolver([arm.parent, root]).resolve("package://alias/secret.stl", urdf) == root / "secret.stl"


def test_folders_around_a_urdf_are_no_packages(tmp_path: Path) -> None:
    """`package://keys/...` beside the robot's folder, and the root of the file system beside /tmp, are refused."""
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "id").write_text("secret")
    (tmp_path / "robot").mkdir()
    assert MeshResolver().resolve("package://keys/id", tmp_path / "robot") is None
    assert MeshResolver().resolve("package://etc/passwd", Path("/tmp")) is None
    with pytest.raises(UrdfError, match="outside"):
        MeshResolver().resolve("/etc/passwd", Path("/urdf"))


def test_the_folder_of_a_linked_urdf_is_that_of_its_target(arm: Path, tmp_path: Path) -> None:
    (tmp_path / "shortcut").symlink_to(arm / "urdf")
    assert MeshResolver().resolve("../meshes/link.stl", tmp_path / "shortcut") == arm / "meshes" / "link.stl"


def test_text_without_a_folder_refuses_references_out_of_any_layout(arm: Path) -> None:
    assert MeshResolver().resolve("../meshes/link.stl", None) is None
    assert MeshResolver().resolve("package://arm/meshes/link.stl", None) is None
    for reference in ("../../x.stl", "/etc/passwd", "package://arm/../x.stl"):
        with pytest.raises(UrdfError, match="outside"):
            MeshResolver().resolve(reference, None)
    assert MeshResolver([arm]).resolve("meshes/link.stl", None) == arm / "meshes" / "link.stl"
    with pytest.raises(UrdfError, match="outside"):
        MeshResolver([arm]).resolve("../secret.stl", None)


PIECES = ["..", ".", "meshes", "out", "secret.stl", "link.stl", "arm", "etc", "%2e%2e", "%2f", "..\\", "", "~", "urdf"]
HEADS = ["", "/", "//", "package://", "package:", "file://", "file:", "file:///", "http://", "\\", "C:", "{root}/"]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    head=st.sampled_from(HEADS), pieces=st.lists(st.sampled_from(PIECES), min_size=1, max_size=7), roots=st.booleans()
)
def test_every_found_file_lies_inside_the_allowed_folders(arm: Path, head: str, pieces: list[str], roots: bool) -> None:
    if not (arm / "meshes" / "out").is_symlink():
        (arm / "meshes" / "out").symlink_to(arm.parent.parent)
    reference = head.format(root=arm.parent.parent) + "/".join(pieces)
    try:
        found = MeshResolver([arm / "meshes"] if roots else []).resolve(reference, arm / "urdf")
    except UrdfError:
        return
    if found is not None:
        assert found.is_file()
        assert found.resolve().is_relative_to(arm)


# ---- complete robots -------------------------------------------------------------------------------------------------


def _installed(*specs: str) -> None:
    try:
        for spec in specs:
            package_roots(spec)
    except MissingExtraError as missing:
        pytest.skip(str(missing))


def test_every_mesh_of_the_manufacturers_piper_is_found() -> None:
    folder = material("piper_ros")
    for path in sorted(folder.rglob("*.urdf")):
        model = read_urdf(path)
        meshes = [
            s.geometry for link in model.links for s in (*link.visuals, *link.collisions) if s.geometry.kind == "mesh"
        ]
        assert meshes
        assert all(mesh.path and mesh.path.is_relative_to(folder.resolve()) for mesh in meshes), path


@pytest.mark.parametrize(
    "spec",
    [
        "example_robot_data:panda_description/urdf/panda.urdf",
        "example_robot_data:allegro_hand_description/urdf/allegro_right_hand.urdf",
        "example_robot_data:ur_description/urdf/ur5_robot.urdf",
        "pybullet_data:kuka_iiwa/model.urdf",
        "pybullet_data:franka_panda/panda.urdf",
    ],
)
def test_robots_of_packages_load_with_all_their_meshes(spec: str) -> None:
    _installed(spec)
    model = read_urdf(package_file(spec), mesh_roots=package_roots(spec))
    meshes = [
        s.geometry for link in model.links for s in (*link.visuals, *link.collisions) if s.geometry.kind == "mesh"
    ]
    assert meshes
    assert all(mesh.path and mesh.path.is_file() for mesh in meshes)


def test_packages_are_found_without_being_imported() -> None:
    code = (
        "import sys; from jidm.robot.mesh_resolver import package_file as f;"
        "f('pybullet_data:kuka_iiwa/model.urdf'); f('example_robot_data:panda_description/urdf/panda.urdf');"
        "print([m for m in ('pybullet', 'pybullet_data', 'example_robot_data', 'pinocchio', 'torch') if m in sys.modules])"
    )
    _installed("pybullet_data:", "example_robot_data:")
    environment = {**os.environ, "PYTHONPATH": str(Path(mesh_resolver.__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout.strip() == "[]"


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(mesh_resolver, "find_spec", lambda name: None)
    for package, extra in (("example_robot_data", "robots"), ("pybullet_data", "sim")):
        with pytest.raises(MissingExtraError, match=rf"pip install .*\[{extra}\]'"):
            package_file(f"{package}:panda.urdf")
        with pytest.raises(MissingExtraError, match=rf"\[{extra}\]"):
            package_roots(f"{package}:panda.urdf")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("no_such_package_of_robots:a.urdf", "'no_such_package_of_robots' is not installed; pip install it"),
        ("os.path:a.urdf", "'os.path' is no package"),
        ("../x:a.urdf", "is no package"),
        (":a.urdf", "is no package"),
        ("__main__:a.urdf", "is not installed"),
        ("jidm:no_such.urdf", "package 'jidm' has no file 'no_such.urdf'"),
        ("jidm:", "has no file ''"),
        ("jidm", "has no file ''"),
        ("jidm:../pyproject.toml", "has no file"),
        ("jidm:/etc/passwd", "has no file"),
        ("jidm:robot", "has no file"),  # a folder
    ],
)
def test_wrong_package_files_are_refused(spec: str, said: str) -> None:
    with pytest.raises(UrdfError, match=said):
        package_file(spec)


def test_a_packages_own_file_is_found() -> None:
    assert package_file("jidm:robot/mesh_resolver.py").samefile(Path(mesh_resolver.__file__))
