"""Old and new figures side by side, with their ratio and which of them became worse.

    python benchmarks/compare.py HEAD~5                    # results of a revision against the present files
    python benchmarks/compare.py old_results new_results   # two folders of results
    python benchmarks/compare.py main --only 'models-*' --worse

The ratio is new over old. A figure is worse by the factor in which it lost: of what should be low, new over old; of
what should be high, old over new; of what should be near a nominal value, whichever is above 1 if it moved away from
it. Worse than --limit (1.05) is flagged, and so are a must that was reached and is missed, and figures that are gone.
A figure copied from an old page counts with the rounding that it was printed with, in favor of the new one;
"rounding" marks what is worse only without that. Exit status 1 if anything is flagged.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import results
from results import REPOSITORY, RESULTS, Metric, Target

FLAGGED = "WORSE", "MUST MISSED", "GONE"


@dataclass(frozen=True)
class Line:
    """One figure in both.

    Attributes:
        key: run, robot, method, case, metric.
        verdict: "", "better" by more than the limit, "rounding", "same file" where it was not measured again, "new", or
            one of FLAGGED.
    """

    key: tuple[str, ...]
    old: str
    new: str
    ratio: str
    verdict: str


def worsening(metric: Metric, old: float, new: float) -> float:
    """By which factor a figure became worse; below 1 it became better, NaN where that has no meaning."""
    if metric.better == "nominal":
        assert metric.nominal is not None
        away = abs(new - metric.nominal) / max(abs(old - metric.nominal), 1e-12)
        ratio = math.inf if not old or not new else max(new / old, old / new)
        return ratio if away > 1 else 1 / ratio
    good, bad = {"lower": (old, new), "higher": (new, old)}.get(metric.better, (math.nan, math.nan))
    if good == bad:
        return 1.0
    if math.isnan(good) or min(good, bad) < 0:
        return math.nan
    return bad / good if good else math.inf


def in_favor(metric: Metric, old: float, rounding: float, new: float) -> float:
    """The old value that lets the new one look best, within what its rounding allows."""
    if metric.better == "nominal":
        return min((old - rounding, old, old + rounding), key=lambda x: abs(x - new))
    return old + {"lower": rounding, "higher": -rounding}.get(metric.better, 0.0)


def compared(old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]], limit: float) -> list[Line]:
    """All figures of both, in the order of the new ones, those that are gone last in their run."""
    metrics, targets, lines = results.metrics(), results.targets(), []
    for run in dict.fromkeys([*old, *new]):
        before, after = ({results.key_of(x): x for x in found.get(run, {"rows": []})["rows"]} for found in (old, new))
        untouched = run in old and run in new and old[run] == new[run]
        for key in dict.fromkeys([*after, *before]):
            a, b = before.get(key), after.get(key)
            metric = metrics.get(key[-1], Metric(key[-1]))
            shown = ["" if x is None else metric.shown(x["value"], x.get("rounding")) for x in (a, b)]
            verdict = "same file" if untouched else verdict_on(run, metric, a, b, targets, limit)
            ratio = f"{b['value'] / a['value']:.3f}" if a and b and a["value"] else ""
            lines.append(Line((run, *key), shown[0], shown[1], ratio, verdict))
    return lines


def verdict_on(
    run: str,
    metric: Metric,
    old: Mapping[str, Any] | None,
    new: Mapping[str, Any] | None,
    targets: Sequence[Target],
    limit: float,
) -> str:
    """The verdict on one figure."""
    if old is None or new is None:
        return "new" if old is None else "GONE"
    a, b = old["value"], new["value"]
    target = results.target_of(run, new, targets)
    if target is not None and target.must is not None and target.must.holds(a) and not target.must.holds(b):
        return "MUST MISSED"
    factor = worsening(metric, a, b)
    if factor > limit:
        return "WORSE" if worsening(metric, in_favor(metric, a, old.get("rounding", 0.0), b), b) > limit else "rounding"
    return "better" if factor < 1 / limit else ""


def read(where: str) -> dict[str, dict[str, Any]]:
    """Results of a folder, or of a revision of this repository.

    Raises:
        SystemExit: it is neither, or holds no results.
    """
    if Path(where).is_dir():
        found = results.load(Path(where))
    else:
        folder = RESULTS.relative_to(REPOSITORY).as_posix()
        names = _git("ls-tree", "--name-only", where, f"{folder}/").split()
        found = {Path(x).stem: json.loads(_git("show", f"{where}:{x}")) for x in names if x.endswith(".json")}
    if not found:
        raise SystemExit(f"{where} holds no results")
    return found


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip())
    return done.stdout


def table(lines: Sequence[Line]) -> str:
    """Markdown."""
    rows: list[tuple[str, ...]] = [("run", "robot", "method", "case", "metric", "old", "new", "new / old", "")]
    rows += [(*line.key, line.old, line.new, line.ratio, line.verdict) for line in lines]
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    rows.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="revision, or folder of results")
    parser.add_argument("new", nargs="?", default=str(RESULTS), help="likewise; benchmarks/results if not given")
    parser.add_argument("--limit", type=float, default=1.05, help="factor by which a figure may be worse")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="runs to compare")
    parser.add_argument("--worse", action="store_true", help="print flagged lines only")
    args = parser.parse_args()
    old, new = (
        {run: x for run, x in read(where).items() if any(fnmatchcase(run, pattern) for pattern in args.only)}
        for where in (args.old, args.new)
    )
    lines = compared(old, new, args.limit)
    print(table([x for x in lines if not args.worse or x.verdict in FLAGGED]))
    counts = Counter(line.verdict or "within the limit" for line in lines)
    print("\n" + ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()))
    if untouched := {line.key[0] for line in lines if line.verdict == "same file"}:
        print(f"not measured again: {', '.join(sorted(untouched))}")
    return 1 if any(line.verdict in FLAGGED for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
