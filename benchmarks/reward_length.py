"""Does the reward depend on the length of a video, and does it know the robot? Simulated videos, cut to several lengths.

    python benchmarks/reward_length.py panda-sim --robot panda --other ur5 --out length.jsonl

Every episode has a new motion, appearance and background. Its first frames are scored as they are, mirrored, lying on their
side, and replaced by noise, and so are those of an episode of another robot. The first pose is not given. An interrupted run
goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from results import add_save, rows, save
from reward_validity import FPS, EpisodeGenerator

from jidm.json_lines import parse_json_lines
from jidm.rewards import ExecutabilityReward

LENGTHS = (6, 12, 25, 50)
LONG_EPISODES, NOISE_EPISODES = 6, 3
"""Only the first so many episodes have 50 frames, or are replaced by noise."""

Frames = NDArray[np.uint8]
WRONG: dict[str, Callable[[Frames], Frames]] = {
    "mirrored": lambda v: v[:, :, ::-1],
    "sideways": lambda v: np.rot90(v, 1, (1, 2)),
}


def videos(own: EpisodeGenerator, other: EpisodeGenerator, k: int) -> dict[str, Frames]:
    """Kind -> video of one episode."""
    clean = own.episode(k).rendering.rgb
    found = {
        "clean": clean,
        **{kind: make(clean) for kind, make in WRONG.items()},
        "other": other.episode(k).rendering.rgb,
    }
    if k < NOISE_EPISODES:
        found["noise"] = np.random.default_rng([own.seed, k]).integers(0, 256, clean.shape, dtype=np.uint8)
    return found


def run(checkpoint: str, robot: str, other: str, seed: int, episodes: int, out: Path) -> list[dict[str, Any]]:
    """All lines, after appending the missing ones."""
    lines = list(parse_json_lines(out.read_text(encoding="utf-8"))) if out.exists() else []
    done = {(line["episode"], line["kind"], line["frames"]) for line in lines}
    generators: dict[int, tuple[EpisodeGenerator, EpisodeGenerator]] = {}
    reward = ExecutabilityReward.from_pretrained(checkpoint)
    with open(out, "a", encoding="utf-8") as file:
        for k in range(episodes):
            longest = LENGTHS[-1] if k < LONG_EPISODES else LENGTHS[-2]
            lengths = [x for x in LENGTHS if x <= longest]
            kinds = ["clean", *WRONG, "other", *(["noise"] if k < NOISE_EPISODES else [])]
            if all((k, kind, x) in done for kind in kinds for x in lengths):
                continue
            if longest not in generators:
                generators[longest] = (
                    EpisodeGenerator(robot, seed, frames=longest), EpisodeGenerator(other, seed, frames=longest)
                )  # fmt: skip
            for kind, video in videos(*generators[longest], k).items():
                for frames in lengths:
                    if (k, kind, frames) in done:
                        continue
                    score = next(reward.score([np.ascontiguousarray(video[:frames])], fps=FPS, layout="THWC"))
                    line = {
                        "episode": k,
                        "kind": kind,
                        "frames": frames,
                        "reward": float(score.reward),
                        "doubt": score.doubt,
                    }
                    lines.append(line)
                    file.write(json.dumps(line) + "\n")
                    file.flush()
    return lines


def figures(robot: str, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the result: reward by kind and length."""
    made = []
    for kind in dict.fromkeys(line["kind"] for line in lines):
        for frames in LENGTHS:
            found = [line["reward"] for line in lines if (line["kind"], line["frames"]) == (kind, frames)]
            if found:
                measured = {
                    "reward_median": float(np.median(found)),
                    "reward_lowest": min(found),
                    "reward_highest": max(found),
                }
                made += rows(robot, "ours", measured, case=f"{kind}, {frames} frames")
    return made


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: median (lowest to highest) by kind and length."""
    out = ["| kind | " + " | ".join(f"{x} frames" for x in LENGTHS) + " |", "|---|" + "---|" * len(LENGTHS)]
    for kind in dict.fromkeys(line["kind"] for line in lines):
        cells = []
        for frames in LENGTHS:
            found = [line["reward"] for line in lines if (line["kind"], line["frames"]) == (kind, frames)]
            cells.append(f"{np.median(found):.2f} ({min(found):.2f} to {max(found):.2f})" if found else "")
        out.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or bundled name")
    parser.add_argument("--robot", required=True)
    parser.add_argument("--other", required=True, help="robot that it is not")
    parser.add_argument("--seed", type=int, default=100, help="of motions and appearances")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines")
    add_save(parser)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = run(args.checkpoint, args.robot, args.other, args.seed, args.episodes, args.out)
    printed = table(lines)
    print(printed)
    note = (
        f"{args.episodes} episodes of 25 frames at 256x256, the first {LONG_EPISODES} of 50, cut to each length; noise in place "
        f"of the first {NOISE_EPISODES}. The other robot is {args.other}."
    )
    save(args.save, "reward_length", figures(args.robot, lines), raw=printed, seeds=[args.seed], note=note)
