"""Does the reward rank videos of robots as executing them would? Films good and spoilt videos, and lets judges read them.

    python benchmarks/reward_validity.py --robot panda --seed 5100 --exact --learned panda-sim --out panda.jsonl
    python benchmarks/reward_validity.py --robot panda --seed 5100 --eva runs/panda-eva --out panda-eva.jsonl
    python benchmarks/reward_tables.py panda.jsonl panda-eva.jsonl

Every take is a new motion, look and still, structured ground. It is filmed clean and once in every kind of failure, strengths
taking turns; the first takes are only filmed clean, to calibrate on. A video's line holds what each judge read off it (the
terms' raw values, EVA's penalty, the decoded positions), how far from the take's motion the robot ends up when those
positions are sent to it, and how far what it then does looks from what the video shows. Stopped and started again, it goes on.

Judges: "exact" has the URDF, the camera and the first pose; "learned" is a checkpoint, told the first pose; "eva" is EVA's
kind of IDM, whose own actions EVA's reward judges.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from jidm import Embodiment, JacobianIDM
from jidm.adapters.reward import TERMS, EvaLimits, ExecutabilityReward, eva_reward
from jidm.errors import InputError
from jidm.field.analytic import AnalyticField
from jidm.learn.zoo import load_idm
from jidm.motion.flow import as_flow_estimator
from jidm.robot.kinematics import Kinematics
from jidm.sim.artifacts import KINDS, Take, corrupt
from jidm.sim.babble import BabbleConfig, Stage
from jidm.sim.freespace import FreeSpace
from jidm.sim.look import Look
from jidm.sim.replay import replay
from jidm.sim.world import World

STRENGTHS = (0.25, 0.5, 1.0)
FPS, FRAMES, SIDE = 16.0, 25, 256
_CROPPED = {"allegro_right": 0.05}  # as the bundled checkpoints were trained; .15 for arms
_AMPLITUDE = 0.5
_MOVES = 0.2  # [rad/s] mean speed of the fastest joint: a robot that stands still is one of the failures
_TRIES = 100  # motions from which a take's is chosen
_COMPARED = slice(1, None, 3)  # frames of which the executed motion is filmed
_CONTRAST = 0.1  # of the ground at least: one that slides must be seen to slide


class Scenes:
    """Takes of one robot, each a function of seed and number alone."""

    def __init__(
        self, robot: str, seed: int, *, side: int = SIDE, frames: int = FRAMES, amplitude: float = _AMPLITUDE
    ) -> None:
        config = BabbleConfig(
            embodiment=robot, episodes=1, frames=frames, fps=FPS, seed=seed, amplitude=amplitude, width=side,
            height=side, cropped=_CROPPED.get(robot, 0.15),
        )  # fmt: skip
        self.robot, self.seed, self._stage = Embodiment.load(robot), seed, Stage(config)
        self.camera = self._stage.cameras["front"]
        self._world = World(self.robot, supersample=2, exact=False, detail=0.003)

    def take(self, k: int) -> Take:
        """Number k."""
        seed = int(np.random.SeedSequence([self.seed, k]).generate_state(1)[0])
        look, rng = Look.random(seed), np.random.default_rng([seed, 1])
        ground = replace(
            look.background, kind=str(rng.choice(["picture", "patches"])), velocity=(0.0, 0.0),
            contrast=max(_CONTRAST, look.background.contrast),
        )  # fmt: skip
        self._world.seed, self._world.look = seed, replace(look, background=ground)
        return Take.film(self._world, self.camera, self._motion(k), FPS)

    def _motion(self, k: int) -> NDArray[np.float64]:
        for i in range(_TRIES):
            q = self._stage.motion(_TRIES * k + i)
            if np.abs(np.diff(q, axis=0)).mean(0)[~self.robot.gripper_mask].max() * FPS >= _MOVES:
                return q
        raise InputError(f"take {k}: no motion is fast enough")


Judge = Callable[[NDArray[np.uint8], NDArray[np.float64]], tuple[torch.Tensor, dict[str, float]]]
"""From a video (T, H, W, 3) and its first pose to decoded positions (T, n) and the terms' raw values, if it has any."""


def of_reward(reward: ExecutabilityReward) -> Judge:
    """What a reward reads, before any scale."""

    def judge(video: NDArray[np.uint8], q0: NDArray[np.float64]) -> tuple[torch.Tensor, dict[str, float]]:
        reading = reward.read(video, q0=q0, fps=FPS)
        return reading.q, {name: float(TERMS[name].raw(reading).worst) for name in reward.weights}

    return judge


def exact_judge(robot: Embodiment, camera: Any) -> Judge:
    """With the field of URDF and camera."""
    field = AnalyticField(robot, camera, points=1500, occluders=8000, contour_points=30000)
    idm = JacobianIDM(robot, field, as_flow_estimator("dis"), limits="none")
    return of_reward(ExecutabilityReward(idm, weights={"consistency": 0.0}))


def learned_judge(checkpoint: str) -> Judge:
    """With a learned field."""
    return of_reward(ExecutabilityReward(JacobianIDM.from_pretrained(checkpoint, limits="none")))


