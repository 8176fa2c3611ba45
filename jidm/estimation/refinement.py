"""Closer looks at two pictures: how the robot's brightness differs once a guessed joint step is undone.

Nothing in them is learned: trained weights of pixels, tried in their place, gave less precise steps than the robot's
mask alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jidm.estimation.factors.dense_photometric import CellEquations, cell_equations, reweight_by_motion
from jidm.fields.free.blocks import downsample, upsample2x
from jidm.fields.free.config import FLOW_STRIDE, STRIDE, LearnedFieldConfig
from jidm.fields.free.correlation import CorrelationHead
from jidm.fields.free.network import Features
from jidm.video.warping import gradients, symmetric_flow, warp

_MIN_ROBOT_PROBABILITY = 0.01  # cells that show the robot with less than this probability are not compared
_MOTION_PRIOR_STD = 0.5  # [px] how far a cell's motion may be off before anything is seen


@dataclass(frozen=True)
class RefinementStage:
    """How brightness is compared once.

    Attributes:
        scale: size of the pictures compared relative to (height, width); None = in all the detail there is.
        noise: brightness that differs where nothing is wrong, see `aligned`; larger while the step may still be off.
        reject_static: the step is nearly right: pixels that rather stayed in place than moved along count less, see
            `moved_along`. Earlier that would speak for whatever step is guessed.
    """

    scale: float | None
    noise: float
    reject_static: bool = False


REFINEMENT_STAGES = (
    RefinementStage(0.5, 0.4),
    RefinementStage(0.5, 0.4),
    RefinementStage(0.5, 0.4),
    RefinementStage(1.0, 0.4),
    RefinementStage(None, 0.1, reject_static=True),
    RefinementStage(None, 0.05, reject_static=True),
)
"""From coarse to fine; each begins where the one before ended. Coarse ones cost little and bring large steps near."""


@runtime_checkable
class JacobianPredictor(Protocol):
    """What reads pictures: a `LearnedField`, or what stands in for one."""

    @property
    def config(self) -> LearnedFieldConfig: ...
    @property
    def correlation(self) -> CorrelationHead: ...
    @property
    def delta_std(self) -> Tensor: ...
    @property
    def delta_correlation(self) -> Tensor: ...
    @property
    def step_std_scale(self) -> Tensor: ...
    @property
    def flow_std_scale(self) -> Tensor: ...
    @property
    def video_std_scale(self) -> Tensor: ...
    @property
    def use_refinement(self) -> Tensor: ...
    @property
    def use_step_regression(self) -> Tensor: ...
    def regress_step(
        self, first: Features, second: Features, flows: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]: ...
    def encode(self, image: Tensor) -> Features: ...
    def predict_pose(self, features: Features) -> tuple[Tensor, Tensor]: ...
    def jacobian(self, features: Features, q: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, eq=False)
class FieldEvaluation:
    """A batch of pictures with the field at their joint positions.

    Attributes:
        jacobian: (B, 2, n, h, w) [px of the picture per rad or m].
        mask: (B, h, w) logit of each cell's showing the robot.
    """

    features: Features
    jacobian: Float[Tensor, "b 2 n h w"]
    mask: Float[Tensor, "b h w"]

    @classmethod
    def of(cls, field: JacobianPredictor, features: Features, q: Float[Tensor, "b n"]) -> FieldEvaluation:
        """Read the field at joint positions q [rad or m]."""
        return cls(features, *field.jacobian(features, q.to(features.gray)))

    @property
    def on_flow_grid(self) -> tuple[Float[Tensor, "b 2 n i j"], Float[Tensor, "b i j"]]:
        """Field and probability of the robot on the coarser grid of flow."""
        factor = FLOW_STRIDE // STRIDE
        jacobian = downsample(self.jacobian.flatten(1, 2), factor).unflatten(1, self.jacobian.shape[1:3])
        return jacobian, downsample(self.mask.sigmoid()[:, None], factor)[:, 0]

    def detach_jacobian(self) -> FieldEvaluation:
        """The same for a solve that must not bend the field."""
        return FieldEvaluation(self.features, self.jacobian.detach(), self.mask)

    def __getitem__(self, index: Any) -> FieldEvaluation:
        """Index the batch axis."""
        return FieldEvaluation(self.features[index], self.jacobian[index], self.mask[index])


@dataclass(frozen=True)
class Crop:
    """Rows and columns of the field's grid around everything that shows the robot in any picture of a batch."""

    top: int
    bottom: int
    left: int
    right: int

    @classmethod
    def around_robot(cls, mask: Float[Tensor, "b h w"]) -> Crop:
        """A cell more on every side than the robot needs, so that what is interpolated between cells is right there."""
        robot = (mask.detach().sigmoid() > _MIN_ROBOT_PROBABILITY).any(0)
        h, w = robot.shape
        rows, columns = (robot.any(axis).nonzero()[:, 0].tolist() or [0] for axis in (1, 0))
        return cls(max(0, rows[0] - 1), min(h, rows[-1] + 2), max(0, columns[0] - 1), min(w, columns[-1] + 2))

    def apply(self, grid: Tensor, scale: int = 1) -> Tensor:
        """That part of a grid so many times as fine as the field's."""
        return grid[..., scale * self.top : scale * self.bottom, scale * self.left : scale * self.right]

    def corner(self, scale: int = 1) -> tuple[int, int]:
        """First row and column on a grid so many times as fine as the field's."""
        return scale * self.top, scale * self.left


