"""`jidm decode`: decode a video file into joint motion, with a plot and an overlay to check it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jidm.cli.model_args import ModelArgs
from jidm.cli.outputs import DecodeResult, make_folder, summary_text, write_results
from jidm.errors import VideoError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from jidm.idm import JacobianIDM


@dataclass(frozen=True)
class Decode:
    """Decode a robot video into joint velocities."""

    video: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="VIDEO")]
    """Video file, or folder of images (give --fps then)."""

    model: tyro.conf.OmitArgPrefixes[ModelArgs] = field(default_factory=ModelArgs)
    """The decoder."""

    out: Path = Path("jidm_decode")
    """Folder for motion.npz, motion.csv, plot.png, summary.json and, with a camera, overlay.mp4."""

    fps: float | None = None
    """Frame rate [1/s], if the file states none or a wrong one."""

    smooth: bool = False
    """Estimate each frame from later frames too (Rauch-Tung-Striebel smoothing)."""

    overlay: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = True
    """Write no overlay.mp4 (the decoded robot drawn over the video)."""

    def run(self) -> int:
        from jidm.cli.inputs import video_size

        make_folder(self.out)
        idm = self.model.build_idm(lambda: video_size(self.video, self.fps), q0_required=True)
        q0 = self.model.initial_pose(idm.embodiment)
        decoded = decode_file(self.video, idm, q0=q0, fps=self.fps, smooth=self.smooth)
        write_results(replace(decoded, embodiment_file=self.model.embodiment_file), self.out, overlay=self.overlay)
        print(summary_text(decoded))
        drawn = self.overlay and decoded.camera is not None
        print(f"written to {self.out}/: motion.npz, motion.csv, plot.png, summary.json{', overlay.mp4' * drawn}")
        return 0


def decode_file(
    video: Path, idm: JacobianIDM, *, q0: NDArray[Any] | None = None, fps: float | None = None, smooth: bool = False
) -> DecodeResult:
    """Decode a video file frame by frame, with a progress bar.

    Args:
        video: file, or folder of images.
        idm: the decoder.
        q0: (n,) joint positions in the first frame, if they are known [rad or m].
        fps: frame rate [1/s], if the file states none or a wrong one.
        smooth: estimate each frame from later frames too.

    Raises:
        VideoError: the file cannot be read, or its frame rate is unknown and not given.
    """
    from jidm.video.io import open_video

    stream = open_video(video, fps=fps if video.is_dir() else None)
    rate = fps or stream.fps
    if rate is None:
        raise VideoError(f"{video}: its frame rate is unknown; give --fps")
    start = time.perf_counter()
    motion = idm.decode(video, q0=q0, fps=fps, smooth=smooth, progress=True)
    seconds = time.perf_counter() - start
    method = str(idm.checkpoint["source"]) if idm.checkpoint else type(idm.flow).__name__
    camera = getattr(idm.field, "camera", None)  # a learned field has none
    return DecodeResult(motion, idm.embodiment, camera, video, rate, method, seconds)
