"""Robots mounted together, robots from any URDF, and the two-armed ALOHA robot of third parties."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from aloha_scene import aloha_embodiment
from conftest import material

from jidm.errors import EmbodimentError, UrdfError
from jidm.robot.composition import compose, rigid_transform
from jidm.robot.embodiment import Embodiment
from jidm.robot.factory import embodiment_from_urdf
from jidm.robot.kinematics import Kinematics
from jidm.robot.registry import load_embodiment


def poses(e: Embodiment, q: np.ndarray) -> dict[str, np.ndarray]:
    T = Kinematics.from_embodiment(e).link_poses(torch.as_tensor(np.array(q))).numpy()
    return {link.name: T[..., k, :, :] for k, link in enumerate(e.model.links)}


# ---- compose --------------------------------------------------------------------------------------------------------


def test_each_part_moves_as_it_does_alone() -> None:
    """T_base_part @ (pose of the link in the part alone) = pose of the link in the whole, mimics included."""
    arm, finger = load_embodiment("piper"), load_embodiment("planar_finger_3")
    T_left, T_right = (
        rigid_transform((0.1, 0.4, 0.02), (0.3, -0.2, 1.0)),
        rigid_transform((-0.3, 0.0, 0.5), (0.0, 3.0, -2.0)),
    )
    whole = compose("pair", left=(arm, T_left), right=(finger, T_right))
    assert whole.n == arm.n + finger.n and whole.name == "pair" and whole.base_link == "base"
    rng = np.random.default_rng(0)
    q_arm, q_finger = rng.uniform(arm.lower, arm.upper, (20, 7)), rng.uniform(finger.lower, finger.upper, (20, 3))
    links = poses(whole, np.hstack([q_arm, q_finger]))
    for prefix, part, T, q in (("left", arm, T_left, q_arm), ("right", finger, T_right, q_finger)):
        for name, pose in poses(part, q).items():
            np.testing.assert_allclose(links[f"{prefix}_{name}"], T @ pose, atol=1e-12)


def test_numbers_names_and_conventions_are_joined() -> None:
    e = load_embodiment("cobot_magic")
    arm = load_embodiment("piper")
    assert e.joint_names == tuple(f"{side}_{x}" for side in ("left", "right") for x in arm.joint_names)
    assert e.gripper_joints == ("left_gripper", "right_gripper")
    assert e.tip_links == ("left_finger1", "left_finger2", "right_finger1", "right_finger2")
    for vector in ("lower", "upper", "velocity", "acceleration", "jerk", "effort", "home", "exploration_range"):
        np.testing.assert_array_equal(getattr(e, vector), np.tile(getattr(arm, vector), 2))
    sdk = e.convention("sdk").from_embodiment(e.home)
    np.testing.assert_allclose(sdk, np.tile(arm.convention("sdk").from_embodiment(arm.home), 2))
    links = poses(e, e.home)
    np.testing.assert_allclose(
        links["left_base_link"][:3, 3] - links["right_base_link"][:3, 3], [0, 0.6, 0], atol=1e-12
    )


def test_a_parts_camera_sees_the_same_picture() -> None:
    finger = load_embodiment("planar_finger_2")
    T = rigid_transform((0.5, -0.2, 0.3), (0.1, 0.2, 0.3))
    whole = compose(a=finger, b=(finger, T))
    alone = poses(finger, finger.home)["tip"][:3, 3]
    there = poses(whole, whole.home)["b_tip"][:3, 3]
    expected, _ = finger.camera("front").project(torch.as_tensor(alone))
    seen, _ = whole.camera("b_front").project(torch.as_tensor(there))
    np.testing.assert_allclose(seen, expected, atol=1e-6)


def test_a_matrix_camera_of_a_part_moves_along(tmp_path: Path) -> None:
    one = from_text(tmp_path, cameras={"front": load_embodiment("planar_finger_1").camera("front").to_dict()})
    T = rigid_transform((0.5, -0.2, 0.3), (0.1, 0.2, 0.3))
    whole = compose(b=(one, T))
    p = np.array([0.05, 0.02, 0.01])
    moved = T[:3, :3] @ p + T[:3, 3]
    expected, seen = (
        one.camera("front").project(torch.as_tensor(p))[0],
        whole.camera("b_front").project(torch.as_tensor(moved))[0],
    )
    np.testing.assert_allclose(seen, expected, atol=1e-6)


def test_composing_depends_on_every_part_and_place() -> None:
    a, b = load_embodiment("planar_finger_1"), load_embodiment("planar_finger_2")
    T = rigid_transform((1.0, 0, 0))
    hashes = {compose("x", left=a, right=(b, T)).content_hash for _ in range(2)}
    hashes |= {compose("x", left=a, right=(b, np.eye(4))).content_hash, compose("x", left=a, right=(a, T)).content_hash}
    hashes |= {compose("x", right=a, left=(b, T)).content_hash, compose("y", left=a, right=(b, T)).content_hash}
    assert len(hashes) == 5
    assert compose(left=a, right=b).name == "planar_finger_1+planar_finger_2"


def test_compositions_nest() -> None:
    finger = load_embodiment("planar_finger_1")
    pair = compose("pair", a=finger, b=(finger, rigid_transform((0, 1, 0))))
    four = compose("four", left=pair, right=(pair, rigid_transform((1, 0, 0))))
    assert four.joint_names == ("left_a_hinge1", "left_b_hinge1", "right_a_hinge1", "right_b_hinge1")
    np.testing.assert_allclose(poses(four, np.zeros(4))["right_b_tip"][:3, 3], [1.1, 1, 0], atol=1e-12)


def test_wrong_parts_are_refused() -> None:
    finger = load_embodiment("planar_finger_1")
    with pytest.raises(EmbodimentError, match="at least one part"):
        compose("nothing")
    mirror = np.diag([1.0, 1.0, -1.0, 1.0])
    for T in (np.eye(3), mirror, 2 * np.eye(4), np.full((4, 4), np.nan)):
        with pytest.raises(EmbodimentError, match="part 'left' must be a rigid 4x4"):
            compose(left=(finger, T))
    with pytest.raises(EmbodimentError, match="part 'left' must be an embodiment"):
        compose(left=3)
    with pytest.raises(EmbodimentError, match="got 'piper'; load a robot by its name with load_embodiment"):
        compose(left="piper")


# ---- any URDF -------------------------------------------------------------------------------------------------------

BARE = """<robot name="bare"><link name="w"/><link name="a"/><link name="b"/><link name="c"/><link name="d"/>
<joint name="wheel" type="continuous"><parent link="w"/><child link="a"/><origin xyz="0 0 0.3"/><axis xyz="0 0 1"/></joint>
<joint name="far" type="revolute"><parent link="a"/><child link="b"/><origin xyz="0.4 0 0"/><axis xyz="0 1 0"/>
  <limit lower="0.5" upper="1.5" velocity="0" effort="0"/></joint>
