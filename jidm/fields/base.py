"""The interface of Jacobian fields, computed from a URDF or learned from images.

A field gives the motion of each image point per unit of each joint: `jacobian[..., k]` in px/rad (px/m for prismatic joints),
so that `flow = jacobian @ delta_q` to first order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SurfaceJacobian:
    """A Jacobian field at scattered points of the robot's surface.

    Attributes:
        points: (*batch, N, 2) pixel positions (u, v).
        jacobian: (*batch, N, 2, n) motion of each point per unit of each joint [px/rad or px/m].
        visible: (*batch, N) whether the point is visible; the other attributes are exact for hidden points, too.
        normals: (*batch, N, 3) outward normals in the base frame; None without geometry.
        part: (N,) index of the rigid part that each point belongs to; None without geometry.
    """

    points: Float[Tensor, "*batch N 2"]
    jacobian: Float[Tensor, "*batch N 2 n"]
    visible: Bool[Tensor, "*batch N"]
    normals: Float[Tensor, "*batch N 3"] | None = None
    part: Int[Tensor, " N"] | None = None


@dataclass(frozen=True, eq=False)
class ContourJacobian:
    """Points on the silhouette and the creases of the robot in one image.

    Attributes:
        index: (K,) identity of each point, stable from frame to frame.
        points: (K, 2) pixel positions (u, v).
        normals: (K, 2) unit vectors normal to the contour in the image.
        jacobian: (K, n) motion of each point along its normal per unit of each joint [px/rad or px/m].
        part: (K,) index of the rigid part that each point belongs to; None without geometry.
    """

    index: Int[Tensor, " K"]
    points: Float[Tensor, "K 2"]
    normals: Float[Tensor, "K 2"]
    jacobian: Float[Tensor, "K n"]
    part: Int[Tensor, " K"] | None = None


@runtime_checkable
class FieldAtPose(Protocol):
    """A field at given joint positions, with surface points that can be moved by a joint step."""

    @property
    def q(self) -> Float[Tensor, "*batch n"]:
        """The joint positions [rad or m]."""
        ...

    @property
    def visible(self) -> Bool[Tensor, "*batch N"]:
        """Which of the field's points are visible at q."""
        ...

    def surface(self, delta_q: Float[Tensor, "*batch n"] | None = None) -> SurfaceJacobian:
        """The same physical points at `q + delta_q` [rad or m]; at q if no step is given."""
        ...

    def keep(self, index: Int[Tensor, " K"]) -> FieldAtPose:
        """The same field with only the points `index`."""
        ...


@runtime_checkable
class ContourField(Protocol):
    """A field that also gives the robot's contours, which measure the pose absolutely."""

    @property
    def contour_points(self) -> int:
        """Number of contour points, which is above every identity."""
        ...

    def visible_contour(self, q: Float[Tensor, " n"]) -> Int[Tensor, " K"]:
        """Identities of the contour points that are visible as a line in the image at q."""
        ...

    def contour(self, q: Float[Tensor, " n"], index: Int[Tensor, " K"]) -> ContourJacobian:
        """The contour points `index` at q."""
        ...


@runtime_checkable
class PosePredictor(Protocol):
    """A field that predicts joint positions from a single frame."""

    def predict_pose_from_frame(self, frame: Float[Tensor, "3 H W"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Joint positions in a frame and their standard deviation [rad or m]."""
        ...


@runtime_checkable
class JacobianField(Protocol):
    """The Jacobian field of one robot in one camera."""

    @property
    def joint_names(self) -> tuple[str, ...]:
        """Names of the n joints, the order of every Jacobian's columns."""
        ...

    def at(self, q: Float[Tensor, "*batch n"], image: Float[Tensor, "*batch 3 H W"] | None = None) -> FieldAtPose:
        """The field at joint positions q [rad or m]; the image is for fields that need it."""
        ...

    def dense(
        self, q: Float[Tensor, "*batch n"], height: int, width: int, image: Float[Tensor, "*batch 3 H W"] | None = None
    ) -> tuple[Float[Tensor, "*batch 2 n {height} {width}"], Float[Tensor, "*batch {height} {width}"]]:
        """The field at joint positions q on a grid over the whole image [px of that grid per rad or m], and the robot's mask in
        [0, 1]; the image is for fields that need it."""
        ...
