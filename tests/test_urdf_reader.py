"""The URDF reader, element by element: valid files are read correctly."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import material
from urdf_oracle import assert_same, link_poses_scipy
from urdf_text import LIMIT, chain, joint, links, mimic_joint, one_joint, one_visual, robot

from jidm.errors import UrdfError
from jidm.robot.factory import embodiment_from_model
from jidm.robot.kinematics import Kinematics
from jidm.robot.urdf.reader import parse_urdf, read_urdf
from jidm.robot.urdf.writer import write_urdf

# ---- elements --------------------------------------------------------------------------------------------------------


def test_a_whole_robot() -> None:
    model = parse_urdf(
        robot(
            "<link name='base'><visual><origin xyz='0 0 .5' rpy='0 0 1.5707963267948966'/><geometry><box size='1 2 3'/>"
            "</geometry><material name='red'><color rgba='1 0 0 .5'/></material></visual>"
            "<collision><geometry><cylinder radius='.1' length='.4'/></geometry></collision></link>",
            "<link name='tool'><visual><geometry><sphere radius='.2'/></geometry></visual>"
            "<visual><geometry><capsule radius='.1' length='.3'/></geometry></visual></link>",
            joint(
                "slide", "base", "tool", "<origin xyz='1 2 3' rpy='.1 .2 .3'/><axis xyz='0 3 4'/>" + LIMIT, "prismatic"
            ),
            name="machine",
        )
    )
    assert (model.name, model.root, len(model.links)) == ("machine", "base", 2)
    box, cylinder = model.links[0].visuals[0], model.links[0].collisions[0]
    assert (box.geometry.kind, box.geometry.size, box.rgba) == ("box", (1.0, 2.0, 3.0), (1.0, 0.0, 0.0, 0.5))
    np.testing.assert_allclose(
        box.T_link_shape, [[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0.5], [0, 0, 0, 1]], atol=1e-15
    )
    assert (cylinder.geometry.kind, cylinder.geometry.size) == ("cylinder", (0.1, 0.4))
    assert [s.geometry.size for s in model.links[1].visuals] == [(0.2,), (0.1, 0.3)]
    slide = model.joints[0]
    assert (slide.type, slide.parent, slide.child, slide.mimic) == ("prismatic", "base", "tool", None)
    assert (slide.limit.lower, slide.limit.upper, slide.limit.velocity, slide.limit.effort) == (-1, 1, 2, 3)
    np.testing.assert_allclose(slide.axis, [0, 0.6, 0.8], atol=1e-16)
    np.testing.assert_array_equal(slide.T_parent_joint[:3, 3], [1, 2, 3])


def test_roll_pitch_yaw_are_about_fixed_axes() -> None:
    from scipy.spatial.transform import Rotation

    rng = np.random.default_rng(0)
    for rpy in [*rng.uniform(-7, 7, (50, 3)), (0.3, math.pi / 2, 0.1), (0.3, -math.pi / 2, 0.1)]:
        text = one_joint(f"<origin rpy='{' '.join(map(repr, map(float, rpy)))}'/>" + LIMIT)
        R = parse_urdf(text).joints[0].T_parent_joint[:3, :3]
        np.testing.assert_allclose(R, Rotation.from_euler("xyz", rpy).as_matrix(), atol=1e-15)


def test_depth_first_with_children_in_file_order() -> None:
    edges = [("c", "e"), ("a", "c"), ("a", "b"), ("b", "f"), ("c", "d")]
    text = robot(links("fedcba"), *(joint(f"{x}{y}", x, y) for x, y in edges))
    model = parse_urdf(text)
    assert [link.name for link in model.links] == list("acedbf")
    assert [j.name for j in model.joints] == ["ac", "ce", "cd", "ab", "bf"]


def test_only_direct_children_are_links_and_joints() -> None:
    others = (
        "<transmission name='t'><type>x</type><joint name='j'/><joint name='ghost'/><actuator name='m'/></transmission>"
        "<gazebo reference='a'><joint name='ghost' type='screw'/><link name='a'/><sensor><mesh filename='/x'/></sensor></gazebo>"
        "<drake:joint name='j' type='ball'/><ros2_control><joint name='j'/></ros2_control><link_extra name='a'/>"
    )
    text = one_joint().replace("</robot>", others + "</robot>")
    assert_same(parse_urdf(text), parse_urdf(one_joint()))


def test_undeclared_prefixes_and_comments_are_harmless() -> None:
    text = one_joint().replace("</robot>", "<gazebo><sensor:camera x:y='1'/></gazebo><!-- <link name='a'/> --></robot>")
    assert len(parse_urdf(text).links) == 2
    assert len(parse_urdf(text.replace("<robot", "<robot xmlns='http://example.com/urdf'")).links) == 2


def test_names_in_any_script() -> None:
    model = parse_urdf(
        robot("<link name='基座'/><link name='Ж &amp; é'/>", joint("关节 1", "基座", "Ж &amp; é"), name="机器人")
    )
    assert (model.name, model.root, model.links[1].name, model.joints[0].name) == ("机器人", "基座", "Ж & é", "关节 1")
    assert_same(model, parse_urdf(write_urdf(model)))


def test_a_link_may_be_called_nan() -> None:
    assert parse_urdf(robot("<link name='nan'/><link name='inf'/>", joint("nan", "nan", "inf"))).root == "nan"


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text,
        lambda text: text.encode(),
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: "\ufeff" + text,
        lambda text: text.encode("utf-16"),
        lambda text: (
            "<?xml version='1.0' encoding='latin-1'?>" + text
        ),  # text is decoded already, whatever its declaration states
        lambda text: b"<?xml version='1.0' encoding='latin-1'?>" + text.encode("latin-1"),
    ],
)
def test_encodings(encode: object) -> None:
    text = robot("<link name='Gerät'/>")
    assert parse_urdf(encode(text)).root == "Gerät"  # type: ignore[operator]


def test_axes_are_normalized() -> None:
    for xyz, expected in [
        ("0 0 2", (0, 0, 1)),
        ("3e-5 0 -4e-5", (0.6, 0, -0.8)),
        ("1e308 1e308 0", (0.5**0.5, 0.5**0.5, 0)),
    ]:
        axis = parse_urdf(one_joint(f"<axis xyz='{xyz}'/>" + LIMIT)).joints[0].axis
        np.testing.assert_allclose(axis, expected, atol=1e-15)
    np.testing.assert_array_equal(parse_urdf(one_joint()).joints[0].axis, [1, 0, 0])
    # A joint that does not move has no use for an axis; files contain arbitrary values there.
    for kind in ("fixed", "floating"):
        assert parse_urdf(one_joint("<axis xyz='0 0 0'/>", kind)).joints[0].type == kind


def test_limits_by_joint_type() -> None:
    def limit(inside: str, kind: str = "revolute") -> tuple[float | None, ...]:
        x = parse_urdf(one_joint(inside, kind)).joints[0].limit
        return x.lower, x.upper, x.velocity, x.effort

    assert limit("<limit lower='-1' upper='2' velocity='3' effort='4'/>", "prismatic") == (-1, 2, 3, 4)
    # One bound may be left out and is then zero, as the format defines; the others are "not stated".
    assert limit("<limit upper='2'/>") == (0, 2, None, None)
    assert limit("<limit lower='-2'/>") == (-2, 0, None, None)
    assert limit("<limit lower='0' upper='0'/>") == (0, 0, None, None)
    # Zero speed or force is an empty field.
    assert limit("<limit lower='0' upper='1' velocity='0' effort='0.0'/>") == (0, 1, None, None)
    assert limit("<limit lower='5' upper='-5' velocity='3' effort='4'/>", "continuous") == (None, None, 3, 4)
    assert limit("", "continuous") == limit("", "fixed") == limit("", "planar") == (None, None, None, None)


def test_velocity_of_zero_in_the_manufacturers_piper() -> None:
    """The reason for this rule: joint1 of AgileX's PiPER states a velocity limit of 0."""
    path = material("piper_ros") / "piper_description" / "urdf"
    found = [
        j for file in sorted(path.glob("*.urdf")) for j in read_urdf(file).movable_joints if j.limit.velocity is None
    ]
    assert "joint1" in [j.name for j in found]


