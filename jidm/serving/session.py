"""One client's conversation: messages in openpi's and in LingBot-VA's dialect, turned into calls of a decoder."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jidm.control import ActionDecoder, Commands
from jidm.errors import InputError, did_you_mean
from jidm.serving.handshake import Handshake

_STATE_KEYS = ("q", "observation/state", "observation.state", "state")
_MAX_FRAMES = 64  # frames in one request
_ENDPOINTS = ("infer", "observe", "reset")


class Session:
    """State of one client: a decoder of its own, and where its robot began.

    Args:
        decoder: used by nobody else.
        contract: how messages are read.
    """

    def __init__(self, decoder: ActionDecoder, handshake: Handshake) -> None:
        self.decoder, self.handshake = decoder, handshake
        self._q0: NDArray[np.float64] | None = None
        self._awaiting_first_frame = True
        self._last_ms: float | None = None

    @property
    def metadata(self) -> dict[str, Any]:
        """What the client is told first."""
        return self.handshake.metadata(self.decoder)

    def handle(self, message: Any) -> dict[str, Any]:
        """The answer to one message.

        `{"endpoint": "reset", "q": ...}` or LingBot-VA's `{"reset": True}`: begin anew, `{}`.
        `{"endpoint": "observe", "q": ..., "time": ...}`: what the robot measured, `{"furthest": [...]}`.
        `{"obs": ..., "compute_kv_cache": True}`: frames the robot has seen; what comes next is dreamt from the last, `{}`.
        `{"obs": ...}`: frames as LingBot-VA's client sends them, `{"action": (channels, frames, actions a frame)}`.
        Anything else is an observation as openpi's client sends it: a picture, or several, under the view's name, perhaps
        a state; `{"actions": (commands, joints), "position": ..., "held": ..., "reason": ..., "server_timing": ...}`.

        Raises:
            InputError: the message cannot be understood.
        """
        if not isinstance(message, Mapping):
            raise InputError("a request is a map of names to values")
        began = time.perf_counter()
        answer = self._handle(message)
        taken = (time.perf_counter() - began) * 1000
        if "actions" in answer:
            answer["server_timing"] = {"infer_ms": taken}
            if self._last_ms is not None:
                answer["server_timing"]["prev_total_ms"] = self._last_ms
        self._last_ms = taken
        return answer

    def _handle(self, message: Mapping[str, Any]) -> dict[str, Any]:
        endpoint = message.get("endpoint", "reset" if message.get("reset") is True else "infer")
        if endpoint not in _ENDPOINTS:
            raise InputError(f"no endpoint '{str(endpoint)[:40]}': {did_you_mean(str(endpoint)[:40], _ENDPOINTS)}")
        if endpoint == "reset":
            self._reset(_state(message))
            return {}
        if endpoint == "observe":
            q, when = _state(message), message.get("time")
            if q is None:
                raise InputError("observe needs q, the joint positions that the robot measured")
            if when is not None and not isinstance(when, (int, float, np.number)):
                raise InputError("time must be a number of seconds")
            return {"furthest": np.array([self.decoder.observe(q, time=None if when is None else float(when))])}
        if "obs" not in message:
            return self._handle_openpi(message)
        return (
            self._handle_observed_frames(message)
            if message.get("compute_kv_cache") is True
            else self._handle_lingbot(message)
        )

    # ---- openpi -----------------------------------------------------------------------------------------------------

    def _handle_openpi(self, message: Mapping[str, Any]) -> dict[str, Any]:
        frames = self._frames([message])
        commands, _ = self._commands(frames, _state(message), message.get("q"))
        if not len(commands):  # its chunk broker takes the first of the actions unasked
            reason = commands.reason or "the first frame only shows where the robot is"
            commands = self.decoder.hold(self._commands_per_frame, reason)
        return {
            "actions": commands.action, "position": commands.position, "time": commands.time, "held": commands.holding,
            "behind": commands.tracking_error, "gripper": commands.gripper, "reason": commands.reason,
        }  # fmt: skip

    # ---- LingBot-VA -------------------------------------------------------------------------------------------------

    def _handle_lingbot(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Frames of the first request begin with the one that shows the robot as it is: no time passes until it."""
        lingbot, channels = self.handshake.lingbot_format(
            self.decoder, _optional_string(message, "layout"), _optional_string(message, "side")
        )
        commands_per_frame = self.decoder.control_rate / self.decoder.video_rate
        if abs(commands_per_frame - round(commands_per_frame)) > 1e-9 or self.decoder.chunk != 1:
            raise InputError(
                f"{commands_per_frame:g} actions a frame and chunks of {self.decoder.chunk}: LingBot's answers are frames of equally many "
                "actions; serve with a control rate that is a multiple of the video's, and a chunk of 1"
            )
        frames = self._frames(_observations(message["obs"]))
        commands, num_initial = self._commands(frames, _state(message), message.get("q"))
        assert self._q0 is not None
        position = np.concatenate(
            [np.repeat(self._q0[None], num_initial * round(commands_per_frame), 0), commands.position]
        )
        numbers = lingbot.pack(position, q0=self._q0)[:, channels]
        action = numbers.reshape(-1, round(commands_per_frame), len(channels)).transpose(2, 0, 1)
        return {"action": np.ascontiguousarray(action), "held": commands.holding, "reason": commands.reason}

    def _handle_observed_frames(self, message: Mapping[str, Any]) -> dict[str, Any]:
        frames = self._frames(_observations(message["obs"]))
        q = message.get("q")
        self.decoder.start_video(None if q is None else _float_array(q, "q"))
        self.decoder.push(frames[-1], layout="HWC")
        return {}

    # ---- both -------------------------------------------------------------------------------------------------------

    @property
    def _commands_per_frame(self) -> int:
        return math.ceil(self.decoder.control_rate / self.decoder.video_rate)

    def _reset(self, q: NDArray[np.float64] | None) -> None:
        self.decoder.reset(q)
        self._q0, self._awaiting_first_frame = q, True

    def _commands(
        self, frames: Sequence[NDArray[Any]], state: NDArray[np.float64] | None, q: Any
    ) -> tuple[Commands, int]:
        """What leads to these frames, and how many of them only show where the robot is (0 or 1)."""
        if self._awaiting_first_frame and state is not None:
            self.decoder.reset(state)
        measured = None if q is None or self._awaiting_first_frame else _float_array(q, "q")
        commands = self.decoder.push(np.stack(frames), q=measured, layout="THWC")
        if self.decoder.position is None:
            raise InputError(commands.reason or "the first frame does not show where the robot is")
        num_initial = int(self._awaiting_first_frame)
        if self._awaiting_first_frame:
            self._q0 = state if state is not None else self.decoder.position - commands.delta.sum(0)
            self._awaiting_first_frame = False
        return commands, num_initial

    def _frames(self, observations: Sequence[Mapping[str, Any]]) -> list[NDArray[Any]]:
        """(H, W, 3) each: the view of every observation, which may hold several frames itself.

        Raises:
            InputError: there is no such view, several and none is named, or the pictures differ in size.
        """
        frames: list[NDArray[Any]] = []
        for observation in observations:
            image = self._image(observation)
            frames += [image] if image.ndim == 3 else list(image)
        if not 0 < len(frames) <= _MAX_FRAMES:
            raise InputError(f"a request holds 1 to {_MAX_FRAMES} frames, this one {len(frames)}")
        if len({frame.shape for frame in frames}) != 1:
            raise InputError("the frames of a request differ in size")
        return frames

    def _image(self, observation: Mapping[str, Any]) -> NDArray[Any]:
        images = {
            str(name): value
            for name, value in observation.items()
            if isinstance(value, np.ndarray) and value.ndim in (3, 4) and value.shape[-1] == 3 and value.size
        }
        image_key = self.handshake.image_key if self.handshake.image_key is not None else next(iter(images), "")
        if image_key not in images or (self.handshake.image_key is None and len(images) > 1):
            what = "name the view by which it is served" if images else "no picture of shape (H, W, 3) or (T, H, W, 3)"
            raise InputError(f"{what}; pictures in the request: {', '.join(sorted(images)) or 'none'}")
        return images[image_key]


def _observations(obs: Any) -> list[Mapping[str, Any]]:
    observations = [obs] if isinstance(obs, Mapping) else obs
    if not isinstance(observations, list) or not observations or not all(isinstance(x, Mapping) for x in observations):
        raise InputError("obs must be an observation or a list of them, each a map of names to pictures")
    return observations


def _state(message: Mapping[str, Any]) -> NDArray[np.float64] | None:
    """Joint positions of the robot, under any of the names in use."""
    for name in _STATE_KEYS:
        if message.get(name) is not None:
            return _float_array(message[name], name)
    return None


def _float_array(value: Any, name: str) -> NDArray[np.float64]:
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{name} must be numbers") from None


def _optional_string(message: Mapping[str, Any], name: str) -> str | None:
    value = message.get(name)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{name} must be a word")
    return value
