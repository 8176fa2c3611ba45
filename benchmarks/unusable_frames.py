"""How far does a robot move where its camera shows nothing of it? Black, gray, white and noise frames with real fields. Prints JSON.

    python benchmarks/unusable_frames.py finger-5 --seed 6450

The robot rests at a pose that its first frame shows, or moves through the first frames of a clip. Then every frame is
unusable, for a second and a half. At rest no joint may be commanded to move more than .02 rad; in motion the way to brake is
compared with that of a robot whose camera gives no picture at all. Fields: a checkpoint, "analytic" (a finger) or "analytic panda".
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from hostile_episodes import Array, Rng
from hostile_scenes import RenderedScene
from results import add_save, rows, save

from jidm.control import ActionDecoder, ControlConfig

FPS, CONTROL_RATE, MOVING_FRAMES, BAD_FRAMES = 16.0, 48.0, 6, 24
MAY_MOVE = 0.02  # [rad or m]

UNUSABLE: dict[str, Callable[[Rng, tuple[int, ...]], Array]] = {
    "black": lambda rng, shape: np.zeros(shape),
    "gray": lambda rng, shape: np.full(shape, rng.uniform(0.2, 0.8)),
    "white": lambda rng, shape: np.ones(shape),
    "noise": lambda rng, shape: rng.random(shape),
    "soft noise": lambda rng, shape: np.clip(rng.random()  + rng.normal(0, 0.1, shape), 0, 1),
    "sensor noise on black": lambda rng, shape: np.abs(rng.normal(0, 0.02, shape)).clip(0, 1),
}  # fmt: skip


def travel(scene: RenderedScene, clip: int, bad: list[Array] | None, moving: bool) -> tuple[float, float]:
    """Largest distance of a joint from where it was before the bad frames [rad or m], and the share of commands that hold.

    Args:
        bad: the frames; None for a camera that gives no pictures.
    """
    video, q = scene.clips[clip]
    decoder = ActionDecoder(
        scene.idm, ControlConfig(video_rate=FPS, control_rate=CONTROL_RATE), limits=scene.robot.limits
    )
    decoder.reset(q[0])
    for frame in video[: MOVING_FRAMES if moving else 1]:
        decoder.push(frame)
    before = decoder.trajectory.position
    assert before is not None
    sent = [decoder.push(frame) for frame in bad or BAD_FRAMES * [np.zeros((1, 1, 7))]]
    position = np.concatenate([x.position for x in sent])
    return float(np.abs(position - before).max()), float(np.concatenate([x.holding for x in sent]).mean())


def measure(field: str, seed: int, episodes: int, side: int) -> dict[str, Any]:
    """Per kind of frame: distances and the share of commands that hold."""
    scene = RenderedScene(field, side=side, clips=3)
    found: dict[str, Any] = {}
    for name, make in UNUSABLE.items():
        at_rest, excess, holding = [], [], []
        for k in range(episodes):
            rng, clip = np.random.default_rng([seed, k]), k % len(scene.clips)
            shape = scene.clips[clip][0][0].shape
            fixed = k % 2 == 1 and name not in ("noise", "soft noise", "sensor noise on black")
            bad = BAD_FRAMES * [make(rng, shape)] if fixed else [make(rng, shape) for _ in range(BAD_FRAMES)]
            distance, held = travel(scene, clip, bad, moving=False)
            at_rest.append(distance)
            holding.append(held)
            excess.append(travel(scene, clip, bad, moving=True)[0] - travel(scene, clip, None, moving=True)[0])
        found[name] = {
            "at rest, largest": max(at_rest), "at rest, median": float(np.median(at_rest)),
            "at rest, beyond .02": float(np.mean(np.array(at_rest) > MAY_MOVE)), "in motion, largest excess": max(excess),
            "holding": float(np.mean(holding)), "episodes": episodes,
        }  # fmt: skip
        print(field, name, {key: round(value, 4) for key, value in found[name].items()}, flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fields", nargs="+")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--episodes", type=int, default=6, help="per kind of frame")
    parser.add_argument("--side", type=int, default=128)
    add_save(parser)
    args = parser.parse_args()
    report = {field: measure(field, args.seed, args.episodes, args.side) for field in args.fields}
    print(json.dumps(report, indent=1))
    made = []
    for field, found in report.items():
        method = "analytic" if field.startswith("analytic") else "learned"
        name = RenderedScene.robot_of(field)
        for case, x in found.items():
            measured = {
                "unusable_travel": x["at rest, largest"], "unusable_beyond": x["at rest, beyond .02"],
                "unusable_excess": x["in motion, largest excess"], "holding_share": x["holding"],
            }  # fmt: skip
            made += rows(name, method, measured, case=case)
    save(
        args.save,
        "unusable_frames",
        made,
        raw=report,
        seeds=(args.seed,),
        note=f"{args.episodes} episodes per kind of frame.",
    )
