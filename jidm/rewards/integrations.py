"""The reward as other people's training loops call it.

Each of these takes a reward and returns the plain function that the other side expects. What is wrong with a call as a whole
(other numbers of videos and prompts, no frame rate) is an error; what is wrong with one video is its own score of 0 alone,
so that it spoils no group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jidm.errors import InputError
from jidm.rewards.executability import ExecutabilityReward, VideoScore

Q0_KEY = "q0"
"""Key of metadata, or column of a data set, under which the first frame's joint positions are looked for."""


def flow_grpo(
    reward: ExecutabilityReward,
    *,
    fps: float,
    layout: str = "BTCHW",
    value_range: tuple[float, float] = (0.0, 1.0),
    detailed: bool = False,
) -> Callable[..., Any]:
    """A factory as flow_grpo keeps them in `multi_score`: `factory(device)` gives `fn(images, prompts, metadata)`.

    EVA's fork hands over `(B, C, T, H, W)` in [-1, 1]: `layout="BCTHW", value_range=(-1, 1)`.

    Args:
        fps: frames a second of what the model makes.
        layout, value_range: of its videos.
        detailed: return a score by name, as `multi_score` itself does, with the reward under "avg".

    Returns:
        A plain function. What it returns gives `(scores, {})`: a list of B floats, or the lists by name. Metadata may
        hold the first pose under "q0", in one dictionary for all or in one per video.
    """

    # flow_grpo reads the names of the factory's arguments off its code, and passes a device only to "device".
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
    """Stands where DanceGRPO keeps VideoAlign's inferencer: `reward(video_paths, prompts, ...)`.

    Args:
        executability: what judges.
    """

    def __init__(self, executability: ExecutabilityReward) -> None:
        self._executability = executability

    def reward(
        self, video_paths: Sequence[str | Path], prompts: Sequence[Any], fps: float | None = None, **_: Any
    ) -> list[dict[str, Any]]:
        """One dictionary per video: the reward under "MQ" (quality of motion) and "Overall", the terms by their names.

        "VQ" and "TA", the picture's quality and its likeness to the prompt, are not judged and always 0.
        """
        scored = _score_all(self._executability, [str(path) for path in video_paths], len(prompts), None, fps=fps)
        out = []
        for score in scored:
            record = {"VQ": 0.0, "MQ": float(score.reward), "TA": 0.0, "Overall": float(score.reward)}
            out.append({**record, **(score.penalties or {}), "reasons": list(score.reasons), "problem": score.problem})
        return out


def trl(reward: ExecutabilityReward, *, fps: float | None = None, **options: Any) -> Callable[..., list[float | None]]:
    """A function as TRL's trainers take them in `reward_funcs`: completions are videos, in any form that `judge` takes.

    A column "q0" of the data set tells first poses. A video that cannot be judged gets None, which TRL leaves out.

    Args:
        fps: frames a second, where completions are no files.
        options: further arguments of `ExecutabilityReward.judge`.
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
        raise InputError(f"{len(videos)} videos came with {prompts} prompts; one of each belongs together")
    return list(reward.score(videos, q0=_initial_poses(metadata, prompts), **options)) if prompts else []


def _initial_poses(metadata: Any, count: int) -> Any:
    """First poses of that many videos, where metadata tells them."""
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
