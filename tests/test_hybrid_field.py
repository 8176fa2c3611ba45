"""Learned eyes with the exact geometry: the Jacobian is that of URDF and camera, the mask is both's."""

from __future__ import annotations

import pytest
import torch
from step_fields import FINGER, FLOW_GRID, GRID, SIDE, config, pictures, untrained
from torch import Tensor

from jidm import Camera, Embodiment
from jidm.errors import CheckpointError, InputError
from jidm.field.hybrid import HybridField
from jidm.field.learned import LearnedField
from jidm.field.learned.matching import PairHead
from jidm.learn.carried import View, carried_flow, coarser, link_poses
from jidm.robot.kinematics import Kinematics
from jidm.solve.learned_step import learned_step, step_pairs
from jidm.solve.looks import SeenAt, StepField


def square_camera(side: int = SIDE) -> Camera:
    """Of the finger: from above, the whole reach in view."""
    front = Embodiment.load("planar_finger_2").camera()
    K = torch.tensor([[1.05 * side, 0, (side - 1) / 2], [0, 1.05 * side, (side - 1) / 2], [0, 0, 1]]).double()
    return Camera(width=side, height=side, K=K, T_camera_base=front.T_camera_base)


@pytest.fixture(scope="module")
def hybrid() -> HybridField:
    return HybridField(untrained(), Embodiment.load("planar_finger_2"), square_camera(), points=6000)


