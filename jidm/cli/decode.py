"""`jidm decode`: decode videos into joint motion, with a plot and an overlay to check each."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jidm.atomic_io import replaced_files
from jidm.cli.model_args import ModelArgs
from jidm.cli.outputs import RESULT_FILES, DecodeResult, status_text, summary_text, write_json, write_results
from jidm.errors import InputError, VideoError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from jidm.idm import JacobianIDM
    from jidm.video.preparation import FrameSource

_INDEX = "videos.json"
"""File of a folder of results: their settings, and each video with its folder or its problem."""


@dataclass(frozen=True)
class Decode:
    """Decode robot videos into joint velocities."""

    videos: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[VIDEO ...]")]
    """Video file, folder of images (give --fps then), folder of videos, or pattern like 'clips/*.mp4'. Several may be given."""

    model: tyro.conf.OmitArgPrefixes[ModelArgs] = field(default_factory=ModelArgs)
    """The decoder. --q0 may also be a JSON file of file name -> numbers."""

    out: Path = Path("jidm_decode")
    """Folder for motion.npz, motion.csv, plot.png, summary.json, overlay.mp4 (with a camera); of many videos, one in it for each."""

    fps: float | None = None
    """Frame rate [1/s], if the file states none or a wrong one."""

    smooth: bool = False
    """Estimate each frame from later frames too (Rauch-Tung-Striebel smoothing)."""

    max_size: int = 1280
    """Longer side above which frames are reduced before decoding, with their camera [px]; 0 keeps the full size."""

    rotate: Literal[0, 90, 180, 270] = 0
    """Turn the video clockwise [degrees]; the camera is that of the turned video."""

    undistort: tuple[float, ...] = ()
    """Remove lens distortion: k1 k2 p1 p2 or k1 k2 p1 p2 k3 of OpenCV's model, for the K of --camera."""

    overlay: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = True
    """Write no overlay.mp4 (the decoded robot drawn over the video)."""

    def run(self) -> int:
        from jidm.cli.inputs import expand_videos, read_poses, result_names

        self._check()
        poses = read_poses(self.model.q0)
        self.model.check(q0_required=True, check_q0=poses is None)
        if len(self.videos) == 1 and not self.videos[0].exists() and not set("*?[") & set(str(self.videos[0])):
            raise VideoError(f"{self.videos[0]}: no such file or folder")
        videos, many = expand_videos(self.videos)
        names = result_names(videos)
        idm = self.model.build_idm(q0_required=True, check_q0=poses is None)
        if not many:
            self._decode(videos[0], idm, poses, self.out, whole=True)
            return 0
        return self._decode_many(videos, names, idm, poses)

    def _check(self) -> None:
        from jidm.cli.checks import check_at_least, check_out_folder, check_positive

        if not self.videos:
            raise InputError("name at least one VIDEO: a file, a folder of images or videos, or a pattern")
        check_positive(fps=self.fps)
        check_at_least(0, max_size=self.max_size)
        check_out_folder(self.out)
        if self.undistort and len(self.undistort) not in (4, 5):
            raise InputError(f"--undistort takes k1 k2 p1 p2 or k1 k2 p1 p2 k3, got {len(self.undistort)} numbers")
        if self.undistort and self.model.camera is None:
            raise InputError("--undistort needs --camera: the distortion is measured in its focal length")

    def _decode_many(self, videos: list[Path], names: list[str], idm: JacobianIDM, poses: Any) -> int:
        """Decode one after the other; a video that fails does not end the others."""
        from jidm.cli.text import one_line

        settings = self._settings(idm, poses)
        records = _earlier_records(self.out, settings)
        failed = 0
        for video, name in zip(videos, names, strict=True):
            folder = self.out / name
            record: dict[str, Any] = {"video": str(video), "folder": name, "problem": None}
            try:
                decoded = self._decode(video, idm, poses, folder, whole=False)
                print(f"{video}: {status_text(decoded)}; {folder}/", flush=True)
            except Exception as error:
                failed += 1
                record["problem"] = one_line(error)
                print(f"{video}: failed: {record['problem']}", file=sys.stderr, flush=True)
            records[name] = record
            if self.out.is_dir():
                write_json(self.out / _INDEX, {"settings": settings, "videos": list(records.values())})
        print(
            f"{len(videos) - failed} of {len(videos)} videos decoded; written to {self.out}/: a folder each, {_INDEX}"
        )
        return 1 if failed else 0

    def _decode(self, video: Path, idm: JacobianIDM, poses: Any, out: Path, *, whole: bool) -> DecodeResult:
        """Decode one video and write its folder; `whole` prints the table of its joints."""
        source, idm = self._prepare(video, idm)
        decoded = decode_file(
            source, idm, q0=self._pose(video, idm, poses), fps=self.fps, smooth=self.smooth, max_size=self.max_size
        )
        prepared = {"rotated": self.rotate, "undistorted": list(self.undistort)}
        motion = decoded.motion
        decoded = replace(decoded, motion=replace(motion, provenance={**motion.provenance, **prepared}))
        with replaced_files(out, RESULT_FILES) as folder:
            write_results(replace(decoded, embodiment_file=self.model.embodiment_file), folder, overlay=self.overlay)
        if whole:
            print(summary_text(decoded))
            drawn = self.overlay and decoded.camera is not None
            print(f"written to {out}/: motion.npz, motion.csv, plot.png, summary.json{', overlay.mp4' * drawn}")
        return decoded

    def _prepare(self, video: Path, idm: JacobianIDM) -> tuple[FrameSource, JacobianIDM]:
        """The video upright and without distortion, and the decoder with the camera of its size."""
        from jidm.cli.inputs import resize_camera
        from jidm.video.io import open_video
        from jidm.video.preparation import reduced_size, rotated, undistorted

        source = rotated(open_video(video, fps=self.fps if video.is_dir() else None), self.rotate)
        camera = getattr(idm.field, "camera", None)  # a learned field has none
        if camera is not None:
            scaled = resize_camera(camera, source.width, source.height)
            idm = idm.for_frame_size((camera.height, camera.width), (source.height, source.width))
            if self.undistort:
                source = undistorted(source, scaled.K, self.undistort)
        height, width = reduced_size(source.height, source.width, self.max_size)
        if (height, width) != (source.height, source.width):
            sizes = f"{source.width}x{source.height} frames are decoded at {width}x{height}"
            print(f"jidm: {video}: {sizes}; --max-size 0 keeps the full size", file=sys.stderr)
        return source, idm

    def _pose(self, video: Path, idm: JacobianIDM, poses: dict[str, list[float]] | None) -> NDArray[Any] | None:
        """Joint positions in the first frame of a video (n,) [rad or m]; None if the network estimates them."""
        from jidm.cli.inputs import check_pose

        robot = idm.embodiment
        if poses is None:
            return self.model.initial_pose(robot)
        if robot is None:
            raise InputError("--q0 needs --embodiment: it is unknown which joints the numbers belong to")
        for name in (str(video), video.name):
            if name in poses:
                return check_pose(poses[name], robot, source=f"{self.model.q0[0]}: {name}")
        raise InputError(f"{self.model.q0[0]} has no initial pose for {video.name}")

    def _settings(self, idm: JacobianIDM, poses: Any) -> dict[str, Any]:
        """What the results depend on besides the videos, as JSON values."""
        from jidm import __version__

        camera = getattr(idm.field, "camera", None)
        pose = self.model.initial_pose(idm.embodiment) if poses is None else None
        given = {key: value for key, value in asdict(self).items() if key not in ("videos", "out", "model")}
        values = {
            "jidm": __version__,
            **given,
            "embodiment": None if idm.embodiment is None else idm.embodiment.content_hash,
            "checkpoint": idm.checkpoint.get("content_hash"),
            "camera": None if camera is None else camera.to_dict(),
            "flow": None if idm.flow is None else type(idm.flow).__name__,
            "limits": idm.limits,
            "q0": poses if pose is None else pose.tolist(),
        }
        return dict(json.loads(json.dumps(values, default=str)))


