"""What the robot's surface looked like when it was first seen: a reference that does not drift with the pose."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jidm.estimation.factors.photometric import SurfaceAppearance
from jidm.fields.base import FieldAtPose


class ReferenceAppearance:
    """Brightness of each surface point in the first frame that showed it.

    Aligning to it corrects what aligning frame to frame adds up to. Points that the first frame showed are as right as
    its pose; later ones carry the error of the pose at which they came into view, and no more.

    Args:
        first: what the first frame shows.
        count: number of the field's surface points.
    """

    def __init__(self, first: SurfaceAppearance, count: int) -> None:
        like = first.brightness[0]
        self._known: Bool[Tensor, " N"] = torch.zeros(count, dtype=torch.bool, device=like.device)
        self._brightness: tuple[Float[Tensor, " N"], ...] = tuple(like.new_zeros(count) for _ in first.brightness)
        self._normals = None if first.normals is None else like.new_zeros(count, 3)
        self.add(first)

    def add(self, appearance: SurfaceAppearance) -> None:
        """Keep what points look like that were never seen before."""
        new = ~self._known[appearance.index]
        index = appearance.index[new]
        self._known[index] = True
        for stored, level in zip(self._brightness, appearance.brightness, strict=True):
            stored[index] = level[new]
        if self._normals is not None and appearance.normals is not None:
            self._normals[index] = appearance.normals[new]

    def appearance_at(self, pose: FieldAtPose) -> SurfaceAppearance:
        """The known points that a pose of the same field shows."""
        index = (pose.visible & self._known).nonzero()[:, 0]
        normals = None if self._normals is None else self._normals[index]
        return SurfaceAppearance(pose.keep(index), index, tuple(b[index] for b in self._brightness), None, normals)