def read(field: HybridField, q: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return field.jacobian(field.encode(pictures(len(q))), q)


def test_the_jacobian_is_how_surface_points_move_in_the_picture(hybrid: HybridField) -> None:
    q, eps = torch.tensor([[0.3, -0.5]]), 1e-4
    J, logit = read(hybrid, q)
    pose, exact = hybrid.at(q[0].double()), []
    for joint in range(2):
        step = torch.zeros(2).double()
        step[joint] = eps
        exact.append((pose.surface(step).points - pose.surface(-step).points) / (2 * eps))
    uv, moved = pose.surface().points, torch.stack(exact, -1)  # (N, 2), (N, 2, n) px of the full picture
    cell = ((uv - 0.5) / 2).round().long()
    near = pose.visible & ((uv - 0.5) / 2 - cell).abs().lt(0.1).all(-1) & (cell >= 0).all(-1) & (cell < GRID).all(-1)
    near &= logit[0, cell[:, 1].clamp(0, GRID - 1), cell[:, 0].clamp(0, GRID - 1)] > -8
    assert near.sum() > 20
    told = J[0][:, :, cell[near, 1], cell[near, 0]].movedim(-1, 0).double()
    error = (told - moved[near]).flatten(1).norm(dim=1)
    size = moved[near].flatten(1).norm(dim=1)
    assert size.mean() > 10  # px per rad: a cell's worth would be a quarter
    assert error.median() < 0.05 * size.median()
    assert (error < 0.2 * size.median()).float().mean() > 0.9  # the others lie at a link's edge


def test_off_the_robot_nothing_moves_and_nothing_is_robot(hybrid: HybridField) -> None:
    J, logit = read(hybrid, torch.tensor([[0.3, -0.5], [0.0, 0.9]]))
    _, mask = hybrid.dense(torch.tensor([[0.3, -0.5], [0.0, 0.9]]), GRID, GRID)
    off = mask == 0
    assert 10 < int((~off).sum()) < off.sum()
    assert (logit[off] <= -8).all()
    # One cell beyond the outline the field goes on, for pixels there still show the robot; further off there is none.
    rim = off & (torch.nn.functional.max_pool2d(mask[:, None].float(), 3, 1, 1)[:, 0] > 0)
    assert not J.movedim((1, 2), (-2, -1))[off & ~rim].any() and rim.sum() > 10
    b, i, j = (int(x) for x in rim[:, 1:-1, 1:-1].nonzero()[0])
    near = mask[b, i : i + 3, j : j + 3] > 0
    torch.testing.assert_close(J[b, :, :, i + 1, j + 1], J[b, :, :, i : i + 3, j : j + 3][..., near].mean(-1))


def test_the_robot_is_where_both_say_so() -> None:
    q = torch.tensor([[0.3, -0.5]])
    for bias, on_robot in ((-30.0, False), (30.0, True)):
        learned = untrained()
        learned.mask_out.weight.data.zero_()
        learned.mask_out.bias.data.fill_(bias)
        field = HybridField(learned, Embodiment.load("planar_finger_2"), square_camera(), points=3000)
        _, logit = read(field, q)
        assert bool((logit > 0).any()) == on_robot
        assert logit.max() == (8.0 if on_robot else bias)


def test_a_batch_is_its_items_and_the_pose_bends_the_field(hybrid: HybridField) -> None:
    q = torch.tensor([[0.3, -0.5], [-0.6, 0.4]])
    whole = read(hybrid, q)
    for i in range(2):
        with torch.no_grad():
            one = hybrid.jacobian(hybrid.encode(pictures(2)[i : i + 1]), q[i : i + 1])
        for a, b in zip(whole, one, strict=True):
            torch.testing.assert_close(a[i], b[0], rtol=1e-4, atol=1e-3)
    assert not torch.equal(whole[0][0], whole[0][1])


def test_everything_else_is_the_networks(hybrid: HybridField) -> None:
    learned = hybrid.learned
    assert isinstance(hybrid, StepField)
    assert hybrid.pair is learned.pair and hybrid.config is learned.config and hybrid.joint_names == FINGER
    assert hybrid.delta_std is learned.delta_std and hybrid.step_spread is learned.step_spread
    image = pictures(1)
    for a, b in zip(hybrid.state(hybrid.encode(image)), learned.state(learned.encode(image)), strict=True):
        torch.testing.assert_close(a, b)
    assert step_pairs(hybrid, pictures(2), pictures(2, seed=1)).isfinite().all()


class Told(PairHead):
    """Says flow that was worked out before: (forward, backward) and where each is known."""

    def __init__(self, flows: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__(8, 1, (FLOW_GRID // 2, FLOW_GRID // 2))
        self.flows = flows

    def correlate(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(1), torch.ones(1)

    def start(self, window: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        flow, weight = self.flows[int(window)]
        return flow, weight.log()


def test_exact_flow_gives_the_exact_step() -> None:
    """Depth and link of the cells by the geometry, carried along by forward kinematics: a finite step comes back."""
    robot, learned = Embodiment.load("planar_finger_2"), untrained()
    learned.mask_out.weight.data.zero_()
    learned.mask_out.bias.data.fill_(20.0)
    field = HybridField(learned, robot, square_camera(), points=6000)
    q = torch.tensor([[0.3, -0.5]])
    step = torch.tensor([[0.06, -0.08]])
    views = [cell_view(field, x.double()) for x in (q, q + step)]
    told = []
    for a, b in (views, views[::-1]):
        flow, seen_again = carried_flow(a, b)
        flow, share = coarser(flow.float() * 2, seen_again.float(), 2)
        told.append((flow, (share == 1).float()))
    learned.pair = Told((told[0], told[1]))
    seen = field.encode(pictures(2))
    at = SeenAt.of(field, seen, torch.cat([q, q + step]))
    with torch.no_grad():
        found = learned_step(field, at[:1], at[1:], closer=())
    torch.testing.assert_close(found.solution.delta_q, step, rtol=0.01, atol=2e-4)
    assert float(found.solution.explained) > 0.98 and found.solution.observable.all()


def cell_view(field: HybridField, q: Tensor) -> View:
    """Depth and link of the field's own cells at pose q, found by shooting at a plane: the finger is flat."""
    camera = field.camera.resized(GRID, GRID)
    pose = field.at(q)
    surface = pose.surface()
    cell = ((surface.points[0] - 0.5) / 2).round().long()
    depth, link = torch.full((1, GRID, GRID), 1.0).double(), torch.full((1, GRID, GRID), -1)
    poses = field.analytic.kinematics.link_poses(q)
    p_base = field.analytic.kinematics.move_points(poses, pose.skin.link, pose.skin.p_link)
    _, z = camera.project(p_base)
    inside = pose.visible[0] & (cell >= 0).all(-1) & (cell < GRID).all(-1)
    for k in inside.nonzero()[:, 0].tolist():
        u, v = cell[k].tolist()
        if link[0, v, u] < 0 or z[0, k] < depth[0, v, u]:
            depth[0, v, u], link[0, v, u] = z[0, k], pose.skin.link[k]
    K = torch.stack([camera.K[0, 0], camera.K[1, 1], camera.K[0, 2], camera.K[1, 2]])[None]
    kinematics = Kinematics.from_embodiment(field.analytic.embodiment)
    return View(depth, link, K, camera.T_camera_base[None], link_poses(kinematics, q))


# ---- what does not fit together --------------------------------------------------------------------------------------


def test_other_joints_are_refused() -> None:
    other = LearnedField(config(("hinge2", "hinge1")))
    with pytest.raises(CheckpointError, match=r"knows the joints hinge2, hinge1, 'planar_finger_2' has hinge1, hinge2"):
        HybridField(other, Embodiment.load("planar_finger_2"), square_camera())
    with pytest.raises(CheckpointError, match="use the robot it was trained for"):
        HybridField(untrained(), Embodiment.load("planar_finger_3"), square_camera())


def test_another_picture_size_is_refused_with_the_remedy() -> None:
    with pytest.raises(InputError, match=r"camera is 32x32, the network reads 64x64: pass camera\.resized\(64, 64\)"):
        HybridField(untrained(), Embodiment.load("planar_finger_2"), square_camera(32))
