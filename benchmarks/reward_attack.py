"""How much reward can be had by touching up pixels, without a robot doing any better?

    python benchmarks/reward_attack.py --robot panda --learned panda-sim --eva runs/panda-eva --out attack.json

From clean videos, within a small distance of every pixel, each judge's own reward is climbed: by its gradient (signs of it,
momentum, projected back: Madry et al. 2018) and by random search (squares of changed pixels, kept where the reward rises:
Andriushchenko et al. 2020). Beside the reward gained stands how far from the video's motion a robot ends up by what the judge
decodes, before and after. "ours" is judged pair by pair, as gradients need it; what it wins is then judged once more by the
reward as it is used, following the pose from frame to frame.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reward_validity import FPS, Executed, Scenes
from torch import Tensor

from jidm import JacobianIDM
from jidm.adapters.reward import TERMS, EvaLimits, ExecutabilityReward, eva_reward
from jidm.files import whole_file
from jidm.learn.zoo import load_idm
from jidm.motion.fit import Fit
from jidm.sim.freespace import FreeSpace

FRAMES, SIDE = 9, 128
STEPS = 500
BUDGET = 4 / 255
_STRIDE, _MOMENTUM = 0.05, 0.75  # of the budget per step
_SQUARE = (0.3, 0.05)  # of the picture's side, at the first step and at the last

Rewarded = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From a video (T, 3, H, W) to its reward and the decoded positions (T, n), differentiable."""


def ours(reward: ExecutabilityReward, q0: np.ndarray) -> Rewarded:
    """The executability reward, pair by pair."""

    def rewarded(video: Tensor) -> tuple[Tensor, Tensor]:
        score, reading = reward.explain(video, q0=q0, fps=FPS, layout="TCHW")
        return score.reward, reading.q

    return rewarded


def evas(idm: Any, limits: EvaLimits, q0: np.ndarray) -> Rewarded:
    """EVA's reward of the positions that its own kind of IDM reads."""
    model = idm.model

    def rewarded(video: Tensor) -> tuple[Tensor, Tensor]:
        pictures = (
            Fit(video.shape[-2], video.shape[-1], model.config.height, model.config.width)
            .frames(video)
            .to(model.delta_std)
        )
        q = model.positions(
            torch.cat([pictures[:1], pictures[:-1]]), pictures, torch.cat([pictures[1:], pictures[-1:]])
        )
        q = q.double() - q[0].double() + torch.from_numpy(q0)
        return eva_reward(q, limits, 1 / FPS).reward, q

    return rewarded


def climbed(rewarded: Rewarded, clean: Tensor) -> Tensor:
    """The best video that gradients find."""
    change, pace = torch.zeros_like(clean), torch.zeros_like(clean)
    best, best_reward = clean, float(rewarded(clean)[0].detach())
    for _ in range(STEPS):
        at = (clean + change).clamp(0, 1).requires_grad_()
        reward = rewarded(at)[0]
        if float(reward.detach()) > best_reward:
            best, best_reward = at.detach(), float(reward.detach())
        (slope,) = torch.autograd.grad(reward, at)
        pace = _MOMENTUM * pace + slope / slope.abs().mean().clamp(min=1e-20)
        change = (change + _STRIDE * BUDGET * pace.sign()).clamp(-BUDGET, BUDGET)
    return best


@torch.no_grad()
def searched(rewarded: Rewarded, clean: Tensor, seed: int) -> Tensor:
    """The best video that random search finds."""
    rng = np.random.default_rng(seed)
    change, best = torch.zeros_like(clean), float(rewarded(clean)[0])
    side = clean.shape[-1]
    for k in range(STEPS):
        size = max(1, round(side * (_SQUARE[0] + (_SQUARE[1] - _SQUARE[0]) * k / STEPS)))
        t = int(rng.integers(len(clean)))
        y, x = (int(rng.integers(n - size + 1)) for n in clean.shape[-2:])
        tried = change.clone()
        signs = torch.from_numpy(rng.choice([-1.0, 1.0], (3, 1, 1))).to(clean)
        tried[t, :, y : y + size, x : x + size] = BUDGET * signs
        reward = float(rewarded((clean + tried).clamp(0, 1))[0])
        if reward > best:
            change, best = tried, reward
    return (clean + change).clamp(0, 1)


