"""A server under load and attack, in figures that have limits: others' latency, a newcomer's wait, exit, memory.

    python benchmarks/server_load.py panda-sim --rounds 3 --newcomers 8 --exits 3

Starts `jidm serve` as a process. Every client is a process of its own, attackers with low priority, for they stand for
other machines. What is compared is measured in turns, each attack right after a time without one:

- a client that sends frames at the video's rate, alone and beside each attack: p99 of a window, median over the rounds;
- a newcomer's time from connecting to its first answer, alone and right after 64 clients with long requests hung up;
- the server's memory before and after all that;
- the time from SIGTERM, with 64 clients whose long requests wait, to the end of the process.

Prints JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from results import add_save, row, rows, save

from jidm import load_embodiment
from jidm.serving import Client, pack

SIDE, RATE, CROWD = 128, 12.5, 64
SPAWN = multiprocessing.get_context("spawn")


def frames(count: int) -> Any:
    """A random image that is shifted from frame to frame: its content does not matter here."""
    picture = np.random.default_rng(0).integers(0, 255, (SIDE // 8, SIDE // 8, 3), dtype=np.uint8)
    image = np.kron(picture, np.ones((8, 8, 1), np.uint8))
    return np.stack([np.roll(image, k % 16, 1) for k in range(count)])


# ---- processes of clients: each takes orders through a pipe and answers each of them -----------------------------------


class Worker:
    """A process that calls a function of this file for each order."""

    def __init__(self, role: Callable[..., None], port: int) -> None:
        self._pipe, end = SPAWN.Pipe()
        self._process = SPAWN.Process(target=role, args=(port, end), daemon=True)
        self._process.start()

    def begin(self, *order: Any) -> None:
        self._pipe.send(order)

    def result(self, timeout: float = 120.0) -> Any:
        if not self._pipe.poll(timeout):
            raise TimeoutError("a client's process does not answer")
        return self._pipe.recv()

    def do(self, *order: Any) -> Any:
        self.begin(*order)
        return self.result()

    def end(self) -> None:
        self._process.kill()
        self._process.join()


def established(port: int, pipe: Connection) -> None:
    """Order: seconds. Answer: latency of each request [s]."""
    q = None
    with Client(port=port, timeout=60) as client:
        q = load_embodiment(client.metadata["embodiment"]).home
        client.reset(q)
        video, k = frames(16), 0
        for _ in range(10):
            client.infer({"image": video[0]})
        while True:
            (seconds,) = pipe.recv()
            latency, deadline = [], time.monotonic() + seconds
            while time.monotonic() < deadline:
                began = time.monotonic()
                answer = client.infer({"image": video[k % 16]})
                latency.append(time.monotonic() - began)
                assert np.isfinite(answer["actions"]).all()
                k += 1
                time.sleep(max(0.0, 1 / RATE - latency[-1]))
            pipe.send(latency)


def newcomer(port: int, pipe: Connection) -> None:
    """Order: nothing. Answer: time from connecting to the first answer [s]."""
    image = frames(1)[0]
    while True:
        pipe.recv()
        began = time.monotonic()
        with Client(port=port, timeout=60) as client:
            client.infer({"image": image})
            taken = time.monotonic() - began
        pipe.send(taken)


def crowd(port: int, pipe: Connection) -> None:
    """Orders: "ask" (64 clients send a long request each), then "hang up" or "listen". Answer: what they received."""
    from websockets.sync.client import connect

    os.nice(10)
    request = pack({"image": frames(64)})
    clients: list[Any] = []
    while True:
        (order,) = pipe.recv()
        received: dict[str, int] = {}
        if order == "ask":
            clients = [connect(f"ws://127.0.0.1:{port}", compression=None, open_timeout=60) for _ in range(CROWD)]
            for client in clients:
                client.recv(timeout=60)
            for client in clients:
                client.send(request)
        elif order == "hang up":
            for client in clients:
                client.socket.shutdown(socket.SHUT_RDWR)
        else:
            for client in clients:
                try:
                    said = client.recv(timeout=10)
                    what = "refused" if isinstance(said, str) else "answered"
                except Exception as error:
                    sent = getattr(error, "rcvd", None)
                    what = f"closed with {sent.code}" if sent is not None else "lost"
                received[what] = received.get(what, 0) + 1
        pipe.send(received)


def attack(port: int, pipe: Connection) -> None:
    """Order: name of an attack, seconds. Answer: how often it was repeated; the first answer says that it began."""
    os.nice(10)
    logging.getLogger("websockets").setLevel(logging.CRITICAL)
    while True:
        name, seconds = pipe.recv()
        deadline, counts = time.monotonic() + seconds, [0, 0]

        def repeat(k: int, name: str = name, deadline: float = deadline, counts: list[int] = counts) -> None:
            while time.monotonic() < deadline:
                counts[k] += 1
                with contextlib.suppress(Exception):  # the server cuts it off
                    ATTACKS[name](port, deadline)

        threads = [threading.Thread(target=repeat, args=(k,)) for k in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        pipe.send(sum(counts))


def open_raw(port: int) -> Any:
    from websockets.sync.client import connect

    client = connect(f"ws://127.0.0.1:{port}", compression=None, open_timeout=10, max_queue=1, ping_interval=None)
    client.recv(timeout=10)
    return client


def hang_ups(port: int, deadline: float) -> None:
    """Eight clients send a long request each and hang up."""
    request = pack({"image": frames(64)})
    clients = [open_raw(port) for _ in range(8)]
    for client in clients:
        client.send(request)
    for client in clients:
        client.socket.shutdown(socket.SHUT_RDWR)


def continuation_frames(port: int, deadline: float) -> None:
    """A message in endless empty frames."""
    client = open_raw(port)
    client.socket.sendall(b"\x02\x80" + bytes(4))
    while time.monotonic() < deadline:
        client.socket.sendall((b"\x00\x80" + bytes(4)) * 10_000)


def oversize_messages(port: int, deadline: float) -> None:
    """A message just below the limit, one above it, and one in parts that exceed it together."""
    client = open_raw(port)
    client.send(bytes(31 * 2**20))
    client.recv(timeout=10)
    parts = bytes(8 * 2**20)
    for message in (bytes(33 * 2**20), (parts for _ in range(5))):
        client = open_raw(port)
        with contextlib.suppress(Exception):
            client.send(message)
            client.recv(timeout=10)


def slow_readers(port: int, deadline: float) -> None:
    """Clients that ask all the time and read nothing."""
    clients = [open_raw(port) for _ in range(8)]
    request = pack({"image": frames(1)[0]})
    for client in clients:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    while time.monotonic() < deadline:
        for client in clients:
            client.send(request)
        time.sleep(0.05)


def bad_handshakes(port: int, deadline: float) -> None:
    """Noise, half a handshake, and a path with endless headers; the sockets stay open for a while."""
    opened = []
    for said in (
        b"\x00\xff" * 500 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nUpgrade: websocket\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 1000,
    ):
        opened.append(socket.create_connection(("127.0.0.1", port), timeout=5))
        with contextlib.suppress(OSError):
            opened[-1].sendall(said)
    time.sleep(0.01)


ATTACKS: dict[str, Callable[[int, float], None]] = {
    "hang-ups": hang_ups, "continuation frames": continuation_frames, "oversize messages": oversize_messages,
    "slow readers": slow_readers, "bad handshakes": bad_handshakes,
}  # fmt: skip


# ---- the server ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(checkpoint: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-m", "jidm.cli", "serve", "--checkpoint", checkpoint, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        yield process, int(re.search(r"127\.0\.0\.1:(\d+)", process.stdout.readline())[1])  # type: ignore[index]
    finally:
        process.kill()
        process.wait()


def memory(pid: int) -> float:
    """Resident [MiB]."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024  # type: ignore[index]


