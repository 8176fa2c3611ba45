"""Losses of a learned field, on pairs of frames and the joint steps between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jidm.estimation.refinement import FieldEvaluation, FlowMeasurement
from jidm.fields.free.config import FIELD_STRIDE
from jidm.training.bidirectional import BidirectionalMotion
from jidm.training.data.batch import PairBatch
from jidm.training.distributed import all_reduce_mean, weighted_mean
from jidm.video.warping import warp

_FLOW_EPS = 1e-2  # [px] of the Charbonnier loss: smaller errors count quadratically
_MIN_RELATIVE_MOTION = 0.01
"""Fraction of the mean motion below which a joint's column gets no larger weight."""
_MIN_MOTION = 0.1  # [px] lower bound of a batch's mean motion, so that static batches do not dominate
_MAX_SQUARED_DEVIATION = 50.0  # larger squared deviations do not train the uncertainty
_ROBOT_WEIGHT = 4.0
"""Weight of cells on the robot in the mask loss: they are few, and missing one costs measurements."""
_MOTION_THRESHOLD = 0.5  # [px] where no mask is known, what moves by more is the robot
_STATIC_WEIGHT = 0.1
"""Weight of a static cell there, which may show the robot at rest: what moves in a tenth of all pairs gets
probability 1/2."""


@dataclass(frozen=True)
class LossWeights:
    """Weight of each term of the loss.

    Attributes:
        field: field against the exact one, or field times executed step against the observed motion; relative to
            either.
        flow: of the correlation head, under the Laplace distribution of its confidence.
        step: joint steps solved from the network's own matches, in standard deviations of the training steps.
        step_from_flow: the same solved from estimated flow, where the exact field is unknown; trains how much such
            flow is worth to each joint.
        intermediate: weight of the solutions before the last within `step`.
        mask: of the robot.
        pose: absolute joint positions, and their uncertainty.
        smooth: total variation of the field where the image has no edges.
        step_regression: joint steps by regression; trains only their own head.
        photometric: difference of the images after warping by field and executed step; used where there is no flow.
    """

    field: float = 1.0
    flow: float = 0.15
    step: float = 0.5
    step_from_flow: float = 0.5
    intermediate: float = 0.3
    mask: float = 1.0
    pose: float = 0.5
    smooth: float = 0.02
    step_regression: float = 0.5
    photometric: float = 1.0


def field_loss(jacobian: Float[Tensor, "b 2 n h w"], motion: BidirectionalMotion) -> Float[Tensor, ""]:
    """Charbonnier loss of `jacobian @ step` against the motion to first order, relative to the batch's mean motion."""
    predicted = torch.einsum("bcnhw,bn->bchw", jacobian, motion.tangent_step)
    weight = motion.tangent_weight
    mean_motion = all_reduce_mean(weighted_mean(motion.tangent.square().sum(1).sqrt(), weight)).clamp(min=_MIN_MOTION)
    return weighted_mean(charbonnier(predicted - motion.tangent), weight) / mean_motion


def columns_loss(
    jacobian: Float[Tensor, "b 2 n y x"], batch: PairBatch, joint_scale: Float[Tensor, "n 1 1"]
) -> Float[Tensor, ""]:  # fmt: skip
    """Charbonnier loss of every joint's column against the exact one, for a typical step of the joint.

    Each column's loss is divided by the geometric mean of its own mean motion and that of all columns, so that a wrist
    joint, which moves few cells by little, is learned as well as a joint that moves the whole arm.

    Args:
        joint_scale: typical step of each joint [rad or m].
    """
    assert batch.field is not None and batch.field_weight is not None
    assert batch.field_back is not None and batch.field_weight_back is not None
    exact, weight = torch.cat([batch.field, batch.field_back]), torch.cat([batch.field_weight, batch.field_weight_back])
    target = joint_scale * exact

    def per_joint(x: Float[Tensor, "b n y x"]) -> Float[Tensor, " n"]:
        return torch.stack([weighted_mean(column, weight) for column in x.unbind(1)])

    mean_motion = all_reduce_mean(per_joint(target.square().sum(1).sqrt()))
    typical = mean_motion.mean().clamp(min=_MIN_MOTION)
    relative = (
        per_joint(charbonnier(joint_scale * jacobian - target))
        / (typical * mean_motion.maximum(_MIN_RELATIVE_MOTION * typical)).sqrt()
    )
    return relative.mean()