@dataclass(frozen=True)
class Attacked:
    """One judge and one video: as it was, after gradients, after random search.

    Attributes:
        reward: the judge's own. executed_mm: mean distance of the tips from the video's motion.
        followed: the reward as it is used; None for EVA's.
    """

    reward: tuple[float, float, float]
    executed_mm: tuple[float, float, float]
    followed: tuple[float, float, float] | None


def attacked(rewarded: Rewarded, clean: Tensor, error: Callable[[Tensor], float], seed: int, used: Any) -> Attacked:
    """Both attacks on one video."""
    videos = clean, climbed(rewarded, clean), searched(rewarded, clean, seed)

    def each(number: Callable[[Tensor], float]) -> tuple[float, float, float]:
        return number(videos[0]), number(videos[1]), number(videos[2])

    with torch.no_grad():
        return Attacked(
            reward=each(lambda video: float(rewarded(video)[0])),
            executed_mm=each(lambda video: 1000 * error(rewarded(video)[1])),
            followed=None if used is None else each(used),
        )


def run(robot: str, seed: int, takes: Sequence[int], calibrating: int, learned: str, eva: str) -> dict[str, Any]:
    """Attack takes of a robot; the ones before them calibrate."""
    scenes = Scenes(robot, seed, side=SIDE, frames=FRAMES)
    idm = JacobianIDM.from_pretrained(learned, limits="none")
    limits, out = EvaLimits.of(scenes.robot), dict[str, Any]()

    def video(k: int) -> tuple[Tensor, np.ndarray]:
        take = scenes.take(k)
        return torch.from_numpy(take.seen.rgb).permute(0, 3, 1, 2).float() / 255, take.q

    good = [video(k) for k in range(calibrating)]
    told: dict[str, Any] = {"q0": [q[0] for _, q in good], "fps": FPS}
    with torch.no_grad():
        pairs = ExecutabilityReward(idm, differentiable=True).calibrated([v for v, _ in good], **told)
        followed = ExecutabilityReward(idm).calibrated([v for v, _ in good], **told)
    bare = ExecutabilityReward(idm, pairs.calibration, weights=dict.fromkeys(TERMS, 0.0), differentiable=True)
    theirs = load_idm(eva)
    with FreeSpace(scenes.robot, clearance=0.0) as free:
        executed = Executed(scenes.robot, free)
        for k in takes:
            clean, q = video(k)

            def error(found: Tensor, q: np.ndarray = q) -> float:
                return executed.error(found.double().numpy(), q)

            def used(v: Tensor, q: np.ndarray = q) -> float:
                return float(followed(v, q0=q[0], fps=FPS, layout="TCHW"))

            for name, rewarded, check in (
                ("ours", ours(pairs, q[0]), used),
                ("EVA on ours", ours(bare, q[0]), None),
                ("EVA on its IDM", evas(theirs, limits, q[0]), None),
            ):
                out.setdefault(name, []).append(vars(attacked(rewarded, clean, error, k, check)))
    return out


def table(found: dict[str, Any]) -> str:
    """Means over the videos, Markdown."""
    rows = [
        "| judge | clean | gained by gradient | by random search | executed error, mm: clean / gradient / random |",
        "|---|---|---|---|---|",
    ]
    for name, videos in found.items():
        for key, label in (("reward", name), ("followed", f"{name}, as used")):
            if videos[0][key] is None:
                continue
            clean, gradient, random = np.mean([v[key] for v in videos], 0)
            errors = " / ".join(f"{x:.0f}" for x in np.mean([v["executed_mm"] for v in videos], 0))
            rows.append(f"| {label} | {clean:.2f} | {gradient - clean:+.2f} | {random - clean:+.2f} | {errors} |")
    return "\n".join(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--robot", required=True)
    parser.add_argument("--seed", type=int, default=4700)
    parser.add_argument("--videos", type=int, default=4)
    parser.add_argument("--calibrating", type=int, default=20)
    parser.add_argument("--learned", required=True, help="checkpoint of a learned field")
    parser.add_argument("--eva", required=True, help="checkpoint of EVA's kind of IDM")
    parser.add_argument("--out", type=Path, required=True, help="JSON")
    given = parser.parse_args()
    takes = range(given.calibrating, given.calibrating + given.videos)
    result = run(given.robot, given.seed, takes, given.calibrating, given.learned, given.eva)
    with whole_file(given.out) as temporary:
        temporary.write_text(json.dumps(result, indent=1))
    print(table(result))
