"""How a learned field is trained: forward and inverse together, on pairs of frames and the joint steps between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jidm.errors import InputError
from jidm.field.learned import LearnedField, LearnedFieldConfig
from jidm.field.learned.config import FLOW_STRIDE, STRIDE
from jidm.learn.batch import JointStats, PairBatch, normal
from jidm.learn.films import Film
from jidm.learn.together import over_processes, weighted_mean
from jidm.motion.flow.base import Flow
from jidm.solve.brightness import carry_back
from jidm.solve.follow import FollowOptions, PoseFollower, learned_limits
from jidm.solve.learned_step import LearnedStep, learned_step, step_pairs, usual_step
from jidm.solve.looks import Matched, SeenAt

_FLOW_EPS = 1e-2  # [px] below this a flow error counts as its square (Charbonnier)
_STEP_BETA = 0.05  # [standard deviations of the training steps] likewise for the inverse loss (smooth L1)
_STATE_BETA = 0.05  # [standard deviations of the training poses]
_STATE_CLAMP = 50.0  # squared deviations beyond this teach the uncertainty nothing
_POSE_NOISE = 0.05  # [standard deviations of the training poses] of the poses the field is asked at
_FIELD_BENDS = 0.7
"""Share of the training from which on solved steps bend a field that nobody knows: poor matches would spoil it."""
_ROBOT_COUNTS = 4.0
"""What a cell that shows the robot counts in the loss of the mask; few do, and to miss one costs measurements of it."""
_MOVED = 0.5  # [px] what moved by more is the robot, where nobody knows where it is
_REST_COUNTS = 0.1
"""What a cell that did not move counts there: it may show the robot at rest. What moves in a tenth of all pairs is told
to be the robot as likely as not."""
_FEWEST_STEPS = 30  # by which a spread is told
_LEAST_SHARE = 0.01  # of the mean motion: a joint that moves less is not worth more to be learned
_LEAST_MOTION = 0.1  # [px] mean motion a batch is counted with at least, so that still batches do not blow up


@dataclass(frozen=True)
class LossWeights:
    """What each part of the loss counts.

    Attributes:
        field: the field against the exact one, or times the executed step against the motion seen; relative to either.
        flow: of the pair head, with the confidence that its errors deserve.
        step: joint steps solved through the least squares, in standard deviations of the training steps.
        measured: the same solved from the flow that was measured, where nobody knows the field: so it learns what such
            flow is worth to each joint.
        early: share of the looks before the last in `step`.
        mask: where the robot is.
        state: absolute joint positions, and their uncertainty.
        compose: two steps one after the other add up to the step over both.
        smooth: total variation of the field where the picture has no edges.
        guess: joint steps by regression; teaches nothing but its own head.
        photometric: brightness carried by the field and the executed step; used where nothing measured the flow.
    """

    field: float = 1.0
    flow: float = 0.15
    step: float = 0.5
    measured: float = 0.5
    early: float = 0.3
    mask: float = 1.0
    state: float = 0.5
    compose: float = 0.0
    smooth: float = 0.02
    guess: float = 0.5
    photometric: float = 1.0


_Flows = tuple[tuple[Tensor, Tensor], ...]
"""Flow and its log-confidence, there and back."""

_Kept = tuple[SeenAt, Tensor, tuple[Flow, ...]]
"""Both pictures of pairs, the true steps, and flow there and back for steps that are solved from it."""


class TrainableField(LearnedField):
    """A `LearnedField` that knows its own loss.

    Every pair is used in both directions: swapping the frames flips the sign of the step, and the solver sees the flow
    both ways, so the two are trained to agree.
    """

    weights = LossWeights()
    progress = 1.0
    """Share of the training that is over."""

    @classmethod
    def from_data(
        cls, joint_names: Sequence[str], joint_types: Sequence[str], height: int, width: int, stats: JointStats,
        pretrained: bool = False, **options: Any,
    ) -> TrainableField:  # fmt: skip
        """An untrained field for recordings of that size and those joint statistics.

        Args:
            pretrained: begin with the backbone's pretrained weights.
            options: further entries of `LearnedFieldConfig`.
        """
        config = LearnedFieldConfig(
            tuple(joint_names), tuple(joint_types), height, width, stats.q_mean, stats.q_std, stats.delta_std,
            stats.q_lower, stats.q_upper, **{"delta_correlation": stats.delta_correlation, **options},
        )  # fmt: skip
        return cls(config, pretrained=pretrained)

    def losses(self, batch: PairBatch) -> dict[str, Tensor]:
        """Scalar parts of the loss; "loss" is what to minimise.

        Args:
            batch: with flow, exact or estimated, or without any: then the field learns from the joint steps and the
                brightness alone.
        """
        weight, count = self.weights, len(batch)
        seen = self.encode(torch.cat([batch.first, batch.second]))
        q = torch.cat([batch.q, batch.q_next])
        q_seen, q_std = self.state(seen)
        at = SeenAt.of(self, seen, self._asked_at(batch, q, q_seen))
        parts = {
            "state": self._state_loss(q, q_seen, q_std),
            "smooth": smoothness(at.jacobian * self._column, seen.small),
        }
        moves = _BothWays.of(batch)
        if moves is not None:
            exact = batch.field is not None
            parts["field"] = (
                columns_loss(at.jacobian, batch, self._column) if exact else field_loss(at.on_flow_grid[0], moves)
            )
            parts["mask"] = moves.mask_loss(at.mask)
        else:
            parts["photometric"] = photometric_loss(at[:count], batch.first, batch.second, batch.delta_q)
        if batch.field is None and moves is not None:
            parts["measured"] = self._measured_loss(batch, at, moves)
        bends = batch.field is None and self.progress >= _FIELD_BENDS
        parts |= self._matching_losses(batch, at if bends else self._fixed(at, batch), moves)
        total = torch.zeros((), dtype=q.dtype, device=q.device)
        for name, value in parts.items():
            total = total + getattr(weight, name) * value
        return {"loss": total, **parts}

    def step_pairs(
        self, first: Float[Tensor, "B 3 H W"], second: Float[Tensor, "B 3 H W"], before: Tensor | None = None
    ) -> Float[Tensor, "B n"]:
        """Joint steps of unrelated pairs of frames [rad or m]; `before` is not needed."""
        return step_pairs(self, first, second)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[PairBatch], rounds: int = 2) -> None:
        """Scale the uncertainties to the errors made on pairs that were not trained on, and see whether to look closer.

        The looser a look's say is, the more the next one begins with what was known before; so it takes two rounds to be
        exact, and one to watch a run by.

        One factor per joint: the geometric mean of what the 68 % and the 95 % interval of a normal distribution ask for.
        Where no batch brings flow that was measured, such flow is trusted as far as the network's own looks.
        """
        kept, measured, states, guesses = [], [], [], []
        for spread in (self.step_spread, self.flow_spread, self.state_spread, self.guess_spread):
            spread.fill_(1.0)
        self.guesses.fill_(False)
        for batch in batches:
            seen = self.encode(torch.cat([batch.first, batch.second]))
            q, q_read_std = torch.cat([batch.q, batch.q_next]), self.state(seen)
            states.append((q_read_std[0] - q).abs() / q_read_std[1])
            kept.append((SeenAt.of(self, seen, q), batch.delta_q, ()))
            moves = _BothWays.of(batch)
            if batch.field is None and moves is not None:
                measured.append((*kept[-1][:2], moves.measured()))
            if self.config.guess:
                at = kept[-1][0]
                made = learned_step(self, at[: len(batch)], at[len(batch) :], closer=())
                error, log_std = self._guess_errors(batch, at, self._flows_to_guess_from(made, batch, moves))
                guesses.append(error.abs() / log_std.exp())
        self.state_spread.copy_(_spread(torch.cat(states)))
        tried = {}
        for closer in (False, True):
            self.looks_closer.fill_(closer)
            tried[closer] = self._tried(kept)
        better = tried[True][0] <= tried[False][0]
        self.looks_closer.fill_(better)
        self.step_spread.mul_(_spread(tried[better][1]))
        for _ in range(rounds - 1):
            self.step_spread.mul_(_spread(self._tried(kept)[1]))
        self.flow_spread.copy_(_spread(self._tried(measured)[1]) if measured else self.step_spread)
        if guesses:
            self._calibrate_guess(_spread(torch.cat(guesses)), measured or kept)

    @torch.no_grad()
    def calibrate_videos(self, films: Iterable[Film]) -> None:
        """Scale the uncertainties of steps in videos to the errors made in following some that were not trained on.

        Errors last: a field that is wrong at a pose is wrong there in the next frame too, and taking them for independent
        makes a filter too sure.
        """
        self.video_spread.fill_(1.0)
        limits = learned_limits(self.config, self.delta_std)
        found = []
        for film in films:
            follower = PoseFollower(self, limits, FollowOptions())
            follower.start(film.frames[0], film.q[0])
            for t, delta_q in enumerate(film.q.diff(dim=0)):
                step = follower.step(film.frames[t + 1], film.dt, *(flow[t] for flow in film.flows))
                if step.valid:
                    found.append((step.delta_q - delta_q).abs() / step.covariance.diagonal().sqrt())
        if len(found) >= _FEWEST_STEPS:
            self.video_spread.copy_(_spread(torch.stack(found)))

    def _calibrate_guess(self, spread: Tensor, kept: Sequence[_Kept]) -> None:
        """See whether guesses help. Their errors and those of steps have much in common, which widens both."""
        alone = self._tried(kept)[0]
        self.guess_spread.copy_(spread)
        self.guesses.fill_(True)
        error, deviations = self._tried(kept)
        self.guesses.fill_(error < alone)
        for x in (self.step_spread, self.flow_spread, self.guess_spread) if error < alone else ():
            x.mul_(_spread(deviations))

    def _tried(self, kept: Sequence[_Kept]) -> tuple[float, Float[Tensor, "N n"]]:
        """Mean error of the steps [typical steps], and errors of what was measured in their standard deviations."""
        errors, deviations = [], []
        for at, delta_q, flows in kept:
            found = self._found(at, *flows)
            errors.append((found.steps[-1] - delta_q) / self.delta_std)
            std = found.solution.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
            deviations.append((found.solution.delta_q - delta_q).abs() / std)
        return float(torch.cat(errors).abs().mean()), torch.cat(deviations)

    def _found(self, at: SeenAt, *flows: Flow) -> LearnedStep:
        """Steps of pairs, first all their first pictures and then all second ones; by flow, or by their own looks."""
        count = len(at.mask) // 2
        return learned_step(self, at[:count], at[count:], *flows, prior=usual_step(self, count))

    def _matching_losses(self, batch: PairBatch, at: SeenAt, moves: _BothWays | None) -> dict[str, Tensor]:
        """What needs both pictures matched and the step solved. Closer looks have nothing to learn but the field, and a
        rough field learns nothing from them: what they see around a wrong guess is noise."""
        first, second = at[: len(batch)], at[len(batch) :]
        made = learned_step(self, first, second, prior=usual_step(self, len(batch)), closer=())
        parts = {"step": self._step_loss(made, batch.delta_q)}
        if self.config.guess:
            parts["guess"] = self._guess_loss(batch, at, self._flows_to_guess_from(made, batch, moves))
        if moves is not None:
            parts["flow"] = flow_loss(made.matched, moves)
        if self.weights.compose and batch.third is not None:
            parts["compose"] = self._compose_loss(batch, first, second, made)
        return parts

    def _measured_loss(self, batch: PairBatch, at: SeenAt, moves: _BothWays) -> Tensor:
        return self._step_loss(self._found(at, *moves.measured()), batch.delta_q)

    @staticmethod
    def _flows_to_guess_from(made: LearnedStep, batch: PairBatch, moves: _BothWays | None) -> list[_Flows]:
        """What the network matched; and what was measured, where decoding may begin with the like."""
        flows: list[_Flows] = [tuple((x.flow.detach(), x.log_weight.detach()) for x in made.matched)]
        if batch.field is None and moves is not None:
            both = zip(moves.flow.chunk(2), moves.weight.log().chunk(2), strict=True)
            flows.append(tuple(both))
        return flows

    def _guess_errors(self, batch: PairBatch, at: SeenAt, flows: Sequence[_Flows]) -> tuple[Tensor, Tensor]:
        """Errors of guesses and their log standard deviations, both in typical steps, one row per pair and flow."""
        first, second = at.seen[: len(batch)], at.seen[len(batch) :]
        told = [self.guess(first, second, both) for both in flows]
        error = torch.cat([step - batch.delta_q for step, _ in told]) / self.delta_std
        return error, (torch.cat([std for _, std in told]) / self.delta_std).log()

    def _guess_loss(self, batch: PairBatch, at: SeenAt, flows: Sequence[_Flows]) -> Tensor:
        error, log_std = self._guess_errors(batch, at, flows)
        return F.smooth_l1_loss(error, torch.zeros_like(error), beta=_STEP_BETA) + 0.05 * _unlikely(error, log_std)

    @staticmethod
    def _fixed(at: SeenAt, batch: PairBatch) -> SeenAt:
        """A field that steps do not bend: the exact one where it is known."""
        if batch.field is None or batch.field_back is None:
            return at.fixed()
        return SeenAt(at.seen, torch.cat([batch.field, batch.field_back]), at.mask.detach())

    @property
    def _column(self) -> Tensor:
        """(n, 1, 1) a typical step of each joint: the field times this is in pixels."""
        return self.delta_std[:, None, None]

    def _asked_at(self, batch: PairBatch, q: Tensor, q_seen: Tensor) -> Tensor:
        """Poses to bend the field with: half of them nearly right, as when tracking, half read off the picture."""
        random = batch.dice()
        noisy = q + _POSE_NOISE * self.q_std * normal(random[:, 2:])
        from_picture = random[:, :1] < 0.5
        return torch.where(from_picture, q_seen.detach(), noisy)

    def _state_loss(self, q: Tensor, q_seen: Tensor, q_std: Tensor) -> Tensor:
        error = (q_seen - q) / self.q_std
        spread = q_std / self.q_std
        return F.smooth_l1_loss(error, torch.zeros_like(error), beta=_STATE_BETA) + 0.05 * _unlikely(
            error, spread.log()
        )

    def _step_loss(self, made: LearnedStep, delta_q: Tensor) -> Tensor:
        wanted = delta_q / self.delta_std
        lost = [F.smooth_l1_loss(step / self.delta_std, wanted, beta=_STEP_BETA) for step in made.steps]
        early = torch.stack(lost[:-1]).mean() if len(lost) > 1 else 0.0
        return lost[-1] + self.weights.early * early

    def _compose_loss(self, batch: PairBatch, first: SeenAt, second: SeenAt, made: LearnedStep) -> Tensor:
        assert batch.third is not None and batch.q_third is not None
        third = SeenAt.of(self, self.encode(batch.third), batch.q_third)
        whole = learned_step(self, first, third).solution.delta_q
        rest = learned_step(self, second, third).solution.delta_q
        gap = (made.solution.delta_q + rest - whole) / self.delta_std
        return F.smooth_l1_loss(gap, torch.zeros_like(gap), beta=_STEP_BETA)


@dataclass(frozen=True, eq=False)
class _BothWays:
    """The motion of a batch in both directions, one after the other: 2 B of everything.

    Attributes:
        flow: whole motion (2 B, 2, h, w) [px]; weight: (2 B, h, w).
        tangent: motion to first order (2 B, 2, h, w), tangent_weight: (2 B, h, w), tangent_step: (2 B, n) that made it.
        mask: (2 B, y, x) the robot, or None.
    """

    flow: Tensor
    weight: Tensor
    tangent: Tensor
    tangent_weight: Tensor
    tangent_step: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, batch: PairBatch) -> _BothWays | None:
        if batch.flow is None or batch.weight is None:
            return None
        if batch.flow_back is None or batch.weight_back is None:
            raise InputError("a field is trained on flow in both directions; give flow_back and weight_back")
        flow = torch.cat([batch.flow, batch.flow_back])
        weight = torch.cat([batch.weight, batch.weight_back])
        tangent, tangent_weight, step = flow, weight, torch.cat([batch.delta_q, -batch.delta_q])
        if batch.tangent is not None:
            tangent, tangent_weight, step = (
                torch.cat([getattr(batch, name), getattr(batch, name + "_back")])
                for name in ("tangent", "tangent_weight", "tangent_step")
            )
        mask = None
        if batch.mask is not None and batch.mask_back is not None:
            mask = torch.cat([batch.mask, batch.mask_back])
        return cls(flow, weight, tangent, tangent_weight, step, mask)

    def measured(self) -> tuple[Flow, Flow]:
        """Flow as an estimator gives it, in cells of its grid: there and back."""
        both, count = Flow(self.flow / FLOW_STRIDE, self.weight), len(self.flow) // 2
        return both[:count], both[count:]

    def mask_loss(self, logit: Tensor) -> Tensor:
        """Cross entropy against the robot's mask; without one, what moved is the robot and what did not may be."""
        if self.mask is not None:
            return F.binary_cross_entropy_with_logits(logit, self.mask, pos_weight=logit.new_tensor(_ROBOT_COUNTS))
        moved = (self.flow.square().sum(1).sqrt() > _MOVED).to(logit)
        counts = self.weight * (moved + _REST_COUNTS * (1 - moved))
        told, counts = (F.interpolate(x[:, None], size=logit.shape[-2:])[:, 0] for x in (moved, counts))
        return weighted_mean(F.binary_cross_entropy_with_logits(logit, told, reduction="none"), counts)


