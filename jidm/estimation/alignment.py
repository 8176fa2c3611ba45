"""Coarse-to-fine alignment of one frame: maximum a posteriori joint positions by Gauss-Newton over factors.

Brightness on blurred levels first, then the silhouette, then fine brightness together with contours. The constants were chosen
on two ALOHA episodes and a few rendered arms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.estimation.factors.contour import ContourMemory
from jidm.estimation.factors.photometric import PhotometricFactor, SurfaceAppearance
from jidm.estimation.factors.prior import StudentTPrior
from jidm.estimation.factors.silhouette import SilhouetteFactor
from jidm.estimation.gauss_newton import bounded_step
from jidm.estimation.problem import POSITION, NormalEquations, State, marginal
from jidm.video.pyramid import BrightnessPyramid

_COARSE_POINTS = 500  # on the coarse levels; blurred images have no more detail
_DAMPING, _DAMPING_DECAY = 0.1, 0.3
"""Relative damping on the coarsest level, and its factor from level to level. Joints that a blurred image does not
distinguish are aligned on a sharper one."""
_FINE_DAMPING = (1e-4, 1e-3)  # on the finest level, and on the others
MAX_STEP = 0.1  # [rad or m] per joint and iteration
_COARSE_TOLERANCE, _FINE_TOLERANCE = 3e-4, 2e-5  # [rad or m] a level ends with a smaller step

_CORRELATED_POINTS = 30.0  # neighboring points with a common error; scales the data against the prior
CORRELATED_CONTOUR_POINTS = 8.0  # the same for contours, whose points lie further apart
_CONTOUR_WEIGHT = 10.0  # of contours relative to brightness
_ANNEALING = 0.8
"""Factor on `part_scale` from iteration to iteration (see `tukey_weight`): a rigid part with large residuals is followed at
first, and is an outlier in the end if the residuals stay large, since then it is occluded."""

# The prior has less weight on blurred levels, so that large motions are found at all.
_COARSE_PRIOR_WEIGHT = 0.01
# The same while the silhouette is aligned, together with brightness of one level, which constrains the roll of links.
_SILHOUETTE_PRIOR_WEIGHT = 0.1
_SILHOUETTE_LEVEL = 2
_SILHOUETTE_STEPS = 3
_SILHOUETTE_DAMPING = 1e-3
_SILHOUETTE_TOLERANCE = 2e-3  # [rad or m]
_SILHOUETTE_WEIGHT = 10.0  # relative to brightness
_MISMATCH_COST = 10.0  # of a mismatch by the robot's area, in units of `PhotometricFactor.error`


@dataclass(frozen=True)
class AlignOptions:
    """Options of the alignment of a frame.

    Attributes:
        coarse_levels: pyramid levels, coarsest first, on which each start is aligned to the nearest reference.
        fine_levels: levels on which the best start is then aligned to all references and contours.
        search_radii: of edges, per fine level [px].
        silhouette_search_radii: of the silhouette's boundary where the background is known, one after the other [px].
        silhouette_min_improvement: a pose found by the silhouette is only used if it reduces the cost by this much, since
            objects in the robot's hand are foreground as well.
        iterations: at most, per level.
    """

    coarse_levels: tuple[int, ...] = (4, 3, 2)
    fine_levels: tuple[int, ...] = (1, 0)
    search_radii: tuple[float, ...] = (4.0, 2.5)
    silhouette_search_radii: tuple[float, ...] = (12.0, 6.0, 3.0)
    silhouette_min_improvement: float = 0.3
    iterations: int = 6


@dataclass(frozen=True, eq=False)
class Alignment:
    """Pose of one frame.

    Attributes:
        q: (n,) [rad or m], inside the bounds.
        data_only: (n,) the estimate without the prior, for a filter that provided the prior; possibly outside the bounds.
        step_information: (n, n) information about q relative to the references: brightness, and contours with the weight that
            they have in the alignment.
        absolute_information: (n, n) information about q itself (contours).
        error: remaining truncated brightness error, see `PhotometricFactor.error`.
    """

    q: Float[Tensor, " n"]
    data_only: Float[Tensor, " n"]
    step_information: Float[Tensor, "n n"]
    absolute_information: Float[Tensor, "n n"]
    error: float


def align(
    pyramid: BrightnessPyramid,
    references: Sequence[SurfaceAppearance],
    starts: Sequence[Float[Tensor, " n"]],
    *,
    contours: ContourMemory | None = None,
    silhouette: SilhouetteFactor | None = None,
    bounds: tuple[Float[Tensor, " n"], Float[Tensor, " n"]],
    prior: tuple[Float[Tensor, " n"], Float[Tensor, " n"]],
    options: AlignOptions,
) -> Alignment:
    """Pose at which the points have the brightness of the references and the contours lie on edges of the frame.

    Args:
        pyramid: the frame.
        references: earlier appearances, the most recent first, the one with the least drift last.
        starts: initial poses, at least one.
        contours: contour matching with its memory; contours are not used if not given.
        silhouette: of the frame, where its background is known.
        bounds: lower and upper bound of q.
        prior: mean and standard deviation of each joint [rad or m], for joints that the frame does not constrain.
        options: of the alignment.
    """
    problem = _AlignmentProblem(pyramid, bounds, StudentTPrior(POSITION, *prior), options)
    sharp_level = min(1, len(pyramid) - 1)
    nearest = PhotometricFactor(references[0].subsample(_COARSE_POINTS), pyramid, sharp_level)
    candidates: list[Tensor] = []
    for start in starts:
        # Blurred levels improve a start that is far off, but a near one may follow the background.
        candidates += [start, problem.align_coarse(nearest, start)]
    if not candidates:
        raise ValueError("align needs at least one start")
    q = min(candidates, key=nearest.error)
    if silhouette is not None:
        appearance = PhotometricFactor(references[-1].subsample(_COARSE_POINTS), pyramid, sharp_level)
        q = problem.align_silhouette(silhouette, appearance, q)
    factors = [PhotometricFactor(x, pyramid, light=f"light_{k}") for k, x in enumerate(references)]
    q, relative, absolute = problem.align_fine(factors, contours, q)
    information = relative + absolute * (CORRELATED_CONTOUR_POINTS * _CONTOUR_WEIGHT / _CORRELATED_POINTS)
    return Alignment(q, problem.without_prior(q, information), information, absolute, nearest.error(q))


@dataclass(frozen=True, eq=False)
class _AlignmentProblem:
    pyramid: BrightnessPyramid
    bounds: tuple[Tensor, Tensor]
    prior: StudentTPrior
    options: AlignOptions

    def align_coarse(self, factor: PhotometricFactor, q: Tensor) -> Tensor:
        """Align brightness on the coarse levels."""
        damping: float = _DAMPING
        state: State = {POSITION: q}
        for level in self.options.coarse_levels:
            if level >= len(self.pyramid):
                continue
            for k in range(self.options.iterations):
                equations = replace(factor, level=level, part_scale=_ANNEALING**k).linearize(state)
                state, moved = self._step(state, [equations], damping, _COARSE_PRIOR_WEIGHT)
                if moved < _COARSE_TOLERANCE:
                    break
            damping *= _DAMPING_DECAY
        return state[POSITION]

    def align_silhouette(self, silhouette: SilhouetteFactor, appearance: PhotometricFactor, q: Tensor) -> Tensor:
        """The pose found by the silhouette if it has a lower cost, else q."""

        def cost(pose: Tensor) -> float:
            return appearance.error(pose) + _MISMATCH_COST * silhouette.mismatch(pose)

        factor = replace(appearance, level=min(_SILHOUETTE_LEVEL, len(self.pyramid) - 1))
        best, max_cost = q, cost(q) - self.options.silhouette_min_improvement
        if max_cost < 0:
            return q
        state: State = {POSITION: q}
        for search_radius in self.options.silhouette_search_radii:
            before = state
            for _ in range(_SILHOUETTE_STEPS):
                boundary = replace(silhouette, search_radius=search_radius).linearize(state)
                if boundary is None:
                    break
                equations = [factor.linearize(state), boundary.scaled(_SILHOUETTE_WEIGHT)]
                state, moved = self._step(state, equations, _SILHOUETTE_DAMPING, _SILHOUETTE_PRIOR_WEIGHT)
                if moved < _SILHOUETTE_TOLERANCE:
                    break
            if state is not before and (new_cost := cost(state[POSITION])) < max_cost:
                best, max_cost = state[POSITION], new_cost
        return best

    def align_fine(
        self, factors: Sequence[PhotometricFactor], contours: ContourMemory | None, q: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Align brightness of all references and contours on the fine levels; q, relative and absolute information."""
        absolute = torch.zeros(len(q), len(q)).to(q)
        brightness: list[NormalEquations] = []
        state: State = {POSITION: q}
        # Errors of the frame are common to all references, so together they count as the root of their number.
        reference_weight = len(factors) ** -0.5
        for level, search_radius in zip(self.options.fine_levels, self.options.search_radii, strict=True):
            if level >= len(self.pyramid):
                continue
            contour = None if contours is None else contours.factor(state[POSITION], self.pyramid, search_radius)
            for k in range(self.options.iterations):
                scale = _ANNEALING**k
                brightness = [
                    replace(x, level=level, part_scale=scale).linearize(state).scaled(reference_weight) for x in factors
                ]
                equations = list(brightness)
                lines = None if contour is None else replace(contour, part_scale=scale).linearize(state)
                if lines is not None:
                    # The weight is a preference, so it is not part of the information.
                    absolute = lines.H / CORRELATED_CONTOUR_POINTS
                    equations.append(lines.scaled(_CONTOUR_WEIGHT))
                state, moved = self._step(state, equations, _FINE_DAMPING[min(level, 1)])
                if moved < _FINE_TOLERANCE:
                    break
        relative = self._information(brightness) if brightness else torch.zeros_like(absolute)
        return state[POSITION], relative, absolute

    def without_prior(self, q: Tensor, information: Tensor) -> Tensor:
        """The estimate with the effect of the prior removed, to first order; joints that the data hardly constrain stay."""
        data = information.double() + torch.diag(self.max_step.double() ** -2)
        return q - torch.linalg.solve(data, self.prior.linearize({POSITION: q}).g.double()).to(q)

    @property
    def max_step(self) -> Tensor:
        """Half of the distance between the bounds."""
        return ((self.bounds[1] - self.bounds[0]) / 2).clamp(min=1e-6)

    def _information(self, equations: Sequence[NormalEquations]) -> Tensor:
        return marginal(POSITION, equations)[0].H / _CORRELATED_POINTS

    def _step(
        self, state: State, equations: Sequence[NormalEquations], damping: float, prior_weight: float = 1.0
    ) -> tuple[State, float]:
        return bounded_step(
            state,
            [x.scaled(1 / _CORRELATED_POINTS) for x in equations],
            replace(self.prior, weight=prior_weight),
            bounds=self.bounds,
            damping=damping,
            max_step=MAX_STEP,
        )
