"""One robot in a PyBullet world of its own, drawn from any camera at any joint positions."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from jidm.errors import InputError, MissingExtraError
from jidm.robot.urdf.reader import write_urdf
from jidm.sim.appearance import Appearance, solid_noise
from jidm.sim.meshes import export_visuals
from jidm.sim.objects import SceneObject
from jidm.sim.sampling import BACKGROUND, sample_at_centers

if TYPE_CHECKING:
    from jidm.camera.model import Camera
    from jidm.robot.embodiment import Embodiment

# TinyRenderer samples a pixel at its left edge and, counted from below, at its lower edge. Moving the principal point
# by this much [px, u right and v down] puts the samples at pixel centres; measured on boxes, spheres and planes.
_SAMPLE_SHIFT = (-0.5, 0.5)
_BODY_MASK = (1 << 24) - 1  # bits of a segment that name the body; those above name its link
_TEXTURE_BASE_COLOR = (0.78, 0.78, 0.78, 1.0)


@dataclass(frozen=True, eq=False)
class Rendering:
    """What a camera sees. Leading axes: none for one picture, (T,) for a video.

    Attributes:
        rgb: (*batch, H, W, 3) uint8.
        depth: (*batch, H, W) float32 distance along the optical axis at the pixel's centre [m]; inf where there is no robot.
        link: (*batch, H, W) int32 index into `embodiment.model.links`, -1 where there is no robot. A thing in front of
            the robot is no robot.
    """

    rgb: NDArray[np.uint8]
    depth: NDArray[np.float32]
    link: NDArray[np.int32]

    @property
    def on_robot(self) -> NDArray[np.bool_]:
        """(*batch, H, W) True where the pixel's centre shows the robot."""
        return self.link != BACKGROUND

    def __len__(self) -> int:
        return self.rgb.shape[0] if self.rgb.ndim == 4 else 1

    def __getitem__(self, item: int | slice) -> Rendering:
        """Frames of a video."""
        return Rendering(self.rgb[item], self.depth[item], self.link[item])


