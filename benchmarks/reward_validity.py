"""Does the reward rank videos of robots as executing them would? Renders clean and spoiled videos and lets scorers read them.

    python benchmarks/reward_validity.py --robot panda --seed 5100 --exact --learned panda-sim --out panda.jsonl
    python benchmarks/reward_validity.py --robot panda --seed 5100 --eva out/panda-eva --out panda-eva.jsonl
    python benchmarks/reward_tables.py panda.jsonl panda-eva.jsonl

Every episode has a new motion, a new appearance and a static, structured background. It is rendered clean and once
with every kind of failure, at alternating strengths; the first episodes are rendered clean only, for calibration. The
line of a video holds what each scorer found (raw values of the terms, EVA's penalty, the decoded positions), how far
the robot ends up from the episode's motion when these positions are sent to it, and how much the executed motion
differs from the video in appearance. An interrupted run goes on.

Scorers: "exact" has the URDF, the camera and the first pose; "learned" is a checkpoint, given the first pose; "eva"
is EVA's kind of IDM, whose own actions EVA's reward scores.
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

from jidm import Embodiment, JacobianIDM, load_embodiment
from jidm.errors import InputError
from jidm.fields.analytic import AnalyticField
from jidm.flow import as_flow_estimator
from jidm.json_lines import parse_json_lines
from jidm.model_registry import load_idm
from jidm.rewards import TERMS, EvaLimits, ExecutabilityReward, eva_reward
from jidm.robot.kinematics import Kinematics
from jidm.sim.appearance import Appearance
from jidm.sim.babble import CAMERA_JITTER, BabbleConfig, Recorder
from jidm.sim.camera_placement import jitter_camera
from jidm.sim.collision import FreeSpace
from jidm.sim.failures import FAILURE_KINDS, RenderedEpisode, corrupt
from jidm.sim.replay import replay
from jidm.sim.scene import Scene

STRENGTHS = (0.25, 0.5, 1.0)
FPS, FRAMES, SIDE = 16.0, 25, 256
_CROP_FRACTION = {"allegro_right": 0.05}  # as the bundled checkpoints were trained; .15 for arms
_RANGE_FRACTION = 0.5
_MIN_SPEED = 0.2  # [rad/s] mean speed of the fastest joint: a robot that stands still is one of the failures
_MAX_ATTEMPTS = 100  # motions from which an episode's is chosen
_COMPARED_FRAMES = slice(1, None, 3)  # frames in which the executed motion is rendered
_MIN_CONTRAST = 0.1  # of the background at least: sliding must be visible


class EpisodeGenerator:
    """Takes of one robot, each a function of seed and number alone."""

    def __init__(
        self, robot: str, seed: int, *, side: int = SIDE, frames: int = FRAMES, range_fraction: float = _RANGE_FRACTION,
        jitter_cameras: bool = False,
    ) -> None:  # fmt: skip
        config = BabbleConfig(
            embodiment=robot, episodes=1, frames=frames, fps=FPS, seed=seed, range_fraction=range_fraction, width=side,
            height=side, crop_fraction=_CROP_FRACTION.get(robot, 0.15),
        )  # fmt: skip
        self.robot, self.seed, self._recorder = load_embodiment(robot), seed, Recorder(config)
        self.camera, self._jitter_cameras = self._recorder.cameras["front"], jitter_cameras
        self._scene = Scene(self.robot, supersample=2, exact=False, mesh_tolerance=0.003)

    def episode(self, k: int) -> RenderedEpisode:
        """Number k."""
        seed = int(np.random.SeedSequence([self.seed, k]).generate_state(1)[0])
        appearance, rng = Appearance.random(seed), np.random.default_rng([seed, 1])
        background = replace(
            appearance.background, kind=str(rng.choice(["picture", "patches"])), velocity=(0.0, 0.0),
            contrast=max(_MIN_CONTRAST, appearance.background.contrast),
        )  # fmt: skip
        self._scene.seed, self._scene.appearance = seed, replace(appearance, background=background)
        camera = self.camera
        if self._jitter_cameras:  # as in training
            camera = jitter_camera(camera, CAMERA_JITTER, np.random.default_rng([seed, 2]))
        return RenderedEpisode.render(self._scene, camera, self._motion(k), FPS)

    def _motion(self, k: int) -> NDArray[np.float64]:
        for i in range(_MAX_ATTEMPTS):
            q = self._recorder.motion(_MAX_ATTEMPTS * k + i)
            if np.abs(np.diff(q, axis=0)).mean(0)[~self.robot.gripper_mask].max() * FPS >= _MIN_SPEED:
                return q
        raise InputError(f"episode {k}: no motion is fast enough")


Scorer = Callable[[NDArray[np.uint8], NDArray[np.float64]], tuple[torch.Tensor, dict[str, float]]]
"""From a video (T, H, W, 3) and its first pose to decoded positions (T, n) and the terms' raw values, if it has any.