<joint name="slide" type="prismatic"><parent link="b"/><child link="c"/><axis xyz="0 0 1"/>
  <limit lower="-0.1" upper="0.3" velocity="0.4" effort="7"/></joint>
<joint name="follow" type="prismatic"><parent link="b"/><child link="d"/><axis xyz="0 0 -1"/>
  <limit lower="-0.1" upper="0.3" velocity="0.4" effort="7"/><mimic joint="slide"/></joint></robot>"""


def from_text(folder: Path, **options: object) -> Embodiment:
    path = folder / "bare.urdf"
    path.write_text(BARE)
    return embodiment_from_urdf(path, **options)


def test_any_urdf_becomes_a_usable_embodiment(tmp_path: Path) -> None:
    e = from_text(tmp_path)
    assert e.name == "bare" and e.joint_names == ("wheel", "far", "slide") and e.tip_links == ("c", "d")
    np.testing.assert_array_equal(e.lower, [-np.inf, 0.5, -0.1])
    np.testing.assert_array_equal(e.upper, [np.inf, 1.5, 0.3])
    np.testing.assert_array_equal(e.velocity, [np.inf, np.inf, 0.4])
    np.testing.assert_array_equal(e.effort, [np.inf, np.inf, 7])
    np.testing.assert_array_equal(e.home, [0, 1, 0])
    np.testing.assert_allclose(e.exploration_range, [0.5, 0.25, 0.1])
    assert np.isinf(e.acceleration).all() and e.gripper_joints == () and e.control_dt == 0.02
    assert "wheel, far" in e.notes["velocity"] and "control_dt" in e.notes  # every default is said
    origins = torch.as_tensor(np.stack([T[:3, 3] for T in poses(e, e.home).values()]))
    uv, depth = e.camera().project(origins)
    assert ((uv > 0) & (uv < torch.tensor([319, 239]))).all() and (depth > 0).all()


def test_what_is_given_replaces_the_defaults(tmp_path: Path) -> None:
    e = from_text(
        tmp_path, name="mine", joints=("slide", "wheel"), locked={"far": 1.0}, control_dt=0.1, velocity=[1.0, 2.0]
    )
    assert e.name == "mine" and e.joint_names == ("slide", "wheel") and e.control_dt == 0.1
    np.testing.assert_array_equal(e.coupling_matrix, [[0, 1], [0, 0], [1, 0], [1, 0]])
    np.testing.assert_array_equal(e.coupling_offset, [0, 1, 0, 0])
    np.testing.assert_array_equal(e.velocity, [1, 2])
    assert e != from_text(tmp_path) and from_text(tmp_path) == from_text(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"joints": ("slide", "whel", "far")}, "no movable joint 'whel'.*did you mean 'wheel'"),
        ({"locked": {"fa": 1.0}}, "did you mean 'far'"),
        ({"locked": {"far": 1.0}, "joints": ("wheel", "far", "slide")}, "both actuated and locked"),
        ({"locked": {"far": 1.0, "wheel": 0.0, "slide": 0.0}}, "at least one actuated joint"),
        ({"home": [0.0, 0.0, 0.0]}, "home of 'far' is 0, outside"),
        ({"velocity": [1.0]}, "velocity has 1 values, the robot has 3 joints"),
        ({"speed": [1.0]}, "unknown argument 'speed'"),
        ({"gripper_joints": ("jaw",)}, "no joint 'jaw'"),
    ],
)
def test_what_contradicts_the_urdf_is_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(EmbodimentError, match=message):
        from_text(tmp_path, **options)


def test_urdfs_written_by_others_become_embodiments() -> None:
    """Whatever the reader accepts is usable at once, unless nothing in it moves."""
    made = 0
    for path in sorted((material("urdf_conformance") / "real").rglob("*.[uU][rR][dD][fF]")):
        try:
            e = embodiment_from_urdf(path)
        except UrdfError:
            continue  # the reader's business
        except EmbodimentError as error:
            assert "no joint moves" in str(error), path
            continue
        made += 1
        assert e.within_limits(e.home).all() and e.camera().width == 320, path
        assert not set(e.joint_names) & {j.name for j in e.model.joints if j.mimic}, path
    assert made > 80


# ---- ALOHA ----------------------------------------------------------------------------------------------------------

START = (0.0, -0.96, 1.16, 0.0, -0.3, 0.0)
GRIPPER_LINK_AT_START = {"left": (-0.31718881, 0.5, 0.29525084), "right": (0.31718881, 0.49999888, 0.29525084)}
"""Where the simulator's own authors print the gripper links at their start pose [m] (tonyzhaozh/act, ee_sim_env.py)."""


