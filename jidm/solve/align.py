"""One frame aligned to what is known of those before: coarse brightness, the silhouette, fine brightness and outlines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.motion.pyramid import BrightnessPyramid
from jidm.solve.least_squares import bounded_solve
from jidm.solve.outline import OutlineTerm
from jidm.solve.photometric import Appearance, BrightnessTerm, Quadratic
from jidm.solve.silhouette import SilhouetteTerm

# On blurred levels the expectation counts this much less: a jump must be found before it can be believed.
_COARSE_TRUST = 0.01
# Where the silhouette leads, as much less; brightness of this level goes along, so that rolling links stay as they are.
_SILHOUETTE_TRUST = 0.1
_SILHOUETTE_LEVEL = 2
_SILHOUETTE_STEPS = 3
_SETTLED = 2e-3  # [rad or m] a smaller step towards the silhouette is none


@dataclass(frozen=True)
class AlignOptions:
    """How a frame is aligned. The defaults were chosen on two ALOHA episodes and a few rendered arms.

    Attributes:
        coarse_levels: coarsest first; each start is brought down these levels against the nearest reference alone.
        coarse_points: points in use on the coarse levels; blurred pictures hold no more.
        fine_levels: then the best start is refined against all references and the outlines.
        reaches: search range for edges on each fine level [px].
        damping: relative to the mean diagonal, on the coarsest level; falls by `damping_decay` a level, so that
            joints the blurred picture cannot tell apart wait for a sharper one.
        silhouette_reaches: search range for the robot's end where the background is known, one after the other [px].
        silhouette_weight: of the silhouette against brightness.
        mismatch_cost: of a silhouette that is wrong by as much as the robot's own size, in units of
            `BrightnessTerm.cost`, to which it is added.
        silhouette_gain: only a pose that costs less by so much is followed there: what the robot holds belongs to what is
            seen in front of the background, and must not drag a pose along that is right.
        iterations: Gauss-Newton steps a level at most.
        easing: share of `tukey_weight`'s excuse that is left from one iteration to the next. A rigid part that is off as
            a whole is followed at first, and dropped in the end if it still is: then something hides it.
        outline_weight: of the outlines against brightness.
        correlated_points: neighbouring points that share one error; puts the prior on the data's scale.
        correlated_lines: likewise, neighbouring points of outlines, which lie further apart.
        max_step: largest joint motion of one iteration [rad or m].
    """

    coarse_levels: tuple[int, ...] = (4, 3, 2)
    coarse_points: int = 500
    fine_levels: tuple[int, ...] = (1, 0)
    reaches: tuple[float, ...] = (4.0, 2.5)
    silhouette_reaches: tuple[float, ...] = (12.0, 6.0, 3.0)
    silhouette_weight: float = 10.0
    mismatch_cost: float = 10.0
    silhouette_gain: float = 0.3
    damping: float = 0.1
    damping_decay: float = 0.3
    iterations: int = 6
    easing: float = 0.8
    outline_weight: float = 10.0
    correlated_points: float = 30.0
    correlated_lines: float = 8.0
    max_step: float = 0.1


@dataclass(frozen=True, eq=False)
class Alignment:
    """Pose of one frame.

    Attributes:
        q: (n,) [rad or m], inside the bounds.
        relative: (n, n) information about q relative to the references (brightness).
        absolute: (n, n) information about q itself (outlines).
        cost: truncated brightness error that is left, see `BrightnessTerm.cost`.
    """

    q: Float[Tensor, " n"]
    relative: Float[Tensor, "n n"]
    absolute: Float[Tensor, "n n"]
    cost: float


def align(
    pyramid: BrightnessPyramid,
    references: Sequence[Appearance],
    starts: Sequence[Float[Tensor, " n"]],
    *,
    outline: OutlineTerm | None = None,
    silhouette: SilhouetteTerm | None = None,
    bounds: tuple[Float[Tensor, " n"], Float[Tensor, " n"]],
    prior: tuple[Float[Tensor, " n"], Float[Tensor, " n"]],
    options: AlignOptions,
) -> Alignment:
    """Pose at which the references' points look as they did and the robot's lines lie on the picture's edges.

    Args:
        pyramid: the frame.
        references: earlier appearances, the most recent first, the one that drifts least last.
        starts: poses to try.
        outline: contour matching with its memory; brightness only if not given.
        silhouette: of the robot in this frame, where its background is known.
        bounds: lower and upper bound of q.
        prior: where each joint is expected, and the standard deviation of that (both (n,), [rad or m]); it holds joints
            the picture says nothing about.
    """
    problem = _Problem(pyramid, bounds, *prior, options)
    levels = [k for k in options.coarse_levels if k < len(pyramid)]
    coarse = BrightnessTerm(references[0].thinned(options.coarse_points), pyramid)
    sharp = min(1, len(pyramid) - 1)
    tried: list[Tensor] = []
    for start in starts:
        # Blurred levels bring a far start near, and drag a near one along with the background.
        tried += [start, problem.descend([BrightnessTerm(coarse.reference, pyramid)], start, levels)]
    if not tried:
        raise ValueError("align needs at least one start")
    q = min(tried, key=lambda x: coarse.cost(x, sharp))
    if silhouette is not None:
        lasting = BrightnessTerm(references[-1].thinned(options.coarse_points), pyramid)
        q = problem.within_silhouette(silhouette, lasting, q, sharp)
    terms = [BrightnessTerm(reference, pyramid) for reference in references]
    q, relative, absolute = problem.refine(terms, outline, q)
    return Alignment(q, relative, absolute, coarse.cost(q, sharp))


@dataclass(eq=False)
class _Problem:
    pyramid: BrightnessPyramid
    bounds: tuple[Tensor, Tensor]
    expected: Tensor
    expected_std: Tensor
    options: AlignOptions

    def descend(self, terms: Sequence[BrightnessTerm], q: Tensor, levels: Sequence[int]) -> Tensor:
        """Brightness alone, from coarse to fine."""
        damping = self.options.damping
        for level in levels:
            for k in range(self.options.iterations):
                excused = self.options.easing**k
                q, step = self._step(q, [term.quadratic(q, level, excused) for term in terms], damping, _COARSE_TRUST)
                for term in terms:
                    term.moved(step)
                if float(step.abs().max()) < 3e-4:
                    break
            damping *= self.options.damping_decay
        return q

    def within_silhouette(self, silhouette: SilhouetteTerm, term: BrightnessTerm, q: Tensor, sharp: int) -> Tensor:
        """The pose to which the silhouette leads, if it looks better there, else q."""

        def cost(pose: Tensor) -> float:
            return term.cost(pose, sharp) + self.options.mismatch_cost * silhouette.mismatch(pose)

        level = min(_SILHOUETTE_LEVEL, len(self.pyramid) - 1)
        best, least = q, cost(q) - self.options.silhouette_gain
        if least < 0:
            return q
        for reach in self.options.silhouette_reaches:
            before = q
            for _ in range(_SILHOUETTE_STEPS):
                ends = silhouette.quadratic(q, reach)
                if ends is None:
                    break
                parts = [term.quadratic(q, level), _scaled(ends, self.options.silhouette_weight)]
                q, step = self._step(q, parts, damping=1e-3, trust=_SILHOUETTE_TRUST)
                term.moved(step)
                if float(step.abs().max()) < _SETTLED:
                    break
            if q is not before and (now := cost(q)) < least:
                best, least = q, now
        return best

    def refine(
        self, terms: Sequence[BrightnessTerm], outline: OutlineTerm | None, q: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Brightness of all references and the outlines together, on the fine levels; q and both informations."""
        relative = absolute = torch.zeros(len(q), len(q)).to(q)
        for level, reach in zip(self.options.fine_levels, self.options.reaches, strict=True):
            if level >= len(self.pyramid):
                continue
            index = None if outline is None else outline.field.visible_contour(q)
            for k in range(self.options.iterations):
                excused = self.options.easing**k
                # References share their errors with this frame: together they count as the root of their number.
                share = len(terms) ** -0.5
                parts = [_scaled(term.quadratic(q, level, excused), share) for term in terms]
                relative = self._information(parts)
                if outline is not None and index is not None:
                    lines = outline.quadratic(q, self.pyramid, index, reach, excused)
                    if lines is not None:
                        # The weight is a preference, not knowledge: information counts the lines once.
                        absolute = lines.matrix / self.options.correlated_lines
                        parts.append(_scaled(lines, self.options.outline_weight))
                q, step = self._step(q, parts, damping=1e-3 if level else 1e-4)
                for term in terms:
                    term.moved(step)
                if float(step.abs().max()) < 2e-5:
                    break
        return q, relative, absolute

    def _information(self, parts: Sequence[Quadratic]) -> Tensor:
        total = sum((p.matrix for p in parts), torch.zeros_like(parts[0].matrix))
        return total / self.options.correlated_points

    def _step(self, q: Tensor, parts: Sequence[Quadratic], damping: float, trust: float = 1.0) -> tuple[Tensor, Tensor]:
        """One damped, bounded Gauss-Newton step; returns the new pose and the step."""
        matrix = self._information(parts)
        vector = sum((p.vector for p in parts), torch.zeros_like(q)) / self.options.correlated_points
        # Student's t rather than a Gaussian: a robot that really jumps is believed after a few standard deviations.
        surprise = (self.expected - q) / self.expected_std
        stiffness = self.expected_std**-2 / (1 + (surprise / 2) ** 2) * trust
        vector = vector + stiffness * (self.expected - q)
        damped = matrix + torch.diag(stiffness) + damping * matrix.diagonal().mean() * torch.eye(len(q)).to(q)
        lower = torch.maximum(self.bounds[0] - q, torch.full_like(q, -self.options.max_step))
        upper = torch.minimum(self.bounds[1] - q, torch.full_like(q, self.options.max_step))
        step, _ = bounded_solve(damped.double(), vector.double(), lower.double(), torch.maximum(lower, upper).double())
        return q + step.to(q), step.to(q)


def _scaled(part: Quadratic, factor: float) -> Quadratic:
    return Quadratic(part.matrix * factor, part.vector * factor, part.count)