def _earlier_records(out: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name of each result that is already in the folder -> its record.

    Raises:
        InputError: they were made with other settings.
    """
    index = out / _INDEX
    if not index.exists():
        return {}
    try:
        earlier = json.loads(index.read_text(encoding="utf-8"))
        records = {record["folder"]: record for record in earlier["videos"]}
        same = earlier["settings"] == settings
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{index} is not a list of decoded videos; choose another --out") from None
    if not same:
        different = [k for k in settings if earlier["settings"].get(k) != settings[k]]
        raise InputError(
            f"{out} holds results that were made with other settings ({', '.join(different)}); choose another --out"
        )
    return records


def decode_file(
    video: Path | FrameSource,
    idm: JacobianIDM,
    *,
    q0: NDArray[Any] | Sequence[float] | None = None,
    fps: float | None = None,
    smooth: bool = False,
    max_size: int = 0,
) -> DecodeResult:
    """Decode a video file frame by frame, with a progress bar.

    Args:
        video: file, folder of images, or a stream over one.
        idm: the decoder.
        q0: (n,) joint positions in the first frame, if they are known [rad or m].
        fps: frame rate [1/s], if the file states none or a wrong one.
        smooth: estimate each frame from later frames too.
        max_size: longer side above which frames are reduced [px]; 0 keeps the full size.

    Raises:
        VideoError: the file cannot be read, or its frame rate is unknown and not given.
    """
    from jidm.camera.model import Camera
    from jidm.video.io import open_video
    from jidm.video.preparation import reduced

    source: FrameSource = open_video(video, fps=fps if video.is_dir() else None) if isinstance(video, Path) else video
    rate = fps or source.fps
    if rate is None:
        raise VideoError(f"{source.path}: its frame rate is unknown; give --fps")
    start = time.perf_counter()
    motion = idm.decode(source, q0=q0, fps=fps, smooth=smooth, max_size=max_size, progress=True)
    seconds = time.perf_counter() - start
    method = str(idm.checkpoint["source"]) if idm.checkpoint else type(idm.flow).__name__
    camera = motion.provenance["camera"]  # of the frames as decoded; a learned field has none
    shown = reduced(source, max(motion.provenance["frame_size"]))
    return DecodeResult(
        motion, idm.embodiment, None if camera is None else Camera.from_dict(camera), shown, rate, method, seconds,
        getattr(idm.field, "links", None),
    )  # fmt: skip
