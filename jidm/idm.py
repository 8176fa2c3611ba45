"""JacobianIDM: field, flow and solver behind one `decode`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jidm.errors import InputError, VideoError
from jidm.field.analytic import AnalyticField
from jidm.joint_motion import JointMotion, stack
from jidm.motion.flow import Flow, FlowEstimator, PrecomputedFlow, TimedFlow, as_flow_estimator
from jidm.motion.flow.base import clean
from jidm.motion.layout import as_video
from jidm.solve.track import JointLimits, PoseTracker, TrackedStep, TrackOptions

if TYPE_CHECKING:
    from jidm.field.base import JacobianField
    from jidm.robot.camera import Camera
    from jidm.robot.embodiment import Embodiment

__all__ = ["JacobianIDM", "JointMotion"]

_PRISMATIC_UNIT = 0.1
"""[m] A slide of this length counts like a turn of one radian when joints are compared."""


class JacobianIDM:
    """Inverse dynamics model of one robot seen by one camera.

    Args:
        embodiment: the robot.
        field: its Jacobian field in this camera.
        flow: optical flow estimator.
        options: of the tracking; the defaults suit most video.
        limits: which of the descriptor's limits hold inside the solve: "all" (position and speed), "position",
            "none". A sped-up or dreamt video may break speed limits; then say "position".
        flow_side: where brightness refines the flow, larger pictures are reduced to this longer side for it [px].
    """

    def __init__(
        self,
        embodiment: Embodiment,
        field: JacobianField,
        flow: FlowEstimator,
        *,
        options: TrackOptions | None = None,
        limits: str = "all",
        flow_side: int = 320,
    ) -> None:
        if limits not in ("all", "position", "none"):
            raise InputError(f"limits must be 'all', 'position' or 'none', got {limits!r}")
        self.embodiment = embodiment
        self.field = field
        self.flow = flow
        self.options = options or TrackOptions()
        self.limits = limits
        self.flow_side = flow_side

    @classmethod
    def from_embodiment(
        cls,
        embodiment: str | Embodiment,
        *,
        camera: str | Path | Camera = "front",
        flow: str | FlowEstimator = "dis",
        points: int = 4000,
        seed: int = 0,
        **options: Any,
    ) -> JacobianIDM:
        """The analytic IDM: nothing to train, needs a calibrated camera and the first frame's joint positions.

        Args:
            embodiment: a registered name or a descriptor.
            camera: a `Camera`, a JSON file, or the name of one of the embodiment's cameras.
            flow: whatever `as_flow_estimator` takes: "dis", "raft", an estimator, a function, an array.
            points: surface points in use.
            seed: of the surface sampling.
            options: `options`, `limits` and `flow_side` of the constructor.
        """
        from jidm.robot.embodiment import Embodiment

        robot = Embodiment.load(embodiment) if isinstance(embodiment, str) else embodiment
        view = _camera(robot, camera)
        field = AnalyticField(robot, view, points=points, occluders=max(20000, points), seed=seed)
        return cls(robot, field, as_flow_estimator(flow), **options)

    def decode(
        self,
        video: Any,
        *,
        q0: Sequence[float] | np.ndarray | Tensor,
        fps: float | None = None,
        flow: Flow | Tensor | None = None,
        layout: str | None = None,
        value_range: tuple[float, float] | None = None,
        progress: bool = False,
    ) -> JointMotion:
        """Joint motion of a video.

        Args:
            video: path of a video or a folder of images (streamed, memory does not grow with length), or frames in
                any layout `as_video` takes, with any batch shape.
            q0: (n,) or (*batch, n) joint positions in the first frame [rad or m].
            fps: frames a second; taken from the file where not given. Needed for arrays.
            flow: (*batch, T-1, 2, H, W) measured elsewhere, used in place of the estimator [px]. After a frame that
                shows nothing the estimator is asked all the same: no flow given spans the gap.
            layout, value_range: as for `as_video`, where an array's own shape and values leave a choice.
            progress: show a progress bar.

        Returns:
            `JointMotion` with the video's batch shape. A frame that is not finite, or not to be measured, makes its
            steps `valid=False` and leaves the others right.

        Raises:
            VideoError: the video cannot be read, has one frame, or no frame rate is known.
            InputError: q0 or flow do not fit.
        """
        start = torch.as_tensor(np.asarray(q0, dtype=np.float64) if not isinstance(q0, Tensor) else q0)
        if start.shape[-1:] != (self.embodiment.n,):
            raise InputError(
                f"q0 must hold {self.embodiment.n} joints ({', '.join(self.embodiment.joint_names)}), "
                f"got shape {tuple(start.shape)}"
            )
        if not start.isfinite().all():
            raise InputError("q0 holds NaN or infinity; give the joint positions of the first frame")
        if isinstance(video, (str, Path)):
            if start.dim() != 1:
                raise InputError(f"q0 must be ({self.embodiment.n},) for one file, got shape {tuple(start.shape)}")
            frames, times, length = _stream(video, fps)
            return self._decode_one(frames, times, start, flow, length if progress else None)
        tensor = as_video(getattr(video, "frames", video), layout=layout, value_range=value_range, min_frames=2)
        time = _times(video, fps, tensor.shape[-4])
        batch = tensor.shape[:-4]
        if not _expands(start.shape[:-1], batch):
            raise InputError(f"q0 of shape {tuple(start.shape)} does not fit a video with batch shape {tuple(batch)}")
        start = start.expand(*batch, self.embodiment.n).reshape(-1, self.embodiment.n)
        clips = tensor.reshape(-1, *tensor.shape[-4:])
        flows = _split_flow(flow, batch, tensor.shape)
        motions = [
            self._decode_one(iter(clip), iter(time), q, f, len(clip) if progress else None)
            for clip, q, f in zip(clips, start, flows, strict=True)
        ]
        return stack(motions, batch) if batch else motions[0]

    # ---- pieces -----------------------------------------------------------------------------------------------------

    def _decode_one(
        self,
        frames: Iterator[Tensor],
        times: Iterator[float],
        q0: Tensor,
        flow: Flow | Tensor | None,
        progress_total: int | None,
    ) -> JointMotion:
        first = next(frames, None)
        if first is None:
            raise VideoError("the video has no frames")
        if not first.isfinite().all():
            raise VideoError("the first frame is not finite; q0 belongs to a frame that shows the robot")
        self._check_size(first)
        q = q0.to(first)
        tracker = PoseTracker(self.field, self._joint_limits(q), self.options)
        tracker.start(first, q)
        clock = [next(times)]
        steps: list[TrackedStep] = []
        good, good_index = first, 0
        for k, frame in enumerate(_with_progress(frames, progress_total)):
            clock.append(next(times))
            dt = clock[-1] - clock[-2]
            if frame.shape != first.shape:
                raise VideoError(f"frame {k + 1} is {tuple(frame.shape)}, the first is {tuple(first.shape)}")
            if not frame.isfinite().all():
                steps.append(tracker.skip(dt))
                continue
            steps.append(tracker.step(frame, dt, self._flow_between(good, frame, flow, good_index, k + 1)))
            if steps[-1].used:
                good, good_index = frame, k + 1
        if not steps:
            raise VideoError("the video has one frame; motion lies between frames, give at least two")
        return self._motion(q, clock, steps)

    def _flow_between(self, first: Tensor, second: Tensor, given: Flow | Tensor | None, start: int, stop: int) -> Flow:
        """Flow between frames number `start` and `stop`; a flow given for single steps says nothing across a gap."""
        height, width = first.shape[-2:]
        if given is None or stop > start + 1:
            if isinstance(self.flow, PrecomputedFlow) and stop > start + 1:
                return Flow(torch.zeros_like(first[:2]), torch.zeros_like(first[0]))
            if isinstance(self.flow, TimedFlow):
                return self.flow.between(first, second, start, stop)
            scale = self.flow_side / max(height, width)
            if self.options.refine == "none" or scale >= 1:
                return self.flow(first, second)
            # Brightness does the measuring; the flow only has to start it and to tell what moved.
            small = [_shrunk(frame, round(height * scale), round(width * scale)) for frame in (first, second)]
            return self.flow(small[0], small[1]).resized(height, width)
        vectors = given.flow if isinstance(given, Flow) else given
        if vectors.dim() != 4 or start >= len(vectors) or vectors.shape[1:] != (2, height, width):
            raise InputError(
                f"flow must be (T-1, 2, {height}, {width}) for this video, got {tuple(vectors.shape)} at step {start}"
            )
        if isinstance(given, Flow):
            return given[start]
        return clean(given[start], torch.ones_like(given[start, 0]))

    def _check_size(self, frame: Tensor) -> None:
        """The field's pixels must be the video's."""
        height, width = frame.shape[-2:]
        camera = getattr(self.field, "camera", None)
        if camera is None or (camera.width, camera.height) == (width, height):
            return
        raise VideoError(
            f"the video is {width}x{height}, the camera {camera.width}x{camera.height}: "
            f"pass camera=camera.resized({width}, {height}) if the camera saw the whole picture"
        )

    def _joint_limits(self, like: Tensor) -> JointLimits:
        robot = self.embodiment
        infinite = np.full(robot.n, np.inf)
        prismatic = np.array([t == "prismatic" for t in robot.joint_types])
        bounded, timed = self.limits != "none", self.limits == "all"
        values = (
            robot.lower if bounded else -infinite,
            robot.upper if bounded else infinite,
            robot.velocity if timed else infinite,
            np.where(prismatic, _PRISMATIC_UNIT, 1.0),
        )
        return JointLimits(*(torch.from_numpy(np.array(v)).to(like) for v in values))

    def _motion(self, q0: Tensor, clock: list[float], steps: list[TrackedStep]) -> JointMotion:
        time = torch.tensor(clock, dtype=torch.float64)
        delta_q = torch.stack([s.delta_q for s in steps])
        covariances = torch.stack(
            [torch.zeros_like(steps[0].position_covariance), *(s.position_covariance for s in steps)]
        )
        return JointMotion(
            joint_names=tuple(self.embodiment.joint_names),
            joint_types=tuple(self.embodiment.joint_types),
            time=time,
            delta_q=delta_q,
            velocity=delta_q / time.diff().to(delta_q)[:, None],
            position=torch.stack([q0, *(s.position for s in steps)]),
            position_std=covariances.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt(),
            covariance=torch.stack([s.covariance for s in steps]),
            residual=torch.stack([s.residual for s in steps]),
            explained=torch.stack([s.explained for s in steps]),
            observable=torch.stack([s.observable for s in steps]),
            valid=torch.tensor([s.valid for s in steps]),
            provenance=self._provenance(),
        )

    def _provenance(self) -> dict[str, Any]:
        from jidm import __version__

        camera = getattr(self.field, "camera", None)
        return {
            "jidm": __version__,
            "embodiment": self.embodiment.name,
            "embodiment_hash": self.embodiment.content_hash,
            "field": type(self.field).__name__,
            "seed": getattr(self.field, "seed", None),
            "flow": type(self.flow).__name__,
            "limits": self.limits,
            "flow_side": self.flow_side,
            "options": asdict(self.options),
            "camera": camera.to_dict() if camera is not None else None,
        }


def _camera(robot: Embodiment, camera: str | Path | Camera) -> Camera:
    from jidm.robot.camera import Camera

    if isinstance(camera, Camera):
        return camera
    if isinstance(camera, str) and camera in robot.cameras:
        return robot.camera(camera)
    if str(camera).endswith(".json") or Path(camera).exists():
        return Camera.load(camera)
    return robot.camera(str(camera))  # raises with the known names


def _stream(path: str | Path, fps: float | None) -> tuple[Iterator[Tensor], Iterator[float], int | None]:
    from jidm.motion.video import open_video

    source = open_video(path, fps=fps if Path(path).is_dir() else None)
    if fps is None and source.fps is None:
        raise VideoError(f"{path} states no frame rate; pass fps=")
    shown: list[float] = []

    def frames() -> Iterator[Tensor]:
        for k, (time, pixels) in enumerate(source.pixels()):
            shown.append(k / fps if fps is not None else float(time if time is not None else k / source.fps))  # type: ignore[operator]
            yield pixels.to(torch.float32) / 255.0

    def times() -> Iterator[float]:
        while True:
            yield shown.pop(0)

    return frames(), times(), source.length


def _times(video: Any, fps: float | None, length: int) -> list[float]:
    if fps is not None:
        if not (math.isfinite(fps) and fps > 0):
            raise InputError(f"fps must be positive, got {fps}")
        return [k / fps for k in range(length)]
    time = getattr(video, "time", None)
    if time is None:
        raise VideoError("frames without a clock: pass fps= (frames a second), velocities need it")
    return [float(t) for t in time]


def _expands(shape: torch.Size, batch: torch.Size) -> bool:
    """Whether values of this batch shape serve a video of that one."""
    return len(shape) <= len(batch) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(batch)))


def _split_flow(
    flow: Flow | Tensor | None, batch: torch.Size, shape: torch.Size
) -> Iterable[Flow | Float[Tensor, "S 2 H W"] | None]:
    count = math.prod(batch)
    if flow is None:
        return [None] * count
    vectors = flow.flow if isinstance(flow, Flow) else flow
    expected = (*batch, shape[-4] - 1, 2, *shape[-2:])
    if tuple(vectors.shape) != tuple(expected):
        raise InputError(f"flow must be {tuple(expected)} for this video, got {tuple(vectors.shape)}")
    if isinstance(flow, Flow):
        weight = flow.weight.reshape(count, *flow.weight.shape[len(batch) :])
        return [Flow(f, w) for f, w in zip(vectors.reshape(count, *expected[len(batch) :]), weight, strict=True)]
    return list(vectors.reshape(count, *expected[len(batch) :]))


def _shrunk(frame: Float[Tensor, "3 H W"], height: int, width: int) -> Float[Tensor, "3 h w"]:
    return torch.nn.functional.interpolate(
        frame[None], size=(height, width), mode="bilinear", align_corners=False, antialias=True
    )[0]


def _with_progress(frames: Iterator[Tensor], total: int | None) -> Iterator[Tensor]:
    if total is None:
        return frames
    from tqdm import tqdm

    return iter(tqdm(frames, total=total - 1, desc="decode", unit="frame"))
