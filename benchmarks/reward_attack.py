"""Adversarial changes of pixels: how much reward can be gained without a robot doing any better? Prints Markdown.

    python benchmarks/reward_attack.py --robot panda --learned panda-sim --eva out/panda-eva --out attack.jsonl

Starting from clean videos and within a small distance of every pixel, each scorer's own reward is maximized: by
projected gradient ascent (Adam; Madry et al. 2018) and by random search over squares of changed pixels
(Andriushchenko et al. 2020). An interrupted run goes on. Beside the gain of reward stands how far a robot ends up
from the video's motion when it executes what the scorer decodes, before and after. "ours" is scored pair by pair, as
gradients need it; the videos found are scored once more by the reward as it is used, which tracks the pose from frame
to frame.
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
from results import add_save, rows, save
from reward_validity import FPS, EpisodeGenerator, Execution
from torch import Tensor

from jidm import JacobianIDM
from jidm.json_lines import parse_json_lines
from jidm.model_registry import load_idm
from jidm.rewards import TERMS, EvaLimits, ExecutabilityReward, eva_reward
from jidm.sim.collision import FreeSpace
from jidm.video.letterbox import Letterbox

FRAMES, SIDE = 9, 128
STEPS = 500
BUDGET = 4 / 255
_STEP_SIZE = 0.02  # of the budget, at the first step
_SQUARE_SIZE = (0.3, 0.05)  # of the image's side, at the first step and at the last

METHODS = {
    ("ours", "reward"): "ours",
    ("ours", "tracked_reward"): "ours_used",
    ("EVA on ours", "reward"): "eva_on_ours",
    ("EVA on its IDM", "reward"): "eva_on_eva",
}
"""Scorer and key of a line -> method of the result."""

RewardFunction = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From a video (T, 3, H, W) to its reward and the decoded positions (T, n), differentiable."""


def executability_function(reward: ExecutabilityReward, q0: np.ndarray) -> RewardFunction:
    """The executability reward, pair by pair."""

    def reward_function(video: Tensor) -> tuple[Tensor, Tensor]:
        score, analysis = reward.explain(video, q0=q0, fps=FPS, layout="TCHW")
        return score.reward, analysis.q

    return reward_function


def eva_function(idm: Any, limits: EvaLimits, q0: np.ndarray) -> RewardFunction:
    """EVA's reward of the positions that its own kind of IDM predicts."""
    model = idm.model

    def reward_function(video: Tensor) -> tuple[Tensor, Tensor]:
        images = (
            Letterbox(video.shape[-2], video.shape[-1], model.config.height, model.config.width)
            .apply(video)
            .to(model.delta_std)
        )
        q = model.positions(torch.cat([images[:1], images[:-1]]), images, torch.cat([images[1:], images[-1:]]))
        q = q.double() - q[0].double() + torch.from_numpy(q0)
        return eva_reward(q, limits, 1 / FPS).reward, q

    return reward_function


def gradient_attack(reward_function: RewardFunction, clean: Tensor) -> Tensor:
    """The best video that gradients find."""
    perturbation = torch.zeros_like(clean, requires_grad=True)
    optimizer = torch.optim.Adam([perturbation], lr=_STEP_SIZE * BUDGET, maximize=True)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=STEPS)
    best, best_reward = clean, -1.0
    for _ in range(STEPS):
        attacked_video = (clean + perturbation).clamp(0, 1)
        reward = reward_function(attacked_video)[0]
        if float(reward.detach()) > best_reward:
            best, best_reward = attacked_video.detach(), float(reward.detach())
        optimizer.zero_grad()
        reward.backward()
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            perturbation.clamp_(-BUDGET, BUDGET)
    return best


@torch.no_grad()
def random_search(reward_function: RewardFunction, clean: Tensor, seed: int) -> Tensor:
    """The best video that random search finds."""
    rng = np.random.default_rng(seed)
    perturbation, best = torch.zeros_like(clean), float(reward_function(clean)[0])
    side = clean.shape[-1]
    for k in range(STEPS):
        size = max(1, round(side * (_SQUARE_SIZE[0] + (_SQUARE_SIZE[1] - _SQUARE_SIZE[0]) * k / STEPS)))
        t = int(rng.integers(len(clean)))
        y, x = (int(rng.integers(n - size + 1)) for n in clean.shape[-2:])
        candidate = perturbation.clone()
        signs = torch.from_numpy(rng.choice([-1.0, 1.0], (3, 1, 1))).to(clean)
        candidate[t, :, y : y + size, x : x + size] = BUDGET * signs
        reward = float(reward_function((clean + candidate).clamp(0, 1))[0])
        if reward > best:
            perturbation, best = candidate, reward
    return (clean + perturbation).clamp(0, 1)


@dataclass(frozen=True)
class AttackResult:
    """One scorer and one video: clean, after gradient ascent, after random search.

    Attributes:
        reward: the scorer's own. executed_mm: mean distance of the tips from the video's motion.
        tracked_reward: the reward as it is used; None for EVA's.
    """

    reward: tuple[float, float, float]
    executed_mm: tuple[float, float, float]
    tracked_reward: tuple[float, float, float] | None


