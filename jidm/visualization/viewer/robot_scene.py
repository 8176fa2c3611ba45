"""The robots of the runs in a viser scene, with the camera of the video, on a floor."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from jidm.robot.kinematics import Kinematics
from jidm.sim.meshes import parts_by_color

if TYPE_CHECKING:
    import viser

    from jidm.camera.model import Camera
    from jidm.robot.embodiment import Embodiment
    from jidm.visualization.viewer.viewed_run import ViewedRun

PHONE_WIDTH = 576
"""[px] Windows narrower than this show viser's controls as a sheet over the lower part of the scene."""

_FOV = 0.7  # [rad] vertical field of view at the start
_MARGIN = 1.1  # room around the robot's bounding sphere
_SIDE_ANGLE = 0.45  # [rad] between the first view and the video's camera
_PHONE_SHIFT = 0.27  # of the window's height, by which the robot is moved up on a phone
_CONNECT_TIMEOUT = 20.0  # [s] for a page to draw its first picture
_SKY, _GROUND = (246, 247, 249), (214, 219, 226)  # colors of the background
_ENVIRONMENT = 0.55  # brightness of the surroundings; white robots need less than viser's default
_TINT, _OPACITY = (217, 95, 2), 0.55  # of the second robot
_Part = tuple[tuple[int, int, int], NDArray[Any], NDArray[Any]]  # color, vertices, triangles
_FEATURES_PER_ROBOT = 250  # features smaller than this part of the robot's size need not be drawn


