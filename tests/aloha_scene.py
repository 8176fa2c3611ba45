"""The ALOHA simulation robot of third parties: two ViperX-300s arms, their data set's joint convention and camera.

Facts (base placements, signs, gripper map, camera) are those of the material's SOURCE.md.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np

from jidm.robot.composition import compose
from jidm.robot.convention import JointConvention
from jidm.robot.embodiment import Embodiment
from jidm.robot.factory import embodiment_from_model
from jidm.robot.transforms import rigid_transform
from jidm.robot.urdf.reader import parse_urdf

ARM_JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
FINGER = "left_finger"
FINGER_CLOSED, FINGER_OPEN = 0.01844, 0.058
"""Finger position at normalized gripper 0 and 1 [m]."""


def viperx(material_path: Path) -> Embodiment:
    """One arm: 6 arm joints and the left finger (the right one mimics it); the gripper's propeller is locked."""
    folder = material_path / "interbotix_vx300s"
    text = (folder / "urdf" / "vx300s.urdf").read_text(encoding="utf-8")
    # The file names a ROS package; in the material its meshes lie beside the urdf folder.
    model = parse_urdf(
        text.replace("package://interbotix_descriptions/", "../"),
        where="vx300s.urdf",
        directory=folder / "urdf",
        mesh_roots=[folder],
    )
    arm = (math.pi, 1.86, 1.77, math.pi, 2.27, math.pi)
    return embodiment_from_model(
        model,
        name="viperx",
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
        joints=(*ARM_JOINTS, FINGER),
        locked={"gripper": 0.0},
        # The data overshoot the URDF's finger range of 0.021 to 0.057 m, and the simulator enforces no speed:
        # the first steps of the scripted episode reach 14 rad/s.
        lower=[*(-x for x in arm), 0.018],
        upper=[*arm, 0.0585],
        velocity=[math.inf] * 7,
        home=[0.0, -0.96, -1.16, 0.0, 0.3, 0.0, 0.04],
        control_dt=0.02,
        tip_links=("/ee_gripper_link",),
        gripper_joints=(FINGER,),
        license="BSD-3",
        source="Interbotix vx300s URDF; see SOURCE.md of the material",
    )


def aloha_embodiment(material_path: str | Path) -> tuple[Embodiment, JointConvention, dict[str, Any]]:
    """Two arms facing each other, the data set's joint convention, and its top camera.

    Args:
        material_path: the folder `aloha_sim`.

    Returns:
        embodiment: 14 joints, left arm then right arm, each 6 arm joints [rad] and the left finger's position [m].
        convention: `convention.to_embodiment(qpos)` turns the data set's (*batch, 14) `qpos` into `q`;
            elbow and wrist_angle are turned round, the gripper's 0..1 becomes meters.
        camera: `Camera.from_dict` form of the 640x480 top camera; base frame = the data set's world frame.
    """
    arm = viperx(Path(material_path))
    # The simulator's shoulder sits 0.3 mm higher than the URDF's; lifting the base puts every moving link in place.
    lift = 0.0003
    left, right = rigid_transform((-0.469, 0.5, lift)), rigid_transform((0.469, 0.5, lift), (0.0, 0.0, math.pi))
    robot = compose("aloha", left=(arm, left), right=(arm, right))
    one_arm = JointConvention.make(
        arm.joint_names,
        joint_types=arm.joint_types,
        sign={"elbow": -1, "wrist_angle": -1},
        normalized={FINGER: (FINGER_CLOSED, FINGER_OPEN)},
    )
    # SOURCE.md counts cx, cy from the image's corner; jidm's pixel (0, 0) is centered at u = v = 0, half a pixel in.
    focal = 240 / math.tan(math.radians(39))
    T_camera_base = np.diag([1.0, -1.0, -1.0, 1.0])
    T_camera_base[:3, 3] = (0.0, 0.6, 0.8)
    camera = {"width": 640, "height": 480, "K": [focal, focal, 319.5, 239.5], "T_camera_base": T_camera_base.tolist()}
    return robot, JointConvention.join({"left": one_arm, "right": one_arm}), camera