def field_loss(jacobian: Float[Tensor, "b 2 n h w"], moves: _BothWays) -> Float[Tensor, ""]:
    """Charbonnier distance of `jacobian @ step` from the motion to first order, relative to the batch's mean motion."""
    told = torch.einsum("bcnhw,bn->bchw", jacobian, moves.tangent_step)
    weight = moves.tangent_weight
    motion = over_processes(weighted_mean(moves.tangent.square().sum(1).sqrt(), weight)).clamp(min=_LEAST_MOTION)
    return weighted_mean(charbonnier(told - moves.tangent), weight) / motion


def columns_loss(
    jacobian: Float[Tensor, "b 2 n y x"], batch: PairBatch, unit: Float[Tensor, "n 1 1"]
) -> Float[Tensor, ""]:  # fmt: skip
    """Charbonnier distance of every joint's column from the exact one, both for a typical step of that joint and relative
    to what joints move: to the geometric mean of this one and of all, so that a wrist that moves a few cells by little
    is learned as well as what moves the whole arm."""
    assert batch.field is not None and batch.field_weight is not None
    assert batch.field_back is not None and batch.field_weight_back is not None
    exact, weight = torch.cat([batch.field, batch.field_back]), torch.cat([batch.field_weight, batch.field_weight_back])
    wanted = unit * exact

    def per_joint(x: Float[Tensor, "b n y x"]) -> Float[Tensor, " n"]:
        return torch.stack([weighted_mean(column, weight) for column in x.unbind(1)])

    motion = over_processes(per_joint(wanted.square().sum(1).sqrt()))
    usual = motion.mean().clamp(min=_LEAST_MOTION)
    relative = per_joint(charbonnier(unit * jacobian - wanted)) / (usual * motion.maximum(_LEAST_SHARE * usual)).sqrt()
    return relative.mean()