class Scene:
    """A robot, kinematically posed, in its own physics client; its base frame is the world frame.

    Use as a context manager or call `close`. Several worlds can live in one process; one world must not be used by two
    threads at once. The same embodiment, seed, look, camera and q give the same pixels.

    Args:
        embodiment: any robot, composed ones included; its visual shapes are drawn.
        seed: of the textures and the background.
        look: textures, light and background; may be changed between renderings by assigning `world.look`.
        supersample: the picture is drawn this many times finer and averaged, because TinyRenderer does not smooth
            edges. The default 3 costs little over 1 (most of the time goes into vertices). Depth and links are always
            sampled at pixel centres, which are among the fine samples if the number is odd; an even number costs a
            second pass.
        near, far: clipping distances along the optical axis [m].
        detail: size of the meshes' features that need not be drawn [m]; a third of a pixel's width is not seen, and
            drawing arms of hundreds of thousands of triangles gets many times faster.
        exact: take depth and links at pixel centres exactly, and texture every fine sample. Otherwise an even
            `supersample` takes them from the four samples around the centre, see `at_centres`, and textures pixels.

    Raises:
        MissingExtraError: PyBullet is not installed.
        EmbodimentError: a mesh is missing or the robot has no visual shapes.
    """

    def __init__(
        self,
        embodiment: Embodiment,
        *,
        seed: int = 0,
        appearance: Appearance | None = None,
        supersample: int = 3,
        near: float = 0.05,
        far: float = 20.0,
        mesh_tolerance: float = 0.0,
        exact: bool = True,
    ) -> None:
        if supersample < 1:
            raise InputError(f"supersample must be at least 1, got {supersample}")
        if not 0 < near < far:
            raise InputError(f"clipping distances must satisfy 0 < near < far, got near={near}, far={far}")
        self.embodiment, self.seed, self.supersample = embodiment, seed, supersample
        self._near, self._far, self._mesh_tolerance, self._exact = (
            near,
            far,
            mesh_tolerance,
            exact or supersample % 2 == 1,
        )
        self._objects: list[tuple[SceneObject, int]] = []
        self._bullet = load_pybullet()
        self._client: int | None = self._bullet.connect(self._bullet.DIRECT)
        try:
            self._body = self._load()
            self._map_joints()
            self._original_colors = self._read_colors()
            self.appearance = appearance or Appearance()
        except BaseException:
            self.close()
            raise

    # ---- life ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Scene:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    def close(self) -> None:
        """Give the physics client back; a second call does nothing."""
        client, self._client = getattr(self, "_client", None), None
        if client is not None:
            self._bullet.disconnect(client)

    @property
    def appearance(self) -> Appearance:
        """Textures, light and background in use; assign another to change them without loading the robot again."""
        return self._appearance

    @appearance.setter
    def appearance(self, appearance: Appearance) -> None:
        plain = appearance.texture.kind == "plain"
        for link, shape, rgba in self._original_colors:
            self._call("changeVisualShape", self._body, link, shape, rgbaColor=rgba if plain else _TEXTURE_BASE_COLOR)
        self._appearance = appearance

    @property
    def objects(self) -> tuple[SceneObject, ...]:
        """What else is there; assign others to change them. They hide the robot and are hidden by it."""
        return tuple(item for item, _ in self._objects)

    @objects.setter
    def objects(self, objects: Sequence[SceneObject]) -> None:
        while self._objects:
            self._call("removeBody", self._objects.pop()[1])
        bullet = self._bullet
        for item in objects:
            a, b, c = item.size
            shape = {
                "box": {"shapeType": bullet.GEOM_BOX, "halfExtents": [a / 2, b / 2, c / 2]},
                "sphere": {"shapeType": bullet.GEOM_SPHERE, "radius": a / 2},
                "cylinder": {"shapeType": bullet.GEOM_CYLINDER, "radius": a / 2, "length": c},
            }[item.shape]
            visual = self._call("createVisualShape", rgbaColor=(*item.color, 1.0), **shape)
            body = self._call("createMultiBody", 0, -1, visual)
            self._objects.append((item, body))
        self._place_objects(0)

    def _place_objects(self, frame: float) -> None:
        for item, body in self._objects:
            angle = float(np.linalg.norm(item.rotation_vector))
            axis = np.divide(item.rotation_vector, angle) if angle > 0 else np.array([0.0, 0.0, 1.0])
            quaternion = (*(np.sin(angle / 2) * axis).tolist(), float(np.cos(angle / 2)))
            self._call("resetBasePositionAndOrientation", body, item.position_at(frame).tolist(), quaternion)

    # ---- pose ---------------------------------------------------------------------------------------------------

    def set_configuration(self, q: ArrayLike | torch.Tensor) -> None:
        """Put the robot at actuated joint positions q (n,) [rad or m]; mimic and locked joints follow.

        Raises:
            InputError: q has another shape or is not finite.
        """
        q = _vector(q, self.embodiment)
        q_full = self.embodiment.coupling_matrix @ q + self.embodiment.coupling_offset
        for joint, value in zip(self._joint_indices, q_full.tolist(), strict=True):
            self._call("resetJointState", self._body, joint, value)

    def link_poses(self, q: ArrayLike | torch.Tensor) -> NDArray[np.float64]:
        """Poses `T_base_link` (L, 4, 4) [m] of all links as PyBullet computes them, order of `model.links`."""
        self.set_configuration(q)
        poses = np.tile(np.eye(4), (len(self.embodiment.model.links), 1, 1))
        for child, k in enumerate(self._link_of_child[1:]):
            state = self._call("getLinkState", self._body, child, computeForwardKinematics=True)
            poses[k, :3, 3] = state[4]
            poses[k, :3, :3] = np.reshape(self._bullet.getMatrixFromQuaternion(state[5]), (3, 3))
        return poses

    # ---- pictures -----------------------------------------------------------------------------------------------

    def render(self, q: ArrayLike | torch.Tensor, camera: Camera, *, frame: int = 0) -> Rendering:
        """What `camera` sees with the robot at q (n,) [rad or m].

        Args:
            frame: number of the frame in its video; moves a moving background.

        Raises:
            InputError: q has another shape or is not finite.
            CameraError: the camera has skewed intrinsics.
        """
        self.set_configuration(q)
        if any(np.any(item.velocity) for item, _ in self._objects):
            self._place_objects(frame)
        k = self.supersample
        fine_camera = camera.resized(camera.width * k, camera.height * k)
        rgb, depth, link, solid = self._rasterize(fine_camera)
        if k % 2 or not self._exact:
            z, ids = sample_at_centers(depth, link, k)
        else:
            _, z, ids, _ = self._rasterize(camera)
        background = self.appearance.background
        image = _background(
            background, camera.width, camera.height, self.seed, frame if background.is_moving else 0
        ).copy()
        window = _solid_window(solid, k)
        if window is not None:
            coarse, fine = window
            color = rgb[fine].astype(np.float32) / np.float32(255)
            coverage = solid[fine].astype(np.float32)[..., None]
            textured = self.appearance.texture.kind == "noise"
            if textured and self._exact:
                color = (color * self._albedo(depth, link, fine, fine_camera)).clip(0, 1)
            shaded = _block_mean(color * coverage, k)
            if textured and not self._exact:
                shaded = (shaded * self._albedo(z, ids, coarse, camera)).clip(0, 1)
            image[coarse] = shaded + (1 - _block_mean(coverage, k)) * image[coarse]
        return Rendering(np.rint(image * 255).clip(0, 255).astype(np.uint8), z, ids)

    def frames(self, q: ArrayLike | torch.Tensor, camera: Camera) -> Iterator[Rendering]:
        """The pictures of a joint trajectory q (T, n) one after another, for videos too long for memory."""
        trajectory = _trajectory(q, self.embodiment)
        return (self.render(row, camera, frame=k) for k, row in enumerate(trajectory))

    def render_video(self, q: ArrayLike | torch.Tensor, camera: Camera) -> Rendering:
        """The whole video of a joint trajectory q (T, n): a Rendering with a leading time axis."""
        frames = list(self.frames(q, camera))
        if not frames:
            raise InputError("a trajectory needs at least one row of joint positions")
        return Rendering(*(np.stack([getattr(f, name) for f in frames]) for name in ("rgb", "depth", "link")))

    # ---- inside -------------------------------------------------------------------------------------------------

    def _call(self, function: str, *args: Any, **options: Any) -> Any:
        if self._client is None:
            raise InputError("this world is closed; make a new one")
        return getattr(self._bullet, function)(*args, physicsClientId=self._client, **options)

    def _load(self) -> int:
        # PyBullet would keep every file it has read for the life of the process; these are read once and deleted.
        self._call("setPhysicsEngineParameter", enableFileCaching=0)
        with tempfile.TemporaryDirectory(prefix="jidm-sim-") as folder:
            path = Path(folder) / "robot.urdf"
            write_urdf(export_visuals(self.embodiment.model, Path(folder), mesh_tolerance=self._mesh_tolerance), path)
            with suppressed_output():
                body: int = self._call("loadURDF", str(path), useFixedBase=True)
        return body

    def _map_joints(self) -> None:
        """PyBullet counts joints and links in its own order; names tell which is which."""
        model = self.embodiment.model
        by_name: dict[str, int] = {}
        self._link_of_child = [model.link_index(model.root)]  # [child + 1] -> index into model.links
        for k in range(self._call("getNumJoints", self._body)):
            info = self._call("getJointInfo", self._body, k)
            by_name[info[1].decode()] = k
            self._link_of_child.append(model.link_index(info[12].decode()))
        self._joint_indices = [by_name[joint.name] for joint in model.movable_joints]
        self._link_table = np.array(self._link_of_child, dtype=np.int32)

    def _read_colors(self) -> list[tuple[int, int, tuple[float, ...]]]:
        seen: dict[int, int] = {}
        colors = []
        for entry in self._call("getVisualShapeData", self._body):
            link = entry[1]
            colors.append((link, seen.setdefault(link, 0), entry[7]))
            seen[link] += 1
        return colors

    def _rasterize(
        self, camera: Camera
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int32], NDArray[np.bool_]]:
        """One pass of TinyRenderer at pixel centres: rgb (H, W, 3), metric depth, link, where anything solid is."""
        K = camera.K.clone().double()
        K[0, 2] += _SAMPLE_SHIFT[0]
        K[1, 2] += _SAMPLE_SHIFT[1]
        near, far, light = self._near, self._far, self.appearance.light
        view, projection = replace(camera, K=K).to_pybullet(near=near, far=far)
        width, height = camera.width, camera.height
        _, _, rgba, buffer, segments = self._call(
            "getCameraImage", width, height, view, projection,
            lightDirection=_normalized(light.direction), lightColor=light.color, shadow=int(light.shadows),
            lightAmbientCoeff=light.ambient, lightDiffuseCoeff=light.diffuse, lightSpecularCoeff=light.specular,
            renderer=self._bullet.ER_TINY_RENDERER, flags=self._bullet.ER_SEGMENTATION_MASK_OBJECT_AND_LINKINDEX,
        )  # fmt: skip
        rgb = np.asarray(rgba, dtype=np.uint8).reshape(height, width, 4)[..., :3]
        z = np.asarray(buffer, dtype=np.float64).reshape(height, width)
        segment = np.asarray(segments, dtype=np.int64).reshape(height, width)
        solid = segment >= 0
        robot = solid & (segment & _BODY_MASK == self._body)
        link = np.where(robot, self._link_table[np.where(robot, segment >> 24, 0)], BACKGROUND).astype(np.int32)
        depth = np.where(robot, far * near / (far - (far - near) * z), np.inf).astype(np.float32)
        return rgb, depth, link, solid

    def _albedo(
        self, depth: NDArray[np.float32], link: NDArray[np.int32], window: tuple[slice, slice], camera: Camera
    ) -> NDArray[np.float32]:
        """Noise fixed to the links, looked up at the surface point of every fine pixel: (h, w, 3) in the window."""
        texture = self.appearance.texture
        robot = link[window] != BACKGROUND
        v, u = np.nonzero(robot)
        v, u = v + window[0].start, u + window[1].start
        k = link[v, u]
        # In numpy, as it runs for every frame beside TinyRenderer: small torch operations wait for busy cores.
        K, T_camera_base = (x.double().cpu().numpy() for x in (camera.K, camera.T_camera_base))
        z = depth[v, u].astype(np.float64)
        p_camera = np.stack([(u - K[0, 2]) / K[0, 0] * z, (v - K[1, 2]) / K[1, 1] * z, z], axis=-1)
        p_base = (p_camera - T_camera_base[:3, 3]) @ T_camera_base[:3, :3]
        T = self._current_link_poses()[k]
        p_link = np.einsum("pij,pi->pj", T[:, :3, :3], p_base - T[:, :3, 3])  # R^T (p - t)
        # Every link gets its own place in the noise, so that no two look alike.
        noise_offset = np.random.default_rng([abs(self.seed), 0x1D]).uniform(0, 64, (len(self._link_table), 3))[k]
        noise = solid_noise(p_link / texture.grain + noise_offset, seed=self.seed, channels=3)
        noise = (1 - texture.saturation) * noise[..., :1] + texture.saturation * noise
        albedo = np.ones((*robot.shape, 3), np.float32)
        albedo[robot] = np.clip(1 + texture.contrast * noise, 0.1, None)
        return albedo

    def _current_link_poses(self) -> NDArray[np.float64]:
        poses = np.tile(np.eye(4), (len(self._link_table), 1, 1))
        states = self._call("getLinkStates", self._body, list(range(len(self._link_table) - 1)))
        for k, state in zip(self._link_of_child[1:], states, strict=True):
            poses[k, :3, 3] = state[4]
            poses[k, :3, :3] = np.reshape(self._bullet.getMatrixFromQuaternion(state[5]), (3, 3))
        return poses