def test_aloha_link_origins_are_the_simulators() -> None:
    e, convention, _ = aloha_embodiment(material("aloha_sim"))
    assert e.n == 14 and e.joint_names[6] == "left_left_finger" and e.joint_names[13] == "right_left_finger"
    qpos = np.array([*START, 0.1, *START, 0.1])
    links = poses(e, convention.to_embodiment(qpos))
    for side, expected in GRIPPER_LINK_AT_START.items():
        np.testing.assert_allclose(links[f"{side}_/gripper_link"][:3, 3], expected, atol=2e-6)
    # Without the two sign flips it is another pose by a hand's breadth: the check can fail.
    unflipped = poses(e, np.array([*START, 0.02, *START, 0.02]))
    assert np.linalg.norm(unflipped["left_/gripper_link"][:3, 3] - GRIPPER_LINK_AT_START["left"]) > 0.1


def test_aloha_fingers_open_as_normalized() -> None:
    e, convention, _ = aloha_embodiment(material("aloha_sim"))
    for x, apart in ((0.0, 2 * 0.01844), (1.0, 2 * 0.058)):
        links = poses(e, convention.to_embodiment(np.array([*START, x] * 2)))
        for side in ("left", "right"):
            between = links[f"{side}_/left_finger_link"][:3, 3] - links[f"{side}_/right_finger_link"][:3, 3]
            assert np.linalg.norm(between) == pytest.approx(apart, abs=1e-9)


