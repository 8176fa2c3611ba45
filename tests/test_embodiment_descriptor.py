"""embodiment.toml is read strictly: every error names file, key and remedy."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from jidm.bundled import bundled_folder
from jidm.errors import EmbodimentError, JidmError
from jidm.robot.registry import load_embodiment

URDF = """<robot name="two"><link name="base"/><link name="a"/><link name="b"/><link name="c"/>
<joint name="j1" type="revolute"><parent link="base"/><child link="a"/><axis xyz="0 0 1"/>
  <limit lower="-1" upper="1" velocity="2" effort="3"/></joint>
<joint name="j2" type="prismatic"><parent link="a"/><child link="b"/><axis xyz="1 0 0"/>
  <limit lower="0" upper="0.5" velocity="0.2" effort="3"/></joint>
<joint name="copy" type="prismatic"><parent link="a"/><child link="c"/><axis xyz="-1 0 0"/>
  <limit lower="0" upper="0.5" velocity="0.2" effort="3"/><mimic joint="j2" multiplier="2" offset="0.1"/></joint>
</robot>"""

TOML = """name = "two"
title = "Two joints"
license = "none"
source = "this test"
urdf = "robot.urdf"
control_dt = 0.02
tip_links = ["b"]
gripper_joints = ["j2"]
[joints]
names = ["j1", "j2"]
home = [0.1, 0.2]
exploration_range = [0.5, 0.1]
acceleration = [10.0, 1.0]
jerk = [100.0, 10.0]
[notes]
home = "chosen"
[cameras.front]
eye = [1.0, 0.0, 0.5]
target = [0.0, 0.0, 0.0]
width = 64
height = 48
[conventions.degrees]
unit = { j1 = "deg" }
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "robot.urdf").write_text(URDF)
    (tmp_path / "embodiment.toml").write_text(TOML)
    return tmp_path


