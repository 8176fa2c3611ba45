"""What every inverse dynamics model does with a video: open it, split a batch, decode clip by clip, stack the results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from jidm.errors import VideoError
from jidm.estimation.result import JointMotion
from jidm.estimation.smoother import smooth_motion
from jidm.flow import Flow, split_flow
from jidm.idm.decoding import check_q0, open_streams

Q0 = Sequence[float] | np.ndarray | Tensor | None
"""Joint positions in the first frame [rad or m]."""


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
            before: the frames one step before `first`, for models that look at three.
        """

    @abstractmethod
    def decode_clip(
        self, frames: Iterator[Tensor], times: Iterator[float], q0: Float[Tensor, " n"] | None,
        flow: Flow | Tensor | None = None, *, smooth: bool = False,
    ) -> tuple[JointMotion, JointMotion]:  # fmt: skip
        """Decode one clip of at least two frames.

        Args:
            frames: (3, H, W) in [0, 1], one after another. times: of each [s], asked for after its frame.
            q0: joint positions in the first frame.
            flow: (T-1, 2, H, W) measured elsewhere [px].
            smooth: whether the second result is asked for.

        Returns:
            The motion frame by frame, and the same given later frames as well, before `smooth_motion`; the first one again
            where the model has nothing of the kind.
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
        smooth: bool = False,
        progress: bool = False,
    ) -> JointMotion:
        """Joint motion of a video.

        Args:
            video: path of a video or a folder of images (streamed, memory does not grow with length), or frames in
                any layout `as_video` takes, with any batch shape.
            q0: (n,) or (*batch, n) joint positions in the first frame [rad or m]. A trained model predicts them if not
                given.
            fps: frames a second; taken from the file where not given. Needed for arrays.
            flow: (*batch, T-1, 2, H, W) measured elsewhere, used in place of the estimator [px]. Across a frame that was
                left out the estimator is asked all the same.
            layout, value_range: as for `as_video`, where an array's own shape and values leave a choice.
            smooth: let later frames correct earlier steps: a Rauch-Tung-Striebel smoother where the model is a Kalman
                filter (memory then grows by (2n)^2 numbers a frame), and `smooth_motion`. For whole videos only.
            progress: show a progress bar.

        Returns:
            `JointMotion` with the video's batch shape. A frame that is not finite, or cannot be measured, makes its steps
            `valid=False` and leaves the others right.

        Raises:
            VideoError: the video cannot be read, has one frame, or no frame rate is known.
            InputError: q0 or flow do not fit.
        """
        given = (video, q0, fps, flow, layout, value_range, progress)
        return self._decode(*given, smooth=True)[1] if smooth else self._decode(*given, smooth=False)[0]

    def decode_both(
        self,
        video: Any,
        *,
        q0: Q0 = None,
        fps: float | None = None,
        flow: Flow | Tensor | None = None,
        layout: str | None = None,
        value_range: tuple[float, float] | None = None,
        progress: bool = False,
    ) -> tuple[JointMotion, JointMotion]:
        """The motion of `decode` without and with `smooth`, from one pass over the video."""
        return self._decode(video, q0, fps, flow, layout, value_range, progress, smooth=True)

    # ---- pieces -----------------------------------------------------------------------------------------------------

    def _decode(
        self, video: Any, q0: Q0, fps: float | None, flow: Flow | Tensor | None, layout: str | None,
        value_range: tuple[float, float] | None, progress: bool, *, smooth: bool,
    ) -> tuple[JointMotion, JointMotion]:  # fmt: skip
        start = check_q0(q0, self.joint_names)
        videos = open_streams(video, start, fps=fps, layout=layout, value_range=value_range, progress=progress)
        flows = [flow] if videos.shape is None else split_flow(flow, videos.shape)
        motions = [
            self.decode_clip(x.frames, x.times, x.q0, f, smooth=smooth)
            for x, f in zip(videos.streams, flows, strict=True)
        ]
        filtered = videos.stack([x for x, _ in motions])
        if not smooth:
            return filtered, filtered
        return filtered, smooth_motion(videos.stack([x for _, x in motions]))


def first_frame(frames: Iterator[Tensor]) -> Tensor:
    """The first of some frames.

    Raises:
        VideoError: there is none.
    """
    first = next(frames, None)
    if first is None:
        raise VideoError("the video has no frames")
    return first
