"""Direct alignment of two images with a learned field: brightness of the robot's pixels around the flow of a joint step.

Only field and mask are learned. Trained pixel weights in addition to the mask made the steps less accurate.
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
from jidm.fields.free.config import FIELD_STRIDE, FLOW_STRIDE, LearnedFieldConfig
from jidm.fields.free.correlation import CorrelationHead
from jidm.fields.free.network import Features
from jidm.video.warping import gradients, symmetric_flow, warp

_MIN_ROBOT_PROBABILITY = 0.01  # cells below it are not compared
_MOTION_PRIOR_STD = 0.5  # [px] prior of a cell's motion around the flow of the step


@dataclass(frozen=True)
class RefinementStage:
    """One stage of the alignment.

    Attributes:
        scale: size of the compared images relative to (height, width) of the config; None = full resolution.
        noise: scale of Cauchy's weight, see `cell_equations`; larger while the step may still be wrong.
        reject_static: reduce the weight of pixels that stayed in place, see `reweight_by_motion`. Only for a step that is
            nearly right, since it favors any step that it starts from.
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
"""From coarse to fine; each stage starts at the result of the one before. Coarse ones are cheap and handle large steps."""


@runtime_checkable
class JacobianPredictor(Protocol):
    """A network that predicts Jacobians from images, `LearnedField` above all; see there for the members."""

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
    """Features of a batch of images with the field at given joint positions.

    Attributes:
        features: of the images.
        jacobian: (B, 2, n, h, w) [px of the image per rad or m].
        mask: (B, h, w) logit of the probability that a cell shows the robot.
    """

    features: Features
    jacobian: Float[Tensor, "b 2 n h w"]
    mask: Float[Tensor, "b h w"]

    @classmethod
    def of(cls, field: JacobianPredictor, features: Features, q: Float[Tensor, "b n"]) -> FieldEvaluation:
        """Evaluate a field at joint positions q [rad or m]."""
        return cls(features, *field.jacobian(features, q.to(features.gray)))

    @property
    def on_flow_grid(self) -> tuple[Float[Tensor, "b 2 n i j"], Float[Tensor, "b i j"]]:
        """Jacobian and robot probability on the coarser grid of flow."""
        factor = FLOW_STRIDE // FIELD_STRIDE
        jacobian = downsample(self.jacobian.flatten(1, 2), factor).unflatten(1, self.jacobian.shape[1:3])
        return jacobian, downsample(self.mask.sigmoid()[:, None], factor)[:, 0]

    def detach_jacobian(self) -> FieldEvaluation:
        """The same with a constant Jacobian, so that a solve trains only the mask and the features."""
        return FieldEvaluation(self.features, self.jacobian.detach(), self.mask)

    def __getitem__(self, index: Any) -> FieldEvaluation:
        """Index the batch axis."""
        return FieldEvaluation(self.features[index], self.jacobian[index], self.mask[index])


@dataclass(frozen=True)
class Crop:
    """Rows and columns of the field's grid that may show the robot in any image of a batch."""

    top: int
    bottom: int
    left: int
    right: int

    @classmethod
    def around_robot(cls, mask: Float[Tensor, "b h w"]) -> Crop:
        """Bounding box of the robot mask logits, with one more cell on every side for interpolation."""
        robot = (mask.detach().sigmoid() > _MIN_ROBOT_PROBABILITY).any(0)
        h, w = robot.shape
        rows, columns = (robot.any(axis).nonzero()[:, 0].tolist() or [0] for axis in (1, 0))
        return cls(max(0, rows[0] - 1), min(h, rows[-1] + 2), max(0, columns[0] - 1), min(w, columns[-1] + 2))

    def apply(self, grid: Tensor, scale: int = 1) -> Tensor:
        """Crop a grid that is `scale` times as fine as the field's."""
        return grid[..., scale * self.top : scale * self.bottom, scale * self.left : scale * self.right]

    def corner(self, scale: int = 1) -> tuple[int, int]:
        """First row and column on a grid that is `scale` times as fine as the field's."""
        return scale * self.top, scale * self.left


