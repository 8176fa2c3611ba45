"""A planner and a decoder per environment as one policy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_control_controller import CHUNK, pose
from test_control_decoder import ROBOT, make_decoder, picture

from jidm.errors import InputError
from jidm.serving.planner_policy import PlannerPolicy


def turn_joints(frame: torch.Tensor) -> np.ndarray:
    """A generated video in which every arm joint turns by 0.02 rad per frame."""
    turn = np.where(ROBOT.gripper_mask, 0.0, 0.02)
    return np.stack([picture(pose(frame) + k * turn) for k in range(1, CHUNK + 1)])


def batch(q: np.ndarray) -> dict[str, torch.Tensor]:
    frames = np.stack([picture(x) for x in q]).transpose(0, 3, 1, 2)
    return {"observation.images.top": torch.tensor(frames), "observation.state": torch.tensor(q).float()}


def test_each_environment_follows_its_own_video() -> None:
    policy = PlannerPolicy(turn_joints, make_decoder).eval()
    q = np.stack([ROBOT.home, ROBOT.home + np.where(ROBOT.gripper_mask, 0.0, 0.1)])
    start = q.copy()
    for _ in range(3 * CHUNK * 4):
        action = policy.select_action(batch(q))
        assert action.shape == (2, ROBOT.n) and action.dtype == torch.float32
        q = q + action.double().numpy() / 50
    np.testing.assert_allclose((q - start)[:, :7], 3 * CHUNK * 0.02, atol=0.01)
    policy.reset()
    chunk = policy.predict_action_chunk(batch(start))
    assert chunk.shape == (2, CHUNK * 4, ROBOT.n)
    np.testing.assert_allclose((chunk.sum(1) / 50)[:, :7], CHUNK * 0.02, atol=0.01)


def test_missing_inputs_are_named() -> None:
    policy = PlannerPolicy(turn_joints, make_decoder)
    whole = batch(ROBOT.home[None])
    for wrong, words in (
        ({k: v for k, v in whole.items() if "state" not in k}, "observation.state"),
        ({k: v for k, v in whole.items() if "images" not in k}, "image_key="),
        ({**whole, "observation.images.wrist": whole["observation.images.top"]}, "known: top, wrist"),
        ({**whole, "observation.state": whole["observation.state"][0]}, r"states \(B, n\)"),
    ):
        with pytest.raises(InputError, match=words):
            policy.select_action(wrong)
    assert PlannerPolicy(turn_joints, make_decoder, image_key="top").select_action(whole).shape == (1, ROBOT.n)


def fails_at(bad: int, states: list[int]) -> object:
    """A planner that raises in every call for one environment, told by the first joint in its frame."""

    def plan(frame: torch.Tensor) -> np.ndarray:
        states.append(int(pose(frame)[0] > ROBOT.home[0] + 0.05))
        if states[-1] == bad:
            raise RuntimeError("out of memory")
        return turn_joints(frame)

    return plan


def two_poses() -> np.ndarray:
    return np.stack([ROBOT.home, ROBOT.home + np.where(ROBOT.gripper_mask, 0.0, 0.1)])


def test_a_failing_planner_holds_only_its_own_environment() -> None:
    policy, q = PlannerPolicy(fails_at(1, []), make_decoder), two_poses()  # type: ignore[arg-type]
    start = q.copy()
    for _ in range(CHUNK * 4):
        action = policy.select_action(batch(q))
        assert bool(action.isfinite().all())
        q = q + action.double().numpy() / 50
    np.testing.assert_allclose((q - start)[0, :7], CHUNK * 0.02, atol=0.01)
    np.testing.assert_allclose(q[1], start[1], atol=1e-9)
    assert policy.problems == (None, "out of memory")


@pytest.mark.parametrize("space", ["joint_velocity", "joint_position"])
def test_a_state_that_is_no_pose_spoils_only_its_own_environment(space: str) -> None:
    policy = PlannerPolicy(turn_joints, lambda: make_decoder(action_space=space))
    bad = batch(two_poses())
    bad["observation.state"][1, 2] = torch.nan
    action = policy.select_action(bad)
    assert bool(action[0].isfinite().all()) and policy.problems[0] is None and policy.problems[1]
    # Velocities of 0 keep the robot where it is; a position would move it, and nobody knows where it is.
    assert bool((action[1] == 0).all()) if space == "joint_velocity" else bool(action[1].isnan().all())
    policy.select_action(batch(two_poses()))
    assert policy.problems == (None, None)
    if space == "joint_position":
        policy.reset()
        with pytest.raises(InputError, match="no environment can be commanded"):
            policy.select_action({key: value[1:] for key, value in bad.items()})


def test_a_planner_that_fails_later_brakes_the_robot() -> None:
    healthy = [True]

    def plan(frame: torch.Tensor) -> np.ndarray:
        if not healthy[0]:
            raise SystemError("gone")
        return turn_joints(frame)

    policy, q = PlannerPolicy(plan, make_decoder), ROBOT.home[None].copy()
    moves = []
    for k in range(CHUNK * 4 + 60):
        healthy[0] = k < 8
        action = policy.select_action(batch(q)).double().numpy()
        q, _ = q + action / 50, moves.append(np.abs(action[0, :7]).max())
    assert max(moves[: CHUNK * 4]) > 0.1 and max(moves[-10:]) < 1e-6


def test_dropping_queued_actions_plans_anew() -> None:
    states: list[int] = []
    policy = PlannerPolicy(fails_at(-1, states), make_decoder)  # type: ignore[arg-type]
    now = batch(ROBOT.home[None])
    policy.select_action(now)
    policy.select_action(now)
    assert len(states) == 1
    policy.drop_queued_actions()
    policy.select_action(now)
    assert len(states) == 2


def test_the_only_camera_may_have_no_name() -> None:
    whole = batch(ROBOT.home[None])
    whole["observation.image"] = whole.pop("observation.images.top")
    assert PlannerPolicy(turn_joints, make_decoder).select_action(whole).shape == (1, ROBOT.n)
