"""State of one client: openpi's and LingBot-VA's messages, translated into calls of an action decoder."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jidm.control import ActionDecoder, Commands
from jidm.errors import InputError, did_you_mean
from jidm.serving.handshake import Handshake
from jidm.serving.observation import Observation, read_observation

_MAX_FRAMES = 64  # frames in one request
_ENDPOINTS = ("infer", "observe", "reset")
_REQUEST_KEYS = ("endpoint", "reset")
# LingBot-VA's client sends these around its observations; `state` holds the actions that were executed.
_LINGBOT_KEYS = (
    *_REQUEST_KEYS, "obs", "compute_kv_cache", "layout", "side", "imagine", "save_visualization", "video_guidance_scale",
    "action_guidance_scale",
)  # fmt: skip


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

    def cancel(self) -> None:
        """Stop the request under way in another thread before its next frame: `handle` raises `Cancelled`."""
        self.decoder.cancel()

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
        if not isinstance(message, Mapping) or not all(isinstance(key, str) for key in message):
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
        if not isinstance(endpoint, str) or endpoint not in _ENDPOINTS:
            raise InputError(f"no endpoint '{str(endpoint)[:40]}': {did_you_mean(str(endpoint)[:40], _ENDPOINTS)}")
        if endpoint == "reset":
            start = self._read(message, _LINGBOT_KEYS)
            self.reset(start.state if start.q is None else start.q)
            return {}
        if endpoint == "observe":
            return self._observe(message)
        if "obs" not in message:
            return self._handle_openpi(message)
        if message.get("compute_kv_cache") is True:
            return self._handle_real_frames(message)
        return self._handle_lingbot(message)

    def _observe(self, message: Mapping[str, Any]) -> dict[str, Any]:
        observation = self._read(message, (*_REQUEST_KEYS, "time"))
        q, at = observation.state if observation.q is None else observation.q, message.get("time")
        if q is None:
            raise InputError("observe needs q, the measured joint positions")
        if at is not None and (isinstance(at, bool) or not isinstance(at, (int, float, np.number))):
            raise InputError("time must be a number of seconds")
        error = self.decoder.trajectory.observe(q, time=None if at is None else float(at))
        return {"tracking_error": np.array([error])}

    # ---- openpi -----------------------------------------------------------------------------------------------------

    def _handle_openpi(self, message: Mapping[str, Any]) -> dict[str, Any]:
        commands, _ = self._commands([self._read(message, _REQUEST_KEYS)])
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
        observations = self._lingbot_observations(message)
        if not observations:
            raise InputError("obs holds no frame")
        commands, num_initial = self._commands(observations)
        assert self._q0 is not None
        initial = np.repeat(self._q0[None], num_initial * commands_per_frame, 0)
        numbers = lingbot.pack(np.concatenate([initial, commands.position]), q0=self._q0)[:, channels]
        action = numbers.reshape(-1, commands_per_frame, len(channels)).transpose(2, 0, 1)
        return {"action": np.ascontiguousarray(action), "holding": commands.holding, "reason": commands.reason}

    def _handle_real_frames(self, message: Mapping[str, Any]) -> dict[str, Any]:
        observations = self._lingbot_observations(message)
        if not observations:
            return {}
        last = observations[-1]
        frames = self._frames(observations)
        self.decoder.start_video(last.q)
        self.decoder.push(frames[-1], layout="HWC")
        return {}

    def _lingbot_observations(self, message: Mapping[str, Any]) -> list[Observation]:
        """The observations of a request. A state inside one is the pose in its frames; one beside them is the robot's now."""
        obs = message["obs"]
        items = [obs] if isinstance(obs, Mapping) else obs
        if not isinstance(items, list) or not all(isinstance(x, Mapping) for x in items):
            raise InputError("obs must be an observation or a list of them, each a map of names to images")
        actions = ("state",) if message.get("compute_kv_cache") is True else ()  # what was executed, in this message
        around = self._read(message, (*_LINGBOT_KEYS, *actions))
        observations = [
            replace(x, q=x.state if x.q is None else x.q, state=None) for x in (self._read(item, ()) for item in items)
        ]
        if observations:
            last = observations[-1]
            observations[-1] = replace(last, q=last.q if around.q is None else around.q, state=around.state)
        return observations

    # ---- both -------------------------------------------------------------------------------------------------------

    def _read(self, message: Mapping[str, Any], known: Sequence[str]) -> Observation:
        limits, columns = self.decoder.limits, self.decoder.gripper_joints
        ranges = np.stack([limits.lower, limits.upper], axis=1)[list(columns)]
        return read_observation(message, self.decoder.idm.joint_names, columns, ranges, known=known)

    def _commands(self, observations: Sequence[Observation]) -> tuple[Commands, int]:
        """Commands that lead to these frames, and how many of the frames only show the initial pose (0 or 1).

        The first frame shows the robot's pose. Later, a state is where the robot is now, compared with its last command; `q`
        is the pose in the last frame.
        """
        frames, first, last = self._frames(observations), observations[0], observations[-1]
        start = next((x for x in (first.q, first.state, last.state) if x is not None), None)
        if not self._awaiting_first_frame:
            if last.state is not None and self.decoder.trajectory.time > 0:
                self.decoder.trajectory.observe(last.state)
        elif start is not None:
            self.decoder.reset(start)
        q = None if self._awaiting_first_frame else last.q
        commands = self.decoder.push(np.stack(frames), q=q, layout="THWC")
        if self.decoder.trajectory.position is None:
            raise InputError(commands.reason or "the first frame does not show the robot's pose")
        if not self._awaiting_first_frame:
            return commands, 0
        self._awaiting_first_frame = False
        self._q0 = start if start is not None else self.decoder.trajectory.position - commands.delta.sum(0)
        return commands, 1

    def _frames(self, observations: Sequence[Observation]) -> list[NDArray[Any]]:
        """The frames (H, W, 3) of all observations; each observation may hold several.

        Raises:
            InputError: an image is missing or ambiguous, or the frames differ in size.
        """
        frames: list[NDArray[Any]] = []
        for observation in observations:
            image = observation.image(self.handshake.image_key)
            frames += [image] if image.ndim == 3 else list(image)
        if not 0 < len(frames) <= _MAX_FRAMES:
            raise InputError(f"a request must hold 1 to {_MAX_FRAMES} frames, this one holds {len(frames)}")
        if len({frame.shape for frame in frames}) != 1:
            raise InputError("the frames of a request differ in size")
        return frames


def _optional_string(message: Mapping[str, Any], name: str) -> str | None:
    value = message.get(name)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{name} must be a string")
    return value