def test_colors_by_name() -> None:
    """A material may be defined below <robot>, before or after the links, or inside an earlier or later visual."""

    def visual(material: str) -> str:
        return f"<visual><geometry><sphere radius='1'/></geometry>{material}</visual>"

    text = robot(
        "<material name='red'><color rgba='1 0 0 1'/></material><material name='red'><color rgba='1 0 0 1.0'/></material>",
        "<link name='a'>",
        visual("<material name='red'/>"),
        visual("<material name='blue'/>"),
        visual("<material name='green'/>"),
        visual("<material name='green'><color rgba='0 1 0 1'/></material>"),
        visual("<material name='red'><color rgba='0 1 1 1'/></material>"),
        visual("<material name='unknown'/>"),
        visual("<material name='wood'><texture filename='wood.png'/></material>"),
        visual(""),
        "<collision><geometry><sphere radius='1'/></geometry><material name='red'/></collision></link>",
        "<material name='blue'><color rgba='0 0 1 1'/></material>",
    )
    link = parse_urdf(text).links[0]
    red, green, blue, own = (1, 0, 0, 1), (0, 1, 0, 1), (0, 0, 1, 1), (0, 1, 1, 1)
    assert [s.rgba for s in link.visuals] == [red, blue, green, green, own, None, None, None]
    assert link.collisions[0].rgba is None


