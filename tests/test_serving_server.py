"""The server with clients of both protocols, and with misbehaving and hostile ones."""

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
from test_control_decoder import ROBOT, make_decoder, motion, picture
from test_serving_codec import array, mapping, text

from jidm.errors import InputError
from jidm.serving import Client, Handshake, MessageLimits, PolicyServer, ServerError, Session, pack
from jidm.serving.lingbot_format import LingBotFormat

connect = pytest.importorskip("websockets.sync.client").connect
pytest.importorskip("prometheus_client")


def session(handshake: Handshake | None = None, **settings: object) -> Session:
    return Session(make_decoder(**settings), handshake or Handshake())


@contextmanager
def serving(make_session: Callable[[], Session] = session, **settings: object) -> Iterator[tuple[int, PolicyServer]]:
    """A server in a thread: its port and itself."""
    server = PolicyServer(make_session, port=0, **settings)  # type: ignore[arg-type]
    started, ports, stops = threading.Event(), [], []

    def run() -> None:
        async def main() -> None:
            stop = asyncio.Event()
            stops.append(partial(asyncio.get_running_loop().call_soon_threadsafe, stop.set))

            def on_started(port: int) -> None:
                ports.append(port)
                started.set()

            await server.serve(stop, on_started)

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


def float_picture(q: np.ndarray) -> np.ndarray:
    return picture(q).astype(np.float32)


# ---- handshake -------------------------------------------------------------------------------------------------------


def test_the_handshake_describes_inputs_and_outputs() -> None:
    decoder = make_decoder()
    decoder.idm.checkpoint = {"source": "/home/someone/checkpoints/panda", "content_hash": "0" * 64}
    with serving(lambda: Session(decoder, Handshake())) as (port, _), Client(port=port) as client:
        metadata = client.metadata
    assert metadata["checkpoint"] == "panda" and metadata["content_hash"] == "0" * 64
    assert "someone" not in str(metadata)
    assert metadata["protocol"] == "jidm" and metadata["protocol_version"] == 2
    assert metadata["action_space"] == "joint_velocity" and metadata["normalized"] is False
    assert metadata["action_names"] == list(ROBOT.joint_names) and metadata["action_dim"] == ROBOT.n
    assert metadata["action_units"] == ["rad/s"] * 7 + ["m/s"]
    assert (metadata["control_dt"], metadata["video_dt"]) == (0.02, 0.08)
    assert metadata["embodiment"] == "panda" and metadata["embodiment_hash"] == ROBOT.content_hash


# ---- openpi ----------------------------------------------------------------------------------------------------------


def test_openpis_messages_are_served() -> None:
    """Bytes from the test's own encoder; every array of the answer is indexed by time, as openpi's chunk broker does."""
    q = motion()
    with serving() as (port, _), connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None) as raw:
        raw.recv()
        rows, where = [], q[0]
        for k, x in enumerate(q[:6]):
            state = array(where.astype("<f8").tobytes(), "<f8", (ROBOT.n,))
            image = array(float_picture(x).tobytes(), "<f4", (8, 12, 3))
            raw.send(
                mapping(text("observation/image"), image, text("observation/state"), state, text("prompt"), text("go"))
            )
            answer = _unpacked(raw.recv())
            arrays = {name: value for name, value in answer.items() if isinstance(value, np.ndarray)}
            assert {len(value) for value in arrays.values()} == {4}
            assert all(value[3, ...] is not None for value in arrays.values())
            assert answer["server_timing"]["infer_ms"] > 0 and ("prev_total_ms" in answer["server_timing"]) == (k > 0)
            assert answer["holding"].all() == (k == 0) and bool(answer["reason"]) == (k == 0)
            rows.append(answer["actions"])
            where = answer["position"][-1]
    ours = make_decoder()
    ours.reset(q[0])
    ours.push(float_picture(q[0]))
    ours.trajectory.hold(4)
    alone = [ours.push(float_picture(x)).action for x in q[1:6]]
    np.testing.assert_allclose(np.concatenate(rows[1:]), np.concatenate(alone), atol=1e-9)
    assert np.abs(rows[-1]).max() > 0.01


def _unpacked(message: bytes | str) -> dict[str, object]:
    from jidm.serving import unpack

    assert isinstance(message, bytes), message
    return unpack(message)  # type: ignore[no-any-return]


