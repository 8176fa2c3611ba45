"""Images of a scene by PyBullet's TinyRenderer: anti-aliased, with textures fixed to the links and a background.

TinyRenderer is a software rasterizer without anti-aliasing, solid textures or backgrounds. These are added here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jidm.sim.appearance import Appearance, Background, Light, Texture
from jidm.sim.physics import PhysicsClient
from jidm.sim.sampling import BACKGROUND, sample_at_centers
from jidm.sim.textures import solid_noise

if TYPE_CHECKING:
    from jidm.camera.model import Camera

# TinyRenderer samples a pixel at its left edge and, counted from below, at its lower edge. Moving the principal point
# by this much [px, u right and v down] puts the samples at pixel centers; measured on boxes, spheres and planes.
_SAMPLE_SHIFT = (-0.5, 0.5)
_NEAR, _FAR = 0.05, 20.0  # clipping distances along the optical axis [m]
_BODY_MASK = (1 << 24) - 1  # bits of a segment that name the body; those above name its link


@dataclass(frozen=True, eq=False)
class Rendering:
    """What a camera sees. Leading axes: none for one image, (T,) for a video.

    Attributes:
        rgb: (*batch, H, W, 3) uint8.
        depth: (*batch, H, W) float32 distance along the optical axis at the pixel's center [m]; inf off the robot.
        link: (*batch, H, W) int32 index into `embodiment.model.links`, -1 off the robot. Objects in front of the robot
            are off the robot.
    """

    rgb: NDArray[np.uint8]
    depth: NDArray[np.float32]
    link: NDArray[np.int32]

    @property
    def on_robot(self) -> NDArray[np.bool_]:
        """(*batch, H, W) True where the pixel's center shows the robot."""
        return self.link != BACKGROUND

    def __len__(self) -> int:
        return self.rgb.shape[0] if self.rgb.ndim == 4 else 1

    def __getitem__(self, item: int | slice) -> Rendering:
        """Frames of a video."""
        return Rendering(self.rgb[item], self.depth[item], self.link[item])


class Raster(NamedTuple):
    """One pass of the rasterizer: rgb (H, W, 3) uint8, depth (H, W) [m] and link (H, W) as in `Rendering`, and solid
    (H, W), which is True where the robot or an object is."""

    rgb: NDArray[np.uint8]
    depth: NDArray[np.float32]
    link: NDArray[np.int32]
    solid: NDArray[np.bool_]


def rasterize(client: PhysicsClient, camera: Camera, light: Light) -> Raster:
    """One pass of TinyRenderer, sampled at pixel centers, with the robot and the objects as they are posed.

    Raises:
        CameraError: the camera has skewed intrinsics.
    """
    K = camera.K.clone().double()
    K[0, 2] += _SAMPLE_SHIFT[0]
    K[1, 2] += _SAMPLE_SHIFT[1]
    view, projection = replace(camera, K=K).to_pybullet(near=_NEAR, far=_FAR)
    width, height = camera.width, camera.height
    direction = (np.asarray(light.direction) / np.linalg.norm(light.direction)).tolist()
    # TinyRenderer's shadows darken by 20 % at most and need twice the time.
    _, _, rgba, buffer, segments = client.call(
        "getCameraImage", width, height, view, projection, lightDirection=direction, lightColor=light.color, shadow=0,
        lightAmbientCoeff=light.ambient, lightDiffuseCoeff=light.diffuse, lightSpecularCoeff=light.specular,
        renderer=client.bullet.ER_TINY_RENDERER, flags=client.bullet.ER_SEGMENTATION_MASK_OBJECT_AND_LINKINDEX,
    )  # fmt: skip
    rgb = np.asarray(rgba, dtype=np.uint8).reshape(height, width, 4)[..., :3]
    z = np.asarray(buffer, dtype=np.float64).reshape(height, width)
    segment = np.asarray(segments, dtype=np.int64).reshape(height, width)
    solid = segment >= 0
    robot = solid & (segment & _BODY_MASK == client.body)
    link = np.where(robot, client.link_table[np.where(robot, segment >> 24, 0)], BACKGROUND).astype(np.int32)
    depth = np.where(robot, _FAR * _NEAR / (_FAR - (_FAR - _NEAR) * z), np.inf).astype(np.float32)
    return Raster(rgb, depth, link, solid)


