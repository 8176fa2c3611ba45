"""The handshake: the first message to every client describes the server's inputs and outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jidm.errors import InputError, did_you_mean
from jidm.serving.lingbot_format import CHANNEL_SETS, LingBotFormat

if TYPE_CHECKING:
    from jidm.control import ActionDecoder

PROTOCOL_VERSION = 2
_VERA_PROTOCOL_VERSION = 1
_UNITS = {"joint_velocity": "{}/s", "joint_position": "{}", "joint_delta": "{}"}


@dataclass(frozen=True, eq=False)
class Handshake:
    """How requests are interpreted and answers are encoded.

    Args:
        image_key: name of the image to decode in an observation; may be omitted if there is only one.
        layout: channel order of LingBot's 30 numbers, for its clients; they must state it themselves if not given.
        side: the side that a robot's only arm takes in them.
        lingbot_channels: which of them an answer holds, one of `lingbot_format.CHANNEL_SETS`.
        action_horizon: how many actions each answer holds. If there are more than the frames give, the last of them brake;
            if not given, there are as many as the frames give.
        normalized_grippers: whether the grippers of a client's state are from 0 (closed) to 1 (open), as those of RoboTwin
            and ALOHA are, not joint positions.
        vera: whether the first message holds the fields of VERA's server and no others: its controller accepts no others.

    Raises:
        InputError: the channels are unknown, the horizon is none, or VERA's fields lack the name of a view.
    """

    image_key: str | None = None
    layout: str | None = None
    side: str | None = None
    lingbot_channels: str = "quaternion"
    action_horizon: int | None = None
    normalized_grippers: bool = False
    vera: bool = False

    def __post_init__(self) -> None:
        if self.lingbot_channels not in CHANNEL_SETS:
            raise InputError(
                f"no channels '{self.lingbot_channels}': {did_you_mean(self.lingbot_channels, CHANNEL_SETS)}"
            )
        if self.action_horizon is not None and self.action_horizon < 1:
            raise InputError(f"action_horizon must be at least 1, got {self.action_horizon}")
        if self.vera and self.image_key is None:
            raise InputError("VERA's controller must be told which view to send: name the image to decode, image_key")

    def horizon(self, decoder: ActionDecoder, requested: int | None = None) -> int | None:
        """How many actions an answer holds, checked; None for as many as its frames give.

        Args:
            decoder: gives the actions.
            requested: by the client; the server's if not given.

        Raises:
            InputError: they are fewer than one frame gives, or chunks of frames are awaited.
        """
        horizon, config = self.action_horizon if requested is None else requested, decoder.config
        if horizon is None:
            return None
        per_frame = math.ceil(config.control_rate / config.video_rate - 1e-9)
        if config.chunk != 1:
            raise InputError(
                f"{horizon} actions per answer need a chunk of 1, not {config.chunk}: send several frames in a request"
            )
        if horizon < per_frame:
            raise InputError(
                f"one frame gives {per_frame} actions ({config.video_rate:g} frames and {config.control_rate:g} commands per "
                f"second), an action horizon of {horizon} would lose some: raise it, or the video rate to "
                f"{config.control_rate / max(1, horizon):g}"
            )
        return horizon

    def metadata(self, decoder: ActionDecoder) -> dict[str, Any]:
        """The handshake of a server with this decoder; plain values only.

        Raises:
            InputError: the action horizon does not fit the rates.
        """
        config = decoder.config
        horizon = self.horizon(decoder) or max(1, math.floor(config.control_rate / config.video_rate + 1e-9))
        common = {
            "action_space": config.action_space,
            "action_dim": decoder.limits.n,
            # Every answer to frames holds at least this many.
            "action_horizon": horizon,
            "control_dt": 1 / config.control_rate,
            "actions_already_metric": True,
            "action_abs_scale": [1.0] * decoder.limits.n,
            "view_keys": [] if self.image_key is None else [self.image_key],
        }
        return {**common, **(self._vera_fields(decoder) if self.vera else self._own_fields(decoder))}

    def _vera_fields(self, decoder: ActionDecoder) -> dict[str, Any]:
        """The other fields of VERA's server, whose grippers are not switched by the sign of a number here."""
        robot = decoder.idm.embodiment
        return {
            "image_resolution": None,
            "view_widths": [],
            "proprio_keys": ["joint_position", "gripper_position"],
            "needs_prompt": False,
            "needs_session_id": False,
            "context_frames": 2,
            "gripper_is_raw": False,
            "gripper_dim_index": -1,
            "embodiment": "" if robot is None else robot.name,
            "planner_model": "",
            "idm_model": _checkpoint_name(decoder) or "",
            "is_causal": False,
            "protocol_version": _VERA_PROTOCOL_VERSION,
        }

    def _own_fields(self, decoder: ActionDecoder) -> dict[str, Any]:
        idm, robot, config = decoder.idm, decoder.idm.embodiment, decoder.config
        types = robot.joint_types if robot is not None else ("revolute",) * decoder.limits.n
        unit = _UNITS[config.action_space]
        return {
            "protocol": "jidm",
            "protocol_version": PROTOCOL_VERSION,
            "checkpoint": _checkpoint_name(decoder),
            "content_hash": idm.checkpoint.get("content_hash"),
            "embodiment": None if robot is None else robot.name,
            "embodiment_hash": None if robot is None else robot.content_hash,
            "action_names": list(idm.joint_names),
            "action_units": [unit.format("m" if kind == "prismatic" else "rad") for kind in types],
            "normalized": False,
            "video_dt": 1 / config.video_rate,
            "chunk": config.chunk,
            "image_key": self.image_key,
            "layout": self.layout,
            "side": self.side,
            "lingbot_channels": self.lingbot_channels,
            "normalized_grippers": self.normalized_grippers,
        }

    def lingbot_format(self, decoder: ActionDecoder, layout: str | None, side: str | None) -> LingBotFormat:
        """The format of the 30 numbers.

        Args:
            decoder: of the robot.
            layout, side: as the request states them.

        Raises:
            InputError: neither server nor request states the layout, or a side that is needed; or they differ.
        """
        for name, ours, theirs in (("layout", self.layout, layout), ("side", self.side, side)):
            if ours is not None and theirs is not None and ours != theirs:
                raise InputError(f"this server's {name} is '{ours}', the request asks for '{theirs}'")
        if decoder.idm.embodiment is None:
            raise InputError("LingBot's format needs a robot; this checkpoint names none")
        return LingBotFormat(decoder.idm.embodiment, layout=self.layout or layout, side=self.side or side)


def _checkpoint_name(decoder: ActionDecoder) -> str | None:
    """A hub id as it is; clients need not know the server's folders."""
    source = decoder.idm.checkpoint.get("source")
    return Path(source).name if source and Path(source).is_absolute() else source
