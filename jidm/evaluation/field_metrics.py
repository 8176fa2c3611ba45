"""A look inside: the Jacobian field and the motion that a model saw at a pair of frames, if it has such things."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.estimation.factors.learned import estimate_step, step_prior
from jidm.estimation.refinement import FieldEvaluation, measured_flow
from jidm.fields.free.network import LearnedField


@dataclass(frozen=True, eq=False)
class FieldPrediction:
    """What a model saw at B pairs of frames, on its grid (h, w) over the (H, W) picture.

    Attributes:
        jacobian: (B, 2, n, h, w) field at the first frame [px of the picture per rad or m].
        mask: (B, h, w) where it sees the robot, in [0, 1]; None if it does not tell.
        flow: (B, 2, h, w) motion to the second frame [px of the picture]; None if it measures none.
        weight: (B, h, w) confidence of the flow, in [0, 1]; None if it has none.
        delta_q: (B, n) joint step it solves for [rad or m].
    """

    jacobian: Float[Tensor, "B 2 n h w"]
    mask: Float[Tensor, "B h w"] | None
    flow: Float[Tensor, "B 2 h w"] | None
    weight: Float[Tensor, "B h w"] | None
    delta_q: Float[Tensor, "B n"]

    @property
    def residual(self) -> Float[Tensor, "B h w"] | None:
        """Length of the motion that the step does not explain [px], on the robot where the model tells it apart."""
        if self.flow is None:
            return None
        unexplained = self.flow - torch.einsum("bcnhw,bn->bchw", self.jacobian, self.delta_q)
        return unexplained.norm(dim=1) * (1 if self.mask is None else self.mask)


def predict_field(
    idm: Any, first: Float[Tensor, "B 3 H W"], second: Float[Tensor, "B 3 H W"], q: Float[Tensor, "B n"]
) -> FieldPrediction | None:
    """What a model saw at pairs of frames; None for a model without a field.

    Args:
        idm: what decodes.
        first, second: the frames, RGB in [0, 1], in the size that the model reads.
        q: joint positions at the first frame as the model has them [rad or m].
    """
    own = getattr(idm, "probe", None)
    if own is not None:
        prediction: FieldPrediction = own(first, second, q)
        return prediction
    field, model = getattr(idm, "field", None), getattr(idm, "model", None)
    if isinstance(field, LearnedField):
        return _predict_learned(field, first, second, q)
    if getattr(model, "kind", None) == "vera":
        return _predict_vera(model, getattr(idm, "flow", None), first, second)
    return None


@torch.no_grad()
def _predict_learned(field: LearnedField, first: Tensor, second: Tensor, q: Tensor) -> FieldPrediction:
    a, b = field.encode(first), field.encode(second)
    start = q.to(first)
    at_first = FieldEvaluation.of(field, a, start)
    # The pose after the step is not known yet; the first solution's is close enough to bend the field.
    prior = step_prior(field, len(start))
    initial = estimate_step(field, at_first, FieldEvaluation.of(field, b, start), prior=prior)
    step = estimate_step(field, at_first, FieldEvaluation.of(field, b, start + initial.steps[-1]), prior=prior)
    flow, weight = measured_flow(step.last_measurement[0], field.config.grid)
    return FieldPrediction(at_first.jacobian, at_first.mask.sigmoid(), flow, weight, step.steps[-1])


@torch.no_grad()
def _predict_vera(model: Any, estimator: Any, first: Tensor, second: Tensor) -> FieldPrediction:
    from jidm.baselines.flow_source import estimate_bidirectional_flow

    motion = model.motion(first, second) if estimator is None else estimate_bidirectional_flow(estimator, first, second)
    step = model.measure(first, second, None, motion).delta_q
    return FieldPrediction(model.jacobian(first), None, motion.flow, _normalize_weight(motion.weight), step)


def _normalize_weight(weight: Float[Tensor, "B h w"]) -> Float[Tensor, "B h w"]:
    """Weights of any scale as shares of the largest."""
    return weight / weight.flatten(1).amax(1).clamp(min=1e-12)[:, None, None]
