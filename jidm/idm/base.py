"""What every inverse dynamics model does with a video: open it, split a batch, decode clip by clip, stack the results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jidm.errors import InputError, VideoError
from jidm.estimation.result import JointMotion, stack
from jidm.estimation.smoother import smooth_motion
from jidm.flow import Flow, split_flow
from jidm.video.layouts import as_video
from jidm.video.timestamps import frame_timestamps, timestamped_stream

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
        start = self._initial_q(q0)
        if isinstance(video, (str, Path)):
            if start is not None and start.dim() != 1:
                raise InputError(f"q0 must be ({start.shape[-1]},) for one file, got shape {tuple(start.shape)}")
            frames, times, length = timestamped_stream(video, fps)
            clips = [self.decode_clip(_with_progress(frames, progress, length), times, start, flow, smooth=smooth)]
            batch = torch.Size()
        else:
            tensor = as_video(getattr(video, "frames", video), layout=layout, value_range=value_range, min_frames=2)
            time = frame_timestamps(video, fps, tensor.shape[-4])
            batch = tensor.shape[:-4]
            clips = [
                self.decode_clip(_with_progress(iter(clip), progress, len(clip)), iter(time), q, f, smooth=smooth)
                for clip, q, f in zip(
                    tensor.reshape(-1, *tensor.shape[-4:]),
                    self._split_q0(start, batch),
                    split_flow(flow, tensor.shape),
                    strict=True,
                )
            ]
        filtered = _stacked([x for x, _ in clips], batch)
        if not smooth:
            return filtered, filtered
        return filtered, smooth_motion(_stacked([x for _, x in clips], batch))

    def _initial_q(self, q0: Q0) -> Float[Tensor, "*batch n"] | None:
        """q0 as a tensor of finite numbers, one per joint."""
        if q0 is None:
            return None
        start = q0 if isinstance(q0, Tensor) else torch.from_numpy(np.array(q0, dtype=np.float64))
        names = self.joint_names
        if start.shape[-1:] != (len(names),):
            raise InputError(f"q0 must hold {len(names)} joints ({', '.join(names)}), got shape {tuple(start.shape)}")
        if not start.isfinite().all():
            raise InputError("q0 holds NaN or infinity; give the joint positions of the first frame")
        return start

    def _split_q0(self, q0: Tensor | None, batch: torch.Size) -> Sequence[Tensor | None]:
        """q0 of every clip of a batch."""
        if q0 is None:
            return [None] * batch.numel()
        shape = q0.shape[:-1]
        if len(shape) > len(batch) or any(a not in (1, b) for a, b in zip(reversed(shape), reversed(batch))):
            raise InputError(f"q0 of shape {tuple(q0.shape)} does not fit a video with batch shape {tuple(batch)}")
        return list(q0.expand(*batch, q0.shape[-1]).reshape(-1, q0.shape[-1]))


def _stacked(motions: list[JointMotion], batch: torch.Size) -> JointMotion:
    return stack(motions, batch) if batch else motions[0]


def _with_progress(frames: Iterator[Tensor], wanted: bool, length: int | None) -> Iterator[Tensor]:
    if not wanted:
        return frames
    from tqdm import tqdm

    return iter(tqdm(frames, total=length, desc="decode", unit="frame"))


def first_frame(frames: Iterator[Tensor]) -> Tensor:
    """The first of some frames.

    Raises:
        VideoError: there is none.
    """
    first = next(frames, None)
    if first is None:
        raise VideoError("the video has no frames")
    return first