def test_a_whole_generated_video_in_one_message() -> None:
    q = motion()
    with serving(partial(session, action_space="joint_position")) as (port, _), Client(port=port) as client:
        client.reset(q[0])
        answer = client.infer({"video": np.stack([float_picture(x) for x in q])})
        assert answer["actions"].shape == (4 * (len(q) - 1), ROBOT.n)
        np.testing.assert_allclose(answer["actions"][-1], q[-1], atol=0.05)
        client.reset(q[5])
        again = client.infer({"video": np.stack([float_picture(x) for x in q[5:9]])})
        np.testing.assert_allclose(again["position"][0], q[5], atol=0.05)


def test_positions_are_refused_until_the_robot_is_known() -> None:
    with serving(partial(session, action_space="joint_position")) as (port, _), Client(port=port) as client:
        with pytest.raises(ServerError, match="where the robot is"):
            client.infer({"image": float_picture(ROBOT.home)})
        assert len(client.infer({"image": float_picture(ROBOT.home), "state": ROBOT.home})["actions"]) == 4


def test_the_servers_initial_pose_holds_for_every_episode() -> None:
    one = Session(make_decoder(action_space="joint_position"), Handshake(), q0=ROBOT.home)
    for _ in range(2):
        answer = one.handle({"image": float_picture(motion()[5])})
        np.testing.assert_allclose(answer["actions"][-1], ROBOT.home, atol=1e-9)
        one.handle({"endpoint": "reset", "q": motion()[5]})
        np.testing.assert_allclose(one.decoder.trajectory.position, motion()[5])
        one.handle({"endpoint": "reset"})


def test_measured_positions_are_used() -> None:
    q = motion()
    with serving() as (port, _), Client(port=port) as client:
        client.infer({"image": float_picture(q[0]), "q": q[0]})
        answer = client.infer({"image": float_picture(q[1])})
        observed = client.infer({"endpoint": "observe", "q": answer["position"][-1] - 0.01})
        np.testing.assert_allclose(observed["tracking_error"], [0.01])


def test_the_image_key_is_needed_where_there_are_several_images() -> None:
    two = {"cam_high": float_picture(ROBOT.home), "cam_wrist": float_picture(ROBOT.home), "state": ROBOT.home}
    with serving() as (port, _), Client(port=port) as client:
        with pytest.raises(ServerError, match="cam_high, cam_wrist"):
            client.infer(two)
        with pytest.raises(ServerError, match="images in the request: none"):
            client.infer({"state": ROBOT.home})
    with serving(partial(session, Handshake(image_key="cam_high"))) as (port, _), Client(port=port) as client:
        assert len(client.infer(two)["actions"]) == 4
        with pytest.raises(ServerError, match="no image 'cam_high'"):
            client.infer({"cam_low": two["cam_high"]})


# ---- LingBot-VA ------------------------------------------------------------------------------------------------------


def test_lingbots_three_messages() -> None:
    q = motion()
    views = ("observation.images.cam_high", "observation.images.cam_left_wrist")
    handshake = Handshake(image_key=views[0], layout="lingbot_va", side="right")
    format_ = LingBotFormat(ROBOT, layout="lingbot_va", side="right")

    def frames(rows: np.ndarray) -> list[dict[str, np.ndarray]]:
        return [{views[0]: float_picture(x), views[1]: float_picture(x) * 0, "observation.state": x} for x in rows]

    with serving(partial(session, handshake)) as (port, _), Client(port=port) as client:
        assert client.metadata["layout"] == "lingbot_va"
        assert client.infer({"reset": True, "prompt": "stack the cups", "q": q[0]}) == {}
        first = client.infer({"obs": frames(q[:4]), "prompt": "stack the cups"})
        assert first["action"].shape == (8, 4, 4)  # pose, gripper; frames; actions per frame
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
        action = client.infer({"obs": {"cam": float_picture(ROBOT.home)}, "prompt": ""})["action"]
    assert action.shape == (8, 1, 4) and not action[:3].any()


def test_server_or_request_must_name_the_layout() -> None:
    obs = {"cam": float_picture(ROBOT.home)}
    with serving() as (port, _), Client(port=port) as client:
        with pytest.raises(ServerError, match="name the layout"):
            client.infer({"obs": obs})
        with pytest.raises(ServerError, match="name the side"):
            client.infer({"obs": obs, "layout": "lingbot_va"})
        assert client.infer({"obs": obs, "layout": "paper_per_arm", "side": "left"})["action"].shape == (8, 1, 4)
    for make_session, more, words in (
        (partial(session, Handshake(layout="lingbot_va")), {"layout": "lingbot_vla"}, "asks for 'lingbot_vla'"),
        (
            partial(session, Handshake(layout="lingbot_va"), control_rate=30.0),
            {"side": "left"},
            "multiple of the video's",
        ),
    ):
        with serving(make_session) as (port, _), Client(port=port) as client, pytest.raises(ServerError, match=words):
            client.infer({"obs": obs, **more})


