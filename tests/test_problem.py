"""Normal equations over named variables: sums, embedding, scaling and marginalization against dense least squares."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from jidm.estimation.problem import Factor, NormalEquations, State, add_up, marginal

SIZES = {"position": 3, "light": 2, "offset": 1}
GROUPS = [("position",), ("position", "light"), ("offset", "position"), ("light", "offset")]
"""Variables of each factor, in different orders."""


class LinearFactor:
    """Residuals `A x - b` with weights, over some variables.

    Attributes:
        A: (*batch, rows, m). b: (*batch, rows). weight: (*batch, rows).
    """

    def __init__(self, names: Sequence[str], batch: Sequence[int] = (), rows: int = 12, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.names, width = tuple(names), sum(SIZES[x] for x in names)
        self.A = torch.randn(*batch, rows, width, generator=generator, dtype=torch.float64)
        self.b = torch.randn(*batch, rows, generator=generator, dtype=torch.float64)
        self.weight = 0.1 + torch.rand(*batch, rows, generator=generator, dtype=torch.float64)

    def linearize(self, state: State) -> NormalEquations:
        x = torch.cat([state[name] for name in self.names], -1)
        residual = torch.einsum("...rm,...m->...r", self.A, x) - self.b
        weighted = self.A * self.weight[..., None]
        return NormalEquations(
            weighted.mT @ self.A,
            -torch.einsum("...rm,...r->...m", weighted, residual),
            (self.weight * residual.square()).sum(-1),
            self.weight.sum(-1),
            (self.weight > 0).sum(-1).double(),
            tuple((name, SIZES[name]) for name in self.names),
        )

    def dense_rows(self, order: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Rows over all variables in that order, and right-hand sides, both times the root of the weight."""
        blocks = dict(zip(self.names, self.A.split([SIZES[x] for x in self.names], -1), strict=True))
        zero = self.A[..., :1] * 0
        A = torch.cat([blocks.get(x, zero.expand(*self.A.shape[:-1], SIZES[x])) for x in order], -1)
        root = self.weight.sqrt()
        return A * root[..., None], self.b * root


def factors(batch: Sequence[int] = ()) -> list[LinearFactor]:
    return [LinearFactor(names, batch, seed=k) for k, names in enumerate(GROUPS)]


def state_of(batch: Sequence[int] = (), seed: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(*batch, n, generator=generator, dtype=torch.float64) for name, n in SIZES.items()}


def dense_solution(problem: Sequence[LinearFactor], order: Sequence[str]) -> Tensor:
    rows = [f.dense_rows(order) for f in problem]
    A, b = torch.cat([a for a, _ in rows], -2), torch.cat([b for _, b in rows], -1)
    return torch.linalg.lstsq(A, b[..., None]).solution[..., 0]


def names_of(equations: NormalEquations) -> list[str]:
    return [name for name, _ in equations.variables]


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_a_sum_over_different_variables_is_the_dense_least_squares_problem(batch: tuple[int, ...]) -> None:
    problem, state = factors(batch), state_of(batch)
    total = add_up([f.linearize(state) for f in problem])
    order = names_of(total)
    assert sorted(order) == sorted(SIZES)
    start = torch.cat([state[x] for x in order], -1)
    solution = start + torch.linalg.solve(total.H, total.g)
    torch.testing.assert_close(solution, dense_solution(problem, order))
    rows = [f.dense_rows(order) for f in problem]
    cost = sum((torch.einsum("...rm,...m->...r", A, start) - b).square().sum(-1) for A, b in rows)
    torch.testing.assert_close(total.cost, cost)
    torch.testing.assert_close(total.total_weight, sum(f.weight.sum(-1) for f in problem))
    assert (total.num_observations == 48).all()


def test_a_sum_does_not_depend_on_the_order_of_its_terms() -> None:
    state, order = state_of(), dict(SIZES)
    terms = [f.linearize(state) for f in factors()]
    one, other = (add_up(x).embed(order) for x in (terms, terms[::-1]))
    assert one.variables == other.variables == tuple(SIZES.items())
    for name in ("H", "g", "cost", "total_weight"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name))


