"""Tables of what `reward_validity.py` wrote: how often a clean video is ranked above a spoiled one, and what execution shows.

    python benchmarks/reward_tables.py panda.jsonl panda-eva.jsonl allegro.jsonl

Scales come from the episodes rendered for calibration, everything else from the others. Prints Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import add_save, rows, save
from scipy.stats import spearmanr

from jidm.json_lines import parse_json_lines
from jidm.rewards import TERMS
from jidm.rewards.eva import DECAY, P0
from jidm.rewards.recognition import distance_scale, doubt_of
from jidm.rewards.terms import TermScale

METHODS = {
    "ours (learned)": "ours",
    "ours (exact)": "ours_exact",
    "EVA on ours (learned)": "eva_on_ours",
    "EVA on ours (exact)": "eva_on_ours_exact",
    "EVA on its IDM": "eva_on_eva",
}
"""Scorer -> method of the result."""
ROBOT_FAILURES = "all robot failures"
TASK_FAILURES = ("late", "wrong_goal", "penetration")
"""Failures that only the task or the scene reveals."""
STRENGTHS = (0.25, 0.5, 1.0)
_GROUP, _GROUPS = 8, 500


@dataclass(frozen=True)
class ScorerResults:
    """What one scorer gives, in the order of the lines.

    Attributes:
        reward: of each video.
        executed: distance of the tips from the intended motion when its actions are executed [m].
        image_difference: between the video and the executed motion rendered in its place.
    """

    name: str
    reward: np.ndarray
    executed: np.ndarray
    image_difference: np.ndarray


def rewards(lines: Sequence[dict[str, Any]], scorer: str, *, terms: bool) -> np.ndarray:
    """With terms or EVA's formula alone."""
    penalty = np.array([line[scorer]["penalty"] for line in lines]) / P0
    if terms:
        good = np.array([line["calibration"] for line in lines])
        raw = {name: np.array([line[scorer]["raw"][name] for line in lines]) for name in lines[0][scorer]["raw"]}
        distance = raw.pop("recognition", None)
        doubt: float | np.ndarray = 0.0
        if distance is not None:
            doubt = doubt_of(torch.from_numpy(distance), distance_scale(distance[good].tolist())).numpy()
        penalty = np.maximum(penalty - np.median(penalty[good]), 0)
        for name, values in raw.items():
            scale = TermScale.from_tail_means(values[good].tolist(), TERMS[name].min_spread)
            penalty = penalty + TERMS[name].weight * (
                1 - (1 - scale.penalty(torch.from_numpy(values)).numpy()) * (1 - doubt)
            )
    return np.asarray(10 * (1 + penalty) ** -DECAY)


def scorer_results(lines: Sequence[dict[str, Any]]) -> list[ScorerResults]:
    """All that read these lines: ours, and EVA's formula on the same actions, and EVA's formula on EVA's IDM."""
    found = []
    for name in ("exact", "learned", "eva"):
        if name in lines[0]:
            ends = [np.array([line[name][key] for line in lines]) for key in ("executed_m", "image_difference")]
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


class Scored:
    """The lines of one robot and what its scorers make of them.

    Attributes:
        found: by scorer.
        test, clean, robot_failures: masks of the videos that are not used for scales; of those, the clean ones and the
            ones that show a failure of the robot itself.
    """

    def __init__(self, lines: Sequence[dict[str, Any]]) -> None:
        self.skipped = sum("problem" in line for line in lines)
        self.lines = [line for line in lines if "problem" not in line]
        self.found = scorer_results(self.lines)
        self.test = np.array([not line["calibration"] for line in self.lines])
        self.kind = np.array([line["kind"] for line in self.lines])
        self.strength = np.array([line["strength"] for line in self.lines])
        self.episode = np.array([line["video"].split("/")[0] for line in self.lines])
        self.clean = self.test & (self.kind == "clean")
        self.robot_failures = self.test & (self.kind != "clean") & ~np.isin(self.kind, TASK_FAILURES)
        self.frozen = self.test & (self.kind == "frozen") & (self.strength == 1)

    @property
    def cases(self) -> dict[str, np.ndarray]:
        """Kind of failure -> its videos; all that a robot itself can show last."""
        kinds = [k for k in dict.fromkeys(self.kind.tolist()) if k != "clean"]
        return {k: self.test & (self.kind == k) for k in kinds} | {ROBOT_FAILURES: self.robot_failures}

    def aurocs(self, scorer: ScorerResults, which: np.ndarray) -> list[float]:
        """Against the clean videos, at each strength."""
        return [auroc(scorer.reward[which & (self.strength == s)], scorer.reward[self.clean]) for s in STRENGTHS]

    def frozen_above_median(self, scorer: ScorerResults) -> int:
        """How many robots that never move are ranked above the median clean video."""
        return int((scorer.reward[self.frozen] > np.median(scorer.reward[self.clean])).sum())

    def best_of(self, which: np.ndarray) -> dict[str, float]:
        """Executed error [m] of the best of 8 versions of an episode by each scorer, of a "random" and of the "best" choice.

        Each choice is executed by the first scorer's actions, so that all execute alike. Empty where no episode has 8.
        """
        rng = np.random.default_rng(0)
        by_episode = [np.flatnonzero(which & (self.episode == t)) for t in dict.fromkeys(self.episode[which])]
        groups = [rng.choice(g, _GROUP, replace=False) for g in by_episode if len(g) >= _GROUP]
        groups = [groups[i] for i in rng.integers(0, len(groups), _GROUPS)] if groups else []
        if not groups:
            return {}
        executed = self.found[0].executed
        means = {"random": np.mean([executed[g].mean() for g in groups])}
        means["best"] = np.mean([executed[g].min() for g in groups])
        for j in self.found:
            means[j.name] = np.mean([executed[g[j.reward[g].argmax()]] for g in groups])
        return {name: float(value) for name, value in means.items()}


