"""The server under load and attack: clients that hang up, flood it or stall, sessions that misbehave, and stopping in time.

Time bounds are generous: what they exclude takes several times as long.
"""

from __future__ import annotations

import gc
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
from test_control_decoder import ROBOT, PixelPoseStream, motion
from test_serving_server import float_picture, serving

from jidm.errors import Cancelled, InputError
from jidm.serving import Client, MessageLimits, ServerError, Session, pack

connect = pytest.importorskip("websockets.sync.client").connect
pytest.importorskip("prometheus_client")

from websockets.exceptions import ConnectionClosed  # noqa: E402
from websockets.frames import Frame, Opcode  # noqa: E402

from jidm.serving.connection import _MAX_HANDSHAKES  # noqa: E402

FIRST = {"image": float_picture(ROBOT.home), "state": ROBOT.home}


class WaitingSession(Session):
    """Answers after so many seconds; a wait ends early by `cancel` if it can be interrupted."""

    metadata: dict[str, object] = {}  # type: ignore[assignment]  # noqa: RUF012
    computed = 0

    def __init__(self) -> None:
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        self._cancelled.set()

    def handle(self, message: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        type(self).computed += 1
        if message.get("stuck"):
            time.sleep(message["stuck"])
        elif self._cancelled.wait(message.get("seconds", 0)):
            raise Cancelled("stopped")
        return {"done": 1}


@pytest.fixture
def waiting_session() -> Iterator[type[WaitingSession]]:
    WaitingSession.computed = 0
    yield WaitingSession


def raw_client(port: int) -> Any:
    """A client that has received the handshake."""
    client = connect(f"ws://127.0.0.1:{port}", compression=None)
    client.recv(timeout=10)
    return client


def hang_up(client: Any) -> None:
    """As a process that is killed does, without a closing handshake."""
    client.socket.shutdown(socket.SHUT_RDWR)


def wait_for(condition: Callable[[], bool], timeout: float = 10) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def metrics(port: int) -> str:
    return str(urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode())


@contextmanager
def closed_with(code: int, reason: str) -> Iterator[None]:
    with pytest.raises(ConnectionClosed) as closed:
        yield
    assert closed.value.rcvd is not None and closed.value.rcvd.code == code
    assert re.search(reason, closed.value.rcvd.reason)


# ---- hanging up ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requests", [1, 3], ids=["one request", "pipelined"])
def test_what_clients_asked_for_ends_when_they_hang_up(requests: int, waiting_session: type[WaitingSession]) -> None:
    with serving(waiting_session, max_clients=6) as (port, _):
        clients = [raw_client(port) for _ in range(6)]
        for client in clients:
            for _ in range(requests):
                client.send(pack({"seconds": 60}))
            wait_for(lambda: waiting_session.computed == 1)  # the first one's
        wait_for(lambda: "jidm_queue 5.0" in metrics(port))
        with pytest.raises(ServerError, match="503"):
            Client(port=port)
        for client in clients[1:]:
            hang_up(client)
        wait_for(lambda: "jidm_clients 1.0" in metrics(port))
        hang_up(clients[0])
        wait_for(lambda: "jidm_clients 0.0" in metrics(port))
        began = time.monotonic()
        with Client(port=port, timeout=50) as newcomer:
            assert newcomer.infer({}) == {"done": 1}
        assert time.monotonic() - began < 20
        assert waiting_session.computed == 2 and "jidm_queue 0.0" in metrics(port)


def test_a_long_request_stops_between_frames_when_its_client_hangs_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = threading.Semaphore(0)
    push = PixelPoseStream.push

    def slow_push(self: PixelPoseStream, *given: Any) -> Any:
        pushed.release()
        time.sleep(0.1)
        return push(self, *given)

    monkeypatch.setattr(PixelPoseStream, "push", slow_push)
    frames = np.stack([float_picture(q) for q in motion(6)[:60]])
    with serving() as (port, _), Client(port=port) as newcomer:
        client = raw_client(port)
        client.send(pack({**FIRST, "image": frames}))
        assert pushed.acquire(timeout=20)
        hang_up(client)
        assert "actions" in newcomer.infer(FIRST)
        assert sum(pushed.acquire(blocking=False) for _ in range(60)) < 40


def test_clients_that_are_gone_do_not_count_even_if_their_work_cannot_be_stopped() -> None:
    with serving(WaitingSession, max_clients=3) as (port, _):
        clients = [raw_client(port) for _ in range(3)]
        for client in clients:
            client.send(pack({"stuck": 4}))
        for client in clients:
            hang_up(client)
        wait_for(lambda: "jidm_clients 0.0" in metrics(port), 3)
        began = time.monotonic()
        with Client(port=port):  # sessions start in a lane of their own
            assert time.monotonic() - began < 3


def test_messages_are_not_kept_after_their_answers_or_by_clients_that_hang_up() -> None:
    size = 8 * 2**20
    with serving(WaitingSession) as (port, _):
        patient, hasty = raw_client(port), [raw_client(port) for _ in range(2)]
        tracemalloc.start()
        try:
            patient.send(pack({"text": "x" * size}))
            patient.recv(timeout=20)
            for client in hasty:
                client.send(pack({"seconds": 20, "text": "x" * size}))
            wait_for(lambda: tracemalloc.get_traced_memory()[0] > size)
            for client in hasty:
                hang_up(client)
            gc.disable()
            wait_for(lambda: tracemalloc.get_traced_memory()[0] < size / 2)
        finally:
            gc.enable()
            tracemalloc.stop()
            patient.close()


# ---- limits of what is received --------------------------------------------------------------------------------------


def send_frames(client: Any, frames: list[tuple[Opcode, bytes, bool]]) -> None:
    client.socket.sendall(b"".join(Frame(*frame).serialize(mask=True) for frame in frames))


def receive_until_closed(client: Any) -> None:
    for _ in range(20):
        client.recv(timeout=20)


def continuations(count: int, data: bytes = b"") -> list[tuple[Opcode, bytes, bool]]:
    return [(Opcode.BINARY, data, False), *[(Opcode.CONT, data, False)] * count]


@pytest.mark.parametrize(
    ("frames", "code", "words", "limit"),
    [
        (continuations(5000), 1008, "frames at once; send each message in one frame", "frames"),
        ([(Opcode.PING, b"x", True)] * 5000, 1008, "frames at once", "frames"),
        ([(Opcode.PONG, b"x", True)] * 5000, 1008, "frames at once", "frames"),
        ([(Opcode.BINARY, b"", True)] * 300, 1008, "wait for each answer", "waiting"),
        (continuations(3), 1008, "a message must arrive within 0.5 s", "duration"),
        (continuations(30, bytes(5000)), 1009, "", "size"),
    ],
    ids=["continuations", "pings", "pongs", "requests", "slow", "large"],
)
def test_a_client_that_sends_more_than_it_may_is_closed_with_the_reason(
    frames: list[tuple[Opcode, bytes, bool]], code: int, words: str, limit: str
) -> None:
    limits = MessageLimits(size=100_000, duration=0.5)
    with serving(WaitingSession, limits=limits) as (port, _), Client(port=port) as other:
        client = raw_client(port)
        if limit == "waiting":
            client.send(pack({"seconds": 20}))
        send_frames(client, frames)
        with closed_with(code, words):
            receive_until_closed(client)
        assert f'jidm_rejected_total{{why="{limit}"}} 1.0' in metrics(port)
        assert other.infer({}) == {"done": 1}


def test_a_flood_that_never_ends_is_cut_off() -> None:
    """Also if the client neither reads the close nor disconnects."""
    flood = b"".join(Frame(*frame).serialize(mask=True) for frame in continuations(20_000)[1:])
    with serving(WaitingSession) as (port, _):
        client = raw_client(port)
        send_frames(client, continuations(1))
        began = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - began < 20:
                client.socket.sendall(flood)
        wait_for(lambda: "jidm_clients 0.0" in metrics(port))


def test_a_message_in_some_frames_and_many_messages_one_after_another_are_served() -> None:
    with serving(WaitingSession, limits=MessageLimits(frames=60, duration=5)) as (port, _):
        client = raw_client(port)
        data = pack({"seconds": 0})
        for _ in range(3):
            client.send(data[k : k + 1] for k in range(len(data)))
            assert isinstance(client.recv(timeout=20), bytes)
        for _ in range(500):
            client.send(data)
            assert isinstance(client.recv(timeout=20), bytes)
        client.close()


def test_silent_connections_push_out_one_another_not_clients(caplog: pytest.LogCaptureFixture) -> None:
    with serving(WaitingSession) as (port, _), Client(port=port) as client, ExitStack() as stack:
        for _ in range(_MAX_HANDSHAKES + 5):
            silent = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        oldest = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        del silent, oldest
        with Client(port=port) as newcomer:
            assert newcomer.infer({}) == client.infer({}) == {"done": 1}
        with socket.create_connection(("127.0.0.1", port)) as noisy:
            noisy.sendall(b"\x00\xff" * 500 + b"\r\n\r\n")
            noisy.settimeout(10)
            while noisy.recv(1000):
                pass
    assert not caplog.text


# ---- sessions that misbehave -----------------------------------------------------------------------------------------


class RaisingSession(WaitingSession):
    """Raises what its class is told to."""

    error: BaseException

    def handle(self, message: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        if message:
            raise self.error
        return {"done": 1}


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), StopIteration(), MemoryError()], ids=repr)
def test_no_error_of_a_session_stops_the_server(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RaisingSession, "error", error, raising=False)
    with serving(RaisingSession) as (port, _), Client(port=port) as client:
        with pytest.raises(ServerError, match=r"^internal error [0-9a-f]{8}; the server's log has details$"):
            client.infer({"raise": 1})
        assert client.infer({}) == {"done": 1}


