"""`jidm score`: how executable the motion in each of many videos is, one JSON line a video."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from jidm.errors import InputError

if TYPE_CHECKING:
    from jidm.idm import JacobianIDM
    from jidm.rewards.scoring import RewardConfig


@dataclass(frozen=True)
class ModelArgs:
    """What judges: a robot's decoder and the scales of good videos."""

    checkpoint: str | None = None
    """Trained field: a checkpoint folder, a bundled name or a hub id. It needs neither --camera nor --q0."""

    embodiment: str | None = None
    """Robot: a name from `jidm embodiments`. The checkpoint's own if not given."""

    camera: str | None = None
    """Camera of all videos: a JSON file, or a named camera of the robot; `trained` is that of the checkpoint's self-play."""

    q0: tuple[str, ...] = ()
    """Joint positions in every video's first frame [rad or m]: numbers, `home`, or a JSON file of file name -> numbers."""

    fps: float | None = None
    """Frame rate [1/s], where files do not know it or are wrong about it."""

    def reward_config(self, scales: Path | None, first_video: Path) -> RewardConfig:
        """What makes the reward, in other processes too."""
        from jidm.camera.model import Camera
        from jidm.checkpoint import load_checkpoint
        from jidm.cli.inputs import find_robot, resize_camera
        from jidm.rewards.scoring import RewardConfig
        from jidm.video.io import open_video

        checkpoint = None if self.checkpoint is None else load_checkpoint(self.checkpoint)
        if checkpoint is None and not (self.embodiment and self.camera):
            raise InputError("name what judges: --checkpoint, or --embodiment with --camera and --q0")
        camera = None
        if self.camera == "trained" and checkpoint is not None:
            camera = Camera.from_dict(checkpoint.training_camera())
        elif self.camera is not None:
            if self.embodiment is None:
                raise InputError("--camera needs --embodiment as well: the exact field is that of a robot")
            camera = find_robot(self.embodiment).camera(self.camera)
        if camera is not None:
            stream = open_video(first_video, fps=self.fps if first_video.is_dir() else None)
            camera = resize_camera(camera, stream.width, stream.height, first_video)
        return RewardConfig(
            scales=None if scales is None else str(scales), checkpoint=self.checkpoint, embodiment=self.embodiment,
            camera=None if camera is None else camera.to_dict(), fps=self.fps, q0=self._q0(),
        )  # fmt: skip

    def _q0(self) -> Any:
        if not self.q0:
            return None
        if len(self.q0) == 1 and self.q0[0].endswith(".json"):
            return _poses(Path(self.q0[0]))
        if self.embodiment is None:
            raise InputError("--q0 needs --embodiment: nobody says what joints the numbers belong to")
        from jidm.cli.inputs import find_robot, read_q0

        return read_q0(self.q0, find_robot(self.embodiment)).tolist()


@dataclass(frozen=True)
class Score:
    """Score videos by how executable the motion they show is."""

    videos: tyro.conf.Positional[tuple[Path, ...]]
    """Video files; of a folder, the videos in it."""

    model: tyro.conf.OmitArgPrefixes[ModelArgs] = field(default_factory=ModelArgs)
    """What judges."""

    scales: Path | None = None
    """Scales of good videos, written by `jidm calibrate`; those beside the checkpoint if not given."""

    out: Path = Path("scores.jsonl")
    """One JSON line a video; what stands there already is not done again."""

    shard: str = "0/1"
    """Which part of the videos, i/N: for a batch queue; give each part an --out of its own."""

    ray: str | None = None
    """Address of a Ray cluster to share the work: auto, local, or host:port."""

    workers: int = 1
    """Of Ray; 1 means one per CPU."""

    def run(self) -> int:
        from jidm.cli.text import parse_shard
        from jidm.rewards.scoring import read_scores, score_files

        videos = collect_videos(self.videos)
        config = self.model.reward_config(self.scales, videos[0])
        shard = parse_shard(self.shard)
        written = score_files(
            videos, config, self.out, shard=shard, ray=self.ray, workers=self.workers, progress=True
        )  # fmt: skip
        records = read_scores(self.out)
        failed = [record for record in records if record.get("problem")]
        rewards = sorted(record["reward"] for record in records if not record.get("problem"))
        middle = f", median reward {rewards[len(rewards) // 2]:.2f}" if rewards else ""
        print(f"{self.out}: {len(records)} videos, {written} of them new{middle}; {len(failed)} could not be judged")
        for record in failed[:3]:
            print(f"  {record['video']}: {record['problem']}")
        return 0


@dataclass(frozen=True)
class FitScales:
    """Measure on good videos what the reward measures others by."""

    videos: tyro.conf.Positional[tuple[Path, ...]]
    """Good videos, real or simulated, as long and large as those to judge; 30 and more are better than 5."""

    model: tyro.conf.OmitArgPrefixes[ModelArgs] = field(default_factory=ModelArgs)
    """What judges."""

    out: Path = Path("calibration.json")
    """The scales, for `jidm score --calibration`."""

    def run(self) -> int:
        from jidm.cli.text import columns
        from jidm.rewards import ExecutabilityReward

        videos = collect_videos(self.videos)
        config = self.model.reward_config(self.out, videos[0])
        idm: JacobianIDM = config.build_idm()
        starts = [config.initial_pose(str(video)) for video in videos]
        reward = ExecutabilityReward(idm).fit_scales(
            [str(video) for video in videos], q0=None if starts[0] is None else starts, fps=self.model.fps
        )
        assert reward.scales is not None
        reward.scales.save(self.out)
        rows = [("term", "usual", "to the 90th percentile")]
        rows += [(name, f"{s.median:.4f}", f"{s.spread:.4f}") for name, s in reward.scales.terms.items()]
        print(columns(rows))
        print(f"written to {self.out}, from {len(videos)} videos")
        return 0


def collect_videos(given: tuple[Path, ...]) -> list[Path]:
    """The videos meant.

    Raises:
        InputError: there are none.
    """
    from jidm.video.io import VIDEO_SUFFIXES

    videos: list[Path] = []
    for path in given:
        if path.is_dir():
            videos += sorted(file for file in path.iterdir() if file.suffix.lower() in VIDEO_SUFFIXES)
        else:
            videos.append(path)
    if not videos:
        raise InputError("name at least one video, or a folder of videos")
    return videos


def _poses(path: Path) -> dict[str, list[float]]:
    import json

    try:
        poses = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): [float(x) for x in values] for name, values in poses.items()}
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} must hold an object of file name -> joint positions ({error})") from None
