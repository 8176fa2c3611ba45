"""One program, three robots: only the name changes. Needs the extra `sim`."""

from __future__ import annotations

import numpy as np
import tyro

from jidm import JacobianIDM, load_embodiment
from jidm.sim import Scene, random_motion


def decode(name: str, frames: int, fps: float) -> float:
    """Render a robot's random motion, decode it, and return the mean error of a step over the mean step."""
    robot = load_embodiment(name)
    camera = robot.camera("front")
    truth = random_motion(robot, frames, 1 / fps, seed=4)
    with Scene(robot) as scene:
        video = np.stack([scene.render(q, camera).rgb for q in truth])

    idm = JacobianIDM.from_embodiment(robot, camera=camera)
    motion = idm.decode(video, q0=truth[0], fps=fps, layout="THWC", smooth=True)

    arm = ~robot.gripper_mask
    step = np.diff(truth, axis=0)[:, arm]
    error = np.abs(motion.delta_q.double().numpy()[:, arm] - step)
    relative = float(error.mean() / np.abs(step).mean())
    seen = float(motion.observable[:, arm].float().mean())
    print(f"{robot.title:40s} {robot.n:2d} joints, {seen:4.0%} observable, relative error {relative:.3f}")
    return relative


def main(robots: tuple[str, ...] = ("panda", "ur5", "allegro_right"), frames: int = 24, fps: float = 16.0) -> None:
    """Decode each robot with the same lines.

    Args:
        robots: names from `jidm embodiments`.
        frames: of each video.
        fps: frames a second.
    """
    for name in robots:
        decode(name, frames, fps)


if __name__ == "__main__":
    tyro.cli(main)
