"""Write docs/benchmarks.md from `benchmarks/results/*.json`; a test fails when the page is out of date.

    python benchmarks/page.py            # rewrite docs/benchmarks.md
    python benchmarks/page.py --check    # exit status 1 if it is out of date

Sections and tables are listed below; figures, commands, dates and machines come from the results, musts and aims from
`targets.toml`, headings and units from `metrics.toml`. Every row of every result is in exactly one table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import results
from results import REPOSITORY, Bound, Metric
from run_all import jobs

PAGE = REPOSITORY / "docs" / "benchmarks.md"

INTRODUCTION = """\
# Benchmarks

<!-- Written by benchmarks/page.py from benchmarks/results/*.json; do not edit. -->

Every line of a table ends with the name of its run. The command, date and machine of each run stand below the table.

- Targets: "must" is required, "aim" is desired. A check mark (✓) means reached and a cross (✗) missed. The figure is bold
  if a "must" is missed.
- No setting was tuned on held-out data: held-out seeds are 1000 and above, and settings were chosen on seeds below 1000,
  on the two ALOHA episodes, or where a note says so.
- Machines differ. Compare speeds within one run only.
- A date with a dagger (†) marks figures copied from earlier editions of this page, rounded as they were printed there;
  they were measured by the code of that date.
- Trials, dead ends and figures without a repeatable command are in dated notes:
  [decoding](notes/2026-11-22-decoding.md), [learned fields](notes/2026-11-22-learned-fields.md),
  [reward](notes/2026-11-22-reward.md), [control and server](notes/2026-11-23-control-server.md).

To repeat a run: `python benchmarks/run_all.py NAME`, with the recordings and the training that it needs. To repeat a
section: `python benchmarks/run_all.py GROUP`, with `decoding`, `learned`, `reward`, `control`, `server`, `geometry` or
`speed`. Without arguments it lists all runs with their durations. `python benchmarks/page.py` then writes this page again,
and `python benchmarks/compare.py REVISION` lists old and new figures side by side.
"""

# What a reader wants to know first: a question, and the run, method, case and metric of the figure that answers it.
SUMMARY = (
    ("Analytic field, rendered video of a Panda", "rendered-panda", "analytic", "tracked from the first pose", "nve"),
    ("Analytic field, Panda in front of clutter", "analytic-panda", "analytic", "", "nve"),
    ("Learned field, planar finger (`finger-5`)", "bundled-finger-5", "learned", "", "nve"),
    ("Learned field, Allegro hand (`allegro-right-sim`)", "bundled-allegro-right-sim", "learned", "", "nve"),
    ("Learned field, Panda (`panda-sim`)", "bundled-panda-sim", "learned", "", "nve"),
    ("Learned field, a real Unitree G1", "models-g1", "learned", "", "correlation"),
    ("Direct regression on the same recording, G1", "models-g1", "direct", "", "correlation"),
    ("Reward: failed videos below good ones, Panda", "reward-panda", "ours", "all robot failures", "auroc_50"),
    ("EVA's reward of the same decoded motion", "reward-panda", "eva_on_ours", "all robot failures", "auroc_50"),
)


@dataclass(frozen=True)
class Table:
    """Some rows of some runs.

    Attributes:
        runs: names or patterns of results.
        metrics: names or patterns; the columns of a wide table, in this order.
        layout: "wide" has a line for each robot, method and case and a column for each metric; "tall" has a line for each
            figure; "matrix" has a line for each case and a column for each method, the metrics joined in a cell.
        cases: pattern that the rows' case must match; "" takes rows without a case only.
        text: what stands above the table.
    """

    runs: tuple[str, ...]
    metrics: tuple[str, ...] = ("*",)
    layout: str = "wide"
    cases: str = "*"
    text: str = ""


@dataclass(frozen=True)
class Section:
    """A heading, some text and tables."""

    title: str
    text: str
    tables: tuple[Table, ...]
    level: int = 2


MODELS = (
    "training_steps", "nve", "nve_smoothed", "nve_median", "nve_pairs", "action_mse", "position_share", "correlation", "tip_error",
    "field_error", "flow_error", "coverage_68", "coverage_95", "valid_share", "frames_per_second",
)  # fmt: skip
MOVING = (
    "training_steps", "correlation", "nve_moving", "correlation_smoothed", "nve_moving_smoothed", "position_share",
    "coverage_68", "coverage_95",
)  # fmt: skip
OVER = "*_over_direct*", "*_over_best_baseline", "*_above_best_baseline"
AUROC = "auroc_25", "auroc_50", "auroc_100"

SECTIONS = (
    Section(
        "Decoding",
        "The robot's URDF, its camera and the first pose are known; nothing is learned.",
        (
            Table(
                ("oracle-*",),
                text="With the simulator's exact flow, so that only field and solver cause errors. A joint counts as unseen where its "
                "own motion moves the image by less than 2 px per radian or 0.1 m at the true pose. The threshold of "
                "`observable` is 2.5 px, so that sampling noise errs on the safe side.",
            ),
            Table(("rendered-*",), text="From rendered images, against a plain background."),
            Table(
                ("aloha",),
                text="Third-party video. Position errors do not grow over an episode: contours hold the pose. They also jitter "
                "by a few milliradians per frame, which makes tracked steps noisier than steps from the true pose. "
                "Intervals of positions are too narrow, because contour errors are correlated over many frames.",
            ),
            Table(
                ("corruption",),
                ("error_over_clean",),
                "matrix",
                text="Error on corrupted flow over the same solver's error on clean flow. Where a border around the robot moves "
                "with the background, the solver is weak: on a thin arm robust weights do not reject such coherent flow.",
            ),
            Table(
                ("analytic-panda",),
                text="Videos of motor babbling in front of clutter, with changing light. The remaining errors are rolls of "
                "the hand while it is seen edge-on, and joints 1 and 3 turning against each other while the arm is "
                "stretched, which hardly changes the image.",
            ),
            Table(
                ("verdict",),
                ("auroc", "detected", "false_alarms"),
                text="Told wrong: every video of seven robots is decoded in the right setting and in a wrong one.",
            ),
            Table(
                ("verdict",),
                ("nve", "coverage_68", "coverage_95", "gross_joints"),
                text="The same videos in the right setting, velocities of observable joints.",
            ),
        ),
    ),
    Section(
        "Trained models",
        "All models of a table train on the same recordings for the same time and decode the same held-out videos from the "
        "true first pose. `learned field` is ours; the baselines are those of `jidm train --kind`: direct regression from "
        "images (UniPi), from flow, EVA's and VERA's inverse dynamics models.",
        (),
    ),
    Section(
        "Planar finger",
        "",
        (
            Table(("models-finger-5", "models-finger-5-dis"), MODELS, cases=""),
            Table(("models-finger-5",), OVER, "tall"),
            Table(
                ("models-finger-5",),
                ("nve", "nve_rise", "coverage_95"),
                "matrix",
                cases="?*",
                text="On degraded video: NVE / NVE over that of clean video / how often 95 % intervals hold. A larger rise would "
                "be acceptable if the intervals still held or the steps were marked invalid. For replaced backgrounds, "
                "occlusion and blur this is not the case.",
            ),
            Table(("models-finger-[1-4]",), (*MODELS, *OVER)),
        ),
        3,
    ),
    Section(
        "Panda and Allegro hand",
        "Ten minutes of training are not enough for a learned field of these robots; it reports this by marking nearly all "
        "steps invalid. The bundled checkpoints below were trained longer, on more poses.",
        (
            Table(("models-panda", "models-allegro"), MODELS),
            Table(("models-panda", "models-allegro"), OVER, "tall"),
        ),
        3,
    ),
    Section(
        "A real Unitree G1",
        "",
        (Table(("models-g1",), MOVING), Table(("models-g1",), OVER, "tall")),
        3,
    ),
    Section(
        "Bundled checkpoints",
        "`JacobianIDM.from_pretrained(NAME)`; `checkpoints/README.md` says how they were made. No URDF and no camera; the "
        "first pose is given. `action MSE over that of direct` compares with the tables above, whose models had ten "
        "minutes and 1,200 longer episodes.",
        (Table(("bundled-*",), (*MODELS, "action_mse_over_direct")),),
        3,
    ),
    Section(
        "Reward",
        "EVA's published formula, on 14 joints of the dual PiPER. Tests hold its gradients, and those of "
        "`ExecutabilityReward(differentiable=True)` down to the pixels, to finite differences.",
        (
            Table(("reward-formula",), layout="tall"),
            Table(
                ("reward-panda", "reward-allegro"),
                AUROC,
                "matrix",
                text="How often a clean video is ranked above one with a failure: AUROC at failure strengths 0.25 / 0.5 / 1. "
                "`wrong_goal` and `penetration` are feasible motion, which only the task or the scene shows to be wrong; "
                "`late` begins at rest, which the term `still` penalizes. Stretched links are detected worst: a learned "
                "field follows a link that has grown.",
            ),
            Table(
                ("reward-cobot",),
                AUROC,
                "matrix",
                text="Dual PiPER, scored with the analytic field of URDF and camera.",
            ),
            Table(
                ("reward-panda", "reward-allegro", "reward-cobot"),
                text="`executed error` is how far the tips end up from the intended motion when the decoded actions are "
                "executed in simulation. Flicker, a sliding background or a doubled limb hardly change it but should "
                "lower the reward, so the two orders cannot agree fully.",
            ),
            Table(
                ("reward-length-*",),
                text="Length and recognition: rewards of simulated videos cut to several lengths, as they are, mirrored, lying on "
                "their side, replaced by noise, and of another robot. The first pose is not given.",
            ),
            Table(
                ("reward-attack-*",),
                layout="tall",
                text="Adversarial robustness: mean gain of the reward, which lies in 0 to 10, by changes of at most 4/255 per "
                "pixel. `ours` is the differentiable form that the attack sees; `ours, as used` is the default form, on "
                "the videos that the attack found.",
            ),
            Table(
                ("reward-speed-*",), text="Speed. Most of the time is spent tracking the pose, forward and backward."
            ),
            Table(
                ("reward-killed-*",),
                text="1,000 clips are scored while processes are killed. No score may be lost or written twice.",
            ),
        ),
    ),
    Section(
        "Control",
        "First, commands decoded from generated frames. Second, a robot and a planner in closed loop, where planning a chunk "
        "takes as long as executing one. The robot executes 95 % of each commanded step.",
        (
            Table(("decoder-*",), layout="tall"),
            Table(("async-*",)),
            Table(
                ("hostile",),
                text="Episodes with planners that are late, dead or wrong, robots that report NaN, poses outside or old ones, and "
                "frames that are none, at 10 to 1,000 commands per second and chunks of 1 to 1,000 frames. Every command is checked "
                "by finite differences. Where no field is named, a stand-in for the IDM measures hostile poses.",
            ),
            Table(
                ("unusable-frames",), text="A robot at rest, or in motion, whose frames all become unusable for 1.5 s."
            ),
        ),
    ),
    Section(
        "Server",
        "`jidm serve` beside clients that send mutated messages, leave sockets half open or do not read. Memory must stay "
        "flat, and the server must stay up and stop with status 0.",
        (
            Table(("server-panda-*",), layout="tall"),
            Table(
                ("server-load-*",),
                layout="tall",
                text="A client that sends 12.5 frames per second, and a newcomer, beside or after each attack, in turns with "
                "times without it. Each attack begins again as soon as the server cuts it off. Medians; of the time to "
                "exit, the longest.",
            ),
        ),
    ),
    Section(
        "Geometry",
        "URDF files written by others, file by file: [urdf_conformance.md](urdf_conformance.md). The manufacturer's PiPER file "
        "displaces the axis of joint 6 by 1.4165 mm; the published table, from which jidm's file is written, does not. "
        "This explains the difference of link 6.",
        (Table(("kinematics",), layout="tall"), Table(("urdf-conformance",))),
    ),
    Section(
        "Speed and memory",
        "Speed of field and solver alone; `jidm decode` with photometric alignment is much slower and prints its own. One "
        "solve evaluates the field at one pose; full re-linearization evaluates it again at every iterate. In the "
        "benchmark of the solver, J (17 MB) stays in the last-level cache, so its 7x8 products per pixel are limited by "
        "arithmetic, not by memory.",
        (
            Table(("speed",), ("frames_per_second", "speed_over_rendering")),
            Table(("speed",), layout="tall"),
            Table(("decode-speed-*",), text="A learned field beside EVA's ResNet-50 at 512x512 in the same run."),
            Table(("import-time", "memory"), layout="tall"),
        ),
    ),
)


# ---- figures --------------------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """All results with metrics and targets, and which rows are on the page already."""

    found: Mapping[str, Mapping[str, Any]]
    metrics: Mapping[str, Metric] = field(default_factory=results.metrics)
    targets: Sequence[results.Target] = field(default_factory=results.targets)
    robots: Mapping[str, str] = field(default_factory=lambda: results.labels("robot"))
    methods: Mapping[str, str] = field(default_factory=lambda: results.labels("method"))
    shown: set[tuple[str, ...]] = field(default_factory=set)

    def taken(self, table: Table) -> list[tuple[str, dict[str, Any]]]:
        """Run and row of what a table shows; from then on these rows are shown."""
        rows = []
        for run in (name for pattern in table.runs for name in self.found if fnmatchcase(name, pattern)):
            for one in self.found[run]["rows"]:
                key = (run, *results.key_of(one))
                if (
                    key not in self.shown
                    and any(fnmatchcase(one["metric"], pattern) for pattern in table.metrics)
                    and fnmatchcase(one.get("case", ""), table.cases)
                ):
                    rows.append((run, one))
                    self.shown.add(key)
        return rows

    def left(self) -> list[tuple[str, ...]]:
        """Rows that no table shows."""
        every = [(run, *results.key_of(one)) for run, result in self.found.items() for one in result["rows"]]
        return [key for key in every if key not in self.shown]

    def robot(self, one: Mapping[str, Any]) -> str:
        """As the page writes it."""
        return self.robots.get(one["robot"], f"`{one['robot']}`")

    def method(self, one: Mapping[str, Any]) -> str:
        """As the page writes it."""
        return self.methods.get(one["method"], one["method"].replace("_", " "))

    def number(self, one: Mapping[str, Any]) -> str:
        """Value and, over seeds, lowest and highest."""
        metric = self.metrics[one["metric"]]
        text = metric.shown(one["value"], one.get("rounding"))
        if "spread" in one:
            low, high = (metric.shown(x, one.get("rounding")).removesuffix(" %") for x in one["spread"])
            text += f" ({low} to {high})"
        return text

    def bounds(self, run: str, one: Mapping[str, Any]) -> tuple[str, str, bool]:
        """Must and aim with their marks, and whether a must is missed."""
        target = results.target_of(run, one, self.targets)
        if target is None:
            return "", "", False
        metric, value = self.metrics[one["metric"]], one["value"]

        def text(bound: Bound | None) -> str:
            return "" if bound is None else f"{bound.shown(metric)} {'✓' if bound.holds(value) else '✗'}"

        return text(target.must), text(target.aim), target.must is not None and not target.must.holds(value)

    def cell(self, run: str, one: Mapping[str, Any]) -> str:
        """Figure with must and aim beside it."""
        must, aim, missed = self.bounds(run, one)
        text = f"**{self.number(one)}**" if missed else self.number(one)
        said = [f"must {must}"] if must else []
        said += [f"aim {aim}"] if aim else []
        return f"{text} ({', '.join(said)})" if said else text


# ---- tables ---------------------------------------------------------------------------------------------------------


def wide(figures: Figures, table: Table, rows: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """A line for each robot, method and case; a column for each metric that occurs."""
    present = dict.fromkeys(one["metric"] for _, one in rows)
    columns = [m for pattern in table.metrics for m in present if fnmatchcase(m, pattern)]
    columns = list(dict.fromkeys(columns))
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for run, one in rows:
        key = (run, figures.robot(one), figures.method(one), one.get("case", ""))
        lines.setdefault(key, {})[one["metric"]] = figures.cell(run, one)
    cased = any(case for *_, case in lines)
    head = ["robot", "method", *(["case"] if cased else []), *(figures.metrics[m].heading for m in columns), "run"]
    body = [
        [robot, method, *([case] if cased else []), *(cells.get(m, "") for m in columns), f"`{run}`"]
        for (run, robot, method, case), cells in lines.items()
    ]
    return markdown(head, body)


def tall(figures: Figures, table: Table, rows: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """A line for each figure."""
    cased = any(one.get("case") for _, one in rows)
    aimed = any(figures.bounds(run, one)[1] for run, one in rows)
    head = [
        "robot",
        "method",
        *(["case"] if cased else []),
        "metric",
        "figure",
        "must",
        *(["aim"] if aimed else []),
        "run",
    ]
    body = []
    for run, one in rows:
        must, aim, missed = figures.bounds(run, one)
        metric = figures.metrics[one["metric"]]
        figure = figures.number(one) + ("" if metric.unit in ("", "%") else f" {metric.unit}")
        body.append(
            [
                figures.robot(one),
                figures.method(one),
                *([one.get("case", "")] if cased else []),
                metric.label,
                f"**{figure}**" if missed else figure,
                must,
                *([aim] if aimed else []),
                f"`{run}`",
            ]
        )
    return markdown(head, body)


def matrix(figures: Figures, table: Table, rows: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """A line for each robot and case, a column for each method; the metrics of a cell are joined by slashes."""
    columns = list(dict.fromkeys(figures.method(one) for _, one in rows))
    lines: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for run, one in rows:
        line = lines.setdefault((run, figures.robot(one), one.get("case", "")), {})
        line.setdefault(figures.method(one), {})[one["metric"]] = figures.cell(run, one)

    def joined(cells: Mapping[str, str]) -> str:
        parts = [cells.get(metric, "–") for metric in table.metrics]
        while parts and parts[-1] == "–" and not (set(parts[:-1]) <= {"–"}):
            parts.pop()
        return " / ".join(parts) if cells else ""

    head = ["robot", "case", *columns, "run"]
    body = [
        [robot, case, *(joined(cells.get(method, {})) for method in columns), f"`{run}`"]
        for (run, robot, case), cells in lines.items()
    ]
    return markdown(head, body)


LAYOUTS: dict[str, Callable[[Figures, Table, list[tuple[str, dict[str, Any]]]], list[str]]] = {
    "wide": wide,
    "tall": tall,
    "matrix": matrix,
}


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """A pipe table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]


# ---- the page -------------------------------------------------------------------------------------------------------


def about(name: str, result: Mapping[str, Any]) -> str:
    """Command, date, machine and note of a run, and what it needs."""
    job = jobs("run").get(name)
    machine, code = result["machine"], result["jidm"]
    parts = [f"{result['date']}{'' if result['source'] == 'run' else '†'}", f"{machine['cores']} cores"]
    if machine.get("threads"):
        parts.append(f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}")
    parts += [machine["accelerator"] or "no GPU", f"torch {machine['torch']}"]
    if code["commit"]:
        parts.append(f"commit {code['commit']}{' modified' if code['modified'] else ''}")
    note = f" {result['note']}" if result.get("note") else ""
    # The steps before the last are not recorded; they are known where that one is still the same.
    same = job is not None and job.commands[-1] == result["command"]
    commands = job.commands if job is not None and same else (result["command"],)
    needs = f" Needs {', '.join(f'`{x}`' for x in job.needs)}." if job is not None and job.needs else ""
    return "\n".join([f"- `{name}`: {', '.join(parts)}.{note}{needs}  ", *(f"  `{x}`  " for x in commands)]).rstrip()


def meanings(figures: Figures) -> list[str]:
    """What the metrics mean, for those whose heading does not say it all."""
    used = {one["metric"] for result in figures.found.values() for one in result["rows"]}
    return [
        f"- **{metric.label}**: {metric.meaning}"
        for name, metric in figures.metrics.items()
        if metric.meaning and name in used
    ]


def summary(figures: Figures) -> list[str]:
    """The figures of `SUMMARY`, of those runs that there are."""
    body = []
    for question, run, method, case, metric in SUMMARY:
        rows = figures.found[run]["rows"] if run in figures.found else []
        for one in rows:
            if (one["method"], one.get("case", ""), one["metric"]) == (method, case, metric):
                label = figures.metrics[metric].label
                body.append([question, label, figures.number(one), f"`{run}`"])
    return markdown(["what", "metric", "figure", "run"], body)


def rendered(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole page.

    Raises:
        ValueError: a row of a result is in no table.
    """
    figures = Figures(found)
    parts = [
        INTRODUCTION,
        "## Summary",
        "NVE is the error of a step as a fraction of the motion: lower is better, and predicting no motion scores 1. "
        "Of correlation and AUROC (good videos ranked above failed ones), higher is better, at most 1.",
        "\n".join(summary(figures)),
        "\n".join(["## Terms", "", *meanings(figures)]),
    ]
    described: set[str] = set()
    for section in SECTIONS:
        parts.append(f"{'#' * section.level} {section.title}")
        if section.text:
            parts.append(section.text)
        for table in section.tables:
            rows = figures.taken(table)
            if not rows:
                continue
            if table.text:
                parts.append(table.text)
            parts.append("\n".join(LAYOUTS[table.layout](figures, table, rows)))
            runs = [run for run in dict.fromkeys(run for run, _ in rows) if run not in described]
            described.update(runs)
            if runs:
                parts.append("\n".join(about(run, found[run]) for run in runs))
    preparations = [
        "\n".join([f"- `{job.name}`", *(f"  `{x}`  " for x in job.commands)]).rstrip()
        for job in jobs("preparation").values()
    ]
    parts.append(
        "\n".join(["## Preparations", "", "Recordings and trained baselines that runs need.", "", *preparations])
    )
    if left := figures.left():
        raise ValueError(f"no table of benchmarks/page.py shows {left[:5]}")
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the page is out of date")
    args = parser.parse_args()
    text = rendered(results.load())
    fresh = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
    if args.check:
        print(f"{PAGE.relative_to(REPOSITORY)}: {'fresh' if fresh else 'out of date: run python benchmarks/page.py'}")
        return 0 if fresh else 1
    if not fresh:
        PAGE.write_text(text, encoding="utf-8")
    print(f"{PAGE.relative_to(REPOSITORY)}: {'as it was' if fresh else 'written'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
