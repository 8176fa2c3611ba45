"""`jidm serve`: commands for whoever sends frames, over a websocket."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jidm.errors import InputError

if TYPE_CHECKING:
    from jidm.idm import JacobianIDM
    from jidm.serving import Session

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Serve:
    """Serve a trained field to planners and robots that speak openpi's protocol or LingBot-VA's."""

    checkpoint: str
    """Trained field: a checkpoint folder, a bundled name (panda-sim, ...) or a hub id."""

    host: str = "127.0.0.1"
    """Who may connect: only this machine by default; 0.0.0.0 for the network, then give a token."""

    port: int = 8765
    """0 lets the system choose."""

    embodiment: str | None = None
    """Robot: a name from `jidm embodiments`. The checkpoint's own if not given."""

    action: Literal["joint_velocity", "joint_position", "joint_delta"] = "joint_velocity"
    """What an action is; clients are told."""

    video_rate: float = 12.5
    """Frames a second of the video that clients send."""

    control_rate: float = 50.0
    """Commands a second."""

    chunk: int = 1
    """Frames that are waited for before commands are given."""

    image_key: str | None = None
    """Name of the picture in an observation, where there are several."""

    layout: Literal["lingbot_va", "paper_per_arm", "lingbot_vla"] | None = None
    """Order of LingBot's 30 numbers; its clients must name it themselves if not given."""

    side: Literal["left", "right"] | None = None
    """Which arm a single one counts as in them."""

    max_tracking_error: float | None = 0.5
    """A robot that reports to be further from where it was sent is held [rad or m]."""

    token_file: Path | None = None
    """File with the token clients must send; the environment variable JIDM_TOKEN else, and none is asked if neither is there."""

    workers: int = 2
    """Requests computed at once."""

    max_clients: int = 64
    """Connections at once."""

    def run(self) -> int:
        import torch

        from jidm.idm import JacobianIDM
        from jidm.serving import PolicyServer

        token = self._token()
        idm = JacobianIDM.from_pretrained(self.checkpoint, embodiment=self.embodiment)
        # What is wrong with the settings is told now, not to the first client.
        session = self._session(idm)
        metadata = session.metadata
        if self.layout is not None:
            session.handshake.lingbot_format(session.decoder, None, None)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.workers))
        server = PolicyServer(
            lambda: self._session(idm), host=self.host, port=self.port, token=token, workers=self.workers,
            max_clients=self.max_clients,
        )  # fmt: skip
        if token is None and self.host not in _LOOPBACK:
            print("anybody who reaches this port can use it: give --token-file or JIDM_TOKEN", file=sys.stderr)

        def on_started(port: int) -> None:
            print(f"serving {self.checkpoint} on ws://{self.host}:{port}, {metadata['action_space']} of", end=" ")
            print(
                f"{metadata['action_dim']} joints at {self.control_rate:g} Hz; /healthz and /metrics beside it",
                flush=True,
            )

        server.run(on_started)
        return 0

    def _session(self, idm: JacobianIDM) -> Session:
        from jidm.control import ActionDecoder
        from jidm.serving import Handshake, Session

        decoder = ActionDecoder(
            idm, video_rate=self.video_rate, control_rate=self.control_rate, chunk=self.chunk, action_space=self.action,
            max_tracking_error=self.max_tracking_error,
        )  # fmt: skip
        return Session(decoder, Handshake(image_key=self.image_key, layout=self.layout, side=self.side))

    def _token(self) -> str | None:
        if self.token_file is None:
            return os.environ.get("JIDM_TOKEN") or None
        try:
            token = self.token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the token: {error}") from None
        if not token:
            raise InputError(f"{self.token_file}: is empty; put a token into it")
        return token
