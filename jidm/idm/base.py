"""The interface of inverse dynamics models, and decoding of batches of videos clip by clip."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from jidm.errors import JidmWarning
from jidm.estimation.result import JointMotion
from jidm.flow import Flow, FrameIndexedFlow, split_flow
from jidm.idm.decoding import check_q0, open_streams
from jidm.video.preparation import MAX_SIZE
from jidm.video.timestamps import TimedFrame

Q0 = Sequence[float] | np.ndarray | Tensor | None
"""Joint positions in the first frame, (n,) or (*batch, n) [rad or m]."""


class InverseDynamicsModel(ABC):
    """Decodes joint motion from video."""

    @property
    @abstractmethod
    def joint_names(self) -> tuple[str, ...]:
        """Names of the n joints, the order of every joint axis."""

    @abstractmethod
    def predict_steps(
        self, first: Float[Tensor, "b 3 H W"], second: Float[Tensor, "b 3 H W"], before: Tensor | None = None
    ) -> Float[Tensor, "b n"]:
        """Joint steps of unrelated pairs of frames [rad or m].

        Args:
            first, second: RGB in [0, 1], finite, of any one size.
            before: the frames one step before `first`, for models that use three.
        """

    @abstractmethod
    def decode_clip(
        self, frames: Iterator[TimedFrame], q0: Float[Tensor, " n"] | None, flow: Flow | Tensor | None = None,
        *, smooth: bool = False,
    ) -> tuple[JointMotion, JointMotion]:  # fmt: skip
        """Decode one clip of at least two frames.

        Args:
            frames: timestamp [s] and image of each.
            q0: joint positions in the first frame [rad or m].
            flow: (T-1, 2, H, W) external flow [px].
            smooth: whether the second result is needed.

        Returns:
            The motion given the frames so far, and the motion given later frames as well; the same one if not `smooth`.
        """

    def decode(
        self,
        video: Any,
        *,
        q0: Q0 = None,
        fps: float | None = None,
        flow: Flow | Tensor | None = None,
        layout: str | None = None,
        value_range: tuple[float, float] | None = None,
        max_size: int = MAX_SIZE,
        smooth: bool = False,
        progress: bool = False,
        warn: bool = True,
    ) -> JointMotion:
        """Joint motion of a video.

        Args:
            video: path of a video or a folder of images, or a stream of `open_video` (read frame by frame, so that memory does
                not grow with length), or frames in any layout of `as_video`, with any batch shape.
            q0: (n,) or (*batch, n) joint positions in the first frame [rad or m]. A trained model predicts them if not
                given.
            fps: frames per second; taken from the file if not given. Needed for arrays.
            flow: (*batch, T-1, 2, H, W) external flow in place of the estimator's [px]. Across a frame that was left out,
                the estimator is used nevertheless.
            layout, value_range: as for `as_video`, where shape and values of an array are ambiguous.
            max_size: frames whose longer side exceeds it are reduced to it by area averaging [px]; 0 decodes every size as it
                is. The camera, which is that of the full size, is scaled with them. Image quantities of the result are in
                pixels of the reduced frames; `provenance` states both sizes. With external flow nothing is reduced.
            smooth: use later frames as well: a Rauch-Tung-Striebel smoother where the model has a Kalman filter (memory then
                grows by three matrices (2n, 2n) per frame), and `smooth_motion`.
            progress: show a progress bar.
            warn: give a `JidmWarning` where the video contradicts robot, camera or start pose; `verdict` says it either way.

        Returns:
            `JointMotion` with the batch shape of the video. The steps to and from a frame that is not finite or cannot be
            measured are `valid=False`; the others are not affected. Nor are they valid where the video shows nothing like the
            robot.

        Raises:
            VideoError: the video cannot be read, has one frame, or no frame rate is known.
            InputError: q0 or flow do not fit the video.
        """
        given = (video, q0, fps, flow, layout, value_range, max_size, progress)
        motion = self._decode(*given, smooth=smooth)[1 if smooth else 0]
        if warn:
            _warn_of_contradictions(motion)
        return motion

    def decode_both(
        self,
        video: Any,
        *,
        q0: Q0 = None,
        fps: float | None = None,
        flow: Flow | Tensor | None = None,
        layout: str | None = None,
        value_range: tuple[float, float] | None = None,
        max_size: int = MAX_SIZE,
        progress: bool = False,
    ) -> tuple[JointMotion, JointMotion]:
        """The motions of `decode` without and with `smooth`, from one pass over the video."""
        motions = self._decode(video, q0, fps, flow, layout, value_range, max_size, progress, smooth=True)
        _warn_of_contradictions(motions[0])
        return motions

    def for_frame_size(self, video_size: tuple[int, int], frame_size: tuple[int, int]) -> InverseDynamicsModel:
        """The model for reduced frames: itself, because networks scale frames to their own size.

        Args:
            video_size: (height, width) of the video [px].
            frame_size: (height, width) of the frames that are decoded [px].
        """
        return self

    # ---- pieces -----------------------------------------------------------------------------------------------------

    def _decode(
        self, video: Any, q0: Q0, fps: float | None, flow: Flow | Tensor | None, layout: str | None,
        value_range: tuple[float, float] | None, max_size: int, progress: bool, *, smooth: bool,
    ) -> tuple[JointMotion, JointMotion]:  # fmt: skip
        start = check_q0(q0, self.joint_names)
        if flow is not None or isinstance(getattr(self, "flow", None), FrameIndexedFlow):
            max_size = 0
        options: dict[str, Any] = {"layout": layout, "value_range": value_range, "max_size": max_size}
        batch = open_streams(video, start, fps=fps, progress=progress, **options)
        model = self.for_frame_size(batch.video_size, batch.frame_size)
        flows = [flow] if batch.shape is None else split_flow(flow, batch.shape)
        motions = [
            model.decode_clip(x.frames, x.q0, f, smooth=smooth) for x, f in zip(batch.streams, flows, strict=True)
        ]
        filtered = batch.stack([x for x, _ in motions])
        return filtered, batch.stack([x for _, x in motions]) if smooth else filtered


def _warn_of_contradictions(motion: JointMotion) -> None:
    single = isinstance(motion.verdict, str)
    for k, verdict in enumerate([motion.verdict] if single else motion.verdict):
        if verdict:
            warnings.warn(str(verdict) if single else f"video {k}: {verdict}", JidmWarning, stacklevel=3)
