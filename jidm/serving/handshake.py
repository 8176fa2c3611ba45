"""The handshake: the first message to every client describes the server's inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jidm.errors import InputError
from jidm.serving.lingbot_format import LingBotFormat

if TYPE_CHECKING:
    from jidm.control import ActionDecoder

PROTOCOL_VERSION = 2
_UNITS = {"joint_velocity": "{}/s", "joint_position": "{}", "joint_delta": "{}"}


@dataclass(frozen=True, eq=False)
class Handshake:
    """How requests are interpreted and answers are encoded.

    Args:
        image_key: name of the image to decode in an observation; may be omitted if there is only one.
        layout: channel order of LingBot's 30 numbers, for its clients; they must state it themselves if not given.
        side: the side that a robot's only arm takes in them.
    """

    image_key: str | None = None
    layout: str | None = None
    side: str | None = None

    def metadata(self, decoder: ActionDecoder) -> dict[str, Any]:
        """The handshake of a server with this decoder; plain values only."""
        idm, robot, config = decoder.idm, decoder.idm.embodiment, decoder.config
        source = idm.checkpoint.get("source")
        types = robot.joint_types if robot is not None else ("revolute",) * decoder.limits.n
        unit = _UNITS[config.action_space]
        return {
            "protocol": "jidm",
            "protocol_version": PROTOCOL_VERSION,
            # A hub id as it is; clients need not know the server's folders.
            "checkpoint": Path(source).name if source and Path(source).is_absolute() else source,
            "content_hash": idm.checkpoint.get("content_hash"),
            "embodiment": None if robot is None else robot.name,
            "embodiment_hash": None if robot is None else robot.content_hash,
            "action_space": config.action_space,
            "action_dim": decoder.limits.n,
            "action_names": list(idm.joint_names),
            "action_units": [unit.format("m" if kind == "prismatic" else "rad") for kind in types],
            "normalized": False,
            "control_dt": 1 / config.control_rate,
            "video_dt": 1 / config.video_rate,
            "chunk": config.chunk,
            "image_key": self.image_key,
            "layout": self.layout,
            "side": self.side,
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
