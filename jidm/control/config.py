"""Settings of the action decoder and of its reference trajectory."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jidm.control.commands import as_action_space
from jidm.errors import InputError


@dataclass(frozen=True)
class ControlConfig:
    """Rates, action space and smoothness of the commands.

    Attributes:
        video_rate: frames per second of the generated video.
        control_rate: commands per second; any ratio to the video rate is allowed.
        chunk: number of frames to wait for before commands are given. Larger is smoother and later.
        action_space: what `Commands.action` holds: "joint_velocity", "joint_position" or "joint_delta".
        bandwidth: motion faster than this is smoothed away [Hz].
        horizon: how far ahead the motion is planned [s]; it must be long enough to brake from the desired speed.
        max_tracking_error: a robot that reports a larger distance from its command is held [rad or m]; never if None.
    """

    video_rate: float = 12.5
    control_rate: float = 50.0
    chunk: int = 1
    action_space: str = "joint_velocity"
    bandwidth: float = 4.0
    horizon: float = 0.8
    max_tracking_error: float | None = None

    def __post_init__(self) -> None:
        if not all(math.isfinite(rate) and rate > 0 for rate in (self.video_rate, self.control_rate)):
            raise InputError(
                f"video_rate and control_rate must be positive, got {self.video_rate} and {self.control_rate}"
            )
        if self.chunk < 1:
            raise InputError(f"chunk must be at least one frame, got {self.chunk}")
        if self.max_tracking_error is not None and not self.max_tracking_error > 0:
            raise InputError(f"max_tracking_error must be positive or None, got {self.max_tracking_error}")
        as_action_space(self.action_space)