def eva_judge(checkpoint: str) -> Judge:
    """EVA's own kind of IDM."""
    idm = load_idm(checkpoint)

    def judge(video: NDArray[np.uint8], q0: NDArray[np.float64]) -> tuple[torch.Tensor, dict[str, float]]:
        return idm.decode(video, q0=q0, fps=FPS, layout="THWC").position, {}

    return judge


class Executed:
    """What a robot makes of decoded positions."""

    def __init__(self, robot: Embodiment, free: FreeSpace) -> None:
        self._robot, self._free = robot, free
        self._kinematics = Kinematics.from_embodiment(robot)
        self._tip_links = [robot.model.link_index(name) for name in robot.tip_links]

    def motion(self, q: NDArray[np.float64]) -> NDArray[np.float64]:
        """(T, n) where it goes when q is sent to it."""
        return replay(self._robot, q, 1 / FPS, free=self._free).q

    def off(self, done: NDArray[np.float64], intended: NDArray[np.float64]) -> float:
        """Mean distance of the tips from where the intended motion has them [m]."""
        return float(np.linalg.norm(self._tips(done) - self._tips(intended), axis=-1).mean())

    def _tips(self, q: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(self._kinematics.link_poses(torch.from_numpy(q))[:, self._tip_links, :3, 3].numpy())


def unlike(done: NDArray[np.float64], take: Take, video: NDArray[np.uint8]) -> float:
    """Mean difference between the video and a film of the robot doing that in the same place [of full brightness]."""
    film = take.again(done[_COMPARED])
    return float(np.abs(film.astype(np.float64) - video[_COMPARED]).mean() / 255)


def videos(scenes: Scenes, k: int, calibrates: bool, done: set[str]) -> Iterator[tuple[dict[str, Any], Take, Any]]:
    """Label, take and video of each video of a take that is not done yet; no video where it cannot be spoilt."""
    kinds = () if calibrates else KINDS
    names = [f"{k}/clean", *(f"{k}/{kind}" for kind in kinds)]
    if done.issuperset(names):
        return
    take = scenes.take(k)
    for i, name in enumerate(names):
        if name in done:
            continue
        about = {"video": name, "kind": "clean", "strength": 0.0, "calibrates": calibrates}
        if i == 0:
            yield about, take, take.seen.rgb
            continue
        kind, strength = kinds[i - 1], STRENGTHS[(k + i) % len(STRENGTHS)]
        try:
            spoilt = corrupt(take, kind, strength, k)
        except InputError as error:
            yield {**about, "kind": kind, "strength": strength, "problem": str(error)}, take, None
            continue
        yield {**about, **spoilt.label}, take, spoilt.video


def run(scenes: Scenes, takes: range, calibrating: int, judges: dict[str, Judge], out: Path) -> None:
    """Append the lines that are missing; take k calibrates if k < calibrating."""
    there = {json.loads(line)["video"] for line in out.read_text().splitlines()} if out.exists() else set()
    limits = EvaLimits.of(scenes.robot)
    with FreeSpace(scenes.robot, clearance=0.0) as free, open(out, "a", encoding="utf-8") as file, torch.no_grad():
        executed = Executed(scenes.robot, free)
        for k in takes:
            for about, take, video in videos(scenes, k, k < calibrating, there):
                line = {"robot": scenes.robot.name, "seed": scenes.seed, **about}
                for name, judge in judges.items() if video is not None else ():
                    decoded, raw = judge(video, take.q[0])
                    q = decoded.double().numpy()
                    done = executed.motion(q)
                    line[name] = {
                        "penalty": float(eva_reward(decoded.double(), limits, 1 / FPS).penalty), "raw": raw,
                        "executed_m": executed.off(done, take.q), "unlike": unlike(done, take, video),
                        "off": float(np.abs(q - take.q).mean()), "q": q.round(4).tolist(),
                    }  # fmt: skip
                file.write(json.dumps(line) + "\n")
                file.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--robot", required=True)
    parser.add_argument("--seed", type=int, required=True, help="of motions, looks and failures")
    parser.add_argument("--takes", type=int, nargs=2, default=(0, 142), metavar=("FIRST", "END"))
    parser.add_argument("--calibrating", type=int, default=40, help="the first so many takes are for calibrating")
    parser.add_argument("--exact", action="store_true", help="judge by URDF and camera")
    parser.add_argument("--learned", help="checkpoint of a learned field")
    parser.add_argument("--eva", help="checkpoint of EVA's kind of IDM")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines")
    given = parser.parse_args()
    films, asked = Scenes(given.robot, given.seed), {}
    if given.exact:
        asked["exact"] = exact_judge(films.robot, films.camera)
    if given.learned is not None:
        asked["learned"] = learned_judge(given.learned)
    if given.eva is not None:
        asked["eva"] = eva_judge(given.eva)
    if not asked:
        parser.error("name a judge: --exact, --learned or --eva")
    run(films, range(*given.takes), given.calibrating, asked, given.out)