# ---- what comes in ---------------------------------------------------------------------------------------------------

DROID, TOOL_POSE = "observation/joint_position", np.array([-0.05, 0.03, 0.95, 3.13, -0.02, -0.08, 0.03, -0.03])


def test_droids_joints_and_gripper_are_the_pose() -> None:
    """openpi's DROID example: seven joints, and a gripper that is 0 where open."""
    q = motion()[5]
    observation = {
        "observation/exterior_image_1_left": float_picture(q), "observation/wrist_image_left": float_picture(q) * 0,
        DROID: q[:7], "observation/gripper_position": np.array([0.25]), "prompt": "x",
    }  # fmt: skip
    one = session(Handshake(image_key="observation/exterior_image_1_left"))
    np.testing.assert_allclose(one.handle(observation)["position"][-1], [*q[:7], 0.03], atol=1e-6)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({DROID: ROBOT.home[:7]}, "7 and 1 numbers.*got 7 and none"),
        ({DROID: ROBOT.home[:6], "observation/gripper_position": np.zeros(1)}, "got 6 and 1"),
        ({"observation/gripper_position": np.zeros(1)}, "without joint_position"),
        ({DROID: ROBOT.home[:7], "observation/gripper_position": np.full(1, 30.0)}, "from 0 .open. to 1"),
        ({"observation/joint_postion": ROBOT.home[:7]}, "did you mean 'observation/joint_position'"),
        ({"observation/state": TOOL_POSE}, "panda_joint4.*a tool pose is none"),
        ({"observation/state": np.rad2deg(ROBOT.home)}, "degrees"),
        ({"state": np.zeros((2, 8))}, "one vector"),
        ({"state": ROBOT.home, "observation/state": ROBOT.home}, "several states"),
        ({"q": np.full(8, 1e308)}, "is no pose of this robot"),
        ({"end_point": "reset"}, "'end_point' is not understood"),
    ],
)
def test_what_is_not_understood_is_refused_and_nothing_starts(more: dict[str, object], words: str) -> None:
    one = session()
    with pytest.raises(InputError, match=words):
        one.handle({"image": float_picture(ROBOT.home), **more})
    assert one.decoder.trajectory.position is None


@pytest.mark.parametrize("shape", [(8,), (1, 8), (1, 1, 8)])
@pytest.mark.parametrize("name", ["state", "observation/state", "observation.state", "q"])
def test_states_of_a_batch_of_one_are_taken(name: str, shape: tuple[int, ...]) -> None:
    one = session()
    one.handle({"image": float_picture(ROBOT.home), name: ROBOT.home.reshape(shape)})
    np.testing.assert_allclose(one.decoder.trajectory.position, ROBOT.home, atol=1e-9)


def test_nested_images_are_found_by_their_short_names_in_either_order_of_axes() -> None:
    """openpi's ALOHA observations hold a map of images with the channels first."""
    q, view = motion(), Handshake(image_key="cam_high")
    expected = session(view)
    nested = session(view)
    for x in q[:3]:
        image = float_picture(x)
        answer = expected.handle({"cam_high": image, "cam_low": image * 0, "q": x})
        images = {"cam_high": image.transpose(2, 0, 1), "cam_low": image.transpose(2, 0, 1) * 0}
        np.testing.assert_array_equal(nested.handle({"images": images, "q": x})["actions"], answer["actions"])
    assert np.abs(answer["actions"]).max() > 1e-3


def test_a_later_state_is_compared_with_the_last_command() -> None:
    q, one = motion(), session()
    for x in q[:4]:
        answer = one.handle({"image": float_picture(x), **({"state": q[0]} if x is q[0] else {})})
    off = answer["position"][-1] + np.where(np.arange(8) == 1, 0.04, 0)
    after = one.handle({"image": float_picture(q[3]), "state": off})
    before = after["position"][0] - after["actions"][0] / 50
    np.testing.assert_allclose(before, off, atol=1e-9)
    with pytest.raises(InputError, match="no pose"):
        one.handle({"image": float_picture(q[3]), "state": TOOL_POSE})


