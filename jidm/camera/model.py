"""Pinhole camera in the OpenCV convention: x right, y down, z forward; pixel (0, 0) is centered at u = v = 0.

A continuous image of width W therefore spans u in [-0.5, W - 0.5], and a symmetric camera has its principal point at
((W - 1) / 2, (H - 1) / 2).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from jidm.atomic_io import atomic_write
from jidm.errors import CameraError

# OpenGL cameras look along -z with y up; OpenCV cameras along +z with y down.
_OPENGL_TO_OPENCV = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))


@dataclass(frozen=True, eq=False)
class Camera:
    """Pinhole camera: image size, intrinsics and pose.

    The methods are pure functions of K and T_camera_base, so they work under `torch.func` transforms (jacfwd, vmap)
    with respect to both: `jacfwd(lambda K: replace(camera, K=K).project(p)[0])(camera.K)`. The constructor therefore
    checks size and shapes only. Cameras from files, dictionaries and matrices of PyBullet are checked in full; a
    camera built by hand is checked by `validated`.

    Attributes:
        width, height: image size [px].
        K: (3, 3) intrinsics [px], last row (0, 0, 1).
        T_camera_base: (4, 4) pose of the robot base in the camera frame [m]: `T_camera_base @ p_base -> p_camera`.

    Raises:
        CameraError: the size is not positive, or K or T_camera_base has another shape.
    """

    width: int
    height: int
    K: Float[Tensor, "3 3"]
    T_camera_base: Float[Tensor, "4 4"]

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise CameraError(f"camera size {self.width}x{self.height} must be positive")
        K, T = self.K, self.T_camera_base
        if K.shape != (3, 3) or T.shape != (4, 4):
            raise CameraError(f"K must be 3x3 and T_camera_base 4x4, got {tuple(K.shape)} and {tuple(T.shape)}")

    def validated(self) -> Camera:
        """This camera, after its values have been checked.

        Raises:
            CameraError: K or T_camera_base is not finite, K is not upper triangular with positive focal lengths, or
                T_camera_base is not a rigid transform.
        """
        K, T = self.K.detach().double().cpu(), self.T_camera_base.detach().double().cpu()
        if not (K.isfinite().all() and T.isfinite().all()):
            raise CameraError("K and T_camera_base must be finite")
        if not torch.allclose(K[2], torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)) or K[1, 0].abs() > 1e-9:
            raise CameraError("K must be upper triangular with last row (0, 0, 1)")
        if K[0, 0] <= 0 or K[1, 1] <= 0:
            raise CameraError("focal lengths K[0,0] and K[1,1] must be positive")
        R = T[:3, :3]
        if not torch.allclose(R @ R.T, torch.eye(3, dtype=torch.float64), atol=1e-5) or R.det() < 0:
            raise CameraError("T_camera_base must be a rigid transform: its 3x3 block is not a rotation (det +1)")
        if not torch.allclose(T[3], torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)):
            raise CameraError("the last row of T_camera_base must be (0, 0, 0, 1)")
        return self

    # ---- constructors -------------------------------------------------------------------------------------------

    @classmethod
    def look_at(
        cls,
        eye: Sequence[float],
        target: Sequence[float],
        *,
        up: Sequence[float] = (0.0, 0.0, 1.0),
        fov_y: float = 45.0,
        width: int = 320,
        height: int = 240,
    ) -> Camera:
        """Camera at `eye` looking at `target`, both (3,) in the base frame [m].

        Args:
            up: direction that points up in the image; must not be parallel to the line of sight.
            fov_y: vertical field of view [degrees], in (0, 180).

        Raises:
            CameraError: a vector is not three finite numbers, they define no orientation, or fov_y is out of range.
        """
        if not 0.0 < fov_y < 180.0:
            raise CameraError(f"fov_y must lie in (0, 180) degrees, got {fov_y}")
        e, t, u = (_vector(name, v) for name, v in (("eye", eye), ("target", target), ("up", up)))
        if (t - e).norm() < 1e-9:
            raise CameraError("eye and target coincide; the camera has no direction to look in")
        z = torch.nn.functional.normalize(t - e, dim=0)
        x = torch.linalg.cross(z, u)
        if u.norm() == 0:
            raise CameraError("up is zero; give the direction that points up in the image, for instance (0, 0, 1)")
        if x.norm() < 1e-6 * u.norm():
            raise CameraError("up is parallel to the line of sight; give another up, for instance (0, 1, 0)")
        x = torch.nn.functional.normalize(x, dim=0)
        R = torch.stack([x, torch.linalg.cross(z, x), z])
        T = torch.eye(4, dtype=torch.float64)
        T[:3, :3], T[:3, 3] = R, -R @ e
        f = 0.5 * height / float(torch.tan(torch.deg2rad(torch.tensor(fov_y, dtype=torch.float64)) / 2))
        return cls(width, height, _intrinsics(f, f, (width - 1) / 2, (height - 1) / 2), T)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Camera:
        """Camera from `{width, height, K, T_camera_base}` or `{width, height, eye, target, up?, fov_y?}`.

        K may be 3x3 nested lists or (fx, fy, cx, cy).

        Raises:
            CameraError: a key is unknown or missing, or the values are not those of a pinhole camera.
        """
        known = {"width", "height", "K", "T_camera_base", "eye", "target", "up", "fov_y"}
        if unknown := set(data) - known:
            raise CameraError(f"unknown camera keys {sorted(unknown)}; known: {sorted(known)}")
        try:
            width, height = _pixels(data, "width"), _pixels(data, "height")
            if "eye" in data:
                options = {k: data[k] for k in ("up", "fov_y") if k in data}
                return cls.look_at(data["eye"], data["target"], width=width, height=height, **options)
            K = torch.as_tensor(data["K"], dtype=torch.float64)
            if K.shape == (4,):
                K = _intrinsics(*K.tolist())
            T = torch.as_tensor(data["T_camera_base"], dtype=torch.float64)
            if K.shape != (3, 3) or T.shape != (4, 4):
                raise CameraError(
                    f"K must be 3x3 or (fx, fy, cx, cy) and T_camera_base 4x4, got {tuple(K.shape)} and {tuple(T.shape)}"
                )
            return cls(width, height, K, T).validated()
        except KeyError as missing:
            raise CameraError(
                f"camera lacks {missing}; give width, height, K, T_camera_base or width, height, eye, target"
            ) from None
        except CameraError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            raise CameraError(f"camera values must be numbers of the documented shapes: {error}") from None

    @classmethod
    def load(cls, path: str | Path) -> Camera:
        """Camera from a JSON file in either form of `from_dict`.

        Raises:
            CameraError: the file cannot be read, is not JSON or holds no pinhole camera; the message names the file.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise CameraError(f"cannot read camera file {path}: {error.strerror}") from None
        except ValueError as error:
            raise CameraError(f"camera file {path} is not JSON: {error}") from None
        if not isinstance(data, dict):
            raise CameraError(f"camera file {path} must hold one JSON object")
        try:
            return cls.from_dict(data)
        except CameraError as error:
            raise CameraError(f"{path}: {error}") from None

    @classmethod
    def from_pybullet(
        cls,
        view: Sequence[float],
        projection: Sequence[float],
        *,
        width: int,
        height: int,
        T_world_base: Tensor | None = None,
    ) -> Camera:
        """Camera from PyBullet's column-major view and projection matrices (16 numbers each).

        Args:
            T_world_base: (4, 4) pose of the robot base in PyBullet's world; identity if not given.

        Raises:
            CameraError: not 16 numbers each, or not the matrices of a pinhole camera.
        """
        if len(view) != 16 or len(projection) != 16:
            raise CameraError(f"view and projection must hold 16 numbers each, got {len(view)} and {len(projection)}")
        V = torch.as_tensor(view, dtype=torch.float64).reshape(4, 4).T
        P = torch.as_tensor(projection, dtype=torch.float64).reshape(4, 4).T
        # Clip x in [-1, 1] spans the continuous image [-0.5, W - 0.5]; OpenGL's y is up.
        K = _intrinsics(
            float(P[0, 0]) * width / 2,
            float(P[1, 1]) * height / 2,
            (width - 1) / 2 - float(P[0, 2]) * width / 2,
            (height - 1) / 2 + float(P[1, 2]) * height / 2,
        )
        T_camera_world = _OPENGL_TO_OPENCV @ V
        T_world_base = torch.eye(4, dtype=torch.float64) if T_world_base is None else T_world_base.double()
        return cls(width, height, K, T_camera_world @ T_world_base).validated()

    # ---- conversions --------------------------------------------------------------------------------------------

    def to_pybullet(
        self, *, near: float = 0.01, far: float = 10.0, T_world_base: Tensor | None = None
    ) -> tuple[list[float], list[float]]:
        """PyBullet's (view, projection), column-major lists of 16; inverse of `from_pybullet`.

        Args:
            near, far: clipping distances [m].
            T_world_base: (4, 4) pose of the robot base in PyBullet's world; identity if not given.

        Raises:
            CameraError: the clipping distances are out of order, or K is skewed.
        """
        if not 0 < near < far:
            raise CameraError(f"clipping distances must satisfy 0 < near < far, got near={near}, far={far}")
        if abs(float(self.K[0, 1])) > 1e-9:
            raise CameraError("PyBullet cannot render skewed intrinsics; K[0,1] must be 0")
        K, T = self.K.double().cpu(), self.T_camera_base.double().cpu()
        if T_world_base is not None:
            T = T @ torch.linalg.inv(T_world_base.double().cpu())
        P = torch.zeros(4, 4, dtype=torch.float64)
        P[0, 0], P[1, 1] = 2 * K[0, 0] / self.width, 2 * K[1, 1] / self.height
        P[0, 2] = ((self.width - 1) / 2 - K[0, 2]) * 2 / self.width
        P[1, 2] = (K[1, 2] - (self.height - 1) / 2) * 2 / self.height
        P[2, 2], P[2, 3], P[3, 2] = -(far + near) / (far - near), -2 * far * near / (far - near), -1.0
        return (_OPENGL_TO_OPENCV @ T).T.flatten().tolist(), P.T.flatten().tolist()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready `{width, height, K, T_camera_base}`."""
        return {
            "width": self.width,
            "height": self.height,
            "K": self.K.double().tolist(),
            "T_camera_base": self.T_camera_base.double().tolist(),
        }

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as JSON, atomically."""
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def to(self, *args: Any, **kwargs: Any) -> Camera:
        """Same camera on another device or dtype, arguments as for `Tensor.to`."""
        return replace(self, K=self.K.to(*args, **kwargs), T_camera_base=self.T_camera_base.to(*args, **kwargs))

    @property
    def position(self) -> Float[Tensor, "3"]:
        """(3,) position of the camera in the base frame [m]."""
        return -self.T_camera_base[:3, :3].T @ self.T_camera_base[:3, 3]

    def resized(self, width: int, height: int) -> Camera:
        """Camera of the same view sampled on another grid (the image is stretched to width x height)."""
        sx, sy = width / self.width, height / self.height
        # u' + 0.5 = (u + 0.5) * s, because pixel edges, not pixel centers, stay in place.
        S = torch.tensor([[sx, 0, 0.5 * sx - 0.5], [0, sy, 0.5 * sy - 0.5], [0, 0, 1]], dtype=torch.float64)
        return replace(self, width=width, height=height, K=(S.to(self.K) @ self.K))

    # ---- projection ---------------------------------------------------------------------------------------------

    def transform(self, p_base: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3"]:
        """Points from the base frame to the camera frame [m]."""
        T = self.T_camera_base.to(p_base)
        return p_base @ T[:3, :3].T + T[:3, 3]

    def project_camera(self, p_camera: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 2"]:
        """Points in the camera frame [m] to pixels (u, v), which have no meaning where z <= 0, behind the camera."""
        K = self.K.to(p_camera)
        x, y, z = p_camera.unbind(-1)
        z = torch.where(z.abs() < 1e-9, torch.full_like(z, 1e-9), z)
        x, y = x / z, y / z
        return torch.stack([K[0, 0] * x + K[0, 1] * y + K[0, 2], K[1, 1] * y + K[1, 2]], dim=-1)

    def project(self, p_base: Float[Tensor, "*batch 3"]) -> tuple[Float[Tensor, "*batch 2"], Float[Tensor, "*batch"]]:
        """Points in the base frame [m] to pixels (u, v) and depth z in the camera frame [m]."""
        p_camera = self.transform(p_base)
        return self.project_camera(p_camera), p_camera[..., 2]

    def unproject(self, uv: Float[Tensor, "*batch 2"], depth: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch 3"]:
        """Pixels (u, v) at depth z [m] to points in the base frame [m]; inverse of `project`."""
        K, T = self.K.to(uv), self.T_camera_base.to(uv)
        y = (uv[..., 1] - K[1, 2]) / K[1, 1]
        x = (uv[..., 0] - K[0, 2] - K[0, 1] * y) / K[0, 0]
        p_camera = torch.stack([x * depth, y * depth, depth], dim=-1)
        return (p_camera - T[:3, 3]) @ T[:3, :3]

    def projection_jacobian(self, p_camera: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 2 3"]:
        """d(u, v) / d p_base at a point given in the camera frame [px/m]."""
        K, R = self.K.to(p_camera), self.T_camera_base[:3, :3].to(p_camera)
        x, y, z = p_camera.unbind(-1)
        inverse = 1 / torch.where(z.abs() < 1e-9, torch.full_like(z, 1e-9), z)
        zero = torch.zeros_like(inverse)
        row_u = torch.stack([K[0, 0] * inverse, K[0, 1] * inverse, -(K[0, 0] * x + K[0, 1] * y) * inverse**2], dim=-1)
        row_v = torch.stack([zero, K[1, 1] * inverse, -K[1, 1] * y * inverse**2], dim=-1)
        return torch.stack([row_u, row_v], dim=-2) @ R


def _intrinsics(fx: float, fy: float, cx: float, cy: float) -> Tensor:
    return torch.tensor([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]], dtype=torch.float64)


def _vector(name: str, values: Sequence[float]) -> Tensor:
    v = torch.tensor([float(x) for x in values], dtype=torch.float64)
    if v.shape != (3,) or not v.isfinite().all():
        raise CameraError(f"{name} must be three finite numbers [m], got {list(values)}")
    return v


def _pixels(data: Mapping[str, Any], key: str) -> int:
    if int(data[key]) != float(data[key]):
        raise CameraError(f"{key} must be a whole number of pixels, got {data[key]}")
    return int(data[key])
