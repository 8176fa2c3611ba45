"""A robot that is not registered: write its URDF, place a camera, render a video, decode it. Needs the extra `sim`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tyro

from jidm import Camera, JacobianIDM, embodiment_from_urdf
from jidm.sim import Scene, random_motion

LINK = """
  <link name="{name}">
    <visual><origin xyz="0 0 {half}"/><geometry><box size="{width} {width} {length}"/></geometry>
      <material name="{name}"><color rgba="{color} 1"/></material></visual>
  </link>"""
JOINT = """
  <joint name="{name}" type="revolute">
    <parent link="{parent}"/><child link="{child}"/><origin xyz="0 0 {height}"/><axis xyz="{axis}"/>
    <limit lower="-1.5" upper="1.5" velocity="2" effort="10"/>
  </joint>"""


def urdf() -> str:
    """A pedestal with three boxes on it: a turning shoulder, and an upper arm and forearm that bend."""
    lengths, colors = (0.3, 0.15, 0.35, 0.3), ("0.3 0.3 0.3", "0.8 0.5 0.1", "0.2 0.4 0.8", "0.7 0.2 0.2")
    names, axes = ("pedestal", "shoulder", "upper_arm", "forearm"), ("0 0 1", "0 1 0", "0 1 0")
    links = [
        LINK.format(name=name, half=length / 2, length=length, width=0.12 - 0.02 * k, color=color)
        for k, (name, length, color) in enumerate(zip(names, lengths, colors))
    ]
    joints = [
        JOINT.format(name=f"joint_{k + 1}", parent=names[k], child=names[k + 1], height=lengths[k], axis=axes[k])
        for k in range(3)
    ]
    return f'<robot name="boxes">{"".join(links)}{"".join(joints)}\n</robot>\n'


def main(frames: int = 24, out: Path = Path("my_robot")) -> None:
    """Decode a video of a robot described here.

    Args:
        frames: length of the video.
        out: folder for the URDF, the camera and the result.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "robot.urdf").write_text(urdf())
    robot = embodiment_from_urdf(out / "robot.urdf", home=[0.3, 0.7, 0.9])
    print(f"{robot.n} joints: {', '.join(robot.joint_names)}")
    for key, note in robot.notes.items():
        print(f"  {key}: {note}")  # what the URDF does not state, and the default that was taken

    camera = Camera.from_dict(
        {"width": 320, "height": 240, "eye": [0.9, -1.2, 1.5], "target": [0.1, 0.0, 0.5], "fov_y": 45.0}
    )
    camera.save(out / "camera.json")
    truth = random_motion(robot, frames, 1 / 16, seed=0, start=robot.home)
    with Scene(robot) as scene:
        video = np.stack([scene.render(q, camera).rgb for q in truth])

    idm = JacobianIDM.from_embodiment(robot, camera=camera)
    motion = idm.decode(video, q0=robot.home, fps=16)

    error = np.abs(motion.position.double().numpy() - truth)
    print(f"largest position error {error.max():.4f} rad, two standard deviations {2 * motion.position_std.max():.4f}")


if __name__ == "__main__":
    tyro.cli(main)
