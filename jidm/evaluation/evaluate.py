"""Run a trained model over held-out recordings and keep its results beside the ground truth."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jidm.estimation.result import JointMotion
from jidm.estimation.smoother import smooth_motion
from jidm.evaluation.config import EvalConfig
from jidm.evaluation.field_metrics import FieldPrediction, predict_field
from jidm.evaluation.ground_truth import GroundTruthView
from jidm.evaluation.held_out import EvalClip, HeldOut
from jidm.fields.free.config import ModelConfig
from jidm.idm import InverseDynamicsModel

if TYPE_CHECKING:
    from jidm.robot.embodiment import Embodiment

Corruption = Callable[[Float[Tensor, "T 3 H W"], EvalClip], Float[Tensor, "T 3 H W"]]
"""Changes the frames of a clip, e.g. one of `jidm.evaluation.corruptions`."""

_PAIR_CHUNK = 16


@dataclass(frozen=True, eq=False)
class FieldSample:
    """A model's field and flow at one pair of frames, beside the exact ones where they are known.

    Attributes:
        frame: t within the clip; the pair is (t, t + 1).
        image: (3, H, W) the first frame.
        prediction: of the model, one pair.
        jacobian, mask: exact field (2, n, h, w) [px per unit] and mask of the robot (h, w).
        flow, flow_mask: exact flow (2, h, w) [px] and the cells of the robot where it is known (h, w).
    """

    frame: int
    image: Float[Tensor, "3 H W"]
    prediction: FieldPrediction
    jacobian: Float[Tensor, "2 n h w"] | None = None
    mask: Float[Tensor, "h w"] | None = None
    flow: Float[Tensor, "2 h w"] | None = None
    flow_mask: Float[Tensor, "h w"] | None = None


@dataclass(frozen=True, eq=False)
class DecodedEpisode:
    """A model's results for one episode.

    Attributes:
        index: of the episode.
        q: (T, n) ground truth [rad or m].
        motion: decoded frame by frame, each step from the frames up to it.
        pair_steps: (T-1, n) steps of each pair of neighboring frames by itself [rad or m]; None for a model that
            cannot.
        seconds: that decoding took [s].
        field_samples: field and flow at some pairs, where the model has them.
        smoothed_motion: the motion smoothed over the whole video by the model itself, where it can.
    """

    index: int
    q: Float[Tensor, "T n"]
    motion: JointMotion
    pair_steps: Float[Tensor, "S n"] | None
    seconds: float
    field_samples: tuple[FieldSample, ...] = ()
    smoothed_motion: JointMotion | None = None

    @property
    def delta_q(self) -> Float[Tensor, "S n"]:
        """True steps [rad or m]."""
        return self.q.diff(dim=0)

    @cached_property
    def smoothed(self) -> DecodedEpisode:
        """The same with the smoothed motion, by the model or else by `smooth_motion`; no steps of single pairs."""
        motion = smooth_motion(self.motion) if self.smoothed_motion is None else self.smoothed_motion
        return replace(self, motion=motion, pair_steps=None, field_samples=())

    @property
    def largest_motion_sample(self) -> FieldSample | None:
        """The sample with the largest true motion: the one to draw."""
        return max(self.field_samples, key=lambda sample: float(self.delta_q[sample.frame].abs().sum()), default=None)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A model's results over held-out episodes; `jidm.evaluation.summary.summarize` turns them into metrics.

    Attributes:
        name: of the model, for tables.
        joint_names: n names, the order of every joint axis.
        joint_mask: (n,) which joints count.
        config: how the episodes are scored.
        episodes: those that were decoded.
        failed: episode index -> why it was not, in one line.
        embodiment: the robot, where the data set names one that is known.
        data: where the episodes come from, and their content hash.
    """

    name: str
    joint_names: tuple[str, ...]
    joint_mask: Bool[Tensor, " n"]
    config: EvalConfig
    episodes: tuple[DecodedEpisode, ...]
    failed: Mapping[int, str] = field(default_factory=dict)
    embodiment: Embodiment | None = None
    data: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def smoothed(self) -> Evaluation:
        """The same with the steps of every episode smoothed."""
        return replace(self, episodes=tuple(e.smoothed for e in self.episodes))


