"""BaselineIDM: any baseline behind the same `decode` as ours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jidm.baselines.base import Baseline, BidirectionalFlow
from jidm.baselines.eva import EvaIDM
from jidm.baselines.flow_source import estimate_bidirectional_flow
from jidm.checkpoint import Checkpoint, RobotDescription, load_checkpoint
from jidm.errors import InputError, VideoError
from jidm.estimation.result import JointMotion, stack
from jidm.flow import FlowEstimator, as_flow_estimator
from jidm.video.layouts import as_video
from jidm.video.letterbox import Letterbox

_CHUNK_SIZE = 16  # pairs or windows the network is given at once


class BaselineIDM:
    """A trained baseline as something that decodes video.

    A regression says nothing of its errors, so `covariance` and `position_std` of its motions are the spread of the
    training data, and `residual` and `explained` are 0, unless the model measures them (VERA's does); the provenance
    names what was not measured.

    Args:
        model: a baseline; it is put into evaluation mode.
        flow: in place of the estimator that the model's config names.
        source: where the model was read from, for the provenance.
    """

    def __init__(self, model: Baseline, *, flow: str | FlowEstimator | None = None, source: str = "") -> None:
        if flow is not None and model.flow_estimator is None:
            raise InputError(f"this {model.kind} asks no flow estimator; leave flow= out")
        self.model = model.eval()
        estimator = flow if flow is not None else model.flow_estimator
        self.flow: FlowEstimator | None = None if estimator is None else as_flow_estimator(estimator)
        self.source = source

    @classmethod
    def from_pretrained(
        cls, where: str | Path | Checkpoint, *, embodiment: RobotDescription | None = None,
        flow: str | FlowEstimator | None = None, device: str | torch.device = "cpu",
    ) -> BaselineIDM:  # fmt: skip
        """What `save_pretrained` wrote.

        Args:
            where: a folder, a bundled name, a hub id, or a checkpoint already read.
            embodiment: the robot it shall decode; refused if it was trained for another.
            flow: in place of the estimator that the model's config names.

        Raises:
            CheckpointError: there is none, it is damaged, not a baseline, or for another robot.
        """
        from jidm.model_registry import load_model

        checkpoint = where if isinstance(where, Checkpoint) else load_checkpoint(where)
        if embodiment is not None:
            checkpoint.check_embodiment(embodiment)
        model = load_model(checkpoint)
        if not isinstance(model, Baseline):
            raise InputError(f"{checkpoint.source}: a {checkpoint.kind} is not a baseline; use JacobianIDM")
        source = f"{checkpoint.source} ({checkpoint.content_hash[:12]})"
        return cls(model.to(device), flow=flow, source=source)

    def save_pretrained(self, folder: str | Path, **record: Any) -> Path:
        """As `Baseline.save_pretrained`."""
        return self.model.save_pretrained(folder, **record)

    @property
    def joint_names(self) -> tuple[str, ...]:
        """Names of the n joints, the order of every joint axis."""
        return self.model.joint_names

    def predict_steps(
        self, first: Float[Tensor, "B 3 H W"], second: Float[Tensor, "B 3 H W"],
        before: Float[Tensor, "B 3 H W"] | None = None,
    ) -> Float[Tensor, "B n"]:  # fmt: skip
        """Joint steps of unrelated pairs of frames of any one size [rad or m].

        Args:
            first, second: RGB in [0, 1], finite.
            before: the frames one step before `first`, for models that look at three.
        """
        with torch.no_grad():
            return self._predict(list(first), list(second), None if before is None else list(before)).delta_q

    def decode(
        self,
        video: Any,
        *,
        q0: Sequence[float] | np.ndarray | Tensor | None = None,
        fps: float | None = None,
        layout: str | None = None,
        value_range: tuple[float, float] | None = None,
        progress: bool = False,
    ) -> JointMotion:
        """Joint motion of a video; arguments as for `JacobianIDM.decode`.

        Args:
            q0: (n,) or (*batch, n) joint positions in the first frame [rad or m]. Without it, positions are the
                model's own where it sees absolute ones (EVA), else they start at zero; the provenance says which.

        Returns:
            `JointMotion` with the video's batch shape. A frame that is not finite makes the steps to and from it
            `valid=False`; positions after it are right again.

        Raises:
            VideoError: the video cannot be read, has one frame, or no frame rate is known.
            InputError: q0 does not fit.
        """
        start = None if q0 is None else self._check_q0(q0)
        if isinstance(video, (str, Path)):
            if start is not None and start.dim() != 1:
                raise InputError(f"q0 must be ({self.model.config.n},) for one file, got shape {tuple(start.shape)}")
            frames, times, length = _open_frames(video, fps)
            return self._decode_one(_with_progress(frames, length if progress else None), times, start)
        tensor = as_video(getattr(video, "frames", video), layout=layout, value_range=value_range, min_frames=2)
        times = _timestamps(video, fps, tensor.shape[-4])
        batch = tensor.shape[:-4]
        clips = tensor.reshape(-1, *tensor.shape[-4:])
        starts: list[Tensor | None] = [None] * len(clips)
        if start is not None:
            try:
                starts = list(start.expand(*batch, start.shape[-1]).reshape(-1, start.shape[-1]))
            except RuntimeError:
                raise InputError(
                    f"q0 of shape {tuple(start.shape)} does not fit a video with batch shape {tuple(batch)}"
                ) from None
        motions = [
            self._decode_one(_with_progress(iter(clip), len(clip) if progress else None), list(times), q)
            for clip, q in zip(clips, starts, strict=True)
        ]
        return stack(motions, batch) if batch else motions[0]

    # ---- pieces ------------------------------------------------------------------------------------------------------

    def _decode_one(self, frames: Iterator[Tensor], times: list[float], q0: Tensor | None) -> JointMotion:
        buffer = _StepBuffer(self.model.config.n)
        with torch.no_grad():
            if isinstance(self.model, EvaIDM):
                self._decode_positions(self.model, frames, buffer)
            else:
                self._decode_steps(frames, buffer)
        if buffer.frames < 2:
            raise VideoError("the video has one frame; motion lies between frames, give at least two")
        return self._joint_motion(buffer, times, q0)

    def _decode_steps(self, frames: Iterator[Tensor], buffer: _StepBuffer) -> None:
        """Steps from each good frame to the next good one; across a gap they move the position, but are not valid."""
        pending: list[tuple[int, int, Tensor, Tensor]] = []

        def flush() -> None:
            found = self._predict([p[2] for p in pending], [p[3] for p in pending])
            zero = found.delta_q.new_zeros(len(pending))
            numbers = (found.delta_q, zero if found.residual is None else found.residual,
                       zero if found.explained is None else found.explained)  # fmt: skip
            for (start, stop, *_), *values in zip(pending, *(x.cpu().double() for x in numbers), strict=True):
                if all(x.isfinite().all() for x in values):
                    buffer.steps[start, stop] = (values[0], float(values[1]), float(values[2]))
            pending.clear()

        last: tuple[int, Tensor] | None = None
        for t, frame in enumerate(buffer.finite_frames(frames)):
            if frame is None:
                continue
            if last is not None:
                pending.append((last[0], t, last[1], frame))
            last = (t, frame)
            if len(pending) == _CHUNK_SIZE:
                flush()
        if pending:
            flush()

    def _decode_positions(self, model: EvaIDM, frames: Iterator[Tensor], buffer: _StepBuffer) -> None:
        """Position of each good frame; a neighbour that is missing or broken is replaced by the frame itself."""
        at_frame: list[int] = []
        pending: list[tuple[Tensor, Tensor, Tensor]] = []

        def flush() -> None:
            before, at, after = (self._letterbox(list(frames)) for frames in zip(*pending, strict=True))
            found = model.positions(before, at, after).cpu().double()
            buffer.positions.update((t, q) for t, q in zip(at_frame, found, strict=True) if q.isfinite().all())
            at_frame.clear()
            pending.clear()

        before: Tensor | None = None
        at: Tensor | None = None
        for t, after in enumerate(chain(buffer.finite_frames(frames), [None])):
            if at is not None:
                at_frame.append(t - 1)
                pending.append((at if before is None else before, at, at if after is None else after))
            before, at = at, after
            if len(pending) == _CHUNK_SIZE:
                flush()
        if pending:
            flush()

    def _predict(self, first: list[Tensor], second: list[Tensor], before: list[Tensor] | None = None) -> Any:
        motion = None if self.flow is None else self._estimate_flow(torch.stack(first), torch.stack(second))
        earlier = None if before is None else self._letterbox(before)
        return self.model.predict(self._letterbox(first), self._letterbox(second), earlier, motion)

    def _estimate_flow(self, first: Tensor, second: Tensor) -> BidirectionalFlow:
        """Flow of the frames at their own size, where it is sharpest, brought to the model's."""
        assert self.flow is not None
        found = estimate_bidirectional_flow(self.flow, first.float(), second.float(), self._make_letterbox(first))
        like = self.model.delta_std
        return BidirectionalFlow(*(x.to(like) for x in (found.flow, found.weight, found.flow_back, found.weight_back)))  # type: ignore[union-attr]

    def _letterbox(self, frames: list[Tensor]) -> Tensor:
        images = torch.stack(frames).to(self.model.delta_std)
        return self._make_letterbox(images).apply(images)

    def _make_letterbox(self, images: Tensor) -> Letterbox:
        config = self.model.config
        return Letterbox(images.shape[-2], images.shape[-1], config.height, config.width)

    def _check_q0(self, q0: Any) -> Tensor:
        start = torch.as_tensor(np.asarray(q0, dtype=np.float64) if not isinstance(q0, Tensor) else q0).double().cpu()
        names = self.joint_names
        if start.shape[-1:] != (len(names),):
            raise InputError(f"q0 must hold {len(names)} joints ({', '.join(names)}), got shape {tuple(start.shape)}")
        if not start.isfinite().all():
            raise InputError("q0 holds NaN or infinity; give the joint positions of the first frame")
        return start

    def _joint_motion(self, buffer: _StepBuffer, times: list[float], q0: Tensor | None) -> JointMotion:
        config, steps, like = self.model.config, buffer.frames - 1, torch.zeros((), dtype=buffer.dtype)
        time = torch.tensor(times[: buffer.frames], dtype=torch.float64)
        absolute = isinstance(self.model, EvaIDM)
        trajectory = buffer.from_positions(q0) if absolute else buffer.integrate(q0)
        step_variance = torch.tensor(config.delta_std, dtype=torch.float64).square()
        ages = torch.arange(buffer.frames, dtype=torch.float64)[:, None]
        position_std = (ages * step_variance).sqrt() if not absolute else torch.tensor([config.q_std] * buffer.frames)
        return JointMotion(
            joint_names=config.joint_names,
            joint_types=config.joint_types,
            time=time,
            delta_q=trajectory.delta_q.to(like),
            velocity=(trajectory.delta_q / time.diff()[:, None]).to(like),
            position=trajectory.position.to(like),
            position_std=position_std.to(like),
            covariance=torch.diag(step_variance).expand(steps, -1, -1).to(like).clone(),
            residual=trajectory.residual.to(like),
            explained_fraction=trajectory.explained_fraction.to(like),
            observable=trajectory.valid[:, None].expand(-1, config.n).clone(),
            valid=trajectory.valid,
            provenance=self._provenance(q0 is not None),
        )

    def _provenance(self, q0_given: bool) -> dict[str, Any]:
        from jidm import __version__

        absolute = isinstance(self.model, EvaIDM)
        start = "given" if q0_given else "absolute, by the model" if absolute else "zero, no q0 was given"
        measured = ("residual", "explained") if self.model.kind == "vera" else ()
        unmeasured = [
            x for x in ("position_std", "covariance", "residual", "explained", "observable") if x not in measured
        ]
        return {
            "jidm": __version__,
            "model": self.model.kind,
            "source": self.source,
            "config": asdict(self.model.config),
            "flow": repr(self.flow) if self.flow is not None else None,
            "start": start,
            "not_measured": unmeasured,
        }


@dataclass(frozen=True)
class _Trajectory:
    """A decoded video: position (T, n), delta_q (T-1, n), the rest (T-1,); float64."""

    position: Tensor
    delta_q: Tensor
    residual: Tensor
    explained_fraction: Tensor
    valid: Tensor


class _StepBuffer:
    """What was measured of one video, by frame numbers."""

    def __init__(self, n: int) -> None:
        self.n, self.frames, self.dtype = n, 0, torch.float32
        self.steps: dict[tuple[int, int], tuple[Tensor, float, float]] = {}
        self.positions: dict[int, Tensor] = {}

    def finite_frames(self, frames: Iterator[Tensor]) -> Iterator[Tensor | None]:
        """The frames, None in place of one that is not finite; refuses a change of size."""
        shape: torch.Size | None = None
        for t, frame in enumerate(frames):
            if shape is not None and frame.shape != shape:
                raise VideoError(f"frame {t} is {tuple(frame.shape)}, the first is {tuple(shape)}")
            shape, self.dtype, self.frames = frame.shape, frame.dtype, t + 1
            yield frame if frame.isfinite().all() else None

    def integrate(self, q0: Tensor | None) -> _Trajectory:
        """Steps added up from q0, from zero without it."""
        position = torch.zeros(self.frames, self.n, dtype=torch.float64)
        if q0 is not None:
            position[0] = q0
        by_stop = {stop: (start, *values) for (start, stop), values in self.steps.items()}
        for t in range(1, self.frames):
            position[t] = position[t - 1]
            if t in by_stop:
                start, step, *_ = by_stop[t]
                position[t] = position[start] + step
        return self._trajectory(position)

    def from_positions(self, q0: Tensor | None) -> _Trajectory:
        """Positions as seen, shifted as a whole so that the first one seen is q0; held where not seen."""
        observed = sorted(self.positions)
        position = torch.zeros(self.frames, self.n, dtype=torch.float64)
        if not observed:
            return self._trajectory(position if q0 is None else position + q0)
        shift = torch.zeros(self.n, dtype=torch.float64) if q0 is None else q0 - self.positions[observed[0]]
        last = self.positions[observed[0]]
        for t in range(self.frames):
            last = self.positions.get(t, last)
            position[t] = last + shift
        for t in range(1, self.frames):
            if t in self.positions and t - 1 in self.positions:
                self.steps[t - 1, t] = (self.positions[t] - self.positions[t - 1], 0.0, 0.0)
        return self._trajectory(position)

    def _trajectory(self, position: Tensor) -> _Trajectory:
        delta_q = torch.zeros(self.frames - 1, self.n, dtype=torch.float64)
        residual, explained = torch.zeros(2, self.frames - 1, dtype=torch.float64)
        valid = torch.zeros(self.frames - 1, dtype=torch.bool)
        for (start, stop), (step, left, share) in self.steps.items():
            if stop == start + 1:
                delta_q[start], residual[start], explained[start], valid[start] = step, left, share, True
        return _Trajectory(position, delta_q, residual, explained, valid)


def _open_frames(path: str | Path, fps: float | None) -> tuple[Iterator[Tensor], list[float], int | None]:
    """Frames of a file as they are decoded; the clock fills up as they are taken."""
    from jidm.video.io import open_video

    source = open_video(path, fps=fps if Path(path).is_dir() else None)
    if fps is None and source.fps is None:
        raise VideoError(f"{path} states no frame rate; pass fps=")
    rate = fps if fps is not None else source.fps
    timestamps: list[float] = []

    def frames() -> Iterator[Tensor]:
        for k, (time, pixels) in enumerate(source.pixels()):
            timestamps.append(float(time) if fps is None and time is not None else k / rate)  # type: ignore[operator]
            yield pixels.to(torch.float32) / 255.0

    return frames(), timestamps, source.length


def _timestamps(video: Any, fps: float | None, length: int) -> list[float]:
    if fps is not None:
        if not (math.isfinite(fps) and fps > 0):
            raise InputError(f"fps must be positive, got {fps}")
        return [k / fps for k in range(length)]
    time = getattr(video, "time", None)
    if time is None:
        raise VideoError("frames without a clock: pass fps= (frames a second), velocities need it")
    return [float(t) for t in time]


def _with_progress(frames: Iterator[Tensor], total: int | None) -> Iterator[Tensor]:
    if total is None:
        return frames
    from tqdm import tqdm

    return iter(tqdm(frames, total=total, desc="decode", unit="frame"))
