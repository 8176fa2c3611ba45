"""`jidm score` and `jidm fit-scales`: the executability reward of many videos, and the scales it needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from jidm.cli.checks import check_at_least, check_exists, check_out_file, check_positive
from jidm.cli.model_args import ModelArgs
from jidm.errors import InputError


@dataclass(frozen=True)
class Score:
    """Score videos by how executable their motion is."""

    videos: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[VIDEO ...]")]
    """Video files; of a folder, the videos in it."""

    model: tyro.conf.OmitArgPrefixes[ModelArgs] = field(default_factory=ModelArgs)
    """The decoder. --q0 may also be a JSON file of file name -> numbers."""

    scales: Path | None = None
    """Scales of the reward, written by `jidm fit-scales`; those of the checkpoint if not given."""

    fps: float | None = None
    """Frame rate [1/s], if files state none or a wrong one."""

    out: Path = Path("scores.jsonl")
    """One JSON line per video; videos already there are skipped."""

    shard: str = "0/1"
    """Do shard i of N (i/N), for batch queues; give each shard its own --out."""

    ray: str | None = None
    """Address of a Ray cluster to run on: auto, local, or host:port."""

    workers: int | None = None
    """Ray workers; one per CPU if not given."""

    def run(self) -> int:
        from jidm.cli.inputs import collect_videos, video_size
        from jidm.cli.text import parse_shard

        shard = parse_shard(self.shard)
        _check(self.videos, self.model, self.fps, self.out, self.scales)
        check_at_least(1, workers=self.workers)
        from jidm.rewards.scoring import read_scores, score_files

        videos = collect_videos(self.videos)
        config = self.model.reward_config(self.scales, lambda: video_size(videos[0], self.fps), self.fps)
        written = score_files(videos, config, self.out, shard=shard, ray=self.ray, workers=self.workers, progress=True)
        records = read_scores(self.out)
        failed = [record for record in records if record.get("problem")]
        rewards = sorted(record["reward"] for record in records if not record.get("problem"))
        asked = {str(video) for video in videos}
        print("\n".join(_lines([record for record in records if record["video"] in asked])))
        median = f", median reward {rewards[len(rewards) // 2]:.2f}" if rewards else ""
        print(f"{self.out}: {len(records)} videos, {written} of them new{median}; {len(failed)} could not be scored")
        return 0


@dataclass(frozen=True)
class FitScales:
    """Fit the scales of the reward to good videos."""

    videos: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[VIDEO ...]")]
    """Good videos, real or simulated, with length and resolution of those to score; at least 5, better 30."""

    model: tyro.conf.OmitArgPrefixes[ModelArgs] = field(default_factory=ModelArgs)
    """The decoder. --q0 may also be a JSON file of file name -> numbers."""

    fps: float | None = None
    """Frame rate [1/s], if files state none or a wrong one."""

    out: Path = Path("scales.json")
    """The scales, for `jidm score --scales`."""

    def run(self) -> int:
        from jidm.cli.inputs import collect_videos, video_size
        from jidm.cli.text import columns

        _check(self.videos, self.model, self.fps, self.out, None)
        from jidm.rewards import ExecutabilityReward

        videos = collect_videos(self.videos)
        config = self.model.reward_config(self.out, lambda: video_size(videos[0], self.fps), self.fps)
        poses = [config.initial_pose(str(video)) for video in videos]
        reward = ExecutabilityReward(config.build_idm()).fit_scales(
            [str(video) for video in videos], q0=None if poses[0] is None else poses, fps=self.fps
        )
        assert reward.scales is not None
        reward.scales.save(self.out)
        rows = [("term", "median", "spread")]
        rows += [(name, f"{s[-1].median:.4f}", f"{s[-1].spread:.4f}") for name, s in reward.scales.terms.items()]
        print(columns(rows))
        lengths = ", ".join(map(str, reward.scales.frames))
        print(f"of {reward.scales.frames[-1]} frames; the file holds scales for {lengths} frames")
        print(f"written to {self.out}, from {len(videos)} videos; spread: from the median to the 90th percentile")
        return 0


def _check(videos: tuple[Path, ...], model: ModelArgs, fps: float | None, out: Path, scales: Path | None) -> None:
    """Refuse what can be refused without heavy packages."""
    from jidm.cli.inputs import read_poses

    if not videos:
        raise InputError("name at least one video, or a folder of videos")
    check_positive(fps=fps)
    check_out_file(out)
    if scales is not None:
        check_exists(scales, file=True)
    model.check(check_q0=read_poses(model.q0) is None)


_LOW = 8.0
"""Rewards below this are printed with their first reason."""


def _lines(records: list[dict[str, Any]]) -> list[str]:
    """A line for each video: its reward of 10, the terms that it is made of, and the first reason of a low one."""
    if not records:
        return []
    width = max(len(record["video"]) for record in records)
    lines = []
    for record in records:
        name = record["video"].ljust(width)
        if record.get("problem"):
            lines.append(f"{name}  not scored: {record['problem']}")
            continue
        penalties = ", ".join(f"{term} {value:.2f}" for term, value in record["penalties"].items())
        line = f"{name}  {record['reward']:5.2f}  EVA's {record['eva']:.2f}; penalties: {penalties or 'none'}"
        if record["reward"] < _LOW and record["reasons"]:
            line += f"; {record['reasons'][0]}"
        lines.append(line)
    return lines