def spearman(reward: np.ndarray, error: np.ndarray, which: np.ndarray) -> float:
    """Rank correlation of a reward with an error, positive where lower errors have higher rewards."""
    return float(spearmanr(-reward[which], error[which]).statistic)


def tables(scored: Scored) -> str:
    """Of one robot, Markdown."""
    found, lines, clean, test = scored.found, scored.lines, scored.clean, scored.test
    shown = clean | scored.robot_failures
    cases = scored.cases
    out = [
        f"{lines[0]['robot']}, seed {lines[0]['seed']}: {clean.sum()} clean, {next(iter(cases.values())).sum()} of each "
        f"kind, {len(lines) - test.sum()} for the scales; {scored.skipped} could not be spoiled",
        "",
        "| AUROC at strength .25 / .5 / 1 | " + " | ".join(j.name for j in found) + " |",
        "|---|" + "---|" * len(found),
    ]
    for name, which in (cases | {"all": test & (scored.kind != "clean")}).items():
        cells = [" / ".join(f"{v:.2f}" for v in scored.aurocs(j, which)) for j in found]
        out.append(f"| {name} | " + " | ".join(cells) + " |")

    def per_scorer(name: str, value: Any) -> str:
        return f"| {name} | " + " | ".join(value(j) for j in found) + " |"

    frozen = scored.frozen
    out += [
        "",
        "| | " + " | ".join(j.name for j in found) + " |",
        "|---|" + "---|" * len(found),
        per_scorer("median clean", lambda j: f"{np.median(j.reward[clean]):.2f}"),
        per_scorer("highest of a robot that never moves", lambda j: f"{j.reward[frozen].max():.2f}"),
        per_scorer(
            "frozen above the median clean", lambda j: f"{scored.frozen_above_median(j)} of {scored.frozen.sum()}"
        ),
        per_scorer("Spearman with the executed error", lambda j: f"{spearman(j.reward, j.executed, shown):.2f}"),
        per_scorer("the same, all kinds", lambda j: f"{spearman(j.reward, j.executed, test):.2f}"),
        per_scorer(
            "Spearman with the difference in appearance",
            lambda j: f"{spearman(j.reward, j.image_difference, shown):.2f}",
        ),
        per_scorer("the same, all kinds", lambda j: f"{spearman(j.reward, j.image_difference, test):.2f}"),
        per_scorer("executed error, clean [mm]", lambda j: f"{1000 * j.executed[clean].mean():.0f}"),
        "",
    ]
    for name, which in ((ROBOT_FAILURES, shown), ("all kinds", test)):
        if best := scored.best_of(which):
            parts = [f"{who} {1000 * x:.1f} mm ({x / best['random']:.2f} of random)" for who, x in best.items()]
            out.append(f"Best of {_GROUP}, {name}, executed error: " + "; ".join(parts) + ".")
    return "\n".join(out)


def figures(scored: Scored) -> list[dict[str, Any]]:
    """The rows of the result, of one robot."""
    robot, made = scored.lines[0]["robot"], []
    for case, which in scored.cases.items():
        for j in scored.found:
            values = dict(zip(("auroc_25", "auroc_50", "auroc_100"), scored.aurocs(j, which), strict=True))
            made += rows(robot, METHODS[j.name], values, case=case)
    shown = scored.clean | scored.robot_failures
    best = scored.best_of(shown)
    for j in scored.found:
        measured = {
            "frozen_above_median": scored.frozen_above_median(j),
            "frozen_videos": int(scored.frozen.sum()),
            "best_of_8": best[j.name] / best["random"] if best else None,
            "spearman_executed": spearman(j.reward, j.executed, shown),
            "spearman_appearance": spearman(j.reward, j.image_difference, shown),
            "executed_error": 1000 * float(j.executed[scored.clean].mean()),
        }
        made += rows(robot, METHODS[j.name], measured)
    return made


def merge_files(paths: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """Robot -> a line for each video that all of its files have, with what every scorer found."""
    found: dict[str, list[dict[str, dict[str, Any]]]] = {}
    for path in paths:
        lines = list(parse_json_lines(path.read_text(encoding="utf-8")))
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
    add_save(parser)
    args = parser.parse_args()
    robots = [Scored(lines) for lines in merge_files(args.files).values()]
    printed = {scored.lines[0]["robot"]: tables(scored) for scored in robots}
    print("\n\n".join(printed.values()))
    seeds = dict.fromkeys(scored.lines[0]["seed"] for scored in robots)
    rows_of_all = [one for scored in robots for one in figures(scored)]
    counts = "; ".join(f"{x.clean.sum()} clean episodes, {(~x.test).sum()} more for the scales" for x in robots)
    note = f"25 frames at 256x256, each episode rendered clean and once in each of 13 kinds of failure: {counts}."
    save(args.save, "reward_tables", rows_of_all, raw=printed, seeds=seeds, note=note)
