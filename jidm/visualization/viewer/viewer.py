"""The viewer in the browser: viser serves the page, draws the robot in 3-D and holds the controls.

Left: play, frame, joint, and the pictures of the frame. Right: joints against their limits and over time. On a phone both are
one sheet at the bottom. All browsers that look at one viewer share its frame and joint.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from html import escape
from typing import Any

import numpy as np

from jidm.errors import InputError, MissingExtraError
from jidm.visualization.image import RgbImage
from jidm.visualization.viewer.joint_charts import RUN_COLORS, JointChart, joint_bars
from jidm.visualization.viewer.pictures import PICTURES, FramePictures
from jidm.visualization.viewer.robot_scene import RobotScene, bounding_sphere
from jidm.visualization.viewer.viewed_run import ViewedRun

MAX_RUNS = 2
"""Number of runs that are compared."""

_ALL = "all"
_SPEEDS = {"1/4": 0.25, "1/2": 0.5, "1": 1.0, "2": 2.0}
_PICTURES_WIDTH, _JOINTS_WIDTH = 470, 340  # [px] of the panels on a wide screen
_CACHED_SHEETS = 200
_FOV = 0.7  # [rad] vertical field of view of the 3-D view
_TINT = tuple(int(RUN_COLORS[1][i : i + 2], 16) for i in (1, 3, 5))
_OPACITY = 0.6
_JPEG_QUALITY = 88
_REST = 0.2  # [s] longest wait of the drawing thread


class Viewer:
    """A page that shows one run, or two side by side.

    Args:
        runs: one or two.
        host: interface to listen on; only this machine by default.
        port: 0 lets the system choose.

    Attributes:
        port: on which the page is served.

    Raises:
        InputError: no run or too many, or the port is in use.
        MissingExtraError: viser is not installed.
    """

    def __init__(self, runs: Sequence[ViewedRun], *, host: str = "127.0.0.1", port: int = 8080) -> None:
        if not 1 <= len(runs) <= MAX_RUNS:
            raise InputError(f"the viewer shows one run, or {MAX_RUNS} side by side; got {len(runs)}")
        self._runs = tuple(runs)
        self._pictures = [FramePictures(run) for run in runs]
        self._server = start_server(host, port)
        self.port: int = self._server.get_port()
        self._stop, self._changed = threading.Event(), threading.Event()
        self._length = max(len(run) for run in runs)
        self._sheet = lru_cache(maxsize=_CACHED_SHEETS)(self._draw_sheet)
        self._chart = lru_cache(maxsize=32)(self._make_chart)
        self._robots: list[tuple[int, RobotScene]] = []
        self._frustum: Any = None
        self._build_scene()
        self._build_gui()
        self._thread = threading.Thread(target=self._draw_until_stopped, name="jidm-view", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Address of the page on this machine."""
        return f"http://{self._server.get_host()}:{self.port}"

    def wait(self) -> None:
        """Serve until the process is interrupted."""
        with contextlib.suppress(KeyboardInterrupt):
            while not self._stop.wait(0.5):
                pass

    def close(self) -> None:
        """Stop serving."""
        self._stop.set()
        self._changed.set()
        self._thread.join(timeout=5.0)
        self._server.stop()

    def __enter__(self) -> Viewer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- scene ------------------------------------------------------------------------------------------------------

    def _build_scene(self) -> None:
        scene = self._server.scene
        scene.set_up_direction("+z")
        center, radius = np.zeros(3), 1.0
        for k, run in enumerate(self._runs):
            if run.robot is None or run.limits is None:
                continue
            style: dict[str, Any] = {"tint": _TINT, "opacity": _OPACITY} if k else {}
            self._robots.append((k, RobotScene(scene, run.robot, f"/{'AB'[k]}", **style)))
            if len(self._robots) == 1:
                center, radius = bounding_sphere(run.robot, run.motion.position[0])
        scene.add_grid(
            "/floor", width=8 * radius, height=8 * radius, cell_size=radius / 4, section_size=radius,
            cell_color=(225, 228, 232), section_color=(200, 205, 212),
        )  # fmt: skip
        camera = self._runs[0].camera
        direction = np.array([1.0, -1.0, 0.6])
        if camera is not None and self._robots:
            T_base_camera = np.linalg.inv(camera.T_camera_base.double().numpy())
            fov = 2 * float(np.arctan2(camera.height / 2, float(camera.K[1, 1])))
            self._frustum = scene.add_camera_frustum(
                "/camera", fov=fov, aspect=camera.width / camera.height, scale=0.35 * radius, thickness=0.004 * radius,
                color=(90, 98, 110), image=self._video(0), wxyz=_wxyz(T_base_camera[:3, :3]), position=T_base_camera[:3, 3],
                cast_shadow=False,
            )  # fmt: skip
            direction = T_base_camera[:3, 3] - center
        self._look(center, radius, direction)

    def _look(self, center: np.ndarray, radius: float, direction: np.ndarray) -> None:
        """Start every browser with the robot in view, from the side of the video's camera and a bit to its side."""
        direction = np.array([*direction[:2], max(direction[2], 0.35 * float(np.linalg.norm(direction[:2])))])
        c, s = np.cos(0.5), np.sin(0.5)
        direction = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ direction
        direction /= max(float(np.linalg.norm(direction)), 1e-9)
        start = self._server.initial_camera
        start.fov, start.look_at = _FOV, center
        start.position = center + direction * radius / np.sin(_FOV / 2) * 1.15

        @self._server.on_client_connect
        def _(client: Any) -> None:
            # On a phone the sheet covers the lower part: the robot moves to the upper one, and fits the narrow side.
            aspect = client.camera.image_width / max(client.camera.image_height, 1)
            if aspect < 1:
                distance = radius / np.sin(_FOV / 2) * 1.15 / min(aspect * 1.35, 1.0)
                shift = np.array([0.0, 0.0, 0.26 * 2 * distance * np.tan(_FOV / 2)])
                client.camera.look_at = center - shift
                client.camera.position = center - shift + direction * distance

    def _video(self, t: int) -> RgbImage:
        run = self._runs[0]
        return np.ascontiguousarray(run.frames[min(t, len(run) - 1)].permute(1, 2, 0).numpy())

    # ---- controls ---------------------------------------------------------------------------------------------------

    def _build_gui(self) -> None:
        import viser

        gui = self._server.gui
        gui.set_panel_label("jidm view")
        gui.configure_theme(show_logo=False, show_share_button=False, brand_color=(31, 95, 191))
        gui.main_panel.dock_left()
        gui.main_panel.set_width(_PICTURES_WIDTH)
        names = self._runs[0].joint_names
        gui.add_html(self._titles())
        self._play = gui.add_button("Play", icon=viser.Icon.PLAYER_PLAY)
        self._slider = gui.add_slider("Frame", 0, max(self._length - 1, 1), 1, 0)
        self._joint = gui.add_dropdown("Joint", names, names[0])
        self._picture = gui.add_dropdown("Picture", (_ALL, *PICTURES), _ALL)
        self._image = gui.add_image(self._sheet(0, 0, _ALL, False), jpeg_quality=_JPEG_QUALITY)
        self._pose = gui.add_checkbox("Decoded pose over the video", False)
        self._speed = gui.add_dropdown("Speed", tuple(_SPEEDS), "1")
        joints = gui.add_panel()
        with joints.add_tab("Joints", viser.Icon.CHART_BAR):
            self._bars = gui.add_html(joint_bars(self._runs_of_joints(), 0, 0))
            self._curve = gui.add_image(self._chart(0).draw(0), format="png")
            self._notes = gui.add_markdown(self._notes_text(0))
        joints.dock_right()
        joints.set_width(_JOINTS_WIDTH)
        self._playing = False

        @self._play.on_click
        def _(_: Any) -> None:
            self._set_playing(not self._playing)

        for control in (self._slider, self._joint, self._picture, self._pose):
            control.on_update(lambda _: self._changed.set())

    def _set_playing(self, playing: bool) -> None:
        import viser

        self._playing = playing
        self._play.label = "Pause" if playing else "Play"
        self._play.icon = viser.Icon.PLAYER_PAUSE if playing else viser.Icon.PLAYER_PLAY
        if playing and self._slider.value >= self._length - 1:
            self._slider.value = 0
        self._changed.set()

    def _titles(self) -> str:
        rows = []
        for letter, color, run in zip("AB", RUN_COLORS, self._runs, strict=False):
            label = f'<b style="color:{color}">{letter}</b> ' if len(self._runs) > 1 else ""
            rows.append(f"<div>{label}{escape(run.title)}</div>")
        return f'<div style="padding:2px 10px 8px 10px;font-size:13px;overflow-wrap:anywhere">{"".join(rows)}</div>'

    def _runs_of_joints(self) -> list[ViewedRun]:
        """The runs whose joints can be drawn together: those with the joints of the first."""
        return [run for run in self._runs if run.joint_names == self._runs[0].joint_names]

    def _notes_text(self, t: int) -> str:
        lines = []
        for letter, run in zip("AB", self._runs, strict=False):
            name = f"**{letter}** " if len(self._runs) > 1 else ""
            step = min(max(t - 1, 0), len(run.motion.residual) - 1)
            if run.decoded and step >= 0:
                valid = "" if bool(run.motion.valid[step]) else ", **not valid**"
                lines.append(f"{name}residual {float(run.motion.residual[step]):.2f} px rms{valid}")
            lines += [f"{name}{term}: {float(values[step]):.2f}" for term, values in (run.penalties or {}).items() if step >= 0]
            lines += [f"{name}{note}" for note in run.notes]
        return "  \n".join(lines)

    # ---- drawing ----------------------------------------------------------------------------------------------------

    def _draw_until_stopped(self) -> None:
        """Draw the frame of the slider whenever something changed; while playing, move the slider by the clock.

        Drawing may be slower than the video. Then frames are left out, and the speed is kept.
        """
        drawn: Any = None
        clock = start = None
        while not self._stop.is_set():
            if self._playing:
                now = time.monotonic()
                if clock is None or self._slider.value != drawn_frame(drawn):
                    clock, start = now, self._slider.value
                rate = self._rate * _SPEEDS[self._speed.value]
                frame = int(start + (now - clock) * rate)
                if frame >= self._length:
                    self._set_playing(False)
                    frame = self._length - 1
                self._slider.value = frame
            else:
                clock = None
            wanted = (self._slider.value, self._joint.value, self._picture.value, self._pose.value)
            if wanted != drawn:
                drawn = wanted
                self._draw(*wanted)
                continue
            self._changed.wait(0.01 if self._playing else _REST)
            self._changed.clear()

    @property
    def _rate(self) -> float:
        """Frames per second of the first run."""
        span = self._runs[0].motion.time
        return (len(span) - 1) / max(float(span[-1] - span[0]), 1e-6) if len(span) > 1 else 1.0

    def _draw(self, t: int, joint: str, picture: str, pose: bool) -> None:
        k = self._runs[0].joint_names.index(joint)
        sheet = self._sheet(t, k, picture, pose)
        with self._server.atomic():
            self._image.image = sheet
            self._bars.content = joint_bars(self._runs_of_joints(), t, k)
            self._curve.image = self._chart(k).draw(t)
            self._notes.content = self._notes_text(t)
            for index, robot in self._robots:
                run = self._runs[index]
                robot.set_joints(run.motion.position[min(t, len(run) - 1)])
            if self._frustum is not None:
                self._frustum.image = self._video(t)

    def _draw_sheet(self, t: int, joint: int, picture: str, pose: bool) -> RgbImage:
        names = PICTURES if picture == _ALL else (picture,)
        if len(self._runs) == 1:
            return self._pictures[0].sheet(min(t, len(self._runs[0]) - 1), joint, names, show_pose=pose)
        return compare(self._pictures, t, joint, names, show_pose=pose)

    def _make_chart(self, joint: int) -> JointChart:
        runs = self._runs_of_joints()
        labels = ("decoded" if runs[0].decoded else "recorded",) if len(self._runs) == 1 else "AB"
        return JointChart(dict(zip(labels, runs, strict=False)), self._runs[0].joint_names[joint])


