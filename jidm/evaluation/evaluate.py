"""Run a trained model over held-out recordings and keep everything it said, beside the truth."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jidm.datasets.episode_selection import describe_episodes
from jidm.errors import DatasetError, InputError, did_you_mean
from jidm.estimation.result import JointMotion
from jidm.estimation.smoother import smooth_motion
from jidm.evaluation.field_metrics import FieldPrediction, predict_field
from jidm.evaluation.ground_truth import GroundTruthView, make_surface_field
from jidm.video.letterbox import Letterbox

if TYPE_CHECKING:
    from jidm.fields.analytic import AnalyticField
    from jidm.robot.embodiment import Embodiment

Corruption = Callable[[Float[Tensor, "T 3 H W"], "EvalClip"], Float[Tensor, "T 3 H W"]]
"""Does something to the pictures of a clip, e.g. one of `jidm.evaluation.corruptions`."""

_PAIR_CHUNK = 16


@dataclass(frozen=True)
class EvalConfig:
    """How a model is judged.

    Attributes:
        episodes: which ones; all that the data set lists if None.
        camera: which camera; the data set's first if None.
        stride: recorded frames per step; 3 at 30 fps are steps of 0.1 s.
        frames: at most so many frames of each episode, counted after the stride.
        clip_frames: length of the clip on which positions are judged, from the known first pose [frames].
        tolerance: a position this close is right [rad or m].
        joints: the joints that count; all but grippers if None.
        moving_speed: joints slower than this on average have no motion to be judged by correlation [rad/s or m/s].
        field_samples: pairs per episode at which field and flow are compared with the exact ones.
        given_initial_pose: whether models are told the first pose; else they read it off the picture, if they can.
    """

    episodes: tuple[int, ...] | None = None
    camera: str | None = None
    stride: int = 1
    frames: int | None = None
    clip_frames: int = 49
    tolerance: float = 0.05
    joints: tuple[str, ...] | None = None
    moving_speed: float = 0.05
    field_samples: int = 4
    given_initial_pose: bool = True

    def __post_init__(self) -> None:
        if self.stride < 1 or self.clip_frames < 2 or (self.frames is not None and self.frames < 2):
            raise InputError("a protocol needs stride >= 1 and at least 2 frames in a clip and in an episode")
        if not self.tolerance > 0 or self.field_samples < 0:
            raise InputError("a protocol needs tolerance > 0 and looks >= 0")


@dataclass(frozen=True, eq=False)
class EvalClip:
    """One episode as it is shown to a model.

    Attributes:
        index: of the episode.
        video: (T, 3, H, W) float32 RGB in [0, 1].
        q: (T, n) joint positions, of the model's joints in its order [rad or m].
        q_robot: (T, m) of all the robot's joints.
        joints, robot_joints: their n and m names.
        fps: of the frames here [1/s].
        frame: (T,) number of each frame in the recording.
        ground_truth: what is exactly known about the pictures; None where nothing is.
    """

    index: int
    video: Float[Tensor, "T 3 H W"]
    q: Float[Tensor, "T n"]
    q_robot: Float[Tensor, "T m"]
    joints: tuple[str, ...]
    robot_joints: tuple[str, ...]
    fps: float
    frame: tuple[int, ...]
    ground_truth: GroundTruthView | None

    def letterbox(self, height: int, width: int) -> EvalClip:
        """The same clip in pictures of this size, put there as training does."""
        letterbox = Letterbox(self.video.shape[-2], self.video.shape[-1], height, width)
        ground_truth = None if self.ground_truth is None else self.ground_truth.letterbox(letterbox)
        return replace(self, video=letterbox.apply(self.video), ground_truth=ground_truth)


@dataclass(frozen=True, eq=False)
class FieldSample:
    """A model's field and flow at one pair of frames, beside the exact ones where they are known.

    Attributes:
        frame: t within the clip; the pair is (t, t + 1).
        image: (3, H, W) the first frame.
        prediction: what the model saw, one pair.
        jacobian, mask: exact field (2, n, h, w) [px per unit] and robot (h, w).
        flow, flow_mask: exact flow (2, h, w) [px] and the robot's cells (h, w).
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
    """What a model made of one episode.

    Attributes:
        q: (T, n) truth [rad or m].
        motion: decoded from the known first pose. smoothed_motion: the same told by all frames, where the model has such a way.
        pair_steps: (T-1, n) steps of each pair of neighbouring frames by itself, None where the model has no such way.
        seconds: decoding took [s].
        field_samples: at field and flow, where the model has them.
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
        """The same with every step told by all frames, or at least by its neighbours; no steps of single pairs."""
        motion = smooth_motion(self.motion) if self.smoothed_motion is None else self.smoothed_motion
        return replace(self, motion=motion, pair_steps=None, field_samples=())

    @property
    def largest_motion_sample(self) -> FieldSample | None:
        """The look at the pair of frames with the largest true motion: the one to draw."""
        return max(self.field_samples, key=lambda look: float(self.delta_q[look.frame].abs().sum()), default=None)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A model's results over the episodes of a protocol; `jidm.evaluation.summary.scores` turns them into figures.

    Attributes:
        name: of the model, for tables.
        joint_names: n names, the order of every joint axis.
        joint_mask: (n,) which joints count.
        episodes: those that were decoded.
        failed: episode index -> why it was not, in one line.
        embodiment: the robot, where the data set names one that is known.
        data: where the episodes come from and their content hash.
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


class HeldOut:
    """Held-out episodes of a data set, prepared once for any number of models.

    Args:
        dataset: a `jidm.datasets.RecordedDataset`.
        protocol: how to judge.
        embodiment: the robot; if not given, the one that the data set's recipe names.

    Raises:
        DatasetError: an episode or the camera is not in the data set, or its robot is not the one known by that name.
    """

    def __init__(self, dataset: Any, config: EvalConfig | None = None, *, embodiment: Embodiment | None = None) -> None:
        self.dataset = dataset
        self.config = config or EvalConfig()
        self.embodiment = embodiment or recorded_robot(dataset)
        self.episodes = resolve_episodes(dataset, self.config.episodes)
        self.camera = _resolve_camera(dataset, self.config.camera)
        self._surface: AnalyticField | None = None

    def clip(self, index: int, joint_names: Sequence[str]) -> EvalClip:
        """An episode's pictures and the positions of the named joints.

        Raises:
            DatasetError: a joint is not recorded, or the episode is too short.
        """
        episode, config = self.dataset.episode(index), self.config
        frames = tuple(range(0, episode.length, config.stride))[: config.frames]
        if len(frames) < 2:
            raise DatasetError(
                f"episode {index} has {episode.length} frames, too few for one step of {config.stride}; leave it out"
            )
        state = torch.from_numpy(np.array(episode.state, dtype=np.float64))[list(frames)]
        if not state.isfinite().all():
            raise DatasetError(
                f"episode {index}: observation.state is not finite; leave it out or repair the recording"
            )
        pixels = np.array(episode.video(self.camera)[:: config.stride][: len(frames)])
        video = torch.from_numpy(pixels).movedim(-1, -3).float() / 255
        # FK counts joints in the descriptor's order, which need not be the recording's.
        robot = tuple(self.dataset.joint_names if self.embodiment is None else self.embodiment.joint_names)
        return EvalClip(
            index=index,
            video=video,
            q=state[:, self._columns(joint_names)],
            q_robot=state[:, self._columns(robot)],
            joints=tuple(joint_names),
            robot_joints=robot,
            fps=self.dataset.fps / config.stride,
            frame=frames,
            ground_truth=self._ground_truth(episode),
        )

    def joint_mask(self, joint_names: Sequence[str]) -> Bool[Tensor, " n"]:
        """Which of these joints count.

        Raises:
            InputError: the protocol names a joint that is not among them.
        """
        wanted = self.config.joints
        if wanted is not None:
            for name in wanted:
                if name not in joint_names:
                    raise InputError(f"no joint '{name}' to judge: {did_you_mean(name, joint_names)}")
            return torch.tensor([name in wanted for name in joint_names])
        grippers = () if self.embodiment is None else self.embodiment.gripper_joints
        return torch.tensor([name not in grippers for name in joint_names])

    def _columns(self, joint_names: Sequence[str]) -> list[int]:
        recorded = list(self.dataset.joint_names)
        for name in joint_names:
            if name not in recorded:
                raise DatasetError(f"the recording has no joint '{name}': {did_you_mean(name, recorded)}")
        return [recorded.index(name) for name in joint_names]

    def _ground_truth(self, episode: Any) -> GroundTruthView | None:
        if self.embodiment is None:
            return None
        if self._surface is None:
            self._surface = make_surface_field(self.embodiment)
        return GroundTruthView.from_episode(self._surface, self.dataset, episode, self.camera)


def evaluate(idm: Any, held_out: HeldOut, *, name: str = "", corruption: Corruption | None = None) -> Evaluation:
    """Let a model decode every held-out episode from its true first pose.

    Args:
        idm: anything with `joint_names` and `decode(video, q0=, fps=) -> JointMotion`; `step_pairs` and a field of its
            own are used where it has them.
        name: of the model in tables.
        corruption: done to the pictures first.

    Returns:
        What it said of every episode. One that cannot be read or decoded is reported in `failed` and stops nothing.
    """
    names = decoded_joints(idm)
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
        data={"root": str(dataset.root), "content_hash": dataset.content_hash, "camera": held_out.camera},
    )


def _evaluate_episode(idm: Any, clip: EvalClip, config: EvalConfig) -> DecodedEpisode:
    with torch.no_grad():
        started = time.perf_counter()
        whole = getattr(idm, "decode_whole", lambda *video, **how: (idm.decode(*video, **how), None))
        motion, smoothed_motion = whole(clip.video, q0=clip.q[0] if config.given_initial_pose else None, fps=clip.fps)
        seconds = time.perf_counter() - started
        pairs = _pair_steps(idm, clip.video)
        field_samples = tuple(_sample_fields(idm, clip, motion, config.field_samples))
        return DecodedEpisode(clip.index, clip.q, motion, pairs, seconds, field_samples, smoothed_motion)


def _pair_steps(idm: Any, video: Float[Tensor, "T 3 H W"]) -> Float[Tensor, "S n"] | None:
    from jidm.fields.analytic import AnalyticField

    predict_steps = getattr(idm, "step_pairs", None)
    if predict_steps is None or isinstance(getattr(idm, "field", None), AnalyticField):
        return None  # an exact field has to be told the pose
    before = torch.cat([video[:1], video[:-2]])
    batches = zip(*(x.split(_PAIR_CHUNK) for x in (video[:-1], video[1:], before)), strict=True)
    return torch.cat([predict_steps(*pair).double().cpu() for pair in batches])


def _sample_fields(idm: Any, clip: EvalClip, motion: JointMotion, count: int) -> Iterable[FieldSample]:
    """Field and flow at a few evenly spread pairs; the model's own idea of the pose is used, never the true one."""
    video = clip.letterbox(*(input_size(idm) or clip.video.shape[-2:])).video
    clip = clip.letterbox(*(_field_image_size(idm) or clip.video.shape[-2:]))
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


