"""Which link every pixel shows, and how deep, from the robot's meshes; needs PyTorch3D.

The exact counterpart of a z-buffer of sampled points: no gaps, no dilated borders. It is batched and runs on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from jidm.errors import EmbodimentError, MissingExtraError
from jidm.robot.shape_mesh import visual_meshes

if TYPE_CHECKING:
    from jidm.camera.model import Camera
    from jidm.robot.model import RobotModel

_NEAR = 1e-2  # [m] triangles are clipped at this distance from the camera


class MeshRasterizer:
    """Rasterizes the visual meshes of a robot.

    Args:
        model: the robot.
        links: names of the links to draw, or patterns, as for `visual_meshes`; all if None.

    Raises:
        MissingExtraError: PyTorch3D is not installed.
        EmbodimentError: no link has a visual shape, or as for `visual_meshes`.
    """

    def __init__(self, model: RobotModel, links: Sequence[str] | None = None) -> None:
        try:
            import pytorch3d  # noqa: F401
        except ImportError:
            raise MissingExtraError("rasterizing meshes", "pytorch3d", "pytorch3d") from None
        vertices, faces, link_ids, count = [], [], [], 0
        for index, mesh in visual_meshes(model, links):
            vertices.append(np.asarray(mesh.vertices))
            faces.append(np.asarray(mesh.faces) + count)
            link_ids.append(np.full(len(mesh.vertices), index))
            count += len(mesh.vertices)
        if not count:
            raise EmbodimentError(f"robot '{model.name}' has no visual shapes to rasterize; add them to its URDF")
        self.vertices = torch.from_numpy(np.concatenate(vertices))
        self.faces = torch.from_numpy(np.concatenate(faces)).long()
        self.link = torch.from_numpy(np.concatenate(link_ids)).long()

    @torch.no_grad()
    def __call__(
        self, camera: Camera, poses: Float[Tensor, "*batch links 4 4"]
    ) -> tuple[Float[Tensor, "*batch cells"], Int[Tensor, "*batch cells"]]:
        """Depth [m] and link of every pixel's center, row by row; infinity and -1 where there is no robot.

        Args:
            camera: it sees; all batch items share it.
            poses: of the links in the base frame, from `Kinematics.link_poses`.
        """
        from pytorch3d.renderer.mesh.rasterize_meshes import rasterize_meshes
        from pytorch3d.structures import Meshes

        link, faces = self.link.to(poses.device), self.faces.to(poses.device)
        T = poses.reshape(-1, *poses.shape[-3:])[:, link]
        p_base = torch.einsum("bvij,vj->bvi", T[..., :3, :3], self.vertices.to(poses)) + T[..., :3, 3]
        uv, depth = camera.project(p_base)
        # Normalized coordinates of PyTorch3D point left and up; the shorter side of the image is from -1 to 1.
        width, height = camera.width, camera.height
        center = uv.new_tensor([width - 1, height - 1]) / 2
        screen = torch.cat([(center - uv) / (min(width, height) / 2), depth[..., None]], dim=-1).float()
        meshes = Meshes(verts=list(screen), faces=[faces] * len(screen))
        face, depths, *_ = rasterize_meshes(
            meshes, image_size=(height, width), faces_per_pixel=1, perspective_correct=True, z_clip_value=_NEAR
        )
        face, depths = face[..., 0].flatten(1), depths[..., 0].flatten(1)
        hit = face >= 0
        # Faces are numbered through the whole batch.
        shown = torch.where(hit, link[faces[face.clamp(min=0) % len(faces), 0]], -1)
        batch = poses.shape[:-3]
        return (
            torch.where(hit, depths, torch.inf).to(poses).reshape(*batch, -1),
            shown.reshape(*batch, -1),
        )
