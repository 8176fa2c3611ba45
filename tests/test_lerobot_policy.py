"""LeRobot's loops drive the policy: a stand-in written from its protocol, and the real package where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import lerobot_stand_in
import numpy as np
import pytest
import torch
from test_control_controller import CHUNK, pose
from test_control_decoder import ROBOT, make_decoder, picture
from test_planner_policy import turn_joints

from jidm.errors import InputError, MissingExtraError

STEPS = CHUNK * 4


class Robots:
    """A vectorized environment of robots that do what they are told; pictures show their poses."""

    def __init__(self, count: int) -> None:
        self.num_envs, self.max_episode_steps = count, STEPS

    def reset(self) -> dict[str, np.ndarray]:
        offset = np.where(ROBOT.gripper_mask, 0.0, 0.1)
        self.q, self._step = np.stack([ROBOT.home + k * offset for k in range(self.num_envs)]), 0
        self.start = self.q.copy()
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        self.q, self._step = self.q + action.astype(np.float64) / 50, self._step + 1
        return self._observe(), np.full(self.num_envs, self._step >= STEPS)

    def _observe(self) -> dict[str, np.ndarray]:
        return {"pixels": np.stack([picture(x) for x in self.q]), "agent_pos": self.q}


@pytest.fixture
def config() -> Iterator[Any]:
    """The policy's configuration, found by its registered name."""
    with lerobot_stand_in.installed():
        importlib.import_module("jidm.serving.lerobot")  # as `--policy.discover_packages_path` does
        yield lerobot_stand_in.PreTrainedConfig.registry["jidm"]()


def test_rollout_and_eval_policy(config: Any) -> None:
    policy = lerobot_stand_in.make_policy(config, planner=turn_joints, make_decoder=make_decoder)
    before, after = lerobot_stand_in.make_pre_post_processors(config)
    env = Robots(2)
    for action in lerobot_stand_in.eval_policy(env, policy, before, after, n_episodes=3):
        assert action.shape == (STEPS, ROBOT.n)
        np.testing.assert_allclose(action.double().sum(0)[:7] / 50, CHUNK * 0.02, atol=0.01)
    np.testing.assert_allclose((env.q - env.start)[:, :7], CHUNK * 0.02, atol=0.01)


def test_one_failing_environment_does_not_end_the_rollout(config: Any) -> None:
    def plan(frame: torch.Tensor) -> np.ndarray:
        if pose(frame)[0] > ROBOT.home[0] + 0.05:
            raise RuntimeError("out of memory")
        return turn_joints(frame)

    policy = lerobot_stand_in.make_policy(config, planner=plan, make_decoder=make_decoder)
    env = Robots(2)
    lerobot_stand_in.rollout(env, policy, *lerobot_stand_in.make_pre_post_processors(config))
    moved = env.q - env.start
    np.testing.assert_allclose(moved[0, :7], CHUNK * 0.02, atol=0.01)
    np.testing.assert_allclose(moved[1], 0, atol=1e-9)
    assert policy.problems == (None, "out of memory")


def test_recording_on_one_robot(config: Any) -> None:
    plans: list[int] = []

    def plan(frame: torch.Tensor) -> np.ndarray:
        plans.append(1)
        return turn_joints(frame)

    policy = lerobot_stand_in.make_policy(config, planner=plan, make_decoder=make_decoder)
    loop, q = lerobot_stand_in.RobotLoop(policy, *lerobot_stand_in.make_pre_post_processors(config)), ROBOT.home.copy()
    for k in range(10):
        q = q + loop.tick(picture(q), q, task="" if k < 5 else "another") / 50
    assert len(plans) == 2 and np.stack(loop.recorded).shape == (10, ROBOT.n)


def make_planner() -> Any:
    return turn_joints