def decoded_joints(idm: Any) -> tuple[str, ...]:
    """Names of the joints that a model decodes."""
    for part in ("", "embodiment", "field", "config", "model"):
        owner = getattr(idm, part, None) if part else idm
        if names := getattr(owner, "joint_names", None):
            return tuple(names)
    raise InputError(f"{type(idm).__name__} does not say which joints it decodes; give it joint_names")


def input_size(idm: Any) -> tuple[int, int] | None:
    """(height, width) of the pictures a model reads; None for one that takes any."""
    config = _image_config(idm)
    return None if config is None else getattr(config, "picture", None) or (int(config.height), int(config.width))


def _field_image_size(idm: Any) -> tuple[int, int] | None:
    """(height, width) of the picture in whose pixels a model tells its field; None for one that takes any."""
    config = _image_config(idm)
    return None if config is None else (int(config.height), int(config.width))


def _image_config(idm: Any) -> Any:
    for owner in (idm, getattr(idm, "field", None), getattr(idm, "model", None)):
        config: Any = getattr(owner, "config", None)
        if hasattr(config, "height") and hasattr(config, "width"):
            return config
    return None


def recorded_robot(dataset: Any) -> Embodiment | None:
    """The robot that a data set's recipe names; None where it names none.

    Raises:
        DatasetError: the robot known by that name is not the one that was recorded.
    """
    name, recorded = dataset.recipe.get("embodiment"), dataset.recipe.get("embodiment_hash")
    if not name:
        return None
    from jidm.robot.registry import load_embodiment

    robot = load_embodiment(name)
    if recorded and robot.content_hash != recorded:
        raise DatasetError(
            f"{dataset.root}: recorded of a '{name}' with content hash {recorded[:12]}, the '{name}' known here has "
            f"{robot.content_hash[:12]}; register the robot that was recorded, or record again"
        )
    return robot


def resolve_episodes(dataset: Any, requested: Sequence[int] | None) -> tuple[int, ...]:
    """The wanted episodes, all if None.

    Raises:
        DatasetError: one of them is not in the data set, or there are none.
    """
    listed = tuple(dataset.episode_indices)
    chosen = listed if requested is None else tuple(requested)
    absent = sorted(set(chosen) - set(listed))
    if absent or not chosen:
        raise DatasetError(
            f"{dataset.root}: none of its episodes are chosen"
            if not chosen
            else f"{dataset.root}: has no episodes {absent}; it has {describe_episodes(listed)}"
        )
    return chosen


def _resolve_camera(dataset: Any, requested: str | None) -> str:
    cameras = tuple(dataset.cameras)
    if not cameras:
        raise DatasetError(f"{dataset.root}: has no video; nothing can be decoded")
    if requested is not None and requested not in cameras:
        raise DatasetError(f"{dataset.root}: no camera '{requested}': {did_you_mean(requested, cameras)}")
    return requested or cameras[0]
