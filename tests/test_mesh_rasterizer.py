"""Rasterized meshes of a robot show what the simulator's renderer shows; without PyTorch3D there is a clear error."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import Tensor

from jidm.camera.model import Camera
from jidm.errors import InputError, MissingExtraError
from jidm.fields.analytic import AnalyticField
from jidm.robot.embodiment import Embodiment
from jidm.robot.kinematics import Kinematics
from jidm.robot.mesh_rasterizer import MeshRasterizer
from jidm.robot.registry import load_embodiment
from jidm.sim import Scene

needs_pytorch3d = pytest.mark.skipif(find_spec("pytorch3d") is None, reason="PyTorch3D has to be built from source")


def poses_of(robot: Embodiment, count: int) -> Tensor:
    offset = np.random.default_rng(0).uniform(-0.5, 0.5, (count, robot.n)) * robot.exploration_range
    return torch.from_numpy(np.clip(robot.home + offset, robot.lower, robot.upper)).float()


@needs_pytorch3d
@pytest.mark.parametrize("name, width, height", [("panda", 64, 48), ("planar_finger_5", 112, 160)])
def test_depth_and_links_are_those_of_the_simulator(name: str, width: int, height: int) -> None:
    robot = load_embodiment(name)
    camera = robot.camera("front").resized(width, height)
    q = poses_of(robot, 2)
    kinematics = Kinematics.from_embodiment(robot)
    depth, link = MeshRasterizer(robot.model)(camera, kinematics.link_poses(q))
    assert depth.shape == link.shape == (2, width * height) and depth.dtype == q.dtype
    with Scene(robot, exact=True, mesh_tolerance=0.0) as scene:
        for k in range(2):
            rendering = scene.render(q[k], camera)
            ours, theirs = link[k].reshape(height, width).numpy(), rendering.link
            assert theirs.max() > 0
            assert (ours != theirs).sum() <= 0.005 * (theirs >= 0).sum() + 5
            both = (ours >= 0) & (ours == theirs)
            error = np.abs(depth[k].reshape(height, width).numpy()[both] - rendering.depth[both])
            assert np.quantile(error, 0.98) < 2e-3
    one = MeshRasterizer(robot.model)(camera, kinematics.link_poses(q[1]))
    assert torch.equal(one[1], link[1])  # an item of a batch does not depend on the others


@needs_pytorch3d
def test_triangles_around_the_camera_are_clipped() -> None:
    robot = load_embodiment("panda")
    inside = Camera.look_at((0.0, 0.0, 0.35), (1.0, 0.0, 0.35), width=40, height=30)
    depth, link = MeshRasterizer(robot.model)(inside, Kinematics.from_embodiment(robot).link_poses(poses_of(robot, 1)))
    assert (link >= 0).any() and depth[link >= 0].isfinite().all() and (depth[link >= 0] > 0).all()


@needs_pytorch3d
def test_the_dense_field_on_rasterized_meshes() -> None:
    robot = load_embodiment("panda")
    q = poses_of(robot, 1)[0].double()
    by_points, by_meshes = (AnalyticField(robot, robot.camera("front"), rasterizer=x) for x in ("points", "pytorch3d"))
    (a, mask_a), (b, mask_b) = by_points.dense(q, 48, 64), by_meshes.dense(q, 48, 64)
    both = (mask_a > 0) & (mask_b > 0)
    assert both.sum() > 0.8 * mask_b.sum() > 50
    error = (a - b).norm(dim=(0, 1))[both] / b.norm(dim=(0, 1))[both].median()
    assert error.median() < 0.1  # some cells show another link of a sampled surface than of the meshes


def test_without_pytorch3d_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch3d", None)
    robot = load_embodiment("planar_finger_2")
    with pytest.raises(MissingExtraError, match=r"\[pytorch3d\]"):
        AnalyticField(robot, robot.camera("front"), rasterizer="pytorch3d")


def test_an_unknown_rasterizer_is_refused() -> None:
    robot = load_embodiment("planar_finger_2")
    with pytest.raises(InputError, match="'points' or 'pytorch3d'"):
        AnalyticField(robot, robot.camera("front"), rasterizer="opengl")
