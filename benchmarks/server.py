"""A server among hostile clients, and among many: does it stay up, how much slower do others get, does its memory grow?

    python benchmarks/server.py panda-sim --messages 10000 --minutes 5

Starts `jidm serve` as a process of its own. First a well-behaved client alone; then beside attackers who send mutated
messages (flipped, cut and repeated bytes of good ones, objects, lying shapes, giant ranks, nested bombs, huge frames,
NaN images), leave sockets half open, or do not read; then 16 clients for some minutes. Attackers are a process of
their own with low priority, for they stand for other machines. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from results import add_save, rows, save

from jidm import load_embodiment
from jidm.serving import Client, pack

SIDE, RATE = 128, 12.5


def frames(seed: int) -> Any:
    """A random image that is shifted from frame to frame: its content does not matter here."""
    picture = np.random.default_rng(seed).integers(0, 255, (SIDE // 8, SIDE // 8, 3), dtype=np.uint8)
    return np.kron(picture, np.ones((8, 8, 1), np.uint8))


class WellBehavedClient(threading.Thread):
    """A client that sends a frame at the video's rate and waits for its answer."""

    def __init__(self, port: int, q: Any, seed: int, deadline: float) -> None:
        super().__init__()
        self.port, self.q, self.frame, self.deadline = port, q, frames(seed), deadline
        self.latency: list[float] = []
        self.errors: list[str] = []

    def run(self) -> None:
        try:
            with Client(port=self.port, timeout=60) as client:
                client.reset(self.q)
                k = 0
                while time.monotonic() < self.deadline:
                    began = time.monotonic()
                    answer = client.infer({"image": np.roll(self.frame, k % 16, 1)})
                    self.latency.append(time.monotonic() - began)
                    if not np.isfinite(answer["actions"]).all():
                        self.errors.append("not finite")
                    k += 1
                    time.sleep(max(0.0, 1 / RATE - self.latency[-1]))
        except Exception as error:
            self.errors.append(f"{type(error).__name__}: {error}")


def mutate_message(rng: np.random.Generator, good: list[bytes]) -> bytes:
    """A message that means no good."""
    message = bytearray(good[rng.integers(len(good))])
    kind = rng.integers(9)
    if kind == 0:
        for _ in range(rng.integers(1, 20)):
            message[rng.integers(len(message))] = rng.integers(256)
    elif kind == 1:
        del message[rng.integers(len(message)) :]
    elif kind == 2:
        at = rng.integers(min(200, len(message)))
        message[at:at] = rng.bytes(int(rng.integers(1, 50)))
    elif kind == 3:
        message = message.replace(b"|u1", [b"|O8", b"<c8", b"<f8", b"|V8"][rng.integers(4)])
    elif kind == 4:
        message = bytearray(bytes([0x91 + rng.integers(15)]) * int(rng.integers(100, 20_000)))
    elif kind == 5:
        message = bytearray(b"\xdd\xff\xff\xff\xff" + rng.bytes(20))
    elif kind == 6:
        message = bytearray(pack({"image": np.full((8, 8, 3), np.nan, np.float32), "q": np.full(8, np.nan)}))
    elif kind == 7:
        message = bytearray(pack({"image": np.zeros((1,) * 6 + (3,), np.uint8)}))
    else:
        message = bytearray(b"\xdc\x10\x00" + b"\x90" * 4096)
    return bytes(message)


class Attacker(threading.Thread):
    """Sends so many mutated messages, opening a new connection whenever it is thrown out."""

    def __init__(self, port: int, count: int, seed: int) -> None:
        super().__init__()
        self.port, self.count, self.rng = port, count, np.random.default_rng(seed)
        self.sent = self.refused = self.disconnected = 0

    def run(self) -> None:
        from websockets.sync.client import connect

        good = [
            pack({"image": frames(1)}),
            pack({"obs": [{"cam": frames(2)}]}),
            pack({"endpoint": "observe", "q": [0.0] * 8}),
        ]
        raw = None
        while self.sent < self.count:
            try:
                if raw is None:
                    raw = connect(f"ws://127.0.0.1:{self.port}", compression=None, max_size=None)
                    raw.recv(timeout=60)
                message = mutate_message(self.rng, good)
                self.sent += 1
                if self.sent % 500 == 0:
                    message = bytes(33 * 2**20)  # larger than the server takes
                raw.send(message)
                self.refused += isinstance(raw.recv(timeout=60), str)
            except Exception:
                self.disconnected += 1
                raw = None
                time.sleep(0.02)


