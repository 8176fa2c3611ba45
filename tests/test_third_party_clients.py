"""The clients of openpi, LingBot-VA and VERA against the server: their messages, written from their protocols.

Nothing of jidm's codec or client is used. `python -m pytest -v tests/test_third_party_clients.py` lists client by message.
Frames encode joint positions in pixels, so that the right answers are known.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_serving_server import serving

from jidm import JacobianIDM
from jidm.control import ActionDecoder, ControlConfig
from jidm.errors import InputError
from jidm.estimation.agreement import NOT_MEASURED
from jidm.robot.kinematics import Kinematics
from jidm.robot.registry import load_embodiment
from jidm.serving import Handshake, Session

connect = pytest.importorskip("websockets.sync.client").connect
msgpack = pytest.importorskip("msgpack")

PANDA, PAIR = load_embodiment("panda"), load_embodiment("cobot_magic")
VIDEO_RATE, CONTROL_RATE = 12.5, 50.0
RANGE = 8.0  # [rad] positions from -RANGE to RANGE in 16 bits


# ---- robots whose pictures tell their pose ---------------------------------------------------------------------------


def picture(q: np.ndarray, size: tuple[int, int] = (24, 32)) -> np.ndarray:
    """(H, W, 3) uint8: the high and low bytes of each joint position in the first two rows."""
    code = np.round((np.asarray(q) / RANGE + 1) / 2 * 65535).astype(int)
    frame = np.zeros((*size, 3), np.uint8)
    frame[0, : len(code), 0], frame[1, : len(code), 0] = code >> 8, code & 255
    return frame


class PixelPoseStream:
    agreement = NOT_MEASURED

    def __init__(self, n: int, frame: torch.Tensor, q0: Any) -> None:
        self.n = n
        self.q = self._decode(frame) if q0 is None else torch.as_tensor(q0)

    def _decode(self, frame: torch.Tensor) -> torch.Tensor:
        high, low = (frame[0, :2, : self.n] * 255).double()
        return ((high.round() * 256 + low.round()) / 65535 * 2 - 1) * RANGE

    def push(self, frame: torch.Tensor, time: float) -> SimpleNamespace:
        before, self.q = self.q, self._decode(frame)
        return SimpleNamespace(
            accepted=bool(frame.isfinite().all()),
            valid=True,
            position=self.q,
            delta_q=self.q - before,
            agreement=NOT_MEASURED,
        )

    def correct(self, q: np.ndarray) -> None:
        self.q = torch.as_tensor(q)


@cache
def idm(name: str) -> JacobianIDM:
    idm = JacobianIDM.from_embodiment(name, points=10)
    n = len(idm.joint_names)
    idm.stream = lambda frame, *, time, q0=None: PixelPoseStream(n, frame, q0)  # type: ignore[method-assign, assignment, misc]
    return idm


def session(robot: str = "panda", handshake: Handshake | None = None, **config: Any) -> Session:
    rates = {"video_rate": VIDEO_RATE, "control_rate": CONTROL_RATE, "action_space": "joint_position", **config}
    return Session(ActionDecoder(idm(robot), ControlConfig(**rates)), handshake or Handshake())


def motion(robot: Any, count: int) -> np.ndarray:
    """(count, n) a slow motion from home, grippers included."""
    t = np.arange(count)[:, None] / VIDEO_RATE
    q = robot.home + 0.15 * robot.exploration_range * np.sin(2 * t * np.linspace(0.5, 1, robot.n))
    return np.clip(q, robot.lower, robot.upper)


Q, Q2 = motion(PANDA, 14), motion(PAIR, 14)
Q[:, 7] += 0.008  # more open than closed
Q2[:, PAIR.gripper_mask] = PAIR.upper[PAIR.gripper_mask] * (0.3, 0.6)


# ---- clients, written from their protocols ---------------------------------------------------------------------------


class Refused(Exception):
    """The client's RuntimeError where the server answers with text."""


