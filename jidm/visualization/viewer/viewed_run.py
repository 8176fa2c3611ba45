"""What the viewer shows of one video: its frames, the joint motion, and as much of robot, camera and field as is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from jidm.errors import InputError
from jidm.estimation.result import JointMotion
from jidm.video.preparation import area_average, reduced_size

if TYPE_CHECKING:
    from jidm.camera.model import Camera
    from jidm.fields.base import JacobianField
    from jidm.fields.free import LearnedField
    from jidm.flow import FlowEstimator
    from jidm.robot.embodiment import Embodiment
    from jidm.visualization.plot import PositionAndVelocityLimits

MAX_SIDE = 640
"""[px] Longer side to which frames are reduced for the viewer, so that long videos fit into memory."""


@dataclass(frozen=True, eq=False)
class ViewedRun:
    """One video and its joint motion, as the viewer shows it.

    Attributes:
        title: one line.
        frames: T images of one size, RGB, reduced to `MAX_SIDE`.
        width, height: of the video itself [px]; numbers in pixels are given for this size.
        motion: decoded or recorded, of these frames.
        robot: drawn in 3-D; None if it is not known.
        camera: of the video, of its own size; None if it is not known.
        field: gives the Jacobian field; None if neither camera nor checkpoint are known.
        flow: estimates the flow that is shown; None if a learned field matches the frames itself.
        truth: (T, n) true or recorded joint positions [rad or m], where the motion is decoded.
        decoded: False for recorded joint positions, which have no uncertainty.
        penalties: term -> (T-1,) penalty of each step in [0, 1], of a scored video.
        notes: lines of text about the run, such as the reasons of its reward.
    """

    title: str
    frames: Sequence[UInt8[Tensor, "3 h w"]]
    width: int
    height: int
    motion: JointMotion
    robot: Embodiment | None = None
    camera: Camera | None = None
    field: JacobianField | LearnedField | None = None
    flow: FlowEstimator | None = None
    truth: Float[np.ndarray, "T n"] | None = None
    decoded: bool = True
    penalties: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.motion.position.ndim != 2:
            raise InputError(f"{self.title}: one video is viewed at a time, this motion is a batch; index it first")
        if not len(self.frames):
            raise InputError(f"{self.title}: the video has no frame")

    def __len__(self) -> int:
        """Number of frames with a known pose."""
        return min(len(self.frames), self.motion.frames)

    @property
    def joint_names(self) -> tuple[str, ...]:
        """Names of the n joints."""
        return self.motion.joint_names

    @property
    def scale(self) -> float:
        """Pixels of the video per pixel of `frames`."""
        return self.width / self.frames[0].shape[-1]

    @property
    def limits(self) -> PositionAndVelocityLimits | None:
        """Position and velocity limits of the robot; None if it is not known or has other joints."""
        if self.robot is None or self.robot.joint_names != self.joint_names:
            return None
        return self.robot.lower, self.robot.upper, self.robot.velocity

    def frame(self, t: int) -> Float[Tensor, "3 h w"]:
        """Frame t, RGB in [0, 1]."""
        return self.frames[t].to(torch.float32) / 255.0


def reduced(frame: UInt8[Tensor, "3 H W"]) -> UInt8[Tensor, "3 h w"]:
    """A frame with a longer side of at most `MAX_SIDE`."""
    height, width = frame.shape[-2:]
    size = reduced_size(height, width, MAX_SIDE)
    return frame if size == (height, width) else area_average(frame, *size)


def recorded_motion(
    joint_names: tuple[str, ...], joint_types: tuple[str, ...], time: NDArray[np.float64], q: NDArray[np.float64]
) -> JointMotion:
    """Recorded joint positions (T, n) [rad or m] at times (T,) [s] as a motion without uncertainty or residual.

    Raises:
        InputError: they are not finite, or time does not increase.
    """
    if not np.isfinite(q).all():
        raise InputError("the recorded joint positions hold values that are not numbers")
    if len(time) > 1 and not (np.diff(time) > 0).all():
        raise InputError("the recorded timestamps do not increase")
    position, timestamps = torch.from_numpy(np.array(q, np.float64)), torch.from_numpy(np.array(time, np.float64))
    step = position.diff(dim=0)
    S, n = step.shape
    return JointMotion(
        joint_names=joint_names, joint_types=joint_types, time=timestamps, delta_q=step,
        velocity=step / timestamps.diff()[:, None], position=position, position_std=torch.zeros_like(position),
        covariance=position.new_zeros(S, n, n), residual=position.new_zeros(S), explained_fraction=position.new_ones(S), agreement=position.new_zeros(S),
        observable=torch.ones(S, n, dtype=torch.bool), valid=torch.ones(S, dtype=torch.bool),
    )  # fmt: skip
