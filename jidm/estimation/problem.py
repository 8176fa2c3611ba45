"""Least-squares problems as sums of factors, each with normal equations over the variables that it constrains.

A state assigns a value to every named variable. A factor linearizes its residuals r around a state,

    cost(delta) = sum w |r + A delta|^2 = cost - 2 g' delta + delta' H delta,    H = sum w A'A,  g = -sum w A'r,

so that `H delta = g` at the minimum. Normal equations of several factors add up, also over different variables.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate
from operator import add
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

STEP = "step"
"""Joint step between two frames, (*batch, n) [rad or m]."""

POSITION = "position"
"""Joint positions in one frame, (*batch, n) [rad or m]."""

State = Mapping[str, Tensor]
"""Value of each variable, (*batch, d)."""


@dataclass(frozen=True, eq=False)
class NormalEquations:
    """`H @ delta = g` around a linearization point, before damping.

    Attributes:
        H: (*batch, m, m) sum of w A'A [1 / unit^2 of the variables, times the residuals' unit^2].
        g: (*batch, m) -sum of w A'r.
        cost: (*batch,) sum of w |r|^2 at the linearization point.
        total_weight: (*batch,) sum of w.
        num_observations: (*batch,) effective number of residual vectors, after robust re-weighting.
        variables: name and dimension of each block of H and g, in this order.
    """

    H: Float[Tensor, "*batch m m"]
    g: Float[Tensor, "*batch m"]
    cost: Float[Tensor, "*batch"]
    total_weight: Float[Tensor, "*batch"]
    num_observations: Float[Tensor, "*batch"]
    variables: tuple[tuple[str, int], ...]

    def __add__(self, other: NormalEquations) -> NormalEquations:
        """The sum of two problems, for instance of two cameras that observe the same joint step.

        Raises:
            ValueError: a variable has another dimension in the other problem.
        """
        names = dict(self.variables) | dict(other.variables)
        if not set(self.variables) <= set(names.items()):
            raise ValueError(
                f"variables of one name must have one dimension, got {self.variables} and {other.variables}"
            )
        one, two = (x if x.variables == tuple(names.items()) else x.embed(names) for x in (self, other))
        return NormalEquations(
            one.H + two.H,
            one.g + two.g,
            one.cost + two.cost,
            one.total_weight + two.total_weight,
            one.num_observations + two.num_observations,
            one.variables,
        )

    def scaled(self, weight: float) -> NormalEquations:
        """All weights multiplied by `weight`; the number of observations stays."""
        return replace(
            self,
            H=self.H * weight,
            g=self.g * weight,
            cost=self.cost * weight,
            total_weight=self.total_weight * weight,
        )

    def embed(self, variables: Mapping[str, int]) -> NormalEquations:
        """The same equations over more variables or in another order, with zeros for new variables."""
        names = tuple(variables.items())
        rows = _rows(self.variables)
        index = torch.tensor(
            [rows[name].start + k if name in rows else -1 for name, size in names for k in range(size)],
            device=self.g.device,
        )
        padded_g = torch.nn.functional.pad(self.g, (0, 1))
        padded_H = torch.nn.functional.pad(self.H, (0, 1, 0, 1))
        return replace(self, H=padded_H[..., index, :][..., index], g=padded_g[..., index], variables=names)

    def block(self, row: str, column: str | None = None) -> Tensor:
        """Block of H of two variables; the diagonal block of one if `column` is not given."""
        rows = _rows(self.variables)
        return self.H[..., rows[row], rows[column if column is not None else row]]

    def gradient(self, name: str) -> Tensor:
        """Block of g of one variable."""
        return self.g[..., _rows(self.variables)[name]]

    def eliminate(self, names: Iterable[str]) -> tuple[NormalEquations, Callable[[Tensor], dict[str, Tensor]]]:
        """Marginalize variables by the Schur complement.

        Returns:
            The equations over the remaining variables, and a function that maps their step to the steps of the eliminated
            ones (back substitution).
        """
        unwanted = set(names)
        eliminated = tuple(x for x in self.variables if x[0] in unwanted)
        if not eliminated:
            return self, lambda delta: {}
        kept = tuple(x for x in self.variables if x not in eliminated)
        ordered = self if self.variables == (*kept, *eliminated) else self.embed(dict([*kept, *eliminated]))
        n = sum(size for _, size in kept)
        H_kg = ordered.H[..., :n, n:]
        solved = torch.linalg.solve(
            ordered.H[..., n:, n:], torch.cat([ordered.H[..., n:, :n], ordered.g[..., n:, None]], dim=-1)
        )
        gain, offset = solved[..., :n], solved[..., n]
        reduced = replace(
            ordered,
            H=ordered.H[..., :n, :n] - H_kg @ gain,
            g=ordered.g[..., :n] - (H_kg @ offset[..., None])[..., 0],
            cost=ordered.cost - (ordered.g[..., n:] * offset).sum(-1),
            variables=kept,
        )

        def recover(delta: Tensor) -> dict[str, Tensor]:
            both = offset - (gain @ delta[..., None])[..., 0]
            return {name: both[..., rows] for name, rows in _rows(eliminated).items()}

        return reduced, recover


@runtime_checkable
class Factor(Protocol):
    """A term of a least-squares problem: measured flow, brightness, contours, a prior."""

    def linearize(self, state: State) -> NormalEquations | None:
        """Normal equations around a state; None if there are too few observations."""
        ...


def add_up(equations: Sequence[NormalEquations]) -> NormalEquations:
    """Sum of at least one set of normal equations."""
    return reduce(add, equations)


def marginal(
    name: str, equations: Sequence[NormalEquations]
) -> tuple[NormalEquations, Callable[[Tensor], dict[str, Tensor]]]:
    """The sum of normal equations with all variables but one eliminated, see `NormalEquations.eliminate`.

    Variables that only one set of equations has are eliminated before adding up, which needs smaller matrices.
    """
    count = Counter(variable for x in equations for variable, _ in x.variables)
    reduced, recover_own = zip(
        *(
            x.eliminate(variable for variable, _ in x.variables if variable != name and count[variable] == 1)
            for x in equations
        ),
        strict=True,
    )
    total, recover_shared = add_up(reduced).eliminate(x for x in count if x != name and count[x] > 1)

    def recover(delta: Tensor) -> dict[str, Tensor]:
        steps = recover_shared(delta)
        known = {**steps, name: delta}
        for x, recover_some in zip(reduced, recover_own, strict=True):
            steps |= recover_some(torch.cat([known[variable] for variable, _ in x.variables], dim=-1))
        return steps

    return total, recover


def _rows(variables: Sequence[tuple[str, int]]) -> dict[str, slice]:
    ends = list(accumulate(size for _, size in variables))
    return {name: slice(end - size, end) for (name, size), end in zip(variables, ends, strict=True)}
