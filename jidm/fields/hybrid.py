"""The hybrid field: exact Jacobians from URDF and camera, and a network that predicts the first pose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    """An `AnalyticField` that predicts joint positions from a frame with a trained network.

    Args:
        learned: network trained for this robot.
        embodiment: the robot.
        camera: of the video.
        sampling: options of `AnalyticField`: numbers of points, seed, links, rasterizer.

    Raises:
        CheckpointError: the network was trained for other joints.
    """

    def __init__(
        self,
        learned: LearnedField,
        embodiment: Embodiment,
        camera: Camera,
        **sampling: Any,
    ) -> None:
        if tuple(learned.joint_names) != tuple(embodiment.joint_names):
            raise CheckpointError(
                f"the network has the joints {', '.join(learned.joint_names)}, '{embodiment.name}' has "
                f"{', '.join(embodiment.joint_names)}; use the robot it was trained for"
            )
        super().__init__(embodiment, camera, **sampling)
        self.learned = learned

    @torch.no_grad()
    def predict_pose_from_frame(self, frame: Float[Tensor, "3 H W"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Joint positions in a frame and their standard deviation [rad or m], in float64."""
        q, std = self.learned.predict_pose(self.learned.encode(self.learned.letterbox(frame)[None]))
        return q[0].double().to(frame.device), std[0].double().to(frame.device)
