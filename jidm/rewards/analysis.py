"""Analysis of one video for the reward: tracked from frame to frame, or frame pair by frame pair with gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jidm.errors import InputError
from jidm.estimation.refinement import FieldEvaluation
from jidm.estimation.result import JointMotion
from jidm.estimation.step_estimation import estimate_pair_steps
from jidm.fields.free import LearnedField
from jidm.idm import JacobianIDM
from jidm.rewards.video_residuals import VideoResiduals, video_residuals

BACKWARD_STRIDE = 2
"""Stride of the backward decoding [frames]. It halves the time, and larger steps also test that steps add up."""
_BATCH_SIZE = 8  # frames, or pairs of them, processed at once


@dataclass(frozen=True, eq=False)
class VideoAnalysis:
    """Decoded motion and residuals of one video: T frames, S = T - 1 steps, n joints.

    Attributes:
        q: (T, n) decoded positions [rad or m].
        q_backward: ((T + 1) // 2, n) positions in every other frame, decoded from the last of them to the first; None if no
            term needs them.
        valid: (S,) whether the step was measured.
        dt: time between frames [s].
        lower, upper: (n,) position limits, infinite where there is none [rad or m].
        velocity: (n,) velocity limits [rad/s or m/s].
        residuals: difference between the video and the decoded motion.
        keypoints: (T, m) image coordinates that the network reads the pose from; None if the field is not learned.
        motion: the decoded motion; None if frame pairs were solved separately.
    """

    q: Float[Tensor, "T n"]
    q_backward: Float[Tensor, "half n"] | None
    valid: Bool[Tensor, " S"]
    dt: float
    lower: Float[Tensor, " n"]
    upper: Float[Tensor, " n"]
    velocity: Float[Tensor, " n"]
    residuals: VideoResiduals
    keypoints: Float[Tensor, "T m"] | None
    motion: JointMotion | None


class VideoAnalyzer:
    """Analyzes videos with one decoder.

    Args:
        idm: the decoder.
        velocity: (n,) velocity limits if the decoder has no robot [rad/s or m/s].
        decode_backward: also decode every other frame from the last to the first.
        pairwise: solve each pair of frames on its own, differentiably; needs a learned field.

    Raises:
        InputError: pairwise analysis with a field that is not learned.
    """

    def __init__(
        self, idm: JacobianIDM, velocity: Float[Tensor, " n"], *, decode_backward: bool, pairwise: bool
    ) -> None:
        if pairwise and not isinstance(idm.field, LearnedField):
            raise InputError("gradients need a learned field: the flow of an analytic one is not differentiable")
        self._idm, self._velocity, self._decode_backward, self._pairwise = idm, velocity, decode_backward, pairwise

    @property
    def mode(self) -> str:
        """How videos are analyzed, "tracked" or "pairs"; scales fitted in one mode do not apply to the other."""
        return "pairs" if self._pairwise else "tracked"

    @property
    def provenance(self) -> dict[str, str | None]:
        """Identity of the decoder, as far as scales depend on it."""
        robot = self._idm.embodiment
        return {
            "field": type(self._idm.field).__name__,
            "checkpoint": self._idm.checkpoint.get("content_hash"),
            "embodiment": None if robot is None else robot.content_hash,
        }

    def analyze(self, frames: Float[Tensor, "T 3 H W"], dt: float, q0: Any) -> VideoAnalysis:
        """Analyze one video.

        Args:
            frames: RGB in [0, 1].
            dt: time between frames [s].
            q0: (n,) joint positions in the first frame [rad or m]; None if the network estimates them.
        """
        if self._pairwise:
            return self._analyze_pairs(frames, dt, q0)
        with torch.no_grad():
            motion = self._idm.decode(frames, q0=q0, fps=1 / dt, layout="TCHW", warn=False)
            q_backward = None
            if self._decode_backward:
                every_other = slice(None, None, BACKWARD_STRIDE)
                last = motion.position[every_other][-1]
                backward = self._idm.decode(
                    frames[every_other].flip(0),
                    q0=last,
                    fps=1 / (BACKWARD_STRIDE * dt),
                    layout="TCHW",
                    warn=False,
                )
                q_backward = backward.position.flip(0)
            field = self._idm.field
            images = field.letterbox(frames) if isinstance(field, LearnedField) else frames
            return self._analysis(images, motion.position, motion.valid, dt, q_backward=q_backward, motion=motion)

    def _analyze_pairs(self, frames: Float[Tensor, "T 3 H W"], dt: float, q0: Any) -> VideoAnalysis:
        field = self._idm.field
        assert isinstance(field, LearnedField)
        images = field.letterbox(frames)
        steps, valid = [], []
        for first, second in zip(images[:-1].split(_BATCH_SIZE), images[1:].split(_BATCH_SIZE), strict=True):
            features = field.encode(torch.cat([first, second]))
            result = estimate_pair_steps(
                field, FieldEvaluation.of(field, features, field.predict_pose(features)[0]), unrolled=True
            )
            steps.append(result.steps[-1])
            valid.append(result.solution.valid)
        start = field.predict_pose(field.encode(images[:1]))[0] if q0 is None else torch.as_tensor(q0).to(images)[None]
        q = torch.cat([start, start + torch.cat(steps).cumsum(0)])
        return self._analysis(images, q, torch.cat(valid), dt)

    def _analysis(
        self, images: Tensor, q: Tensor, valid: Tensor, dt: float, *, q_backward: Tensor | None = None,
        motion: JointMotion | None = None,
    ) -> VideoAnalysis:  # fmt: skip
        robot = self._idm.embodiment
        if robot is None:
            upper, velocity = torch.full_like(q[0], math.inf), self._velocity.to(q)
            lower = -upper
        else:
            lower, upper, velocity = (
                torch.from_numpy(np.array(x)).to(q) for x in (robot.lower, robot.upper, robot.velocity)
            )
        return VideoAnalysis(
            q=q, q_backward=q_backward, valid=valid, dt=dt, lower=lower, upper=upper, velocity=velocity,
            residuals=video_residuals(self._idm.field, images, q), keypoints=self._keypoints(images), motion=motion,
        )  # fmt: skip

    def _keypoints(self, images: Float[Tensor, "T 3 H W"]) -> Float[Tensor, "T m"] | None:
        field = self._idm.field
        if not isinstance(field, LearnedField):
            return None
        return torch.cat([field.pose_keypoints(field.encode(part)) for part in images.split(_BATCH_SIZE)])