def flow_loss(looks: Sequence[Matched], moves: _BothWays) -> Float[Tensor, ""]:
    """Error of the matched flow under a Laplace distribution whose width is the confidence: large errors cost little
    where the head said so, and saying so costs."""
    flow = torch.cat([look.flow for look in looks])
    half = torch.cat([look.log_weight for look in looks]) / 2
    return weighted_mean(charbonnier(flow - moves.flow) * half.exp() - half, moves.weight)


def photometric_loss(
    first: SeenAt, image: Float[Tensor, "b 3 H W"], other: Float[Tensor, "b 3 H W"], executed: Float[Tensor, "b n"]
) -> Float[Tensor, ""]:
    """Brightness of the second picture, carried back by the field and the executed step, against the first."""
    flow = torch.einsum("bcnhw,bn->bchw", first.jacobian, executed)
    larger = image.shape[-1] / (flow.shape[-1] * STRIDE)
    flow = F.interpolate(flow * larger, size=image.shape[-2:], mode="bilinear", align_corners=False)
    return charbonnier(carry_back(other, flow) - image).mean()


def smoothness(field: Float[Tensor, "b 2 n h w"], grey: Float[Tensor, "b 1 H W"]) -> Float[Tensor, ""]:
    """Total variation of the field [px per typical step], less where its brightness has edges (Godard et al. 2017)."""
    h, w = field.shape[-2:]
    grey = F.interpolate(grey, size=(h, w), mode="area")
    flat = field.flatten(1, 2)
    total = torch.zeros((), dtype=field.dtype, device=field.device)
    for axis in (-1, -2):
        edge = grey.diff(dim=axis).abs()
        total = total + (flat.diff(dim=axis).abs() * (-10 * edge).exp()).mean()
    return total


def charbonnier(error: Float[Tensor, "b c *n h w"]) -> Float[Tensor, "b *n h w"]:
    """Smooth length of a vector field, or of several."""
    return (error.square().sum(1) + _FLOW_EPS**2).sqrt()


def _unlikely(error: Tensor, log_std: Tensor) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of normal errors; teaches the standard deviations alone."""
    return ((error.detach() / log_std.exp()).square().clamp(max=_STATE_CLAMP) / 2 + log_std).mean()


def _spread(deviation: Float[Tensor, "N n"]) -> Float[Tensor, " n"]:
    share = torch.tensor([0.6827, 0.95], dtype=deviation.dtype, device=deviation.device)
    found = deviation.quantile(share, dim=0) / torch.tensor([[1.0], [1.96]]).to(deviation)
    return found.log().mean(0).exp().clamp(1e-3, 1e3)


def loss_weights(options: Mapping[str, float]) -> LossWeights:
    """Weights by name, the others at their defaults.

    Raises:
        InputError: a name is unknown.
    """
    try:
        return LossWeights(**options)
    except TypeError as error:
        raise InputError(f"unknown part of the loss: {error}") from None