"recognition" is the distance of the keypoints from those of good videos."""


def reward_scorer(reward: ExecutabilityReward) -> Scorer:
    """What a reward measures, before any scale."""

    def score(video: NDArray[np.uint8], q0: NDArray[np.float64]) -> tuple[torch.Tensor, dict[str, float]]:
        analysis = reward.analyze(video, q0=q0, fps=FPS)
        raw = {name: float(TERMS[name].compute(analysis).tail_mean) for name in reward.weights}
        recognition = None if reward.scales is None else reward.scales.recognition
        if recognition is not None and analysis.keypoints is not None:
            raw["recognition"] = float(recognition.distance(analysis.keypoints))
        return analysis.q, raw

    return score


def exact_scorer(robot: Embodiment, camera: Any) -> Scorer:
    """With the field of URDF and camera."""
    field = AnalyticField(robot, camera, points=1500, occluders=8000, contour_points=30000)
    idm = JacobianIDM(robot, field, as_flow_estimator("dis"), limits="none")
    return reward_scorer(ExecutabilityReward(idm, weights={"consistency": 0.0}))


def learned_scorer(checkpoint: str) -> Scorer:
    """With a learned field."""
    return reward_scorer(ExecutabilityReward.from_pretrained(checkpoint))


def eva_scorer(checkpoint: str) -> Scorer:
    """EVA's own kind of IDM."""
    idm = load_idm(checkpoint)

    def score(video: NDArray[np.uint8], q0: NDArray[np.float64]) -> tuple[torch.Tensor, dict[str, float]]:
        return idm.decode(video, q0=q0, fps=FPS, layout="THWC").position, {}

    return score