def test_equal_names_of_unequal_dimension_do_not_add_up() -> None:
    one = LinearFactor(["light"]).linearize(state_of())
    other = LinearFactor(["offset"]).linearize(state_of())
    with pytest.raises(ValueError, match="one dimension"):
        one + NormalEquations(*[getattr(other, k) for k in ("H", "g", "cost", "total_weight", "num_observations")],
                              (("light", 1),))  # fmt: skip


@pytest.mark.parametrize("batch", [(), (3,)])
def test_elimination_keeps_the_solution_and_recovers_the_rest(batch: tuple[int, ...]) -> None:
    problem, state = factors(batch), state_of(batch)
    total = add_up([f.linearize(state) for f in problem])
    order = names_of(total)
    solution = dict(zip(order, dense_solution(problem, order).split([SIZES[x] for x in order], -1), strict=True))
    least_cost = total.cost - torch.einsum("...i,...i->...", total.g, torch.linalg.solve(total.H, total.g))
    for gone in (["light"], ["position"], ["offset", "light"]):
        reduced, recover = total.eliminate(gone)
        kept = names_of(reduced)
        assert set(kept) == set(SIZES) - set(gone)
        step = torch.linalg.solve(reduced.H, reduced.g)
        changes = dict(zip(kept, step.split([SIZES[x] for x in kept], -1), strict=True)) | recover(step)
        assert set(changes) == set(SIZES)
        for name, change in changes.items():
            torch.testing.assert_close(state[name] + change, solution[name])
        torch.testing.assert_close(reduced.cost - (reduced.g * step).sum(-1), least_cost)


def test_elimination_marginalizes_the_gaussian() -> None:
    """The inverse of the reduced H is the block of the full covariance."""
    total = add_up([f.linearize(state_of()) for f in factors()]).embed(SIZES)
    reduced, _ = total.eliminate(["light", "offset"])
    torch.testing.assert_close(reduced.H.inverse(), total.H.inverse()[:3, :3])
    only, recover = marginal("position", [f.linearize(state_of()) for f in factors()])
    torch.testing.assert_close(only.H, reduced.H)
    torch.testing.assert_close(only.g, reduced.g)
    assert set(recover(torch.zeros(3).double())) == {"light", "offset"}


def test_eliminating_nothing_changes_nothing() -> None:
    total = LinearFactor(["position"]).linearize(state_of())
    same, recover = total.eliminate(["light"])
    assert same is total and recover(torch.zeros(3).double()) == {}


def test_embedding_permutes_and_pads_with_zeros() -> None:
    one = LinearFactor(["position", "light"]).linearize(state_of())
    wide = one.embed({"offset": 1, "light": 2, "position": 3})
    assert wide.variables == (("offset", 1), ("light", 2), ("position", 3))
    for a in ("position", "light"):
        torch.testing.assert_close(wide.gradient(a), one.gradient(a))
        for b in ("position", "light"):
            torch.testing.assert_close(wide.block(a, b), one.block(a, b))
        assert not wide.block("offset", a).any() and not wide.block(a, "offset").any()
    assert not wide.block("offset").any() and not wide.gradient("offset").any()
    torch.testing.assert_close(wide.H, wide.H.mT)
    back = wide.embed(dict(one.variables))
    assert torch.equal(back.H, one.H) and torch.equal(back.g, one.g)


def test_scaling_weights_every_residual_and_keeps_the_solution() -> None:
    factor, state = LinearFactor(["position", "light"]), state_of()
    one = factor.linearize(state)
    factor.weight = 2.5 * factor.weight
    scaled, heavier = one.scaled(2.5), factor.linearize(state)
    for name in ("H", "g", "cost", "total_weight", "num_observations"):
        torch.testing.assert_close(getattr(scaled, name), getattr(heavier, name))
    torch.testing.assert_close(torch.linalg.solve(scaled.H, scaled.g), torch.linalg.solve(one.H, one.g))


def test_a_linear_factor_is_a_factor() -> None:
    assert isinstance(LinearFactor(["light"]), Factor)