class SceneView:
    """The scene of one viewer: the robots of its runs, the second one translucent, and the first run's camera.

    Args:
        server: a viser server.
        runs: one or two. A run without a robot, or with recorded joints of another one, is not drawn.
    """

    def __init__(self, server: Any, runs: Sequence[ViewedRun]) -> None:
        self._server, scene = server, server.scene
        scene.set_up_direction("+z")
        scene.set_background_image(np.linspace(_SKY, _GROUND, 64).round().astype(np.uint8)[:, None].repeat(2, 1))
        scene.configure_environment_map("warehouse", environment_intensity=_ENVIRONMENT)
        self._robots: dict[int, SceneRobot] = {}
        self._center, self._radius = np.zeros(3), 1.0
        for k, run in enumerate(runs):
            if run.robot is None or run.limits is None:
                continue
            if not self._robots:
                self._center, self._radius = bounding_sphere(run.robot, run.motion.position[0])
            style: dict[str, Any] = {"tint": _TINT, "opacity": _OPACITY} if k else {}
            self._robots[k] = SceneRobot(scene, run.robot, f"/robot{k}", **style)
            self._robots[k].set_joints(run.motion.position[0])
        scene.add_grid(
            "/floor", width=8 * self._radius, height=8 * self._radius, cell_size=self._radius / 4, section_size=self._radius,
            cell_color=(186, 192, 200), section_color=(160, 167, 178),
        )  # fmt: skip
        self._camera = runs[0].camera if self._robots else None
        self._frustum = None if self._camera is None else self._add_frustum(runs[0])
        direction = self._start_direction()
        distance = _MARGIN * self._radius / np.sin(_FOV / 2)
        start = server.initial_camera
        start.fov, start.look_at, start.position = _FOV, self._center, self._center + direction * distance

        @server.on_client_connect
        def _(client: Any) -> None:
            self._frame_robot(client, direction, distance)

    def add_controls(self) -> None:
        """Add buttons and options of the scene to the current container."""
        if len(self._robots) > 1:
            apart = self._server.gui.add_checkbox("Robots apart", initial_value=False)

            @apart.on_update
            def _(_: Any) -> None:
                offset = np.array([0.0, 1.8 * self._radius, 0.0]) * bool(apart.value)
                self._robots[1].root.position = offset

        if self._camera is not None:
            look = self._server.gui.add_button("Look from the video's camera")

            @look.on_click
            def _(event: Any) -> None:
                self._look_from_camera(event.client)

    def show(self, runs: Sequence[ViewedRun], t: int) -> None:
        """Move the robots to frame t; shorter runs stay at their last frame."""
        for k, robot in self._robots.items():
            robot.set_joints(runs[k].motion.position[min(t, len(runs[k]) - 1)])
        if self._frustum is not None:
            self._frustum.image = _pixels(runs[0], t)

    def _add_frustum(self, run: ViewedRun) -> Any:
        """The video's camera with its picture, half way between camera and robot at most."""
        from viser.transforms import SO3

        assert self._camera is not None
        T_base_camera = np.linalg.inv(self._camera.T_camera_base.double().numpy())
        distance = float(np.linalg.norm(T_base_camera[:3, 3] - self._center))
        return self._server.scene.add_camera_frustum(
            "/camera", fov=_vertical_fov(self._camera), aspect=self._camera.width / self._camera.height,
            scale=min(0.2 * self._radius, 0.3 * distance), thickness=0.004 * self._radius, color=(90, 98, 110),
            image=_pixels(run, 0), wxyz=SO3.from_matrix(T_base_camera[:3, :3]).wxyz, position=T_base_camera[:3, 3],
            cast_shadow=False,
        )  # fmt: skip

    def _start_direction(self) -> NDArray[np.float64]:
        """Unit vector from the robot to where every browser starts: near the video's camera, a bit to its side and above."""
        direction = np.array([1.0, -0.4, 0.5])
        if self._camera is not None:
            direction = np.linalg.inv(self._camera.T_camera_base.double().numpy())[:3, 3] - self._center
        side = float(np.linalg.norm(direction[:2]))
        # A camera straight above has no side, and its picture would hide the robot from there.
        x, y = direction[:2] / side if side > 0.1 * abs(direction[2]) else (1.0, 0.0)
        c, s = np.cos(_SIDE_ANGLE), np.sin(_SIDE_ANGLE)
        turned = np.array([c * x - s * y, s * x + c * y, np.clip(direction[2] / max(side, 1e-6), 0.3, 0.8)])
        return np.asarray(turned / np.linalg.norm(turned))

    def _frame_robot(self, client: Any, direction: NDArray[np.float64], distance: float) -> None:
        """Fit the robot into the browser's window; on a phone into the part above the sheet of controls."""
        # The page moves to the common start some time after it connects, and would undo an earlier command.
        end = time.monotonic() + _CONNECT_TIMEOUT
        while not np.allclose(client.camera.position, self._center + direction * distance, atol=1e-3):
            if time.monotonic() > end:
                return
            time.sleep(0.05)
        aspect = client.camera.image_width / max(client.camera.image_height, 1)
        distance /= min(aspect, 1.0)
        look_at = self._center.copy()
        if client.camera.image_width < PHONE_WIDTH:
            distance *= 0.9
            look_at[2] -= _PHONE_SHIFT * 2 * distance * np.tan(_FOV / 2)
        client.camera.position = look_at + direction * distance
        client.camera.look_at = look_at

    def _look_from_camera(self, client: Any) -> None:
        """Move a browser's view to the camera of the video; the picture of the camera would hide the robot there."""
        assert self._camera is not None
        T_base_camera = np.linalg.inv(self._camera.T_camera_base.double().numpy())
        position, forward = T_base_camera[:3, 3], T_base_camera[:3, 2]
        aspect = client.camera.image_width / max(client.camera.image_height, 1)
        tangent = np.tan(_vertical_fov(self._camera) / 2) * max(1.0, self._camera.width / self._camera.height / aspect)
        with client.atomic():
            client.camera.position = position
            client.camera.look_at = position + forward * max(float((self._center - position) @ forward), 0.1)
            client.camera.up_direction = -T_base_camera[:3, 1]
            client.camera.fov = 2 * float(np.arctan(tangent))
        if self._frustum is not None:
            self._frustum.visible = False