def measure_latency(port: int, rounds: int, seconds: float) -> dict[str, dict[str, list[float]]]:
    """Attack -> p99 of each window without it, p99 of each window with it [ms], and how often it was repeated."""
    client, attacker = Worker(established, port), Worker(attack, port)
    p99: dict[str, dict[str, list[float]]] = {name: {"alone": [], "beside": [], "repeated": []} for name in ATTACKS}
    try:
        for _ in range(rounds):
            for name, found in p99.items():
                found["alone"].append(1000 * float(np.percentile(client.do(seconds), 99)))
                attacker.begin(name, seconds + 1)
                time.sleep(0.5)
                found["beside"].append(1000 * float(np.percentile(client.do(seconds), 99)))
                found["repeated"].append(attacker.result())
                time.sleep(1)
    finally:
        client.end()
        attacker.end()
    return p99


def measure_newcomers(port: int, count: int) -> dict[str, list[float]]:
    """Time to a newcomer's first answer [ms], alone and after hang-ups."""
    late, many = Worker(newcomer, port), Worker(crowd, port)
    taken: dict[str, list[float]] = {"alone": [], "after hang-ups": []}
    try:
        late.do()
        for _ in range(count):
            taken["alone"].append(1000 * late.do())
            many.do("ask")
            many.do("hang up")
            taken["after hang-ups"].append(1000 * late.do())
            time.sleep(2)
    finally:
        late.end()
        many.end()
    return taken


