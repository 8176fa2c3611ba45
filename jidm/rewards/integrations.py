"""The reward in the form that training loops of other projects call: flow_grpo, DanceGRPO, TRL.

A wrong call (different numbers of videos and prompts, no frame rate) raises an error. A bad video only gets a reward of 0
itself, so that it does not affect its group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jidm.errors import InputError
from jidm.rewards.executability import ExecutabilityReward, VideoScore

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

    EVA's fork passes `(B, C, T, H, W)` in [-1, 1]: `layout="BCTHW", value_range=(-1, 1)`.

    Args:
        reward: scores the videos.
        fps: frames per second of the model's videos.
        layout, value_range: of the model's videos.
        detailed: return scores by name, as `multi_score` itself does, with the reward under "avg".

    Returns:
        The factory. Its functions return `(scores, {})`: a list of B floats, or lists by name. Metadata may hold the
        initial pose under "q0", in one dictionary for all videos or in one per video.
    """

    # flow_grpo inspects the factory's argument names, and passes a device only to one named "device".
    def factory(device: Any) -> Callable[..., Any]:
        reward.to(device)

        def scores(
            images: Any, prompts: Sequence[Any], metadata: Any = None, *_: Any, **__: Any
        ) -> tuple[Any, dict[str, Any]]:
            scored = _score_all(reward, images, len(prompts), metadata, fps=fps, layout=layout, value_range=value_range)
            return (_by_name(reward, scored) if detailed else [float(s.reward) for s in scored]), {}

        return scores

    return factory


class VideoAlignReward:
    """Replacement for VideoAlign's inferencer in DanceGRPO: `reward(video_paths, prompts, ...)`.

    Args:
        executability: scores the videos.
    """

    def __init__(self, executability: ExecutabilityReward) -> None:
        self._executability = executability

    def reward(
        self, video_paths: Sequence[str | Path], prompts: Sequence[Any], fps: float | None = None, **_: Any
    ) -> list[dict[str, Any]]:
        """One dictionary per video: the reward under "MQ" (motion quality) and "Overall", and the terms by name.

        "VQ" (visual quality) and "TA" (text alignment) are not scored and always 0.

        Args:
            video_paths: B files.
            prompts: B prompts.
            fps: frames per second; as the files state if not given.
        """
        scored = _score_all(self._executability, [str(path) for path in video_paths], len(prompts), None, fps=fps)
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
    """

    def executability(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        poses = {Q0_KEY: columns[Q0_KEY]} if Q0_KEY in columns else None
        scored = _score_all(reward, list(completions), len(prompts), poses, fps=fps, **options)
        return [None if score.problem is not None else float(score.reward) for score in scored]

    return executability


def _score_all(
    reward: ExecutabilityReward, videos: Any, prompts: int, metadata: Any, **options: Any
) -> list[VideoScore]:
    if len(videos) != prompts:
        raise InputError(f"{len(videos)} videos came with {prompts} prompts; give one prompt per video")
    return list(reward.score(videos, q0=_initial_poses(metadata, prompts), **options)) if prompts else []


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
    by_name["eva"] = [s.eva if s.problem is None else 0.0 for s in scored]
    for name in reward.weights:
        by_name[name] = [1.0 if s.penalties is None else s.penalties[name] for s in scored]
    by_name["avg"] = by_name["executability"]
    return by_name
