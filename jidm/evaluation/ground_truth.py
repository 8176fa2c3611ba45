"""Exact camera, depth and links of a simulated recording, and from them the exact field and flow.

Motor babbling in simulation records them beside the video (`observation.camera.<key>`, `.depth.`, `.links.`); a
recording of a real robot has none of them, and then a field cannot be compared.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from jidm.camera.model import Camera
from jidm.datasets.feature import geometry_keys
from jidm.errors import CameraError, DatasetError
from jidm.fields.analytic import AnalyticField
from jidm.training.data.frame_store import image_size
from jidm.training.data.geometric_flow import DepthView, downsample_flow, geometric_flow, grid_intrinsics, link_poses
from jidm.training.data.recorded_geometry import letterbox_geometry, unpack_cameras
from jidm.video.letterbox import Letterbox

if TYPE_CHECKING:
    from jidm.robot.embodiment import Embodiment

_SURFACE_POINTS = 30000  # tens of points per cell of a 32 x 32 grid that the robot half fills


@dataclass(frozen=True, eq=False)
class GroundTruthView:
    """The robot in one camera over an episode of T frames.

    Attributes:
        field: the exact field of that camera, in pixels of the full (H, W) image.
        cameras: one for all frames, or T of them.
        links: (T, h, w) link in each cell of the grid, -1 off the robot; None where not recorded.
        depth: (T, h, w) its distance along the optical axis [m]; None where not recorded.
    """

    field: AnalyticField
    cameras: tuple[Camera, ...]
    links: Int[Tensor, "T h w"] | None
    depth: Float[Tensor, "T h w"] | None

    @classmethod
    def from_episode(cls, surface: AnalyticField, dataset: Any, episode: Any, image_key: str) -> GroundTruthView | None:
        """The view of an episode; None where its camera is not recorded.

        Args:
            surface: any exact field of the robot; its sampled surface is shared.
            dataset, episode: where it is recorded.
            image_key: which of the data set's videos.
        """
        cameras = recorded_cameras(dataset, episode, image_key)
        if cameras is None:
            return None
        depth, links = (_column(dataset, episode, key) for key in geometry_keys(image_key)[:2])
        return cls(
            with_camera(surface, cameras[0]),
            cameras,
            None if links is None else links.long(),
            None if depth is None else depth.double(),
        )

    def camera(self, frame: int) -> Camera:
        """The camera of a frame."""
        return self.cameras[frame if len(self.cameras) > 1 else 0]

    def jacobian(
        self, frame: int, q: Float[Tensor, " n"], height: int, width: int
    ) -> tuple[Float[Tensor, "2 n {height} {width}"], Float[Tensor, "{height} {width}"]]:
        """The exact field on a grid [px of the full image per unit], and 1 where the image shows the robot."""
        camera = self.camera(frame)
        jacobian, mask = with_camera(self.field, camera).dense(q.double(), height, width)
        scale = jacobian.new_tensor([camera.width / width, camera.height / height])
        if self.links is not None and (factor := self._grid_ratio(height, width)):
            shown = F.avg_pool2d((self.links[frame] >= 0).to(mask)[None], factor)[0]
            mask = mask * (shown >= 0.5)  # an object may be in front of the robot
        return jacobian * scale[:, None, None, None], mask

    def flow(
        self, frame: int, q: Float[Tensor, " n"], q_next: Float[Tensor, " n"], height: int, width: int
    ) -> tuple[Float[Tensor, "2 {height} {width}"], Float[Tensor, "{height} {width}"]] | None:
        """Exact flow of the robot's cells from q to q_next [px of the full image], and their mask.

        None where depth and links were not recorded, or not on a multiple of that grid. The camera is assumed not to
        move between the two.
        """
        factor = self._grid_ratio(height, width)
        if self.links is None or self.depth is None or not factor:
            return None
        camera = self.camera(frame)
        link, depth = self.links[frame], self.depth[frame]
        full = camera.K[[0, 1, 0, 1], [0, 1, 2, 2]].double()[None]
        intrinsics = grid_intrinsics(full, camera.height, camera.width, *link.shape)
        poses = link_poses(self.field.kinematics, torch.stack([q, q_next]))
        T = camera.T_camera_base.double()[None]
        before, after = (DepthView(depth[None], link[None], intrinsics, T, pose[None]) for pose in poses)
        flow, _ = geometric_flow(before, after)
        scale = flow.new_tensor([camera.width / link.shape[1], camera.height / link.shape[0]])
        flow, share = downsample_flow(flow * scale[:, None, None], (link >= 0).double()[None], factor)
        return flow[0], (share[0] >= 0.5).double()

    def letterbox(self, letterbox: Letterbox) -> GroundTruthView:
        """The same view in letterboxed images; depth and links on a grid of half their size."""
        cameras = tuple(letterbox_camera(camera, letterbox) for camera in self.cameras)
        if self.links is None or self.depth is None:
            return replace(self, cameras=cameras, links=None, depth=None)
        rows = np.zeros((len(self.links), 16))
        rows[:, 4:] = np.eye(3, 4).reshape(-1)
        made = letterbox_geometry(self.depth.numpy(), self.links.numpy(), rows, letterbox)
        links, depth = torch.from_numpy(made["link"]).long(), torch.from_numpy(made["depth"]).double()
        return replace(self, cameras=cameras, links=links, depth=depth)

    def _grid_ratio(self, height: int, width: int) -> int:
        """Factor by which the recorded grid is finer; 0 where it is not a multiple."""
        if self.links is None:
            return 0
        (rows, down), (columns, across) = (divmod(a, b) for a, b in zip(self.links.shape[1:], (height, width)))
        return rows if rows == columns and down == across == 0 else 0

    def robot_mask(self, frame: int, q: Float[Tensor, " n"]) -> Float[Tensor, "H W"]:
        """1 on the robot and on objects in front of it in the full image; its contour is accurate to a pixel."""
        camera = self.camera(frame)
        _, mask = with_camera(self.field, camera).dense(q.double(), camera.height, camera.width)
        return mask


def make_surface_field(embodiment: Embodiment) -> AnalyticField:
    """A densely sampled exact field of the robot, for any camera (see `with_camera`)."""
    camera = Camera.look_at((1.0, 0.0, 0.5), (0.0, 0.0, 0.0))  # replaced by the recording's own
    return AnalyticField(embodiment, camera, points=1000, occluders=_SURFACE_POINTS)


def with_camera(surface: AnalyticField, camera: Camera) -> AnalyticField:
    """The same sampled surface in another camera."""
    field = copy.copy(surface)
    field.camera = camera
    return field


def letterbox_camera(camera: Camera, letterbox: Letterbox) -> Camera:
    """The camera of letterboxed images."""
    K = camera.K.clone()
    K[0], K[1] = K[0] * letterbox.scale_u, K[1] * letterbox.scale_v
    K[0, 2] += (letterbox.scale_u - 1) / 2 + letterbox.left
    K[1, 2] += (letterbox.scale_v - 1) / 2 + letterbox.top
    return replace(camera, width=letterbox.width, height=letterbox.height, K=K)


def recorded_cameras(dataset: Any, episode: Any, image_key: str) -> tuple[Camera, ...] | None:
    """The cameras of an episode's frames, one if it does not move: as recorded, else the recipe's; None if neither
    exists.

    Raises:
        DatasetError: the recorded numbers are no camera.
    """
    rows = _column(dataset, episode, geometry_keys(image_key)[2])
    stated = dict(dataset.recipe.get("cameras") or {}).get(image_key)
    if rows is None:
        return None if stated is None else (Camera.from_dict(stated),)
    height, width = image_size(dataset, image_key)
    static = bool((rows == rows[0]).all())
    intrinsics, poses = unpack_cameras((rows[:1] if static else rows).numpy())
    return tuple(_make_camera(width, height, k, T) for k, T in zip(intrinsics, poses))


def _make_camera(width: int, height: int, intrinsics: NDArray[Any], T: NDArray[Any]) -> Camera:
    fx, fy, cx, cy = intrinsics.tolist()
    K = torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64)
    try:
        return Camera(width, height, K, torch.from_numpy(T)).validated()
    except CameraError as error:
        raise DatasetError(
            f"observation.camera holds no camera: {error}; write fx, fy, cx, cy and the 3x4 pose"
        ) from None


def _column(dataset: Any, episode: Any, key: str) -> Tensor | None:
    if key not in dataset.features:
        return None
    values = torch.from_numpy(np.array(episode.column(key)))
    return values.double() if values.is_floating_point() else values
