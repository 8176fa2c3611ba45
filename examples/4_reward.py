"""Score a good video of a robot and two that the robot could not execute. Needs the extra `sim`.

The reward uses the bundled learned field of the Panda, which needs neither camera calibration nor first pose.
"""

from __future__ import annotations

import numpy as np
import tyro

from jidm import load_embodiment
from jidm.rewards import ExecutabilityReward
from jidm.sim import Scene, random_motion
from jidm.sim.camera_placement import fit_camera_to_robot


def main(frames: int = 25, size: int = 256, fps: float = 12.5) -> None:
    """Score three videos.

    Args:
        frames: of each video; the bundled scales are of 25 frames.
        size: of the pictures [px].
        fps: frames a second.
    """
    robot = load_embodiment("panda")
    camera = fit_camera_to_robot(robot, robot.camera("front"), size, size, crop_fraction=0.15)
    with Scene(robot, seed=0) as scene:
        q = random_motion(robot, frames, 1 / fps, seed=3, start=robot.home)
        good = np.stack([scene.render(row, camera).rgb for row in q])
        away = scene.render(robot.home + np.eye(robot.n)[0] * 1.2, camera).rgb  # shows the background behind the arm

    cut = good.copy()
    cut[frames // 2 :] = good[: frames - frames // 2]  # jumps back to the start
    melting = good.astype(float)
    fade = np.linspace(0, 1, frames)[:, None, None, None] * np.linspace(1, 0, size)[None, :, None, None]
    melting = (melting * (1 - fade) + away * fade).astype(np.uint8)  # fades from the top, while it moves

    reward = ExecutabilityReward.from_pretrained("panda-sim")
    videos = {"good": good, "cut": cut, "melting": melting}
    for name, score in zip(videos, reward.score(list(videos.values()), fps=fps)):
        print(f"{name:8s} reward {float(score.reward):.2f}   EVA's alone {score.eva:.2f}")
        for reason in score.reasons:
            print(f"         {reason}")


if __name__ == "__main__":
    tyro.cli(main)