def measure_exit(process: subprocess.Popen[str], port: int) -> dict[str, Any]:
    """Time from SIGTERM to the end [s], the exit status, and what the waiting clients received."""
    many = Worker(crowd, port)
    try:
        many.do("ask")
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        status = process.wait(600)
        return {"seconds": time.monotonic() - began, "status": status, "received": many.do("listen")}
    finally:
        many.end()


def figures(robot: str, report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the result."""
    made = []
    for name, found in report["p99 [ms]"].items():
        ratios = [b / a for a, b in zip(found["alone"], found["beside"], strict=True)]
        alone, beside = (statistics.median(found[key]) for key in ("alone", "beside"))
        made += rows(robot, "one_client", {"latency_p99": alone}, case=f"in turns with {name}")
        made += rows(robot, "one_client", {"latency_p99": beside}, case=f"beside {name}")
        made.append(
            row(
                robot,
                "one_client",
                "latency_over_alone",
                statistics.median(ratios),
                case=f"beside {name}",
                spread=(min(ratios), max(ratios)),
            )
        )
    taken = report["newcomer [ms]"]
    for case, values in taken.items():
        made.append(
            row(
                robot,
                "newcomer",
                "first_answer",
                statistics.median(values),
                case=case,
                spread=(min(values), max(values)),
            )
        )
    ratio = statistics.median(taken["after hang-ups"]) / statistics.median(taken["alone"])
    made += rows(robot, "newcomer", {"first_answer_over_alone": ratio}, case="after hang-ups")
    before, after = (report[f"memory {when} [MiB]"] for when in ("before", "after"))
    made += rows(robot, "server", {"memory": before}, case="before")
    made += rows(robot, "server", {"memory": after, "memory_growth": after - before}, case="after all attacks")
    exits = report["exits"]
    made += rows(
        robot, "server", {"exit_time": max(x["seconds"] for x in exits), "exit_status": max(abs(x["status"]) for x in exits)},
        case="SIGTERM, 64 long requests",
    )  # fmt: skip
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=12.0, help="length of a window")
    parser.add_argument("--newcomers", type=int, default=8)
    parser.add_argument("--exits", type=int, default=3)
    add_save(parser)
    args = parser.parse_args()
    report: dict[str, Any] = {"exits": []}
    with serving(args.checkpoint) as (process, port):
        with Client(port=port) as client:
            robot = client.metadata["embodiment"]
        measure_newcomers(port, 1)  # warm up: the first burst grows what Python and the C library keep
        time.sleep(3)
        report["memory before [MiB]"] = memory(process.pid)
        report["p99 [ms]"] = measure_latency(port, args.rounds, args.seconds)
        report["newcomer [ms]"] = measure_newcomers(port, args.newcomers)
        time.sleep(5)
        report["memory after [MiB]"] = memory(process.pid)
        report["exits"].append(measure_exit(process, port))
    for _ in range(args.exits - 1):
        with serving(args.checkpoint) as (process, port):
            report["exits"].append(measure_exit(process, port))
    print(json.dumps(report, indent=1))
    save(
        args.save, "server_load", figures(robot, report), raw=report,
        note="Server, clients and attackers on the same cores, beside another long computation.",
    )  # fmt: skip
