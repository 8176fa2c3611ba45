"""A websocket server with openpi's protocol: a handshake first, then an answer to every message.

Clients are not trusted. Messages are checked before they are decoded; an invalid one is answered with one line of text; a
client that does not read its answers or does not answer pings is disconnected. Each client has its own session. Clients that
are new or misbehave are served by a separate pool of low-priority workers, so that no other client waits for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import http
import logging
import math
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from jidm.errors import InputError, JidmError, MissingExtraError
from jidm.serving.codec import pack, unpack
from jidm.serving.message_check import MessageLimits
from jidm.serving.metrics import Metrics
from jidm.serving.session import Session

if TYPE_CHECKING:
    from websockets.asyncio.server import Server, ServerConnection
    from websockets.http11 import Request, Response

_LOG = logging.getLogger(__name__)
_PING_INTERVAL = 20.0  # [s] between pings, and timeout of their answers
_SEND_TIMEOUT = 20.0  # [s] for a client to read an answer
_PENALTY_TIME = 10.0  # [s] for which a client that misbehaved has low priority
_NICE_INCREMENT = 10  # niceness of the low-priority workers, relative to the others
_SHUTDOWN_TIMEOUT = 5.0  # [s] to finish requests when the server stops
_TRY_AGAIN_LATER, _MESSAGE_TOO_BIG = 1013, 1009  # close codes of RFC 6455


class PolicyServer:
    """Serves sessions over a websocket; `/healthz` and `/metrics` over plain HTTP on the same port.

    Args:
        make_session: makes the session of a client.
        host: interface to listen on; only this machine by default.
        port: 0 lets the system choose.
        token: required from clients as `Authorization: Api-Key <token>` (or Bearer); no authorization if None.
        limits: of a message.
        workers: requests computed concurrently. There is one low-priority worker less, but at least one.
        max_clients: concurrent connections; further ones are refused.

    Raises:
        InputError: the token is empty.
        MissingExtraError: prometheus_client is not installed.
    """

    def __init__(
        self, make_session: Callable[[], Session], *, host: str = "127.0.0.1", port: int = 8765, token: str | None = None,
        limits: MessageLimits | None = None, workers: int = 2, max_clients: int = 64,
    ) -> None:  # fmt: skip
        if token is not None and not token.strip():
            raise InputError("the token is empty; choose one that cannot be guessed")
        self._make_session, self._host, self._port, self._token = make_session, host, port, token
        self._limits, self._workers, self._max_clients = limits or MessageLimits(), workers, max_clients
        self.metrics = Metrics()
        self._num_clients = 0

    def run(self, on_started: Callable[[int], None] = lambda port: None) -> None:
        """Serve until the process receives SIGINT or SIGTERM.

        Args:
            on_started: called with the port once connections are accepted.
        """

        async def until_signaled() -> None:
            stop = asyncio.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                with contextlib.suppress(NotImplementedError):  # Windows raises KeyboardInterrupt instead
                    asyncio.get_running_loop().add_signal_handler(number, stop.set)
            await self.serve(stop, on_started)

        asyncio.run(until_signaled())

    async def serve(self, stop: asyncio.Event, on_started: Callable[[int], None] = lambda port: None) -> None:
        """Serve until `stop` is set; requests in progress are finished, then clients are disconnected.

        Args:
            stop: ends serving.
            on_started: called with the port once connections are accepted.

        Raises:
            InputError: the port is in use, or the address is not this machine's.
            MissingExtraError: websockets is not installed.
        """
        try:
            from websockets.asyncio.server import serve
        except ImportError:
            raise MissingExtraError("serving", "websockets", "serve") from None

        with (
            ThreadPoolExecutor(self._workers, thread_name_prefix="jidm") as self._executor,
            ThreadPoolExecutor(
                max(1, self._workers - 1), thread_name_prefix="jidm-low-priority", initializer=_lower_priority
            ) as self._low_priority_executor,
        ):
            try:
                server: Server = await serve(
                    self._handle_connection, self._host, self._port, process_request=self._process_request, compression=None,
                    max_size=self._limits.size, max_queue=1, ping_interval=_PING_INTERVAL, ping_timeout=_PING_INTERVAL, open_timeout=10,
                    close_timeout=_SHUTDOWN_TIMEOUT,
                )  # fmt: skip
            except OSError as error:
                raise InputError(f"cannot listen on {self._host}:{self._port}: {error.strerror or error}") from None
            try:
                on_started(next(iter(server.sockets)).getsockname()[1])
                await stop.wait()
            finally:
                server.close(close_connections=True)
                await server.wait_closed()

    # ---- one connection ---------------------------------------------------------------------------------------------

    def _process_request(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer plain HTTP requests; refuse clients without a token or beyond the limit."""
        if request.path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if not self._is_authorized(request):
            self.metrics.rejected.labels("token").inc()
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "a token is required\n")
        if request.path == "/metrics":
            return connection.respond(http.HTTPStatus.OK, self.metrics.text().decode())
        if self._num_clients >= self._max_clients:
            self.metrics.rejected.labels("clients").inc()
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "too many clients\n")
        return None

    def _is_authorized(self, request: Request) -> bool:
        if self._token is None:
            return True
        headers = request.headers.get_all("Authorization")
        scheme, _, token = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
        matches = hmac.compare_digest(token.encode("utf-8", "surrogateescape"), self._token.encode())
        return matches and scheme.lower() in ("api-key", "bearer")

    async def _handle_connection(self, socket: ServerConnection) -> None:
        from websockets.exceptions import ConnectionClosed

        if self._num_clients >= self._max_clients:  # connections accepted at the same time
            self.metrics.rejected.labels("clients").inc()
            await socket.close(_TRY_AGAIN_LATER, "too many clients")
            return
        self._num_clients += 1
        self.metrics.clients.inc()
        try:
            session = await asyncio.get_running_loop().run_in_executor(self._low_priority_executor, self._make_session)
            await self._send(socket, pack(session.metadata))
            await self._answer_messages(socket, session)
        except ConnectionClosed as error:
            if error.sent is not None and error.sent.code == _MESSAGE_TOO_BIG:
                self.metrics.rejected.labels("size").inc()
        except asyncio.TimeoutError:
            self.metrics.rejected.labels("slow").inc()
            socket.transport.abort()
        finally:
            self._num_clients -= 1
            self.metrics.clients.dec()

    async def _answer_messages(self, socket: ServerConnection, session: Session) -> None:
        """Answer message after message.

        A client has low priority until its first message is answered, and for `_PENALTY_TIME` after a message that was
        refused or that arrived before the previous answer was ready.
        """
        trusted_since = math.inf
        pending = asyncio.ensure_future(socket.recv())
        try:
            while True:
                message = await pending
                pending = asyncio.ensure_future(socket.recv())
                executor = self._executor if time.monotonic() >= trusted_since else self._low_priority_executor
                answer = await self._respond(session, message, executor)
                pipelined = pending.done() and not pending.cancelled() and pending.exception() is None
                if isinstance(answer, str) or pipelined:
                    trusted_since = time.monotonic() + _PENALTY_TIME
                elif trusted_since == math.inf:
                    trusted_since = time.monotonic()
                await self._send(socket, answer)
        finally:
            pending.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await pending

    async def _respond(self, session: Session, message: bytes | str, executor: ThreadPoolExecutor) -> bytes | str:
        """The answer, or one line of text with the reason why there is none."""
        start = time.perf_counter()
        self.metrics.queue.inc()

        def answer() -> bytes:
            self.metrics.queue.dec()
            return pack(session.handle(unpack(message, self._limits)))

        try:
            response: bytes | str = await asyncio.get_running_loop().run_in_executor(executor, answer)
            kind = "answered"
        except JidmError as error:
            self.metrics.rejected.labels("message").inc()
            response, kind = str(error), "refused"
        except Exception:  # no message may stop the server or reveal its internals
            number = uuid.uuid4().hex[:8]
            _LOG.exception("error %s", number)
            self.metrics.rejected.labels("error").inc()
            response, kind = f"internal error {number}; the server's log has details", "failed"
        self.metrics.latency.labels(kind).observe(time.perf_counter() - start)
        return response

    @staticmethod
    async def _send(socket: ServerConnection, message: bytes | str) -> None:
        await asyncio.wait_for(socket.send(message), _SEND_TIMEOUT)


def _lower_priority() -> None:
    """Lower the priority of this thread; only Linux has priorities per thread."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE_INCREMENT)
