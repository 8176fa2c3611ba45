"""The server against clients of both dialects, and against those that mean no good."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
from test_decoder import ROBOT, decoder, motion, picture
from test_server_codec import array, mapping, text

from jidm.errors import InputError
from jidm.serving import Client, Handshake, MessageLimits, PolicyServer, ServerError, Session, pack
from jidm.serving.lingbot_format import LingBotFormat

connect = pytest.importorskip("websockets.sync.client").connect
pytest.importorskip("prometheus_client")


def session(contract: Handshake | None = None, **given: object) -> Session:
    return Session(decoder(**given), contract or Handshake())


@contextmanager
def serving(make: Callable[[], Session] = session, **given: object) -> Iterator[tuple[int, PolicyServer]]:
    """A server in a thread: its port and itself."""
    server = PolicyServer(make, port=0, **given)  # type: ignore[arg-type]
    started, ports, stops = threading.Event(), [], []

    def run() -> None:
        async def main() -> None:
            stop = asyncio.Event()
            stops.append(partial(asyncio.get_running_loop().call_soon_threadsafe, stop.set))

            def told(port: int) -> None:
                ports.append(port)
                started.set()

            await server.serve(stop, told)

        asyncio.run(main())

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(20)
    try:
        yield ports[0], server
    finally:
        stops[0]()
        thread.join(20)
        assert not thread.is_alive()


def bytes_of(q: np.ndarray) -> np.ndarray:
    return picture(q).astype(np.float32)


# ---- what is told first ----------------------------------------------------------------------------------------------


def test_the_handshake_says_what_numbers_mean() -> None:
    with serving() as (port, _), Client(port=port) as client:
        told = client.metadata
    assert told["protocol"] == "jidm" and told["protocol_version"] == 1
    assert told["action_space"] == "joint_velocity" and told["normalised"] is False
    assert told["action_names"] == list(ROBOT.joint_names) and told["action_dim"] == ROBOT.n
    assert told["action_units"] == ["rad/s"] * 7 + ["m/s"]
    assert (told["control_dt"], told["video_dt"]) == (0.02, 0.08)
    assert told["embodiment"] == "panda" and told["embodiment_hash"] == ROBOT.content_hash


# ---- openpi ----------------------------------------------------------------------------------------------------------


def test_openpis_messages_are_served() -> None:
    """Bytes by an encoder of the test's own; every array of the answer is indexed by time as openpi's chunk broker does."""
    q = motion()
    with serving() as (port, _), connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None) as raw:
        raw.recv()
        rows = []
        for k, x in enumerate(q[:6]):
            state = array(q[0].astype("<f8").tobytes(), "<f8", (ROBOT.n,))
            image = array(bytes_of(x).tobytes(), "<f4", (8, 12, 3))
            raw.send(
                mapping(text("observation/image"), image, text("observation/state"), state, text("prompt"), text("go"))
            )
            answer = _unpacked(raw.recv())
            arrays = {name: value for name, value in answer.items() if isinstance(value, np.ndarray)}
            assert {len(value) for value in arrays.values()} == {4}
            assert all(value[3, ...] is not None for value in arrays.values())
            assert answer["server_timing"]["infer_ms"] > 0 and ("prev_total_ms" in answer["server_timing"]) == (k > 0)
            assert answer["held"].all() == (k == 0) and bool(answer["reason"]) == (k == 0)
            rows.append(answer["actions"])
    ours = decoder()
    ours.reset(q[0])
    ours.push(bytes_of(q[0]))
    ours.hold(4)
    alone = [ours.push(bytes_of(x)).action for x in q[1:6]]
    np.testing.assert_allclose(np.concatenate(rows[1:]), np.concatenate(alone), atol=1e-9)
    assert np.abs(rows[-1]).max() > 0.01


def _unpacked(message: bytes | str) -> dict[str, object]:
    from jidm.serving import unpack

    assert isinstance(message, bytes), message
    return unpack(message)  # type: ignore[no-any-return]


def test_a_whole_dream_in_one_message() -> None:
    q = motion()
    with serving(partial(session, action_space="joint_position")) as (port, _), Client(port=port) as client:
        client.reset(q[0])
        answer = client.infer({"video": np.stack([bytes_of(x) for x in q])})
        assert answer["actions"].shape == (4 * (len(q) - 1), ROBOT.n)
        np.testing.assert_allclose(answer["actions"][-1], q[-1], atol=0.05)
        client.reset(q[5])
        again = client.infer({"video": np.stack([bytes_of(x) for x in q[5:9]])})
        np.testing.assert_allclose(again["position"][0], q[5], atol=0.05)


def test_positions_are_refused_until_the_robot_is_known() -> None:
    with serving(partial(session, action_space="joint_position")) as (port, _), Client(port=port) as client:
        with pytest.raises(ServerError, match="where the robot is"):
            client.infer({"image": bytes_of(ROBOT.home)})
        assert len(client.infer({"image": bytes_of(ROBOT.home), "state": ROBOT.home})["actions"]) == 4


def test_what_the_robot_measured_is_taken() -> None:
    q = motion()
    with serving() as (port, _), Client(port=port) as client:
        client.infer({"image": bytes_of(q[0]), "q": q[0]})
        answer = client.infer({"image": bytes_of(q[1])})
        off = client.infer({"endpoint": "observe", "q": answer["position"][-1] + 0.05})
        np.testing.assert_allclose(off["furthest"], [0.05])


def test_views_are_named_where_there_are_several() -> None:
    two = {"cam_high": bytes_of(ROBOT.home), "cam_wrist": bytes_of(ROBOT.home), "state": ROBOT.home}
    with serving() as (port, _), Client(port=port) as client:
        with pytest.raises(ServerError, match="cam_high, cam_wrist"):
            client.infer(two)
        with pytest.raises(ServerError, match="pictures in the request: none"):
            client.infer({"state": ROBOT.home})
    with serving(partial(session, Handshake(image_key="cam_high"))) as (port, _), Client(port=port) as client:
        assert len(client.infer(two)["actions"]) == 4


# ---- LingBot-VA ------------------------------------------------------------------------------------------------------


def test_lingbots_three_messages() -> None:
    q = motion()
    views = ("observation.images.cam_high", "observation.images.cam_left_wrist")
    contract = Handshake(image_key=views[0], layout="lingbot_va", side="right")
    format_ = LingBotFormat(ROBOT, layout="lingbot_va", side="right")

    def frames(rows: np.ndarray) -> list[dict[str, np.ndarray]]:
        return [{views[0]: bytes_of(x), views[1]: bytes_of(x) * 0, "observation.state": x} for x in rows]

    with serving(partial(session, contract)) as (port, _), Client(port=port) as client:
        assert client.metadata["layout"] == "lingbot_va"
        assert client.infer({"reset": True, "prompt": "stack the cups", "q": q[0]}) == {}
        first = client.infer({"obs": frames(q[:4]), "prompt": "stack the cups"})
        assert first["action"].shape == (8, 4, 4)  # pose, gripper; frames; actions a frame
        np.testing.assert_allclose(
            first["action"][:, 0], np.repeat([[0], [0], [0], [0], [0], [0], [1], [(q[0][7]) / 0.04]], 4, 1), atol=1e-3
        )
        second = client.infer({"obs": frames(q[4:8]), "prompt": "stack the cups"})
        expected = format_.pack(np.stack([q[0], q[7]]))[1, format_.end_effector_channels]
        np.testing.assert_allclose(second["action"][:, -1, -1], expected, atol=0.02)
        assert client.infer({"obs": frames(q[:8]), "compute_kv_cache": True, "state": second["action"]}) == {}
        third = client.infer({"obs": frames(q[8:12]), "prompt": "stack the cups"})
        jump = np.abs(third["action"][:3, 0, 0] - second["action"][:3, -1, -1]).max()
        assert third["action"].shape == (8, 4, 4) and jump < 0.05


def test_a_single_first_frame_is_answered_by_no_motion() -> None:
    with (
        serving(partial(session, Handshake(layout="lingbot_va", side="left"))) as (port, _),
        Client(port=port) as client,
    ):
        client.infer({"reset": True})
        action = client.infer({"obs": {"cam": bytes_of(ROBOT.home)}, "prompt": ""})["action"]
    assert action.shape == (8, 1, 4) and not action[:3].any()


def test_a_layout_is_named_by_somebody() -> None:
    obs = {"cam": bytes_of(ROBOT.home)}
    with serving() as (port, _), Client(port=port) as client:
        with pytest.raises(ServerError, match="name the layout"):
            client.infer({"obs": obs})
        with pytest.raises(ServerError, match="name the side"):
            client.infer({"obs": obs, "layout": "lingbot_va"})
        assert client.infer({"obs": obs, "layout": "paper_per_arm", "side": "left"})["action"].shape == (8, 1, 4)
    for made, more, words in (
        (partial(session, Handshake(layout="lingbot_va")), {"layout": "lingbot_vla"}, "asks for 'lingbot_vla'"),
        (
            partial(session, Handshake(layout="lingbot_va"), control_rate=30.0),
            {"side": "left"},
            "multiple of the video's",
        ),
    ):
        with serving(made) as (port, _), Client(port=port) as client, pytest.raises(ServerError, match=words):
            client.infer({"obs": obs, **more})


# ---- who does not behave ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        b"", b"\xc1", b"\x91" * 3000, pack([1, 2]), pack({"endpoint": "reload"}), pack({"obs": 3}), pack({"obs": []}),
        pack({"image": np.zeros((0, 0, 3))}), pack({"image": np.zeros((2, 2, 3)), "q": "x"}), pack({"endpoint": "observe"}),
        pack({"image": np.zeros((65, 2, 2, 3))}), pack({"endpoint": "reset", "q": np.full(8, np.nan)}),
        pack({"obs": [{"a": np.zeros((2, 2, 3))}, {"a": np.zeros((3, 3, 3))}], "layout": "lingbot_va", "side": "left"}),
    ],
)  # fmt: skip
def test_what_cannot_be_understood_is_told_in_one_line_and_the_session_goes_on(message: bytes) -> None:
    with serving() as (port, _), connect(f"ws://127.0.0.1:{port}", compression=None) as raw:
        raw.recv()
        raw.send(message)
        told = raw.recv()
        assert isinstance(told, str) and 0 < len(told) < 400 and "\n" not in told and "Traceback" not in told
        raw.send(pack({"image": bytes_of(ROBOT.home), "state": ROBOT.home}))
        assert isinstance(raw.recv(), bytes)


def test_a_nan_picture_is_held_not_refused() -> None:
    with serving() as (port, _), Client(port=port) as client:
        client.infer({"image": bytes_of(ROBOT.home), "state": ROBOT.home})
        answer = client.infer({"image": bytes_of(ROBOT.home) * np.float32(np.nan)})
        assert answer["held"].all() and answer["reason"] and np.isfinite(answer["actions"]).all()


def test_an_error_inside_is_not_shown_outside(caplog: pytest.LogCaptureFixture) -> None:
    broken = session()
    broken.handle = lambda message: 1 / 0  # type: ignore[assignment, method-assign]
    says = pytest.raises(ServerError, match=r"internal error [0-9a-f]{8}; the server")
    with serving(lambda: broken) as (port, _), Client(port=port) as client, says as error:
        client.infer({})
    assert "ZeroDivision" not in str(error.value) and "ZeroDivision" in caplog.text


def test_too_large_a_message_ends_that_connection_alone() -> None:
    with serving(limits=MessageLimits(size=10_000)) as (port, server), Client(port=port) as other:
        with Client(port=port) as client, pytest.raises(ServerError):
            client.infer({"image": np.zeros((100, 100, 3), np.uint8)})
        assert len(other.infer({"image": bytes_of(ROBOT.home), "state": ROBOT.home})["actions"]) == 4
        assert b'jidm_rejected_total{why="size"} 1.0' in server.metrics.text()


def test_sessions_do_not_see_each_other() -> None:
    q = motion()
    with serving() as (port, _), Client(port=port) as one, Client(port=port) as two:
        for client, start in ((one, q[0]), (two, q[20])):
            client.reset(start)
            client.infer({"image": bytes_of(start)})
        a, b = (c.infer({"image": bytes_of(x)})["position"][-1] for c, x in ((one, q[1]), (two, q[21])))
    np.testing.assert_allclose(a, q[1], atol=0.05)
    np.testing.assert_allclose(b, q[21], atol=0.05)
    assert np.abs(a - b).max() > 0.1


def test_a_token_is_asked_for() -> None:
    with serving(token="s3cret") as (port, server):
        for wrong in (None, "s3cre", "s3cret2", "ü"):
            with pytest.raises(ServerError, match=r"no server answers|401"):
                Client(port=port, token=wrong)
        with Client(port=port, token="s3cret") as client:
            assert client.metadata["protocol"] == "jidm"
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz").read() == b"OK\n"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics")
        assert b'why="token"} 5.0' in server.metrics.text()
    with pytest.raises(InputError, match="empty"):
        PolicyServer(session, token=" ")


def test_health_and_metrics() -> None:
    with serving() as (port, _), Client(port=port) as client:
        client.infer({"image": bytes_of(ROBOT.home), "state": ROBOT.home})
        with pytest.raises(ServerError):
            client.infer({})
        told = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    assert 'jidm_request_seconds_count{kind="answered"} 1.0' in told
    assert 'jidm_request_seconds_count{kind="refused"} 1.0' in told
    assert "jidm_clients 1.0" in told and "jidm_queue 0.0" in told and 'jidm_rejected_total{why="message"} 1.0' in told


def test_only_so_many_clients() -> None:
    with serving(most_clients=2) as (port, _), Client(port=port), Client(port=port) as second:
        with pytest.raises(ServerError, match="503"):
            Client(port=port)
        assert len(second.infer({"image": bytes_of(ROBOT.home), "state": ROBOT.home})["actions"]) == 4


def test_half_open_sockets_and_nonsense_do_not_stop_it() -> None:
    with serving() as (port, _):
        silent = socket.create_connection(("127.0.0.1", port))
        noisy = socket.create_connection(("127.0.0.1", port))
        noisy.sendall(b"\x00\xff" * 500 + b"\r\n\r\n")
        with Client(port=port) as client:
            assert len(client.infer({"image": bytes_of(ROBOT.home), "state": ROBOT.home})["actions"]) == 4
        silent.close()
        noisy.close()


class Waiting:
    """A session that refuses, takes its time, or computes until it is let go, as it is told."""

    metadata: dict[str, object] = {}  # noqa: RUF012

    def __init__(self, go: threading.Event, computing: list[int]) -> None:
        self._go, self._computing = go, computing

    def answer(self, message: dict[str, str]) -> dict[str, int]:
        if message["say"] == "refuse":
            raise InputError("refused")
        if message["say"] == "soon":
            time.sleep(0.2)
        if message["say"] == "wait":
            self._computing.append(os.nice(0))
            self._go.wait(20)
        return {"done": 1}


@pytest.mark.parametrize("before", [(), ("refuse",), ("soon", "soon", "soon")], ids=["new", "refused", "asks on"])
@pytest.mark.parametrize("remembered", [10.0, 0.0])
def test_who_misbehaves_never_takes_all_workers(
    before: tuple[str, ...], remembered: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jidm.serving.server._REMEMBERED", remembered)
    go, computing = threading.Event(), []
    with serving(lambda: Waiting(go, computing), workers=2) as (port, _), Client(port=port, timeout=3) as good:
        good.infer({"say": "nothing"})
        others = [connect(f"ws://127.0.0.1:{port}", compression=None) for _ in range(3)]
        try:
            for other in others:
                other.recv()
                for say in before:
                    other.send(pack({"say": say}))
                for _ in before:
                    other.recv()
            for other in others:
                other.send(pack({"say": "wait"}))
            give_up = time.monotonic() + 10
            while not computing and time.monotonic() < give_up:
                time.sleep(0.01)
            if remembered or not before:
                assert good.infer({"say": "nothing"}) == {"done": 1}
                assert len(computing) == 1
                if sys.platform == "linux":
                    assert computing[0] == min(19, os.nice(0) + 10)
            else:  # what is forgotten does not count: they take both
                with pytest.raises(ServerError, match="no answer"):
                    good.infer({"say": "nothing"})
                assert len(computing) == 2
        finally:
            go.set()
            for other in others:
                other.close()


def test_stopping_finishes_what_is_under_way_and_says_goodbye() -> None:
    from websockets.exceptions import ConnectionClosedOK

    with serving() as (port, _):
        raw = connect(f"ws://127.0.0.1:{port}", compression=None)
        raw.recv()
    with pytest.raises(ConnectionClosedOK) as closed:
        raw.recv(timeout=5)
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001
    with pytest.raises(ServerError, match="no server answers"):
        Client(port=port, timeout=2)


def test_a_port_that_is_taken_is_told() -> None:
    with serving() as (port, _), pytest.raises(InputError, match="cannot listen"):
        PolicyServer(session, port=port).run()