def render_image(
    client: PhysicsClient,
    camera: Camera,
    appearance: Appearance,
    *,
    seed: int,
    frame: int,
    supersample: int,
    exact: bool,
) -> Rendering:
    """What `camera` sees of the robot and the objects as they are posed.

    Args:
        seed: of texture and background.
        frame: frame number; shifts a moving background.
        supersample: samples per pixel and axis, averaged for the colors.
        exact: take depth and links at pixel centers exactly and texture every sample, see `Scene`.

    Raises:
        CameraError: the camera has skewed intrinsics.
    """
    k = supersample
    exact = exact or k % 2 == 1
    fine_camera = camera.resized(camera.width * k, camera.height * k)
    fine = rasterize(client, fine_camera, appearance.light)
    if k % 2 or not exact:
        depth, link = sample_at_centers(fine.depth, fine.link, k)
    else:
        _, depth, link, _ = rasterize(client, camera, appearance.light)
    background = appearance.background
    shown_frame = frame if background.is_moving else 0  # keeps the cache's key the same where nothing moves
    image = _background_image(background, camera.width, camera.height, seed, shown_frame).copy()
    window = _solid_window(fine.solid, k)
    if window is not None:
        coarse_window, fine_window = window
        color = fine.rgb[fine_window].astype(np.float32) / np.float32(255)
        coverage = fine.solid[fine_window].astype(np.float32)[..., None]
        textured = appearance.texture.kind == "noise"
        if textured and exact:
            albedo = _albedo(client, fine_camera, fine.depth, fine.link, fine_window, appearance.texture, seed)
            color = (color * albedo).clip(0, 1)
        shaded = _block_mean(color * coverage, k)
        if textured and not exact:
            albedo = _albedo(client, camera, depth, link, coarse_window, appearance.texture, seed)
            shaded = (shaded * albedo).clip(0, 1)
        image[coarse_window] = shaded + (1 - _block_mean(coverage, k)) * image[coarse_window]
    return Rendering(np.rint(image * 255).clip(0, 255).astype(np.uint8), depth, link)


def _albedo(
    client: PhysicsClient, camera: Camera, depth: NDArray[np.float32], link: NDArray[np.int32],
    window: tuple[slice, slice], texture: Texture, seed: int,
) -> NDArray[np.float32]:  # fmt: skip
    """Brightness factors (h, w, 3) in the window: solid noise fixed to the links, read at every pixel's surface point."""
    robot = link[window] != BACKGROUND
    v, u = np.nonzero(robot)
    v, u = v + window[0].start, u + window[1].start
    k = link[v, u]
    # In numpy, as it runs for every frame beside TinyRenderer: small torch operations wait for busy cores.
    K, T_camera_base = (x.double().cpu().numpy() for x in (camera.K, camera.T_camera_base))
    z = depth[v, u].astype(np.float64)
    p_camera = np.stack([(u - K[0, 2]) / K[0, 0] * z, (v - K[1, 2]) / K[1, 1] * z, z], axis=-1)
    p_base = (p_camera - T_camera_base[:3, 3]) @ T_camera_base[:3, :3]
    T = client.current_link_poses()[k]
    p_link = np.einsum("pij,pi->pj", T[:, :3, :3], p_base - T[:, :3, 3])  # R^T (p - t)
    # Every link gets its own place in the noise, so that no two have the same pattern.
    noise_offset = np.random.default_rng([abs(seed), 0x1D]).uniform(0, 64, (len(client.link_table), 3))[k]
    noise = solid_noise(p_link / texture.grain + noise_offset, seed)
    noise = (1 - texture.saturation) * noise[..., :1] + texture.saturation * noise
    albedo = np.ones((*robot.shape, 3), np.float32)
    albedo[robot] = np.clip(1 + texture.contrast * noise, 0.1, None)
    return albedo


@lru_cache(maxsize=4)
def _background_image(background: Background, width: int, height: int, seed: int, frame: int) -> NDArray[np.float32]:
    return background.image(width, height, seed=seed, frame=frame)


def _solid_window(solid: NDArray[np.bool_], k: int) -> tuple[tuple[slice, slice], tuple[slice, slice]] | None:
    """The bounding box of all that is solid, in coarse pixels and in fine ones; None if nothing is."""
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    if not len(rows):
        return None
    (top, left), (bottom, right) = (rows[0] // k, columns[0] // k), (rows[-1] // k + 1, columns[-1] // k + 1)
    fine = slice(top * k, bottom * k), slice(left * k, right * k)
    return (slice(top, bottom), slice(left, right)), fine


def _block_mean(image: NDArray[np.float32], k: int) -> NDArray[np.float32]:
    """Mean over k x k blocks of (h k, w k, c)."""
    # A sum of strided views is several times faster than a reshaped mean over two short axes.
    total = sum(image[y::k, x::k] for y in range(k) for x in range(k))
    return np.asarray(total, dtype=np.float32) / np.float32(k * k)
