"""All that is read off one video, and how: followed from frame to frame, or pair by pair with gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jidm.errors import InputError
from jidm.estimation.factors.learned import FieldEvaluation, estimate_pair_steps
from jidm.estimation.result import JointMotion
from jidm.fields.free import LearnedField
from jidm.idm import JacobianIDM
from jidm.rewards.video_residuals import VideoResiduals, video_residuals

BACKWARD_STRIDE = 2
"""Backwards, only every so many frames are decoded: it takes half the time, and steps must also add up."""
_PAIR_BATCH_SIZE = 8  # of frames solved at once


@dataclass(frozen=True, eq=False)
class VideoAnalysis:
    """All that is read off one video: T frames, S = T - 1 steps, n joints.

    Attributes:
        q: (T, n) decoded positions [rad or m].
        q_backward: ((T + 1) // 2, n) the same of every other frame, decoded from the last of them to the first; None where no
            term asks for it.
        valid: (S,) whether the step was measured.
        dt: time between frames [s].
        lower, upper: (n,) the joints' range, infinite where there is none [rad or m].
        velocity: (n,) the joints' speed limits [rad/s or m/s].
        residuals: the pictures beside that motion.
    """

    q: Float[Tensor, "T n"]
    q_backward: Float[Tensor, "half n"] | None
    valid: Bool[Tensor, " S"]
    dt: float
    lower: Float[Tensor, " n"]
    upper: Float[Tensor, " n"]
    velocity: Float[Tensor, " n"]
    residuals: VideoResiduals


class VideoAnalyzer:
    """Reads videos with one decoder.

    Args:
        idm: the decoder.
        velocity: (n,) speed limits where the decoder knows no robot [rad/s or m/s].
        backwards: decode every other frame from the last to the first as well.
        by_pairs: every pair of frames by itself and differentiably, which only a learned field can.

    Raises:
        InputError: gradients are asked of a field that is not learned.
    """

    def __init__(
        self, idm: JacobianIDM, velocity: Float[Tensor, " n"], *, decode_backward: bool, pairwise: bool
    ) -> None:
        if pairwise and not isinstance(idm.field, LearnedField):
            raise InputError("gradients need a learned field: flow in front of an exact one has none")
        self._idm, self._velocity, self._decode_backward, self._pairwise = idm, velocity, decode_backward, pairwise

    @property
    def mode(self) -> str:
        """How videos are read; scales of one kind say nothing about the other."""
        return "pairs" if self._pairwise else "followed"

    @property
    def provenance(self) -> dict[str, str | None]:
        """With what videos are read, as far as scales depend on it."""
        robot = self._idm.embodiment
        return {
            "field": type(self._idm.field).__name__,
            "checkpoint": self._idm.checkpoint.get("content_hash"),
            "embodiment": None if robot is None else robot.content_hash,
        }

    def analyze(self, frames: Float[Tensor, "T 3 H W"], dt: float, q0: Any) -> tuple[VideoAnalysis, JointMotion | None]:
        """One video, and its motion where it was followed.

        Args:
            frames: RGB in [0, 1]. dt: time between them [s].
            q0: (n,) positions in the first; None where the network reads them.
        """
        if self._pairwise:
            return self._analyze_pairs(frames, dt, q0), None
        with torch.no_grad():
            motion = self._idm.decode(frames, q0=q0, fps=1 / dt, layout="TCHW")
            q_backward = None
            if self._decode_backward:
                every_other = slice(None, None, BACKWARD_STRIDE)
                last = motion.position[every_other][-1]
                backward = self._idm.decode(
                    frames[every_other].flip(0), q0=last, fps=1 / (BACKWARD_STRIDE * dt), layout="TCHW"
                )
                q_backward = backward.position.flip(0)
            field = self._idm.field
            images = field.letterbox(frames) if isinstance(field, LearnedField) else frames
            return self._analysis(images, motion.position, q_backward, motion.valid, dt), motion

    def _analyze_pairs(self, frames: Float[Tensor, "T 3 H W"], dt: float, q0: Any) -> VideoAnalysis:
        field = self._idm.field
        assert isinstance(field, LearnedField)
        images = field.letterbox(frames)
        steps, valid = [], []
        for first, second in zip(images[:-1].split(_PAIR_BATCH_SIZE), images[1:].split(_PAIR_BATCH_SIZE), strict=True):
            features = field.encode(torch.cat([first, second]))
            result = estimate_pair_steps(
                field, FieldEvaluation.of(field, features, field.predict_pose(features)[0]), unrolled=True
            )
            steps.append(result.steps[-1])
            valid.append(result.solution.valid)
        start = field.predict_pose(field.encode(images[:1]))[0] if q0 is None else torch.as_tensor(q0).to(images)[None]
        q = torch.cat([start, start + torch.cat(steps).cumsum(0)])
        return self._analysis(images, q, None, torch.cat(valid), dt)

    def _analysis(
        self, images: Tensor, q: Tensor, q_backward: Tensor | None, valid: Tensor, dt: float
    ) -> VideoAnalysis:
        lower, upper, velocity = self._limits(q)
        return VideoAnalysis(
            q, q_backward, valid, dt, lower, upper, velocity, video_residuals(self._idm.field, images, q)
        )

    def _limits(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        robot = self._idm.embodiment
        if robot is None:
            infinite = torch.full_like(like[0], math.inf)
            return -infinite, infinite, self._velocity.to(like)
        lower, upper, velocity = (
            torch.from_numpy(np.array(x)).to(like) for x in (robot.lower, robot.upper, robot.velocity)
        )
        return lower, upper, velocity