def test_a_valid_descriptor_is_read_as_written(folder: Path) -> None:
    e = load_embodiment(folder)
    assert e.name == "two" and e.joint_names == ("j1", "j2") and e.joint_types == ("revolute", "prismatic")
    np.testing.assert_array_equal(e.lower, [-1, 0])
    np.testing.assert_array_equal(e.velocity, [2, 0.2])
    np.testing.assert_array_equal(e.coupling_matrix, [[1, 0], [0, 1], [0, 2]])
    np.testing.assert_array_equal(e.coupling_offset, [0, 0, 0.1])
    assert e.gripper_joints == ("j2",) and e.camera("front").width == 64
    assert e.conventions["degrees"].unit == ("deg", "m")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "Two joints"', 'titel = "Two joints"', "unknown key 'titel': did you mean 'title'"),
        ('license = "none"\n', "", "key 'license' is missing"),
        ('urdf = "robot.urdf"\n', "", "key 'urdf' is missing"),
        ('urdf = "robot.urdf"', 'urdf = "other.urdf"', "'other.urdf' is not there"),
        ('urdf = "robot.urdf"', 'urdf = "../robot.urdf"', "'../robot.urdf'.*beside the descriptor"),
        ('urdf = "robot.urdf"', "urdf = 3", "urdf must be a text"),
        ('name = "two"', 'name = " "', "name must be a text"),
        ("[joints]", '[joints]\nreordered = "false"', "joints.reordered must be true or false"),
        ("control_dt = 0.02", "control_dt = -1.0", "control_dt must be positive"),
        ("control_dt = 0.02", 'control_dt = "0.02"', "control_dt must be a number"),
        ("control_dt = 0.02", "control_dt = nan", "control_dt must be positive"),
        ('["b"]', '["bb"]', "tip link 'bb' is not in the URDF: did you mean 'b'"),
        ('gripper_joints = ["j2"]', 'gripper_joints = ["j3"]', "no joint 'j3'"),
        ('gripper_joints = ["j2"]', 'gripper_joints = "j2"', "gripper_joints must be a list"),
        ("home = [0.1, 0.2]", "home = [0.1]", "joints.home has 1 values, joints.names has 2"),
        ("home = [0.1, 0.2]", "home = [0.1, 0.2, 0.3]", "joints.home has 3 values"),
        ("home = [0.1, 0.2]", "home = [1.1, 0.2]", r"home of 'j1' is 1.1, outside \[-1, 1\]"),
        ("home = [0.1, 0.2]", "home = [nan, 0.2]", "home holds a value that is not a number"),
        ("home = [0.1, 0.2]", 'home = ["0.1", "0.2"]', "joints.home must be a list of"),
        ("home = [0.1, 0.2]", "home = [true, false]", "joints.home must be a list of"),
        (
            "exploration_range = [0.5, 0.1]",
            "exploration_range = [-0.5, 0.1]",
            "exploration_range of 'j1' must not be negative",
        ),
        ("acceleration = [10.0, 1.0]", "acceleration = [0.0, 1.0]", "acceleration of 'j1' must be positive"),
        ("jerk = [100.0, 10.0]", "jerks = [100.0, 10.0]", "unknown key 'jerks': did you mean 'jerk'"),
        ("jerk = [100.0, 10.0]", "lower = [2.0, 0.0]", "joint 'j1' has lower 2 > upper 1"),
        ('names = ["j1", "j2"]', 'names = ["j2", "j1"]', r"not in the URDF's order \(j1, j2\)"),
        ('names = ["j1", "j2"]', 'names = ["j1", "j22"]', "'j22' is no movable joint of the URDF: did you mean 'j2'"),
        ('names = ["j1", "j2"]', 'names = ["j1", "j1"]', "holds a name twice"),
        ('names = ["j1", "j2"]', 'names = ["j1", "copy"]', "'copy' is a mimic in the URDF; leave it out"),
        ("[notes]", '[locked]\nj2 = "open"\n[notes]', "locked.j2 must be a number"),
        ("[notes]", "[locked]\nj2 = 0.1\n[notes]", "'j2' is both actuated and locked"),
        ('home = "chosen"', "home = 3", "notes.home must be a text"),
        ("eye = [1.0, 0.0, 0.5]", "eye = [1.0, 0.0]", "cameras.front.eye must be a list of 3 numbers"),
        ("eye = [1.0, 0.0, 0.5]", "eyes = [1.0, 0.0, 0.5]", "cameras.front: unknown key 'eyes': did you mean 'eye'"),
        ("[cameras.front]", "[cameras]\nfront = 3\n[other]", "unknown key 'other'"),
        ('unit = { j1 = "deg" }', 'units = { j1 = "deg" }', "conventions.degrees: unknown key 'units'"),
        ('unit = { j1 = "deg" }', 'unit = { j1 = "grad" }', "conventions.degrees: .*unit of 'j1' is 'grad'"),
        ('unit = { j1 = "deg" }', "unit = 3", "conventions.degrees.*unit"),
        ('unit = { j1 = "deg" }', 'sign = { j1 = "minus" }', "conventions.degrees.*sign"),
        ('name = "two"', 'name = "two', "is not TOML"),
        ("[notes]", '[compose.left]\nembodiment = "piper"\n[notes]', "has urdf or \\[compose\\], not both"),
    ],
)
def test_a_wrong_descriptor_names_file_key_and_remedy(folder: Path, old: str, new: str, message: str) -> None:
    file = folder / "embodiment.toml"
    assert old in TOML
    file.write_text(TOML.replace(old, new, 1))
    with pytest.raises(EmbodimentError) as caught:
        load_embodiment(folder)
    text = str(caught.value)
    assert re.search(message, text), text
    assert str(file) in text and "\n" not in text


