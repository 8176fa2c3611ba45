"""Exact geometry with learned eyes: URDF and camera say how the robot moves, a network where it is in the first frame."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.errors import CheckpointError
from jidm.fields.analytic import AnalyticField
from jidm.fields.free.network import LearnedField

if TYPE_CHECKING:
    from jidm.camera.model import Camera
    from jidm.robot.embodiment import Embodiment


class HybridField(AnalyticField):
    """An exact field that need not be told the first pose: a network trained for the robot reads it off the picture.

    Args:
        learned: trained for this robot.
        embodiment: the robot.
        camera: of the video.
        points, occluders, seed: as of `AnalyticField`.

    Raises:
        CheckpointError: the network was trained for other joints.
    """

    def __init__(
        self,
        learned: LearnedField,
        embodiment: Embodiment,
        camera: Camera,
        *,
        points: int = 4000,
        occluders: int = 20000,
        seed: int = 0,
    ) -> None:
        if tuple(learned.joint_names) != tuple(embodiment.joint_names):
            raise CheckpointError(
                f"the network knows the joints {', '.join(learned.joint_names)}, '{embodiment.name}' has "
                f"{', '.join(embodiment.joint_names)}; use the robot it was trained for"
            )
        super().__init__(embodiment, camera, points=points, occluders=occluders, seed=seed)
        self.learned = learned

    @torch.no_grad()
    def predict_pose_from_frame(self, frame: Float[Tensor, "3 H W"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Joint positions as the network reads them off a frame, and their standard deviation [rad or m], in float64."""
        q, std = self.learned.predict_pose(self.learned.encode(self.learned.letterbox(frame)[None]))
        return q[0].double().to(frame.device), std[0].double().to(frame.device)
