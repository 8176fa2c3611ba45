"""Coarse-to-fine alignment of one frame: brightness on blurred levels, the silhouette, then fine brightness and contours.

A maximum a posteriori estimate of the joint positions by Gauss-Newton over factors. The constants were chosen on two ALOHA
episodes and a few rendered arms.
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

_COARSE_POINTS = 500  # in use on the coarse levels; blurred images hold no more
_DAMPING, _DAMPING_DECAY = 0.1, 0.3
"""Relative damping on the coarsest level, and its factor from level to level: joints that a blurred image cannot tell apart
wait for a sharper one."""
_FINE_DAMPING = (1e-4, 1e-3)  # on the finest level, and on the others
MAX_STEP = 0.1  # [rad or m] of a joint in one iteration
_COARSE_TOLERANCE, _FINE_TOLERANCE = 3e-4, 2e-5  # [rad or m] a smaller step ends a level

_CORRELATED_POINTS = 30.0  # neighboring points that share one error; puts the prior on the data's scale
CORRELATED_CONTOUR_POINTS = 8.0  # likewise; points of contours lie further apart
_CONTOUR_WEIGHT = 10.0  # of contours against brightness
_ANNEALING = 0.8
"""Factor on the scale of its own that a rigid part is granted, from iteration to iteration (see `tukey_weight`). A part that is
off as a whole is followed at first, and dropped in the end if it still is: then something hides it."""

# On blurred levels the prior counts this much less: a jump must be found before it can be believed.
_COARSE_PRIOR_WEIGHT = 0.01
# Likewise where the silhouette leads. Brightness of that level is aligned as well, so that rolling links stay as they are.
_SILHOUETTE_PRIOR_WEIGHT = 0.1
_SILHOUETTE_LEVEL = 2
_SILHOUETTE_STEPS = 3
_SILHOUETTE_DAMPING = 1e-3
_SILHOUETTE_TOLERANCE = 2e-3  # [rad or m]
_SILHOUETTE_WEIGHT = 10.0  # against brightness
_MISMATCH_COST = 10.0  # of a silhouette that is wrong by the robot's own area, in units of `PhotometricFactor.error`


@dataclass(frozen=True)
class AlignOptions:
    """How a frame is aligned.

    Attributes:
        coarse_levels: pyramid levels, coarsest first; each start is brought down these levels against the nearest reference.
        fine_levels: then the best start is refined against all references and the contours.
        search_radii: for edges, on each fine level [px].
        silhouette_search_radii: for the silhouette's boundary where the background is known, one after the other [px].
        silhouette_min_improvement: a pose found by the silhouette must cost less by this much. What the robot holds is in
            front of the background as well, and must not drag a pose along that is right.
        iterations: Gauss-Newton steps per level at most.
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
        data_only: (n,) where the frame alone puts q: the estimate with the prior's pull undone, so that a filter that made
            the prior does not count it twice; outside the bounds, perhaps.
        relative_information: (n, n) information about q relative to the references (brightness).
        absolute_information: (n, n) information about q itself (contours).
        error: truncated brightness error that is left, see `PhotometricFactor.error`.
    """

    q: Float[Tensor, " n"]
    data_only: Float[Tensor, " n"]
    relative_information: Float[Tensor, "n n"]
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
    """Pose at which the references' points look as they did and the robot's contours lie on the frame's edges.

    Args:
        pyramid: the frame.
        references: earlier appearances, the most recent first, the one that drifts least last.
        starts: poses to try, at least one.
        contours: contour matching with its memory; brightness only if not given.
        silhouette: of the frame, where its background is known.
        bounds: lower and upper bound of q.
        prior: mean and standard deviation of each joint (both (n,), [rad or m]); it holds joints that the frame does not
            constrain.
    """
    problem = _AlignmentProblem(pyramid, bounds, StudentTPrior(POSITION, *prior), options)
    sharp_level = min(1, len(pyramid) - 1)
    nearest = PhotometricFactor(references[0].subsample(_COARSE_POINTS), pyramid, sharp_level)
    candidates: list[Tensor] = []
    for start in starts:
        # Blurred levels bring a far start near, and drag a near one along with the background.
        candidates += [start, problem.align_coarse(nearest, start)]
    if not candidates:
        raise ValueError("align needs at least one start")
    q = min(candidates, key=nearest.error)
    if silhouette is not None:
        appearance = PhotometricFactor(references[-1].subsample(_COARSE_POINTS), pyramid, sharp_level)
        q = problem.align_silhouette(silhouette, appearance, q)
    factors = [PhotometricFactor(x, pyramid, light=f"light_{k}") for k, x in enumerate(references)]
    q, relative, absolute = problem.align_fine(factors, contours, q)
    return Alignment(q, problem.without_prior(q, relative, absolute), relative, absolute, nearest.error(q))


@dataclass(frozen=True, eq=False)
class _AlignmentProblem:
    pyramid: BrightnessPyramid
    bounds: tuple[Tensor, Tensor]
    prior: StudentTPrior
    options: AlignOptions

    def align_coarse(self, factor: PhotometricFactor, q: Tensor) -> Tensor:
        """Brightness alone, from coarse to fine."""
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
        """The pose to which the silhouette leads, if it costs less there, else q."""

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
        """Brightness of all references and the contours together, on the fine levels; q and the information of both."""
        relative = absolute = torch.zeros(len(q), len(q)).to(q)
        state: State = {POSITION: q}
        # References share their errors with this frame: together they count as the root of their number.
        reference_weight = len(factors) ** -0.5
        for level, search_radius in zip(self.options.fine_levels, self.options.search_radii, strict=True):
            if level >= len(self.pyramid):
                continue
            contour = None if contours is None else contours.factor(state[POSITION], self.pyramid, search_radius)
            for k in range(self.options.iterations):
                scale = _ANNEALING**k
                equations = [
                    replace(x, level=level, part_scale=scale).linearize(state).scaled(reference_weight) for x in factors
                ]
                lines = None if contour is None else replace(contour, part_scale=scale).linearize(state)
                relative = self._information(equations)
                if lines is not None:
                    # The weight is a preference, not knowledge: the information counts contours once.
                    absolute = lines.H / CORRELATED_CONTOUR_POINTS
                    equations.append(lines.scaled(_CONTOUR_WEIGHT))
                state, moved = self._step(state, equations, _FINE_DAMPING[min(level, 1)])
                if moved < _FINE_TOLERANCE:
                    break
        return state[POSITION], relative, absolute

    def without_prior(self, q: Tensor, relative: Tensor, absolute: Tensor) -> Tensor:
        """The estimate once the prior's pull is undone, to first order; joints that the data hardly constrain stay."""
        weighted = relative + absolute * (CORRELATED_CONTOUR_POINTS * _CONTOUR_WEIGHT / _CORRELATED_POINTS)
        data = weighted.double() + torch.diag(self.max_step.double() ** -2)
        return q - torch.linalg.solve(data, self.prior.linearize({POSITION: q}).g.double()).to(q)

    @property
    def max_step(self) -> Tensor:
        """Half of the way between the bounds."""
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
