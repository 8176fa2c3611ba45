"""`jidm view`: look at decoded or recorded videos in the browser."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jidm.cli.model_args import ModelArgs
from jidm.errors import InputError

if TYPE_CHECKING:
    from jidm.visualization.viewer import ViewedRun

_MAX_RUNS = 2
_METADATA = ("meta/info.json", "info.json")  # of a data set, in LeRobot's and the flat layout


@dataclass(frozen=True)
class View:
    """Look at a decode in the browser: video, flow, field, residual, joints, and the robot in 3-D."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN]")]
    """A folder written by `jidm decode`, a video (decoded now), a data set (give --episode), or scores of `jidm score`; two are shown side by side."""

    model: tyro.conf.OmitArgPrefixes[ModelArgs] = field(default_factory=ModelArgs)
    """The decoder of videos. For a decode folder and a data set, --checkpoint, --embodiment and --camera replace what is recorded there."""

    episode: int | None = None
    """Episode of a data set."""

    image_key: str | None = None
    """Camera of a data set; may be omitted if there is only one."""

    video: Path | None = None
    """Of scores, the video to show; the one with the lowest reward if not given. Of a decode folder, where its video lies now."""

    fps: float | None = None
    """Frame rate [1/s], if a video states none or a wrong one."""

    smooth: bool = False
    """Decode videos with Rauch-Tung-Striebel smoothing."""

    host: str = "127.0.0.1"
    """Interface to listen on: only this machine by default; 0.0.0.0 for the network. Anybody who reaches it can look."""

    port: int = 8080
    """Port of the page; 0 lets the system choose."""

    def run(self) -> int:
        from jidm.visualization.viewer.server import check_port, require_viser

        if not 1 <= len(self.runs) <= _MAX_RUNS:
            raise InputError(f"name one run, or {_MAX_RUNS} to compare; got {len(self.runs)}")
        require_viser()
        check_port(self.host, self.port)
        shown = [self._load(path) for path in self.runs]
        from jidm.visualization.viewer import Viewer

        with Viewer(shown, host=self.host, port=self.port) as viewer:
            print(f"{' | '.join(run.title for run in shown)}: {viewer.url} (Ctrl-C ends)", flush=True)
            viewer.wait()
        return 0

    def _load(self, path: Path) -> ViewedRun:
        """One run by what its path holds."""
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
        if path.is_dir() and any((path / name).is_file() for name in _METADATA):
            return self._load_episode(path)
        if path.is_dir() and not _holds_images(path):
            from jidm.visualization.viewer.load import load_decode

            return load_decode(
                path, video=self.video, embodiment=self.model.embodiment, checkpoint=self.model.checkpoint,
                camera=self.model.camera,
            )  # fmt: skip
        if path.suffix.lower() in (".jsonl", ".json"):
            return self._load_scored(path)
        return self._decode(path)

    def _decode(self, video: Path) -> ViewedRun:
        """Decode a video now."""
        from jidm.cli.decode import decode_file
        from jidm.cli.inputs import video_size
        from jidm.video.preparation import MAX_SIZE
        from jidm.visualization.viewer.load import decode_run, read_frames

        idm = self.model.build_idm(lambda: video_size(video, self.fps), q0_required=True)
        q0 = self.model.initial_pose(idm.embodiment)
        decoded = decode_file(video, idm, q0=q0, fps=self.fps, smooth=self.smooth, max_size=MAX_SIZE)
        return decode_run(*read_frames(video, self.fps), decoded.motion, idm, f"{video.name}, {decoded.method}")

    def _load_episode(self, folder: Path) -> ViewedRun:
        """An episode as it was recorded, or decoded with the recorded positions beside it if a checkpoint is given."""
        from jidm.datasets import open_dataset
        from jidm.visualization.viewer.load import decode_episode, load_episode

        dataset = open_dataset(folder)
        if self.episode is None:
            first = ", ".join(map(str, dataset.episode_indices[:8])) + (", ..." if len(dataset) > 8 else "")
            raise InputError(f"{folder}: is a data set; give --episode, one of {first}")
        recorded = load_episode(
            dataset, self.episode, image_key=self.image_key, embodiment=self.model.embodiment, camera=self.model.camera
        )
        if self.model.checkpoint is None:
            return recorded
        idm = self.model.build_idm(lambda: (recorded.width, recorded.height))
        return decode_episode(
            recorded, dataset.episode(self.episode), idm, image_key=self.image_key, smooth=self.smooth
        )

    def _load_scored(self, path: Path) -> ViewedRun:
        """A video with its reward, decoded again by the reward's decoder."""
        from jidm.cli.inputs import video_size
        from jidm.rewards.scoring import read_scores
        from jidm.visualization.viewer.load import decode_run, read_frames

        record = _choose(read_scores(path), path, self.video)
        video = Path(record["video"])
        config = self.model.reward_config(None, lambda: video_size(video, self.fps), self.fps)
        idm = config.build_idm()
        motion = idm.decode(video, q0=config.initial_pose(str(video)), fps=self.fps, smooth=self.smooth, progress=True)
        reasons = tuple(record.get("reasons") or ()) + ((record["problem"],) if record.get("problem") else ())
        return decode_run(
            *read_frames(video, self.fps), motion, idm, f"{video.name}: reward {record['reward']:.2f} of 10",
            penalties=record.get("by_frame"), notes=reasons,
        )  # fmt: skip


def _holds_images(folder: Path) -> bool:
    """Whether a folder is a video as images, and not a decode folder with its plot."""
    from jidm.visualization.viewer.load import MOTION_FILE, SUMMARY_FILE

    if any((folder / name).exists() for name in (MOTION_FILE, SUMMARY_FILE)):
        return False
    return any(path.suffix.lower() in (".png", ".jpg", ".jpeg") for path in folder.iterdir())


def _choose(records: list[dict[str, Any]], path: Path, video: Path | None) -> dict[str, Any]:
    if not records:
        raise InputError(f"{path}: holds no scores; 'jidm score VIDEO ... --out {path}' writes them")
    if video is None:
        return min(records, key=lambda record: float(record["reward"]))
    chosen = [r for r in records if r["video"] == str(video)] or [
        r for r in records if Path(r["video"]).name == video.name
    ]
    if not chosen:
        raise InputError(f"{path}: has no score of {video}; it holds {', '.join(str(r['video']) for r in records[:5])}")
    return chosen[0]