class SceneRobot:
    """One robot in the scene.

    Args:
        scene: of a viser server.
        robot: what is drawn.
        name: of the scene node, such as "/robot".
        tint: color that replaces the robot's own.
        opacity: 1 is solid.
    """

    def __init__(
        self, scene: viser.SceneApi, robot: Embodiment, name: str, *,
        tint: tuple[int, int, int] | None = None, opacity: float | None = None,
    ) -> None:  # fmt: skip
        self._kinematics = Kinematics.from_embodiment(robot)
        self.root = scene.add_frame(name, show_axes=False)
        self._frames: list[tuple[int, Any]] = []
        for link, parts in _meshes(robot).items():
            frame = scene.add_frame(f"{name}/{link}", show_axes=False)
            self._frames.append((link, frame))
            for k, (color, vertices, faces) in enumerate(parts):
                scene.add_mesh_simple(
                    f"{name}/{link}/{k}",
                    vertices,
                    faces,
                    color=tint or color,
                    opacity=opacity,
                    cast_shadow=opacity is None,
                )

    def set_joints(self, q: Float[Tensor, " n"]) -> None:
        """Move the links to joint positions q [rad or m]; positions that are not finite are ignored."""
        from viser.transforms import SO3

        if not bool(q.isfinite().all()):
            return
        poses = self._kinematics.link_poses(q.double())
        quaternions, positions = SO3.from_matrix(poses[:, :3, :3].numpy()).wxyz, poses[:, :3, 3].numpy()
        for link, frame in self._frames:
            frame.wxyz, frame.position = quaternions[link], positions[link]


def _pixels(run: ViewedRun, t: int) -> NDArray[np.uint8]:
    return np.ascontiguousarray(run.frames[min(t, len(run.frames) - 1)].permute(1, 2, 0).numpy())


def _vertical_fov(camera: Camera) -> float:
    return 2 * float(np.arctan2(camera.height / 2, float(camera.K[1, 1])))


def bounding_sphere(robot: Embodiment, q: Float[Tensor, " n"]) -> tuple[NDArray[np.float64], float]:
    """Center and radius of a sphere around the robot at q, in the base frame [m]."""
    poses = Kinematics.from_embodiment(robot).link_poses(q.double()).numpy()
    corners = []
    for link, parts in _meshes(robot).items():
        for _, vertices, _ in parts:
            low, high = vertices.min(0), vertices.max(0)
            box = np.stack(np.meshgrid(*np.stack([low, high], 1), indexing="ij"), -1).reshape(-1, 3)
            corners.append(box @ poses[link, :3, :3].T + poses[link, :3, 3])
    points = np.concatenate(corners) if corners else poses[:, :3, 3]
    center = (points.min(0) + points.max(0)) / 2
    return center, max(float(np.linalg.norm(points - center, axis=1).max()), 0.05)


@lru_cache(maxsize=4)
def _meshes(robot: Embodiment) -> dict[int, list[_Part]]:
    """Link index -> color, vertices (V, 3) in the link frame [m] and triangles (F, 3) of each of its parts."""
    origins = Kinematics.from_embodiment(robot).link_poses(torch.from_numpy(np.array(robot.home)))[:, :3, 3]
    size = max(float((origins.amax(0) - origins.amin(0)).norm()), 0.05)
    meshes: dict[int, list[_Part]] = {}
    for index, link in enumerate(robot.model.links):
        if link.visuals:
            meshes[index] = [
                (
                    (round(255 * rgba[0]), round(255 * rgba[1]), round(255 * rgba[2])),
                    mesh.vertices.astype(np.float32),
                    mesh.faces.astype(np.uint32),
                )
                for rgba, mesh in parts_by_color(link, robot.model.name, size / _FEATURES_PER_ROBOT).items()
                if len(mesh.faces)
            ]
    return meshes
