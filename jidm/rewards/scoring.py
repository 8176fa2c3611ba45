"""Scoring of many video files into a JSON Lines file: resumable, in shards, or on a Ray cluster.

One process writes the lines and flushes each before the next video. A line truncated by a kill is dropped on resuming, and
its video is scored again; so no video is lost or written twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jidm.errors import InputError, JidmError, MissingExtraError
from jidm.git_lfs import refuse_lfs_pointer
from jidm.json_lines import parse_json_lines
from jidm.ray_utils import ray_cluster
from jidm.rewards.config import RewardConfig
from jidm.rewards.executability import VideoScore


class Scorer:
    """Scores files with one reward; held by each worker process or Ray actor."""

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._reward = config.build()

    def record(self, video: str) -> dict[str, Any]:
        """The record of one video."""
        try:
            score = next(iter(self._reward.score(video, q0=self._config.initial_pose(video), fps=self._config.fps)))
        except JidmError as error:
            score = VideoScore.failed(str(error))
        return {
            "video": video,
            **as_record(score, self._reward.idm.joint_names),
            "config_hash": self._config.content_hash,
        }

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Map a batch of Ray Data: paths under "video" in, JSON under "line" out."""
        return {"line": [json.dumps(self.record(str(video))) for video in batch["video"]]}


def as_record(score: VideoScore, joint_names: Sequence[str]) -> dict[str, Any]:
    """A score as JSON values, all finite."""
    if score.problem is not None:
        return {"reward": 0.0, "problem": score.problem}
    assert score.by_step is not None and score.by_joint is not None
    return {
        "reward": float(score.reward),
        "eva": score.eva,
        "doubt": score.doubt,
        "penalties": dict(score.penalties or {}),
        "by_joint": dict(zip(joint_names, (round(x, 4) for x in score.by_joint.tolist()), strict=True)),
        "by_frame": {name: [round(x, 4) for x in values.tolist()] for name, values in score.by_step.items()},
        "reasons": list(score.reasons),
        "problem": None,
    }


def score_files(
    videos: Sequence[str | Path],
    config: RewardConfig,
    out: str | Path,
    *,
    shard: tuple[int, int] = (0, 1),
    ray: str | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> int:
    """Append a line to `out` for every video that has none yet, and return how many were written.

    Args:
        videos: files; each name once.
        config: of the reward.
        out: JSON Lines file.
        shard: (i, N): only videos i, i + N, ... of the list.
        ray: address of a Ray cluster, "auto" or "local"; its machines must find the videos under the same paths.
        workers: of Ray; one per CPU if not given.
        progress: show a progress bar.

    Raises:
        InputError: a video is given twice, `out` holds scores of another reward, `workers` is
            given without Ray, or below 1.
        MissingExtraError: Ray is not installed.
    """
    names = [str(video) for video in videos]
    if len(set(names)) != len(names):
        duplicate = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{duplicate} is given twice; name each video once")
    i, count = shard
    if not 0 <= i < count:
        raise InputError(f"shard must be i/N with 0 <= i < N, got {i}/{count}")
    if workers is not None and ray is None:
        raise InputError("workers are Ray's; --ray local starts Ray here, and without Ray --shard divides the videos")
    if workers is not None and workers < 1:
        raise InputError(f"workers must be at least 1, got {workers}")
    out = Path(out)
    done = {record["video"] for record in read_scores(out, config.content_hash)}
    missing = [name for name in names[i::count] if name not in done]
    if not missing:
        return 0
    from tqdm import tqdm

    lines = _score_serially(missing, config) if ray is None else _score_with_ray(missing, config, ray, workers)
    with open(out, "a", encoding="utf-8") as file:
        for line in tqdm(lines, total=len(missing), unit="video", disable=not progress):
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
    return len(missing)


def read_scores(out: Path, config_hash: str | None = None) -> list[dict[str, Any]]:
    """The records in `out`, after removing a truncated last line.

    Args:
        out: JSON Lines file.
        config_hash: `RewardConfig.content_hash` that all records must have; None if any will do.

    Raises:
        InputError: it holds something else, or scores of another reward.
    """
    if not out.exists():
        return []
    refuse_lfs_pointer(out, InputError)
    raw = out.read_bytes()
    complete = raw[: raw.rfind(b"\n") + 1]
    try:
        records = list(parse_json_lines(complete.decode()))
        if not all(isinstance(record, dict) and "video" in record and "reward" in record for record in records):
            raise ValueError("a line is not a score")
    except ValueError as error:
        raise InputError(f"{out} is not a file of scores ({error}); choose another name") from None
    if config_hash is not None and any(record.get("config_hash") != config_hash for record in records):
        raise InputError(f"{out} holds scores of another reward, or made with other settings; choose another --out")
    if len(complete) < len(raw):
        with open(out, "r+b") as file:
            file.truncate(len(complete))
    return records


def _score_serially(videos: Sequence[str], config: RewardConfig) -> Iterator[str]:
    scorer = Scorer(config)
    for video in videos:
        yield json.dumps(scorer.record(video))


def _score_with_ray(videos: Sequence[str], config: RewardConfig, address: str, workers: int | None) -> Iterator[str]:
    with ray_cluster(address, workers, len(videos)) as size:
        try:
            from ray.data import ActorPoolStrategy, DataContext, from_items
        except ImportError:
            raise MissingExtraError("scoring on Ray", "ray[data]", "ray") from None
        DataContext.get_current().enable_progress_bars = False
        # One video per block: if an actor is lost, only its current video is repeated.
        scored = from_items([{"video": video} for video in videos], override_num_blocks=len(videos)).map_batches(
            Scorer,
            fn_constructor_args=(config,),
            compute=ActorPoolStrategy(size=size),
            batch_size=1,
            num_cpus=1,
        )
        for row in scored.iter_rows():
            yield row["line"]
