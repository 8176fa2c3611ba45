"""The policy as LeRobot's loops call it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_controller import K, pose
from test_decoder import ROBOT, decoder, picture

from jidm.errors import InputError
from jidm.serving.lerobot_policy import PlannerPolicy


def drifts(frame: torch.Tensor) -> np.ndarray:
    """A dream in which every arm joint turns by 0.02 rad a frame."""
    turn = np.where(ROBOT.gripper_mask, 0.0, 0.02)
    return np.stack([picture(pose(frame) + k * turn) for k in range(1, K + 1)])


def batch(q: np.ndarray) -> dict[str, torch.Tensor]:
    frames = np.stack([picture(x) for x in q]).transpose(0, 3, 1, 2)
    return {"observation.images.top": torch.tensor(frames), "observation.state": torch.tensor(q).float()}


def test_each_environment_is_led_by_its_own_dream() -> None:
    policy = PlannerPolicy(drifts, decoder).eval()
    q = np.stack([ROBOT.home, ROBOT.home + np.where(ROBOT.gripper_mask, 0.0, 0.1)])
    start = q.copy()
    for _ in range(3 * K * 4):
        action = policy.select_action(batch(q))
        assert action.shape == (2, ROBOT.n) and action.dtype == torch.float32
        q = q + action.double().numpy() / 50
    np.testing.assert_allclose((q - start)[:, :7], 3 * K * 0.02, atol=0.01)
    policy.reset()
    chunk = policy.predict_action_chunk(batch(start))
    assert chunk.shape == (2, K * 4, ROBOT.n)
    np.testing.assert_allclose((chunk.sum(1) / 50)[:, :7], K * 0.02, atol=0.01)


def test_what_is_missing_is_told() -> None:
    policy = PlannerPolicy(drifts, decoder)
    whole = batch(ROBOT.home[None])
    for wrong, words in (
        ({k: v for k, v in whole.items() if "state" not in k}, "observation.state"),
        ({k: v for k, v in whole.items() if "images" not in k}, "which picture"),
        ({**whole, "observation.images.wrist": whole["observation.images.top"]}, "known: top, wrist"),
        ({**whole, "observation.state": whole["observation.state"][0]}, r"states \(B, n\)"),
    ):
        with pytest.raises(InputError, match=words):
            policy.select_action(wrong)
    assert PlannerPolicy(drifts, decoder, image_key="top").select_action(whole).shape == (1, ROBOT.n)
