"""One client's conversation: messages in openpi's and in LingBot-VA's dialect, turned into calls of a decoder."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jidm.adapters.decoder import ActionDecoder, Commands
from jidm.adapters.server.contract import Contract
from jidm.errors import InputError, did_you_mean

_STATES = ("q", "observation/state", "observation.state", "state")
_LONGEST = 64  # frames in one request
_ENDPOINTS = ("infer", "observe", "reset")


class Session:
    """State of one client: a decoder of its own, and where its robot began.

    Args:
        decoder: used by nobody else.
        contract: how messages are read.
    """

    def __init__(self, decoder: ActionDecoder, contract: Contract) -> None:
        self.decoder, self.contract = decoder, contract
        self._first: NDArray[np.float64] | None = None
        self._fresh = True
        self._last_ms: float | None = None

    @property
    def metadata(self) -> dict[str, Any]:
        """What the client is told first."""
        return self.contract.metadata(self.decoder)

    def answer(self, message: Any) -> dict[str, Any]:
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
        answer = self._answer(message)
        taken = (time.perf_counter() - began) * 1000
        if "actions" in answer:
            answer["server_timing"] = {"infer_ms": taken}
            if self._last_ms is not None:
                answer["server_timing"]["prev_total_ms"] = self._last_ms
        self._last_ms = taken
        return answer

    def _answer(self, message: Mapping[str, Any]) -> dict[str, Any]:
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
            return self._openpi(message)
        return self._seen(message) if message.get("compute_kv_cache") is True else self._lingbot(message)

    # ---- openpi -----------------------------------------------------------------------------------------------------

    def _openpi(self, message: Mapping[str, Any]) -> dict[str, Any]:
        frames = self._frames([message])
        commands, _ = self._commands(frames, _state(message), message.get("q"))
        if not len(commands):  # its chunk broker takes the first of the actions unasked
            why = commands.reason or "the first frame only shows where the robot is"
            commands = self.decoder.coast(self._per_frame, why)
        return {
            "actions": commands.action, "position": commands.position, "time": commands.time, "held": commands.held,
            "behind": commands.behind, "gripper": commands.gripper, "reason": commands.reason,
        }  # fmt: skip

    # ---- LingBot-VA -------------------------------------------------------------------------------------------------

    def _lingbot(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Frames of the first request begin with the one that shows the robot as it is: no time passes until it."""
        universal, channels = self.contract.format(self.decoder, _word(message, "layout"), _word(message, "side"))
        each = self.decoder.control_rate / self.decoder.video_rate
        if abs(each - round(each)) > 1e-9 or self.decoder.chunk != 1:
            raise InputError(
                f"{each:g} actions a frame and chunks of {self.decoder.chunk}: LingBot's answers are frames of equally many "
                "actions; serve with a control rate that is a multiple of the video's, and a chunk of 1"
            )
        frames = self._frames(_observations(message["obs"]))
        commands, shown = self._commands(frames, _state(message), message.get("q"))
        assert self._first is not None
        position = np.concatenate([np.repeat(self._first[None], shown * round(each), 0), commands.position])
        numbers = universal.pack(position, first=self._first)[:, channels]
        action = numbers.reshape(-1, round(each), len(channels)).transpose(2, 0, 1)
        return {"action": np.ascontiguousarray(action), "held": commands.held, "reason": commands.reason}

    def _seen(self, message: Mapping[str, Any]) -> dict[str, Any]:
        frames = self._frames(_observations(message["obs"]))
        q = message.get("q")
        self.decoder.begin(None if q is None else _numbers(q, "q"))
        self.decoder.push(frames[-1], layout="HWC")
        return {}

    # ---- both -------------------------------------------------------------------------------------------------------

    @property
    def _per_frame(self) -> int:
        return math.ceil(self.decoder.control_rate / self.decoder.video_rate)

    def _reset(self, q: NDArray[np.float64] | None) -> None:
        self.decoder.reset(q)
        self._first, self._fresh = q, True

    def _commands(
        self, frames: Sequence[NDArray[Any]], state: NDArray[np.float64] | None, q: Any
    ) -> tuple[Commands, int]:
        """What leads to these frames, and how many of them only show where the robot is (0 or 1)."""
        if self._fresh and state is not None:
            self.decoder.reset(state)
        measured = None if q is None or self._fresh else _numbers(q, "q")
        commands = self.decoder.push(np.stack(frames), q=measured, layout="THWC")
        if self.decoder.position is None:
            raise InputError(commands.reason or "the first frame does not show where the robot is")
        shown = int(self._fresh)
        if self._fresh:
            self._first = state if state is not None else self.decoder.position - commands.delta.sum(0)
            self._fresh = False
        return commands, shown

    def _frames(self, observations: Sequence[Mapping[str, Any]]) -> list[NDArray[Any]]:
        """(H, W, 3) each: the view of every observation, which may hold several frames itself.

        Raises:
            InputError: there is no such view, several and none is named, or the pictures differ in size.
        """
        frames: list[NDArray[Any]] = []
        for observation in observations:
            picture = self._picture(observation)
            frames += [picture] if picture.ndim == 3 else list(picture)
        if not 0 < len(frames) <= _LONGEST:
            raise InputError(f"a request holds 1 to {_LONGEST} frames, this one {len(frames)}")
        if len({frame.shape for frame in frames}) != 1:
            raise InputError("the frames of a request differ in size")
        return frames

    def _picture(self, observation: Mapping[str, Any]) -> NDArray[Any]:
        pictures = {
            str(name): value
            for name, value in observation.items()
            if isinstance(value, np.ndarray) and value.ndim in (3, 4) and value.shape[-1] == 3 and value.size
        }
        view = self.contract.view if self.contract.view is not None else next(iter(pictures), "")
        if view not in pictures or (self.contract.view is None and len(pictures) > 1):
            what = (
                "name the view by which it is served" if pictures else "no picture of shape (H, W, 3) or (T, H, W, 3)"
            )
            raise InputError(f"{what}; pictures in the request: {', '.join(sorted(pictures)) or 'none'}")
        return pictures[view]


def _observations(obs: Any) -> list[Mapping[str, Any]]:
    listed = [obs] if isinstance(obs, Mapping) else obs
    if not isinstance(listed, list) or not listed or not all(isinstance(x, Mapping) for x in listed):
        raise InputError("obs must be an observation or a list of them, each a map of names to pictures")
    return listed


def _state(message: Mapping[str, Any]) -> NDArray[np.float64] | None:
    """Joint positions of the robot, under any of the names in use."""
    for name in _STATES:
        if message.get(name) is not None:
            return _numbers(message[name], name)
    return None


def _numbers(value: Any, name: str) -> NDArray[np.float64]:
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{name} must be numbers") from None


def _word(message: Mapping[str, Any], name: str) -> str | None:
    value = message.get(name)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{name} must be a word")
    return value