@dataclass(frozen=True, eq=False)
class FlowMeasurement:
    """What was matched, one way.

    Attributes:
        flow: (B, 2, h, w) on the grid of flow [px of the picture].
        log_weight: (B, h, w) of its confidence (inverse variance, 1/px^2).
    """

    flow: Float[Tensor, "b 2 h w"]
    log_weight: Float[Tensor, "b h w"]


@dataclass(frozen=True, eq=False)
class PhotometricMeasurement:
    """Brightness compared around where a step leads, one way.

    Attributes:
        flow: (B, 2, h, w) where it leads, in the part of the field's grid that was compared [px of the picture].
        equations: what the robot's pixels say around it.
        crop: of the grid.
    """

    flow: Float[Tensor, "b 2 h w"]
    equations: CellEquations
    crop: Crop


def measured_flow(
    measurement: FlowMeasurement | PhotometricMeasurement, size: tuple[int, int]
) -> tuple[Float[Tensor, "b 2 h w"], Float[Tensor, "b h w"]]:
    """Motion on the robot as a look measured it: around where it looked, corrected cell by cell by what brightness asks for.

    Returns:
        Flow [px of the picture] on the field's grid of that size, and in [0, 1] how much of it was measured: along edges
        half of it is. Both are 0 where nothing was compared.
    """
    if isinstance(measurement, FlowMeasurement):
        weight = measurement.log_weight.exp()
        weight = weight / weight.flatten(1).amax(1).clamp(min=1e-12)[:, None, None]
        return upsample2x(measurement.flow), upsample2x(weight[:, None])[:, 0]
    hessian, gradient = (
        x.movedim((-2, -1), (1, 2)) for x in (measurement.equations.hessian, measurement.equations.gradient)
    )
    damped = hessian + torch.eye(2).to(hessian) / _MOTION_PRIOR_STD**2
    correction = torch.linalg.solve(damped, -gradient)
    measured_fraction = torch.linalg.solve(damped, hessian).diagonal(dim1=-2, dim2=-1).mean(-1)
    flow = measurement.flow.new_zeros(len(measurement.flow), 2, *size)
    weight = flow[:, 0].clone()
    measurement.crop.apply(flow)[:] = measurement.flow * (measured_fraction > 0)[:, None] + correction.movedim(-1, 1)
    measurement.crop.apply(weight)[:] = measured_fraction
    return flow, weight


def _step_flow(
    source: FieldEvaluation, target: FieldEvaluation, crop: Crop, step: Float[Tensor, "b n"]
) -> Float[Tensor, "b 2 h w"]:
    """Flow of a step on a part of the grid it starts from [px of the picture]."""
    forward = torch.einsum("bcnhw,bn->bchw", crop.apply(source.jacobian).detach(), step)
    backward = torch.einsum("bcnhw,bn->bchw", target.jacobian.detach(), step)
    return symmetric_flow(forward, backward, STRIDE, crop.corner())


def measure_photometric(
    stage: RefinementStage, source: FieldEvaluation, target: FieldEvaluation, crop: Crop, step: Float[Tensor, "b n"]
) -> PhotometricMeasurement:
    """Brightness around where a step [rad or m] leads, on the field's grid."""
    predicted_flow = _step_flow(source, target, crop, step)
    first, second = (_image_at_scale(x.features, stage.scale) for x in (source, target))
    pixels_per_cell = first.shape[-1] // source.mask.shape[-1]  # pixels compared per cell of the field
    scale = pixels_per_cell / STRIDE
    warped = warp(second, _upsample(predicted_flow, pixels_per_cell) * scale, crop.corner(pixels_per_cell))
    robot, cropped = _robot_weight(source, crop, pixels_per_cell), crop.apply(first, pixels_per_cell)
    if stage.reject_static:
        robot = reweight_by_motion(robot, cropped, crop.apply(second, pixels_per_cell), warped)
    equations = cell_equations(cropped, warped, robot, noise=stage.noise, cell_size=pixels_per_cell, scale=scale)
    return PhotometricMeasurement(predicted_flow, equations, crop)


def _robot_weight(evaluation: FieldEvaluation, crop: Crop, pixels_per_cell: int) -> Float[Tensor, "b 1 h w"]:
    """How much each pixel of a part counts, `pixels_per_cell` of them per cell."""
    robot = crop.apply(evaluation.mask).sigmoid()[:, None]
    return _upsample(torch.where(robot > _MIN_ROBOT_PROBABILITY, robot, 0), pixels_per_cell)


def _image_at_scale(features: Features, scale: float | None) -> Float[Tensor, "b 1 h w"]:
    if scale is None:
        return features.gray
    return downsample(features.gray_downsampled, round(1 / scale))


def _upsample(grid: Float[Tensor, "b c h w"], factor: int) -> Tensor:
    return F.interpolate(grid, scale_factor=float(factor), mode="bilinear", align_corners=False)


@torch.no_grad()
def photometric_error(
    first: FieldEvaluation, second: FieldEvaluation, crop: Crop, step: Float[Tensor, "b n"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Mean squares of the brightness by which the robot differs after a step, and of its slope [1/px of the picture]."""
    robot, image = _robot_weight(first, crop, STRIDE), crop.apply(first.features.gray_downsampled, STRIDE)
    flow = _upsample(_step_flow(first, second, crop, step), STRIDE)
    warped = warp(second.features.gray_downsampled, flow, crop.corner(STRIDE))
    gradient = gradients((image + warped) / 2)
    squares = ((warped - image).square(), gradient[0].square() + gradient[1].square())
    total = robot.flatten(1).sum(-1).clamp(min=1e-6)
    error, mean_gradient = ((x.mean(1, keepdim=True) * robot).flatten(1).sum(-1) / total for x in squares)
    return error, mean_gradient