def test_aloha_episodes_stay_inside_the_limits_and_come_back_exactly() -> None:
    folder = material("aloha_sim")
    e, convention, _ = aloha_embodiment(folder)
    for file in sorted(folder.glob("*_state.npz")):
        qpos = np.load(file)["qpos"].astype(np.float64)
        q = convention.to_embodiment(qpos)
        assert e.within_limits(q).all(), file.name
        np.testing.assert_allclose(convention.from_embodiment(q), qpos, atol=1e-12)


def test_aloha_arms_agree_with_pinocchio() -> None:
    """The URDF itself, read by pinocchio, with base placements and signs applied by hand."""
    pin = pytest.importorskip("pinocchio")
    folder = material("aloha_sim")
    e, convention, _ = aloha_embodiment(folder)
    model = pin.buildModelFromUrdf(str(folder / "interbotix_vx300s" / "urdf" / "vx300s.urdf"))
    data = model.createData()
    qpos = np.load(folder / "aloha_sim_insertion_human_state.npz")["qpos"][::100].astype(np.float64)
    for row in qpos:
        links = poses(e, convention.to_embodiment(row))
        for k, (side, x, turn) in enumerate((("left", -0.469, 1.0), ("right", 0.469, -1.0))):
            arm, q = row[7 * k : 7 * k + 7], pin.neutral(model)
            for joint, value in zip(
                ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate"), arm, strict=False
            ):
                q[model.joints[model.getJointId(joint)].idx_q] = -value if joint in ("elbow", "wrist_angle") else value
            pin.framesForwardKinematics(model, data, q)
            for name in ("/upper_forearm_link", "/wrist_link", "/ee_gripper_link"):
                p = data.oMf[model.getFrameId(name)].translation
                expected = (x + turn * p[0], 0.5 + turn * p[1], 0.0003 + p[2])
                np.testing.assert_allclose(links[f"{side}_{name}"][:3, 3], expected, atol=1e-9)


def test_aloha_camera_looks_straight_down() -> None:
    _, _, form = aloha_embodiment(material("aloha_sim"))
    from jidm.camera.model import Camera

    camera = Camera.from_dict(form)
    uv, depth = camera.project(torch.tensor([[0.0, 0.6, 0.0], [0.1, 0.6, 0.0], [0.0, 0.7, 0.0]], dtype=torch.float64))
    f = 240 / np.tan(np.deg2rad(39))
    np.testing.assert_allclose(depth, 0.8)
    np.testing.assert_allclose(uv, [[319.5, 239.5], [319.5 + f / 8, 239.5], [319.5, 239.5 - f / 8]], atol=1e-9)
