"""One frame aligned to what is known of those before: coarse brightness, the silhouette, fine brightness and outlines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.estimation.factors.contour import ContourFactor
from jidm.estimation.factors.photometric import PhotometricFactor, Quadratic, SurfaceAppearance
from jidm.estimation.factors.silhouette import SilhouetteFactor
from jidm.estimation.solver import solve_box_qp
from jidm.video.pyramid import BrightnessPyramid

# On blurred levels the expectation counts this much less: a jump must be found before it can be believed.
_COARSE_PRIOR_WEIGHT = 0.01
# Where the silhouette leads, as much less; brightness of this level goes along, so that rolling links stay as they are.
_SILHOUETTE_PRIOR_WEIGHT = 0.1
_SILHOUETTE_LEVEL = 2
_SILHOUETTE_STEPS = 3
_SILHOUETTE_TOLERANCE = 2e-3  # [rad or m] a smaller step towards the silhouette is none


@dataclass(frozen=True)
class AlignOptions:
    """How a frame is aligned. The defaults were chosen on two ALOHA episodes and a few rendered arms.

    Attributes:
        coarse_levels: coarsest first; each start is brought down these levels against the nearest reference alone.
        coarse_points: points in use on the coarse levels; blurred pictures hold no more.
        fine_levels: then the best start is refined against all references and the outlines.
        search_radii: search range for edges on each fine level [px].
        damping: relative to the mean diagonal, on the coarsest level; falls by `damping_decay` a level, so that
            joints the blurred picture cannot tell apart wait for a sharper one.
        silhouette_search_radii: search range for the robot's end where the background is known, one after the other [px].
        silhouette_weight: of the silhouette against brightness.
        mismatch_cost: of a silhouette that is wrong by as much as the robot's own size, in units of
            `BrightnessTerm.cost`, to which it is added.
        silhouette_min_improvement: only a pose that costs less by so much is followed there: what the robot holds belongs to what is
            seen in front of the background, and must not drag a pose along that is right.
        iterations: Gauss-Newton steps a level at most.
        annealing: share of `tukey_weight`'s excuse that is left from one iteration to the next. A rigid part that is off as
            a whole is followed at first, and dropped in the end if it still is: then something hides it.
        contour_weight: of the outlines against brightness.
        correlated_points: neighbouring points that share one error; puts the prior on the data's scale.
        correlated_contour_points: likewise, neighbouring points of outlines, which lie further apart.
        max_step: largest joint motion of one iteration [rad or m].
    """

    coarse_levels: tuple[int, ...] = (4, 3, 2)
    coarse_points: int = 500
    fine_levels: tuple[int, ...] = (1, 0)
    search_radii: tuple[float, ...] = (4.0, 2.5)
    silhouette_search_radii: tuple[float, ...] = (12.0, 6.0, 3.0)
    silhouette_weight: float = 10.0
    mismatch_cost: float = 10.0
    silhouette_min_improvement: float = 0.3
    damping: float = 0.1
    damping_decay: float = 0.3
    iterations: int = 6
    annealing: float = 0.8
    contour_weight: float = 10.0
    correlated_points: float = 30.0
    correlated_contour_points: float = 8.0
    max_step: float = 0.1


@dataclass(frozen=True, eq=False)
class Alignment:
    """Pose of one frame.

    Attributes:
        q: (n,) [rad or m], inside the bounds.
        relative_information: (n, n) information about q relative to the references (brightness).
        absolute_information: (n, n) information about q itself (outlines).
        cost: truncated brightness error that is left, see `BrightnessTerm.cost`.
    """

    q: Float[Tensor, " n"]
    relative_information: Float[Tensor, "n n"]
    absolute_information: Float[Tensor, "n n"]
    cost: float


def align(
    pyramid: BrightnessPyramid,
    references: Sequence[SurfaceAppearance],
    starts: Sequence[Float[Tensor, " n"]],
    *,
    contour: ContourFactor | None = None,
    silhouette: SilhouetteFactor | None = None,
    bounds: tuple[Float[Tensor, " n"], Float[Tensor, " n"]],
    prior: tuple[Float[Tensor, " n"], Float[Tensor, " n"]],
    options: AlignOptions,
) -> Alignment:
    """Pose at which the references' points look as they did and the robot's lines lie on the picture's edges.

    Args:
        pyramid: the frame.
        references: earlier appearances, the most recent first, the one that drifts least last.
        starts: poses to try.
        contour: contour matching with its memory; brightness only if not given.
        silhouette: of the robot in this frame, where its background is known.
        bounds: lower and upper bound of q.
        prior: where each joint is expected, and the standard deviation of that (both (n,), [rad or m]); it holds joints
            the picture says nothing about.
    """
    problem = _AlignmentProblem(pyramid, bounds, *prior, options)
    levels = [k for k in options.coarse_levels if k < len(pyramid)]
    coarse = PhotometricFactor(references[0].subsample(options.coarse_points), pyramid)
    sharp_level = min(1, len(pyramid) - 1)
    candidates: list[Tensor] = []
    for start in starts:
        # Blurred levels bring a far start near, and drag a near one along with the background.
        candidates += [start, problem.align_coarse([PhotometricFactor(coarse.reference, pyramid)], start, levels)]
    if not candidates:
        raise ValueError("align needs at least one start")
    q = min(candidates, key=lambda x: coarse.cost(x, sharp_level))
    if silhouette is not None:
        appearance_factor = PhotometricFactor(references[-1].subsample(options.coarse_points), pyramid)
        q = problem.align_silhouette(silhouette, appearance_factor, q, sharp_level)
    factors = [PhotometricFactor(reference, pyramid) for reference in references]
    q, relative, absolute = problem.align_fine(factors, contour, q)
    return Alignment(q, relative, absolute, coarse.cost(q, sharp_level))


@dataclass(eq=False)
class _AlignmentProblem:
    pyramid: BrightnessPyramid
    bounds: tuple[Tensor, Tensor]
    prior_mean: Tensor
    prior_std: Tensor
    options: AlignOptions

    def align_coarse(self, factors: Sequence[PhotometricFactor], q: Tensor, levels: Sequence[int]) -> Tensor:
        """Brightness alone, from coarse to fine."""
        damping = self.options.damping
        for level in levels:
            for k in range(self.options.iterations):
                part_scale = self.options.annealing**k
                q, step = self._gauss_newton_step(
                    q, [term.linearize(q, level, part_scale) for term in factors], damping, _COARSE_PRIOR_WEIGHT
                )
                for factor in factors:
                    factor.update_light(step)
                if float(step.abs().max()) < 3e-4:
                    break
            damping *= self.options.damping_decay
        return q

    def align_silhouette(
        self, silhouette: SilhouetteFactor, factor: PhotometricFactor, q: Tensor, sharp_level: int
    ) -> Tensor:
        """The pose to which the silhouette leads, if it looks better there, else q."""

        def cost(pose: Tensor) -> float:
            return factor.cost(pose, sharp_level) + self.options.mismatch_cost * silhouette.mismatch(pose)

        level = min(_SILHOUETTE_LEVEL, len(self.pyramid) - 1)
        best, max_cost = q, cost(q) - self.options.silhouette_min_improvement
        if max_cost < 0:
            return q
        for search_radius in self.options.silhouette_search_radii:
            before = q
            for _ in range(_SILHOUETTE_STEPS):
                boundary = silhouette.linearize(q, search_radius)
                if boundary is None:
                    break
                equations = [factor.linearize(q, level), _scaled(boundary, self.options.silhouette_weight)]
                q, step = self._gauss_newton_step(q, equations, damping=1e-3, prior_weight=_SILHOUETTE_PRIOR_WEIGHT)
                factor.update_light(step)
                if float(step.abs().max()) < _SILHOUETTE_TOLERANCE:
                    break
            if q is not before and (new_cost := cost(q)) < max_cost:
                best, max_cost = q, new_cost
        return best

    def align_fine(
        self, factors: Sequence[PhotometricFactor], contour: ContourFactor | None, q: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Brightness of all references and the outlines together, on the fine levels; q and both informations."""
        relative = absolute = torch.zeros(len(q), len(q)).to(q)
        for level, search_radius in zip(self.options.fine_levels, self.options.search_radii, strict=True):
            if level >= len(self.pyramid):
                continue
            index = None if contour is None else contour.field.visible_contour(q)
            for k in range(self.options.iterations):
                part_scale = self.options.annealing**k
                # References share their errors with this frame: together they count as the root of their number.
                reference_weight = len(factors) ** -0.5
                equations = [_scaled(term.linearize(q, level, part_scale), reference_weight) for term in factors]
                relative = self._information(equations)
                if contour is not None and index is not None:
                    contour_equations = contour.linearize(q, self.pyramid, index, search_radius, part_scale)
                    if contour_equations is not None:
                        # The weight is a preference, not knowledge: information counts the lines once.
                        absolute = contour_equations.H / self.options.correlated_contour_points
                        equations.append(_scaled(contour_equations, self.options.contour_weight))
                q, step = self._gauss_newton_step(q, equations, damping=1e-3 if level else 1e-4)
                for factor in factors:
                    factor.update_light(step)
                if float(step.abs().max()) < 2e-5:
                    break
        return q, relative, absolute

    def _information(self, equations: Sequence[Quadratic]) -> Tensor:
        total = sum((p.H for p in equations), torch.zeros_like(equations[0].H))
        return total / self.options.correlated_points

    def _gauss_newton_step(
        self, q: Tensor, equations: Sequence[Quadratic], damping: float, prior_weight: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """One damped, bounded Gauss-Newton step; returns the new pose and the step."""
        H = self._information(equations)
        g = sum((p.g for p in equations), torch.zeros_like(q)) / self.options.correlated_points
        # Student's t rather than a Gaussian: a robot that really jumps is believed after a few standard deviations.
        standardized = (self.prior_mean - q) / self.prior_std
        prior_information = self.prior_std**-2 / (1 + (standardized / 2) ** 2) * prior_weight
        g = g + prior_information * (self.prior_mean - q)
        damped_H = H + torch.diag(prior_information) + damping * H.diagonal().mean() * torch.eye(len(q)).to(q)
        lower = torch.maximum(self.bounds[0] - q, torch.full_like(q, -self.options.max_step))
        upper = torch.minimum(self.bounds[1] - q, torch.full_like(q, self.options.max_step))
        step, _ = solve_box_qp(damped_H.double(), g.double(), lower.double(), torch.maximum(lower, upper).double())
        return q + step.to(q), step.to(q)


def _scaled(quadratic: Quadratic, weight: float) -> Quadratic:
    return Quadratic(quadratic.H * weight, quadratic.g * weight, quadratic.num_observations)