class WireClient:
    """openpi's framing: metadata first, then an answer per message; text is an error.

    Args:
        port: of the server.
        scalar: tag of NumPy scalars: `__npgeneric__` of openpi and LingBot-VA, `__npscalar__` of VERA.
    """

    def __init__(self, port: int, scalar: bytes = b"__npgeneric__") -> None:
        self._scalar = scalar
        self._socket = connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None)
        self.metadata = self._decode(self._socket.recv())

    def infer(self, message: dict[str, Any]) -> dict[str, Any]:
        self._socket.send(msgpack.packb(message, default=self._encode))
        answer = self._socket.recv(timeout=20)
        if isinstance(answer, str):
            assert 0 < len(answer) <= 400 and answer.isprintable() and "internal error" not in answer, answer
            raise Refused(answer)
        return self._decode(answer)

    def close(self) -> None:
        self._socket.close()

    def _encode(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
        if isinstance(value, np.generic):
            return {self._scalar: True, b"data": value.item(), b"dtype": value.dtype.str}
        raise TypeError(type(value))

    def _decode(self, message: bytes) -> Any:
        def array(fields: dict[Any, Any]) -> Any:
            if b"__ndarray__" in fields:
                return np.frombuffer(fields[b"data"], fields[b"dtype"]).reshape(fields[b"shape"])
            # Neither client reads the other's tag of scalars: an answer must hold none.
            assert not any(isinstance(key, bytes) for key in fields), fields
            return fields

        return msgpack.unpackb(message, object_hook=array)


class ChunkBroker:
    """openpi's broker: asks once, then gives each array of the answer step by step."""

    def __init__(self, client: WireClient, action_horizon: int) -> None:
        self._client, self._horizon, self._step = client, action_horizon, 0
        self._answer: dict[str, Any] | None = None
        self.num_requests = 0

    def infer(self, message: dict[str, Any]) -> dict[str, Any]:
        if self._answer is None:
            self._answer, self._step = self._client.infer(message), 0
            self.num_requests += 1
        step = {k: v[self._step, ...] if isinstance(v, np.ndarray) else v for k, v in self._answer.items()}
        self._step += 1
        if self._step >= self._horizon:
            self._answer = None
        return step


@contextmanager
def client_of(
    handshake: Handshake | None = None, robot: str = "panda", scalar: bytes = b"__npgeneric__", **config: Any
) -> Iterator[WireClient]:
    with serving(partial(session, robot, handshake, **config)) as (port, _):
        client = WireClient(port, scalar)
        try:
            yield client
        finally:
            client.close()


def refusal(client: WireClient, message: dict[str, Any]) -> str:
    with pytest.raises(Refused) as refused:
        client.infer(message)
    return str(refused.value)


# ---- openpi ----------------------------------------------------------------------------------------------------------

DROID_VIEW, DROID_JOINTS = "observation/exterior_image_1_left", "observation/joint_position"


def droid(q: np.ndarray) -> dict[str, Any]:
    """examples/droid/main.py; its gripper is 0 where open."""
    closing = 1 - q[7:] / PANDA.upper[7]
    return {
        DROID_VIEW: picture(q), "observation/wrist_image_left": np.zeros((24, 32, 3), np.uint8), DROID_JOINTS: q[:7],
        "observation/gripper_position": closing, "prompt": "pick up the cup",
    }  # fmt: skip


def libero(q: np.ndarray, state: np.ndarray | None = None) -> dict[str, Any]:
    """examples/libero/main.py."""
    images = {"observation/image": picture(q), "observation/wrist_image": np.zeros((24, 32, 3), np.uint8)}
    return {**images, "observation/state": q if state is None else state, "prompt": "pick up the cup"}


def aloha(q: np.ndarray) -> dict[str, Any]:
    """examples/simple_client/main.py and aloha_real: a map of images, channels first."""
    names = ("cam_low", "cam_high", "cam_left_wrist", "cam_right_wrist")
    images = {name: picture(q if name == "cam_high" else 0 * q).transpose(2, 0, 1) for name in names}
    return {"state": q, "images": images, "prompt": "do something"}


TOOL_POSE = np.array([-0.05, 0.03, 0.95, 3.13, -0.02, -0.08, 0.03, -0.03])
LIBERO = Handshake(image_key="observation/image")


def openpi_droid_observations() -> None:
    with client_of(Handshake(image_key=DROID_VIEW, action_horizon=10)) as client:
        first = client.infer(droid(Q[0]))
        assert first["actions"].shape == (10, 8) and first["holding"].all()  # the example asserts this shape
        np.testing.assert_allclose(first["actions"], np.repeat(Q[:1], 10, 0), atol=1e-6)
        second = client.infer(droid(Q[1]))
        np.testing.assert_allclose(second["actions"][3], Q[1], atol=0.02)
        assert not second["holding"][:4].any() and second["holding"][4:].all() and "fewer" in second["reason"]


def openpi_droid_short_view() -> None:
    with client_of(Handshake(image_key="exterior_image_1_left")) as client:
        np.testing.assert_allclose(client.infer(droid(Q[0]))["position"][-1], Q[0], atol=1e-6)


def openpi_droid_wrong_state() -> None:
    with client_of(Handshake(image_key=DROID_VIEW)) as client:
        for _ in range(2):  # at first, and later
            wrong = {**droid(Q[1]), DROID_JOINTS: np.rad2deg(Q[1, :7])}
            assert re.search(r"panda_joint\d is -?\d+.*degrees", refusal(client, wrong))
            misspelled = {k.replace("joint_position", "joint_pos"): v for k, v in droid(Q[1]).items()}
            assert "'observation/joint_pos' is not understood: did you mean" in refusal(client, misspelled)
            tool = {k.replace("joint_position", "cartesian_position"): v for k, v in droid(Q[1]).items()}
            del tool["observation/gripper_position"]
            assert "'observation/cartesian_position' is a tool pose" in refusal(client, tool)
            gripper = {**droid(Q[1]), "observation/gripper_position": np.array([30.0])}
            assert "gripper_position is from 0 (open) to 1 (closed), got 30" in refusal(client, gripper)
            client.infer(droid(Q[0]))


def openpi_libero_state(shape: tuple[int, ...]) -> None:
    with client_of(LIBERO) as client:
        first = client.infer(libero(Q[0], Q[0].reshape(shape)))
        np.testing.assert_allclose(first["position"][-1], Q[0], atol=1e-9)
        assert len(first["actions"]) == client.metadata["action_horizon"] == 4  # replan_steps
        off = first["position"][-1] + 0.01
        later = client.infer({"endpoint": "observe", "observation/state": off.reshape(shape)})
        np.testing.assert_allclose(later["tracking_error"], [0.01], atol=1e-9)


def openpi_libero_later_state_is_compared() -> None:
    """Velocities continue from where the robot says it is."""
    with client_of(LIBERO, action_space="joint_velocity") as client:
        last = client.infer(libero(Q[0]))["position"][-1]
        off = last + 0.02 * (np.arange(8) == 1)
        answer = client.infer(libero(Q[1], off))
        before = answer["position"][0] - answer["actions"][0] / CONTROL_RATE
        np.testing.assert_allclose(before, off, atol=1e-9)


def openpi_libero_tool_pose() -> None:
    with client_of(LIBERO) as client:
        for _ in range(2):
            message = refusal(client, libero(Q[0], TOOL_POSE))
            assert "panda_joint4 is 3.13, its limits" in message and "a tool pose is none" in message
            assert "8 joint positions" in refusal(client, libero(Q[0], Q[0, :7]))
            client.infer(libero(Q[0]))


def openpi_aloha_observations() -> None:
    with client_of(Handshake(image_key="cam_high", normalized_grippers=True), robot="cobot_magic") as client:
        for k in (0, 1, 2):
            message = aloha(Q2[k])
            grippers = list(np.flatnonzero(PAIR.gripper_mask))
            message["state"] = Q2[k].copy()
            message["state"][grippers] = Q2[k][grippers] / PAIR.upper[grippers]
            answer = client.infer(message)
            np.testing.assert_allclose(answer["actions"][-1], Q2[k], atol=0.02)
        message["state"] = Q2[k] + 5 * PAIR.gripper_mask
        assert "from 0 (closed) to 1 (open)" in refusal(client, message)
        message["state"] = np.ones(8)
        assert "14 joint positions" in refusal(client, message)
        message.update(state=Q2[k], images={"cam_low": message["images"]["cam_high"]})
        assert "no image 'cam_high'; images in the request: images/cam_low" in refusal(client, message)


def openpi_broker(horizon: int) -> None:
    """Ten steps per request, as examples/aloha_sim: every step is an action of its own, and nothing jumps."""
    with client_of(Handshake(image_key="observation/image", action_horizon=horizon)) as client:
        assert client.metadata["action_horizon"] == horizon
        broker = ChunkBroker(client, horizon)
        where, times = Q[0], []
        for k in range(4 * horizon):
            step = broker.infer(libero(Q[k // horizon], where))
            assert step["actions"].shape == step["action"].shape == (8,)
            where = step["position"]
            times.append(float(step["time"]))
        assert broker.num_requests == 4
        np.testing.assert_allclose(np.diff(times), 1 / CONTROL_RATE, atol=1e-9)  # no step twice, none lost
        np.testing.assert_allclose(where, Q[3], atol=0.02)


def openpi_broker_by_the_handshake() -> None:
    with client_of(LIBERO) as client:
        broker = ChunkBroker(client, client.metadata["action_horizon"])
        steps = [broker.infer(libero(Q[k // 4], Q[k // 4])) for k in range(12)]
        assert broker.num_requests == 3
        np.testing.assert_allclose(steps[-1]["actions"], Q[2], atol=0.02)


def openpi_too_many_frames_for_the_horizon() -> None:
    with client_of(Handshake(action_horizon=10)) as client:
        client.infer({"image": picture(Q[0]), "state": Q[0]})
        words = refusal(client, {"image": np.stack([picture(x) for x in Q[1:4]])})
        assert "3 new frames give 12 actions, answers hold 10" in words
        assert len(client.infer({"image": np.stack([picture(x) for x in Q[1:3]])})["actions"]) == 10


def openpi_new_episode() -> None:
    """openpi's client sends nothing when it is reset: a message of one's own starts the next episode."""
    with client_of(LIBERO) as client:
        client.infer(libero(Q[0]))
        assert client.infer({"reset": np.True_}) == {}
        np.testing.assert_allclose(client.infer(libero(Q[9]))["position"][-1], Q[9], atol=1e-9)


# ---- LingBot-VA ------------------------------------------------------------------------------------------------------

GRIPPERS = np.flatnonzero(PAIR.gripper_mask)
LINGBOT = Handshake(image_key="cam_high", layout="lingbot_va")
LINGBOT_VIEWS = ("cam_high", "cam_left_wrist", "cam_right_wrist")
IDENTITY = [0, 0, 0, 0, 0, 0, 1]


def format_obs(q: np.ndarray) -> dict[str, Any]:
    """evaluation/robotwin: one observation."""
    images = {
        f"observation.images.{view}": picture(q) if view == "cam_high" else np.zeros((24, 32, 3), np.uint8)
        for view in LINGBOT_VIEWS
    }
    return {**images, "observation.state": q, "task": "stack the cups"}


LINGBOT_ASK = {"prompt": "stack the cups", "save_visualization": True, "video_guidance_scale": 5.0, "action_guidance_scale": 5.0}  # fmt: skip
LINGBOT_REPORT = {"compute_kv_cache": True, "imagine": False, "save_visualization": True}
LINGBOT_RESET = {"reset": True, "prompt": "stack the cups", "save_visualization": True}


def openings(q: np.ndarray) -> np.ndarray:
    return np.asarray(q)[..., GRIPPERS] / PAIR.upper[GRIPPERS]


def lingbot_reset_and_first_chunk() -> None:
    with client_of(LINGBOT, robot="cobot_magic") as client:
        assert client.infer(LINGBOT_RESET) == {}
        action = client.infer({"obs": format_obs(Q2[0]), **LINGBOT_ASK})["action"]
        assert action.shape == (16, 1, 4) and action.shape[2] % 4 == 0
        expected = [*IDENTITY, openings(Q2[0])[0], *IDENTITY, openings(Q2[0])[1]]
        np.testing.assert_allclose(action[:, 0], np.repeat(np.array(expected)[:, None], 4, 1), atol=1e-6)


def lingbot_empty_report() -> None:
    with client_of(LINGBOT, robot="cobot_magic") as client:
        client.infer(LINGBOT_RESET)
        action = client.infer({"obs": format_obs(Q2[0]), **LINGBOT_ASK})["action"]
        assert client.infer({"obs": [], **LINGBOT_REPORT, "state": action}) == {}


def lingbot_first_observation_again() -> None:
    with client_of(LINGBOT, robot="cobot_magic") as client:
        client.infer(LINGBOT_RESET)
        client.infer({"obs": format_obs(Q2[0]), **LINGBOT_ASK})
        moved = client.infer({"obs": [format_obs(x) for x in Q2[1:5]], **LINGBOT_ASK})["action"]
        again = client.infer({"obs": format_obs(Q2[0]), **LINGBOT_ASK})
        assert again["holding"].all() and "first observation again" in again["reason"]
        assert again["action"].shape == (16, 1, 4)
        gone = np.abs(moved[:3, -1, -1]).max()  # as a new frame, it would lead back to where the episode began
        assert gone > 0.003 and np.abs(again["action"][:3, 0] - moved[:3, -1, -1:]).max() < 0.5 * gone


def lingbot_real_frames() -> None:
    with client_of(LINGBOT, robot="cobot_magic") as client:
        client.infer(LINGBOT_RESET)
        client.infer({"obs": format_obs(Q2[0]), **LINGBOT_ASK})
        for channels in (16, 14, 30):
            report = {"obs": [format_obs(x) for x in Q2[:4]], **LINGBOT_REPORT, "state": np.zeros((channels, 1, 4))}
            assert client.infer(report) == {}
        action = client.infer({"obs": [format_obs(x) for x in Q2[4:8]], **LINGBOT_ASK})["action"]
        assert action.shape == (16, 4, 4)
        np.testing.assert_allclose(action[[7, 15], -1, -1], openings(Q2[7]), atol=0.02)
        wrong = [format_obs(Q2[0]), {**format_obs(Q2[0]), "observation.state": np.ones(3)}]
        assert "14 joint positions" in refusal(client, {"obs": wrong, **LINGBOT_REPORT})


def turn(x: float, y: float, z: float) -> np.ndarray:
    """Rotation about the fixed axes x, y, z in this order, as euler2quat of the client composes it."""
    (cx, cy, cz), (sx, sy, sz) = np.cos([x, y, z]), np.sin([x, y, z])
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    return np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]]) @ about_y @ about_x


def quaternion_matrix(x: float, y: float, z: float, w: float) -> np.ndarray:
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + 2 * w * cross + 2 * cross @ cross


def tool_poses(q: np.ndarray) -> list[np.ndarray]:
    poses = Kinematics.from_embodiment(PAIR).link_poses(torch.tensor(q)).numpy()
    return [poses[PAIR.model.link_index(f"{side}_link6")] for side in ("left", "right")]


def lingbot_channels(channels: str, count: int) -> None:
    """The poses that the client composes are those of the frame."""
    handshake = Handshake(image_key="cam_high", layout="lingbot_va", lingbot_channels=channels)
    with client_of(handshake, robot="cobot_magic") as client:
        client.infer(LINGBOT_RESET)
        client.infer({"obs": format_obs(Q2[0]), **LINGBOT_ASK})
        answer = client.infer({"obs": [format_obs(x) for x in Q2[1:5]], **LINGBOT_ASK})["action"]
        assert answer.shape == (count, 4, 4)
        last = answer[:, -1, -1]
        last = last[[*range(7), 28, *range(7, 14), 29]] if count == 30 else last
        arms = np.split(last, 2)
        for numbers, first, pose in zip(arms, tool_poses(Q2[0]), tool_poses(Q2[4]), strict=True):
            if count == 14:
                got = turn(*numbers[3:6]), numbers[:3]
            else:  # add_eef_pose of the client
                got = first[:3, :3] @ quaternion_matrix(*numbers[3:7]), first[:3, 3] + numbers[:3]
            np.testing.assert_allclose(got[0], pose[:3, :3], atol=0.03)
            np.testing.assert_allclose(got[1], pose[:3, 3], atol=0.01)
            assert np.abs(pose[:3, 3] - first[:3, 3]).max() > 0.01
        np.testing.assert_allclose([x[-1] for x in arms], openings(Q2[4]), atol=0.03)


def lingbot_whole_evaluation_loop() -> None:
    """eval_policy of the client, with a robot that stays where it is; grippers as RoboTwin counts them."""
    state = Q2[0].copy()
    state[GRIPPERS] = openings(Q2[0])
    handshake = Handshake(image_key="cam_high", layout="lingbot_va", normalized_grippers=True)
    executed: list[np.ndarray] = []
    with client_of(handshake, robot="cobot_magic") as client:
        client.infer(LINGBOT_RESET)
        observation = {**format_obs(Q2[0]), "observation.state": state}
        first, first_obs = True, observation
        while len(executed) < 12:
            action = client.infer({"obs": first_obs, **LINGBOT_ASK})["action"]
            assert action.shape[2] % 4 == 0 and action.shape[0] in (14, 16)
            key_frames = []
            for i in range(1 if first else 0, action.shape[1]):
                for j in range(action.shape[2]):
                    executed.append(action[:, i, j])
                    if (j + 1) % (action.shape[2] // 4) == 0:
                        key_frames.append(observation)
            first = False
            assert client.infer({"obs": key_frames, **LINGBOT_REPORT, "state": action}) == {}
    expected = [*IDENTITY, openings(Q2[0])[0], *IDENTITY, openings(Q2[0])[1]]
    np.testing.assert_allclose(executed, np.repeat([expected], len(executed), 0), atol=1e-6)


# ---- VERA ------------------------------------------------------------------------------------------------------------

# vera/server/protocol/server_config.py; its controller builds a dataclass of these fields from the handshake.
VERA_FIELDS = {
    "image_resolution", "view_keys", "view_widths", "proprio_keys", "needs_prompt", "needs_session_id", "action_space",
    "action_horizon", "context_frames", "action_dim", "control_dt", "gripper_is_raw", "actions_already_metric",
    "action_abs_scale", "gripper_dim_index", "embodiment", "planner_model", "idm_model", "is_causal", "protocol_version",
    "git_head", "git_dirty", "git_diff_sha", "hostname", "argv", "run_dir",
}  # fmt: skip
VERA_REQUIRED = {"image_resolution", "view_keys", "view_widths", "proprio_keys", "needs_prompt"}
VERA_VIEWS = ["wrist", "ext1"]
VERA = Handshake(image_key="ext1", vera=True, action_horizon=8)


def vera_client(handshake: Handshake = VERA, **config: Any) -> Any:
    return client_of(handshake, scalar=b"__npscalar__", **config)


def window(rows: np.ndarray) -> np.ndarray:
    """(T, H, sum of widths, 3): the pictures of both cameras side by side."""
    return np.stack([np.concatenate([picture(0 * x, (24, 20)), picture(x)], axis=1) for x in rows])


def vera_infer(rows: np.ndarray, q: np.ndarray | None = None, **more: Any) -> dict[str, Any]:
    """ObsBuilder.build and VeraController._infer; the client adds the endpoint."""
    robot = {} if q is None else {
        "joint_position": q[:7].astype(np.float32), "q_robot": q[:7].astype(np.float32),
        "gripper_position": (1 - q[7:] / PANDA.upper[7]).astype(np.float32), "eef_pos": np.array([0.4, 0, 0.3], np.float32),
    }  # fmt: skip
    views = {"context_rgb": window(rows), "view_keys": VERA_VIEWS, "view_widths": [20, 32], "session_id": "a"}
    notes = {"rails_bound": False, "executed_trans": np.float64(0.01), "prompt": "pick up the cup"}
    return {**views, **robot, **notes, **more, "endpoint": "infer"}


def vera_handshake() -> None:
    with vera_client() as client:
        assert set(client.metadata) <= VERA_FIELDS and set(client.metadata) >= VERA_REQUIRED
        got = {key: client.metadata[key] for key in ("action_space", "action_horizon", "action_dim", "control_dt")}
        assert got == {"action_space": "joint_position", "action_horizon": 8, "action_dim": 8, "control_dt": 0.02}
        assert client.metadata["actions_already_metric"] is True and client.metadata["action_abs_scale"] == [1.0] * 8
        assert client.metadata["view_keys"] == ["ext1"] and client.metadata["protocol_version"] == 1
        assert client.metadata["gripper_is_raw"] is False  # else its player switches the last number at 0.5
    with client_of() as client:  # the usual handshake says the same
        names = (
            "action_space",
            "action_horizon",
            "action_dim",
            "control_dt",
            "actions_already_metric",
            "action_abs_scale",
        )
        assert {*names, "view_keys", "protocol_version"} <= set(client.metadata)
        assert client.metadata["action_horizon"] == 4


def vera_two_pictures() -> None:
    with vera_client() as client:
        assert client.infer({"session_id": "a", "reason": "new_episode", "endpoint": "reset"}) == {}
        answer = client.infer(vera_infer(Q[:2], Q[0]))
        assert answer["action"].shape == (8, 8) and answer["action"].dtype.kind == "f"
        np.testing.assert_array_equal(answer["action"], answer["actions"])
        np.testing.assert_allclose(answer["action"][3], Q[1], atol=0.02)
        where = answer["position"][-1]
        another = client.infer(vera_infer(np.stack([where, Q[3]]), where))  # no picture of the former window
        assert not another["holding"][:4].any() and another["holding"][4:].all()
        np.testing.assert_allclose(another["action"][3], Q[3], atol=0.03)


def vera_rolling_window() -> None:
    """The window grows and rolls on; its former pictures are not decoded again."""
    with vera_client(Handshake(image_key="ext1")) as client, client_of(Handshake(image_key="ext1")) as plain:
        for rows, new in ((Q[:1], 1), (Q[:3], 2), (Q[1:5], 2), (Q[4:6], 1)):
            start = Q[0] if new == len(rows) else None
            answer = client.infer(vera_infer(rows, start))
            frames = {"ext1": np.stack([picture(x) for x in rows[-new:]])}
            expected = plain.infer(frames if start is None else {**frames, "state": start})
            np.testing.assert_allclose(answer["action"], expected["actions"], atol=1e-6)
        np.testing.assert_allclose(answer["action"][-1], Q[5], atol=0.02)
        again = client.infer(vera_infer(Q[4:6]))
        assert again["holding"].all() and "no new picture" in again["reason"]


def vera_views_side_by_side() -> None:
    with vera_client() as client:
        np.testing.assert_allclose(client.infer(vera_infer(Q[3:4], Q[3]))["action"][-1], Q[3], atol=1e-6)
        assert "widths" in refusal(client, vera_infer(Q[3:5], view_widths=[32, 32]))
        assert "no image 'ext1'" in refusal(client, vera_infer(Q[3:5], view_keys=["a", "b"]))
        assert "list of names" in refusal(client, vera_infer(Q[3:5], view_keys=np.zeros(3)))
        batch = vera_infer(Q[3:5])
        batch["context_rgb"] = batch["context_rgb"][None]
        np.testing.assert_allclose(client.infer(batch)["action"][3], Q[4], atol=0.02)


def vera_observe() -> None:
    with vera_client() as client:
        client.infer(vera_infer(Q[:2], Q[0]))
        views = {"view_keys": VERA_VIEWS, "view_widths": [20, 32], "session_id": "a", "endpoint": "observe"}
        for name in ("executed_rgb", "context_rgb"):
            assert client.infer({**views, name: window(Q[:4])})["ok"] is True
        with_time = client.infer({"endpoint": "observe", "q": Q[1], "time": np.float32(0.08)})
        assert with_time["tracking_error"].shape == (1,) and with_time["tracking_error"][0] < 0.02
        before = client.infer(vera_infer(Q[1:3]))
        np.testing.assert_allclose(before["action"][3], Q[2], atol=0.02)  # nothing else changed
        assert "'executed_rgb' is not understood" in refusal(client, {**views, "executed_rgb": np.zeros((4, 4))})


def vera_configure() -> None:
    with vera_client() as client:
        assert client.infer({"n_action_steps": 6, "endpoint": "configure"}) == {"applied": {"n_action_steps": 6}}
        assert client.infer(vera_infer(Q[:2], Q[0]))["action"].shape == (6, 8)
        assert client.infer(vera_infer(Q[1:3], execute_horizon=5))["action"].shape == (5, 8)
        assert client.infer({"endpoint": "configure"}) == {"applied": {}}
        assert "'motion_plan_scale'" in refusal(client, {"motion_plan_scale": 1.5, "endpoint": "configure"})
        assert "would lose some" in refusal(client, {"n_action_steps": 3, "endpoint": "configure"})
        assert "at least 1" in refusal(client, {"n_action_steps": np.zeros(2), "endpoint": "configure"})


def vera_reload() -> None:
    with vera_client() as client:
        assert client.infer({"endpoint": "reload"}) == client.metadata
        assert client.infer({"embodiment": "panda", "endpoint": "reload"}) == client.metadata
        assert "'embodiment'" in refusal(client, {"embodiment": "droid", "endpoint": "reload"})
        assert "'dynamics_run_id'" in refusal(client, {"dynamics_run_id": "abc", "endpoint": "reload"})


def vera_new_session() -> None:
    """A client that forgets to reset: a new session is a new episode."""
    with vera_client() as client:
        client.infer(vera_infer(Q[:2], Q[0]))
        answer = client.infer(vera_infer(Q[12:13], Q[12], session_id="b"))
        np.testing.assert_allclose(answer["position"][-1], Q[12], atol=1e-6)


# ---- the table -------------------------------------------------------------------------------------------------------

EXCHANGES: dict[str, Callable[[], None]] = {
    "openpi DROID: ten actions to two images, joints and gripper": openpi_droid_observations,
    "openpi DROID: view by its short name": openpi_droid_short_view,
    "openpi DROID: degrees, misspelled and tool poses refused by name, later too": openpi_droid_wrong_state,
    "openpi LIBERO: state (8,) used": partial(openpi_libero_state, (8,)),
    "openpi LIBERO: state (1, 8) used": partial(openpi_libero_state, (1, 8)),
    "openpi LIBERO: later state compared with the command": openpi_libero_later_state_is_compared,
    "openpi LIBERO: tool pose as state refused by joint, later too": openpi_libero_tool_pose,
    "openpi ALOHA: nested images, channels first, 14 joints, normalized grippers": openpi_aloha_observations,
    "openpi broker: action_horizon 10": partial(openpi_broker, 10),
    "openpi broker: action_horizon 4": partial(openpi_broker, 4),
    "openpi broker: action_horizon of the handshake": openpi_broker_by_the_handshake,
    "openpi: more frames than the horizon holds refused": openpi_too_many_frames_for_the_horizon,
    "openpi: new episode": openpi_new_episode,
    "LingBot-VA: reset, first chunk of one frame": lingbot_reset_and_first_chunk,
    "LingBot-VA: empty compute_kv_cache": lingbot_empty_report,
    "LingBot-VA: first observation again": lingbot_first_observation_again,
    "LingBot-VA: real frames with states, actions of 16, 14 and 30 channels": lingbot_real_frames,
    "LingBot-VA: answers of 16 channels": partial(lingbot_channels, "quaternion", 16),
    "LingBot-VA: answers of 14 channels": partial(lingbot_channels, "euler", 14),
    "LingBot-VA: answers of 30 channels": partial(lingbot_channels, "all", 30),
    "LingBot-VA: the whole evaluation loop": lingbot_whole_evaluation_loop,
    "VERA: handshake": vera_handshake,
    "VERA: reset, infer with two pictures": vera_two_pictures,
    "VERA: infer with a rolling window": vera_rolling_window,
    "VERA: infer with views side by side": vera_views_side_by_side,
    "VERA: observe with pictures": vera_observe,
    "VERA: configure": vera_configure,
    "VERA: reload": vera_reload,
    "VERA: another session": vera_new_session,
}


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_client(exchange: str) -> None:
    EXCHANGES[exchange]()


# ---- odd messages ----------------------------------------------------------------------------------------------------

IMAGE = picture(Q[1])
ODD: dict[str, dict[str, Any]] = {
    "endpoint: array": {"endpoint": np.zeros((30, 30))},
    "endpoint: list": {"endpoint": ["infer"]},
    "endpoint: number": {"endpoint": 3},
    "endpoint: lines": {"endpoint": "infer\n\x1b[31m"},
    "reset: array": {"reset": np.ones(2, bool)},
    "reset: text": {"reset": "yes"},
    "compute_kv_cache: array": {"obs": [], "compute_kv_cache": np.ones(2)},
    **{
        f"time: {at!r}": {"endpoint": "observe", "q": Q[0], "time": at}
        for at in (np.inf, -np.inf, np.nan, 1e308, -1e308, 2**63, 1e6, -1.0, True, "now", np.zeros(3), np.float32("nan"))
    },
    "image: name of lines": {"a\nb\x00" * 100: IMAGE, "b": IMAGE},
    "image: 500 names": {f"camera{k}": IMAGE[:1, :1] for k in range(500)},
    "image: unknown name of 10 kB": {"image": IMAGE, "x" * 10_000: 1},
    "image: gray": {"image": IMAGE[..., 0]},
    "image: RGBA": {"image": np.zeros((4, 4, 4))},
    "image: list": {"image": IMAGE.tolist()},
    "image: empty": {"image": np.zeros((0, 0, 3))},
    "image: none": {"prompt": "go"},
    "image: nested names": {"images": {"a": {"b": {"c": 3}}}},
    "images of two sizes": {"obs": [{"a": IMAGE}, {"a": IMAGE[:4]}], "layout": "lingbot_va", "side": "left"},
    "state: text": {"image": IMAGE, "state": "home"},
    "state: ragged": {"image": IMAGE, "state": [[1.0], [1.0, 2.0]]},
    "state: NaN": {"image": IMAGE, "state": Q[0] * np.nan},
    "state: infinite": {"image": IMAGE, "state": Q[0] + np.inf},
    "state: huge": {"image": IMAGE, "state": np.full(8, 1e308)},
    "state: 5000 numbers": {"image": IMAGE, "state": np.zeros(5000)},
    "state: none of the joints": {"image": IMAGE, "state": []},
    "state: twice": {"image": IMAGE, "state": Q[0], "observation/state": Q[0]},
    "gripper: NaN": {"image": IMAGE, "joint_position": Q[0, :7], "gripper_position": np.array([np.nan])},
    "gripper: 5000 numbers": {"image": IMAGE, "joint_position": Q[0, :7], "gripper_position": np.full(5000, 9.0)},
    "joints: two opinions": {"image": IMAGE, "joint_position": Q[0], "q_robot": Q[1]},
    "obs: number": {"obs": 3},
    "obs: numbers": {"obs": [1, 2]},
    "obs: empty": {"obs": [], "layout": "lingbot_va", "side": "left"},
    "obs: empty map": {"obs": {}, "layout": "lingbot_va", "side": "left"},
    "layout: array": {"obs": {"a": IMAGE}, "layout": np.zeros(3)},
    "session_id: array": {"image": IMAGE, "session_id": np.zeros(3)},
    "execute_horizon: zero": {"image": IMAGE, "execute_horizon": 0},
    "execute_horizon: NaN": {"image": IMAGE, "execute_horizon": np.nan},
    "execute_horizon: short": {"image": IMAGE, "execute_horizon": 1},
    "view_widths: text": {"context_rgb": window(Q[:2]), "view_keys": ["a", "b"], "view_widths": "ab"},
    "view_widths: negative": {"context_rgb": window(Q[:2]), "view_keys": ["a", "b"], "view_widths": [60, -8]},
    "view_widths: 2-D": {"context_rgb": window(Q[:2]), "view_keys": ["a", "b"], "view_widths": np.ones((2, 2), int)},
    "view_keys: name of a state": {"context_rgb": window(Q[:2]), "view_keys": ["a", "q"], "q": Q[0]},
    "view_keys: one name twice": {"context_rgb": window(Q[:2]), "view_keys": ["a", "a"]},
    "context_rgb: one picture without time": {"context_rgb": np.zeros((2, 2, 2, 2, 2, 2))},
    "configure: unknown": {"endpoint": "configure", "x\ny": np.zeros(3)},
    "reload: array": {"endpoint": "reload", "action_space": np.zeros(3)},
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_odd_messages_are_refused_in_one_line_and_change_nothing(odd: str) -> None:
    asked, twin = session(action_space="joint_velocity"), session(action_space="joint_velocity")
    for k, q in enumerate(Q[:3]):
        with np.errstate(all="ignore"), pytest.raises(InputError) as refused:
            asked.handle(ODD[odd])
        assert 0 < len(str(refused.value)) <= 400 and str(refused.value).isprintable()
        message = {"image": picture(q), **({"state": q} if k == 0 else {})}
        answer, expected = asked.handle(message), twin.handle(message)
        np.testing.assert_array_equal(answer["actions"], expected["actions"])


FUZZED = ("endpoint", "reset", "obs", "compute_kv_cache", "state", "q", "time", "image", "images", "context_rgb", "rgb", "layout",
          "view_keys", "view_widths", "joint_position", "gripper_position", "q_robot", "eef_pos", "session_id", "layout", "side",
          "execute_horizon", "n_action_steps", "observation/state", "observation.images.cam_high", "prompt")  # fmt: skip
VALUES = [
    IMAGE, IMAGE * np.float32(np.nan), IMAGE[..., 0], np.stack([IMAGE] * 3), IMAGE.transpose(2, 0, 1), IMAGE == 1, IMAGE.astype("i8") - 9,
    np.zeros((0, 4, 3)), Q[0], Q[0][None], Q[0] * np.nan, TOOL_POSE, Q[0, :7], np.zeros(1), np.zeros(()), np.float32(3), np.int8(-1),
    np.True_, True, False, None, 0, 6, -1, 2**63, 1e308, np.inf, np.nan, "", "left", "lingbot_va", "paper_per_arm", "infer", "observe",
    "reset", "configure", "reload", "x\n", [], {}, ["a", "b"], [24, 28], [{"image": IMAGE, "state": Q[0]}], {"image": IMAGE}, b"\x00",
]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(FUZZED), st.sampled_from(VALUES), max_size=5), min_size=1, max_size=4))
def test_any_message_is_answered_by_finite_numbers_or_refused(messages: list[dict[str, Any]]) -> None:
    one = session(handshake=Handshake(layout="lingbot_va", side="left"))
    for message in messages:
        try:
            with np.errstate(all="ignore"):
                answer = one.handle(message)
        except InputError as error:
            assert 0 < len(str(error)) <= 400 and str(error).isprintable()
            continue
        arrays = [value for value in answer.values() if isinstance(value, np.ndarray)]
        assert all(np.isfinite(value).all() for value in arrays)
        if "actions" in answer:
            assert len({len(value) for value in arrays}) == 1 and len(answer["actions"]) > 0


# ---- the package itself ----------------------------------------------------------------------------------------------

OPENPI_RUN = """
import json, sys
import numpy as np
from openpi_client import action_chunk_broker, image_tools, websocket_client_policy

client = websocket_client_policy.WebsocketClientPolicy("127.0.0.1", int(sys.argv[1]))
broker = action_chunk_broker.ActionChunkBroker(client, action_horizon=int(sys.argv[2]))
rows = []
for q, frame in zip(*np.load(sys.argv[3]).values()):
    frame = np.transpose(image_tools.convert_to_uint8(image_tools.resize_with_pad(frame, 24, 32)), (2, 0, 1))
    for _ in range(int(sys.argv[2])):
        step = broker.infer({"state": q, "images": {"cam_high": frame}, "prompt": "go"})
        rows.append([float(step["time"]), *map(float, step["actions"])])
print(json.dumps(rows))
"""


@pytest.mark.slow
def test_openpis_own_package(tmp_path: Path) -> None:
    python = os.environ.get("OPENPI_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import openpi_client"], capture_output=True).returncode:
        pytest.skip(
            f"{python} has no openpi-client (it needs NumPy 1): set OPENPI_PYTHON to an interpreter that has it"
        )
    np.savez(tmp_path / "run.npz", q=Q[:4], frames=np.stack([picture(x) for x in Q[:4]]))
    (tmp_path / "run.py").write_text(textwrap.dedent(OPENPI_RUN))
    with serving(partial(session, "panda", Handshake(image_key="cam_high", action_horizon=10))) as (port, _):
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        command = [python, str(tmp_path / "run.py"), str(port), "10", str(tmp_path / "run.npz")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    rows = np.array(json.loads(done.stdout))
    np.testing.assert_allclose(np.diff(rows[:, 0]), 1 / CONTROL_RATE, atol=1e-9)
    np.testing.assert_allclose(rows[9::10, 1:], Q[:4], atol=0.02)
