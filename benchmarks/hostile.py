"""20,000 episodes in which everything goes wrong: does anything unsafe leave toward a robot? Prints JSON.

    python benchmarks/hostile.py --episodes 20000 --seed 6400
    python benchmarks/hostile.py --seed 6400 --episode 1234

A third of the episodes each pushes frames into an `ActionDecoder`, steps an `AsyncController`, and sends messages to a
server's `Session`. Planners are late, dead or canceled, raise, or generate other shapes; robots report NaN, poses outside,
other numbers of joints, and of times that go backwards; frames are black, noise, cut off, of another camera or robot, or no
frames. Rates are 10 to 1,000 commands per second, chunks 1 to 1,000 frames. A stand-in for the IDM measures hostile poses;
in the last episodes real fields measure rendered frames (`--real`).

Every command must be finite, and, by finite differences at the control rate from rest, inside the limits of position,
velocity, acceleration and jerk; messages must continue one another; nothing may raise but a refusal of what is wrong; each
hold must state a reason. The check (`motion_check.py`) shares no code with the library. An episode that fails is printed;
`--episode` repeats it alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from typing import Any

from hostile_episodes import FIELDS, KINDS, run_episode
from motion_check import CONTINUITY_TOLERANCE, RELATIVE_TOLERANCE, START_TOLERANCE
from results import add_save, rows, save

_BATCH = 50


def field_of(number: int, episodes: int, real: int) -> str:
    """The real field that measures the frames of this episode; empty for the stand-in. Few are analytic: it is slow."""
    left = episodes - number
    if left > real:
        return ""
    return FIELDS[1] if left * 10 <= real else FIELDS[0]


def outcome(seed: int, number: int, field: str, cost: float) -> dict[str, Any]:
    """What happened in one episode; whatever escapes from it is a failure, too."""
    began = time.process_time()
    try:
        kind, e = run_episode(seed, number, field=field, cost=cost)
    except Exception as error:
        return {
            "number": number,
            "kind": "harness",
            "field": field,
            "violations": [f"raises: {type(error).__name__}: {error}"],
        }
    counts = {**e.counts, "commands": e.record.count, "holding": e.record.holding, "segments": e.record.segments}
    rate, chunk = e.config.control_rate, e.config.chunk
    return {
        "number": number, "kind": kind, "field": field, "robot": e.robot.name, "counts": counts, "share": e.record.largest_share,
        "violations": [str(v) for v in e.record.violations], "seconds": time.process_time() - began,
        "rate": "10 to 50" if rate <= 50 else "50 to 250" if rate <= 250 else "250 to 1,000",
        "chunk": "1" if chunk == 1 else "2 to 99" if chunk < 1000 else "1,000",
    }  # fmt: skip


def batch(job: tuple[int, list[tuple[int, str]], float]) -> list[dict[str, Any]]:
    """Some episodes."""
    warnings.simplefilter("ignore")  # casts of complex and NaN frames are meant
    seed, numbers, cost = job
    return [outcome(seed, number, field, cost) for number, field in numbers]


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The report."""
    ran = [x for x in found if "robot" in x]
    counts: Counter[str] = Counter()
    for x in ran:
        counts.update(x["counts"])
    share = {
        name: max((x["share"].get(name, 0.0) for x in ran), default=0.0)
        for name in ("velocity", "acceleration", "jerk")
    }
    failed = [x for x in found if x["violations"]]
    return {
        "episodes": len(found),
        "by kind": dict(Counter(x["kind"] for x in found)),
        "by measurement": dict(Counter(x["field"] or "stand-in" for x in found)),
        "by robot": dict(Counter(x["robot"] for x in ran)),
        "by control rate [Hz]": dict(Counter(x["rate"] for x in ran)),
        "by chunk": dict(Counter(x["chunk"] for x in ran)),
        "counts": dict(sorted(counts.items())),
        "largest share of a limit": share,
        "tolerance": {
            "of each limit": RELATIVE_TOLERANCE, "from message to message [rad or m]": CONTINUITY_TOLERANCE,
            "start outside the range [rad or m]": START_TOLERANCE, "rounding": "16 eps of the largest position, times rate^order",
        },
        "processor time [min]": sum(x["seconds"] for x in ran) / 60,
        "failed": [{"episode": x["number"], "kind": x["kind"], "field": x["field"], "violations": x["violations"][:3]} for x in failed[:50]],
        "failed episodes": len(failed),
    }  # fmt: skip


def figures(found: list[dict[str, Any]], report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the result."""
    made = []
    for field in ("", *FIELDS):
        for kind in KINDS:
            some = [x for x in found if x["kind"] == kind and x["field"] == field]
            if some:
                commands = sum(x["counts"]["commands"] for x in some)
                failed = sum(bool(x["violations"]) for x in some)
                case = f"{kind}, {field or 'stand-in'}"
                made += rows(
                    "any", "ours", {"episodes": len(some), "commands": commands, "failed_episodes": failed}, case=case
                )
    share = {f"{name}_share": value for name, value in report["largest share of a limit"].items()}
    total = {
        "episodes": report["episodes"],
        "commands": report["counts"]["commands"],
        "failed_episodes": report["failed episodes"],
    }
    return made + rows("any", "ours", {**total, **share}, case="all")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=20_000)
    parser.add_argument("--real", type=int, default=150, help="of them with real fields")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--episode", type=int, help="repeat this episode alone")
    parser.add_argument("--field", default="", choices=("", *FIELDS), help="of that episode")
    parser.add_argument("--cost", type=float, default=0.25, help="factor on the length of episodes")
    parser.add_argument("--processes", type=int, default=1)
    add_save(parser)
    args = parser.parse_args()
    if args.episode is not None:
        one = outcome(args.seed, args.episode, args.field, args.cost)
        print(json.dumps(one, indent=1))
        sys.exit(bool(one["violations"]))
    numbered = [(k, field_of(k, args.episodes, args.real)) for k in range(args.episodes)]
    jobs = [(args.seed, numbered[k : k + _BATCH], args.cost) for k in range(0, args.episodes, _BATCH)]
    found: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for some in pool.imap(batch, jobs):
            found += some
            for x in some:
                if x["violations"]:
                    print(f"--seed {args.seed} --episode {x['number']} --field '{x['field']}'", x["kind"], *x["violations"][:3], sep="\n  ")  # fmt: skip
            if len(found) % 1000 < _BATCH:
                print(f"{len(found)} episodes, {sum(bool(x['violations']) for x in found)} failed", file=sys.stderr, flush=True)  # fmt: skip
    report = summary(found)
    print(json.dumps(report, indent=1))
    note = (
        "Shares of limits are those of the commands' finite differences at the control rate; above 1 is a violation. Position "
        "limits, continuity, finiteness, exceptions and reasons are checked in the same episodes. A stand-in for the IDM "
        "measures hostile poses, except where a field is named."
    )
    save(args.save, "hostile", figures(found, report), raw=report, seeds=(args.seed,), note=note)
    sys.exit(bool(report["failed episodes"]))
