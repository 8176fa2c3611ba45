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
from jidm.field.learned.config import STRIDE
from jidm.learn.batch import JointStats, PairBatch, normal
from jidm.learn.both_ways import BothWays, Flows, matched_flows
from jidm.learn.calibration import calibrate, calibrate_videos
from jidm.learn.films import Film
from jidm.learn.together import over_processes, weighted_mean
from jidm.solve.brightness import carry_back
from jidm.solve.learned_step import LearnedStep, learned_step, solve_pairs, step_pairs, usual_step
from jidm.solve.looks import Matched, SeenAt

_FLOW_EPS = 1e-2  # [px] below this a flow error counts as its square (Charbonnier)
_STEP_BETA = 0.05  # [standard deviations of the training steps] likewise for the inverse loss (smooth L1)
_STATE_BETA = 0.05  # [standard deviations of the training poses]
_STATE_CLAMP = 50.0  # squared deviations beyond this teach the uncertainty nothing
_POSE_NOISE = 0.05  # [standard deviations of the training poses] of the poses the field is asked at
_POSE_OFF = 0.3  # likewise, the most by which a pose read off the picture may be wrong for the field to be asked there
_FIELD_BENDS = 0.7
"""Share of the training from which on solved steps bend a field that nobody knows: poor matches would spoil it."""
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
        moves = BothWays.of(batch)
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
        """See `jidm.learn.calibration.calibrate`."""
        calibrate(self, batches, rounds)

    @torch.no_grad()
    def calibrate_videos(self, films: Iterable[Film]) -> None:
        """See `jidm.learn.calibration.calibrate_videos`."""
        calibrate_videos(self, films)

    def _matching_losses(self, batch: PairBatch, at: SeenAt, moves: BothWays | None) -> dict[str, Tensor]:
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

    def _measured_loss(self, batch: PairBatch, at: SeenAt, moves: BothWays) -> Tensor:
        return self._step_loss(solve_pairs(self, at, *moves.measured()), batch.delta_q)

    @staticmethod
    def _flows_to_guess_from(made: LearnedStep, batch: PairBatch, moves: BothWays | None) -> Flows:
        """What the network matched; of half the pairs what was measured, if it was: decoding may begin with either."""
        matched = matched_flows(made)
        if batch.field is not None or moves is None:
            return matched
        one, other = batch.dice()[:, 1].chunk(2)
        given = (one + other) % 1 < 0.5  # the same in either order of the frames
        return [
            (torch.where(given[:, None, None, None], flow, x), torch.where(given[:, None, None], log_weight, y))
            for (flow, log_weight), (x, y) in zip(moves.to_guess_from(), matched, strict=True)
        ]

    def _guess_errors(self, batch: PairBatch, at: SeenAt, flows: Flows) -> tuple[Tensor, Tensor]:
        """Errors of guesses and their log standard deviations, (B, n) each, both in typical steps."""
        step, std = self.guess(at.seen[: len(batch)], at.seen[len(batch) :], flows)
        return (step - batch.delta_q) / self.delta_std, (std / self.delta_std).log()

    def _guess_loss(self, batch: PairBatch, at: SeenAt, flows: Flows) -> Tensor:
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
        """Poses to bend the field with: half of them nearly right, as when tracking, half read off the picture, as far as
        that is not quite wrong: a field that is asked at poses that mean nothing learns to ignore them."""
        random = batch.dice()
        noisy = q + _POSE_NOISE * self.q_std * normal(random[:, 2:])
        from_picture = random[:, :1] < 0.5
        off = _POSE_OFF * self.q_std
        return torch.where(from_picture, q + (q_seen.detach() - q).clamp(-off, off), noisy)

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


def field_loss(jacobian: Float[Tensor, "b 2 n h w"], moves: BothWays) -> Float[Tensor, ""]:
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


def flow_loss(looks: Sequence[Matched], moves: BothWays) -> Float[Tensor, ""]:
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
    """Total variation of the field [px per typical step], less where the picture has edges (Godard et al. 2017)."""
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


def loss_weights(options: Mapping[str, float]) -> LossWeights:
    """Weights by name, the others at their defaults.

    Raises:
        InputError: a name is unknown.
    """
    try:
        return LossWeights(**options)
    except TypeError as error:
        raise InputError(f"unknown part of the loss: {error}") from None
