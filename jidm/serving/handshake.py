"""What a server tells every client first: what its numbers mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jidm.errors import InputError
from jidm.serving.lingbot_format import LingBotFormat

if TYPE_CHECKING:
    from jidm.control import ActionDecoder

PROTOCOL_VERSION = 1
_UNITS = {"joint_velocity": "{}/s", "joint_position": "{}", "joint_delta": "{}"}


@dataclass(frozen=True, eq=False)
class Handshake:
    """How requests are read and answers are meant.

    Args:
        image_key: name of the picture among those of an observation; may be left out where there is only one.
        layout: order of LingBot's 30 numbers, for clients that speak its dialect; they name it themselves if not given.
        side: which arm a single one counts as in them.
        channels: which of the 30 are sent, in this order; if not given pose and gripper of each arm, as LingBot-VA's
            RoboTwin client takes them.
    """

    image_key: str | None = None
    layout: str | None = None
    side: str | None = None
    channels: Sequence[int] | None = None

    def metadata(self, decoder: ActionDecoder) -> dict[str, Any]:
        """The handshake: plain values only."""
        idm, robot = decoder.idm, decoder.idm.embodiment
        lengths = {"prismatic": "m"}
        types = robot.joint_types if robot is not None else ("revolute",) * decoder.limits.n
        unit = _UNITS[decoder.action_space]
        return {
            "protocol": "jidm",
            "protocol_version": PROTOCOL_VERSION,
            "checkpoint": idm.checkpoint.get("source"),
            "content_hash": idm.checkpoint.get("content_hash"),
            "embodiment": None if robot is None else robot.name,
            "embodiment_hash": None if robot is None else robot.content_hash,
            "action_space": decoder.action_space,
            "action_dim": decoder.limits.n,
            "action_names": list(idm.joint_names),
            "action_units": [unit.format(lengths.get(kind, "rad")) for kind in types],
            "normalised": False,
            "control_dt": 1 / decoder.control_rate,
            "video_dt": 1 / decoder.video_rate,
            "chunk": decoder.chunk,
            "view": self.image_key,
            "layout": self.layout,
            "side": self.side,
        }

    def lingbot_format(
        self, decoder: ActionDecoder, layout: str | None, side: str | None
    ) -> tuple[LingBotFormat, list[int]]:
        """The 30 numbers and those of them that are sent.

        Raises:
            InputError: neither the server nor the request names a layout, or side where it needs one, or they differ.
        """
        for name, ours, theirs in (("layout", self.layout, layout), ("side", self.side, side)):
            if ours is not None and theirs is not None and ours != theirs:
                raise InputError(f"this server's {name} is '{ours}', the request asks for '{theirs}'")
        if decoder.idm.embodiment is None:
            raise InputError("the 30 numbers need a robot; this checkpoint names none")
        lingbot = LingBotFormat(decoder.idm.embodiment, layout=self.layout or layout, side=self.side or side)
        return lingbot, list(lingbot.end_effector_channels if self.channels is None else self.channels)
