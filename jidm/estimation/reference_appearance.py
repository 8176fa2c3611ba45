"""The appearance of the robot's surface when it was first visible: a reference without drift."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jidm.estimation.factors.photometric import SurfaceAppearance
from jidm.fields.base import FieldAtPose


class ReferenceAppearance:
    """Brightness of each surface point in the first frame that showed it.

    Alignment to it removes the drift of frame-to-frame alignment. Points of the first frame have the error of its pose;
    later ones have that of the pose at which they came into view.

    Args:
        first: appearance in the first frame.
        count: number of the field's surface points.
    """

    def __init__(self, first: SurfaceAppearance, count: int) -> None:
        like = first.brightness[0]
        self._known: Bool[Tensor, " N"] = torch.zeros(count, dtype=torch.bool, device=like.device)
        self._brightness: tuple[Float[Tensor, " N"], ...] = tuple(like.new_zeros(count) for _ in first.brightness)
        self._normals = None if first.normals is None else like.new_zeros(count, 3)
        self.add(first)

    def add(self, appearance: SurfaceAppearance) -> None:
        """Store the appearance of points that were not visible before."""
        new = ~self._known[appearance.index]
        index = appearance.index[new]
        self._known[index] = True
        for stored, level in zip(self._brightness, appearance.brightness, strict=True):
            stored[index] = level[new]
        if self._normals is not None and appearance.normals is not None:
            self._normals[index] = appearance.normals[new]

    def appearance_at(self, pose: FieldAtPose) -> SurfaceAppearance:
        """The stored points that are visible at a pose of the same field."""
        index = (pose.visible & self._known).nonzero()[:, 0]
        normals = None if self._normals is None else self._normals[index]
        return SurfaceAppearance(pose.keep(index), index, tuple(b[index] for b in self._brightness), None, normals)
