"""Video rendered by others with exact truth: the two-arm ALOHA simulation. `benchmarks/aloha.py` measures all of it."""

from __future__ import annotations

import numpy as np
import pytest
from aloha_scene import aloha_embodiment
from conftest import material

from jidm import Camera, JacobianIDM, read_video

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("episode", ["insertion_human", "transfer_cube_scripted"])
def test_two_arms_are_followed_from_their_first_pose(episode: str) -> None:
    folder = material("aloha_sim")
    robot, convention, camera = aloha_embodiment(folder)
    video = read_video(folder / f"aloha_sim_{episode}.mp4")[:36]
    state = np.load(folder / f"aloha_sim_{episode}_state.npz")["qpos"].astype(np.float64)
    q = np.asarray(convention.to_embodiment(state))[:36]
    arm = np.array([name not in robot.gripper_joints for name in robot.joint_names])
    motion = JacobianIDM.from_embodiment(robot, camera=Camera.from_dict(camera)).decode(video, q0=q[0])
    error = np.abs(motion.position.numpy() - q)[:, arm]
    moved = np.abs(q[-1] - q[0])[arm].mean()
    assert motion.valid.all()
    assert moved > 0.1  # the arms turned this far, so standing still would be this wrong
    assert error[-1].mean() < 0.02
    assert (error < 0.05).mean() > 0.95
