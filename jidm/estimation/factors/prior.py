"""Priors of variables."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.estimation.problem import NormalEquations, State
from jidm.estimation.robust import cauchy


@dataclass(frozen=True, eq=False)
class StudentTPrior:
    """Student's t prior of each component with 3 degrees of freedom, as iteratively reweighted least squares.

    Near the mean it equals a Gaussian; beyond two standard deviations its pull fades, so that sudden motions are possible.

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
        """Normal equations around the state, with the weight at its distance from the mean."""
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
