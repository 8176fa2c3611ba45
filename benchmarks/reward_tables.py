"""Tables of what `reward_validity.py` wrote: how often a good video is ranked above a spoilt one, and what executing shows.

    python benchmarks/reward_tables.py panda.jsonl panda-eva.jsonl allegro.jsonl

Scales come from the takes filmed for calibrating, everything else from the others. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from jidm.rewards import TERMS
from jidm.rewards.eva import DECAY, P0
from jidm.rewards.terms import TermScale

TASK_FAILURES = ("late", "wrong_goal", "penetration")
"""Only who knows the task or the scene can call these wrong."""
STRENGTHS = (0.25, 0.5, 1.0)
_GROUP, _GROUPS = 8, 500


@dataclass(frozen=True)
class ScorerResults:
    """Rewards that one judge gives, in the order of the lines, where the robot ends up by its actions [m], and how
    unlike the video that looks."""

    name: str
    reward: np.ndarray
    executed: np.ndarray
    image_difference: np.ndarray


def rewards(lines: Sequence[dict[str, Any]], scorer: str, *, terms: bool) -> np.ndarray:
    """With terms or EVA's formula alone."""
    penalty = np.array([line[scorer]["penalty"] for line in lines]) / P0
    if terms:
        for name in lines[0][scorer]["raw"]:
            raw = np.array([line[scorer]["raw"][name] for line in lines])
            clean = [line[scorer]["raw"][name] for line in lines if line["calibrates"]]
            scale = TermScale.from_tail_means(clean, TERMS[name].min_spread)
            penalty = penalty + TERMS[name].weight * scale.penalty(torch.from_numpy(raw)).numpy()
    return np.asarray(10 * (1 + penalty) ** -DECAY)


def scorer_results(lines: Sequence[dict[str, Any]]) -> list[ScorerResults]:
    """All that read these lines: ours, and EVA's formula on the same actions, and EVA's formula on EVA's IDM."""
    found = []
    for name in ("exact", "learned", "eva"):
        if name in lines[0]:
            ends = [np.array([line[name][key] for line in lines]) for key in ("executed_m", "unlike")]
            if name != "eva":
                found.append(ScorerResults(f"ours ({name})", rewards(lines, name, terms=True), *ends))
            label = "EVA on its IDM" if name == "eva" else f"EVA on ours ({name})"
            found.append(ScorerResults(label, rewards(lines, name, terms=False), *ends))
    return found


def auroc(bad: np.ndarray, good: np.ndarray) -> float:
    """How often a good video has the higher reward; ties count half."""
    if not len(bad):
        return float("nan")
    return float(((good[:, None] > bad) + 0.5 * (good[:, None] == bad)).mean())