def test_a_session_that_cannot_start_ends_its_connection_only() -> None:
    def make_session() -> Session:
        raise SystemExit(3)

    with serving(make_session) as (port, _):
        for _ in range(2):
            client = connect(f"ws://127.0.0.1:{port}", compression=None)
            with closed_with(1011, "internal error [0-9a-f]{8}"):
                client.recv(timeout=10)


def test_errors_are_one_short_line_of_printable_text(monkeypatch: pytest.MonkeyPatch) -> None:
    error = InputError("no \n key '\x1b[31m\u2028" + "x" * 100_000 + "'")
    monkeypatch.setattr(RaisingSession, "error", error, raising=False)
    with serving(RaisingSession) as (port, _):
        client = raw_client(port)
        client.send(pack({"raise": 1}))
        text = client.recv(timeout=10)
        assert isinstance(text, str) and text.isprintable() and text.startswith("no key '") and 100 < len(text) <= 300
        client.close()


def test_a_robot_that_reports_nan_is_refused_or_held() -> None:
    nan = np.full(ROBOT.n, np.nan)
    with serving() as (port, _), Client(port=port) as client:
        for name in ("state", "q"):
            with pytest.raises(ServerError, match="not finite"):
                client.infer({"image": float_picture(ROBOT.home), name: nan})
        client.infer(FIRST)
        for name in ("state", "q"):
            try:
                answer = client.infer({"image": float_picture(ROBOT.home), name: nan})
            except ServerError as error:
                assert "not finite" in str(error)
            else:
                assert answer["holding"].all() and "not finite" in answer["reason"]
                assert np.isfinite(answer["actions"]).all()
        assert np.isfinite(client.infer(FIRST)["actions"]).all()