def attack_video(
    reward_function: RewardFunction, clean: Tensor, error: Callable[[Tensor], float], seed: int, tracked: Any
) -> AttackResult:
    """Both attacks on one video."""
    videos = clean, gradient_attack(reward_function, clean), random_search(reward_function, clean, seed)

    def each(number: Callable[[Tensor], float]) -> tuple[float, float, float]:
        return number(videos[0]), number(videos[1]), number(videos[2])

    with torch.no_grad():
        return AttackResult(
            reward=each(lambda video: float(reward_function(video)[0])),
            executed_mm=each(lambda video: 1000 * error(reward_function(video)[1])),
            tracked_reward=None if tracked is None else each(tracked),
        )


def run(
    generator: EpisodeGenerator, episodes: Sequence[int], calibration_count: int, learned: str, eva: str, out: Path
) -> None:
    """Append the missing lines, one per video and scorer; scales are fitted on the first `calibration_count` episodes."""
    idm = JacobianIDM.from_pretrained(learned, limits="none")
    limits = EvaLimits.from_embodiment(generator.robot)
    done = {(x["episode"], x["scorer"]) for x in read_lines(out)}

    def video(k: int) -> tuple[Tensor, np.ndarray]:
        episode = generator.episode(k)
        return torch.from_numpy(episode.rendering.rgb).permute(0, 3, 1, 2).float() / 255, episode.q

    clean_videos = [video(k) for k in range(calibration_count)]
    options: dict[str, Any] = {"q0": [q[0] for _, q in clean_videos], "fps": FPS}
    with torch.no_grad():
        pairwise_reward = ExecutabilityReward(idm, differentiable=True).fit_scales(
            [v for v, _ in clean_videos], **options
        )
        tracked_reward = ExecutabilityReward(idm).fit_scales([v for v, _ in clean_videos], **options)
    eva_only_reward = ExecutabilityReward(
        idm, pairwise_reward.scales, weights=dict.fromkeys(TERMS, 0.0), differentiable=True
    )
    eva_idm = load_idm(eva)
    with FreeSpace(generator.robot, clearance=0.0) as free, open(out, "a", encoding="utf-8") as file:
        execution = Execution(generator.robot, free)
        for k in episodes:
            clean, q = video(k)

            def error(found: Tensor, q: np.ndarray = q) -> float:
                return execution.tip_error(execution.execute(found.double().numpy()), q)

            def tracked(v: Tensor, q: np.ndarray = q) -> float:
                return float(tracked_reward(v, q0=q[0], fps=FPS, layout="TCHW"))

            for name, reward_function, check in (
                ("ours", executability_function(pairwise_reward, q[0]), tracked),
                ("EVA on ours", executability_function(eva_only_reward, q[0]), None),
                ("EVA on its IDM", eva_function(eva_idm, limits, q[0]), None),
            ):
                if (k, name) not in done:
                    found = vars(attack_video(reward_function, clean, error, k, check))
                    file.write(json.dumps({"episode": k, "scorer": name, **found}) + "\n")
                    file.flush()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What is there already."""
    return list(parse_json_lines(path.read_text(encoding="utf-8"))) if path.exists() else []


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Means over the videos, Markdown."""
    rows = [
        f"{len({x['episode'] for x in lines})} videos",
        "",
        "| scorer | clean | gained by gradient | by random search | executed error, mm: clean / gradient / random |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(x["scorer"] for x in lines):
        videos = [x for x in lines if x["scorer"] == name]
        for key, label in (("reward", name), ("tracked_reward", f"{name}, as used")):
            if videos[0][key] is None:
                continue
            clean, gradient, random = np.mean([v[key] for v in videos], 0)
            errors = " / ".join(f"{x:.0f}" for x in np.mean([v["executed_mm"] for v in videos], 0))
            rows.append(f"| {label} | {clean:.2f} | {gradient - clean:+.2f} | {random - clean:+.2f} | {errors} |")
    return "\n".join(rows)


def figures(robot: str, lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the result: means over the videos."""
    gain: dict[str, tuple[float, float]] = {}
    for (scorer, key), method in METHODS.items():
        videos = [x for x in lines if x["scorer"] == scorer]
        clean, gradient, random = np.mean([v[key] for v in videos], 0)
        gain[method] = float(gradient - clean), float(random - clean)
    over = {"gain_over_eva": "eva_on_eva", "gain_over_eva_on_ours": "eva_on_ours"}
    made = []
    for method, found in gain.items():
        for k, case in enumerate(("gradient ascent", "random search")):
            measured: dict[str, float | None] = {"reward_gain": found[k]}
            if method == "ours" and k == 0:
                measured |= {metric: found[k] / gain[rival][k] for metric, rival in over.items()}
            made += rows(robot, method, measured, case=case)
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--robot", required=True)
    parser.add_argument("--seed", type=int, default=4700)
    parser.add_argument("--videos", type=int, default=4)
    parser.add_argument("--calibration-episodes", type=int, default=20)
    parser.add_argument("--learned", required=True, help="checkpoint of a learned field")
    parser.add_argument("--eva", required=True, help="checkpoint of EVA's kind of IDM")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines")
    add_save(parser)
    args = parser.parse_args()
    episodes = range(args.calibration_episodes, args.calibration_episodes + args.videos)
    generator = EpisodeGenerator(args.robot, args.seed, side=SIDE, frames=FRAMES)
    run(generator, episodes, args.calibration_episodes, args.learned, args.eva, args.out)
    lines = read_lines(args.out)
    print(table(lines))
    note = f"{STEPS} steps on the pixels of {args.videos} clean videos, at most 4/255 per pixel; mean gain per video, of 10."
    save(args.save, "reward_attack", figures(args.robot, lines), raw=lines, seeds=(args.seed,), note=note)
