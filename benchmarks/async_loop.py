"""Asynchronous control with a planner that needs the time of a whole chunk: synchronous, naive and grounded. Prints JSON.

    python benchmarks/async_loop.py panda-sim --seed 6200 --episodes 5

The world is simulated by PyBullet, and the robot executes 95 % of each commanded step. The planner stands for an
ideal video model: it estimates the pose in the frame it is given, with the exact field and the last measured joint
positions, and renders the way from there to where the reference is four frames later. The camera shows the tips in
every frame of the reference. Generated frames are decoded by the checkpoint. Time is counted in control periods;
generated frames arrive one chunk after they were requested. Printed are the distance of the tips from the reference
at the end of each chunk and the rate at which frames of the reference are completed.
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
from results import add_save, rows, save
from reward_validity import EpisodeGenerator
from torch import Tensor

from jidm import JacobianIDM
from jidm.control import MODES, ActionDecoder, AsyncController, ControlConfig
from jidm.fields.analytic import AnalyticField
from jidm.fields.warp import warp_frame
from jidm.flow import as_flow_estimator
from jidm.robot.kinematics import Kinematics
from jidm.sim.failures import RenderedEpisode

VIDEO_RATE, CONTROL_RATE, CHUNK, SIDE = 12.5, 50.0, 4, 256
COMMANDS_PER_FRAME = round(CONTROL_RATE / VIDEO_RATE)
_EXECUTED_FRACTION = 0.95  # of every step


class OraclePlanner:
    """Films the way from the pose in a frame to the reference, one chunk further each time it is asked.

    Attributes:
        real: the last real frame and what the robot measured in it.
    """

    def __init__(self, episode: RenderedEpisode, pose_decoder: JacobianIDM) -> None:
        self._episode, self._pose_decoder = episode, pose_decoder
        self.last_observation: tuple[NDArray[np.uint8], NDArray[np.float64]]
        self._chunk = 0

    def __call__(self, frame: Tensor) -> NDArray[np.uint8]:
        first, self._chunk = self._chunk * CHUNK, self._chunk + 1
        offset = self._pose(frame) - self._episode.q[first]
        upcoming = self._episode.q[first + 1 : first + CHUNK + 1]
        remaining = 1 - np.arange(1, CHUNK + 1)[:, None] / CHUNK
        robot = self._episode.robot
        return self._episode.rerender(np.clip(upcoming + remaining * offset, robot.lower, robot.upper))

    def _pose(self, frame: Tensor) -> NDArray[np.float64]:
        image = torch.from_numpy(self.last_observation[0]).permute(2, 0, 1).double() / 255
        stream = self._pose_decoder.stream(image, time=0.0, q0=self.last_observation[1])
        stream.push(frame.double(), CHUNK / VIDEO_RATE)
        return np.asarray(stream.q)


def tip_positions(episode: RenderedEpisode, q: NDArray[np.float64]) -> Tensor:
    """(..., tips, 3) where they are at joint positions (..., n) [m]."""
    links = [episode.robot.model.link_index(name) for name in episode.robot.tip_links]
    return Kinematics.from_embodiment(episode.robot).link_poses(torch.from_numpy(q))[..., links, :3, 3]


def tips_in_view(episode: RenderedEpisode) -> bool:
    """Whether the camera sees where the tips are in every frame."""
    uv, _ = episode.camera.project(tip_positions(episode, episode.q))
    return bool(((uv >= 0) & (uv < SIDE)).all())


def tip_speed(episode: RenderedEpisode) -> float:
    """Mean speed of the tips [m/s]."""
    return float(tip_positions(episode, episode.q).diff(dim=0).norm(dim=-1).mean()) * VIDEO_RATE


class DelayedExecutor(Executor):
    """Runs what it is given at once and hands it over so many control periods later."""

    def __init__(self, periods: int) -> None:
        self._periods = periods
        self._pending: list[tuple[list[int], Future[Any], Any]] = []

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._pending.append(([self._periods], future, call(*args, **kwargs)))
        return future

    def tick(self) -> None:
        """A control period has passed."""
        for remaining, future, result in list(self._pending):
            remaining[0] -= 1
            if remaining[0] <= 0:
                future.set_result(result)
        self._pending = [item for item in self._pending if item[0][0] > 0]


def run(
    episode: RenderedEpisode, idm: JacobianIDM, pose_decoder: JacobianIDM, mode: str, chunks: int, forward: Any = None
) -> tuple[list[float], float, str]:
    """Distance of the tips from the reference after each chunk [m], completed reference frames per second, time report."""
    decoder, planning_executor = (
        ActionDecoder(idm, ControlConfig(video_rate=VIDEO_RATE, control_rate=CONTROL_RATE)),
        DelayedExecutor(CHUNK * COMMANDS_PER_FRAME),
    )
    planner = OraclePlanner(episode, pose_decoder)
    comparing_executor = DelayedExecutor(COMMANDS_PER_FRAME - 1)
    controller = AsyncController(
        planner,
        decoder,
        mode=mode,
        forward_model=forward,
        planning_executor=planning_executor,
        comparison_executor=comparing_executor,
    )
    q, periods, moving_periods = np.array(episode.q[0], dtype=np.float64), 0, 0
    errors: list[float] = []
    controller.reset(episode.rerender(q[None])[0], q)
    while len(errors) < chunks:
        frame = None
        if periods % COMMANDS_PER_FRAME == 0:
            frame = episode.rerender(q[None])[0]
            planner.last_observation = frame, q
        command = controller.step(frame, q)
        q = np.clip(q + _EXECUTED_FRACTION * command.delta[0], episode.robot.lower, episode.robot.upper)
        planning_executor.tick()
        comparing_executor.tick()
        periods += 1
        moving_periods += not command.holding[0]
        if not command.holding[0] and moving_periods % (CHUNK * COMMANDS_PER_FRAME) == 0:
            reference = episode.q[len(errors) * CHUNK + CHUNK]
            errors.append(float((tip_positions(episode, q) - tip_positions(episode, reference)).norm(dim=-1).mean()))
    return errors, chunks * CHUNK / (periods / CONTROL_RATE), controller.report()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--episodes", type=int, default=5)
    parser.add_argument("--chunks", type=int, default=25)
    parser.add_argument(
        "--range-fraction", type=float, default=0.12, help="share of the joints' range that motions cover"
    )
    add_save(parser)
    args = parser.parse_args()
    idm = JacobianIDM.from_pretrained(args.checkpoint)
    assert idm.embodiment is not None
    generator = EpisodeGenerator(
        idm.embodiment.name, args.seed, side=SIDE, frames=args.chunks * CHUNK + 1, range_fraction=args.range_fraction
    )
    field = AnalyticField(idm.embodiment, generator.camera, points=1500, occluders=8000, contour_points=30000)
    pose_decoder = JacobianIDM(idm.embodiment, field, as_flow_estimator("dis"))
    dense_field = AnalyticField(idm.embodiment, generator.camera, points=1500, occluders=60000, contour_points=30000)

    def by_geometry(frame: Tensor, q: NDArray[np.float64], steps: NDArray[np.float64]) -> Tensor:
        return warp_frame(dense_field, frame.double(), torch.from_numpy(q), torch.from_numpy(steps)).to(frame)

    methods: dict[str, tuple[str, Any]] = {mode: (mode, None) for mode in MODES}
    methods["async_grounded_analytic"] = ("async_grounded", by_geometry)
    errors: dict[str, list[float]] = {way: [] for way in methods}
    rates: dict[str, list[float]] = {way: [] for way in methods}
    episodes = islice(filter(tips_in_view, map(generator.episode, count())), args.episodes)
    speeds: list[float] = []
    for episode in episodes:
        speeds.append(tip_speed(episode))
        for way, (mode, forward) in methods.items():
            tip_errors, rate, report = run(episode, idm, pose_decoder, mode, args.chunks, forward)
            errors[way] += tip_errors
            rates[way].append(rate)
            print(f"{way}: {1000 * np.mean(tip_errors):.1f} mm", flush=True)
    print(report)
    mean = {mode: float(np.mean(values)) for mode, values in errors.items()}
    results = {
        "speed of the reference [mm/s]": round(1000 * float(np.mean(speeds))),
        "tracking error [mm]": {mode: round(1000 * value, 2) for mode, value in mean.items()},
        "over sync": {mode: round(value / mean["sync"], 3) for mode, value in mean.items()},
        "frames per second": {mode: round(float(np.mean(values)), 2) for mode, values in rates.items()},
    }
    print(json.dumps(results, indent=1))
    pace = {mode: float(np.mean(values)) for mode, values in rates.items()}
    figures = []
    for mode in methods:
        measured = {
            "tracking_error": 1000 * mean[mode],
            "error_over_sync": mean[mode] / mean["sync"],
            "reference_rate": pace[mode],
            "rate_over_sync": pace[mode] / pace["sync"] if mode != "sync" else None,
            "excess_over_naive": (mean[mode] - mean["sync"]) / (mean["async_naive"] - mean["sync"])
            if mode.startswith("async_grounded")
            else None,
        }
        figures += rows(idm.embodiment.name, mode, measured)
    note = (
        f"{args.episodes} motions of {args.chunks} chunks of {CHUNK} frames, tips at "
        f"{results['speed of the reference [mm/s]']} mm/s on average."
    )
    save(args.save, "async_loop", figures, raw=results, seeds=(args.seed,), note=note)