def test_another_joint_order_must_be_declared(folder: Path) -> None:
    text = TOML.replace('names = ["j1", "j2"]', 'reordered = true\nnames = ["j2", "j1"]')
    (folder / "embodiment.toml").write_text(text.replace("home = [0.1, 0.2]", "home = [0.2, 0.1]"))
    e = load_embodiment(folder)
    assert e.joint_names == ("j2", "j1")
    np.testing.assert_array_equal(e.coupling_matrix, [[0, 1], [1, 0], [2, 0]])
    np.testing.assert_array_equal(e.upper, [0.5, 1])


def test_every_joint_is_listed_or_locked(folder: Path) -> None:
    one = TOML.replace('names = ["j1", "j2"]', 'names = ["j1"]').replace('gripper_joints = ["j2"]\n', "")
    one = re.sub(r"^(home|exploration_range|acceleration|jerk) = \[([\d.]+), [\d.]+\]", r"\1 = [\2]", one, flags=re.M)
    (folder / "embodiment.toml").write_text(one)
    with pytest.raises(EmbodimentError, match=r"'j2' of the URDF is neither in joints.names nor in \[locked\]"):
        load_embodiment(folder)
    (folder / "embodiment.toml").write_text(one.replace("[notes]", "[locked]\nj2 = 0.3\n[notes]"))
    e = load_embodiment(folder)
    np.testing.assert_array_equal(e.coupling_matrix, [[1], [0], [0]])
    np.testing.assert_allclose(e.coupling_offset, [0, 0.3, 0.7])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ('embodiment = "pipr"', "did you mean 'piper'"),
        ("xyz = [0.0, 0.0, 0.0]", "compose.left lacks embodiment"),
        ('embodiment = "piper"\nxyz = [0.0, 0.0]', "compose.left.xyz must be a list of 3"),
        ('embodiment = "piper"\nyaw = 3', "compose.left: unknown key 'yaw'"),
        ("embodiment = 3", "compose.left.embodiment must be a text"),
        ('embodiment = "piper"\nxyz = [inf, 0.0, 0.0]', "rigid"),
    ],
)
def test_a_wrong_part_of_a_composition_is_named(folder: Path, part: str, message: str) -> None:
    text = f'name = "x"\ntitle = "x"\nlicense = "x"\nsource = "x"\n[compose.left]\n{part}\n'
    (folder / "embodiment.toml").write_text(text)
    with pytest.raises(EmbodimentError, match=message) as caught:
        load_embodiment(folder)
    assert str(folder / "embodiment.toml") in str(caught.value)


def test_a_robot_composed_of_itself_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jidm.robot import registry

    monkeypatch.setattr(registry, "_registered", {"ouroboros": folder})
    (folder / "embodiment.toml").write_text(
        'name = "ouroboros"\ntitle = "x"\nlicense = "x"\nsource = "x"\n[compose.left]\nembodiment = "ouroboros"\n'
    )
    with pytest.raises(EmbodimentError, match="composed of itself"):
        load_embodiment(folder)


def test_the_urdf_must_lie_beside_the_descriptor(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "robot.urdf"
    outside.write_text(URDF)
    link = folder / "link.urdf"
    link.symlink_to(outside)
    for reference in (outside, f"../{outside.parent.name}/robot.urdf", "link.urdf"):
        (folder / "embodiment.toml").write_text(TOML.replace("robot.urdf", str(reference)))
        with pytest.raises(EmbodimentError, match="put the file beside the descriptor"):
            load_embodiment(folder)


def test_missing_folder_and_missing_package(folder: Path) -> None:
    with pytest.raises(EmbodimentError, match=r"cannot read .*give a folder with an embodiment.toml"):
        load_embodiment(folder / "nowhere")
    (folder / "embodiment.toml").write_text(TOML.replace("robot.urdf", "no_such_package:robot.urdf"))
    with pytest.raises(JidmError, match="no_such_package"):
        load_embodiment(folder)


def test_bundled_descriptors_have_their_folders_name() -> None:
    for file in bundled_folder("embodiments").glob("*/embodiment.toml"):
        assert f'name = "{file.parent.name}"\n' in file.read_text(encoding="utf-8")
