"""Measurements of the joint step between two images with a learned field: matched flow and dense direct alignment.

There is a field at both images, so that both directions are used: `J_first d = flow` and `-J_second d = backward_flow`. The
second-order errors of the two linearizations cancel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.estimation.factors.flow import normal_equations
from jidm.estimation.problem import STEP, NormalEquations, State
from jidm.estimation.refinement import (
    Crop,
    FieldEvaluation,
    FlowMeasurement,
    PhotometricMeasurement,
    RefinementStage,
    measure_photometric,
)


@dataclass(frozen=True, eq=False)
class MatchedFlowFactor:
    """Matched or external flow from one image to the other.

    Attributes:
        source: the image from which it starts, with its field.
        measurement: the flow.
        sign: 1 for flow from the first image to the second, -1 for backward flow.
    """

    source: FieldEvaluation
    measurement: FlowMeasurement
    sign: float = 1.0

    def linearize(self, state: State) -> NormalEquations:
        """Normal equations of the joint step around `state["step"]` [rad or m]; around zero if the state has none."""
        jacobian, robot = self.source.on_flow_grid
        jacobian, flow = self.sign * jacobian, self.measurement.flow
        if (step := state.get(STEP)) is not None:
            flow = flow - torch.einsum("bcnhw,bn->bchw", jacobian, step)
        return normal_equations(jacobian, flow, self.measurement.log_weight.exp() * robot, layout="dense")


@dataclass(frozen=True, eq=False)
class ImageAlignmentFactor:
    """Brightness of the robot's pixels in one image, aligned to the other.

    Attributes:
        source: the image whose pixels are compared, with its field. target: the other one.
        crop: part of the source's grid that shows the robot.
        stage: resolution and robust weights.
        sign: 1 if the source is the first image, -1 if it is the second.
    """

    source: FieldEvaluation
    target: FieldEvaluation
    crop: Crop
    stage: RefinementStage
    sign: float = 1.0

    def measure(self, step: Float[Tensor, "b n"]) -> PhotometricMeasurement:
        """Compare the images around a joint step [rad or m]."""
        return measure_photometric(self.stage, self.source, self.target, self.crop, self.sign * step)

    def linearize(self, state: State) -> NormalEquations:
        """Normal equations of the joint step around `state["step"]` [rad or m]."""
        return self.equations(self.measure(state[STEP]))

    def equations(self, measurement: PhotometricMeasurement) -> NormalEquations:
        """Equations of the cells' motion as normal equations of the joint step, by the Jacobian."""
        robot = self.crop.apply(self.source.mask).sigmoid()
        J = (self.sign * self.crop.apply(self.source.jacobian)).flatten(-2)
        cells = measurement.equations
        HJ = torch.einsum("bcdp,bdnp->bcnp", cells.hessian.flatten(-2), J)
        count = robot.flatten(1).sum(-1)
        return NormalEquations(
            H=J.movedim(2, 1).flatten(2) @ HJ.movedim(2, 1).flatten(2).mT,
            g=-torch.einsum("bcnp,bcp->bn", J, cells.gradient.flatten(-2)),
            cost=cells.cost.flatten(1).sum(-1),
            total_weight=count,
            num_observations=count,
            variables=((STEP, J.shape[-2]),),
        )
