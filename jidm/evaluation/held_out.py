"""Held-out episodes of a data set, prepared for models to decode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jidm.datasets.episode_selection import describe_episodes
from jidm.errors import DatasetError, InputError, JidmError, did_you_mean
from jidm.evaluation.config import EvalConfig
from jidm.evaluation.ground_truth import GroundTruthView, make_surface_field
from jidm.training.data.frame_store import joint_columns
from jidm.video.letterbox import Letterbox

if TYPE_CHECKING:
    from jidm.fields.analytic import AnalyticField
    from jidm.robot.embodiment import Embodiment


@dataclass(frozen=True, eq=False)
class EvalClip:
    """One episode as a model gets it.

    Attributes:
        index: of the episode.
        video: (T, 3, H, W) float32 RGB in [0, 1].
        q: (T, n) positions of the model's joints, in its order [rad or m].
        q_robot: (T, m) positions of all the robot's joints.
        joints, robot_joints: their n and m names.
        fps: of the frames here [1/s].
        frame: (T,) index of each frame in the recording.
        ground_truth: exact camera, depth and links; None where they are unknown.
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
        """The same clip letterboxed to this image size [px], as in training."""
        letterbox = Letterbox(self.video.shape[-2], self.video.shape[-1], height, width)
        ground_truth = None if self.ground_truth is None else self.ground_truth.letterbox(letterbox)
        return replace(self, video=letterbox.apply(self.video), ground_truth=ground_truth)


class HeldOut:
    """Held-out episodes of a data set, prepared once for any number of models.

    Args:
        dataset: a `jidm.datasets.RecordedDataset`.
        config: which part of it, and how it is scored.
        embodiment: the robot; if not given, the one that the data set's recipe names.

    Raises:
        DatasetError: an episode or the image key is not in the data set, or its robot is not the one known by that
            name.
    """

    def __init__(self, dataset: Any, config: EvalConfig | None = None, *, embodiment: Embodiment | None = None) -> None:
        self.dataset = dataset
        self.config = config or EvalConfig()
        self.embodiment = recorded_robot(dataset, embodiment)
        self.episodes = resolve_episodes(dataset, self.config.episodes)
        self.image_key = _resolve_image_key(dataset, self.config.image_key)
        self._surface: AnalyticField | None = None

    def clip(self, index: int, joint_names: Sequence[str]) -> EvalClip:
        """An episode's frames, and the positions of the named joints.

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
        pixels = np.array(episode.video(self.image_key)[:: config.stride][: len(frames)])
        video = torch.from_numpy(pixels).movedim(-1, -3).float() / 255
        # FK takes joints in the descriptor's order, which need not be the recording's.
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
            InputError: the config names a joint that is not among them.
        """
        wanted = self.config.joints
        if wanted is not None:
            for name in wanted:
                if name not in joint_names:
                    raise InputError(f"no joint '{name}' to evaluate: {did_you_mean(name, joint_names)}")
            return torch.tensor([name in wanted for name in joint_names])
        grippers = () if self.embodiment is None else self.embodiment.gripper_joints
        return torch.tensor([name not in grippers for name in joint_names])

    def _columns(self, joint_names: Sequence[str]) -> list[int]:
        return joint_columns(joint_names, self.dataset.joint_names, self.dataset.root)

    def _ground_truth(self, episode: Any) -> GroundTruthView | None:
        if self.embodiment is None:
            return None
        if self._surface is None:
            self._surface = make_surface_field(self.embodiment)
        return GroundTruthView.from_episode(self._surface, self.dataset, episode, self.image_key)


def recorded_robot(dataset: Any, given: Embodiment | None = None) -> Embodiment | None:
    """The given robot, else the one that a data set's recipe names; None where there is neither.

    Raises:
        DatasetError: there is none of that name here, or it is not the one that was recorded.
    """
    name, recorded = dataset.recipe.get("embodiment"), dataset.recipe.get("embodiment_hash")
    robot = given
    if robot is None:
        if not name:
            return None
        from jidm.robot.registry import load_embodiment

        try:
            robot = load_embodiment(name)
        except JidmError as error:
            raise DatasetError(
                f"{dataset.root}: the robot that was recorded is not found here ({error}); give embodiment= or "
                "--embodiment"
            ) from None
    if recorded and robot.content_hash != recorded:
        raise DatasetError(
            f"{dataset.root}: recorded of a '{name}' with content hash {recorded[:12]}, the '{robot.name}' known here "
            f"has {robot.content_hash[:12]}; give the robot that was recorded as embodiment= or --embodiment, or record "
            "again"
        )
    return robot


def resolve_episodes(dataset: Any, requested: Sequence[int] | None) -> tuple[int, ...]:
    """The requested episodes, all if None.

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


def _resolve_image_key(dataset: Any, requested: str | None) -> str:
    if not dataset.cameras:
        raise DatasetError(f"{dataset.root}: has no video; nothing can be decoded")
    return str(dataset.camera(requested or dataset.cameras[0]))