@lru_cache(maxsize=4)
def _background(background: Any, width: int, height: int, seed: int, frame: int) -> NDArray[np.float32]:
    return background.image(width, height, seed=seed, frame=frame)


def _solid_window(solid: NDArray[np.bool_], k: int) -> tuple[tuple[slice, slice], tuple[slice, slice]] | None:
    """The rectangle of coarse pixels that holds all that is solid, and the same in fine ones; None if nothing is."""
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


def _vector(q: ArrayLike | torch.Tensor, embodiment: Embodiment) -> NDArray[np.float64]:
    return _checked(q, embodiment, "q (n,)", 1)


def _trajectory(q: ArrayLike | torch.Tensor, embodiment: Embodiment) -> NDArray[np.float64]:
    return _checked(q, embodiment, "the trajectory (T, n)", 2)


def _checked(q: ArrayLike | torch.Tensor, embodiment: Embodiment, what: str, axes: int) -> NDArray[np.float64]:
    array = np.asarray(q.detach().cpu() if isinstance(q, torch.Tensor) else q, dtype=np.float64)
    if array.ndim != axes or array.shape[-1] != embodiment.n:
        raise InputError(f"{what} of '{embodiment.name}' has n = {embodiment.n} joints, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise InputError(f"{what} of '{embodiment.name}' must be finite")
    return array


def _normalized(direction: tuple[float, float, float]) -> list[float]:
    return (np.asarray(direction) / np.linalg.norm(direction)).tolist()


@lru_cache(maxsize=1)
def load_pybullet() -> ModuleType:
    try:
        with suppressed_output():  # it prints its build time when imported
            import pybullet
    except ImportError:
        raise MissingExtraError("simulation", "pybullet", "sim") from None
    return pybullet


@contextlib.contextmanager
def suppressed_output() -> Iterator[None]:
    """Silence what C code prints: PyBullet writes notes to both standard streams and has no switch for it."""
    saved = [os.dup(1), os.dup(2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        for stream, copy in enumerate(saved, start=1):
            os.dup2(copy, stream)
            os.close(copy)
        os.close(nowhere)
