"""Commands from 100 random videos: limits, smoothness at chunk borders, latency. Prints JSON.

    python benchmarks/decoder.py panda-sim --videos 100 --seed 6100

Videos of motor babbling at 12.5 frames per second, as fast as the joints go, every other one spoiled by a random
failure (`jidm.sim.failures`: jumps, teleports, flicker, missing links). They are decoded in chunks of four frames to
50 commands per second, and once more frame by frame. Limits are checked on differences of the commanded positions,
sampled ten times as densely as the commands.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray
from results import add_save, row, rows, save
from reward_validity import EpisodeGenerator

from jidm import JacobianIDM
from jidm.control import ActionDecoder, ControlConfig, MotionLimits
from jidm.errors import InputError
from jidm.sim.failures import FAILURE_KINDS, corrupt

VIDEO_RATE, CONTROL_RATE, CHUNK, FRAMES, SIDE = 12.5, 50.0, 4, 25, 128
_OVERSAMPLING = 10  # samples per command at which limits are checked


def limit_usage(q: NDArray[np.float64], limits: MotionLimits, dt: float) -> dict[str, float]:
    """The largest share of each limit that a motion uses, by its differences; above 1 is too much."""
    found = {}
    for order, name in enumerate(("velocity", "acceleration", "jerk"), start=1):
        share = np.abs(np.diff(q, order, axis=0)) / dt**order / getattr(limits, name)
        found[name] = float(share.max())
    middle, half = (limits.upper + limits.lower) / 2, (limits.upper - limits.lower) / 2
    found["position"] = float((np.abs(q - middle) / half).max())
    return found


def decode_in_chunks(
    idm: JacobianIDM, video: NDArray[np.uint8], q0: NDArray[np.float64], rate: float, chunk: int
) -> tuple[Any, list[float]]:
    """Positions commanded, and how long each push took [s]."""
    decoder = ActionDecoder(idm, ControlConfig(video_rate=VIDEO_RATE, control_rate=rate))
    decoder.reset(q0)
    decoder.push(video[0])
    positions, durations = [q0[None]], []
    for k in range(1, len(video), chunk):
        began = time.perf_counter()
        commands = decoder.push(video[k : k + chunk])
        durations.append(time.perf_counter() - began)
        positions.append(commands.position)
    return np.concatenate(positions), durations


def boundary_jumps(q: NDArray[np.float64], dt: float, chunk: int) -> tuple[float, float]:
    """Largest change of velocity from one command to the next at the borders of chunks, and inside them."""
    velocity_change = np.abs(np.diff(q, 2, axis=0)).max(1) / dt
    at = np.arange(chunk - 1, len(velocity_change), chunk)
    return float(velocity_change[at].max()), float(np.delete(velocity_change, at).max())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--videos", type=int, default=100)
    parser.add_argument("--seed", type=int, required=True)
    add_save(parser)
    args = parser.parse_args()
    idm = JacobianIDM.from_pretrained(args.checkpoint)
    assert idm.embodiment is not None
    limits, generator = (
        MotionLimits.from_embodiment(idm.embodiment),
        EpisodeGenerator(idm.embodiment.name, args.seed, side=SIDE, frames=FRAMES),
    )
    usage: list[dict[str, float]] = []
    jumps: list[tuple[float, float]] = []
    latency: list[float] = []
    per_chunk = round(CHUNK * CONTROL_RATE / VIDEO_RATE)
    for k in range(args.videos):
        episode = generator.episode(k)
        video = episode.rendering.rgb
        if k % 2:
            with suppress(InputError):  # not every episode can be spoiled in every way
                video = corrupt(episode, FAILURE_KINDS[k // 2 % len(FAILURE_KINDS)], 1.0, k).video
        fine, _ = decode_in_chunks(idm, video, episode.q[0], CONTROL_RATE * _OVERSAMPLING, CHUNK)
        usage.append(limit_usage(fine, limits, 1 / CONTROL_RATE / _OVERSAMPLING))
        coarse, _ = decode_in_chunks(idm, video, episode.q[0], CONTROL_RATE, CHUNK)
        jumps.append(boundary_jumps(coarse, 1 / CONTROL_RATE, per_chunk))
        latency += decode_in_chunks(idm, video, episode.q[0], CONTROL_RATE, 1)[1]
    p50, p99 = np.percentile(np.array(latency) * 1000, [50, 99])
    report: dict[str, Any] = {
        "videos": args.videos,
        "largest share of a limit": {name: round(max(x[name] for x in usage), 6) for name in usage[0]},
        "change of velocity, largest": {"at borders": max(x[0] for x in jumps), "inside": max(x[1] for x in jumps)},
        "videos whose borders are rougher than their chunks": sum(a > b for a, b in jumps),
        "latency [ms]": {"p50": round(float(p50), 1), "p99": round(float(p99), 1)},
    }
    print(json.dumps(report, indent=1))
    robot, largest = idm.embodiment.name, report["largest share of a limit"]
    measured = {
        "velocity_share": largest["velocity"],
        "acceleration_share": largest["acceleration"],
        "jerk_share": largest["jerk"],
        "position_limit_share": largest["position"],
        "rough_borders": report["videos whose borders are rougher than their chunks"],
        "latency_p50": float(p50),
        "latency_p99": float(p99),
    }
    figures = rows(robot, "learned", measured)
    figures += [
        row(robot, "learned", "velocity_change", max(x[k] for x in jumps), case=case)
        for k, case in enumerate(("at chunk borders", "inside chunks"))
    ]
    note = (
        f"{FRAMES} frames of {SIDE}x{SIDE} at {VIDEO_RATE:g} fps, every other video corrupted, {CONTROL_RATE:g} commands per "
        f"second, limits checked at {CONTROL_RATE * _OVERSAMPLING:g} Hz."
    )
    save(args.save, "decoder", figures, raw=report, seeds=(args.seed,), note=note)