def test_saved_and_loaded_by_its_configuration(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.planner, config.checkpoint, config.action_space = f"{__name__}:make_planner", "panda-sim", "joint_delta"
    module = importlib.import_module("jidm.serving.lerobot.modeling_jidm")
    monkeypatch.setattr(module, "_decoder_factory", lambda _: make_decoder)  # the checkpoint is another test's
    lerobot_stand_in.make_policy(config).save_pretrained(tmp_path / "policy")
    assert {x.name for x in (tmp_path / "policy").iterdir()} == {
        "config.json",
        "policy_preprocessor.json",
        "policy_postprocessor.json",
    }
    assert json.loads((tmp_path / "policy" / "config.json").read_text())["type"] == "jidm"
    again = module.JidmPolicy.from_pretrained(tmp_path / "policy")
    assert again.config == config and not again.training
    env = Robots(1)
    observation = env.reset()
    batch = {
        "observation.images.top": torch.from_numpy(observation["pixels"]).permute(0, 3, 1, 2).float(),
        "observation.state": torch.from_numpy(observation["agent_pos"]).float(),
    }
    assert again.select_action(batch).shape == (1, ROBOT.n)


def test_a_configuration_without_planner_or_checkpoint_is_refused(config: Any) -> None:
    with pytest.raises(InputError, match=r"package\.module:function"):
        lerobot_stand_in.make_policy(config)
    config.planner = "no_such_module:f"
    with pytest.raises(InputError, match="no_such_module"):
        lerobot_stand_in.make_policy(config)
    with pytest.raises(InputError, match="checkpoint"):
        lerobot_stand_in.make_policy(config, planner=turn_joints)


@pytest.mark.skipif(importlib.util.find_spec("lerobot") is not None, reason="LeRobot is installed")
def test_without_lerobot_the_package_to_install_is_named() -> None:
    with pytest.raises(MissingExtraError, match="pip install lerobot"):
        importlib.import_module("jidm.serving.lerobot")


@pytest.mark.slow
def test_the_real_package_evaluates_the_policy() -> None:
    pytest.importorskip("lerobot", reason="LeRobot is not installed; it needs Python 3.12")
    import gymnasium as gym
    from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors
    from lerobot.scripts.lerobot_eval import eval_policy

    importlib.import_module("jidm.serving.lerobot")

    class Robot(gym.Env):  # type: ignore[misc]
        metadata: ClassVar[dict[str, Any]] = {"render_fps": 50, "render_modes": []}
        _max_episode_steps, task_description, task = STEPS, "turn", "turn"
        observation_space = gym.spaces.Dict(
            {
                "pixels": gym.spaces.Dict({"top": gym.spaces.Box(0, 255, (8, 12, 3), np.uint8)}),
                "agent_pos": gym.spaces.Box(-10, 10, (ROBOT.n,), np.float64),
            }
        )
        action_space = gym.spaces.Box(-10, 10, (ROBOT.n,), np.float32)

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            super().reset(seed=seed)
            self.q, self._steps = ROBOT.home.copy(), 0
            return self._observe(), {}

        def step(self, action: np.ndarray) -> Any:
            self.q, self._steps = self.q + action.astype(np.float64) / 50, self._steps + 1
            return self._observe(), float(self.q[0] - ROBOT.home[0]), self._steps >= STEPS, False, {}

        def _observe(self) -> dict[str, Any]:
            return {"pixels": {"top": (picture(self.q) * 255).round().astype(np.uint8)}, "agent_pos": self.q.copy()}

    config = make_policy_config("jidm", device="cpu")
    policy = get_policy_class("jidm")(config, planner=turn_joints, make_decoder=make_decoder)
    before, after = make_pre_post_processors(config)
    env = gym.vector.SyncVectorEnv([Robot, Robot])
    info = eval_policy(env, policy, lambda x: x, lambda x: x, before, after, n_episodes=2)
    highest = [episode["max_reward"] for episode in info["per_episode"]]
    # The reward is how far the first joint has turned; pictures of 8 bits show poses to 0.03 rad.
    np.testing.assert_allclose(highest, CHUNK * 0.02, atol=0.04)
