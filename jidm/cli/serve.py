"""`jidm serve`: a websocket server that turns clients' frames into commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from jidm.cli.model_args import ModelArgs
from jidm.cli.text import one_line
from jidm.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from jidm.idm import JacobianIDM
    from jidm.serving import PolicyServer, Session
    from jidm.visualization.viewer import LiveFeed

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Serve:
    """Serve a decoder to planners and robots that speak the protocol of openpi, LingBot-VA or VERA."""

    model: tyro.conf.OmitArgPrefixes[ModelArgs] = field(default_factory=ModelArgs)
    """The decoder. --q0 is the initial pose of a client that sends none."""

    host: str = "127.0.0.1"
    """Interface to listen on: only this machine by default; 0.0.0.0 for the network, then set a token."""

    port: int = 8765
    """Port to listen on; 0 lets the system choose."""

    action: Literal["joint_velocity", "joint_position", "joint_delta"] = "joint_velocity"
    """Action space; stated in the handshake."""

    video_rate: float = 12.5
    """Frames per second of the clients' videos."""

    control_rate: float = 50.0
    """Commands per second."""

    chunk: int = 1
    """Number of frames to wait for before commands are given."""

    image_key: str | None = None
    """Name of the image to decode in an observation; may be omitted if there is only one."""

    layout: Literal["lingbot_va", "paper_per_arm", "lingbot_vla"] | None = None
    """Channel order of LingBot's 30 numbers; if not given, its clients must state it."""

    side: Literal["left", "right"] | None = None
    """Side of a one-armed robot in LingBot's 30 numbers."""

    lingbot_channels: Literal["quaternion", "euler", "all"] = "quaternion"
    """LingBot's numbers in an answer: relative poses (16 for two arms), absolute poses with Euler angles (14), or all 30."""

    action_horizon: int | None = None
    """Actions in every answer, as for openpi's chunk broker; the last ones brake if the frames give fewer."""

    normalized_grippers: bool = False
    """The grippers of clients' states are from 0 (closed) to 1 (open), as those of RoboTwin and ALOHA."""

    handshake: Literal["jidm", "vera"] = "jidm"
    """Fields of the first message to a client; VERA's controller accepts only its own."""

    max_tracking_error: float | None = 0.5
    """A robot that reports a larger distance from its command is held [rad or m]."""

    token_file: Path | None = None
    """File with the token that clients must send. Else the environment variable JIDM_TOKEN; no authorization without either."""

    workers: int = 2
    """Requests computed concurrently."""

    max_clients: int = 64
    """Concurrent connections."""

    view_port: int | None = None
    """Port of a page on this machine that shows what is decoded, as `jidm view` does; no page if not given."""

    def run(self) -> int:
        self._check()
        token = self._token()
        import torch

        from jidm.serving import PolicyServer

        idm = self.model.build_idm()
        q0 = self.model.initial_pose(idm.embodiment)
        feed = None if self.view_port is None else self._live_feed(idm)
        # Wrong settings fail now, not at the first client.
        session = self._session(idm, q0)
        metadata = session.metadata
        if self.layout is not None:
            session.handshake.lingbot_format(session.decoder, None, None)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.workers))
        server = PolicyServer(
            lambda: self._session(idm, q0, feed), host=self.host, port=self.port, token=token, workers=self.workers,
            max_clients=self.max_clients,
        )  # fmt: skip
        if token is None and self.host not in _LOOPBACK:
            print("anybody who reaches this port can use it: give --token-file or JIDM_TOKEN", file=sys.stderr)

        def on_started(port: int) -> None:
            name = self.model.checkpoint or self.model.embodiment
            action = f"{metadata['action_space']} of {metadata['action_dim']} joints at {self.control_rate:g} Hz"
            print(f"serving {name} on ws://{self.host}:{port}, {action}; also /healthz and /metrics", flush=True)

        if feed is None:
            return _run(server, on_started)
        from jidm.visualization.viewer import Viewer

        with Viewer(feed, port=self.view_port or 0) as viewer:
            print(f"viewing on {viewer.url}", flush=True)
            return _run(server, on_started)

    def _check(self) -> None:
        from jidm.cli.checks import check_at_least, check_positive

        if not 0 <= self.port <= 65535:
            raise InputError(f"--port {self.port} must lie in 0 to 65535")
        check_positive(
            video_rate=self.video_rate, control_rate=self.control_rate, max_tracking_error=self.max_tracking_error
        )
        check_at_least(
            1, chunk=self.chunk, action_horizon=self.action_horizon, workers=self.workers, max_clients=self.max_clients
        )
        self.model.check()

    def _live_feed(self, idm: JacobianIDM) -> LiveFeed:
        from jidm.visualization.viewer import LiveFeed
        from jidm.visualization.viewer.server import check_port, require_viser

        require_viser()
        check_port("127.0.0.1", self.view_port or 0)
        return LiveFeed(idm, f"live: {self.model.checkpoint or self.model.embodiment}")

    def _session(self, idm: JacobianIDM, q0: NDArray[Any] | None, feed: LiveFeed | None = None) -> Session:
        from jidm.control import ActionDecoder, ControlConfig
        from jidm.serving import Handshake, Session

        config = ControlConfig(
            video_rate=self.video_rate, control_rate=self.control_rate, chunk=self.chunk, action_space=self.action,
            max_tracking_error=self.max_tracking_error,
        )  # fmt: skip
        handshake = Handshake(
            image_key=self.image_key, layout=self.layout, side=self.side, lingbot_channels=self.lingbot_channels,
            action_horizon=self.action_horizon, normalized_grippers=self.normalized_grippers, vera=self.handshake == "vera",
        )  # fmt: skip
        decoder = ActionDecoder(idm, config)
        if feed is not None:
            decoder.pose_tracker.observer = feed.observe
        return Session(decoder, handshake, q0=q0)

    def _token(self) -> str | None:
        if self.token_file is None:
            return os.environ.get("JIDM_TOKEN") or None
        try:
            token = self.token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the token: {error}") from None
        if not token:
            raise InputError(f"{self.token_file}: is empty; write a token into it")
        return token


def _run(server: PolicyServer, on_started: Callable[[int], None]) -> int:
    """Serve until a signal comes; returns the exit code.

    The interpreter would wait for threads that cannot be interrupted, so it is left at once if there are any.
    """
    try:
        server.run(on_started)
    finally:
        if server.num_abandoned:
            error = sys.exc_info()[1]
            if isinstance(error, Exception):
                print(f"jidm: {one_line(error)}", file=sys.stderr)
            print(
                f"{server.num_abandoned} requests could not be stopped and were abandoned", file=sys.stderr, flush=True
            )
            sys.stdout.flush()
            os._exit(0 if error is None else 1)
    return 0
