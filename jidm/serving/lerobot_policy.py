"""A planner and a decoder as LeRobot's evaluation and recording loops call a policy (`lerobot.policies.PreTrainedPolicy`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jidm.control import ActionDecoder, Commands, Planner
from jidm.errors import InputError, did_you_mean

_IMAGES, _STATE = "observation.images.", "observation.state"


class PlannerPolicy:
    """Dreams a chunk from the latest frame, gives its commands one by one, and dreams again.

    Args:
        planner: from a frame (3, H, W) in [0, 1] to the frames that follow it.
        decoder: makes the decoder of one robot; called once for each of a batch of environments.
        camera: which picture of the batch is dreamt on; may be left out where there is only one.
    """

    name = "jidm"

    def __init__(
        self, planner: Planner, make_decoder: Callable[[], ActionDecoder], *, image_key: str | None = None
    ) -> None:
        self._planner, self._make_decoder, self._image_key = planner, make_decoder, image_key
        self._environments: list[_Environment] = []

    def reset(self) -> None:
        """Begin an episode."""
        self._environments = []

    def eval(self) -> PlannerPolicy:
        """Nothing to switch: it does not learn."""
        return self

    def select_action(self, batch: Mapping[str, Any]) -> Float[Tensor, "B n"]:
        """The next command of each environment, in the decoder's action space.

        Args:
            batch: `observation.images.<camera>` (B, 3, H, W) in [0, 1] and `observation.state` (B, n) [rad or m], in the
                order of the field's joints.

        Raises:
            InputError: a picture or the state is missing.
        """
        return self._stack_actions(batch, 1)[:, 0]

    def predict_action_chunk(self, batch: Mapping[str, Any]) -> Float[Tensor, "B M n"]:
        """The commands of a whole dream of each environment."""
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
        cameras = [key.removeprefix(_IMAGES) for key in batch if key.startswith(_IMAGES)]
        image_key = self._image_key if self._image_key is not None or len(cameras) != 1 else cameras[0]
        if image_key not in cameras:
            raise InputError(f"which picture is dreamt on? pass camera=; {did_you_mean(image_key or '', cameras)}")
        if _STATE not in batch:
            raise InputError(f"the batch holds no {_STATE}: the decoder must know where the robot is")
        frames, states = batch[_IMAGES + image_key], batch[_STATE]
        if frames.dim() != 4 or states.dim() != 2 or len(frames) != len(states):
            raise InputError(
                f"pictures must be (B, 3, H, W) and states (B, n), got {tuple(frames.shape)} and {tuple(states.shape)}"
            )
        return frames, states


class _Environment:
    """One environment: its decoder, and the commands of its dream that are still to come."""

    def __init__(self, decoder: ActionDecoder) -> None:
        self._decoder = decoder
        self._remaining: Commands | None = None

    def next_actions(self, planner: Planner, frame: Tensor, q: np.ndarray, count: int | None) -> np.ndarray:
        """(M, n) the next commands; all of a new dream if count is None."""
        if count is None or not self._remaining:
            self._remaining = self._plan_chunk(planner, frame, q)
        commands, self._remaining = (
            self._remaining[:count],
            self._remaining[len(self._remaining) if count is None else count :],
        )
        return commands.action

    def _plan_chunk(self, planner: Planner, frame: Tensor, q: np.ndarray) -> Commands:
        decoder = self._decoder
        if decoder.position is None:
            decoder.reset(q)
        else:
            if decoder.time > 0:
                decoder.observe(q)
            decoder.start_video(q)
        decoder.push(frame, layout="CHW")
        commands = decoder.push(planner(frame))
        return commands if len(commands) else decoder.hold(1, "the planner gave no frames")
