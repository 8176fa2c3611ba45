"""From a planner's frames to commands for a robot, with planning and execution side by side. Needs the extra `sim`.

The planner here is an oracle that renders a given motion. In real use it is a video model.
"""

from __future__ import annotations

import time
from threading import Lock

import numpy as np
import torch
import tyro

from jidm import JacobianIDM, load_embodiment
from jidm.control import ActionDecoder, AsyncController, ControlConfig, MotionLimits
from jidm.sim import Scene, random_motion
from jidm.sim.camera_placement import fit_camera_to_robot


def main(
    seconds: float = 4.0, chunk: int = 4, size: int = 256, video_rate: float = 6.25, control_rate: float = 25
) -> None:
    """Run the loop and print how far the robot is from the plan.

    Args:
        seconds: how long the robot is commanded.
        chunk: frames that the planner generates at a time.
        size: of the pictures [px].
        video_rate: frames a second of the plan.
        control_rate: commands a second.
    """
    robot = load_embodiment("panda")
    camera = fit_camera_to_robot(robot, robot.camera("front"), size, size, crop_fraction=0.15)
    goal = random_motion(robot, 1000, 1 / video_rate, seed=2, start=robot.home)
    scene, lock, planned = Scene(robot, seed=0), Lock(), 0

    def camera_image(q: np.ndarray) -> torch.Tensor:
        with lock:  # the planner and the loop share the scene
            return torch.from_numpy(scene.render(q, camera).rgb.copy()).permute(2, 0, 1) / 255

    def planner(frame: torch.Tensor) -> torch.Tensor:
        """From the camera's frame (3, H, W) to the frames (T, 3, H, W) that follow it."""
        nonlocal planned
        planned += chunk
        return torch.stack([camera_image(q) for q in goal[planned - chunk + 1 : planned + 1]])

    idm = JacobianIDM.from_pretrained("panda-sim")
    config = ControlConfig(video_rate=video_rate, control_rate=control_rate, action_space="joint_position")
    decoder = ActionDecoder(idm, config)
    controller = AsyncController(planner, decoder, mode="async_grounded")
    q = robot.home.copy()
    controller.reset(camera_image(q), q=q)
    limits, velocities = MotionLimits.from_embodiment(robot), []
    for k in range(int(seconds * control_rate)):
        began = time.perf_counter()
        frame = camera_image(q) if k % int(control_rate / video_rate) == 0 else None
        command = controller.step(frame=frame, q=q)
        q = command.action[0]  # this robot follows commands exactly
        velocities.append(command.velocity[0])
        time.sleep(max(0.0, 1 / control_rate - (time.perf_counter() - began)))
    scene.close()
    used = np.abs(velocities) / limits.velocity
    print(f"moved {np.abs(q - robot.home).max():.3f} rad, at most {used.max():.0%} of the velocity limits")
    print(controller.report())


if __name__ == "__main__":
    tyro.cli(main)
