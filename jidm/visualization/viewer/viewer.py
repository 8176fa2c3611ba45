"""The viewer in the browser: viser serves the page, draws the robot in 3-D and holds the controls.

Left: play, frame, joint, and the pictures of the frame. Right: joints against their limits and over time. On a phone both are
one sheet at the bottom. All browsers that look at one viewer share its frame and joint.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from functools import lru_cache
from html import escape
from typing import Any

from jidm.errors import InputError
from jidm.visualization.image import RgbImage
from jidm.visualization.viewer.joint_charts import RUN_COLORS, JointChart, joint_bars
from jidm.visualization.viewer.live import LiveFeed
from jidm.visualization.viewer.pictures import PICTURES, FramePictures, compare
from jidm.visualization.viewer.robot_scene import SceneView
from jidm.visualization.viewer.server import start_server, stop_server
from jidm.visualization.viewer.viewed_run import ViewedRun

MAX_RUNS = 2
"""Number of runs that are compared."""

_LETTERS = "AB"
_ALL = "all"
_SPEEDS = {"1/4": 0.25, "1/2": 0.5, "1": 1.0, "2": 2.0}
_PICTURES_WIDTH, _JOINTS_WIDTH = 410, 284
"""[px] of the panels. On a screen 1280 wide they leave more than `robot_scene.PHONE_WIDTH` for the robot."""
_CACHED_SHEETS = 200
_JPEG_QUALITY = 88
_LIVE_PERIOD = 0.1  # [s] between looks at a live feed
_IDLE = 0.2  # [s] longest sleep of the drawing thread


class Viewer:
    """A page that shows one run, two side by side, or a run that grows.

    Args:
        shown: one run, two to compare, or a live feed.
        host: interface to listen on; only this machine by default.
        port: 0 lets the system choose.

    Attributes:
        port: on which the page is served.

    Raises:
        InputError: no run or too many, or the port is in use.
        MissingExtraError: viser is not installed.
    """

    def __init__(self, shown: Sequence[ViewedRun] | LiveFeed, *, host: str = "127.0.0.1", port: int = 8080) -> None:
        self._feed = shown if isinstance(shown, LiveFeed) else None
        self._runs = list(shown) if not isinstance(shown, LiveFeed) else [shown.waiting()]
        if not 1 <= len(self._runs) <= MAX_RUNS:
            raise InputError(f"the viewer shows one run, or {MAX_RUNS} side by side; got {len(self._runs)}")
        self._server = start_server(host, port)
        self._host, self.port = host, int(self._server.get_port())
        self._stop, self._changed = threading.Event(), threading.Event()
        self._playing = False
        self._version: Any = None
        self._forget()
        try:
            self._scene = SceneView(self._server, self._runs)
            self._build_gui()
        except BaseException:
            stop_server(self._server)
            raise
        self._thread = threading.Thread(target=self._draw_until_stopped, name="jidm-view", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Address of the page on this machine."""
        host = "127.0.0.1" if self._host in ("", "0.0.0.0", "::") else self._host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

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
        stop_server(self._server)

    def __enter__(self) -> Viewer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- controls ---------------------------------------------------------------------------------------------------

    def _build_gui(self) -> None:
        import viser

        gui, names = self._server.gui, self._runs[0].joint_names
        gui.set_panel_label("jidm view")
        gui.configure_theme(show_logo=False, show_share_button=False, brand_color=(31, 95, 191))
        gui.main_panel.dock_left()
        gui.main_panel.set_width(_PICTURES_WIDTH)
        self._titles = gui.add_html(self._titles_html())
        self._play = gui.add_button("Play", icon=viser.Icon.PLAYER_PLAY)
        self._slider = gui.add_slider("Frame", min=0, max=max(self._length - 1, 1), step=1, initial_value=0)
        self._joint = gui.add_dropdown("Joint", names, initial_value=names[0])
        self._picture = gui.add_dropdown("Picture", (_ALL, *PICTURES), initial_value=_ALL)
        self._image = gui.add_image(self._sheet(0, 0, _ALL, False), jpeg_quality=_JPEG_QUALITY)
        self._pose = gui.add_checkbox("Draw the pose", initial_value=False)
        self._speed = gui.add_dropdown("Speed", tuple(_SPEEDS), initial_value="1", visible=self._feed is None)
        self._follow = gui.add_checkbox("Follow", initial_value=True, visible=self._feed is not None)
        self._scene.add_controls()
        joints = gui.add_panel()
        with joints.add_tab("Joints", viser.Icon.CHART_BAR):
            self._bars = gui.add_html(joint_bars(self._runs_of_joints(), 0, 0))
            self._curve = gui.add_image(self._chart(0).draw(0), format="png")
            self._notes = gui.add_markdown(self._notes_text(0))
        joints.dock_right()
        joints.set_width(_JOINTS_WIDTH)

        @self._play.on_click
        def _(_: Any) -> None:
            self._set_playing(not self._playing)

        for control in (self._slider, self._joint, self._picture, self._pose, self._follow):
            control.on_update(lambda _: self._changed.set())

    def _set_playing(self, playing: bool) -> None:
        import viser

        self._playing = playing
        self._play.label = "Pause" if playing else "Play"
        self._play.icon = viser.Icon.PLAYER_PAUSE if playing else viser.Icon.PLAYER_PLAY
        if playing:
            self._follow.value = False
            if self._slider.value >= self._length - 1:
                self._slider.value = 0
        self._changed.set()

    # ---- content ----------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Drop what was drawn of other runs."""
        self._pictures = [FramePictures(run) for run in self._runs]
        self._sheet = lru_cache(maxsize=_CACHED_SHEETS)(self._draw_sheet)
        self._chart = lru_cache(maxsize=32)(self._make_chart)

    @property
    def _length(self) -> int:
        return max(len(run) for run in self._runs)

    @property
    def _rate(self) -> float:
        """Frames per second of the first run."""
        seconds = self._runs[0].motion.time
        return (len(seconds) - 1) / max(float(seconds[-1] - seconds[0]), 1e-6) if len(seconds) > 1 else 1.0

    def _titles_html(self) -> str:
        rows = []
        for letter, color, run in zip(_LETTERS, RUN_COLORS, self._runs, strict=False):
            label = f'<b style="color:{color}">{letter}</b> ' if len(self._runs) > 1 else ""
            rows.append(f"<div>{label}{escape(run.title)}</div>")
        return f'<div style="padding:2px 10px 8px 10px;font-size:13px;overflow-wrap:anywhere">{"".join(rows)}</div>'

    def _runs_of_joints(self) -> list[ViewedRun]:
        """The runs whose joints can be drawn together: those with the joints of the first."""
        return [run for run in self._runs if run.joint_names == self._runs[0].joint_names]

    def _notes_text(self, t: int) -> str:
        lines = []
        for letter, run in zip(_LETTERS, self._runs, strict=False):
            name = f"**{letter}** " if len(self._runs) > 1 else ""
            step = min(t, len(run.motion.residual)) - 1
            if run.decoded and step >= 0:
                valid = "" if bool(run.motion.valid[step]) else ", **not valid**"
                lines.append(f"{name}residual {float(run.motion.residual[step]):.2f} px rms{valid}")
            if step >= 0:
                lines += [f"{name}{term} {float(values[step]):.2f}" for term, values in (run.penalties or {}).items()]
            lines += [f"{name}{note}" for note in run.notes]
        return "  \n".join(lines)

    def _draw_sheet(self, t: int, joint: int, picture: str, pose: bool) -> RgbImage:
        names = PICTURES if picture == _ALL else (picture,)
        if len(self._runs) > 1:
            return compare(dict(zip(_LETTERS, self._pictures, strict=False)), t, joint, names, show_pose=pose)
        return self._pictures[0].sheet(min(t, len(self._runs[0]) - 1), joint, names, show_pose=pose)

    def _make_chart(self, joint: int) -> JointChart:
        runs = self._runs_of_joints()
        label = "decoded" if runs[0].decoded else "recorded"
        labels = (label,) if len(self._runs) == 1 else _LETTERS
        return JointChart(dict(zip(labels, runs, strict=False)), runs[0].joint_names[joint])

    # ---- drawing ----------------------------------------------------------------------------------------------------

    def _draw_until_stopped(self) -> None:
        """Draw the chosen frame whenever something changed.

        While playing, the frame is that of the clock. Drawing may be slower than the video: then frames are left out, and the
        speed is kept.
        """
        drawn: Any = None
        clock, clock_frame, set_frame = 0.0, 0, -1
        while not self._stop.is_set():
            self._update_feed()
            if self._playing:
                if self._slider.value != set_frame:  # play was pressed, or somebody moved the slider
                    clock, clock_frame = time.monotonic(), self._slider.value
                advance = (time.monotonic() - clock) * self._rate * _SPEEDS[self._speed.value]
                set_frame = min(clock_frame + int(advance), self._length - 1)
                self._slider.value = set_frame
                if set_frame >= self._length - 1:
                    self._set_playing(False)
            else:
                set_frame = -1
            frame = min(int(self._slider.value), self._length - 1)
            wanted = (self._version, frame, self._joint.value, self._picture.value, self._pose.value)
            if wanted != drawn:
                drawn = wanted
                self._draw(*wanted[1:])
                continue
            self._changed.wait(0.01 if self._playing else _IDLE if self._feed is None else _LIVE_PERIOD)
            self._changed.clear()

    def _update_feed(self) -> None:
        """Take new frames of a live feed."""
        if self._feed is None or (run := self._feed.run_since(self._version)) is None:
            return
        version, grown = run
        same_video = self._version is not None and version[0] == self._version[0]
        self._runs, self._version = [grown], version
        if same_video:
            self._pictures[0].extend(grown)
            self._sheet.cache_clear()
            self._chart.cache_clear()
        else:
            self._forget()
            self._titles.content = self._titles_html()
        self._slider.max = max(self._length - 1, 1)
        if self._follow.value:
            # The newest frame with flow to a next one.
            self._slider.value = max(self._length - 2, 0)

    def _draw(self, t: int, joint: str, picture: str, pose: bool) -> None:
        k = self._runs[0].joint_names.index(joint)
        sheet, curve = self._sheet(t, k, picture, pose), self._chart(k).draw(t)
        with self._server.atomic():
            self._image.image = sheet
            self._bars.content = joint_bars(self._runs_of_joints(), t, k)
            self._curve.image = curve
            self._notes.content = self._notes_text(t)
            self._scene.show(self._runs, t)