def evaluate(idm: Any, held_out: HeldOut, *, name: str = "", corruption: Corruption | None = None) -> Evaluation:
    """Let a model decode every held-out episode, from its true initial pose unless the config says otherwise.

    Args:
        idm: anything with `joint_names` and `decode(video, q0=, fps=) -> JointMotion`; `predict_steps`, smoothing and a
            field are evaluated where it has them.
        held_out: the episodes.
        name: of the model in tables.
        corruption: applied to the frames first.

    Returns:
        Its results for every episode. One that cannot be read or decoded is reported in `failed` and does not stop the
        rest.
    """
    names = tuple(idm.joint_names)
    decoded, failed = [], {}
    for index in held_out.episodes:
        try:
            clip = held_out.clip(index, names)
            if corruption is not None:
                clip = replace(clip, video=corruption(clip.video, clip))
            decoded.append(_evaluate_episode(idm, clip, held_out.config))
        except Exception as error:
            failed[index] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    dataset = held_out.dataset
    return Evaluation(
        name=name,
        joint_names=names,
        joint_mask=held_out.joint_mask(names),
        config=held_out.config,
        episodes=tuple(decoded),
        failed=failed,
        embodiment=held_out.embodiment,
        data={"root": str(dataset.root), "content_hash": dataset.content_hash, "image_key": held_out.image_key},
    )


def _evaluate_episode(idm: Any, clip: EvalClip, config: EvalConfig) -> DecodedEpisode:
    with torch.no_grad():
        started = time.perf_counter()
        q0 = clip.q[0] if config.given_initial_pose else None
        if isinstance(idm, InverseDynamicsModel):
            motion, smoothed_motion = idm.decode_both(clip.video, q0=q0, fps=clip.fps)
        else:
            motion, smoothed_motion = idm.decode(clip.video, q0=q0, fps=clip.fps), None
        seconds = time.perf_counter() - started
        pairs = _pair_steps(idm, clip.video)
        field_samples = tuple(_sample_fields(idm, clip, motion, config.field_samples))
        return DecodedEpisode(clip.index, clip.q, motion, pairs, seconds, field_samples, smoothed_motion)


def _pair_steps(idm: Any, video: Float[Tensor, "T 3 H W"]) -> Float[Tensor, "S n"] | None:
    from jidm.fields.analytic import AnalyticField

    predict_steps = getattr(idm, "predict_steps", None)
    if predict_steps is None or isinstance(getattr(idm, "field", None), AnalyticField):
        return None  # an exact field cannot be evaluated without a known pose
    before = torch.cat([video[:1], video[:-2]])
    batches = zip(*(x.split(_PAIR_CHUNK) for x in (video[:-1], video[1:], before)), strict=True)
    return torch.cat([predict_steps(*pair).double().cpu() for pair in batches])


def _sample_fields(idm: Any, clip: EvalClip, motion: JointMotion, count: int) -> Iterable[FieldSample]:
    """Field and flow at a few evenly spaced pairs, at the decoded pose, not at the true one."""
    config, recorded_size = _model_config(idm), clip.video.shape[-2:]
    video = clip.letterbox(*(config.input_size if config else recorded_size)).video
    clip = clip.letterbox(*((config.height, config.width) if config else recorded_size))
    steps = len(clip.video) - 1
    for t in np.unique(np.linspace(0, steps - 1, min(count, steps)).astype(int)).tolist():
        prediction = predict_field(idm, video[t : t + 1], video[t + 1 : t + 2], motion.position[t : t + 1])
        if prediction is None:
            return
        exact = {} if clip.ground_truth is None else _ground_truth_fields(clip, clip.ground_truth, t, prediction)
        yield FieldSample(t, clip.video[t], prediction, **exact)


def _ground_truth_fields(
    clip: EvalClip, ground_truth: GroundTruthView, t: int, prediction: FieldPrediction
) -> dict[str, Tensor]:
    frame, grid = clip.frame[t], prediction.jacobian.shape[-2:]
    jacobian, mask = ground_truth.jacobian(frame, clip.q_robot[t], *grid)
    columns = [clip.robot_joints.index(name) for name in clip.joints]
    exact = {"jacobian": jacobian[:, columns], "mask": mask}
    truth = ground_truth.flow(frame, clip.q_robot[t], clip.q_robot[t + 1], *grid)
    if truth is not None:
        exact |= {"flow": truth[0], "flow_mask": truth[1]}
    return exact


def _model_config(idm: Any) -> ModelConfig | None:
    """The config of a trained model, which states the sizes of its images; None for one that takes any."""
    for owner in (idm, getattr(idm, "field", None), getattr(idm, "model", None)):
        config = getattr(owner, "config", None)
        if isinstance(config, ModelConfig):
            return config
    return None
