"""Forward kinematics and Jacobians against PyBullet, pinocchio and finite differences, for every shipped robot."""

from __future__ import annotations

import pickle
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from jidm.errors import InputError
from jidm.robot.embodiment import Embodiment
from jidm.robot.kinematics import Kinematics
from jidm.robot.registry import embodiment_names, load_embodiment
from jidm.robot.urdf.reader import parse_urdf, write_urdf

NAMES = embodiment_names()
# One robot of every kind: mimic gripper on a slide, four fingers, two arms on one base, wheels of the toy.
KINDS = ("panda", "allegro_left", "cobot_magic", "planar_finger_3")


def loaded(name: str) -> tuple[Embodiment, Kinematics]:
    embodiment = load_embodiment(name)
    return embodiment, Kinematics.from_embodiment(embodiment)


def anywhere(e: Embodiment, *batch: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    rng = np.random.default_rng(seed)
    lower, upper = np.maximum(e.lower, -np.pi), np.minimum(e.upper, np.pi)
    return torch.as_tensor(rng.uniform(lower, upper, (*batch, e.n)), dtype=dtype)


def same_poses(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 1e-6) -> None:
    """Origins within 1e-6 m, orientations within 1e-6 rad."""
    assert np.abs(ours[..., :3, 3] - theirs[..., :3, 3]).max() <= tolerance
    # |R - R'| = 2 sqrt(2) sin(angle / 2); the arc cosine of the trace would see nothing below 1e-8.
    distance = np.linalg.norm(ours[..., :3, :3] - theirs[..., :3, :3], axis=(-2, -1))
    assert distance.max() / np.sqrt(2) <= tolerance


# ---- oracles --------------------------------------------------------------------------------------------------------


def pinocchio_poses(e: Embodiment, q: Tensor) -> np.ndarray:
    pin = pytest.importorskip("pinocchio")
    # Mimics are left to our linear map on both sides: pinocchio reads them as joints of their own.
    model = pin.buildModelFromXML(write_urdf(e.model))
    data = model.createData()
    full = q.numpy() @ e.coupling_matrix.T + e.coupling_offset
    frames = [model.getFrameId(link.name, pin.FrameType.BODY) for link in e.model.links]
    joints = [(model.joints[model.getJointId(j.name)], k) for k, j in enumerate(e.model.movable_joints)]
    poses = np.zeros((len(q), len(frames), 4, 4))
    for i, row in enumerate(full):
        configuration = pin.neutral(model)
        for joint, k in joints:
            if joint.nq == 2:  # continuous joints are kept as a point on the circle
                configuration[joint.idx_q : joint.idx_q + 2] = np.cos(row[k]), np.sin(row[k])
            else:
                configuration[joint.idx_q] = row[k]
        pin.framesForwardKinematics(model, data, configuration)
        for f, frame in enumerate(frames):
            poses[i, f] = data.oMf[frame].homogeneous
    return poses


@pytest.mark.parametrize("name", NAMES)
def test_a_thousand_poses_are_pinocchios(name: str) -> None:
    e, kinematics = loaded(name)
    q = anywhere(e, 1000)
    same_poses(kinematics.link_poses(q).numpy(), pinocchio_poses(e, q))


def pybullet_poses(e: Embodiment, q: Tensor, folder: Path) -> np.ndarray:
    bullet = pytest.importorskip("pybullet")
    bare = replace(e.model, links=tuple(replace(link, visuals=(), collisions=()) for link in e.model.links))
    write_urdf(bare, folder / "bare.urdf")
    client = bullet.connect(bullet.DIRECT)
    try:
        body = bullet.loadURDF(str(folder / "bare.urdf"), useFixedBase=True, physicsClientId=client)
        info = [bullet.getJointInfo(body, k, client) for k in range(bullet.getNumJoints(body, client))]
        joint = {x[1].decode(): k for k, x in enumerate(info)}
        link_of = [e.model.link_index(x[12].decode()) for x in info]
        order = [joint[j.name] for j in e.model.movable_joints]
        poses = np.tile(np.eye(4), (len(q), len(e.model.links), 1, 1))
        full = q.numpy() @ e.coupling_matrix.T + e.coupling_offset
        for i, row in enumerate(full):
            for k, value in zip(order, row.tolist(), strict=True):
                bullet.resetJointState(body, k, value, physicsClientId=client)
            states = bullet.getLinkStates(body, range(len(info)), computeForwardKinematics=True, physicsClientId=client)
            for link, state in zip(link_of, states, strict=True):
                poses[i, link, :3, 3] = state[4]
                poses[i, link, :3, :3] = np.reshape(bullet.getMatrixFromQuaternion(state[5]), (3, 3))
        return poses
    finally:
        bullet.disconnect(client)


@pytest.mark.parametrize("name", NAMES)
def test_a_thousand_poses_are_pybullets(name: str, tmp_path: Path) -> None:
    e, kinematics = loaded(name)
    q = anywhere(e, 1000, seed=1)
    same_poses(kinematics.link_poses(q).numpy(), pybullet_poses(e, q, tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_link_jacobians_are_the_slopes_of_the_poses(name: str) -> None:
    """Central differences in float64: dT/dq T^-1 = [w] and v at every link's origin."""
    e, kinematics = loaded(name)
    q, h = anywhere(e, 3, seed=2), 1e-6
    ours = kinematics.link_jacobians(q)
    T = kinematics.link_poses(q)
    steps = h * torch.eye(e.n, dtype=torch.float64)
    slope = (kinematics.link_poses(q[:, None] + steps) - kinematics.link_poses(q[:, None] - steps)) / (2 * h)
    v = slope[..., :3, 3]
    W = slope[..., :3, :3] @ T[:, None, :, :3, :3].mT
    w = torch.stack([W[..., 2, 1], W[..., 0, 2], W[..., 1, 0]], dim=-1)
    truth = torch.cat([v, w], dim=-1).movedim(1, -1)
    assert (ours - truth).abs().max() <= 1e-5 * truth.abs().max()


# ---- laws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_any_batch_shape_is_its_items(name: str) -> None:
    e, kinematics = loaded(name)
    L, q = len(e.model.links), anywhere(e, 2, 3)
    poses, jacobians = kinematics.link_poses(q), kinematics.link_jacobians(q)
    assert poses.shape == (2, 3, L, 4, 4) and jacobians.shape == (2, 3, L, 6, e.n)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(kinematics.link_poses(q[i, j]), poses[i, j], rtol=0, atol=1e-14)
            torch.testing.assert_close(kinematics.link_jacobians(q[i, j]), jacobians[i, j], rtol=0, atol=1e-13)
    for empty in (q[:0], q[:, :0]):
        assert kinematics.link_poses(empty).shape == (*empty.shape[:-1], L, 4, 4)
        assert kinematics.link_jacobians(empty).shape == (*empty.shape[:-1], L, 6, e.n)


@pytest.mark.parametrize("name", KINDS)
def test_float32_in_float32_out(name: str) -> None:
    e, kinematics = loaded(name)
    q = anywhere(e, 50)
    for dtype, tolerance in ((torch.float64, 0.0), (torch.float32, 5e-6)):
        poses, jacobians = kinematics.link_poses(q.to(dtype)), kinematics.link_jacobians(q.to(dtype))
        assert poses.dtype == jacobians.dtype == dtype
        assert (poses.double() - kinematics.link_poses(q)).abs().max() <= tolerance
        assert (jacobians.double() - kinematics.link_jacobians(q)).abs().max() <= tolerance


def test_poses_are_rigid_and_points_ride_on_them() -> None:
    e, kinematics = loaded("panda")
    poses = kinematics.link_poses(anywhere(e, 10))
    R = poses[..., :3, :3]
    torch.testing.assert_close(R @ R.mT, torch.eye(3).double().expand_as(R), rtol=0, atol=1e-13)
    assert (torch.linalg.det(R) > 0).all() and (poses[..., 3, :] == torch.tensor([0.0, 0, 0, 1])).all()
    link = torch.tensor([0, 3, 9, 3])
    p_link = torch.randn(4, 3, dtype=torch.float64)
    moved = kinematics.transform_points(poses, link, p_link)
    homogeneous = torch.cat([p_link, torch.ones(4, 1).double()], dim=-1)
    for k in range(4):
        torch.testing.assert_close(moved[:, k], (poses[:, link[k]] @ homogeneous[k])[:, :3], rtol=0, atol=1e-14)


def test_gradients_flow_through_poses_and_jacobians() -> None:
    e, kinematics = loaded("panda")
    q = anywhere(e, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: kinematics.link_poses(q)[:, -3:, :3], (q,), fast_mode=True)
    assert torch.autograd.gradcheck(lambda q: kinematics.link_jacobians(q)[:, -3:], (q,), fast_mode=True)


def test_what_was_asked_first_in_inference_mode_still_has_gradients() -> None:
    e, kinematics = loaded("planar_finger_2")
    with torch.inference_mode():
        kinematics.link_jacobians(anywhere(e))
    q = anywhere(e).requires_grad_()
    kinematics.link_jacobians(q).sum().backward()
    assert q.grad.isfinite().all()


# ---- torch.func -----------------------------------------------------------------------------------------------------


def twists(kinematics: Kinematics, q: Tensor) -> Tensor:
    return kinematics.link_twists(kinematics.link_poses(q))


def tip_pose(kinematics: Kinematics, q: Tensor) -> Tensor:
    return kinematics.link_pose_and_jacobian(q, len(kinematics.model.links) - 1)[0]


def tip_jacobian(kinematics: Kinematics, q: Tensor) -> Tensor:
    return kinematics.link_pose_and_jacobian(q, len(kinematics.model.links) - 1)[1]


FUNCTIONS = (Kinematics.link_poses, twists, tip_pose, tip_jacobian)


@pytest.mark.parametrize("name", KINDS)
def test_one_link_is_that_link_of_all(name: str) -> None:
    e, kinematics = loaded(name)
    q = anywhere(e, 2, 3)
    poses, jacobians = kinematics.link_poses(q), kinematics.link_jacobians(q)
    for link in range(len(e.model.links)):
        pose, jacobian = kinematics.link_pose_and_jacobian(q, link)
        torch.testing.assert_close(pose, poses[..., link, :, :], rtol=0, atol=1e-13)
        torch.testing.assert_close(jacobian, jacobians[..., link, :, :], rtol=0, atol=1e-13)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", KINDS)
def test_the_first_call_may_be_in_a_transform_that_differentiates(name: str, function) -> None:
    """jacfwd and jacrev of a new Kinematics equal central differences, and leave nothing behind that later calls meet."""
    e, reference = loaded(name)
    q, h = anywhere(e, seed=3), 1e-6
    steps = h * torch.eye(e.n, dtype=torch.float64)
    slope = torch.stack([(function(reference, q + s) - function(reference, q - s)) / (2 * h) for s in steps], dim=-1)
    for transform in (torch.func.jacfwd, torch.func.jacrev):
        kinematics = Kinematics.from_embodiment(e)
        first = transform(lambda q, kinematics=kinematics: function(kinematics, q))(q)
        torch.testing.assert_close(first, slope, rtol=0, atol=1e-8)
        assert torch.equal(function(kinematics, q), function(reference, q))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", KINDS)
def test_the_first_call_may_be_in_vmap(name: str, function, dtype: torch.dtype) -> None:
    """vmap, and jacfwd in vmap, of a new Kinematics equal a loop, also where its constants must be converted first."""
    e, reference = loaded(name)
    q = anywhere(e, 3, dtype=dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    looped = torch.stack([function(reference, row) for row in q])
    kinematics = Kinematics.from_embodiment(e)
    torch.testing.assert_close(torch.func.vmap(lambda q: function(kinematics, q))(q), looped, rtol=0, atol=tolerance)
    slopes = [torch.func.jacfwd(lambda q: function(reference, q))(row) for row in q]
    kinematics = Kinematics.from_embodiment(e)
    ours = torch.func.vmap(torch.func.jacfwd(lambda q: function(kinematics, q)))(q)
    torch.testing.assert_close(ours, torch.stack(slopes), rtol=0, atol=tolerance)
    torch.testing.assert_close(function(kinematics, q), looped, rtol=0, atol=tolerance)


def test_the_first_call_may_be_in_functional_call() -> None:
    e, reference = loaded("panda")
    q = anywhere(e)

    class Pose(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = torch.nn.Parameter(torch.zeros(e.n, dtype=torch.float64))
            self.kinematics = Kinematics.from_embodiment(e)

        def forward(self) -> Tensor:
            return self.kinematics.link_poses(self.q)[-1, :3, 3]

    module = Pose()
    ours = torch.func.jacrev(lambda q: torch.func.functional_call(module, {"q": q}, ()))(q)
    torch.testing.assert_close(ours, reference.link_jacobians(q)[-1, :3], rtol=0, atol=1e-12)


def test_no_tensor_of_a_transform_outlives_it() -> None:
    """A cached tensor that a transform wrapped would have no storage, so that it could not be pickled."""
    e, kinematics = loaded("panda")
    q = anywhere(e, dtype=torch.float32)
    torch.func.jacfwd(lambda q: twists(kinematics, q))(q)
    torch.func.jacfwd(lambda q: tip_jacobian(kinematics, q))(q)
    again = pickle.loads(pickle.dumps(kinematics))
    assert torch.equal(again.link_poses(q), kinematics.link_poses(q))


def test_a_kinematics_made_in_a_transform_serves_afterwards() -> None:
    e, reference = loaded("planar_finger_3")
    q, made = anywhere(e), []

    def function(q: Tensor) -> Tensor:
        made.append(Kinematics.from_embodiment(e))
        return made[-1].link_poses(q)

    slope = torch.func.jacfwd(function)(q)
    torch.testing.assert_close(slope, torch.func.jacfwd(reference.link_poses)(q))
    torch.testing.assert_close(made[-1].link_poses(q), reference.link_poses(q))


MIXED = """
<robot name="mixed">
  <link name="base"/><link name="rail"/><link name="wheel"/><link name="copy"/><link name="slide"/><link name="tip"/>
  <joint name="rail" type="prismatic"><parent link="base"/><child link="rail"/><axis xyz="0 3 4"/>
    <origin xyz="0.1 0 0" rpy="0 0 1.5707963267948966"/><limit lower="-1" upper="1" effort="1" velocity="1"/></joint>
  <joint name="wheel" type="continuous"><parent link="rail"/><child link="wheel"/><axis xyz="0 0 -1"/></joint>
  <joint name="copy" type="revolute"><parent link="wheel"/><child link="copy"/><axis xyz="1 0 0"/>
    <mimic joint="wheel" multiplier="-2" offset="0.3"/><limit lower="-9" upper="9" effort="1" velocity="1"/></joint>
  <joint name="slide" type="prismatic"><parent link="copy"/><child link="slide"/><axis xyz="0 0 1"/>
    <mimic joint="copy" multiplier="0.05" offset="0.01"/><limit lower="-9" upper="9" effort="1" velocity="1"/></joint>
  <joint name="tip" type="fixed"><parent link="slide"/><child link="tip"/><origin xyz="0 0 0.2"/></joint>
</robot>
"""


def mixed() -> Kinematics:
    model = parse_urdf(MIXED)
    names = ("wheel", "rail")  # not the file's order
    return Kinematics(model, names, model.coupling(names))


def test_slides_mimics_of_mimics_and_negative_axes_by_hand() -> None:
    kinematics = mixed()
    wheel, rail = 0.7, 0.25
    poses = kinematics.link_poses(torch.tensor([wheel, rail], dtype=torch.float64)).numpy()
    # The rail's frame is turned by 90 degrees about z, so its axis (0, .6, .8) is (-.6, 0, .8) in the base.
    np.testing.assert_allclose(poses[1][:3, 3], [0.1 - 0.6 * rail, 0, 0.8 * rail], atol=1e-15)
    turn = np.pi / 2 - wheel
    np.testing.assert_allclose(poses[2][:2, 0], [np.cos(turn), np.sin(turn)], atol=1e-15)
    copy = -2 * wheel + 0.3
    slide = 0.05 * copy + 0.01
    up = np.array([np.sin(turn) * np.sin(copy), -np.cos(turn) * np.sin(copy), np.cos(copy)])  # Rz(turn) Rx(copy) e_z
    np.testing.assert_allclose(poses[5][:3, 3], poses[1][:3, 3] + (slide + 0.2) * up, atol=1e-15)


def test_jacobians_add_up_over_mimics() -> None:
    kinematics, q, h = mixed(), torch.tensor([0.7, 0.25], dtype=torch.float64), 1e-6
    ours = kinematics.link_jacobians(q)
    for k in range(2):
        step = h * torch.eye(2, dtype=torch.float64)[k]
        slope = (kinematics.link_poses(q + step) - kinematics.link_poses(q - step)) / (2 * h)
        torch.testing.assert_close(ours[:, :3, k], slope[:, :3, 3], rtol=0, atol=1e-9)
    # Turning wheel by 1 turns tip by -1 about z and by -2 about the copy's axis.
    assert float(ours[5, 3:, 0].norm()) == pytest.approx(5**0.5, abs=1e-12)
    assert (ours[:, 3:, 1] == 0).all()


def test_a_chain_of_1200_links() -> None:
    links = "".join(f'<link name="l{k}"/>' for k in range(1200))
    joints = "".join(
        f'<joint name="j{k}" type="continuous"><parent link="l{k}"/><child link="l{k + 1}"/><axis xyz="0 0 1"/>'
        '<origin xyz="0.001 0 0"/></joint>'
        for k in range(1199)
    )
    model = parse_urdf(f'<robot name="chain">{links}{joints}</robot>')
    names = tuple(j.name for j in model.movable_joints)
    kinematics = Kinematics(model, names, model.coupling(names))
    q = torch.full((1199,), 2 * np.pi / 1200, dtype=torch.float64)
    kinematics.link_poses(q)
    start = time.perf_counter()
    poses, jacobians = kinematics.link_poses(q), kinematics.link_jacobians(q)
    assert time.perf_counter() - start < 2
    # A regular polygon: the chord after half of the sides is the diameter of the circle of 1.2 m.
    assert float((poses[601, :3, 3] - poses[1, :3, 3]).norm()) == pytest.approx(1.2 / np.pi, rel=1e-4)
    jacobian = jacobians[600]
    arm = poses[600, :2, 3] - poses[1:, :2, 3]  # joint k turns about the origin of link k + 1
    torch.testing.assert_close(jacobian[1, :600], arm[:600, 0], rtol=0, atol=1e-12)
    assert (jacobian[:, 600:] == 0).all()


@pytest.mark.parametrize("shape", [(6,), (9,), (8, 1), (0,)])
def test_a_q_of_the_wrong_length_is_refused_with_the_joints_names(shape: tuple[int, ...]) -> None:
    e, kinematics = loaded("panda")
    for function in (kinematics.link_poses, kinematics.link_jacobians):
        with pytest.raises(InputError, match=f"{e.n} joints.*panda_joint1, panda_joint2") as error:
            function(torch.zeros(shape, dtype=torch.float64))
        assert str(shape) in str(error.value)


def test_whole_numbers_are_refused_before_they_round_the_robot() -> None:
    kinematics = mixed()
    function = Kinematics.link_poses
    while hasattr(function, "__wrapped__"):  # without the checks of annotations that tests add
        function = function.__wrapped__
    with pytest.raises(InputError, match="floating"):
        function(kinematics, torch.zeros(2, dtype=torch.long))
    with pytest.raises(InputError, match="2 joints"):
        function(kinematics, torch.tensor(0.0))


@pytest.mark.gpu
@pytest.mark.parametrize("name", KINDS)
def test_the_same_on_a_gpu(name: str) -> None:
    e, kinematics = loaded(name)
    q = anywhere(e, 100)
    for function in (kinematics.link_poses, kinematics.link_jacobians):
        there = function(q.cuda())
        assert there.is_cuda and there.dtype == torch.float64
        torch.testing.assert_close(there.cpu(), function(q), rtol=0, atol=1e-12)
        assert function(q.cuda().float()).dtype == torch.float32
