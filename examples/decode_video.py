"""Decode a robot video into joint velocities, from Python.

    python examples/decode_video.py VIDEO --embodiment panda --camera camera.json --q0 0 -0.8 0 -2.4 0 1.6 0.8 0.02

Without a video it renders one first (needs the extra `sim`), and then compares with the truth:

    python examples/decode_video.py --embodiment panda --frames 24
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from jidm import Embodiment, JacobianIDM, load_embodiment, write_video
from jidm.visualization import plot_motion


def render(robot: Embodiment, frames: int, fps: float, path: Path) -> np.ndarray:
    """Write a video of a smooth random motion and return its joint positions (T, n) [rad or m]."""
    from jidm.sim import Scene, smooth_motion

    q = smooth_motion(robot, frames, 1 / fps, seed=1)
    with Scene(robot) as world:
        write_video(path, (world.render(row, robot.camera("front")).rgb for row in q), fps)
    return q


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("video", type=Path, nargs="?", help="video file; rendered if not given")
    parser.add_argument("--embodiment", default="panda", help="a name from `jidm embodiments`")
    parser.add_argument("--camera", default="front", help="JSON file or a camera of the robot")
    parser.add_argument("--q0", type=float, nargs="+", help="joint positions in the first frame [rad or m]")
    parser.add_argument("--frames", type=int, default=24, help="length of the rendered video")
    parser.add_argument("--out", type=Path, default=Path("decoded"), help="folder for results")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    robot = load_embodiment(args.embodiment)
    truth = None
    if args.video is None:
        args.video = args.out / "rendered.mp4"
        truth = render(robot, args.frames, 16.0, args.video)
    q0 = args.q0 if args.q0 is not None else truth[0] if truth is not None else robot.home

    idm = JacobianIDM.from_embodiment(robot, camera=args.camera, flow="dis")
    motion = idm.decode(args.video, q0=q0, progress=True)

    motion.save(args.out / "motion.npz")
    motion.to_csv(args.out / "motion.csv")
    plot_motion(motion, args.out / "plot.png", truth=truth)

    speed = motion.velocity.abs().mean(0)
    for k, name in enumerate(motion.joint_names):
        seen = motion.observable[:, k].float().mean()
        print(f"{name:24s} mean speed {speed[k]:.4f}   observable in {seen:.0%} of the steps")
    if truth is not None:
        step = np.diff(truth, axis=0)
        error = np.abs(motion.delta_q.double().numpy() - step)
        print(f"mean |error of a step| / mean |step| = {error.mean() / np.abs(step).mean():.3f}")


if __name__ == "__main__":
    main()
