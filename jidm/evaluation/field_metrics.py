"""The Jacobian field and the flow that a model predicts at pairs of frames, if it has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.baselines.flow_source import estimate_bidirectional_flow
from jidm.baselines.vera import VeraField
from jidm.estimation.refinement import FieldEvaluation, measured_flow
from jidm.estimation.step_estimation import estimate_step, step_prior
from jidm.fields.free.network import LearnedField
from jidm.flow import FlowEstimator


@dataclass(frozen=True, eq=False)
class FieldPrediction:
    """A model's field and flow at B pairs of frames, on its grid (h, w) over the (H, W) image.

    Attributes:
        jacobian: (B, 2, n, h, w) field at the first frame [px of the image per rad or m].
        mask: (B, h, w) probability that a cell shows the robot; None for a model without one.
        flow: (B, 2, h, w) flow to the second frame [px of the image]; None for a model without one.
        weight: (B, h, w) confidence of the flow, in [0, 1]; None for a model without one.
        delta_q: (B, n) joint step [rad or m].
    """

    jacobian: Float[Tensor, "B 2 n h w"]
    mask: Float[Tensor, "B h w"] | None
    flow: Float[Tensor, "B 2 h w"] | None
    weight: Float[Tensor, "B h w"] | None
    delta_q: Float[Tensor, "B n"]

    @property
    def residual(self) -> Float[Tensor, "B h w"] | None:
        """Length of the flow that the step does not explain [px], times the robot's mask where there is one."""
        if self.flow is None:
            return None
        unexplained = self.flow - torch.einsum("bcnhw,bn->bchw", self.jacobian, self.delta_q)
        return unexplained.norm(dim=1) * (1 if self.mask is None else self.mask)


def predict_field(
    idm: Any, first: Float[Tensor, "B 3 H W"], second: Float[Tensor, "B 3 H W"], q: Float[Tensor, "B n"]
) -> FieldPrediction | None:
    """A model's field and flow at pairs of frames; None for a model without a field.

    Args:
        idm: the inverse dynamics model; its own `predict_field`, a learned field or VERA's are used.
        first, second: the frames, RGB in [0, 1], in the size that the model reads.
        q: joint positions at the first frame as the model estimates them [rad or m].
    """
    own = getattr(idm, "predict_field", None)
    if own is not None:
        prediction: FieldPrediction = own(first, second, q)
        return prediction
    field, model = getattr(idm, "field", None), getattr(idm, "model", None)
    if isinstance(field, LearnedField):
        return _predict_learned(field, first, second, q)
    if isinstance(model, VeraField):
        return _predict_vera(model, getattr(idm, "flow", None), first, second)
    return None


@torch.no_grad()
def _predict_learned(field: LearnedField, first: Tensor, second: Tensor, q: Tensor) -> FieldPrediction:
    a, b = field.encode(first), field.encode(second)
    start = q.to(first)
    at_first = FieldEvaluation.of(field, a, start)
    # The pose after the step is not known yet; that of a first solution is close enough to evaluate the field at.
    prior = step_prior(field, len(start))
    initial = estimate_step(field, at_first, FieldEvaluation.of(field, b, start), prior=prior)
    step = estimate_step(field, at_first, FieldEvaluation.of(field, b, start + initial.steps[-1]), prior=prior)
    flow, weight = measured_flow(step.last_measurement[0], field.config.grid)
    return FieldPrediction(at_first.jacobian, at_first.mask.sigmoid(), flow, weight, step.steps[-1])


@torch.no_grad()
def _predict_vera(model: VeraField, estimator: FlowEstimator | None, first: Tensor, second: Tensor) -> FieldPrediction:
    motion = (
        model.estimate_flow(first, second)
        if estimator is None
        else estimate_bidirectional_flow(estimator, first, second)
    )
    step = model.predict(first, second, None, motion).delta_q
    forward, _ = motion
    weight = forward.weight / forward.weight.flatten(1).amax(1).clamp(min=1e-12)[:, None, None]  # of any scale
    return FieldPrediction(model.jacobian(first), None, forward.flow, weight, step)
