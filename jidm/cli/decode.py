"""`jidm decode`: a video file in, joint motion out, with a plot and an overlay to judge it by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro


@dataclass(frozen=True)
class Decode:
    """Turn a robot video into joint velocities."""

    video: tyro.conf.Positional[Path]
    """Video file, or folder of images (give --fps then)."""

    embodiment: str
    """Robot: a name from `jidm embodiments`, a URDF file, or a folder with an embodiment.toml."""

    camera: str
    """Camera: a JSON file (width, height, K, T_camera_base; or eye, target, fov_y), or a named camera of the robot."""

    q0: tuple[str, ...]
    """Joint positions in the first frame [rad or m]: one number per joint, `home`, or a .npy or .json file."""

    out: Path = Path("jidm_decode")
    """Folder for motion.npz, motion.csv, plot.png, overlay.mp4 and summary.json."""

    fps: float | None = None
    """Frame rate [1/s], where the file does not know it or is wrong about it."""

    flow: Literal["dis", "raft"] = "dis"
    """How motion is measured first; raft fetches its weights unless --raft-weights names them."""

    raft_weights: Path | None = None
    """Local file of RAFT (large) weights, .pth or .safetensors; means --flow raft."""

    limits: Literal["all", "position", "none"] = "all"
    """Which joint limits hold: a sped-up or dreamt video may break speed limits, then say position."""

    overlay: bool = True
    """Write overlay.mp4."""

    def run(self) -> int:
        from jidm.cli.inputs import find_robot, read_q0
        from jidm.cli.outputs import decode_file, make_folder, summary_text, write_results

        robot = find_robot(self.embodiment)
        q0, camera = read_q0(self.q0, robot), robot.camera(self.camera)
        flow: Any = self.flow
        if self.raft_weights is not None:
            from jidm.motion.flow import RaftFlow

            flow = RaftFlow(weights=self.raft_weights)
        make_folder(self.out)
        decoded = decode_file(self.video, robot, camera, q0=q0, fps=self.fps, flow=flow, limits=self.limits)
        write_results(decoded, self.out, overlay=self.overlay)
        print(summary_text(decoded))
        print(f"written to {self.out}/: motion.npz, motion.csv, plot.png, summary.json{', overlay.mp4' * self.overlay}")
        return 0