def test_feedback_without_frames_changes_nothing() -> None:
    one = session(Handshake(layout="lingbot_va", side="left"))
    one.handle({"reset": True, "prompt": "x", "save_visualization": True})
    one.handle({"obs": {"cam": float_picture(ROBOT.home), "observation.state": ROBOT.home, "task": "x"}})
    before = one.decoder.trajectory.position
    assert one.handle({"obs": [], "compute_kv_cache": True, "imagine": False, "state": np.zeros((8, 1, 4))}) == {}
    np.testing.assert_array_equal(one.decoder.trajectory.position, before)


def test_real_frames_take_no_commands_from_a_robot_that_is_stopped() -> None:
    """Their answer holds none, so that the motion of the next answer would begin elsewhere."""
    q, one = motion(speed=2.0), session(max_tracking_error=0.3)
    one.handle({"image": float_picture(q[0]), "state": q[0]})
    before = [one.handle({"image": float_picture(x)}) for x in q[1:9]][-1]
    far = before["position"][-1] - np.where(np.arange(8) == 3, 0.5, 0.0)
    one.handle({"endpoint": "observe", "q": np.clip(far, ROBOT.lower, ROBOT.upper)})
    assert one.handle({"obs": [{"cam": float_picture(q[9])}], "compute_kv_cache": True}) == {}
    after = one.handle({"image": float_picture(q[9])})
    assert after["holding"].all() and after["time"][0] == pytest.approx(before["time"][-1] + 0.02)
    assert np.abs(after["actions"][0] - before["actions"][-1]).max() < 0.2 < np.abs(before["actions"][-1]).max()


# ---- misbehaving clients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        b"", b"\xc1", b"\x91" * 3000, pack([1, 2]), pack({"endpoint": "reload", "embodiment": "droid"}), pack({"obs": 3}), pack({"obs": []}),
        pack({"image": np.zeros((0, 0, 3))}), pack({"image": np.zeros((2, 2, 3)), "q": "x"}), pack({"endpoint": "observe"}),
        pack({"image": np.zeros((65, 2, 2, 3))}), pack({"endpoint": "reset", "q": np.full(8, np.nan)}),
        pack({"obs": [{"a": np.zeros((2, 2, 3))}, {"a": np.zeros((3, 3, 3))}], "layout": "lingbot_va", "side": "left"}),
    ],
)  # fmt: skip
def test_invalid_messages_are_answered_in_one_line_and_the_session_continues(message: bytes) -> None:
    with serving() as (port, _), connect(f"ws://127.0.0.1:{port}", compression=None) as raw:
        raw.recv()
        raw.send(message)
        error = raw.recv()
        assert isinstance(error, str) and 0 < len(error) < 400 and "\n" not in error and "Traceback" not in error
        raw.send(pack({"image": float_picture(ROBOT.home), "state": ROBOT.home}))
        assert isinstance(raw.recv(), bytes)


def test_a_frame_of_nan_is_held_not_refused() -> None:
    with serving() as (port, _), Client(port=port) as client:
        client.infer({"image": float_picture(ROBOT.home), "state": ROBOT.home})
        answer = client.infer({"image": float_picture(ROBOT.home) * np.float32(np.nan)})
        assert answer["holding"].all() and answer["reason"] and np.isfinite(answer["actions"]).all()


def test_internal_errors_are_not_revealed(caplog: pytest.LogCaptureFixture) -> None:
    broken = session()
    broken.handle = lambda message: 1 / 0  # type: ignore[assignment, method-assign]
    raises = pytest.raises(ServerError, match=r"internal error [0-9a-f]{8}; the server")
    with serving(lambda: broken) as (port, _), Client(port=port) as client, raises as error:
        client.infer({})
    assert "ZeroDivision" not in str(error.value) and "ZeroDivision" in caplog.text


def test_a_message_that_is_too_large_ends_only_that_connection() -> None:
    with serving(limits=MessageLimits(size=10_000)) as (port, server), Client(port=port) as other:
        with Client(port=port) as client, pytest.raises(ServerError):
            client.infer({"image": np.zeros((100, 100, 3), np.uint8)})
        assert len(other.infer({"image": float_picture(ROBOT.home), "state": ROBOT.home})["actions"]) == 4
        assert b'jidm_rejected_total{why="size"} 1.0' in server.metrics.text()


