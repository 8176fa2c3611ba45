"""State of one client: openpi's and LingBot-VA's messages, translated into calls of an action decoder."""

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
    """The session of one client, with its own decoder and initial pose.

    Args:
        decoder: not shared with other sessions.
        handshake: how messages are interpreted.
    """

    def __init__(self, decoder: ActionDecoder, handshake: Handshake) -> None:
        self.decoder, self.handshake = decoder, handshake
        self._q0: NDArray[np.float64] | None = None
        self._awaiting_first_frame = True
        self._last_ms: float | None = None

    @property
    def metadata(self) -> dict[str, Any]:
        """The first message to the client."""
        return self.handshake.metadata(self.decoder)

    def reset(self, q: NDArray[np.float64] | None = None) -> None:
        """Start a new episode, with the robot at joint positions q (n,) [rad or m] if they are known."""
        self.decoder.reset(q)
        self._q0, self._awaiting_first_frame = q, True

    def handle(self, message: Any) -> dict[str, Any]:
        """Answer one message.

        `{"endpoint": "reset", "q": ...}` or LingBot-VA's `{"reset": True}`: start a new episode; the answer is `{}`.
        `{"endpoint": "observe", "q": ..., "time": ...}`: measured joint positions; `{"tracking_error": [...]}`.
        `{"obs": ..., "compute_kv_cache": True}`: real frames; the next generated video starts at the last of them; `{}`.
        `{"obs": ...}`: frames from LingBot-VA's client; `{"action": (channels, frames, actions per frame)}`.
        Any other map is an observation from openpi's client: one or several frames under the image key, and optionally a
        state; `{"actions": (commands, joints), "position": ..., "holding": ..., "reason": ..., "server_timing": ...}`.

        Raises:
            InputError: the message is not one of these.
        """
        if not isinstance(message, Mapping):
            raise InputError("a request must be a map of names to values")
        start = time.perf_counter()
        answer = self._handle(message)
        duration_ms = (time.perf_counter() - start) * 1000
        if "actions" in answer:
            previous = {} if self._last_ms is None else {"prev_total_ms": self._last_ms}
            answer["server_timing"] = {"infer_ms": duration_ms, **previous}
        self._last_ms = duration_ms
        return answer

    def _handle(self, message: Mapping[str, Any]) -> dict[str, Any]:
        endpoint = message.get("endpoint", "reset" if message.get("reset") is True else "infer")
        if endpoint not in _ENDPOINTS:
            raise InputError(f"no endpoint '{str(endpoint)[:40]}': {did_you_mean(str(endpoint)[:40], _ENDPOINTS)}")
        if endpoint == "reset":
            self.reset(_state(message))
            return {}
        if endpoint == "observe":
            q, at = _state(message), message.get("time")
            if q is None:
                raise InputError("observe needs q, the measured joint positions")
            if at is not None and not isinstance(at, (int, float, np.number)):
                raise InputError("time must be a number of seconds")
            error = self.decoder.trajectory.observe(q, time=None if at is None else float(at))
            return {"tracking_error": np.array([error])}
        if "obs" not in message:
            return self._handle_openpi(message)
        if message.get("compute_kv_cache") is True:
            return self._handle_real_frames(message)
        return self._handle_lingbot(message)

    # ---- openpi -----------------------------------------------------------------------------------------------------

    def _handle_openpi(self, message: Mapping[str, Any]) -> dict[str, Any]:
        frames = self._frames([message])
        commands, _ = self._commands(frames, _state(message), message.get("q"))
        if not len(commands):  # openpi's chunk broker needs at least one action
            reason = commands.reason or "the first frame only shows the initial pose"
            per_frame = math.ceil(self.decoder.config.control_rate / self.decoder.config.video_rate)
            commands = self.decoder.trajectory.hold(per_frame, reason)
        return {
            "actions": commands.action, "position": commands.position, "time": commands.time, "holding": commands.holding,
            "tracking_error": commands.tracking_error, "gripper": commands.gripper, "reason": commands.reason,
        }  # fmt: skip

    # ---- LingBot-VA -------------------------------------------------------------------------------------------------

    def _handle_lingbot(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The first frame of the first request shows the initial pose: no time passes before it."""
        layout, side = _optional_string(message, "layout"), _optional_string(message, "side")
        lingbot = self.handshake.lingbot_format(self.decoder, layout, side)
        channels, chunk = list(lingbot.end_effector_channels), self.decoder.config.chunk
        ratio = self.decoder.config.control_rate / self.decoder.config.video_rate
        commands_per_frame = round(ratio)
        if abs(ratio - commands_per_frame) > 1e-9 or chunk != 1:
            raise InputError(
                f"{ratio:g} actions per frame and chunks of {chunk}: LingBot's answers have equally many actions per "
                "frame; serve with a control rate that is a multiple of the video's, and a chunk of 1"
            )
        frames = self._frames(_observations(message["obs"]))
        commands, num_initial = self._commands(frames, _state(message), message.get("q"))
        assert self._q0 is not None
        initial = np.repeat(self._q0[None], num_initial * commands_per_frame, 0)
        numbers = lingbot.pack(np.concatenate([initial, commands.position]), q0=self._q0)[:, channels]
        action = numbers.reshape(-1, commands_per_frame, len(channels)).transpose(2, 0, 1)
        return {"action": np.ascontiguousarray(action), "holding": commands.holding, "reason": commands.reason}

    def _handle_real_frames(self, message: Mapping[str, Any]) -> dict[str, Any]:
        frames = self._frames(_observations(message["obs"]))
        q = message.get("q")
        self.decoder.start_video(None if q is None else _float_array(q, "q"))
        self.decoder.push(frames[-1], layout="HWC")
        return {}

    # ---- both -------------------------------------------------------------------------------------------------------

    def _commands(
        self, frames: Sequence[NDArray[Any]], state: NDArray[np.float64] | None, q: Any
    ) -> tuple[Commands, int]:
        """Commands that lead to these frames, and how many of the frames only show the initial pose (0 or 1)."""
        if self._awaiting_first_frame and state is not None:
            self.decoder.reset(state)
        measured = None if q is None or self._awaiting_first_frame else _float_array(q, "q")
        commands = self.decoder.push(np.stack(frames), q=measured, layout="THWC")
        if self.decoder.trajectory.position is None:
            raise InputError(commands.reason or "the first frame does not show the robot's pose")
        if not self._awaiting_first_frame:
            return commands, 0
        self._awaiting_first_frame = False
        self._q0 = state if state is not None else self.decoder.trajectory.position - commands.delta.sum(0)
        return commands, 1

    def _frames(self, observations: Sequence[Mapping[str, Any]]) -> list[NDArray[Any]]:
        """The frames (H, W, 3) of all observations; each observation may hold several.

        Raises:
            InputError: an image is missing or ambiguous, or the frames differ in size.
        """
        frames: list[NDArray[Any]] = []
        for observation in observations:
            image = self._image(observation)
            frames += [image] if image.ndim == 3 else list(image)
        if not 0 < len(frames) <= _MAX_FRAMES:
            raise InputError(f"a request must hold 1 to {_MAX_FRAMES} frames, this one holds {len(frames)}")
        if len({frame.shape for frame in frames}) != 1:
            raise InputError("the frames of a request differ in size")
        return frames

    def _image(self, observation: Mapping[str, Any]) -> NDArray[Any]:
        images = {
            str(name): value
            for name, value in observation.items()
            if isinstance(value, np.ndarray) and value.ndim in (3, 4) and value.shape[-1] == 3 and value.size
        }
        key = self.handshake.image_key
        if key is None and len(images) == 1:
            return next(iter(images.values()))
        if key is None or key not in images:
            problem = "serve with an image key" if key is None else f"no image '{key}'"
            problem = problem if images else "no image of shape (H, W, 3) or (T, H, W, 3)"
            raise InputError(f"{problem}; images in the request: {', '.join(sorted(images)) or 'none'}")
        return images[key]


def _observations(obs: Any) -> list[Mapping[str, Any]]:
    observations = [obs] if isinstance(obs, Mapping) else obs
    if not isinstance(observations, list) or not observations or not all(isinstance(x, Mapping) for x in observations):
        raise InputError("obs must be an observation or a list of them, each a map of names to images")
    return observations


def _state(message: Mapping[str, Any]) -> NDArray[np.float64] | None:
    """Joint positions of the robot, under any of the known keys."""
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
        raise InputError(f"{name} must be a string")
    return value
