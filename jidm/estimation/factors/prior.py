"""What is known of a variable before the frame is measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.estimation.problem import NormalEquations, State
from jidm.estimation.robust import cauchy


@dataclass(frozen=True, eq=False)
class StudentTPrior:
    """An independent prior per component, Student's t with 3 degrees of freedom as iteratively reweighted least squares.

    Heavier tails than a Gaussian's let a robot that really jumps be followed: the pull fades a few standard deviations
    from the mean.

    Attributes:
        variable: name of the variable.
        mean, std: (d,) in the variable's units.
        weight: factor on the information.
    """

    variable: str
    mean: Float[Tensor, " d"]
    std: Float[Tensor, " d"]
    weight: float = 1.0

    def linearize(self, state: State) -> NormalEquations:
        """Normal equations around the state, weighted by the distance from the mean there."""
        offset = self.mean - state[self.variable]
        information = self.weight * cauchy((offset / self.std / 2) ** 2) / self.std**2
        return NormalEquations(
            torch.diag_embed(information),
            information * offset,
            (information * offset.square()).sum(-1),
            information.sum(-1),
            torch.ones_like(information).sum(-1),
            ((self.variable, offset.shape[-1]),),
        )
