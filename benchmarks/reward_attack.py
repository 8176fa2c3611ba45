"""How much reward can be had by touching up pixels, without a robot doing any better?

    python benchmarks/reward_attack.py --robot panda --learned panda-sim --eva runs/panda-eva --out attack.jsonl

From clean videos, within a small distance of every pixel, each judge's own reward is climbed: by its gradient (Adam,
projected back after every step: Madry et al. 2018) and by random search (squares of changed pixels, kept where the reward rises:
Andriushchenko et al. 2020). Stopped and started again, it goes on. Beside the reward gained stands how far from the video's motion a robot ends up by what the judge
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
from jidm.learn.zoo import load_idm
from jidm.motion.fit import Fit
from jidm.sim.freespace import FreeSpace

FRAMES, SIDE = 9, 128
STEPS = 500
BUDGET = 4 / 255
_STRIDE = 0.02  # of the budget, at the first step
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
    change = torch.zeros_like(clean, requires_grad=True)
    optimiser = torch.optim.Adam([change], lr=_STRIDE * BUDGET, maximize=True)
    slower = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=STEPS)
    best, best_reward = clean, -1.0
    for _ in range(STEPS):
        at = (clean + change).clamp(0, 1)
        reward = rewarded(at)[0]
        if float(reward.detach()) > best_reward:
            best, best_reward = at.detach(), float(reward.detach())
        optimiser.zero_grad()
        reward.backward()
        optimiser.step()
        slower.step()
        with torch.no_grad():
            change.clamp_(-BUDGET, BUDGET)
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


def run(scenes: Scenes, takes: Sequence[int], calibrating: int, learned: str, eva: str, out: Path) -> None:
    """Append a line per video and judge that is not there yet; the takes before `calibrating` calibrate."""
    idm = JacobianIDM.from_pretrained(learned, limits="none")
    limits = EvaLimits.of(scenes.robot)
    done = {(x["take"], x["judge"]) for x in read_lines(out)}

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
    with FreeSpace(scenes.robot, clearance=0.0) as free, open(out, "a", encoding="utf-8") as file:
        executed = Executed(scenes.robot, free)
        for k in takes:
            clean, q = video(k)

            def error(found: Tensor, q: np.ndarray = q) -> float:
                return executed.off(executed.motion(found.double().numpy()), q)

            def used(v: Tensor, q: np.ndarray = q) -> float:
                return float(followed(v, q0=q[0], fps=FPS, layout="TCHW"))

            for name, rewarded, check in (
                ("ours", ours(pairs, q[0]), used),
                ("EVA on ours", ours(bare, q[0]), None),
                ("EVA on its IDM", evas(theirs, limits, q[0]), None),
            ):
                if (k, name) not in done:
                    found = vars(attacked(rewarded, clean, error, k, check))
                    file.write(json.dumps({"take": k, "judge": name, **found}) + "\n")
                    file.flush()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What is there already."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Means over the videos, Markdown."""
    rows = [
        f"{len({x['take'] for x in lines})} videos",
        "",
        "| judge | clean | gained by gradient | by random search | executed error, mm: clean / gradient / random |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(x["judge"] for x in lines):
        videos = [x for x in lines if x["judge"] == name]
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
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines")
    given = parser.parse_args()
    which = range(given.calibrating, given.calibrating + given.videos)
    films = Scenes(given.robot, given.seed, side=SIDE, frames=FRAMES)
    run(films, which, given.calibrating, given.learned, given.eva, given.out)
    print(table(read_lines(given.out)))
