"""What is written reads back as the same model; whatever is read, however mutilated, is a model or one clear refusal."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from urdf_oracle import assert_same, link_poses_scipy, random_joints

from jidm.errors import InputError, MissingExtraError, UrdfError
from jidm.robot.mesh_resolver import package_file, package_roots
from jidm.robot.model import Geometry, Joint, Limit, Link, Mimic, RobotModel, Shape
from jidm.robot.urdf.reader import parse_urdf, read_urdf, write_urdf

# The annotation checker of the tests samples items at random, which Hypothesis notices where robots are made.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")

# ---- random robots ---------------------------------------------------------------------------------------------------

names = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="\ufffe\uffff"),
    min_size=1,
    max_size=6,
)
numbers = st.floats(-10, 10, allow_subnormal=False)
positive = st.floats(1e-3, 10)
angles = st.one_of(
    st.floats(-math.pi, math.pi), st.sampled_from([math.pi / 2, -math.pi / 2, math.pi, 1.5707963, 1e-9, 0.0])
)


@st.composite
def poses(draw: st.DrawFn) -> np.ndarray:
    """A rigid pose made by scipy, often with a pitch of nearly a right angle."""
    T = np.eye(4)
    T[:3, :3] = Rotation.from_euler("ZYX", [draw(angles) for _ in range(3)]).as_matrix()
    T[:3, 3] = [draw(numbers) for _ in range(3)]
    return T


@st.composite
def shapes(draw: st.DrawFn, *, visual: bool) -> Shape:
    kind = draw(st.sampled_from(["box", "cylinder", "sphere", "capsule", "mesh"]))
    count = {"box": 3, "sphere": 1, "mesh": 3}.get(kind, 2)
    size = tuple(draw(positive) for _ in range(count))
    filename = (
        draw(st.sampled_from(["package://none/a.stl", "meshes/b c.dae", "../meshes/ü.obj"])) if kind == "mesh" else None
    )
    rgba: Any = tuple(draw(st.floats(0, 1)) for _ in range(4)) if visual and draw(st.booleans()) else None
    return Shape(Geometry(kind, size, filename), draw(poses()), rgba)


@st.composite
def robots(draw: st.DrawFn) -> RobotModel:
    """A random tree in depth-first order, with every joint type, limits, mimics of any other joint, and shapes."""
    count = draw(st.integers(1, 6))
    link_names = draw(st.lists(names, min_size=count, max_size=count, unique=True))
    joint_names = draw(st.lists(names, min_size=count - 1, max_size=count - 1, unique=True))
    trail, joints = [link_names[0]], []
    for k, name in enumerate(joint_names):
        del trail[draw(st.integers(1, len(trail))) :]  # hang the next link on any link of the current branch
        kind = draw(st.sampled_from(["revolute", "continuous", "prismatic", "fixed", "floating", "planar"]))
        axis = np.array([1.0, 0, 0])
        if kind not in ("fixed", "floating"):
            v = np.array([draw(numbers) for _ in range(3)]) + np.array([0, 0, 20])
            axis = v / np.linalg.norm(v)
        speed, force = (draw(st.none() | positive) for _ in range(2))
        low, high = sorted(draw(numbers) for _ in range(2))
        limit = Limit(low, high, speed, force) if kind in ("revolute", "prismatic") else Limit(None, None, speed, force)
        mimic = (
            Mimic(joint_names[draw(st.integers(0, k - 1))], draw(numbers), draw(numbers))
            if k and draw(st.booleans())
            else None
        )
        joints.append(Joint(name, kind, trail[-1], link_names[k + 1], draw(poses()), axis, limit, mimic))
        trail.append(link_names[k + 1])
    links = [
        Link(
            name,
            tuple(draw(st.lists(shapes(visual=True), max_size=2))),
            tuple(draw(st.lists(shapes(visual=False), max_size=1))),
        )
        for name in link_names
    ]
    return RobotModel(draw(names), tuple(links), tuple(joints))


@settings(max_examples=100, deadline=None)
@given(robots())
def test_what_is_written_reads_back_the_same(model: RobotModel) -> None:
    text = write_urdf(model)
    back = parse_urdf(text)
    assert_same(model, back)
    assert_same(back, parse_urdf(write_urdf(back)))


@settings(max_examples=60, deadline=None)
@given(robots(), st.integers(0, 2**31))
def test_the_order_of_elements_moves_nothing(model: RobotModel, seed: int) -> None:
    """Shuffled links and joints are the same robot: a tree in depth-first order with the same poses."""
    from xml.etree import ElementTree as ET

    root = ET.fromstring(write_urdf(model))
    elements = list(root)
    random.Random(seed).shuffle(elements)
    root[:] = elements
    back = parse_urdf(ET.tostring(root, encoding="unicode"))
    assert {x.name for x in back.links} == {x.name for x in model.links}
    assert back.root == model.root
    q = random_joints(model, np.random.default_rng(seed))
    ours, theirs = link_poses_scipy(model, q), link_poses_scipy(back, q)
    for name in ours:
        np.testing.assert_allclose(theirs[name], ours[name], atol=1e-9)


def test_every_pitch_near_a_right_angle_survives() -> None:
    """Where roll and yaw melt into one angle, a careless writer loses half of its digits."""
    worst = 0.0
    for sign in (1, -1):
        for off in [0.0, *(10.0**k for k in range(-17, 0))]:
            for roll, yaw in ((0.3, -2.0), (3.0, 1.0), (0.0, 0.0)):
                T = np.eye(4)
                T[:3, :3] = Rotation.from_euler("xyz", [roll, sign * (math.pi / 2 - off), yaw]).as_matrix()
                joint = Joint("j", "fixed", "a", "b", T, np.array([1.0, 0, 0]))
                back = parse_urdf(write_urdf(RobotModel("r", (Link("a"), Link("b")), (joint,))))
                worst = max(worst, float(np.abs(back.joints[0].T_parent_joint - T).max()))
    assert worst < 2e-15


def test_written_files_are_whole_and_the_same_every_time(tmp_path: Path) -> None:
    box = Shape(Geometry("box", (1.0, 2.0, 3.0)), np.eye(4), (0.1, 0.2, 0.3, 1.0))
    model = RobotModel("r", (Link("a", (box, box)),), ())
    text = write_urdf(model, tmp_path / "r.urdf")
    assert (tmp_path / "r.urdf").read_text(encoding="utf-8") == text == write_urdf(model)
    assert [x.name for x in tmp_path.iterdir()] == ["r.urdf"]
    assert_same(model, read_urdf(tmp_path / "r.urdf"))
    with pytest.raises(InputError, match="absent"):
        write_urdf(model, tmp_path / "absent" / "r.urdf")


def test_numpy_numbers_are_written_as_numbers() -> None:
    limit = Limit(np.float64(-1), np.float64(1), np.float64(2), np.float64(3))
    joint = Joint(
        "j", "revolute", "a", "b", np.eye(4), np.array([0, 0, 1.0]), limit, Mimic("k", np.float64(2), np.float64(3))
    )
    other = Joint("k", "continuous", "b", "c", np.eye(4), np.array([0, 0, 1.0]))
    text = write_urdf(RobotModel("r", (Link("a"), Link("b"), Link("c")), (joint, other)))
    assert "np." not in text
    assert parse_urdf(text).joints[0].limit == Limit(-1.0, 1.0, 2.0, 3.0)


@pytest.mark.parametrize(
    "spec",
    [
        "example_robot_data:panda_description/urdf/panda.urdf",
        "example_robot_data:xarm_description/urdf/xarm7.urdf",
        "pybullet_data:kuka_iiwa/model.urdf",
    ],
)
def test_robots_with_meshes_read_back_the_same(spec: str) -> None:
    try:
        roots = package_roots(spec)
    except MissingExtraError as missing:
        pytest.skip(str(missing))
    model = read_urdf(package_file(spec), mesh_roots=roots)
    back = parse_urdf(write_urdf(model), mesh_roots=roots)
    assert_same(model, back, filenames=False)  # found meshes are named by absolute path now
    assert_same(back, parse_urdf(write_urdf(back), mesh_roots=roots))


# ---- mutilated files -------------------------------------------------------------------------------------------------

SEED = """<?xml version="1.0"?>
<robot name="arm"><material name="red"><color rgba="1 0 0 1"/></material>
<link name="base"><visual><origin xyz="0 0 0.1" rpy="0 0 1"/><geometry><mesh filename="package://arm/a.stl" scale="1 1 1"/>
</geometry><material name="red"/></visual><collision><geometry><box size="1 2 3"/></geometry></collision></link>
<link name="l1"><inertial><mass value="1"/><inertia ixx="1" iyy="1" izz="1" ixy="0" ixz="0" iyz="0"/></inertial></link>
<link name="l2"/><link name="l3"/>
<joint name="j1" type="revolute"><parent link="base"/><child link="l1"/><origin xyz="0 0 1"/><axis xyz="0 0 1"/>
<limit lower="-1" upper="1" velocity="2" effort="3"/></joint>
<joint name="j2" type="continuous"><parent link="l1"/><child link="l2"/><axis xyz="0 1 0"/></joint>
<joint name="j3" type="prismatic"><parent link="l1"/><child link="l3"/><limit lower="0" upper="0.1" effort="1" velocity="1"/>
<mimic joint="j1" multiplier="-1" offset="0.5"/></joint>
<transmission name="t"><joint name="j1"/></transmission></robot>
"""
SNIPPETS = [
    "nan", "inf", "-1e999", "0", "1e308", "-", "", " ", "<", ">", "/>", "'", '"', "&", "&#0;", "&lt;", "<!DOCTYPE robot>",
    "<!ENTITY a 'b'>", "<![CDATA[", "]]>", "<!--", "-->", "<?x?>", "../", "/etc/passwd", "file:///", "http://x/", "package://",
    "%2e%2e/", "\\", "\0", "\ud800", "\ufeff", "base", "l1", "j1", "j3", "revolute", "fixed", "screw", "<link name='l1'/>",
    "<joint name='j9' type='fixed'><parent link='l2'/><child link='base'/></joint>", "<robot>", "</robot>", "$(find arm)",
    "<limit lower='2' upper='1'/>", "<axis xyz='0 0 0'/>", "<mimic joint='j3'/>", "x" * 300, "é", "xmlns='a'", "xacro:macro",
]  # fmt: skip


@st.composite
def mutilated(draw: st.DrawFn) -> str:
    text = SEED
    for _ in range(draw(st.integers(1, 6))):
        a = draw(st.integers(0, len(text)))
        b = min(len(text), a + draw(st.sampled_from([0, 0, 1, 3, 20, 200])))
        how = draw(st.sampled_from(["put", "cut", "copy", "value", "swap"]))
        if how == "put":
            text = text[:a] + draw(st.sampled_from(SNIPPETS)) + text[b:]
        elif how == "cut":
            text = text[:a] + text[b:]
        elif how == "copy":
            at = draw(st.integers(0, len(text)))
            text = text[:at] + text[a:b] + text[at:]
        elif how == "swap":
            text = text[b:] + text[:b]
        else:  # replace one attribute's value, which leaves the XML whole
            parts = text.split('"')
            k = 2 * draw(st.integers(0, max(0, len(parts) // 2 - 1))) + 1
            if k < len(parts):
                parts[k] = draw(st.sampled_from(SNIPPETS) | st.sampled_from(parts[1::2]))
            text = '"'.join(parts)
    return text


def check_refused_or_sound(text: str | bytes) -> RobotModel | None:
    try:
        model = parse_urdf(text, where="fuzz")
    except UrdfError as error:
        assert str(error).startswith("fuzz: ")
        assert len(str(error).splitlines()) == 1
        return None
    for joint in model.joints:
        assert np.isfinite(joint.T_parent_joint).all()
        assert abs(np.linalg.norm(joint.axis) - 1) < 1e-12
        low, high = joint.limit.lower, joint.limit.upper
        assert joint.type not in ("revolute", "prismatic") or (low is not None and high is not None and low <= high)
    model.coupling(tuple(joint.name for joint in model.movable_joints if joint.mimic is None))
    assert_same(model, parse_urdf(write_urdf(model)), tolerance=1e-9 * max(1.0, _reach(model)))
    return model


def _reach(model: RobotModel) -> float:
    shapes = [s.T_link_shape for link in model.links for s in (*link.visuals, *link.collisions)]
    return max((float(np.abs(T).max()) for T in (*shapes, *(j.T_parent_joint for j in model.joints))), default=1.0)


@settings(max_examples=600, deadline=2000)
@given(mutilated())
def test_mutilated_files_are_refused_or_sound(text: str) -> None:
    check_refused_or_sound(text)


@settings(max_examples=200, deadline=2000)
@given(st.binary(max_size=300) | st.text(max_size=300))
def test_anything_at_all_is_refused_or_sound(text: str | bytes) -> None:
    check_refused_or_sound(text)


@settings(max_examples=200, deadline=2000)
@given(st.integers(0, len(SEED.encode()) - 1), st.integers(0, 255))
def test_one_wrong_byte(at: int, byte: int) -> None:
    data = bytearray(SEED.encode())
    data[at] = byte
    check_refused_or_sound(bytes(data))


def test_the_seed_of_the_mutilation_is_whole() -> None:
    model = check_refused_or_sound(SEED)
    assert model is not None
    assert len(model.links) == 4
