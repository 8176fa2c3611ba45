"""State of one client: messages of openpi's, LingBot-VA's and VERA's, translated into calls of an action decoder."""

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
from jidm.serving.vera_format import VERA_UNNEEDED, WINDOW_KEYS, num_repeated, picture_digest, separate_views

_MAX_FRAMES = 64  # frames in one request
_MAX_MESSAGE = 300  # characters of a refusal
_ENDPOINTS = ("infer", "observe", "reset", "configure", "reload")
_REQUEST_KEYS = ("endpoint", "reset", "session_id", "execute_horizon", *VERA_UNNEEDED)
# LingBot-VA's client sends these around its observations; `state` holds the actions that were executed.
_LINGBOT_KEYS = (
    *_REQUEST_KEYS, "obs", "compute_kv_cache", "layout", "side", "imagine", "save_visualization", "video_guidance_scale",
    "action_guidance_scale",
)  # fmt: skip
_HORIZON_SETTINGS = ("n_action_steps", "action_horizon")  # VERA's name, and that of the handshake


class Session:
    """The session of one client, with its own decoder and initial pose.

    Args:
        decoder: not shared with other sessions.
        handshake: how messages are interpreted.
        q0: (n,) initial pose of an episode whose client sends none [rad or m].
    """

    def __init__(self, decoder: ActionDecoder, handshake: Handshake, *, q0: NDArray[np.float64] | None = None) -> None:
        self.decoder, self.handshake, self._default_q0 = decoder, handshake, q0
        self._horizon: int | None = None  # as the client has set it
        self._session_id: str | None = None
        self._last_ms: float | None = None
        self.reset()

    @property
    def metadata(self) -> dict[str, Any]:
        """The first message to the client."""
        return self.handshake.metadata(self.decoder)

    def reset(self, q: NDArray[np.float64] | None = None) -> None:
        """Start a new episode, with the robot at joint positions q (n,) [rad or m] if they are known."""
        start = self._default_q0 if q is None else q
        self.decoder.reset(start)
        self._q0, self._awaiting_first_frame = start, True
        self._first_picture: bytes | None = None  # of LingBot-VA's client, which sends it again and again
        self._window: list[bytes] = []  # the last window of pictures from VERA's client

    def cancel(self) -> None:
        """Stop the request under way in another thread before its next frame: `handle` raises `Cancelled`."""
        self.decoder.cancel()

    def handle(self, message: Any) -> dict[str, Any]:
        """Answer one message.

        `{"endpoint": "reset", "q": ...}` or LingBot-VA's `{"reset": True}`: start a new episode; the answer is `{}`.
        `{"endpoint": "observe", "q": ..., "time": ...}`: measured joint positions; `{"tracking_error": [...]}`. VERA's client
        sends pictures, too; they are not needed.
        `{"endpoint": "configure", "n_action_steps": ...}`: the number of actions per answer; `{"applied": {...}}`.
        `{"endpoint": "reload", ...}`: a new episode and the handshake again; what the server does not serve is refused.
        `{"obs": ..., "compute_kv_cache": True}`: real frames; the next generated video starts at the last of them; `{}`.
        `{"obs": ...}`: frames from LingBot-VA's client; `{"action": (channels, frames, actions per frame)}`.
        Any other map is an observation from openpi's client or VERA's: one or several frames under the image key, and
        optionally a state; `{"actions": (commands, joints), "action": the same, "position": ..., "holding": ...,
        "reason": ..., "server_timing": ...}`. Every array in it begins with the axis of time, and all have one length.

        Raises:
            InputError: the message is not one of these; one line of bounded length.
        """
        if not isinstance(message, Mapping) or not all(isinstance(key, str) for key in message):
            raise InputError("a request must be a map of names to values")
        start = time.perf_counter()
        try:
            answer = self._handle(message)
        except InputError as error:
            raise InputError(_one_line(str(error))) from None
        duration_ms = (time.perf_counter() - start) * 1000
        if "actions" in answer:
            previous = {} if self._last_ms is None else {"prev_total_ms": self._last_ms}
            answer["server_timing"] = {"infer_ms": duration_ms, **previous}
        self._last_ms = duration_ms
        return answer

    def _handle(self, message: Mapping[str, Any]) -> dict[str, Any]:
        endpoint = message.get("endpoint", "reset" if _flag(message, "reset") else "infer")
        if not isinstance(endpoint, str):
            raise InputError(
                f"endpoint must be one of the names {', '.join(_ENDPOINTS)}, not {type(endpoint).__name__}"
            )
        if endpoint not in _ENDPOINTS:
            raise InputError(f"no endpoint '{endpoint[:40]}': {did_you_mean(endpoint[:40], _ENDPOINTS)}")
        if endpoint == "configure":
            return self._configure(message)
        if endpoint == "reload":
            return self._reload(message)
        if endpoint == "observe":
            return self._observe(message)
        session_id = _optional_string(message, "session_id")
        if endpoint == "reset":
            start = self._read(message, _LINGBOT_KEYS)
            self.reset(start.state if start.q is None else start.q)
            self._session_id = session_id
            return {}
        if session_id is not None and self._session_id not in (None, session_id):  # as VERA's server does
            self.reset()
        self._session_id = self._session_id if session_id is None else session_id
        if "obs" not in message:
            return self._handle_observation(message)
        if _flag(message, "compute_kv_cache"):
            return self._handle_real_frames(message)
        return self._handle_lingbot(message)

    def _observe(self, message: Mapping[str, Any]) -> dict[str, Any]:
        observation = self._read(separate_views(message), (*_REQUEST_KEYS, "time"))
        q, at = observation.state if observation.q is None else observation.q, message.get("time")
        if q is None and not observation.images:
            raise InputError("observe needs q, the measured joint positions")
        if at is not None and (isinstance(at, bool) or not isinstance(at, (int, float, np.number))):
            raise InputError("time must be a number of seconds")
        answer: dict[str, Any] = {"ok": True, "retro_rendered": False} if observation.images else {}
        if q is not None:
            error = self.decoder.trajectory.observe(q, time=None if at is None else float(at))
            answer["tracking_error"] = np.array([error])
        return answer

    def _configure(self, message: Mapping[str, Any]) -> dict[str, Any]:
        wanted = {key: value for key, value in message.items() if key not in ("endpoint", "session_id")}
        for key, value in wanted.items():
            if key not in _HORIZON_SETTINGS:
                raise InputError(f"configure: clients set {' or '.join(_HORIZON_SETTINGS)}, not '{key[:60]}'")
            wanted[key] = self.handshake.horizon(self.decoder, _count(value, key))
        self._horizon = next(iter(wanted.values()), self._horizon)
        return {"applied": wanted}

    def _reload(self, message: Mapping[str, Any]) -> dict[str, Any]:
        metadata = self.metadata
        for key, value in message.items():
            if key not in ("endpoint", "session_id") and (isinstance(value, np.ndarray) or value != metadata.get(key)):
                raise InputError(
                    f"reload: this server serves only what it was started with, another '{key[:60]}' needs another server"
                )
        self.reset()
        return metadata

    # ---- openpi and VERA --------------------------------------------------------------------------------------------

    def _handle_observation(self, message: Mapping[str, Any]) -> dict[str, Any]:
        requested = message.get("execute_horizon")
        requested = self._horizon if requested is None else _count(requested, "execute_horizon")
        horizon = self.handshake.horizon(self.decoder, requested)
        observation = self._read(separate_views(message), _REQUEST_KEYS)
        frames = self._frames([observation])
        window = [picture_digest(frame) for frame in frames] if any(key in message for key in WINDOW_KEYS) else []
        new = frames[num_repeated(self._window, window) :]
        # A window without a picture of the previous one is a video of its own; its first picture shows the robot now.
        another_video = bool(window) and len(new) == len(frames) > 1 and not self._awaiting_first_frame
        config = self.decoder.config
        num_actions = (
            (len(new) - (another_video or self._awaiting_first_frame)) * config.control_rate / config.video_rate
        )
        if horizon is not None and num_actions > horizon + 1e-9:
            raise InputError(
                f"{len(new)} new frames give {math.ceil(num_actions)} actions, answers hold {horizon}: send fewer frames, or "
                "raise the action horizon"
            )
        if another_video:
            start = observation.state if observation.state is not None else self.decoder.trajectory.position
            self.decoder.start_video(start)
        commands = (
            self._commands([observation], new)[0] if new else self.decoder.trajectory.hold(0, "no new picture came")
        )
        self._window = window or self._window
        filler = commands.reason or "the first frame only shows the initial pose"
        filler = "the frames give fewer actions than an answer holds" if len(commands) else filler
        # openpi's chunk broker needs at least one action, and as many as it was told
        count = horizon or len(commands) or math.ceil(config.control_rate / config.video_rate)
        held = self.decoder.trajectory.hold(count - len(commands), filler)
        parts = [part for part in (commands, held) if len(part)]
        answer: dict[str, Any] = {
            name: np.concatenate([getattr(part, attribute) for part in parts])
            for name, attribute in (
                ("actions", "action"), ("position", "position"), ("time", "time"), ("holding", "holding"),
                ("tracking_error", "tracking_error"), ("gripper", "gripper"),
            )
        }  # fmt: skip
        reasons = dict.fromkeys(part.reason for part in parts if part.reason)
        return {**answer, "action": answer["actions"], "reason": "; ".join(reasons)}

    # ---- LingBot-VA -------------------------------------------------------------------------------------------------

    def _handle_lingbot(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The first frame of the first request shows the initial pose: no time passes before it."""
        layout, side = _optional_string(message, "layout"), _optional_string(message, "side")
        lingbot = self.handshake.lingbot_format(self.decoder, layout, side)
        chunk = self.decoder.config.chunk
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
        frames = self._frames(observations)
        picture = picture_digest(frames[0])
        if len(frames) == 1 and picture == self._first_picture:
            # LingBot-VA's client asks for every chunk with the episode's first observation.
            commands, num_initial = self.decoder.trajectory.hold(commands_per_frame, "the first observation again"), 0
        else:
            commands, num_initial = self._commands(observations, frames)
        self._first_picture = self._first_picture or picture
        assert self._q0 is not None
        initial = np.repeat(self._q0[None], num_initial * commands_per_frame, 0)
        positions = np.concatenate([initial, commands.position])
        numbers = lingbot.select(positions, self.handshake.lingbot_channels, q0=self._q0)
        action = numbers.reshape(-1, commands_per_frame, numbers.shape[-1]).transpose(2, 0, 1)
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
        actions = ("state",) if _flag(message, "compute_kv_cache") else ()  # what was executed, in this message
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
        return read_observation(
            message, self.decoder.idm.joint_names, columns, ranges, known=known,
            normalized_grippers=self.handshake.normalized_grippers,
        )  # fmt: skip

    def _commands(self, observations: Sequence[Observation], frames: Sequence[NDArray[Any]]) -> tuple[Commands, int]:
        """Commands that lead to these frames of the observations, and how many of the frames only show the initial pose (0 or 1).

        The first frame shows the robot's pose. Later, a state is where the robot is now, compared with its last command; `q`
        is the pose in the last frame.
        """
        first, last = observations[0], observations[-1]
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


def _one_line(text: str) -> str:
    """The text in one printable line of bounded length: it may repeat what a client sent."""
    line = " ".join("".join(x if x.isprintable() or x.isspace() else "?" for x in text).split())
    return line if len(line) <= _MAX_MESSAGE else f"{line[: _MAX_MESSAGE - 3]}..."


def _flag(message: Mapping[str, Any], name: str) -> bool:
    value = message.get(name, False)
    if value is not None and not isinstance(value, (bool, np.bool_)):
        raise InputError(f"{name} must be true or false")
    return bool(value)


def _count(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise InputError(f"{name} must be a number of actions, at least 1")
    return int(value)


def _optional_string(message: Mapping[str, Any], name: str) -> str | None:
    value = message.get(name)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{name} must be a string")
    return value
