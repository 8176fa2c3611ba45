"""Agreement of a video with the contours of an exact field, see `agreement`.

The copies are displaced by a few pixels, as random joint steps would displace them, and as a slightly different view would (a
random affine map of the image).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jidm.estimation.agreement import Agreement, RunningComparison
from jidm.fields.base import ContourField, ContourJacobian
from jidm.video.pyramid import BrightnessPyramid

_DISPLACEMENT = 3 / 320  # root mean square along the normals, as a fraction of the image's width
_MAX_DISPLACEMENT = 6.0  # of a single point, in root mean squares
_MIN_MOTION = 0.02  # of a joint relative to the one that moves the contours most; joints below it displace less
_COPIES = 24  # of each of the two kinds
_POINTS = 300  # contour points, evenly subsampled
_FIRST_FRAMES, _INTERVAL = 16, 4  # every frame of the first ones is measured, then one of so many, for speed


class ContourAgreement:
    """Running agreement of one video.

    Args:
        field: of the robot in its camera.
        width: of the image [px].
        seed: of the displacements.
    """

    def __init__(self, field: ContourField, width: int, *, seed: int = 0) -> None:
        self._field, self._displacement = field, _DISPLACEMENT * width
        self._generator = torch.Generator().manual_seed(seed)
        self._directions: tuple[Tensor, Tensor] | None = None
        self._by_pose, self._by_view = RunningComparison(), RunningComparison()
        self._frames = 0

    def update(self, q: Float[Tensor, " n"], index: Int[Tensor, " K"], pyramid: BrightnessPyramid) -> None:
        """Add a frame.

        Args:
            q: joint positions in it [rad or m]. index: identities of the contour points that are visible.
            pyramid: the frame.
        """
        self._frames += 1
        if self._frames > _FIRST_FRAMES and self._frames % _INTERVAL:
            return
        contour = self._field.contour(q, index[:: max(1, len(index) // _POINTS)])
        slopes = self._slopes(contour, pyramid)
        self._by_pose.update(slopes[: 1 + _COPIES])
        self._by_view.update(torch.cat([slopes[:1], slopes[1 + _COPIES :]]))

    @property
    def value(self) -> Agreement:
        """The agreement of the last frames."""
        return Agreement(self._by_view.score, self._by_pose.score, self._by_view.frames)

    def _slopes(self, contour: ContourJacobian, pyramid: BrightnessPyramid) -> Float[Tensor, " c"]:
        """Mean gradient across the contours [1/px]: in place, displaced by joint steps, and displaced as a whole."""
        points, normals = contour.points, contour.normals
        if not len(points):
            return points.new_zeros(1 + 2 * _COPIES)
        if self._directions is None:
            n = contour.jacobian.shape[-1]
            first, second = torch.randn(_COPIES, n + 6, generator=self._generator).split([n, 6], -1)
            self._directions = first.to(points), second.to(points)
        by_pose, by_view = self._directions
        offsets = torch.cat(
            [
                points.new_zeros(1, len(points)),
                self._offsets(contour.jacobian, by_pose),
                self._offsets(_affine_jacobian(points, normals), by_view),
            ]
        )
        displaced = points + offsets[..., None] * normals
        _, gradient = pyramid.sample(0, displaced)
        return ((gradient * normals).sum(-1).abs() * pyramid.inside(displaced)).mean(-1)

    def _offsets(self, jacobian: Float[Tensor, "K m"], directions: Float[Tensor, "D m"]) -> Float[Tensor, "D K"]:
        """Displacements along the normals [px], with a common root mean square."""
        scale = jacobian.square().mean(0).sqrt()
        scale = torch.maximum(scale, _MIN_MOTION * scale.max()).clamp(min=1e-9)
        offsets = (directions / scale) @ jacobian.mT
        offsets = offsets / offsets.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-9)
        return offsets.clamp(-_MAX_DISPLACEMENT, _MAX_DISPLACEMENT) * self._displacement


def _affine_jacobian(points: Float[Tensor, "K 2"], normals: Float[Tensor, "K 2"]) -> Float[Tensor, "K 6"]:
    """Motion along the normals by the six parameters of an affine map of the image around the points' center."""
    centered = points - points.mean(0)
    centered = centered / centered.square().mean().sqrt().clamp(min=1e-9)
    return torch.cat([normals, (centered[:, :, None] * normals[:, None]).flatten(1)], dim=-1)
