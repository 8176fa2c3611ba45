"""A websocket server with openpi's protocol: a handshake first, then an answer to every message.

Clients are not trusted. Messages are checked before they are decoded; an invalid one is answered with one line of text; a
client that does not read its answers, does not answer pings, or sends more than it may is disconnected. Each client has its
own session. Clients that are new or misbehave are computed in a lane of low-priority threads, so that no other client waits
for them; what a client asked for is not computed any further once it is gone. A server that stops finishes or refuses every
request, within seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import hmac
import http
import logging
import math
import signal
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jidm.errors import Cancelled, InputError, JidmError, MissingExtraError
from jidm.serving.codec import pack, unpack
from jidm.serving.lanes import Lane
from jidm.serving.memory import release_free_memory
from jidm.serving.message_check import MessageLimits
from jidm.serving.metrics import Metrics
from jidm.serving.session import Session

if TYPE_CHECKING:
    from websockets.asyncio.server import Server, ServerConnection
    from websockets.http11 import Request, Response

    from jidm.serving.connection import LimitedConnection

_LOG = logging.getLogger(__name__)
_PING_INTERVAL = 20.0  # [s] between pings, and timeout of their answers
_SEND_TIMEOUT = 20.0  # [s] for a client to read an answer
_CLOSE_TIMEOUT = 1.0  # [s] for a client to disconnect after it was asked to
_PENALTY_TIME = 10.0  # [s] for which a client that misbehaved has low priority
_FINISH_TIME = 1.0  # [s] for requests under way when the server stops
_ABORT_TIME = 0.5  # [s] for each later step of stopping
_RELEASE_DELAY = 1.0  # [s] from a client's leaving until memory is released
_MAX_WAITING = 64  # requests of one client that wait for their answers
_MAX_TEXT = 300  # characters
_INTERNAL_ERROR, _GOING_AWAY, _POLICY_VIOLATION = 1011, 1001, 1008  # close codes of RFC 6455
_STOPPING = "the server is stopping; the request is not computed"


@dataclass(eq=False)
class _Client:
    """A connection with its session.

    Attributes:
        waiting: messages that came and are not yet computed. Messages are held nowhere else: tracebacks of cancelled tasks
            would keep them for long.
        is_last: whether no message is expected after those.
        changed: set when one of these changes.
    """

    connection: LimitedConnection
    session: Session | None = None
    waiting: deque[bytes | str] = field(default_factory=deque)
    is_last: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def has_message(self) -> bool:
        """Wait until there is a message to answer, or there will be none."""
        while not self.waiting and not self.is_last:
            self.changed.clear()
            await self.changed.wait()
        return bool(self.waiting)

    def add(self, message: bytes | str, max_size: int) -> bool:
        """Add a message, unless too many wait, or all together are larger than max_size bytes."""
        waiting = tuple(self.waiting)  # threads take messages from it
        if len(waiting) >= _MAX_WAITING or len(message) + sum(map(len, waiting)) > max_size:
            return False
        self.waiting.append(message)
        self.changed.set()
        return True

    def end(self) -> None:
        """Expect no more messages."""
        self.is_last = True
        self.changed.set()


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

    Attributes:
        metrics: counters.
        num_abandoned: after `serve`, computations that could not be stopped. They keep the interpreter from exiting until
            they are done.

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
        self.num_abandoned = 0

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

        gc.collect()
        gc.freeze()  # models and modules: later collections take milliseconds and delay no answer
        try:
            asyncio.run(until_signaled())
        finally:
            gc.unfreeze()

    async def serve(self, stop: asyncio.Event, on_started: Callable[[int], None] = lambda port: None) -> None:
        """Serve until `stop` is set. Then requests that are computed are finished, in 1 s at most, and all others refused;
        clients are disconnected. Takes 2.5 s at most.

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
        from jidm.serving.connection import ConnectionPool, LimitedConnection, quiet_logger

        self._stopping, self._clients, self._pool = False, set[_Client](), ConnectionPool()
        self._releasing: asyncio.Task[None] | None = None
        connection = functools.partial(
            LimitedConnection, limits=self._limits, pool=self._pool,
            on_rejected=lambda limit: self.metrics.rejected.labels(limit).inc(),
        )  # fmt: skip
        low, queued = max(1, self._workers - 1), self.metrics.queue.inc
        self._lane = Lane("jidm", self._workers, low_priority=False, on_queued=queued)
        self._low_priority_lane = Lane("jidm-low-priority", low, low_priority=True, on_queued=queued)
        self._session_lane = Lane("jidm-sessions", 1, low_priority=True, on_queued=queued)
        try:
            server: Server = await serve(
                self._handle_connection, self._host, self._port, process_request=self._process_request, compression=None,
                max_size=self._limits.size, max_queue=1, ping_interval=_PING_INTERVAL, ping_timeout=_PING_INTERVAL, open_timeout=10,
                close_timeout=_CLOSE_TIMEOUT, create_connection=connection,  # type: ignore[arg-type]
                logger=quiet_logger(),
            )  # fmt: skip
        except OSError as error:
            raise InputError(f"cannot listen on {self._host}:{self._port}: {error.strerror or error}") from None
        try:
            on_started(next(iter(server.sockets)).getsockname()[1])
            await stop.wait()
        finally:
            await self._stop(server)

    async def _stop(self, server: Server) -> None:
        """Finish or refuse every request and disconnect everybody, each step for a limited time."""
        self._stopping = True
        server.close(close_connections=False)
        closed = asyncio.ensure_future(server.wait_closed())
        lanes = (self._lane, self._low_priority_lane, self._session_lane)
        for lane in lanes:
            lane.close()
        for client in self._clients:
            client.end()
        await asyncio.wait({closed}, timeout=_FINISH_TIME)
        for client in self._clients:
            if client.session is not None:
                client.session.cancel()
        await asyncio.wait({closed}, timeout=_ABORT_TIME)
        self._pool.abort()
        await asyncio.wait({closed}, timeout=_ABORT_TIME)
        closed.cancel()
        self.num_abandoned = sum(await asyncio.gather(*(lane.finish(_ABORT_TIME) for lane in lanes)))

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
        if self._pool.num_open >= self._max_clients:
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

    async def _handle_connection(self, connection: ServerConnection) -> None:
        """Serve a client until it leaves; what is then under way or waits for it is cancelled."""
        client = _Client(connection)  # type: ignore[arg-type]
        self._clients.add(client)
        self.metrics.clients.inc()
        if self._stopping:
            client.end()
        tasks = [
            asyncio.ensure_future(each)
            for each in (self._answer_messages(client), self._read_messages(client), client.connection.leaving.wait())
        ]
        answering, _, leaving = tasks
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._clients.discard(client)
            self.metrics.clients.dec()
            if client.session is not None:
                client.session.cancel()
            client.waiting.clear()
            for task in tasks:
                task.cancel()
            self._release_memory_soon()
        await asyncio.wait(tasks)
        if not answering.cancelled():
            answering.result()

    async def _read_messages(self, client: _Client) -> None:
        """Read all the time, also while an answer is computed: only then is it noticed that a client is gone."""
        from websockets.exceptions import ConnectionClosed

        with contextlib.suppress(ConnectionClosed):
            while True:
                if not client.add(await client.connection.recv(), self._limits.size):
                    self.metrics.rejected.labels("waiting").inc()
                    await client.connection.close(_POLICY_VIOLATION, "too many requests at once; wait for each answer")
                    return

    async def _answer_messages(self, client: _Client) -> None:
        """Answer message after message.

        A client has low priority until its first message is answered, and for `_PENALTY_TIME` after a message that was
        refused or that arrived before the previous answer was ready.
        """
        from websockets.exceptions import ConnectionClosed

        try:
            failure = await self._session_lane.compute(self._open_session, client)
            if client.session is None:
                await client.connection.close(_INTERNAL_ERROR, failure)
                return
            await self._send(client, pack(client.session.metadata))
            trusted_since = math.inf
            while await client.has_message():
                lane = self._lane if time.monotonic() >= trusted_since else self._low_priority_lane
                start = time.perf_counter()
                try:
                    kind, answer = await lane.compute(self._answer, client.session, client.waiting)
                except Cancelled:
                    client.waiting.popleft()
                    kind, answer = "stopped", _STOPPING
                self.metrics.latency.labels(kind).observe(time.perf_counter() - start)
                if isinstance(answer, str) or client.waiting:
                    trusted_since = time.monotonic() + _PENALTY_TIME
                elif trusted_since == math.inf:
                    trusted_since = time.monotonic()
                await self._send(client, answer)
                client.connection.count_answer()
            await client.connection.close(_GOING_AWAY, "the server stops")
        except Cancelled:  # before there was a session
            await client.connection.close(_GOING_AWAY, "the server stops")
        except ConnectionClosed:
            pass
        except asyncio.TimeoutError:
            self.metrics.rejected.labels("slow").inc()
            client.connection.transport.abort()

    def _release_memory_soon(self) -> None:
        """Release what clients that left have freed, soon after the first of them and once for all of them."""
        if self._releasing is None and not self._stopping:
            self._releasing = asyncio.ensure_future(self._release_memory())

    async def _release_memory(self) -> None:
        await asyncio.sleep(_RELEASE_DELAY)
        with contextlib.suppress(Cancelled):
            await self._session_lane.compute(release_free_memory)
        self._releasing = None

    @staticmethod
    async def _send(client: _Client, message: bytes | str) -> None:
        await asyncio.wait_for(client.connection.send(message), _SEND_TIMEOUT)

    # ---- in the lanes' threads; nothing that a session raises may stop the server or reveal its internals -------------

    def _open_session(self, client: _Client) -> str:
        """Give the client a session, or return the reason why not."""
        try:
            client.session = self._make_session()
        except BaseException:
            return self._internal_error()
        return ""

    def _answer(self, session: Session, waiting: deque[bytes | str]) -> tuple[str, bytes | str]:
        """Answer the first of these messages: the kind of the answer, and itself, or a line of text why there is none."""
        try:
            message = waiting.popleft()
        except IndexError:  # the client has just left and takes no answer
            return "stopped", ""
        try:
            return "answered", pack(session.handle(unpack(message, self._limits)))
        except Cancelled:
            return "stopped", _STOPPING
        except JidmError as error:
            self.metrics.rejected.labels("message").inc()
            return "refused", _one_line(str(error))
        except BaseException:  # SystemExit as well
            return "failed", self._internal_error()

    def _internal_error(self) -> str:
        number = uuid.uuid4().hex[:8]
        _LOG.exception("error %s", number)
        self.metrics.rejected.labels("error").inc()
        return f"internal error {number}; the server's log has details"


def _one_line(text: str) -> str:
    """Printable characters only, and not too many: parts of the client's message may be in it."""
    printable = "".join(x if x.isprintable() else " " for x in text[: 4 * _MAX_TEXT])
    line = " ".join(printable.split())
    return line if len(line) <= _MAX_TEXT else f"{line[: _MAX_TEXT - 3]}..."