class IdleConnections(threading.Thread):
    """Half-open sockets, and clients that ask and do not read."""

    def __init__(self, port: int, stop: threading.Event) -> None:
        super().__init__()
        self.port, self.stop = port, stop

    def run(self) -> None:
        from websockets.sync.client import connect

        connections: list[Any] = []
        while not self.stop.is_set():
            with suppress(Exception):
                connections.append(socket.create_connection(("127.0.0.1", self.port), timeout=5))
                connections[-1].sendall(b"GET / HTTP/1.1\r\nUpgrade: websocket\r\n")
            with suppress(Exception):
                connections.append(connect(f"ws://127.0.0.1:{self.port}", compression=None, max_queue=1))
                for _ in range(20):
                    connections[-1].send(pack({"image": frames(3)}))
            self.stop.wait(2)
            while len(connections) > 10:
                with suppress(Exception):
                    connections.pop(0).close()


def attack(port: int, messages: int, results: Any) -> None:
    """All of them at once, until so many messages are sent; runs in a process of its own."""
    os.nice(10)
    logging.getLogger("websockets").setLevel(logging.CRITICAL)  # clients that do not read are pinged in vain
    stop = threading.Event()
    attackers = [Attacker(port, messages // 2, seed) for seed in range(2)]
    idle = IdleConnections(port, stop)
    for thread in (idle, *attackers):
        thread.start()
    for attacker in attackers:
        attacker.join()
    stop.set()
    idle.join()
    results.put({k: sum(getattr(x, k) for x in attackers) for k in ("sent", "refused", "disconnected")})


def memory(pid: int) -> float:
    """Resident [MiB]."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024  # type: ignore[index]


def percentiles(threads: list[WellBehavedClient]) -> dict[str, float]:
    values = np.concatenate([np.array(thread.latency) for thread in threads]) * 1000
    return {
        "p50": round(float(np.percentile(values, 50)), 1),
        "p99": round(float(np.percentile(values, 99)), 1),
        "answers": len(values),
    }


def figures(robot: str, report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the result."""

    def latency(found: dict[str, float]) -> dict[str, float | None]:
        return {"latency_p50": found["p50"], "latency_p99": found["p99"], "answers": found["answers"]}

    alone, beside, many = (report[key] for key in ("alone [ms]", "beside attackers [ms]", "16 clients [ms]"))
    attacked = {"latency_over_alone": beside["p99"] / alone["p99"], "errors": len(report["errors of the one beside"])}
    made = [
        *rows(robot, "one_client", latency(alone), case="alone, 12.5 frames per second"),
        *rows(robot, "one_client", latency(beside) | attacked, case="beside attackers"),
        *rows(robot, "sixteen_clients", latency(many) | {"errors": len(report["their errors"])}, case="at once"),
    ]
    for when, key in (("before", "before"), ("after the attack", "after"), ("in the end", "in the end")):
        made += rows(robot, "server", {"memory": report[f"memory {key} [MiB]"]}, case=when)
    made += rows(robot, "server", {"exit_status": report["exit status"]}, case="in the end")
    sent = report["mutated messages"]
    for case, key in (("sent", "sent"), ("refused", "refused"), ("ended a connection", "disconnected")):
        made += rows(robot, "attackers", {"messages": sent[key]}, case=case)
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=5.0)
    add_save(parser)
    args = parser.parse_args()
    command = [sys.executable, "-m", "jidm.cli", "serve", "--checkpoint", args.checkpoint, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    port = int(re.search(r"127\.0\.0\.1:(\d+)", server.stdout.readline())[1])  # type: ignore[index]
    with Client(port=port) as client:
        robot = load_embodiment(client.metadata["embodiment"])
    report: dict[str, Any] = {}
    try:
        alone = WellBehavedClient(port, robot.home, 0, time.monotonic() + 30)
        alone.start()
        alone.join()
        report["alone [ms]"], report["memory before [MiB]"] = percentiles([alone]), round(memory(server.pid))
        queue: Any = multiprocessing.get_context("spawn").Queue()
        attackers = multiprocessing.get_context("spawn").Process(target=attack, args=(port, args.messages, queue))
        beside = WellBehavedClient(port, robot.home, 0, float("inf"))
        attackers.start()
        beside.start()
        mutated_messages = queue.get()
        beside.deadline = 0.0
        beside.join()
        attackers.join(10)
        attackers.kill()
        report["beside attackers [ms]"] = percentiles([beside])
        report["errors of the one beside"] = beside.errors
        report["mutated messages"] = mutated_messages
        report["memory after [MiB]"] = round(memory(server.pid))
        many = [WellBehavedClient(port, robot.home, seed, time.monotonic() + 60 * args.minutes) for seed in range(16)]
        for thread in many:
            thread.start()
        for thread in many:
            thread.join()
        report["16 clients [ms]"], report["their errors"] = (
            percentiles(many),
            [e for thread in many for e in thread.errors],
        )
        report["memory in the end [MiB]"] = round(memory(server.pid))
        report["up"] = urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz").read() == b"OK\n"
    finally:
        server.terminate()
        report["exit status"] = server.wait(30)
    print(json.dumps(report, indent=1))
    save(
        args.save,
        "server",
        figures(robot.name, report),
        raw=report,
        note="Server, clients and attackers on the same cores.",
    )
