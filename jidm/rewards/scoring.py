"""Scoring of many video files into one file of JSON lines: resumable, in shards, or on a Ray cluster.

Every line is written whole and flushed before the next video begins, by one process; a line that a kill cut short is dropped
on resuming, and its video scored again. So nothing is lost and nothing stands there twice.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jidm.camera.model import Camera
from jidm.errors import InputError, JidmError, MissingExtraError
from jidm.idm import JacobianIDM
from jidm.ray_utils import ray_cluster
from jidm.rewards.executability import ExecutabilityReward, VideoScore
from jidm.rewards.term_scales import TermScales


@dataclass(frozen=True)
class RewardConfig:
    """All that makes a reward, small enough to be sent to other processes.

    Attributes:
        scales: JSON file, see `Calibration`; the one beside the checkpoint if None.
        checkpoint: folder, bundled name or hub id; None for an analytic field.
        embodiment: registered name; the checkpoint's own if None.
        camera: `Camera.to_dict`; None for the learned field itself.
        weights: of terms, in place of their own.
        fps: of videos, where files are not to be believed.
        q0: (n,) positions in every video's first frame, or file name -> positions; None where the network reads them.
    """

    scales: str | None = None
    checkpoint: str | None = None
    embodiment: str | None = None
    camera: Mapping[str, Any] | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    fps: float | None = None
    q0: Sequence[float] | Mapping[str, Sequence[float]] | None = None

    def build_idm(self) -> JacobianIDM:
        """The decoder."""
        camera = None if self.camera is None else Camera.from_dict(dict(self.camera))
        if self.checkpoint is not None:
            return JacobianIDM.from_pretrained(
                self.checkpoint, embodiment=self.embodiment, camera=camera, limits="none"
            )
        if self.embodiment is None or camera is None:
            raise InputError("a reward needs a checkpoint, or an embodiment and its camera")
        return JacobianIDM.from_embodiment(self.embodiment, camera=camera, limits="none")

    def build(self) -> ExecutabilityReward:
        """The reward."""
        return ExecutabilityReward(self.build_idm(), self.load_scales(), weights=self.weights)

    def load_scales(self) -> TermScales:
        """The calibration.

        Raises:
            InputError: there is none.
        """
        if self.scales is not None:
            return TermScales.load(self.scales)
        if self.checkpoint is None:
            raise InputError("an exact field comes without scales for the reward; make them with `jidm calibrate`")
        return TermScales.from_checkpoint(self.checkpoint)

    def initial_pose(self, video: str) -> Sequence[float] | None:
        """The first pose of a video.

        Raises:
            InputError: poses are told by file, and this file's is not among them.
        """
        if self.q0 is None or not isinstance(self.q0, Mapping):
            return self.q0
        for name in (video, Path(video).name):
            if name in self.q0:
                return self.q0[name]
        raise InputError(f"no first pose is told for {video}")

    @cached_property
    def content_hash(self) -> str:
        """Of what makes the reward, the calibration's numbers and not its place included."""
        record = asdict(self) | {"calibration": asdict(self.load_scales())}
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


class Scorer:
    """Scores one file after another with one reward; what a process or an actor at work holds."""

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._reward = config.build()

    def record(self, video: str) -> dict[str, Any]:
        """A video's line."""
        try:
            score = next(iter(self._reward.score(video, q0=self._config.initial_pose(video), fps=self._config.fps)))
        except JidmError as error:
            score = VideoScore.failed(str(error))
        return {"video": video, **as_record(score, self._reward.idm.joint_names), "by": self._config.content_hash}

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The lines of a batch of Ray Data: paths under "video" in, JSON under "line" out."""
        return {"line": [json.dumps(self.record(str(video))) for video in batch["video"]]}


def as_record(score: VideoScore, joint_names: Sequence[str]) -> dict[str, Any]:
    """A score as plain JSON, all of it finite."""
    if score.problem is not None:
        return {"reward": 0.0, "problem": score.problem}
    assert score.by_step is not None and score.by_joint is not None
    return {
        "reward": float(score.reward),
        "eva": score.eva,
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
    workers: int = 1,
    progress: bool = False,
) -> int:
    """Append a line to `out` for every video that has none there yet; how many were written.

    Args:
        shard: (i, N): only videos i, i + N, ... of the list.
        ray: address of a Ray cluster, "auto" or "local"; its machines must see the videos under the same paths.
        workers: of Ray; 1 means one per CPU.

    Raises:
        InputError: two videos of one name, or `out` holds scores of another reward.
        MissingExtraError: Ray is not installed.
    """
    names = [str(video) for video in videos]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{twice} is given twice; name each video once")
    i, count = shard
    if not 0 <= i < count:
        raise InputError(f"shard must be i/N with 0 <= i < N, got {i}/{count}")
    out = Path(out)
    done = {record["video"] for record in read_scores(out, config.content_hash)}
    missing = [name for name in names[i::count] if name not in done]
    if not missing:
        return 0
    lines = _score_serially(missing, config) if ray is None else _score_with_ray(missing, config, ray, workers)
    with open(out, "a", encoding="utf-8") as file:
        for line in _with_progress(lines, len(missing), progress):
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
    return len(missing)


def read_scores(out: Path, config_hash: str | None = None) -> list[dict[str, Any]]:
    """What `out` holds, after dropping a last line that was cut short.

    Args:
        config_hash: hash that all must have been made by; None if it does not matter.

    Raises:
        InputError: it holds something else.
    """
    if not out.exists():
        return []
    raw = out.read_bytes()
    complete = raw[: raw.rfind(b"\n") + 1]
    try:
        records = [json.loads(line) for line in complete.splitlines()]
        if not all(isinstance(record, dict) and "video" in record and "reward" in record for record in records):
            raise ValueError("a line is no score")
    except ValueError as error:
        raise InputError(f"{out} is no file of scores ({error}); choose another name") from None
    if config_hash is not None and any(record.get("by") != config_hash for record in records):
        raise InputError(f"{out} holds scores of another reward, or made with other settings; choose another --out")
    if len(complete) < len(raw):
        with open(out, "r+b") as file:
            file.truncate(len(complete))
    return records


def _score_serially(videos: Sequence[str], config: RewardConfig) -> Iterator[str]:
    scorer = Scorer(config)
    for video in videos:
        yield json.dumps(scorer.record(video))


def _score_with_ray(videos: Sequence[str], config: RewardConfig, address: str, workers: int) -> Iterator[str]:
    with ray_cluster(address, workers, len(videos)) as size:
        try:
            from ray.data import ActorPoolStrategy, DataContext, from_items
        except ImportError:
            raise MissingExtraError("sharing work by Ray", "ray[data]", "ray") from None
        DataContext.get_current().enable_progress_bars = False
        # One video a block: what a lost actor was at is done again, and no more than that.
        scored = from_items([{"video": video} for video in videos], override_num_blocks=len(videos)).map_batches(
            Scorer,
            fn_constructor_args=(config,),
            compute=ActorPoolStrategy(size=size),
            batch_size=1,
            num_cpus=1,
        )
        for row in scored.iter_rows():
            yield row["line"]


def _with_progress(lines: Iterator[str], total: int, show: bool) -> Iterator[str]:
    if not show:
        return lines
    from tqdm import tqdm

    return iter(tqdm(lines, total=total, unit="video"))