def flow_loss(measurements: Sequence[FlowMeasurement], motion: BidirectionalMotion) -> Float[Tensor, ""]:
    """Negative log-likelihood of the matched flow under the Laplace distribution of its confidence."""
    flow = torch.cat([x.flow for x in measurements])
    log_weight = torch.cat([x.log_weight for x in measurements])
    return weighted_mean(laplace_nll(flow - motion.flow, log_weight), motion.weight)


def laplace_nll(error: Float[Tensor, "b 2 h w"], log_weight: Float[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
    """Negative log-likelihood of flow errors [px] under a (smoothed) Laplace distribution of scale
    `exp(-log_weight / 2)`, up to a constant."""
    half = log_weight / 2
    return charbonnier(error) * half.exp() - half


def mask_loss(logit: Float[Tensor, "b y x"], motion: BidirectionalMotion) -> Float[Tensor, ""]:
    """Cross entropy against the robot's mask; without one against what moves, with a small weight where static."""
    if motion.mask is not None:
        return F.binary_cross_entropy_with_logits(logit, motion.mask, pos_weight=logit.new_tensor(_ROBOT_WEIGHT))
    moved = (motion.flow.square().sum(1).sqrt() > _MOTION_THRESHOLD).to(logit)
    weight = motion.weight * (moved + _STATIC_WEIGHT * (1 - moved))
    target, weight = (F.interpolate(x[:, None], size=logit.shape[-2:])[:, 0] for x in (moved, weight))
    return weighted_mean(F.binary_cross_entropy_with_logits(logit, target, reduction="none"), weight)


def photometric_loss(
    first: FieldEvaluation,
    image: Float[Tensor, "b 3 H W"],
    other: Float[Tensor, "b 3 H W"],
    delta_q: Float[Tensor, "b n"],
) -> Float[Tensor, ""]:
    """Charbonnier loss of the second image, warped back by field and executed step, against the first."""
    flow = torch.einsum("bcnhw,bn->bchw", first.jacobian, delta_q)
    scale = image.shape[-1] / (flow.shape[-1] * FIELD_STRIDE)
    flow = F.interpolate(flow * scale, size=image.shape[-2:], mode="bilinear", align_corners=False)
    return charbonnier(warp(other, flow) - image).mean()


def smoothness(field: Float[Tensor, "b 2 n h w"], gray: Float[Tensor, "b 1 H W"]) -> Float[Tensor, ""]:
    """Edge-aware total variation (Godard et al. 2017) of the field [px per typical step]."""
    h, w = field.shape[-2:]
    gray = F.interpolate(gray, size=(h, w), mode="area")
    flat = field.flatten(1, 2)
    total = torch.zeros((), dtype=field.dtype, device=field.device)
    for axis in (-1, -2):
        edge = gray.diff(dim=axis).abs()
        total = total + (flat.diff(dim=axis).abs() * (-10 * edge).exp()).mean()
    return total


def charbonnier(error: Float[Tensor, "b c *n h w"]) -> Float[Tensor, "b *n h w"]:
    """Charbonnier loss `sqrt(|e|^2 + eps^2)` of a vector field, or of several."""
    return (error.square().sum(1) + _FLOW_EPS**2).sqrt()


def gaussian_nll(error: Tensor, log_std: Tensor) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of Gaussian errors, up to a constant; trains the standard deviations alone."""
    return ((error.detach() / log_std.exp()).square().clamp(max=_MAX_SQUARED_DEVIATION) / 2 + log_std).mean()