def tables(lines: Sequence[dict[str, Any]]) -> str:
    """Of one robot."""
    skipped = sum("problem" in line for line in lines)
    lines = [line for line in lines if "problem" not in line]
    test = np.array([not line["calibrates"] for line in lines])
    kind, strength = np.array([line["kind"] for line in lines]), np.array([line["strength"] for line in lines])
    clean = test & (kind == "clean")
    found = scorer_results(lines)
    kinds = [k for k in dict.fromkeys(kind) if k != "clean"]
    out = [
        f"{lines[0]['robot']}, seed {lines[0]['seed']}: {clean.sum()} clean, {(test & (kind == kinds[0])).sum()} of each "
        f"kind, {len(lines) - test.sum()} to calibrate; {skipped} could not be spoilt",
        "",
        "| AUROC at strength .25 / .5 / 1 | " + " | ".join(j.name for j in found) + " |",
        "|---|" + "---|" * len(found),
    ]

    def row(name: str, which: np.ndarray) -> str:
        cells = []
        for j in found:
            values = [auroc(j.reward[which & (strength == s)], j.reward[clean]) for s in STRENGTHS]
            cells.append(" / ".join(f"{v:.2f}" for v in values))
        return f"| {name} | " + " | ".join(cells) + " |"

    out += [row(k, test & (kind == k)) for k in kinds]
    robot_failures = test & (kind != "clean") & ~np.isin(kind, TASK_FAILURES)
    out += [row("**all that a robot can show**", robot_failures), row("all", test & (kind != "clean"))]

    def per_scorer(name: str, value: Any) -> str:
        return f"| {name} | " + " | ".join(value(j) for j in found) + " |"

    still = test & (kind == "frozen") & (strength == 1)
    out += [
        "",
        "| | " + " | ".join(j.name for j in found) + " |",
        "|---|" + "---|" * len(found),
        per_scorer("median clean", lambda j: f"{np.median(j.reward[clean]):.2f}"),
        per_scorer("highest of a robot that never moves", lambda j: f"{j.reward[still].max():.2f}"),
        per_scorer(
            "frozen above the median clean",
            lambda j: f"{(j.reward[still] > np.median(j.reward[clean])).sum()} of {still.sum()}",
        ),
        per_scorer(
            "Spearman with the executed error", lambda j: _spearman(j.reward, j.executed, clean | robot_failures)
        ),
        per_scorer("the same, all kinds", lambda j: _spearman(j.reward, j.executed, test)),
        per_scorer(
            "Spearman with how unlike the video it looks",
            lambda j: _spearman(j.reward, j.unlike, clean | robot_failures),
        ),
        per_scorer("the same, all kinds", lambda j: _spearman(j.reward, j.unlike, test)),
        per_scorer("executed error, clean [mm]", lambda j: f"{1000 * j.executed[clean].mean():.0f}"),
    ]
    episode = np.array([line["video"].split("/")[0] for line in lines])
    out += [
        "",
        *_best_of(found, episode, clean | robot_failures, "what a robot can show"),
        *_best_of(found, episode, test, "all kinds"),
    ]
    return "\n".join(out)


def _spearman(reward: np.ndarray, error: np.ndarray, which: np.ndarray) -> str:
    return f"{spearmanr(-reward[which], error[which]).statistic:.2f}"


def _best_of(found: Sequence[ScorerResults], episode: np.ndarray, which: np.ndarray, name: str) -> list[str]:
    """Executed error of the best of 8 versions of a take, against one at random; each judge's choice is executed by the
    first judge's actions, so that all execute alike."""
    rng = np.random.default_rng(0)
    groups_by_episode = [np.flatnonzero(which & (episode == t)) for t in dict.fromkeys(episode[which])]
    groups = [rng.choice(g, _GROUP, replace=False) for g in groups_by_episode if len(g) >= _GROUP]
    groups = [groups[i] for i in rng.integers(0, len(groups), _GROUPS)] if groups else []
    if not groups:
        return []
    executed = found[0].executed
    chance = np.mean([executed[g].mean() for g in groups])
    best = np.mean([executed[g].min() for g in groups])
    parts = [f"random {1000 * chance:.1f} mm", f"best possible {1000 * best:.1f} mm"]
    for j in found:
        chosen = np.mean([executed[g[j.reward[g].argmax()]] for g in groups])
        parts.append(f"{j.name} {1000 * chosen:.1f} mm ({chosen / chance:.2f} of random)")
    return [f"Best of {_GROUP}, {name}, executed error: " + "; ".join(parts) + "."]


def merge_files(paths: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """Robot -> a line for each video that all of its files have, with what every judge read."""
    found: dict[str, list[dict[str, dict[str, Any]]]] = {}
    for path in paths:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found.setdefault(lines[0]["robot"], []).append({line["video"]: line for line in lines})
    return {
        robot: [
            {k: v for file in files for k, v in file[video].items()}
            for video in files[0]
            if all(video in file for file in files)
        ]
        for robot, files in found.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="what reward_validity.py wrote")
    for lines in merge_files(parser.parse_args().files).values():
        print(tables(lines) + "\n")