def test_sessions_do_not_see_each_other() -> None:
    q = motion()
    with serving() as (port, _), Client(port=port) as one, Client(port=port) as two:
        for client, start in ((one, q[0]), (two, q[20])):
            client.reset(start)
            client.infer({"image": float_picture(start)})
        a, b = (c.infer({"image": float_picture(x)})["position"][-1] for c, x in ((one, q[1]), (two, q[21])))
    np.testing.assert_allclose(a, q[1], atol=0.05)
    np.testing.assert_allclose(b, q[21], atol=0.05)
    assert np.abs(a - b).max() > 0.1


def test_a_token_is_required() -> None:
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
        client.infer({"image": float_picture(ROBOT.home), "state": ROBOT.home})
        with pytest.raises(ServerError):
            client.infer({})
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    assert 'jidm_request_seconds_count{kind="answered"} 1.0' in metrics
    assert 'jidm_request_seconds_count{kind="refused"} 1.0' in metrics
    assert (
        "jidm_clients 1.0" in metrics
        and "jidm_queue 0.0" in metrics
        and 'jidm_rejected_total{why="message"} 1.0' in metrics
    )


def test_the_number_of_clients_is_limited() -> None:
    with serving(max_clients=2) as (port, _), Client(port=port), Client(port=port) as second:
        with pytest.raises(ServerError, match="503"):
            Client(port=port)
        assert len(second.infer({"image": float_picture(ROBOT.home), "state": ROBOT.home})["actions"]) == 4


def test_half_open_sockets_and_garbage_do_not_stop_it() -> None:
    with serving() as (port, _):
        silent = socket.create_connection(("127.0.0.1", port))
        noisy = socket.create_connection(("127.0.0.1", port))
        noisy.sendall(b"\x00\xff" * 500 + b"\r\n\r\n")
        with Client(port=port) as client:
            assert len(client.infer({"image": float_picture(ROBOT.home), "state": ROBOT.home})["actions"]) == 4
        silent.close()
        noisy.close()


class ScriptedSession(Session):
    """A session that refuses, takes a while, or blocks until it is released, as the message says."""

    metadata: dict[str, object] = {}  # type: ignore[assignment]  # noqa: RUF012

    def __init__(self, release: threading.Event, computing: list[int]) -> None:
        self._release, self._computing = release, computing

    def cancel(self) -> None:
        pass

    def handle(self, message: dict[str, str]) -> dict[str, int]:  # type: ignore[override]
        if message["say"] == "refuse":
            raise InputError("refused")
        if message["say"] == "soon":
            time.sleep(0.2)
        if message["say"] == "wait":
            self._computing.append(os.nice(0))
            self._release.wait(20)
        return {"done": 1}


@pytest.mark.parametrize("before", [(), ("refuse",), ("soon", "soon", "soon")], ids=["new", "refused", "pipelined"])
@pytest.mark.parametrize("penalty_time", [10.0, 0.0])
def test_misbehaving_clients_never_take_all_workers(
    before: tuple[str, ...], penalty_time: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jidm.serving.server._PENALTY_TIME", penalty_time)
    release, computing = threading.Event(), []
    with (
        serving(lambda: ScriptedSession(release, computing), workers=2) as (port, _),
        Client(port=port, timeout=3) as good,
    ):
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
            deadline = time.monotonic() + 10
            while not computing and time.monotonic() < deadline:
                time.sleep(0.01)
            if penalty_time or not before:
                assert good.infer({"say": "nothing"}) == {"done": 1}
                assert len(computing) == 1
                if sys.platform == "linux":
                    assert computing[0] == min(19, os.nice(0) + 10)
            else:  # without a penalty they take both workers
                with pytest.raises(ServerError, match="no answer"):
                    good.infer({"say": "nothing"})
                assert len(computing) == 2
        finally:
            release.set()
            for other in others:
                other.close()


def test_stopping_closes_connections_properly() -> None:
    from websockets.exceptions import ConnectionClosedOK

    with serving() as (port, _):
        raw = connect(f"ws://127.0.0.1:{port}", compression=None)
        raw.recv()
    with pytest.raises(ConnectionClosedOK) as closed:
        raw.recv(timeout=5)
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001
    with pytest.raises(ServerError, match="no server answers"):
        Client(port=port, timeout=2)


def test_a_port_in_use_is_an_error() -> None:
    with serving() as (port, _), pytest.raises(InputError, match="cannot listen"):
        PolicyServer(session, port=port).run()