@dataclass(frozen=True, eq=False)
class FlowMeasurement:
    """Matched flow in one direction.

    Attributes:
        flow: (B, 2, h, w) on the grid of flow [px of the image].
        log_weight: (B, h, w) logarithm of its confidence (inverse variance, 1/px^2).
    """

    flow: Float[Tensor, "b 2 h w"]
    log_weight: Float[Tensor, "b h w"]


@dataclass(frozen=True, eq=False)
class PhotometricMeasurement:
    """Brightness compared around the flow of a step, in one direction.

    Attributes:
        flow: (B, 2, h, w) flow of the step in the crop of the field's grid [px of the image].
        equations: of each cell's motion around it.
        crop: part of the grid that was compared.
    """

    flow: Float[Tensor, "b 2 h w"]
    equations: CellEquations
    crop: Crop


def measured_flow(
    measurement: FlowMeasurement | PhotometricMeasurement, size: tuple[int, int]
) -> tuple[Float[Tensor, "b 2 h w"], Float[Tensor, "b h w"]]:
    """Flow of the robot as measured, cell by cell.

    Args:
        measurement: for a photometric one, the flow of the step is corrected by each cell's equations.
        size: (height, width) of the field's grid.

    Returns:
        Flow [px of the image] on the field's grid, and the measured fraction of it in [0, 1], which is a half along edges.
        Both are 0 where nothing was compared.
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
    """Symmetric flow of a step in a crop of the source's grid [px of the image]."""
    forward = torch.einsum("bcnhw,bn->bchw", crop.apply(source.jacobian).detach(), step)
    backward = torch.einsum("bcnhw,bn->bchw", target.jacobian.detach(), step)
    return symmetric_flow(forward, backward, FIELD_STRIDE, crop.corner())


def measure_photometric(
    stage: RefinementStage, source: FieldEvaluation, target: FieldEvaluation, crop: Crop, step: Float[Tensor, "b n"]
) -> PhotometricMeasurement:
    """Compare brightness around the flow of a step [rad or m], from source to target."""
    predicted_flow = _step_flow(source, target, crop, step)
    first, second = (_image_at_scale(x.features, stage.scale) for x in (source, target))
    pixels_per_cell = first.shape[-1] // source.mask.shape[-1]  # pixels compared per cell of the field
    scale = pixels_per_cell / FIELD_STRIDE
    warped = warp(second, _upsample(predicted_flow, pixels_per_cell) * scale, crop.corner(pixels_per_cell))
    robot, cropped = _robot_weight(source, crop, pixels_per_cell), crop.apply(first, pixels_per_cell)
    if stage.reject_static:
        robot = reweight_by_motion(robot, cropped, crop.apply(second, pixels_per_cell), warped)
    equations = cell_equations(cropped, warped, robot, noise=stage.noise, cell_size=pixels_per_cell, scale=scale)
    return PhotometricMeasurement(predicted_flow, equations, crop)


def _robot_weight(evaluation: FieldEvaluation, crop: Crop, pixels_per_cell: int) -> Float[Tensor, "b 1 h w"]:
    """Robot probability of each pixel of a crop, with `pixels_per_cell` pixels per side of a cell."""
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
    """Mean square brightness error of the robot after a step, and mean square brightness gradient [1/px^2 of the image]."""
    robot, image = _robot_weight(first, crop, FIELD_STRIDE), crop.apply(first.features.gray_downsampled, FIELD_STRIDE)
    flow = _upsample(_step_flow(first, second, crop, step), FIELD_STRIDE)
    warped = warp(second.features.gray_downsampled, flow, crop.corner(FIELD_STRIDE))
    gradient = gradients((image + warped) / 2)
    squares = ((warped - image).square(), gradient[0].square() + gradient[1].square())
    total = robot.flatten(1).sum(-1).clamp(min=1e-6)
    error, mean_gradient = ((x.mean(1, keepdim=True) * robot).flatten(1).sum(-1) / total for x in squares)
    return error, mean_gradient