def visual_color(*materials: str, shared: str = "") -> object:
    text = f"<visual><geometry><box size='1 1 1'/></geometry>{''.join(materials)}</visual>"
    return parse_urdf(robot(shared, f"<link name='a'>{text}</link>")).links[0].visuals[0].rgba


def test_colors_never_refuse_a_robot() -> None:
    red, blue = (
        f"<material name='{name}'><color rgba='{rgba}'/></material>"
        for name, rgba in (("r", "1 0 0 1"), ("b", "0 0 1 1"))
    )
    assert visual_color(red, blue) == (1, 0, 0, 1)
    assert visual_color("<material name='m'/>", blue) == (0, 0, 1, 1)
    assert visual_color("<material name='m'><color rgba='.5 0 .25'/></material>") == (0.5, 0, 0.25, 1)
    assert visual_color("<material name='b'/>", shared=blue) == (0, 0, 1, 1)
    again = "<material name='b'><color rgba='0 1 0 1'/></material>"
    assert visual_color("<material name='b'/>", shared=blue + again) == (0, 0, 1, 1)
    assert visual_color("<material name='m'><color rgba='255 0 0 1'/></material>") == (1, 0, 0, 1)
    for unknown in ("", "nan 0 0 1", "1 1", "red", "${red}", "1 0 0 inf"):
        assert visual_color(f"<material name='m'><color rgba='{unknown}'/></material>") is None, unknown
    for other in ("<material/>", "<material name='gone'/>", "<material name='m'><color/></material>"):
        assert visual_color(other) is None, other
    assert visual_color("<material name='m'><texture filename='gone.png'/></material>") is None


def test_elements_that_change_nothing_are_no_second_shape() -> None:
    """Exporters write an <origin/> of zero into links, others a <material> into <geometry>."""
    box = "<box size='1 2 3'/>"
    for content in (f"{box}<material name='m'/>", f"<origin xyz='0 0 0' rpy='0 -0 0'/>{box}"):
        assert parse_urdf(one_visual(f"<geometry>{content}</geometry>")).links[0].visuals[0].geometry.size == (1, 2, 3)
    assert parse_urdf(robot("<link name='a'><origin xyz='0 0 0'/></link>")).links[0].visuals == ()


@pytest.mark.parametrize("unknown", ["", "velocity='-1.0' effort='-1'", "velocity='0' effort='0.0'", "velocity='-0.0'"])
@pytest.mark.parametrize("kind", ["revolute", "continuous", "prismatic"])
def test_zero_and_minus_one_are_no_limits(unknown: str, kind: str) -> None:
    """Exporters write 0 for an empty field, simulators -1 for no limit; and the notes say so."""
    model = parse_urdf(one_joint(f"<limit lower='-1' upper='1' {unknown}/>", kind))
    assert (model.joints[0].limit.velocity, model.joints[0].limit.effort) == (None, None)
    arm = embodiment_from_model(model, name="arm", fingerprint="")
    assert np.isposinf(arm.velocity).all() and np.isposinf(arm.effort).all()
    for name in ("velocity", "effort"):
        assert arm.notes[name] == "not stated (none, 0 or -1) for j; taken as unlimited"
    stated = embodiment_from_model(parse_urdf(one_joint(kind=kind)), name="arm", fingerprint="")
    assert (stated.velocity[0], stated.effort[0], "velocity" in stated.notes) == (2, 3, False)


