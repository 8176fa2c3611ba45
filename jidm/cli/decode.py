"""`jidm decode`: a video file in, joint motion out, with a plot and an overlay to judge it by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from jidm.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from jidm.camera.model import Camera
    from jidm.idm import JacobianIDM


@dataclass(frozen=True)
class Decode:
    """Turn a robot video into joint velocities."""

    video: tyro.conf.Positional[Path]
    """Video file, or folder of images (give --fps then)."""

    checkpoint: str | None = None
    """Trained field: a checkpoint folder, a bundled name (panda-sim, ...) or a hub id. It needs neither --camera nor --q0."""

    embodiment: str | None = None
    """Robot: a name from `jidm embodiments`, a URDF file, or a folder with an embodiment.toml. The checkpoint's own if not
    given."""

    camera: str | None = None
    """Camera: a JSON file (width, height, K, T_camera_base; or eye, target, fov_y), or a named camera of the robot. With a
    checkpoint, the exact field of URDF and camera takes the place of the learned one; `trained` is that of its self-play."""

    q0: tuple[str, ...] = ()
    """Joint positions in the first frame [rad or m]: one number per joint, `home`, or a .npy or .json file."""

    out: Path = Path("jidm_decode")
    """Folder for motion.npz, motion.csv, plot.png, overlay.mp4 and summary.json."""

    fps: float | None = None
    """Frame rate [1/s], where the file does not know it or is wrong about it."""

    smooth: bool = False
    """Let neighbouring steps correct each other: robots move smoothly, errors of single steps do not."""

    flow: Literal["dis", "raft"] = "dis"
    """How motion is measured first, without a checkpoint; raft fetches its weights unless --raft-weights names them."""

    raft_weights: Path | None = None
    """Local file of RAFT (large) weights, .pth or .safetensors; means --flow raft."""

    limits: Literal["all", "position", "none"] = "all"
    """Which joint limits hold: a sped-up or dreamt video may break speed limits, then say position."""

    overlay: bool = True
    """Write overlay.mp4."""

    def run(self) -> int:
        from jidm.cli.outputs import decode_file, make_folder, summary_text, write_results

        make_folder(self.out)
        idm, camera = self._idm()
        q0 = self._q0(idm)
        decoded = decode_file(self.video, idm, camera=camera, q0=q0, fps=self.fps, smooth=self.smooth)
        write_results(decoded, self.out, overlay=self.overlay)
        print(summary_text(decoded))
        drawn = self.overlay and decoded.camera is not None
        print(f"written to {self.out}/: motion.npz, motion.csv, plot.png, summary.json{', overlay.mp4' * drawn}")
        return 0

    def _idm(self) -> tuple[JacobianIDM, Camera | None]:
        """What decodes; a camera of the robot is brought to the size of the video.

        Raises:
            InputError: without a checkpoint, robot, camera and first pose must be known.
        """
        from jidm.camera.model import Camera
        from jidm.checkpoint import load_checkpoint
        from jidm.cli.inputs import find_robot, read_q0, resize_camera
        from jidm.idm import JacobianIDM

        robot = None if self.embodiment is None else find_robot(self.embodiment)
        if self.checkpoint is not None and self.camera not in (None, "trained") and robot is None:
            raise InputError("--camera needs --embodiment as well: the exact field is that of a robot")
        checkpoint = None if self.checkpoint is None else load_checkpoint(self.checkpoint)
        if checkpoint is None:
            for name, value in (("embodiment", robot), ("camera", self.camera), ("q0", self.q0)):
                if not value:
                    raise InputError(f"--{name} is missing: without --checkpoint, robot, camera and q0 must be known")
        elif self.camera is None:
            return JacobianIDM.from_pretrained(checkpoint, embodiment=robot, limits=self.limits), None
        assert self.camera is not None
        if checkpoint is not None and self.camera == "trained":
            camera = Camera.from_dict(checkpoint.training_camera())
        else:
            assert robot is not None
            camera = robot.camera(self.camera)
        if checkpoint is None:
            assert robot is not None
            read_q0(self.q0, robot)  # before the video, so that a wrong pose is told first
        camera = resize_camera(camera, *self._size(), self.video)
        options: dict[str, Any] = {"camera": camera, "flow": self.flow, "limits": self.limits}
        if self.raft_weights is not None:
            from jidm.flow import RaftFlow

            options["flow"] = RaftFlow(weights=self.raft_weights)
        if checkpoint is None:
            assert robot is not None
            return JacobianIDM.from_embodiment(robot, **options), camera
        return JacobianIDM.from_pretrained(checkpoint, embodiment=robot, **options), camera

    def _size(self) -> tuple[int, int]:
        from jidm.video.io import open_video

        stream = open_video(self.video, fps=self.fps if self.video.is_dir() else None)
        return stream.width, stream.height

    def _q0(self, idm: JacobianIDM) -> NDArray[Any] | None:
        from jidm.cli.inputs import read_q0

        if not self.q0:
            return None
        if idm.embodiment is None:
            raise InputError("--q0 needs --embodiment: nobody says what joints the numbers belong to")
        return read_q0(self.q0, idm.embodiment)
