"""A robot led by a planner that needs a whole chunk to dream the next one: sync, naive and grounded.

    python benchmarks/async_loop.py panda-sim --seed 6200 --takes 5

The world is PyBullet's, the robot does 95 % of every step it is told, and the planner is a video model as good as can be: it
reads the pose off the frame it is handed, by the exact field and what the robot measured in its last real frame, and films the
way from there to where the reference is four frames on. The camera shows the hand in every
frame of the reference. Frames are decoded by the checkpoint. Time is counted in control periods: a dream is there a chunk after it was asked
for. Printed are how far the robot is from the reference at the end of each chunk, and frames of the reference done a second.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import Executor, Future
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from reward_validity import Scenes
from torch import Tensor

from jidm import JacobianIDM
from jidm.adapters.decoder import MODES, ActionDecoder, AsyncController
from jidm.field.analytic import AnalyticField
from jidm.field.forward import carried
from jidm.motion.flow import as_flow_estimator
from jidm.robot.kinematics import Kinematics
from jidm.sim.artifacts import Take

VIDEO_RATE, CONTROL_RATE, CHUNK, SIDE = 12.5, 50.0, 4, 256
EACH = round(CONTROL_RATE / VIDEO_RATE)
_DOES = 0.95  # of every step


class Dreamer:
    """Films the way from the pose in a frame to the reference, one chunk further each time it is asked.

    Attributes:
        real: the last real frame and what the robot measured in it.
    """

    def __init__(self, take: Take, reads: JacobianIDM) -> None:
        self._take, self._reads = take, reads
        self.real: tuple[NDArray[np.uint8], NDArray[np.float64]]
        self._chunk = 0

    def __call__(self, frame: Tensor) -> NDArray[np.uint8]:
        done, self._chunk = self._chunk * CHUNK, self._chunk + 1
        off = self._pose(frame) - self._take.q[done]
        ahead = self._take.q[done + 1 : done + CHUNK + 1]
        left = 1 - np.arange(1, CHUNK + 1)[:, None] / CHUNK
        robot = self._take.robot
        return self._take.again(np.clip(ahead + left * off, robot.lower, robot.upper))

    def _pose(self, frame: Tensor) -> NDArray[np.float64]:
        real = torch.from_numpy(self.real[0]).permute(2, 0, 1).double() / 255
        stream = self._reads.stream(real, time=0.0, q0=self.real[1])
        stream.push(frame.double(), CHUNK / VIDEO_RATE)
        return np.asarray(stream.q)


def tips(take: Take, q: NDArray[np.float64]) -> Tensor:
    """(..., tips, 3) where they are at joint positions (..., n) [m]."""
    links = [take.robot.model.link_index(name) for name in take.robot.tip_links]
    return Kinematics.from_embodiment(take.robot).link_poses(torch.from_numpy(q))[..., links, :3, 3]


def shows_hand(take: Take) -> bool:
    """Whether the camera sees where the tips are in every frame."""
    uv, _ = take.camera.project(tips(take, take.q))
    return bool(((uv >= 0) & (uv < SIDE)).all())


def speed(take: Take) -> float:
    """Mean speed of the tips [m/s]."""
    return float(tips(take, take.q).diff(dim=0).norm(dim=-1).mean()) * VIDEO_RATE


class Later(Executor):
    """Runs what it is given at once and hands it over so many control periods later."""

    def __init__(self, periods: int) -> None:
        self._periods = periods
        self._waiting: list[tuple[list[int], Future[Any], Any]] = []

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._waiting.append(([self._periods], future, call(*args, **kwargs)))
        return future

    def tick(self) -> None:
        """A control period has passed."""
        for left, future, result in list(self._waiting):
            left[0] -= 1
            if left[0] <= 0:
                future.set_result(result)
        self._waiting = [item for item in self._waiting if item[0][0] > 0]


def run(
    take: Take, idm: JacobianIDM, reads: JacobianIDM, mode: str, chunks: int, forward: Any = None
) -> tuple[list[float], float, str]:
    """Distance of the tips from the reference after each chunk [m], frames of it done a second, where the time went."""
    decoder, late = ActionDecoder(idm, video_rate=VIDEO_RATE, control_rate=CONTROL_RATE), Later(CHUNK * EACH)
    dreamer = Dreamer(take, reads)
    soon = Later(EACH - 1)
    controller = AsyncController(dreamer, decoder, mode=mode, forward=forward, planning=late, comparing=soon)
    q, periods, moved = np.array(take.q[0], dtype=np.float64), 0, 0
    off: list[float] = []
    controller.reset(take.again(q[None])[0], q)
    while len(off) < chunks:
        frame = None
        if periods % EACH == 0:
            frame = take.again(q[None])[0]
            dreamer.real = frame, q
        command = controller.step(frame, q)
        q = np.clip(q + _DOES * command.delta[0], take.robot.lower, take.robot.upper)
        late.tick()
        soon.tick()
        periods += 1
        moved += not command.held[0]
        if not command.held[0] and moved % (CHUNK * EACH) == 0:
            reference = take.q[len(off) * CHUNK + CHUNK]
            off.append(float((tips(take, q) - tips(take, reference)).norm(dim=-1).mean()))
    return off, chunks * CHUNK / (periods / CONTROL_RATE), controller.report()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--takes", type=int, default=5)
    parser.add_argument("--chunks", type=int, default=25)
    parser.add_argument("--amplitude", type=float, default=0.12, help="share of the joints' range that motions cover")
    given = parser.parse_args()
    idm = JacobianIDM.from_pretrained(given.checkpoint)
    assert idm.embodiment is not None
    scenes = Scenes(
        idm.embodiment.name, given.seed, side=SIDE, frames=given.chunks * CHUNK + 1, amplitude=given.amplitude
    )
    exact = AnalyticField(idm.embodiment, scenes.camera, points=1500, occluders=8000, contour_points=30000)
    reads = JacobianIDM(idm.embodiment, exact, as_flow_estimator("dis"))
    dense = AnalyticField(idm.embodiment, scenes.camera, points=1500, occluders=60000, contour_points=30000)

    def by_geometry(frame: Tensor, q: NDArray[np.float64], steps: NDArray[np.float64]) -> Tensor:
        return carried(dense, frame.double(), torch.from_numpy(q), torch.from_numpy(steps)).to(frame)

    ways: dict[str, tuple[str, Any]] = {mode: (mode, None) for mode in MODES}
    ways["async_grounded, by URDF and camera"] = ("async_grounded", by_geometry)
    errors: dict[str, list[float]] = {way: [] for way in ways}
    pace: dict[str, list[float]] = {way: [] for way in ways}
    takes = islice(filter(shows_hand, map(scenes.take, count())), given.takes)
    speeds: list[float] = []
    for take in takes:
        speeds.append(speed(take))
        for way, (mode, forward) in ways.items():
            off, done, report = run(take, idm, reads, mode, given.chunks, forward)
            errors[way] += off
            pace[way].append(done)
            print(f"{way}: {1000 * np.mean(off):.1f} mm", flush=True)
    print(report)
    mean = {mode: float(np.mean(values)) for mode, values in errors.items()}
    told = {
        "speed of the reference [mm/s]": round(1000 * float(np.mean(speeds))),
        "tracking error [mm]": {mode: round(1000 * value, 2) for mode, value in mean.items()},
        "over sync": {mode: round(value / mean["sync"], 3) for mode, value in mean.items()},
        "frames a second": {mode: round(float(np.mean(values)), 2) for mode, values in pace.items()},
    }
    print(json.dumps(told, indent=1))
