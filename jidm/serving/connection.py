"""Connections that limit what a client sends before any message of it is complete.

websockets limits the bytes of a message. A client may still send it in endless small frames, or send pings without end, and
parsing them would stop the event loop for everybody else. Frames are therefore counted one by one, as the Sans-I/O protocol
of websockets parses them, and a connection with too many is closed with a reason.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import InvalidHandshake, InvalidMessage, ProtocolError
from websockets.frames import DATA_OPCODES, CloseCode, Frame
from websockets.protocol import State

from jidm.serving.message_check import MessageLimits

_FRAME_RATE = 250.0  # [1/s] frames in the long run
_MAX_HANDSHAKES = 64  # connections whose client has not yet said what it wants


class ConnectionPool:
    """All connections of a server, oldest first."""

    def __init__(self) -> None:
        self._connections: dict[LimitedConnection, None] = {}

    @property
    def num_open(self) -> int:
        """Connections that can exchange messages: opening and closing ones are not counted."""
        return sum(connection.protocol.state is State.OPEN for connection in self._connections)

    def add(self, connection: LimitedConnection) -> None:
        """Add one. Of too many that are silent after they connected, the oldest is disconnected."""
        self._connections[connection] = None
        silent = [one for one in self._connections if one.protocol.state is State.CONNECTING]
        if len(silent) > _MAX_HANDSHAKES:
            silent[0].transport.abort()

    def remove(self, connection: LimitedConnection) -> None:
        """Remove one."""
        self._connections.pop(connection, None)

    def abort(self) -> None:
        """Disconnect all at once."""
        for connection in list(self._connections):
            connection.transport.abort()


class LimitedConnection(ServerConnection):
    """A connection that is closed when its client exceeds the limits.

    Args:
        limits: of a message.
        pool: holds the connection while it exists.
        on_rejected: called with the limit that the client exceeded.

    Attributes:
        leaving: set once no more messages can be exchanged.
    """

    def __init__(
        self, *arguments: Any, limits: MessageLimits, pool: ConnectionPool, on_rejected: Callable[[str], None],
        **settings: Any,
    ) -> None:  # fmt: skip
        super().__init__(*arguments, **settings)
        self._limits, self._pool, self._on_rejected = limits, pool, on_rejected
        self.leaving = asyncio.Event()
        self._recv_frame = self.protocol.recv_frame
        self.protocol.recv_frame = self._count_frame  # type: ignore[method-assign]
        self._frames_allowed, self._frames_counted_at = float(limits.frames), self.loop.time()
        self._deadline: asyncio.TimerHandle | None = None  # of a message whose first frame is there

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        super().connection_made(transport)
        self._pool.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        super().connection_lost(exc)
        self._pool.remove(self)
        self.leaving.set()
        self._set_deadline(False)

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        super().data_received(data)
        if self.protocol.eof_sent:  # whatever follows is ignored
            sent = self.protocol.close_sent
            self._leave("size" if sent is not None and sent.code == CloseCode.MESSAGE_TOO_BIG else None)

    def _count_frame(self, frame: Frame) -> None:
        """Called by the protocol with each frame that it has parsed."""
        now = self.loop.time()
        refilled = self._frames_allowed + _FRAME_RATE * (now - self._frames_counted_at)
        self._frames_allowed, self._frames_counted_at = min(float(self._limits.frames), refilled) - 1, now
        if self._frames_allowed < 0:
            reason = f"more than {self._limits.frames} frames at once; send each message in one frame"
            self._fail(reason, "frames")
            raise ProtocolError(reason)  # ends parsing
        if frame.opcode in DATA_OPCODES:
            self._set_deadline(not frame.fin)
        self._recv_frame(dataclasses.replace(frame))
        frame.data = b""  # the parser keeps this one until the next frame comes, which may take days

    def count_answer(self) -> None:
        """A message that was answered no longer counts: a client that waits for its answers may be as fast as they are."""
        self._frames_allowed += 1

    def _set_deadline(self, is_incomplete: bool) -> None:
        """Limit the time in which the frames of a message may come."""
        if is_incomplete and self._deadline is None:
            reason = f"a message must arrive within {self._limits.duration:g} s"
            self._deadline = self.loop.call_later(self._limits.duration, self._fail, reason, "duration")
        elif not is_incomplete and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _fail(self, reason: str, limit: str) -> None:
        self.protocol.fail(CloseCode.POLICY_VIOLATION, reason)
        self.send_data()
        self._leave(limit)

    def _leave(self, limit: str | None = None) -> None:
        """No more messages are exchanged; the client has the close timeout to disconnect."""
        if self.leaving.is_set():
            return
        self.leaving.set()
        if limit is not None:
            self._on_rejected(limit)
        self.loop.call_later(self.close_timeout or 0.0, self.transport.abort)


class _WithoutFailedHandshakes(logging.Filter):
    """Anybody can send a handshake that is none, any number of times."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, (InvalidHandshake, InvalidMessage, EOFError))


def quiet_logger() -> logging.Logger:
    """A logger for websockets that leaves out clients' handshakes that fail."""
    logger = logging.getLogger("jidm.serving.websockets")
    if not logger.filters:
        logger.addFilter(_WithoutFailedHandshakes())
    return logger
