"""The reward in the form that training loops of other projects call: flow_grpo, EVA's trainer, DanceGRPO, TRL.

A reward without scales is refused when the integration is made: some loops turn every later error into a low reward. A wrong
call (different numbers of videos and prompts, no frame rate) raises an error. A bad video only gets a reward of 0 itself, so
that it does not affect its group. Videos are tensors, arrays or the output of a diffusers pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jidm.errors import InputError
from jidm.rewards.executability import ExecutabilityReward, VideoScore
from jidm.rewards.videos import split_videos

Q0_KEY = "q0"
"""Key of metadata, or column of a data set, with the joint positions in the first frame."""


def flow_grpo(
    reward: ExecutabilityReward,
    *,
    fps: float,
    layout: str = "BTCHW",
    value_range: tuple[float, float] = (0.0, 1.0),
    detailed: bool = False,
) -> Callable[..., Any]:
    """A factory for flow_grpo's `multi_score`: `factory(device)` gives `fn(images, prompts, metadata)`.

    Args:
        reward: scores the videos.
        fps: frames per second of the model's videos.
        layout, value_range: of the model's videos.
        detailed: return scores by name with the reward under "avg". `multi_score` weights the list of an entry of its table;
            flow_grpo's trainer reads the scores by name that `multi_score` returns, so this replaces `multi_score` itself.

    Returns:
        The factory. Its functions return `(scores, {})`: a list of B floats, or lists by name. Prompts may be None. Metadata
        may hold the initial pose under "q0", in one dictionary for all videos or in one per video.

    Raises:
        InputError: the reward has no scales.
    """
    reward.require_scales()

    # flow_grpo inspects the factory's argument names, and passes a device only to one named "device". EVA's trainer also
    # passes the checkpoint and the folder for plots of the reward that this one replaces.
    def factory(device: Any, **_: Any) -> Callable[..., Any]:
        reward.to(device)

        def scores(
            images: Any, prompts: Sequence[Any] | None = None, metadata: Any = None, *_: Any, **__: Any
        ) -> tuple[Any, dict[str, Any]]:
            scored = _score_all(reward, images, prompts, metadata, fps=fps, layout=layout, value_range=value_range)
            return (_by_name(reward, scored) if detailed else [float(s.reward) for s in scored]), {}

        return scores

    return factory


def eva_trainer(reward: ExecutabilityReward, *, fps: float) -> Callable[..., Any]:
    """Replacement for `idm_smoothness_score` in EVA's fork of flow_grpo: `factory(device)` gives `fn(videos, prompts, metadata)`.

    EVA's trainer passes `(B, C, T, H, W)` in [-1, 1], prompts that may be None, and one dictionary of metadata per video. It
    trains on "avg" of the scores by name, and logs the others.

    Args:
        reward: scores the videos.
        fps: frames per second of the model's videos; 16 in EVA.

    Raises:
        InputError: the reward has no scales.
    """
    return flow_grpo(reward, fps=fps, layout="BCTHW", value_range=(-1.0, 1.0), detailed=True)


class VideoAlignReward:
    """Replacement for VideoAlign's inferencer in DanceGRPO: `reward(video_paths, prompts, ...)`.

    Args:
        executability: scores the videos.

    Raises:
        InputError: the reward has no scales.
    """

    def __init__(self, executability: ExecutabilityReward) -> None:
        executability.require_scales()
        self._executability = executability

    def reward(
        self,
        video_paths: Sequence[str | Path],
        prompts: Sequence[Any] | None = None,
        fps: float | None = None,
        **_: Any,
    ) -> list[dict[str, Any]]:
        """One dictionary per video: the reward under "MQ" (motion quality) and "Overall", and the terms by name.

        "VQ" (visual quality) and "TA" (text alignment) are not scored and always 0.

        Args:
            video_paths: B files.
            prompts: B prompts, or None.
            fps: frames per second; as the files state if not given.
        """
        scored = _score_all(self._executability, [str(path) for path in video_paths], prompts, None, fps=fps)
        out = []
        for score in scored:
            record = {"VQ": 0.0, "MQ": float(score.reward), "TA": 0.0, "Overall": float(score.reward)}
            out.append({**record, **(score.penalties or {}), "reasons": list(score.reasons), "problem": score.problem})
        return out


def trl(reward: ExecutabilityReward, *, fps: float | None = None, **options: Any) -> Callable[..., list[float | None]]:
    """A function for `reward_funcs` of TRL's trainers. Completions are videos in any form that `score` takes.

    The column "q0" of the data set gives initial poses. A video that cannot be scored gets None, which TRL leaves out.

    Args:
        reward: scores the videos.
        fps: frames per second, if completions are not files.
        options: further arguments of `ExecutabilityReward.score`.

    Raises:
        InputError: the reward has no scales.
    """
    reward.require_scales()

    def executability(prompts: Sequence[Any] | None, completions: Any, **columns: Any) -> list[float | None]:
        poses = {Q0_KEY: columns[Q0_KEY]} if Q0_KEY in columns else None
        scored = _score_all(reward, completions, prompts, poses, fps=fps, **options)
        return [None if score.problem is not None else float(score.reward) for score in scored]

    return executability


def _score_all(
    reward: ExecutabilityReward, videos: Any, prompts: Sequence[Any] | None, metadata: Any, *, fps: float | None,
    layout: str | None = None, value_range: tuple[float, float] | None = None,
) -> list[VideoScore]:  # fmt: skip
    """One score per video; there is one video per prompt, if there are prompts."""
    singles: Sequence[Any] = []
    if not hasattr(videos, "__len__") or len(videos):
        singles, layout, value_range = split_videos(videos, fps, layout, value_range)
    if prompts is not None and len(singles) != len(prompts):
        raise InputError(f"{len(singles)} videos came with {len(prompts)} prompts; give one prompt per video")
    poses = _initial_poses(metadata, len(singles))
    return list(reward.score(singles, q0=poses, fps=fps, layout=layout, value_range=value_range)) if singles else []


def _initial_poses(metadata: Any, count: int) -> Any:
    """Initial poses of this many videos, if metadata has them."""
    if isinstance(metadata, Mapping):
        return metadata.get(Q0_KEY)
    if metadata is None or not len(metadata):
        return None
    if len(metadata) != count:
        raise InputError(f"{len(metadata)} entries of metadata came with {count} videos; give one each, or none")
    poses = [entry.get(Q0_KEY) if isinstance(entry, Mapping) else None for entry in metadata]
    return None if all(pose is None for pose in poses) else poses


def _by_name(reward: ExecutabilityReward, scored: Sequence[VideoScore]) -> dict[str, list[float]]:
    by_name = {"executability": [float(s.reward) for s in scored]}
    by_name["doubt"] = [s.doubt if s.problem is None else 1.0 for s in scored]
    by_name["eva"] = [s.eva if s.problem is None else 0.0 for s in scored]
    for name in reward.weights:
        by_name[name] = [1.0 if s.penalties is None else s.penalties[name] for s in scored]
    by_name["avg"] = by_name["executability"]
    return by_name
