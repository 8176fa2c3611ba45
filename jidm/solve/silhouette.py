"""The robot's silhouette, told from a background that was seen before: it leads a pose back that brightness has lost.

Where the background was ever uncovered, a pixel shows it or something in front of it, whatever the robot's texture and
whatever the last frame looked like. Each point of the robot's rim is moved along its normal to where the robot ends;
the search may reach far, since no edge of the background and no crease of the robot is mistaken for its end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from jidm.field.base import FieldAtPose, JacobianField
from jidm.motion.pyramid import sampled
from jidm.solve.photometric import Quadratic
from jidm.solve.robust import MAD

_CELLS = 150  # of the robot's mask, along the longer side of the picture
_POINTS = 600  # of the rim at most
_ENOUGH = 20  # points; fewer are no measurement
_CLEAR = 0.35  # mean evidence, robot on one side and background on the other, below which a point says nothing
_CERTAIN = 1.0  # [px] to which an end is found
_NEARER = 0.01  # of evidence by which an end at the full reach must be clearer than one close by


@dataclass(frozen=True, eq=False)
class Rim:
    """Points of the robot that lie on the border of its silhouette.

    Attributes:
        points: (K, 2) pixels (u, v). normals: (K, 2) unit vectors that lead off the robot.
        jacobian: (K, n) motion along the normal per unit of each joint [px/rad or px/m].
        mask: (h, w) 1 in cells that show the robot. cell: their edge [px].
    """

    points: Float[Tensor, "K 2"]
    normals: Float[Tensor, "K 2"]
    jacobian: Float[Tensor, "K n"]
    mask: Float[Tensor, "h w"]
    cell: float

    @classmethod
    def of(cls, pose: FieldAtPose, height: int, width: int) -> Rim:
        """The rim at a pose, in a picture of that size; points at the picture's border are left out."""
        surface, cell = pose.surface(), max(height, width) / _CELLS
        mask = robot_mask(surface.points, height, width, cell)
        inner = -F.max_pool2d(-mask[None], 5, 1, 2)[0]
        soft = F.avg_pool2d(F.pad(mask[None, None], (3,) * 4, mode="replicate"), 5, 1)
        soft = F.avg_pool2d(soft, 3, 1)[0, 0]
        along_u = F.pad(soft[:, 2:] - soft[:, :-2], (1, 1))
        along_v = F.pad(soft[2:] - soft[:-2], (0, 0, 1, 1))
        values = sampled(torch.stack([inner, along_u, along_v]), surface.points, cell)
        slope = values[1:].T
        steepness = slope.norm(dim=-1)
        u, v = surface.points.unbind(-1)
        margin = 2 * cell
        inside = (u > margin) & (v > margin) & (u < width - margin) & (v < height - margin)
        index = ((values[0] < 0.5) & (steepness > 0.1) & inside).nonzero()[:_POINTS, 0]
        normals = -slope[index] / steepness[index, None]
        across = torch.einsum("ka,kan->kn", normals, surface.jacobian[index])
        return cls(surface.points[index], normals, across, mask, cell)


def robot_mask(points: Float[Tensor, "N 2"], height: int, width: int, cell: float) -> Float[Tensor, "h w"]:
    """1 in the picture's cells that hold one of the robot's points, hidden ones as well; small gaps are closed."""
    h, w = int(-(-height // cell)), int(-(-width // cell))
    u, v = ((points + 0.5) / cell).floor().long().unbind(-1)
    inside = (u >= 0) & (v >= 0) & (u < w) & (v < h)
    mask = points.new_zeros(h, w)
    mask[v[inside], u[inside]] = 1
    return -F.max_pool2d(-F.max_pool2d(mask[None, None], 3, 1, 1), 3, 1, 1)[0, 0]


class SilhouetteTerm:
    """A robot's silhouette in one frame.

    Args:
        field: the robot and its camera.
        evidence: (H, W) 1 where the frame surely shows something in front of the background, -1 where it surely shows the
            background, 0 where neither is known (`Background.evidence`).
    """

    def __init__(self, field: JacobianField, evidence: Float[Tensor, "H W"]) -> None:
        self.field = field
        self.evidence = evidence

    def quadratic(self, q: Float[Tensor, " n"], reach: float) -> Quadratic | None:
        """Point-to-line model at pose q, ends searched up to `reach` px either way; None where too few are found."""
        offset, clear, jacobian = self._offsets(q, reach)
        weight = ((clear - _CLEAR) / (1 - _CLEAR)).clamp(min=0)
        used = weight > 0
        if int(used.sum()) < _ENOUGH:
            return None
        # Cauchy's weight: far ends pull, but a few of them do not outvote the others.
        scale = _CERTAIN + MAD * offset[used].abs().median()
        weight = weight / (1 + (offset / (2 * scale)) ** 2) / scale**2
        weighted = jacobian * weight[:, None]
        return Quadratic(weighted.T @ jacobian, weighted.T @ offset, float(used.sum()))

    def mismatch(self, q: Float[Tensor, " n"]) -> float:
        """Size of what is seen of the robot at pose q where it is not, and not seen where it is, over the robot's size.

        What else moves in the picture counts as well, so only differences between poses mean something.
        """
        height, width = self.evidence.shape
        points = self.field.at(q).surface().points
        mask = robot_mask(points, height, width, max(height, width) / _CELLS)
        seen = F.interpolate(self.evidence[None, None], size=mask.shape, mode="area")[0, 0].to(mask)
        wrong = mask * (-seen).clamp(min=0) + (1 - mask) * seen.clamp(min=0)
        return float(wrong.sum() / mask.sum().clamp(min=1))

    def _offsets(
        self, q: Float[Tensor, " n"], reach: float
    ) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"], Float[Tensor, "K n"]]:
        """How far off its expected end the robot ends along each normal [px], how clearly (0 to 1), and the Jacobian."""
        rim = Rim.of(self.field.at(q), *self.evidence.shape)
        step = max(0.5, reach / 12)
        window = round(reach / step)
        s = torch.arange(-2 * window, 2 * window + 1).to(rim.points) * step
        positions = rim.points[:, None] + s[:, None] * rim.normals[:, None]
        found, clear = _end(sampled(self.evidence[None], positions)[0], s, window)
        # Sought in the mask alike, so that what the search is off by cancels.
        expected, _ = _end(sampled(2 * rim.mask[None] - 1, positions, rim.cell)[0], s, window)
        return found - expected, clear, rim.jacobian


def _end(
    seen: Float[Tensor, "K S"], s: Float[Tensor, " S"], window: int
) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
    """Where along each row 1 turns best into -1, and how well: half the difference of the means over a window each."""
    middle = len(s) // 2
    total = F.pad(seen.cumsum(-1), (1, 0))
    centre = torch.arange(middle - window, middle + window + 1, device=seen.device)
    before = total[:, centre + 1] - total[:, centre - window]
    after = total[:, centre + window + 1] - total[:, centre]
    clear = (before - after) / (2 * (window + 1))
    best = (clear - _NEARER * s[centre].abs() / s[centre[-1]]).argmax(-1, keepdim=True)
    return s[centre][best[:, 0]], clear.gather(1, best)[:, 0]