class Execution:
    """What a robot makes of decoded positions."""

    def __init__(self, robot: Embodiment, free_space: FreeSpace) -> None:
        self._robot, self._free_space = robot, free_space
        self._kinematics = Kinematics.from_embodiment(robot)
        self._tip_links = [robot.model.link_index(name) for name in robot.tip_links]

    def execute(self, q: NDArray[np.float64]) -> NDArray[np.float64]:
        """(T, n) where it goes when q is sent to it."""
        return replay(self._robot, q, 1 / FPS, is_free=self._free_space).q

    def tip_error(self, replayed: NDArray[np.float64], intended: NDArray[np.float64]) -> float:
        """Mean distance of the tips from where the intended motion has them [m]."""
        return float(np.linalg.norm(self._tip_positions(replayed) - self._tip_positions(intended), axis=-1).mean())

    def _tip_positions(self, q: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(self._kinematics.link_poses(torch.from_numpy(q))[:, self._tip_links, :3, 3].numpy())


def image_difference(replayed: NDArray[np.float64], episode: RenderedEpisode, video: NDArray[np.uint8]) -> float:
    """Mean difference between the video and a rendering of the executed motion in its place [share of full brightness]."""
    rendered = episode.rerender(replayed[_COMPARED_FRAMES])
    return float(np.abs(rendered.astype(np.float64) - video[_COMPARED_FRAMES]).mean() / 255)


def videos(
    generator: EpisodeGenerator, k: int, for_calibration: bool, done: set[str]
) -> Iterator[tuple[dict[str, Any], RenderedEpisode, Any]]:
    """Label, episode and video of each missing video of an episode; the video is None where it cannot be spoiled."""
    kinds = () if for_calibration else FAILURE_KINDS
    names = [f"{k}/clean", *(f"{k}/{kind}" for kind in kinds)]
    if done.issuperset(names):
        return
    episode = generator.episode(k)
    for i, name in enumerate(names):
        if name in done:
            continue
        label = {"video": name, "kind": "clean", "strength": 0.0, "calibration": for_calibration}
        if i == 0:
            yield label, episode, episode.rendering.rgb
            continue
        kind, strength = kinds[i - 1], STRENGTHS[(k + i) % len(STRENGTHS)]
        try:
            corrupted = corrupt(episode, kind, strength, k)
        except InputError as error:
            yield {**label, "kind": kind, "strength": strength, "problem": str(error)}, episode, None
            continue
        yield {**label, **corrupted.label}, episode, corrupted.video


def run(
    generator: EpisodeGenerator, episodes: range, calibration_count: int, scorers: dict[str, Scorer], out: Path
) -> None:
    """Append the lines that are missing; episode k calibrates if k < calibration_count."""
    finished = {line["video"] for line in parse_json_lines(out.read_text(encoding="utf-8"))} if out.exists() else set()
    limits = EvaLimits.from_embodiment(generator.robot)
    with (
        FreeSpace(generator.robot, clearance=0.0) as free_space,
        open(out, "a", encoding="utf-8") as file,
        torch.no_grad(),
    ):
        execution = Execution(generator.robot, free_space)
        for k in episodes:
            for label, episode, video in videos(generator, k, k < calibration_count, finished):
                line = {"robot": generator.robot.name, "seed": generator.seed, **label}
                for name, scorer in scorers.items() if video is not None else ():
                    decoded, raw = scorer(video, episode.q[0])
                    q = decoded.double().numpy()
                    replayed = execution.execute(q)
                    line[name] = {
                        "penalty": float(eva_reward(decoded.double(), limits, 1 / FPS).penalty), "raw": raw,
                        "executed_m": execution.tip_error(replayed, episode.q), "image_difference": image_difference(replayed, episode, video),
                        "off": float(np.abs(q - episode.q).mean()), "q": q.round(4).tolist(),
                    }  # fmt: skip
                file.write(json.dumps(line) + "\n")
                file.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--robot", required=True)
    parser.add_argument("--seed", type=int, required=True, help="of motions, appearances and failures")
    parser.add_argument("--episodes", type=int, nargs=2, default=(0, 142), metavar=("FIRST", "END"))
    parser.add_argument(
        "--calibration-episodes", type=int, default=40, help="the first so many episodes are for calibrating"
    )
    parser.add_argument("--exact", action="store_true", help="score by URDF and camera")
    parser.add_argument("--learned", help="checkpoint of a learned field")
    parser.add_argument("--eva", help="checkpoint of EVA's kind of IDM")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines")
    args = parser.parse_args()
    generator, scorers = EpisodeGenerator(args.robot, args.seed), {}
    if args.exact:
        scorers["exact"] = exact_scorer(generator.robot, generator.camera)
    if args.learned is not None:
        scorers["learned"] = learned_scorer(args.learned)
    if args.eva is not None:
        scorers["eva"] = eva_scorer(args.eva)
    if not scorers:
        parser.error("name a scorer: --exact, --learned or --eva")
    run(generator, range(*args.episodes), args.calibration_episodes, scorers, args.out)