# ---- mimics and long chains ------------------------------------------------------------------------------------------


def test_a_chain_of_mimics_is_composed_in_any_order() -> None:
    joints = [
        joint("k3", "c", "d", mimic_joint("k2", -3, 0.25)),
        joint("k1", "a", "b"),
        joint("k2", "b", "c", mimic_joint("k1", 2, 0.5)),
        joint("k4", "d", "e", LIMIT + "<mimic joint='k3'/>"),
    ]
    model = parse_urdf(robot(links("abcde"), *joints))
    A, b = model.coupling(("k1",))
    full = dict(zip((j.name for j in model.movable_joints), A @ [0.1] + b, strict=True))
    k2 = 2 * 0.1 + 0.5
    k3 = -3 * k2 + 0.25
    assert full == pytest.approx({"k1": 0.1, "k2": k2, "k3": k3, "k4": k3}, abs=1e-15)
    A, b = model.coupling((), {"k1": 0.1})
    np.testing.assert_allclose(b, [full[j.name] for j in model.movable_joints])


def test_a_mimic_with_multiplier_zero_does_not_move() -> None:
    """A multiplier of 0 is a value, not a missing one."""
    model = parse_urdf(robot(links("abc"), joint("k", "a", "b"), joint("m", "b", "c", mimic_joint("k", 0, 0.5))))
    A, b = model.coupling(("k",))
    np.testing.assert_array_equal(A[:, 0], [1, 0])
    np.testing.assert_array_equal(b, [0, 0.5])


def test_a_chain_of_1200_links_loads_and_runs() -> None:
    model = parse_urdf(chain(1200))
    assert len(model.links) == 1200
    arm = embodiment_from_model(model, name="chain", fingerprint="")
    q = np.random.default_rng(0).uniform(-0.5, 0.5, arm.n)
    poses = Kinematics.from_embodiment(arm).link_poses(torch.from_numpy(q)).numpy()
    expected = link_poses_scipy(model, dict(zip(arm.joint_names, q, strict=True)))
    np.testing.assert_allclose(poses[-1], expected["l1199"], atol=1e-9)
    assert_same(model, parse_urdf(write_urdf(model)))


def test_a_chain_of_1200_mimics_loads_and_runs() -> None:
    elements = [joint(f"j{k}", f"l{k - 1}", f"l{k}", mimic_joint(f"j{k + 1}", -1, 0.5)) for k in range(1, 1200)]
    body = "".join(f"<link name='l{k}'/>" for k in range(1201))
    model = parse_urdf(robot(body, *elements, joint("j1200", "l1199", "l1200")))
    A, b = model.coupling(("j1200",))
    np.testing.assert_array_equal(A[:, 0], [(-1) ** (1200 - k) for k in range(1, 1201)])
    np.testing.assert_array_equal(b, [0.5 * ((1200 - k) % 2) for k in range(1, 1201)])


def test_meshes_of_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "arm" / "urdf"
    (tmp_path / "arm" / "meshes").mkdir(parents=True)
    folder.mkdir()
    (tmp_path / "arm" / "meshes" / "a.stl").write_text("solid")
    (tmp_path / "secret.stl").write_text("solid")
    path = folder / "arm.urdf"

    def geometry(reference: str, **roots: object) -> object:
        path.write_text(one_visual(f"<geometry><mesh filename='{reference}' scale='.001 .001 .001'/></geometry>"))
        return read_urdf(path, **roots).links[0].visuals[0].geometry  # type: ignore[arg-type]

    for reference in ("../meshes/a.stl", "package://arm/meshes/a.stl"):
        found = geometry(reference)
        assert (found.path, found.filename) == (tmp_path / "arm" / "meshes" / "a.stl", reference)  # type: ignore[attr-defined]
        assert found.size == (0.001,) * 3  # type: ignore[attr-defined]
    assert geometry("../meshes/gone.stl").path is None  # type: ignore[attr-defined]
    with pytest.raises(UrdfError) as refused:
        geometry("../../secret.stl")
    assert str(refused.value) == (
        f"{path}: link 'a' <visual> <mesh> mesh '../../secret.stl' leads outside the robot's folders; "
        "move it there, or pass mesh_roots= (--mesh-roots) with the folder it lies in"
    )
    assert geometry("../../secret.stl", mesh_roots=[tmp_path]).path == tmp_path / "secret.stl"  # type: ignore[attr-defined]
