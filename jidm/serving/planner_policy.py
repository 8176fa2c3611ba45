"""A planner and an action decoder per environment as one PyTorch module, in the form of a LeRobot policy.

`jidm.serving.lerobot` registers it with LeRobot; this module needs only PyTorch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from jidm.control import ActionDecoder, Commands, Planner
from jidm.datasets.feature import IMAGE_PREFIX, STATE
from jidm.errors import InputError, did_you_mean

logger = logging.getLogger(__name__)

_ONE_IMAGE = "observation.image"
"""Key of the image of an environment with one camera without a name."""


@dataclass(frozen=True)
class PlannerPolicyConfig:
    """What loops read of a policy's `config`.

    Attributes:
        type: name of the kind of policy.
        device: of the actions.
        use_amp: whether the loop may compute in half precision.
    """

    type: str = "jidm"
    device: str = "cpu"
    use_amp: bool = False


class PlannerPolicy(nn.Module):
    """Generates a video from the latest frame, gives its commands one by one, and repeats.

    A planner that raises, and a frame or state that cannot be used, affect only their own environment: it gets commands that
    brake the robot, and the next call tries again. Its commands are NaN if they are positions and nobody knows where the robot
    is; a batch of which this is true throughout is refused.

    Args:
        planner: maps a frame (3, H, W) in [0, 1] to the frames that follow it.
        make_decoder: makes the decoder of one robot; called once per environment of a batch.
        image_key: the camera of the batch that the planner continues; may be omitted if there is only one.
        config: what loops read as the policy's `config`.

    Attributes:
        problems: of the last call, for each environment: why its commands hold; None if they do not.
    """

    def __init__(
        self,
        planner: Planner,
        make_decoder: Callable[[], ActionDecoder],
        *,
        image_key: str | None = None,
        config: Any = None,
    ) -> None:
        super().__init__()
        self.config = PlannerPolicyConfig() if config is None else config
        self._planner, self._make_decoder, self._image_key = planner, make_decoder, image_key
        self.reset()

    def reset(self) -> None:
        """Start an episode."""
        self._environments: list[_Environment] = []
        self.problems: tuple[str | None, ...] = ()

    def drop_queued_actions(self) -> None:
        """Generate a new video at the next call, for instance because the task changed. The robot's motion continues."""
        for environment in self._environments:
            environment.drop_remaining()

    @torch.no_grad()
    def select_action(self, batch: Mapping[str, Any], **_: Any) -> Float[Tensor, "B n"]:
        """The next command of each environment, in the decoder's action space.

        Args:
            batch: `observation.images.<camera>` (B, 3, H, W) in [0, 1], or `observation.image` of the only camera, and
                `observation.state` (B, n) [rad or m], in the order of the field's joints.

        Raises:
            InputError: the image or the state is missing.
        """
        return self._stack_actions(batch, 1)[:, 0]

    @torch.no_grad()
    def predict_action_chunk(self, batch: Mapping[str, Any], **_: Any) -> Float[Tensor, "B M n"]:
        """The commands of one generated video for each environment, as many as the shortest has."""
        return self._stack_actions(batch, None)

    def _stack_actions(self, batch: Mapping[str, Any], count: int | None) -> Tensor:
        frames, states = self._parse_batch(batch)
        while len(self._environments) < len(frames):
            self._environments.append(_Environment(self._make_decoder()))
        rows = self._environments[: len(frames)]
        actions = [
            row.next_actions(self._planner, frame, state.double().cpu().numpy(), count)
            for row, frame, state in zip(rows, frames, states, strict=True)
        ]
        for k, row in enumerate(rows):
            if row.problem is not None and row.problem != (self.problems[k] if k < len(self.problems) else None):
                logger.warning("environment %d holds: %s", k, row.problem)
        self.problems = tuple(row.problem for row in rows)
        # A batch of more than one is simulated, and its other environments go on.
        known = [x for x in actions if x is not None]
        if not known:
            raise InputError(f"no environment can be commanded: {self.problems[0]}")
        shortest = min(len(x) for x in known)
        filled = [np.full_like(known[0][:shortest], np.nan) if x is None else x[:shortest] for x in actions]
        return torch.stack([torch.from_numpy(x) for x in filled]).to(states.device, torch.float32)

    def _parse_batch(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        cameras = {key.removeprefix(IMAGE_PREFIX): key for key in batch if key.startswith(IMAGE_PREFIX)}
        if _ONE_IMAGE in batch:
            cameras["image"] = _ONE_IMAGE
        image_key = self._image_key if self._image_key is not None or len(cameras) != 1 else next(iter(cameras))
        if image_key not in cameras:
            raise InputError(
                f"which camera does the planner continue? pass image_key=; {did_you_mean(image_key or '', list(cameras))}"
            )
        if STATE not in batch:
            raise InputError(f"the batch has no {STATE}: the decoder needs the joint positions")
        frames, states = batch[cameras[image_key]], batch[STATE]
        if frames.dim() != 4 or states.dim() != 2 or len(frames) != len(states):
            raise InputError(
                f"images must be (B, 3, H, W) and states (B, n), got {tuple(frames.shape)} and {tuple(states.shape)}"
            )
        return frames, states


class _Environment:
    """One environment: its decoder, and the remaining commands of its current video."""

    def __init__(self, decoder: ActionDecoder) -> None:
        self._decoder = decoder
        self._remaining: Commands | None = None
        self.problem: str | None = None

    def drop_remaining(self) -> None:
        self._remaining = None

    def next_actions(self, planner: Planner, frame: Tensor, q: np.ndarray, count: int | None) -> np.ndarray | None:
        """(M, n) the next `count` commands; all of a newly generated video if None; that of `_hold` if planning fails."""
        if count is None or not self._remaining:
            try:
                self._remaining, self.problem = self._plan_chunk(planner, frame, q), None
            except Exception as error:
                return self._hold(str(error) or type(error).__name__, q)
        count = len(self._remaining) if count is None else count
        commands, self._remaining = self._remaining[:count], self._remaining[count:]
        return commands.action

    def _plan_chunk(self, planner: Planner, frame: Tensor, q: np.ndarray) -> Commands:
        decoder = self._decoder
        if decoder.trajectory.position is None:
            decoder.reset(q)
        else:
            if decoder.trajectory.time > 0:
                decoder.trajectory.observe(q)
            decoder.start_video(q)
        decoder.push(frame, layout="CHW")
        commands = decoder.push(planner(frame))
        return commands if len(commands) else decoder.trajectory.hold(1, "the planner gave no frames")

    def _hold(self, problem: str, q: np.ndarray) -> np.ndarray | None:
        """(1, n) a command that brakes the robot and keeps it at rest; None if nobody knows where it is."""
        self._remaining, self.problem = None, problem
        trajectory = self._decoder.trajectory
        if trajectory.position is not None:
            return trajectory.hold(1, problem).action
        # Nothing was commanded yet: steps and velocities of 0 keep the robot where it is, and so do its own positions.
        limits = self._decoder.limits
        if self._decoder.config.action_space != "joint_position":
            return np.zeros((1, limits.n))
        inside = q.shape == (limits.n,) and bool(((q >= limits.lower) & (q <= limits.upper)).all())
        return q[None] if inside else None