# ---- stopping --------------------------------------------------------------------------------------------------------


def test_stopping_delivers_what_is_computed_and_refuses_what_waits() -> None:
    with serving(WaitingSession) as (port, server):
        clients = [raw_client(port) for _ in range(4)]
        clients[0].send(pack({"seconds": 0.5}))
        wait_for(lambda: WaitingSession.computed > 0)
        for client in clients[1:3]:
            client.send(pack({"seconds": 60}))
        wait_for(lambda: "jidm_queue 2.0" in metrics(port))
        began = time.monotonic()
    assert time.monotonic() - began < 5 and server.num_abandoned == 0
    assert isinstance(clients[0].recv(timeout=5), bytes)
    for client in clients[1:3]:
        assert "the server is stopping" in client.recv(timeout=5)
    for client in clients:
        with closed_with(1001, "the server stops"):
            client.recv(timeout=5)


def test_stopping_cancels_what_takes_too_long_and_abandons_what_cannot_be_cancelled() -> None:
    with serving(WaitingSession, workers=3) as (port, server):
        clients = [raw_client(port) for _ in range(2)]
        clients[0].send(pack({"seconds": 60}))
        clients[1].send(pack({"stuck": 7}))
        wait_for(lambda: "jidm_queue 0.0" in metrics(port) and WaitingSession.computed >= 2)
        silent = socket.create_connection(("127.0.0.1", port))
        began = time.monotonic()
    assert time.monotonic() - began < 5 and server.num_abandoned == 1
    assert "the server is stopping" in clients[0].recv(timeout=5)
    with pytest.raises(ConnectionClosed):
        clients[1].recv(timeout=5)
    silent.close()


STUCK_SERVER = """
import sys, time
from jidm.cli.serve import _run
from jidm.serving import PolicyServer, Session

class Stuck(Session):
    metadata = {}
    def __init__(self): pass
    def cancel(self): pass
    def handle(self, message):
        print("computing", flush=True)
        time.sleep(60)

sys.exit(_run(PolicyServer(Stuck, port=0), lambda port: print(port, flush=True)))
"""


def test_a_server_whose_threads_are_stuck_exits_in_time_with_status_0() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK_SERVER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        port = int(process.stdout.readline())
        client = raw_client(port)
        client.send(pack({}))
        assert process.stdout.readline() == "computing\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
        assert process.stderr.read() == "1 requests could not be stopped and were abandoned\n"
    finally:
        process.kill()
