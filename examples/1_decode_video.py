"""Decode a robot video into joint velocities.

    python examples/1_decode_video.py --video VIDEO --embodiment panda --camera camera.json --q0 0 -0.8 0 -2.4 0 1.6 0.8 0.02

Without a video it renders one first (needs the extra `sim`) and compares with the truth.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tyro

from jidm import Embodiment, JacobianIDM, load_embodiment, write_video
from jidm.visualization import plot_motion


def render(robot: Embodiment, frames: int, fps: float, path: Path) -> np.ndarray:
    """Write a video of a smooth random motion and return its joint positions (T, n) [rad or m]."""
    from jidm.sim import Scene, random_motion

    q = random_motion(robot, frames, 1 / fps, seed=1)
    with Scene(robot) as scene:
        write_video(path, (scene.render(row, robot.camera("front")).rgb for row in q), fps)
    return q


def main(
    video: Path | None = None,
    embodiment: str = "panda",
    camera: str = "front",
    q0: tuple[float, ...] = (),
    frames: int = 24,
    out: Path = Path("decoded"),
) -> None:
    """Decode a video.

    Args:
        video: video file; rendered if not given.
        embodiment: a name from `jidm embodiments`.
        camera: JSON file, or a camera of the robot.
        q0: joint positions in the first frame [rad or m]; the robot's home if not given.
        frames: length of the rendered video.
        out: folder for results.
    """
    out.mkdir(parents=True, exist_ok=True)
    robot = load_embodiment(embodiment)
    truth = None
    if video is None:
        video = out / "rendered.mp4"
        truth = render(robot, frames, 16.0, video)
    start = np.array(q0) if q0 else robot.home if truth is None else truth[0]

    idm = JacobianIDM.from_embodiment(robot, camera=camera, flow="dis")
    motion = idm.decode(video, q0=start, progress=True)

    motion.save(out / "motion.npz")
    motion.to_csv(out / "motion.csv")
    plot_motion(motion, out / "plot.png", truth=truth)

    speed = motion.velocity.abs().mean(0)
    for k, name in enumerate(motion.joint_names):
        seen = motion.observable[:, k].float().mean()
        unit = "m/s" if robot.joint_types[k] == "prismatic" else "rad/s"
        print(f"{name:24s} mean speed {speed[k]:.4f} {unit:5s}   observable in {seen:.0%} of the steps")
    if truth is not None:
        step = np.diff(truth, axis=0)
        error = np.abs(motion.delta_q.double().numpy() - step)
        print(f"mean |error of a step| / mean |step| = {error.mean() / np.abs(step).mean():.3f}")


if __name__ == "__main__":
    tyro.cli(main)
