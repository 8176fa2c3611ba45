"""Learned eyes, exact geometry: the network says where the robot is and what moved, URDF and camera how it moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jidm.errors import CheckpointError, InputError
from jidm.field.analytic import AnalyticField, AnalyticPose
from jidm.field.learned.config import STRIDE, LearnedFieldConfig
from jidm.field.learned.matching import PairHead
from jidm.field.learned.network import Encoded, LearnedField
from jidm.motion.fit import Fit

if TYPE_CHECKING:
    from jidm.robot.camera import Camera
    from jidm.robot.embodiment import Embodiment

_SURE = 8.0  # logit of a cell that the geometry puts on the robot, or off it


class HybridField:
    """A learned field whose Jacobian is the exact one at the pose it reads.

    A wrong pose bends the exact Jacobian little (0.05 rad a few per cent), so where URDF and camera are known this is
    the better field. What is in front of the robot only the network can tell: a cell counts as robot where both say so.

    Args:
        learned: trained for this robot.
        embodiment: the robot.
        camera: of the pictures, at the size the network reads.
        points: surface points behind the field's grid.
        seed: of their sampling.

    Raises:
        CheckpointError: the network was trained for other joints.
        InputError: the camera has another size than the network's pictures.
    """

    def __init__(
        self, learned: LearnedField, embodiment: Embodiment, camera: Camera, *, points: int = 8000, seed: int = 0
    ) -> None:
        if tuple(learned.joint_names) != tuple(embodiment.joint_names):
            raise CheckpointError(
                f"the network knows the joints {', '.join(learned.joint_names)}, '{embodiment.name}' has "
                f"{', '.join(embodiment.joint_names)}; use the robot it was trained for"
            )
        size = learned.config.height, learned.config.width
        if (camera.height, camera.width) != size:
            raise InputError(
                f"the camera is {camera.width}x{camera.height}, the network reads {size[1]}x{size[0]}: "
                f"pass camera.resized({size[1]}, {size[0]}) if it saw the whole picture"
            )
        self.learned = learned
        self.camera = camera
        self.seed = seed
        self.analytic = AnalyticField(embodiment, camera, points=points, occluders=points, seed=seed)

    @property
    def config(self) -> LearnedFieldConfig:
        """Of the network."""
        return self.learned.config

    @property
    def joint_names(self) -> tuple[str, ...]:
        """Names of the n joints, the order of every Jacobian's columns."""
        return self.learned.joint_names

    @property
    def pair(self) -> PairHead:
        """What matches two pictures."""
        return self.learned.pair

    @property
    def delta_std(self) -> Tensor:
        """(n,) a typical step of each joint [rad or m]."""
        return self.learned.delta_std

    @property
    def delta_correlation(self) -> Tensor:
        """(n, n) how typical steps of any two joints go together."""
        return self.learned.delta_correlation

    @property
    def step_spread(self) -> Tensor:
        """(n,) how much larger steps' errors are than the least squares think."""
        return self.learned.step_spread

    @property
    def flow_spread(self) -> Tensor:
        """The learned field's."""
        return self.learned.flow_spread

    @property
    def video_spread(self) -> Tensor:
        """The learned field's."""
        return self.learned.video_spread

    @property
    def looks_closer(self) -> Tensor:
        """True: the field is exact, whatever the learned one is."""
        return torch.ones((), dtype=torch.bool)

    @property
    def guesses(self) -> Tensor:
        """False: regression errs more than what an exact field measures."""
        return torch.zeros((), dtype=torch.bool)

    def guess(
        self, first: Encoded, second: Encoded, flows: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n"]]:
        """As `LearnedField.guess`."""
        return self.learned.guess(first, second, flows)

    def encode(self, image: Float[Tensor, "b 3 H W"]) -> Encoded:
        """As `LearnedField.encode`."""
        return self.learned.encode(image)

    def state(self, seen: Encoded) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n"]]:
        """As `LearnedField.state`."""
        return self.learned.state(seen)

    def jacobian(
        self, seen: Encoded, q: Float[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b 2 n h w"], Float[Tensor, "b h w"]]:
        """The exact field at q [px of the picture per rad or m], and the logit of each cell's showing the robot.

        The field reaches one cell over the robot's outline: pixels there still show it.
        """
        h, w = self.config.grid
        field, mask = self.analytic.dense(q, h, w)
        _, seen_mask = self.learned.jacobian(seen, q)
        return beyond_outline(field, mask) * STRIDE, torch.minimum(seen_mask, (2 * mask - 1) * _SURE)

    def at(self, q: Float[Tensor, "*batch n"], image: Tensor | None = None) -> AnalyticPose:
        """The exact field at joint positions q [rad or m]."""
        return self.analytic.at(q, image)

    def dense(
        self, q: Float[Tensor, "*batch n"], height: int, width: int, image: Tensor | None = None
    ) -> tuple[Float[Tensor, "*batch 2 n {height} {width}"], Float[Tensor, "*batch {height} {width}"]]:
        """As `AnalyticField.dense`."""
        return self.analytic.dense(q, height, width, image)


def beyond_outline(field: Float[Tensor, "*batch 2 n h w"], mask: Float[Tensor, "*batch h w"]) -> Tensor:
    """The field, in cells off the robot the mean of those around them that are on it; 0 where there are none."""
    batch, (n, h, w) = field.shape[:-4], field.shape[-3:]
    flat, on = field.reshape(-1, 2 * n, h, w), mask.reshape(-1, 1, h, w).to(field)
    around = F.avg_pool2d(flat * on, 3, 1, 1) / F.avg_pool2d(on, 3, 1, 1).clamp(min=1e-6)
    return torch.where(on > 0, flat, around).reshape(*batch, 2, n, h, w)


def fitted_camera(camera: Camera, fit: Fit) -> Camera:
    """The camera of pictures that were put into another size by `fit`."""
    K = camera.K.clone()
    K[0], K[1] = K[0] * fit.scale_u, K[1] * fit.scale_v
    K[0, 2] += (fit.scale_u - 1) / 2 + fit.left
    K[1, 2] += (fit.scale_v - 1) / 2 + fit.top
    return replace(camera, width=fit.width, height=fit.height, K=K)
