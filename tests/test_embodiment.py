"""Embodiments: every bundled one loads, is consistent, frozen and registered."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jidm.errors import EmbodimentError
from jidm.robot import registry
from jidm.robot.embodiment import JOINT_VECTORS
from jidm.robot.kinematics import Kinematics
from jidm.robot.registry import embodiment_names, load_embodiment, register_embodiment

NAMES = (
    *("allegro_left", "allegro_right", "cobot_magic", "iiwa7", "panda", "piper"),
    *(f"planar_finger_{n}" for n in range(1, 6)),
    *("so100", "ur5", "xarm7"),
)
JOINTS = {"allegro_left": 16, "allegro_right": 16, "cobot_magic": 14, "iiwa7": 7, "panda": 8, "piper": 7, "so100": 6}
JOINTS |= {"ur5": 6, "xarm7": 7} | {f"planar_finger_{n}": n for n in range(1, 6)}
REPOSITORY = Path(__file__).resolve().parents[1]


def test_the_registry_contains_the_bundled_robots() -> None:
    assert set(NAMES) <= set(embodiment_names())
    assert list(embodiment_names()) == sorted(embodiment_names())


@pytest.mark.parametrize("name", NAMES)
def test_descriptor_is_complete_and_consistent(name: str) -> None:
    e = load_embodiment(name)
    assert e.name == name and e.n == JOINTS[name] and e.base_link == e.model.root
    for vector in JOINT_VECTORS:
        assert getattr(e, vector).shape == (e.n,), vector
        assert np.isfinite(getattr(e, vector)).all(), vector
    assert (e.lower < e.upper).all() and (e.velocity > 0).all() and (e.exploration_range > 0).all()
    assert e.within_limits(e.home).all()
    assert 1e-4 <= e.control_dt <= 0.1
    assert e.tip_links and e.title and e.license and e.source
    types = {j.name: j.type for j in e.model.joints}
    assert e.joint_types == tuple(types[x] for x in e.joint_names)
    # Every number has a note on its source, or that it was chosen.
    parts = [""] if name != "cobot_magic" else ["left.", "right."]
    for key in ("position", "velocity", "effort", "acceleration", "jerk", "control_dt", "home", "exploration_range"):
        for part in parts:
            assert len(e.notes[part + key]) > 2, key


@pytest.mark.parametrize("name", NAMES)
def test_limits_are_those_of_the_urdf_unless_a_note_names_another_source(name: str) -> None:
    e = load_embodiment(name)
    limits = {j.name: j.limit for j in e.model.joints}
    overridden = {"iiwa7": {"velocity", "effort"}}.get(name, set())
    for field in {"lower", "upper", "velocity", "effort"} - overridden:
        stated = [getattr(limits[x], field) for x in e.joint_names]
        np.testing.assert_array_equal(getattr(e, field), stated, err_msg=field)


@pytest.mark.parametrize("name", NAMES)
def test_coupling_map_moves_actuated_joints_one_to_one(name: str) -> None:
    e = load_embodiment(name)
    movable = [j.name for j in e.model.movable_joints]
    assert e.coupling_matrix.shape == (len(movable), e.n)
    rows = [movable.index(x) for x in e.joint_names]
    np.testing.assert_array_equal(e.coupling_matrix[rows], np.eye(e.n))
    np.testing.assert_array_equal(e.coupling_offset[rows], 0)


def test_panda_is_seven_joints_and_one_gripper() -> None:
    e = load_embodiment("panda")
    assert e.gripper_joints == ("panda_finger_joint1",) and e.joint_types[-1] == "prismatic"
    row = [j.name for j in e.model.movable_joints].index("panda_finger_joint2")
    np.testing.assert_array_equal(e.coupling_matrix[row], np.eye(8)[7])
    np.testing.assert_array_equal(e.acceleration[:7], [15, 7.5, 10, 12.5, 15, 20, 20])
    np.testing.assert_array_equal(e.jerk[:7], [7500, 3750, 5000, 6250, 7500, 10000, 10000])
    assert e.control_dt == 0.001 and list(e.gripper_mask) == [False] * 7 + [True]


def test_allegro_hands_are_ordered_from_index_to_thumb() -> None:
    for side in ("left", "right"):
        assert load_embodiment(f"allegro_{side}").joint_names == tuple(f"joint_{k}.0" for k in range(16))


def test_allegro_hands_mirror_each_other() -> None:
    """From two independent files: at mirrored joint angles the fingertips are mirror images of each other."""
    import torch

    tips = {}
    for side, sign in (("right", 1.0), ("left", -1.0)):
        e = load_embodiment(f"allegro_{side}")
        q = torch.as_tensor(np.array(e.home))
        q[[0, 4, 8]] = torch.tensor([0.1, -0.2, 0.3], dtype=q.dtype) * sign
        poses = Kinematics.from_embodiment(e).link_poses(q)
        tips[side] = np.stack([poses[e.model.link_index(x), :3, 3].numpy() for x in e.tip_links])
    np.testing.assert_allclose(tips["left"], tips["right"] * [1, -1, 1], atol=1e-6)


@pytest.mark.parametrize("n", range(1, 6))
def test_planar_finger_stays_in_its_plane_and_reaches(n: int) -> None:
    import torch

    e = load_embodiment(f"planar_finger_{n}")
    kinematics = Kinematics.from_embodiment(e)
    q = torch.as_tensor(np.random.default_rng(0).uniform(e.lower, e.upper, size=(50, n)))
    tip = kinematics.link_poses(q)[..., e.model.link_index("tip"), :3, 3]
    angles = torch.cumsum(q, dim=-1)
    np.testing.assert_allclose(tip[:, 0], 0.1 * angles.cos().sum(-1), atol=1e-12)
    np.testing.assert_allclose(tip[:, 1], 0.1 * angles.sin().sum(-1), atol=1e-12)
    np.testing.assert_allclose(tip[:, 2], 0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_default_cameras_see_the_robot(name: str) -> None:
    """Link origins stay inside the image at home and, for `front`, in nearly all poses of motor babbling."""
    import torch

    e = load_embodiment(name)
    low, high = np.maximum(e.lower, e.home - e.exploration_range), np.minimum(e.upper, e.home + e.exploration_range)
    play = np.random.default_rng(0).uniform(low, high, size=(200, e.n))
    q = torch.as_tensor(np.vstack([e.home, play]))
    origins = Kinematics.from_embodiment(e).link_poses(q)[..., :3, 3]
    assert "front" in e.cameras
    for key in e.cameras:
        if key.startswith(("left_", "right_")):
            continue  # the camera of a part, placed for that part alone
        camera = e.camera(key)
        assert (camera.width, camera.height) == (320, 240)
        uv, depth = camera.project(origins)
        size = torch.tensor([camera.width, camera.height])
        inside = ((uv > 0) & (uv < size - 1)).all(-1) & (depth > 0.05)
        assert inside[0].all(), f"{key} loses a link at home"
        assert inside.double().mean() > 0.98, f"{key} loses links in motor babbling"


# ---- frozen ---------------------------------------------------------------------------------------------------------


def test_an_embodiment_cannot_change() -> None:
    e = load_embodiment("piper")
    with pytest.raises(dataclasses.FrozenInstanceError):
        e.name = "other"  # type: ignore[misc]
    for array in (e.home, e.lower, e.coupling_matrix, e.model.joints[0].axis, e.model.joints[1].T_parent_joint):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1.0
    with pytest.raises(TypeError, match="frozen"):
        e.cameras["front"]["eye"] = (0, 0, 0)  # type: ignore[index]
    with pytest.raises(TypeError, match="frozen"):
        e.notes.update(a="b")  # type: ignore[attr-defined]


def test_an_embodiment_is_a_value() -> None:
    a, b, other = load_embodiment("piper"), load_embodiment("piper"), load_embodiment("planar_finger_2")
    assert a == b and a is not b and hash(a) == hash(b) and a != other and a != "piper"
    assert len({a, b, other}) == 2
    assert copy.deepcopy(a) == a
    again = pickle.loads(pickle.dumps(a))
    assert again == a and again.joint_names == a.joint_names and again.conventions == a.conventions
    assert not again.home.flags.writeable and not again.model.joints[0].axis.flags.writeable
    with pytest.raises(TypeError, match="frozen"):
        again.cameras["x"] = {}
    json.dumps(a.cameras)


def test_arrays_of_an_embodiment_convert_to_tensors() -> None:
    import torch

    e = load_embodiment("planar_finger_2")
    q = torch.as_tensor(np.array(e.home))
    q += 1
    assert e.home[0] == 0.5


# ---- content hash ---------------------------------------------------------------------------------------------------


@pytest.fixture
def own_robot(tmp_path: Path) -> Path:
    """A folder like those of `embodiments/`, with a mesh."""
    folder = tmp_path / "hinge"
    folder.mkdir()
    (folder / "part.stl").write_bytes(b"solid a\nendsolid a\n")
    (folder / "robot.urdf").write_text(
        '<robot name="hinge">\n<link name="a"/><link name="b"><visual><geometry><mesh filename="part.stl"/></geometry>'
        '</visual></link><joint name="j" type="revolute"><parent link="a"/><child link="b"/><axis xyz="0 0 1"/>'
        '<limit lower="-1" upper="1" velocity="2" effort="3"/></joint></robot>'
    )
    (folder / "embodiment.toml").write_text(
        'name = "hinge"\ntitle = "Hinge"\nlicense = "none"\nsource = "this test"\nurdf = "robot.urdf"\n'
        '[joints]\nnames = ["j"]\nhome = [0.25]\n'
    )
    return folder


def test_hash_depends_on_urdf_mesh_and_descriptor_only(own_robot: Path, tmp_path: Path) -> None:
    hashes = [load_embodiment(own_robot).content_hash]
    moved = tmp_path / "elsewhere" / "hinge"
    moved.parent.mkdir()
    own_robot.rename(moved)
    assert load_embodiment(moved).content_hash == hashes[0], "the path of the folder must not matter"
    toml, urdf = moved / "embodiment.toml", moved / "robot.urdf"
    toml.write_text("# a comment\n" + toml.read_text())
    urdf.write_bytes(urdf.read_bytes().replace(b"\n", b"\r\n"))
    assert load_embodiment(moved).content_hash == hashes[0], "comments and line endings must not matter"
    for path, old, new in (
        (toml, "0.25", "0.5"),
        (urdf, 'upper="1"', 'upper="1.5"'),
        (moved / "part.stl", "solid a", "solid c"),
    ):
        path.write_text(path.read_text().replace(old, new))
        hashes.append(load_embodiment(moved).content_hash)
    assert len(set(hashes)) == 4


def test_hash_is_the_same_in_another_process() -> None:
    code = "from jidm.robot.registry import load_embodiment; print(load_embodiment('piper').content_hash)"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert out.stdout.strip() == load_embodiment("piper").content_hash, out.stderr


def test_loading_an_embodiment_does_not_import_torch() -> None:
    code = "import sys, jidm; jidm.load_embodiment('cobot_magic'); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    if "torch" in (REPOSITORY / "jidm" / "__init__.py").read_text():
        pytest.skip("the package itself imports torch")
    assert out.stdout.strip() == "False", out.stderr


# ---- registry -------------------------------------------------------------------------------------------------------


@pytest.fixture
def empty_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(EmbodimentError, match=r"unknown embodiment 'pnda': did you mean 'panda'\? known: allegro_left"):
        load_embodiment("pnda")


@pytest.mark.usefixtures("empty_registry")
def test_folders_embodiments_and_callables_can_be_registered(own_robot: Path) -> None:
    register_embodiment("by_folder", own_robot)
    register_embodiment("by_file", str(own_robot / "embodiment.toml"))
    register_embodiment("by_callable", lambda: own_robot)
    register_embodiment("by_value", load_embodiment("planar_finger_1"))
    for name in ("by_folder", "by_file", "by_callable"):
        assert name in embodiment_names() and load_embodiment(name).name == "hinge"
    assert load_embodiment("by_value").name == "planar_finger_1"
    register_embodiment("by_folder", own_robot)  # the same again, as when a notebook cell is run twice
    with pytest.raises(EmbodimentError, match="exists already"):
        register_embodiment("by_folder", own_robot.parent)
    with pytest.raises(EmbodimentError, match="exists already"):
        register_embodiment("panda", own_robot)
    with pytest.raises(EmbodimentError, match="letters, digits"):
        register_embodiment("../panda", own_robot)
    register_embodiment("wrong", lambda: 3)
    with pytest.raises(EmbodimentError, match="gave int"):
        load_embodiment("wrong")


def test_robots_of_other_packages_are_found(own_robot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another installed package names its robots by entry points; one returns a folder, one is an attribute."""
    site = own_robot.parent / "site"
    (site / "theirs-1.0.dist-info").mkdir(parents=True)
    (site / "theirs.py").write_text(f"FOLDER = {str(own_robot)!r}\ndef robot():\n    return FOLDER\n")
    (site / "theirs-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (site / "theirs-1.0.dist-info" / "entry_points.txt").write_text(
        "[jidm.embodiments]\ntheirs_called = theirs:robot\ntheirs_named = theirs:FOLDER\ntheirs_gone = theirs:nothing\n"
    )
    monkeypatch.syspath_prepend(site)
    assert {"theirs_called", "theirs_named"} <= set(embodiment_names())
    assert load_embodiment("theirs_called") == load_embodiment("theirs_named")
    with pytest.raises(EmbodimentError, match=r"theirs_gone.*theirs:nothing"):
        load_embodiment("theirs_gone")
