"""What every Jacobian field offers, whether computed from a URDF or learned from pixels.

A field says how far each image point moves per unit of each joint: `jacobian[..., k]` in px/rad (px/m for
prismatic joints), so that `flow ~ jacobian @ delta_q` to first order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SurfaceJacobian:
    """A field at scattered points of the robot.

    Attributes:
        points: (*batch, N, 2) pixel positions (u, v).
        jacobian: (*batch, N, 2, n) motion of each point per unit of each joint [px/rad or px/m].
        visible: (*batch, N) whether the camera sees the point; the rest of its row is still exact.
        normals: (*batch, N, 3) outward normals in the base frame, None where the field knows no geometry.
        part: (N,) number of the rigid part that each point rides on, None where the field knows none.
    """

    points: Float[Tensor, "*batch N 2"]
    jacobian: Float[Tensor, "*batch N 2 n"]
    visible: Bool[Tensor, "*batch N"]
    normals: Float[Tensor, "*batch N 3"] | None = None
    part: Int[Tensor, " N"] | None = None


@dataclass(frozen=True, eq=False)
class ContourJacobian:
    """Points on the robot's outlines and creases in one picture.

    Attributes:
        index: (K,) identity of each point, stable from frame to frame.
        points: (K, 2) pixel positions (u, v).
        normals: (K, 2) unit direction across the line in the picture.
        jacobian: (K, n) motion of each point across its line per unit of each joint [px/rad or px/m].
        part: (K,) number of the rigid part that each point rides on, None where the field knows none.
    """

    index: Int[Tensor, " K"]
    points: Float[Tensor, "K 2"]
    normals: Float[Tensor, "K 2"]
    jacobian: Float[Tensor, "K n"]
    part: Int[Tensor, " K"] | None = None


@runtime_checkable
class FieldAtPose(Protocol):
    """A field held at one pose, with points that can be carried along a joint step."""

    @property
    def q(self) -> Float[Tensor, "*batch n"]:
        """The pose [rad or m]."""
        ...

    @property
    def visible(self) -> Bool[Tensor, "*batch N"]:
        """Which of the field's points the camera sees at this pose."""
        ...

    def surface(self, delta_q: Float[Tensor, "*batch n"] | None = None) -> SurfaceJacobian:
        """The same physical points after a step `delta_q` from the pose (no step if not given)."""
        ...

    def keep(self, index: Int[Tensor, " K"]) -> FieldAtPose:
        """The same field restricted to some of its points."""
        ...


@runtime_checkable
class ContourField(Protocol):
    """A field that also knows where the robot draws lines; lines pin the pose absolutely, without drift."""

    @property
    def contour_points(self) -> int:
        """Number of contour points; identities are below it."""
        ...

    def visible_contour(self, q: Float[Tensor, " n"]) -> Int[Tensor, " K"]:
        """Identities of the contour points that draw a line in the picture at q."""
        ...

    def contour(self, q: Float[Tensor, " n"], index: Int[Tensor, " K"]) -> ContourJacobian:
        """Those contour points at q."""
        ...


@runtime_checkable
class PosePredictor(Protocol):
    """A field that tells the pose of a robot it has never followed."""

    def predict_pose_from_frame(self, frame: Float[Tensor, "3 H W"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Joint positions shown by a frame and their standard deviation [rad or m]."""
        ...


@runtime_checkable
class JacobianField(Protocol):
    """One robot seen by one camera."""

    @property
    def joint_names(self) -> tuple[str, ...]:
        """Names of the n joints, the order of every Jacobian's columns."""
        ...

    def at(self, q: Float[Tensor, "*batch n"], image: Float[Tensor, "*batch 3 H W"] | None = None) -> FieldAtPose:
        """The field at joint positions q; a learned field reads the image instead or as well."""
        ...

    def dense(
        self, q: Float[Tensor, "*batch n"], height: int, width: int, image: Float[Tensor, "*batch 3 H W"] | None = None
    ) -> tuple[Float[Tensor, "*batch 2 n {height} {width}"], Float[Tensor, "*batch {height} {width}"]]:
        """The field on a grid over the whole image [px of that grid per unit], and the robot's mask in [0, 1]."""
        ...