def drawn_frame(drawn: Any) -> Any:
    """Frame of the last drawing."""
    return None if drawn is None else drawn[0]


def compare(
    pictures: Sequence[FramePictures], t: int, joint: int, names: Sequence[str], *, show_pose: bool = False
) -> RgbImage:
    """Two runs side by side: one row per picture."""
    from jidm.visualization.sheet import tile_sheet
    from jidm.visualization.viewer.pictures import STYLE, TILE_WIDTH

    columns = []
    for letter, p in zip("AB", pictures, strict=False):
        k = min(joint, len(p.run.joint_names) - 1)
        tiles = [p.draw(min(t, len(p.run) - 1), k, name, TILE_WIDTH, show_pose=show_pose) for name in names]
        columns.append([(image, f"{letter}: {caption}") for image, caption in tiles])
    return tile_sheet([list(row) for row in zip(*columns, strict=True)], style=STYLE)


def start_server(host: str, port: int) -> Any:
    """A viser server on exactly this port; 0 lets the system choose.

    Raises:
        InputError: the port is in use, or the address is not this machine's.
        MissingExtraError: viser is not installed.
    """
    try:
        import viser
    except ImportError:
        raise MissingExtraError("the viewer", "viser", "view") from None

    # viser takes the next free port without a word if this one is in use.
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        reason = "it is in use" if error.errno == errno.EADDRINUSE else error.strerror or error
        raise InputError(f"cannot listen on {host}:{port}: {reason}; choose another --port, or 0 for any") from None
    with _quiet():
        return viser.ViserServer(host=host, port=port, verbose=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    yield


def _wxyz(R: np.ndarray) -> np.ndarray:
    import roma
    import torch

    return roma.quat_xyzw_to_wxyz(roma.rotmat_to_unitquat(torch.from_numpy(R))).numpy()
