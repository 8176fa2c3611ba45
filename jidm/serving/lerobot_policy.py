"""A policy for LeRobot's evaluation and recording loops (`lerobot.policies.PreTrainedPolicy`): planner and action decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jidm.control import ActionDecoder, Commands, Planner
from jidm.datasets.feature import IMAGE_PREFIX, STATE
from jidm.errors import InputError, did_you_mean


class PlannerPolicy:
    """Generates a video from the latest frame, gives its commands one by one, and repeats.

    Args:
        planner: maps a frame (3, H, W) in [0, 1] to the frames that follow it.
        make_decoder: makes the decoder of one robot; called once per environment of a batch.
        image_key: the camera of the batch that the planner continues; may be omitted if there is only one.
    """

    name = "jidm"

    def __init__(
        self, planner: Planner, make_decoder: Callable[[], ActionDecoder], *, image_key: str | None = None
    ) -> None:
        self._planner, self._make_decoder, self._image_key = planner, make_decoder, image_key
        self._environments: list[_Environment] = []

    def reset(self) -> None:
        """Start an episode."""
        self._environments = []

    def eval(self) -> PlannerPolicy:
        """The policy itself; it has no training mode."""
        return self

    def select_action(self, batch: Mapping[str, Any]) -> Float[Tensor, "B n"]:
        """The next command of each environment, in the decoder's action space.

        Args:
            batch: `observation.images.<camera>` (B, 3, H, W) in [0, 1] and `observation.state` (B, n) [rad or m], in the
                order of the field's joints.

        Raises:
            InputError: the image or the state is missing.
        """
        return self._stack_actions(batch, 1)[:, 0]

    def predict_action_chunk(self, batch: Mapping[str, Any]) -> Float[Tensor, "B M n"]:
        """All commands of one generated video for each environment."""
        return self._stack_actions(batch, None)

    def _stack_actions(self, batch: Mapping[str, Any], count: int | None) -> Tensor:
        frames, states = self._parse_batch(batch)
        while len(self._environments) < len(frames):
            self._environments.append(_Environment(self._make_decoder()))
        actions = [
            row.next_actions(self._planner, frame, state.double().cpu().numpy(), count)
            for row, frame, state in zip(self._environments, frames, states, strict=True)
        ]
        shortest = min(len(x) for x in actions)
        return torch.stack([torch.from_numpy(x[:shortest]) for x in actions]).to(states.device, torch.float32)

    def _parse_batch(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        cameras = [key.removeprefix(IMAGE_PREFIX) for key in batch if key.startswith(IMAGE_PREFIX)]
        image_key = self._image_key if self._image_key is not None or len(cameras) != 1 else cameras[0]
        if image_key not in cameras:
            raise InputError(
                f"which camera does the planner continue? pass image_key=; {did_you_mean(image_key or '', cameras)}"
            )
        if STATE not in batch:
            raise InputError(f"the batch has no {STATE}: the decoder needs the joint positions")
        frames, states = batch[IMAGE_PREFIX + image_key], batch[STATE]
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

    def next_actions(self, planner: Planner, frame: Tensor, q: np.ndarray, count: int | None) -> np.ndarray:
        """(M, n) the next `count` commands; all of a newly generated video if None."""
        if count is None or not self._remaining:
            self._remaining = self._plan_chunk(planner, frame, q)
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
