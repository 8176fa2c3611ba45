"""JacobianIDM: field, flow and solver behind one `decode`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jidm.errors import CheckpointError, InputError, VideoError
from jidm.estimation.analytic_tracker import AnalyticTracker, AnalyticTrackerOptions, JointLimits, TrackedStep
from jidm.estimation.factors.learned import predict_steps
from jidm.estimation.learned_tracker import LearnedTracker, LearnedTrackerOptions, training_limits
from jidm.estimation.result import JointMotion, stack
from jidm.estimation.smoother import smooth_motion
from jidm.fields.analytic import AnalyticField
from jidm.fields.base import PosePredictor
from jidm.fields.free import LearnedField
from jidm.fields.hybrid import HybridField
from jidm.flow import Flow, FlowEstimator, FlowSource, as_flow_estimator, split_flow
from jidm.idm.stream import MotionStream
from jidm.video.layouts import as_video
from jidm.video.letterbox import Letterbox
from jidm.video.timestamps import frame_timestamps, timestamped_stream

if TYPE_CHECKING:
    from jidm.camera.model import Camera
    from jidm.checkpoint import Checkpoint
    from jidm.fields.base import JacobianField
    from jidm.robot.embodiment import Embodiment

__all__ = ["JacobianIDM", "JointMotion"]

_PRISMATIC_SCALE = 0.1
"""[m] A slide of this length counts like a turn of one radian when joints are compared."""


class JacobianIDM:
    """Inverse dynamics model of one robot seen by one camera.

    Args:
        embodiment: the robot; may be None for a learned field, whose joints then have the names and the range of its
            training.
        field: its Jacobian field in this camera.
        flow: optical flow estimator; may be None for a learned field, which matches the pictures itself.
        options: of the tracking (`FollowOptions` for a learned field); the defaults suit most video.
        limits: which of the descriptor's limits hold inside the solve: "all" (position and speed), "position",
            "none". A sped-up or dreamt video may break speed limits; then say "position".
        flow_side: where brightness refines the flow, larger pictures are reduced to this longer side for it [px].
    """

    def __init__(
        self,
        embodiment: Embodiment | None,
        field: JacobianField | LearnedField,
        flow: FlowEstimator | None,
        *,
        options: AnalyticTrackerOptions | LearnedTrackerOptions | None = None,
        limits: str = "all",
        flow_resolution: int = 320,
    ) -> None:
        if limits not in ("all", "position", "none"):
            raise InputError(f"limits must be 'all', 'position' or 'none', got {limits!r}")
        learned = isinstance(field, LearnedField)
        if not learned and (embodiment is None or flow is None):
            raise InputError("this field needs an embodiment and a flow estimator; only a learned one does without")
        options_type = LearnedTrackerOptions if learned else AnalyticTrackerOptions
        if options is not None and not isinstance(options, options_type):
            raise InputError(f"a {type(field).__name__} is followed with {options_type.__name__}, got {options!r}")
        self.embodiment = embodiment
        self.field = field
        self.flow = flow
        self.options = options or options_type()
        self.limits = limits
        self.flow_resolution = flow_resolution
        self.checkpoint: Mapping[str, Any] = {}

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
        from jidm.robot.registry import load_embodiment

        robot = load_embodiment(embodiment)
        camera_model = robot.camera(camera)
        field = AnalyticField(robot, camera_model, points=points, occluders=max(20000, points), seed=seed)
        return cls(robot, field, as_flow_estimator(flow), **options)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | Checkpoint,
        *,
        embodiment: str | Embodiment | None = None,
        camera: str | Path | Camera | None = None,
        flow: str | FlowEstimator | None = None,
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> JacobianIDM:
        """A trained IDM: nothing to calibrate, no known first pose needed.

        Args:
            source: a checkpoint folder, the name of a bundled one, or a hub id.
            embodiment: the robot, a registered name or a descriptor; refused if the checkpoint was trained for another.
                If not given, the one the checkpoint names, where it is registered and unchanged.
            camera: a `Camera`, a JSON file, or the name of one of the embodiment's cameras. If given, the exact field
                of URDF and camera takes the place of the learned one, followed as by `from_embodiment`, and the network
                reads the first pose where it is not given (`HybridField`). The camera's size must be the video's.
                "trained" is the camera of the self-play that the checkpoint was trained on.
            flow: whatever `as_flow_estimator` takes: measures the motion in place of the network. Worth it where the field
                was learned from such flow and is too rough to look closer by; elsewhere closer looks are better. With a
                camera "dis" if not given, to start from.
            device: where the network computes.
            options: `options` and `limits` of the constructor.

        Raises:
            CheckpointError: there is no such checkpoint, it is damaged, of another kind, or of another robot.
        """
        from jidm.camera.model import Camera
        from jidm.checkpoint import Checkpoint, load_checkpoint

        checkpoint = source if isinstance(source, Checkpoint) else load_checkpoint(source)
        if checkpoint.kind != LearnedField.kind:
            raise CheckpointError(
                f"{checkpoint.source}: holds a model of kind '{checkpoint.kind}', not a Jacobian field; "
                "load it with jidm.model_registry.load_idm"
            )
        learned = LearnedField.from_config(checkpoint.config)
        checkpoint.load_into(learned)
        learned = learned.eval().requires_grad_(False).to(device)
        robot = _checkpoint_embodiment(checkpoint, embodiment)
        field: LearnedField | HybridField = learned
        if camera is not None:
            if robot is None:
                raise InputError("an exact field needs the robot; pass embodiment= as well as camera=")
            camera_model = (
                Camera.from_dict(checkpoint.training_camera()) if camera == "trained" else robot.camera(camera)
            )
            field = HybridField(learned, robot, camera_model)
            flow = flow or "dis"
        idm = cls(robot, field, None if flow is None else as_flow_estimator(flow), **options)
        idm.checkpoint = {"source": checkpoint.source, "content_hash": checkpoint.content_hash}
        return idm

    @property
    def joint_names(self) -> tuple[str, ...]:
        """Names of the n joints, the order of every joint axis."""
        return tuple(self.field.joint_names)

    def predict_steps(
        self, first: Float[Tensor, "b 3 H W"], second: Float[Tensor, "b 3 H W"], before: Tensor | None = None
    ) -> Float[Tensor, "b n"]:
        """Joint steps [rad or m] of unrelated pairs of frames by a learned field; `before` is not needed.

        Raises:
            InputError: the field is not learned: it needs to be told the pose.
        """
        if not isinstance(self.field, LearnedField):
            raise InputError("steps of unrelated pairs need a learned field; decode a video from a known first pose")
        return predict_steps(self.field, self.field.letterbox(first), self.field.letterbox(second))

    def decode(
        self,
        video: Any,
        *,
        q0: Sequence[float] | np.ndarray | Tensor | None = None,
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
            q0: (n,) or (*batch, n) joint positions in the first frame [rad or m]. A learned field reads them off the
                picture if not given.
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
        return self._decode(video, q0, fps, flow, layout, value_range, progress, keep_history=False)[0]

    def decode_whole(
        self,
        video: str | Path | Any,
        *,
        q0: Sequence[float] | np.ndarray | Tensor | None = None,
        fps: float | None = None,
        flow: Flow | Tensor | None = None,
        layout: str | None = None,
        value_range: tuple[float, float] | None = None,
        progress: bool = False,
    ) -> tuple[JointMotion, JointMotion]:
        """A video that is there as a whole: its motion as `decode` tells it, and told by all frames, later ones too.

        A learned field's filter is run backwards as well, so that what later pictures show of pose and motion corrects
        earlier steps; memory grows by (2n)^2 numbers a frame. Then the motion is `smoothed`, as an analytic field's is.
        Arguments and errors as of `decode`.
        """
        motion, smoothed_motion = self._decode(video, q0, fps, flow, layout, value_range, progress, keep_history=True)
        return motion, smooth_motion(motion if smoothed_motion is None else smoothed_motion)

    def _decode(
        self, video: Any, q0: Any, fps: float | None, flow: Flow | Tensor | None, layout: str | None,
        value_range: tuple[float, float] | None, progress: bool, *, keep_history: bool,
    ) -> tuple[JointMotion, JointMotion | None]:  # fmt: skip
        start = self._initial_q(q0)
        if isinstance(video, (str, Path)):
            if start.dim() != 1:
                raise InputError(f"q0 must be ({start.shape[-1]},) for one file, got shape {tuple(start.shape)}")
            frames, times, length = timestamped_stream(video, fps)
            return self._decode_one(
                frames, times, None if q0 is None else start, flow, length if progress else None, keep_history
            )
        tensor = as_video(getattr(video, "frames", video), layout=layout, value_range=value_range, min_frames=2)
        time = frame_timestamps(video, fps, tensor.shape[-4])
        batch = tensor.shape[:-4]
        if not _is_broadcastable(start.shape[:-1], batch):
            raise InputError(f"q0 of shape {tuple(start.shape)} does not fit a video with batch shape {tuple(batch)}")
        start = start.expand(*batch, start.shape[-1]).reshape(-1, start.shape[-1])
        clips = tensor.reshape(-1, *tensor.shape[-4:])
        flows = split_flow(flow, tensor.shape)
        motions = [
            self._decode_one(
                iter(clip), iter(time), None if q0 is None else q, f, len(clip) if progress else None, keep_history
            )
            for clip, q, f in zip(clips, start, flows, strict=True)
        ]
        if not batch:
            return motions[0]
        smoothed_motions = [x for _, x in motions if x is not None]
        return stack([x for x, _ in motions], batch), stack(smoothed_motions, batch) if smoothed_motions else None

    # ---- pieces -----------------------------------------------------------------------------------------------------

    def _initial_q(self, q0: Sequence[float] | np.ndarray | Tensor | None) -> Float[Tensor, "*batch n"]:
        """q0 as a tensor; NaN, which nobody reads, where the field will look for itself."""
        n = len(self.joint_names)
        if q0 is None:
            if not isinstance(self.field, (LearnedField, PosePredictor)):
                raise InputError(
                    f"q0, the {n} joint positions in the first frame, must be given; only a trained checkpoint reads them "
                    "off the picture"
                )
            return torch.full((n,), torch.nan)
        start = q0 if isinstance(q0, Tensor) else torch.from_numpy(np.array(q0, dtype=np.float64))
        if start.shape[-1:] != (n,):
            raise InputError(f"q0 must hold {n} joints ({', '.join(self.joint_names)}), got shape {tuple(start.shape)}")
        if not start.isfinite().all():
            raise InputError("q0 holds NaN or infinity; give the joint positions of the first frame")
        return start

    def stream(
        self, first: Float[Tensor, "3 H W"], *, time: float = 0.0, q0: Sequence[float] | np.ndarray | Tensor | None = None,
        flow: Flow | Tensor | None = None, keep_history: bool = False,
    ) -> MotionStream:  # fmt: skip
        """Follow a robot through frames as they come; see `MotionStream`.

        Args:
            first: the first frame, RGB in [0, 1]. time: of it [s].
            q0: (n,) joint positions it shows [rad or m]; a learned field reads them off the picture if not given.
            flow: (T-1, 2, H, W) between the frames to come, where it was measured elsewhere [px].
            keep_history: keep what `MotionStream.looking_back` needs.

        Raises:
            VideoError: the frame is not finite, or not of the size the field is for.
            InputError: q0 does not fit.
        """
        start = self._initial_q(q0)
        if start.dim() != 1:
            raise InputError(f"q0 must be ({start.shape[-1]},) for one video, got shape {tuple(start.shape)}")
        if not first.isfinite().all():
            raise VideoError("the first frame is not finite; q0 belongs to a frame that shows the robot")
        self._check_size(first)
        like = first if not isinstance(self.field, LearnedField) else self.field.delta_std
        tracker = self._make_tracker(like, keep_history)
        tracker.start(self._letterbox(first), None if q0 is None else start.to(like))
        return MotionStream(tracker, first, time, self._letterbox, self._letterbox_flow, self._flow_source(flow))

    def _decode_one(
        self,
        frames: Iterator[Tensor],
        times: Iterator[float],
        q0: Tensor | None,
        flow: Flow | Tensor | None,
        progress_total: int | None,
        keep_history: bool,
    ) -> tuple[JointMotion, JointMotion | None]:
        first = next(frames, None)
        if first is None:
            raise VideoError("the video has no frames")
        timestamps = [next(times)]
        stream = self.stream(first, time=timestamps[0], q0=q0, flow=flow, keep_history=keep_history)
        q, covariance = stream.q, stream.position_covariance
        steps: list[TrackedStep] = []
        for frame in _with_progress(frames, progress_total):
            timestamps.append(next(times))
            steps.append(stream.push(frame, timestamps[-1]))
        if not steps:
            raise VideoError("the video has one frame; motion lies between frames, give at least two")
        motion = self._assemble(q, covariance, timestamps, steps)
        smoothed_steps = stream.smooth(steps) if keep_history else None
        return motion, None if smoothed_steps is None else self._assemble(q, covariance, timestamps, smoothed_steps)

    def _make_tracker(self, like: Tensor, keep_history: bool) -> Any:
        limits = self._joint_limits(like)
        if isinstance(self.field, LearnedField):
            return LearnedTracker(self.field, limits, self.options, keep_history=keep_history)  # type: ignore[arg-type]
        return AnalyticTracker(self.field, limits, self.options)  # type: ignore[arg-type]

    def _letterbox(self, frame: Float[Tensor, "3 H W"]) -> Tensor:
        """The frame in the size the field reads."""
        return self.field.letterbox(frame) if isinstance(self.field, LearnedField) else frame

    def _letterbox_flow(self, flow: Flow) -> Flow:
        """Flow of the video as that of the pictures the field reads."""
        if not isinstance(self.field, LearnedField):
            return flow
        height, width = flow.weight.shape[-2:]
        return Letterbox(height, width, self.field.config.height, self.field.config.width).apply_to_flow(flow)

    def _flow_source(self, precomputed: Flow | Tensor | None) -> FlowSource:
        if isinstance(self.field, LearnedField):
            return FlowSource(self.flow, precomputed, bidirectional=True)
        # Where brightness does the measuring, flow only has to start it and to tell what moved.
        starts_only = isinstance(self.options, AnalyticTrackerOptions) and self.options.refine != "none"
        return FlowSource(self.flow, precomputed, resolution=self.flow_resolution if starts_only else None)

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
        if robot is None:
            assert isinstance(self.field, LearnedField)
            return training_limits(self.field.config, like)
        infinite = np.full(robot.n, np.inf)
        prismatic = np.array([t == "prismatic" for t in robot.joint_types])
        position_limited, velocity_limited = self.limits != "none", self.limits == "all"
        values = (
            robot.lower if position_limited else -infinite,
            robot.upper if position_limited else infinite,
            robot.velocity if velocity_limited else infinite,
            np.where(prismatic, _PRISMATIC_SCALE, 1.0),
        )
        return JointLimits(*(torch.from_numpy(np.array(v)).to(like) for v in values))

    def _assemble(self, q0: Tensor, start: Tensor, timestamps: list[float], steps: list[TrackedStep]) -> JointMotion:
        """Steps as one motion from q0 on, which is known to the covariance `start`."""
        time = torch.tensor(timestamps, dtype=torch.float64)
        delta_q = torch.stack([s.delta_q for s in steps])
        covariances = torch.stack([start, *(s.position_covariance for s in steps)])
        return JointMotion(
            joint_names=self.joint_names,
            joint_types=self._joint_types,
            time=time,
            delta_q=delta_q,
            velocity=delta_q / time.diff().to(delta_q)[:, None],
            position=torch.stack([q0, *(s.position for s in steps)]),
            position_std=covariances.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt(),
            covariance=torch.stack([s.covariance for s in steps]),
            residual=torch.stack([s.residual for s in steps]),
            explained_fraction=torch.stack([s.explained_fraction for s in steps]),
            observable=torch.stack([s.observable for s in steps]),
            valid=torch.tensor([s.valid for s in steps]),
            provenance=self._provenance(),
        )

    @property
    def _joint_types(self) -> tuple[str, ...]:
        if self.embodiment is not None:
            return tuple(self.embodiment.joint_types)
        assert isinstance(self.field, LearnedField)
        return self.field.config.joint_types

    def _provenance(self) -> dict[str, Any]:
        from jidm import __version__

        camera = getattr(self.field, "camera", None)
        return {
            "jidm": __version__,
            "embodiment": None if self.embodiment is None else self.embodiment.name,
            "embodiment_hash": None if self.embodiment is None else self.embodiment.content_hash,
            "field": type(self.field).__name__,
            "checkpoint": dict(self.checkpoint) or None,
            "seed": getattr(self.field, "seed", None),
            "flow": None if self.flow is None else type(self.flow).__name__,
            "limits": self.limits,
            "flow_side": self.flow_resolution,
            "options": asdict(self.options),
            "camera": camera.to_dict() if camera is not None else None,
        }


def _checkpoint_embodiment(checkpoint: Checkpoint, embodiment: str | Embodiment | None) -> Embodiment | None:
    """The robot a checkpoint is used on; None where nobody knows one."""
    from jidm.robot.registry import embodiment_names, load_embodiment

    if embodiment is None:
        record = checkpoint.embodiment
        if record is None or record["name"] not in embodiment_names():
            return None
        embodiment = str(record["name"])
    robot = load_embodiment(embodiment)
    checkpoint.check_embodiment(robot)
    return robot


def _is_broadcastable(shape: torch.Size, batch: torch.Size) -> bool:
    """Whether values of this batch shape serve a video of that one."""
    return len(shape) <= len(batch) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(batch)))


def _with_progress(frames: Iterator[Tensor], total: int | None) -> Iterator[Tensor]:
    if total is None:
        return frames
    from tqdm import tqdm

    return iter(tqdm(frames, total=total - 1, desc="decode", unit="frame"))
