"""Cameras for recording: fitted to the workspace, and jittered."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from jidm.errors import InputError
from jidm.robot.registry import load_embodiment
from jidm.sim.babble import BabbleConfig
from jidm.sim.babble_motion import usable_range
from jidm.sim.camera_placement import fit_camera_to_robot, jitter_camera
from jidm.sim.workspace import floor_height, surface_points


@pytest.mark.parametrize(
    ("name", "size"), [("panda", (128, 128)), ("planar_finger_5", (96, 96)), ("planar_finger_5", (160, 96))]
)
def test_the_workspace_fills_the_image(name: str, size: tuple[int, int]):
    robot = load_embodiment(name)
    given = robot.camera("front")
    camera = fit_camera_to_robot(robot, given, *size)
    assert (camera.width, camera.height) == size
    assert torch.equal(camera.T_camera_base.double(), given.T_camera_base.double())
    assert float(camera.K[0, 0] / camera.K[1, 1]) == pytest.approx(float(given.K[0, 0] / given.K[1, 1]))
    q = np.random.default_rng(9).uniform(*usable_range(robot), (200, robot.n))
    p, _ = surface_points(robot, q, 400)
    possible = p[..., 2].amin(dim=-1) >= floor_height(robot) - 0.02
    uv, _ = replace(camera, K=camera.K.double()).project(p[possible])
    whole = ((uv > -0.5) & (uv < torch.tensor(size) - 0.5)).all(-1).all(-1)
    assert whole.double().mean() > 0.88
    # As large as possible: along one axis the workspace nearly fills the image.
    extent = (uv.amax(1).quantile(0.98, dim=0) - uv.amin(1).quantile(0.02, dim=0)) / torch.tensor(size)
    assert 0.85 < extent.max() < 1.1


def test_a_larger_crop_fraction_shows_the_robot_larger() -> None:
    panda = load_embodiment("panda")
    whole, cropped = (fit_camera_to_robot(panda, panda.camera("front"), 64, 64, crop_fraction=x) for x in (0.02, 0.15))
    assert cropped.K[0, 0] > 1.3 * whole.K[0, 0]
    assert torch.equal(cropped.T_camera_base, whole.T_camera_base)
    with pytest.raises(InputError, match="crop_fraction must be"):
        BabbleConfig(embodiment="panda", crop_fraction=0.5)


def test_camera_jitter_has_the_given_standard_deviations():
    camera = load_embodiment("planar_finger_2").camera("front")
    assert jitter_camera(camera, (0.0, 0.0, 0.0), np.random.default_rng(0)).to_dict() == camera.to_dict()
    rng = np.random.default_rng(1)
    made = [jitter_camera(camera, (0.02, 1.0, 0.05), rng) for _ in range(400)]
    T = camera.T_camera_base.double()
    focal = torch.stack([m.K[0, 0] / camera.K[0, 0] for m in made]).log()
    rotations = torch.stack([m.T_camera_base[:3, :3] @ T[:3, :3].T for m in made])
    angle = ((torch.einsum("tii->t", rotations) - 1) / 2).clamp(-1, 1).acos().rad2deg()
    assert float(focal.std()) == pytest.approx(0.05, rel=0.15)
    assert float((angle**2).mean().sqrt()) == pytest.approx(3**0.5, rel=0.15)
    shifts = torch.stack([m.T_camera_base[:3, 3] - r @ T[:3, 3] for m, r in zip(made, rotations, strict=True)])
    assert float(shifts.std()) == pytest.approx(0.02 * float(T[:3, 3].norm()), rel=0.15)
