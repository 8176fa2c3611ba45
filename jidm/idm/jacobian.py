"""JacobianIDM: decodes video with a Jacobian field, optical flow and a tracker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jidm.errors import CheckpointError, InputError, VideoError
from jidm.estimation.measurement_models import Options, measurement_model
from jidm.estimation.result import JointMotion
from jidm.estimation.smoother import smooth_motion
from jidm.estimation.step_columns import StepColumns
from jidm.estimation.tracker import JointLimits, TrackedStep, Tracker
from jidm.fields.analytic import AnalyticField
from jidm.fields.free import LearnedField
from jidm.fields.hybrid import HybridField
from jidm.flow import Flow, FlowEstimator, as_flow_estimator
from jidm.idm.base import Q0, InverseDynamicsModel
from jidm.idm.decoding import check_q0
from jidm.idm.device import find_device
from jidm.idm.stream import MotionStream
from jidm.video.timestamps import TimedFrame

if TYPE_CHECKING:
    from jidm.camera.model import Camera
    from jidm.checkpoint import Checkpoint
    from jidm.fields.base import JacobianField
    from jidm.robot.embodiment import Embodiment

_PRISMATIC_SCALE = 0.1
"""[m] Scale of prismatic joints relative to 1 rad of revolute ones."""


class JacobianIDM(InverseDynamicsModel):
    """Inverse dynamics model of one robot in one camera.

    Args:
        embodiment: the robot; may be None for a learned field, whose joint names and limits are then those of its training.
        field: Jacobian field of the robot in this camera.
        flow: optical flow estimator; may be None for a learned field, which matches the frames itself.
        options: `AnalyticOptions`, or `LearnedOptions` for a learned field; the defaults suit most video.
        limits: limits of the embodiment that hold: "all" (position and speed), "position" or "none". Generated or sped-up
            video may break speed limits; then use "position".
        flow_resolution: longer side to which frames are reduced for flow that only starts the alignment [px].

    Raises:
        InputError: embodiment or flow is missing, or the options are for another kind of field.
    """

    def __init__(
        self,
        embodiment: Embodiment | None,
        field: JacobianField | LearnedField,
        flow: FlowEstimator | None,
        *,
        options: Options | None = None,
        limits: str = "all",
        flow_resolution: int = 320,
    ) -> None:
        if limits not in ("all", "position", "none"):
            raise InputError(f"limits must be 'all', 'position' or 'none', got {limits!r}")
        model = measurement_model(field, options)
        if (model.requires_embodiment and embodiment is None) or (model.requires_flow and flow is None):
            raise InputError("this field needs an embodiment and a flow estimator; only a learned one does without")
        self.embodiment = embodiment
        self.field = field
        self.flow = flow
        self.options: Options = model.options
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
        links: Sequence[str] | None = None,
        **options: Any,
    ) -> JacobianIDM:
        """The analytic IDM, without training; needs a calibrated camera and the joint positions in the first frame.

        Args:
            embodiment: anything that `load_embodiment` takes: a registered name, a file, a folder, an `Embodiment`.
            camera: a `Camera`, a JSON file, or the name of one of the embodiment's cameras.
            flow: any argument of `as_flow_estimator`: "dis", "raft", an estimator, a function, an array.
            points: number of surface points.
            seed: of the surface sampling.
            links: names or patterns of the links to sample, as for `AnalyticField`, for instance the arms of a humanoid. A
                joint that moves none of them is not observable, and its position is held.
            options: `options`, `limits` and `flow_resolution` of the constructor.
        """
        from jidm.robot.registry import load_embodiment

        robot = load_embodiment(embodiment)
        field = AnalyticField(
            robot, robot.camera(camera), points=points, occluders=max(20000, points), seed=seed, links=links
        )
        return cls(robot, field, as_flow_estimator(flow), **options)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | Checkpoint,
        *,
        embodiment: str | Embodiment | None = None,
        camera: str | Path | Camera | None = None,
        links: Sequence[str] | None = None,
        flow: str | FlowEstimator | None = None,
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> JacobianIDM:
        """A trained IDM, which needs neither a calibrated camera nor a known first pose.

        Args:
            source: a checkpoint folder, the name of a bundled one, or a hub id.
            embodiment: the robot, anything that `load_embodiment` takes. If not given, the one named in the checkpoint, if it
                is registered; it must be unchanged since the training.
            camera: a `Camera`, a JSON file, or the name of one of the embodiment's cameras. With it, the exact field of URDF
                and camera replaces the learned one, and the network only predicts the first pose (`HybridField`). Its size
                must be that of the video. "trained" is the camera of the babbling data of the checkpoint.
            links: of the exact field, as for `from_embodiment`.
            flow: any argument of `as_flow_estimator`; replaces the network's matching, which helps fields that were trained
                on such flow and are not accurate enough for direct alignment. With a camera, "dis" if not given.
            device: where the network computes: cpu, cuda, cuda:1, ... or mps.
            options: `options` and `limits` of the constructor.

        Raises:
            CheckpointError: the checkpoint does not exist, is damaged, of another kind, or of another robot.
            InputError: this machine does not have the device.
        """
        from jidm.camera.model import Camera
        from jidm.checkpoint import Checkpoint, load_checkpoint

        place = find_device(device)
        checkpoint = source if isinstance(source, Checkpoint) else load_checkpoint(source)
        if checkpoint.kind != LearnedField.kind:
            raise CheckpointError(
                f"{checkpoint.source}: holds a model of kind '{checkpoint.kind}', not a Jacobian field; "
                "load it with jidm.model_registry.load_idm"
            )
        learned = LearnedField.from_config(checkpoint.config)
        checkpoint.load_into(learned)
        learned = learned.eval().requires_grad_(False).to(place)
        robot = _checkpoint_embodiment(checkpoint, embodiment)
        field: LearnedField | HybridField = learned
        if links is not None and camera is None:
            raise InputError("links chooses what an exact field samples; a learned one has none: pass camera= as well")
        if camera is not None:
            if robot is None:
                raise InputError("an exact field needs the robot; pass embodiment= as well as camera=")
            trained = camera == "trained"
            camera_model = Camera.from_dict(checkpoint.training_camera()) if trained else robot.camera(camera)
            field = HybridField(learned, robot, camera_model, links=links)
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
        """Joint steps [rad or m] of unrelated pairs of frames by a learned field; `before` is not used.

        Raises:
            InputError: the field is not learned, so that it needs the pose.
        """
        return measurement_model(self.field, self.options).predict_steps(first, second)

    def stream(
        self, first: Float[Tensor, "3 H W"], *, time: float = 0.0, q0: Q0 = None, flow: Flow | Tensor | None = None,
        keep_history: bool = False,
    ) -> MotionStream:  # fmt: skip
        """Track a robot through a stream of frames, see `MotionStream`.

        Args:
            first: the first frame, RGB in [0, 1]. time: of it [s].
            q0: (n,) joint positions in it [rad or m]; a trained model predicts them if not given.
            flow: (T-1, 2, H, W) external flow between the frames to come [px].
            keep_history: store what `MotionStream.smooth` needs.

        Raises:
            VideoError: the frame is not finite or does not have the size of the camera.
            InputError: q0 does not fit.
        """
        model, start = measurement_model(self.field, self.options), check_q0(q0, self.joint_names)
        if start is None and not model.predicts_pose:
            raise InputError(
                f"q0, the {len(self.joint_names)} joint positions in the first frame, must be given; only a trained "
                "checkpoint predicts them from the frame"
            )
        if start is not None and start.dim() != 1:
            raise InputError(f"q0 must be ({start.shape[-1]},) for one video, got shape {tuple(start.shape)}")
        if not first.isfinite().all():
            raise VideoError("the first frame is not finite; q0 belongs to a frame that shows the robot")
        like = model.dtype_of(first)
        tracker = Tracker(model, self._joint_limits(like), keep_history=keep_history)
        tracker.start(model.letterbox(first), None if start is None else start.to(like))
        return MotionStream(tracker, model, first, time, model.flow_source(self.flow, flow, self.flow_resolution))

    def decode_clip(
        self, frames: Iterator[TimedFrame], q0: Float[Tensor, " n"] | None, flow: Flow | Tensor | None = None,
        *, smooth: bool = False,
    ) -> tuple[JointMotion, JointMotion]:  # fmt: skip
        """Track one clip, see `InverseDynamicsModel.decode_clip`."""
        start, first = next(frames, (0.0, None))
        if first is None:
            raise VideoError("the video has no frames")
        stream = self.stream(first, time=start, q0=q0, flow=flow, keep_history=smooth)
        q, covariance = stream.q, stream.position_covariance
        timestamps, columns, history = [start], StepColumns(), []
        for time, frame in frames:
            timestamps.append(time)
            step = stream.push(frame, time)
            columns.append(step)
            if smooth:
                history.append(step)
        if columns.last is None:
            raise VideoError("the video has one frame; motion lies between frames, give at least two")
        filtered = self.assemble(q, covariance, timestamps, columns)
        if not smooth:
            return filtered, filtered
        smoothed = self.assemble(q, covariance, timestamps, StepColumns(stream.smooth(history)))
        measured = _measured_steps(history)
        return filtered, smooth_motion(
            smoothed,
            None if measured is None else self.assemble(q, covariance, timestamps, StepColumns(measured)),
        )

    def for_frame_size(self, video_size: tuple[int, int], frame_size: tuple[int, int]) -> JacobianIDM:
        """The model for reduced frames: the camera of an exact field is scaled, if it is that of the video."""
        field = self.field
        if video_size == frame_size or not isinstance(field, AnalyticField):
            return self
        if (field.camera.height, field.camera.width) != video_size:
            return self  # the tracker refuses the frames, and names both sizes
        height, width = frame_size
        scaled = copy(self)
        scaled.field = field.with_camera(field.camera.resized(width, height))
        return scaled

    # ---- pieces -----------------------------------------------------------------------------------------------------

    def _joint_limits(self, like: Tensor) -> JointLimits:
        robot = self.embodiment
        if robot is None:
            return measurement_model(self.field, self.options).training_limits(like)
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

    def assemble(self, q0: Tensor, covariance: Tensor, timestamps: list[float], steps: StepColumns) -> JointMotion:
        """Tracked steps, at least one, as one motion that starts at q0, with that covariance."""
        assert steps.last is not None
        time, columns = torch.tensor(timestamps, dtype=torch.float64), steps.columns()
        delta_q, variance = columns["delta_q"], columns.pop("position_variance")
        return JointMotion(
            joint_names=self.joint_names,
            joint_types=self._joint_types,
            time=time,
            velocity=delta_q / time.diff().to(delta_q)[:, None],
            position=torch.cat([q0[None], columns.pop("position")]),
            position_std=torch.cat([covariance.diagonal()[None], variance]).clamp(min=0).sqrt(),
            provenance={**self._provenance(), "verdict": steps.last.agreement.verdict},
            **columns,
        )

    @property
    def _joint_types(self) -> tuple[str, ...]:
        if self.embodiment is not None:
            return tuple(self.embodiment.joint_types)
        return measurement_model(self.field, self.options).joint_types

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
            "flow_resolution": self.flow_resolution,
            "options": asdict(self.options),
            "camera": camera.to_dict() if camera is not None else None,
        }


def _measured_steps(steps: list[TrackedStep]) -> list[TrackedStep] | None:
    """The steps before the filter; None if their errors are not independent."""
    if all(s.measured is None for s in steps):
        return None
    return [
        replace(s, delta_q=s.measured.mean, covariance=s.measured.covariance) if s.valid and s.measured else s
        for s in steps
    ]


def _checkpoint_embodiment(checkpoint: Checkpoint, embodiment: str | Embodiment | None) -> Embodiment | None:
    """The robot of a checkpoint, checked to be the one that it was trained for; None if it is not registered."""
    from jidm.robot.registry import embodiment_names, load_embodiment

    if embodiment is None:
        record = checkpoint.embodiment
        if record is None or record["name"] not in embodiment_names():
            return None
        embodiment = str(record["name"])
    robot = load_embodiment(embodiment)
    checkpoint.check_embodiment(robot)
    return robot
