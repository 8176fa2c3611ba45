"""How sure a trained field may be, and what helps it: measured on recordings that it was not trained on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.field.learned import LearnedField
from jidm.learn.batch import PairBatch
from jidm.learn.both_ways import BothWays, matched_flows
from jidm.learn.films import Film
from jidm.motion.flow.base import Flow
from jidm.solve.follow import FollowOptions, PoseFollower, learned_limits
from jidm.solve.learned_step import learned_step, solve_pairs
from jidm.solve.looks import SeenAt

_FEWEST_STEPS = 30  # of a joint, by which its spread is told


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Pairs whose steps are known.

    Attributes:
        at: all first pictures, then all second ones, at their true poses.
        delta_q: (B, n) the true steps [rad or m].
        flows: there and back, for steps that are solved from flow.
    """

    at: SeenAt
    delta_q: Float[Tensor, "B n"]
    flows: tuple[Flow, ...] = ()


@torch.no_grad()
def calibrate(field: LearnedField, batches: Iterable[PairBatch], rounds: int = 2) -> None:
    """Scale a field's uncertainties to the errors it makes on pairs, and see whether closer looks and guesses help it.

    The looser a look's say is, the more the next one begins with what was known before; so it takes two rounds to be
    exact, and one to watch a run by.

    One factor per joint: the geometric mean of what the 68 % and the 95 % interval of a normal distribution ask for.
    Where no batch brings flow that was measured, such flow is trusted as far as the network's own looks.
    """
    seen, measured, read, guessed = [], [], [], []
    for spread in (field.step_spread, field.flow_spread, field.state_spread, field.guess_spread):
        spread.fill_(1.0)
    field.guesses.fill_(False)
    for batch in batches:
        pictures = field.encode(torch.cat([batch.first, batch.second]))
        q, (state, std) = torch.cat([batch.q, batch.q_next]), field.state(pictures)
        read.append((state - q).abs() / std)
        pairs = _Pairs(SeenAt.of(field, pictures, q), batch.delta_q)
        seen.append(pairs)
        moves = BothWays.of(batch) if batch.field is None else None
        if moves is not None:
            measured.append(_Pairs(pairs.at, batch.delta_q, moves.measured()))
        if field.config.guess:
            guessed.append(_guess_errors(field, pairs, moves))
    field.state_spread.copy_(_spread(torch.cat(read)))
    tried = {}
    for closer in (False, True):
        field.looks_closer.fill_(closer)
        tried[closer] = _tried(field, seen)
    better = tried[True][0] <= tried[False][0]
    field.looks_closer.fill_(better)
    field.step_spread.mul_(_spread(tried[better][1]))
    for _ in range(rounds - 1):
        field.step_spread.mul_(_spread(_tried(field, seen)[1]))
    field.flow_spread.copy_(_spread(_tried(field, measured)[1]) if measured else field.step_spread)
    if guessed:
        field.guess_spread.copy_(_spread(torch.cat(guessed)))
        _try_guesses(field, measured or seen)


@torch.no_grad()
def calibrate_videos(field: LearnedField, films: Iterable[Film]) -> None:
    """Scale the uncertainties of steps in videos to the errors made in following some.

    Errors last: a field that is wrong at a pose is wrong there in the next frame too, and taking them for independent
    makes a filter too sure.
    """
    field.video_spread.fill_(1.0)
    limits = learned_limits(field.config, field.delta_std)
    found = []
    for film in films:
        follower = PoseFollower(field, limits, FollowOptions())
        follower.start(film.frames[0], film.q[0])
        for t, delta_q in enumerate(film.q.diff(dim=0)):
            step = follower.step(film.frames[t + 1], film.dt, *(flow[t] for flow in film.flows))
            if step.valid:
                found.append((step.delta_q - delta_q).abs() / step.covariance.diagonal().sqrt())
    if len(found) >= _FEWEST_STEPS:
        field.video_spread.copy_(_spread(torch.stack(found)))


def _guess_errors(field: LearnedField, pairs: _Pairs, moves: BothWays | None) -> Float[Tensor, "B n"]:
    """Of guesses, in their standard deviations; from flow that was measured, if it was."""
    count, at = len(pairs.delta_q), pairs.at
    flows = (
        matched_flows(learned_step(field, at[:count], at[count:], closer=()))
        if moves is None
        else moves.to_guess_from()
    )
    step, std = field.guess(at.seen[:count], at.seen[count:], flows)
    return (step - pairs.delta_q).abs() / std


def _try_guesses(field: LearnedField, kept: Sequence[_Pairs]) -> None:
    """See whether guesses help. Their errors and those of steps have much in common, which widens both."""
    alone = _tried(field, kept)[0]
    field.guesses.fill_(True)
    error, deviations = _tried(field, kept)
    field.guesses.fill_(error < alone)
    for spread in (field.step_spread, field.flow_spread, field.guess_spread) if error < alone else ():
        spread.mul_(_spread(deviations))


def _tried(field: LearnedField, kept: Sequence[_Pairs]) -> tuple[float, Float[Tensor, "N n"]]:
    """Mean error of the steps [typical steps], and errors of what was measured in their standard deviations, NaN for joints
    that a pair does not show."""
    errors, deviations = [], []
    for pairs in kept:
        found = solve_pairs(field, pairs.at, *pairs.flows)
        errors.append((found.steps[-1] - pairs.delta_q) / field.delta_std)
        std = found.solution.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        error = (found.solution.delta_q - pairs.delta_q).abs()
        deviations.append(torch.where(found.solution.observable, error / std, torch.nan))
    return float(torch.cat(errors).abs().mean()), torch.cat(deviations)


def _spread(deviation: Float[Tensor, "N n"]) -> Float[Tensor, " n"]:
    """Factor per joint; NaN is left out. A joint that was hardly ever seen gets what is usual of the others."""
    share = torch.tensor([0.6827, 0.95], dtype=deviation.dtype, device=deviation.device)
    found = deviation.nanquantile(share, dim=0) / torch.tensor([[1.0], [1.96]]).to(deviation)
    spread = found.log().mean(0).exp().clamp(1e-3, 1e3)
    told = deviation.isfinite().sum(0) >= min(_FEWEST_STEPS, len(deviation))
    usual = spread[told].log().mean().exp() if bool(told.any()) else torch.ones_like(spread[0])
    return torch.where(told, spread, usual)
