"""Repeat benchmarks: whatever `runs.toml` lists, with the recordings and the training that they need.

    python benchmarks/run_all.py                    # list runs and groups, how long they take and what has a result
    python benchmarks/run_all.py decoding           # a group; "all" for every run
    python benchmarks/run_all.py models-g1 memory   # single runs
    python benchmarks/run_all.py learned --stale    # also what other code than the present measured

A run that has a result is skipped, so the same command goes on after an interruption; figures copied from an old page
are no result. What a run prints goes to out/benchmarks/logs/NAME.txt. Results are written to benchmarks/results;
`page.py` makes the page of them, `compare.py` compares them with earlier ones.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import results
from results import MATERIAL, REPOSITORY, RESULTS

GROUPS = ("decoding", "learned", "reward", "control", "server", "geometry", "speed")
WORK = REPOSITORY / "out" / "benchmarks"
# Small virtual machines spend half of a training's time on page faults without these.
ALLOCATION = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184"}


@dataclass(frozen=True)
class Job:
    """A run, or a preparation that has no result of its own; `runs.toml` says what the entries mean."""

    name: str
    commands: tuple[str, ...]
    minutes: float
    group: str = ""
    needs: tuple[str, ...] = ()
    makes: str = ""
    outputs: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    threads: int | None = None


def jobs(kind: str) -> dict[str, Job]:
    """All of a kind, "run" or "preparation", in the order of the file."""
    made = {}
    for name, entry in results.toml("runs.toml")[kind].items():
        entries: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
        made[name] = Job(name, **entries)
    return made


def state(job: Job) -> str:
    """ "" where a run has no result, "run", or "stale" where other code than the present made it."""
    file = RESULTS / f"{job.name}.json"
    found = results.read(file) if file.exists() else None
    if found is None or found["source"] != "run":
        return ""
    return "run" if found["jidm"]["sources"] == results.code()["sources"] else "stale"


def chosen(names: Sequence[str]) -> list[Job]:
    """The runs that are meant by names of runs and groups, in the order of the file.

    Raises:
        SystemExit: nothing has that name.
    """
    runs = jobs("run")
    if unknown := [x for x in names if x not in {*runs, *GROUPS, "all"}]:
        raise SystemExit(f"unknown: {', '.join(unknown)}; known: all, {', '.join([*GROUPS, *runs])}")
    return [job for job in runs.values() if {job.name, job.group, "all"} & set(names)]


def arguments(command: str) -> list[str]:
    """A command as it is started here."""
    words = [x.replace("$JIDM_MATERIAL", os.environ.get("JIDM_MATERIAL") or MATERIAL) for x in shlex.split(command)]
    started = {"python": [sys.executable], "jidm": [sys.executable, "-m", "jidm.cli"]}
    return [*started[words[0]], *words[1:]]


def execute(job: Job, log: Path, extra: Sequence[str] = ()) -> bool:
    """Its commands one after the other, the last one with `extra` arguments; whether all succeeded."""
    environment = {**os.environ, **ALLOCATION}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    if job.threads:
        environment["OMP_NUM_THREADS"] = str(job.threads)
    for path in (*job.outputs, *job.models, job.makes):
        if path:
            (REPOSITORY / path).parent.mkdir(parents=True, exist_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as file:
        for command in job.commands:
            words = [*arguments(command), *(extra if command is job.commands[-1] else ())]
            print(f"   {command}", flush=True)
            file.write(f"$ {command}\n")
            file.flush()
            code = subprocess.run(
                words, cwd=REPOSITORY, env=environment, stdout=file, stderr=subprocess.STDOUT
            ).returncode
            if code:
                print(f"   ended with status {code}; see {log.relative_to(REPOSITORY)}", flush=True)
                return False
    return True


def prepare(job: Job, prepared: dict[str, Job]) -> bool:
    """What it needs, where that is not there yet; whether all of it is."""
    for name in job.needs:
        if not (REPOSITORY / prepared[name].makes).exists():
            print(f"-- {name}, about {prepared[name].minutes:g} minutes", flush=True)
            if not execute(prepared[name], WORK / "logs" / f"{name}.txt"):
                return False
    return True


def remove(paths: Sequence[str]) -> None:
    for path in paths:
        where = REPOSITORY / path
        if where.is_dir():
            shutil.rmtree(where)
        else:
            where.unlink(missing_ok=True)


def run(job: Job, prepared: dict[str, Job], *, again: bool) -> bool:
    """Measure it; whether it has a new result."""
    print(f"== {job.name}, about {job.minutes:g} minutes", flush=True)
    if again:
        remove(job.models)
    # What was interrupted goes on only where the same code began it.
    marker, code = WORK / "logs" / f"{job.name}.code", results.code()["sources"]
    if again or not marker.exists() or marker.read_text(encoding="utf-8") != code:
        remove(job.outputs)
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(code, encoding="utf-8")
    if not prepare(job, prepared):
        return False
    file = RESULTS / f"{job.name}.json"
    before = file.read_bytes() if file.exists() else None
    began = time.monotonic()
    # Some benchmarks end with a status of their own where a must is missed; what counts is whether they measured.
    execute(job, WORK / "logs" / f"{job.name}.txt", ["--save", job.name])
    measured = file.exists() and file.read_bytes() != before
    minutes = (time.monotonic() - began) / 60
    print(f"   {'measured' if measured else 'NOT MEASURED'} after {minutes:.1f} minutes", flush=True)
    if measured:
        results.write(file, results.read(file) | {"minutes": round(minutes, 1)})
    return measured


def listing() -> str:
    """Runs by group, with durations and what there is."""
    prepared, lines = jobs("preparation"), []
    for group in GROUPS:
        members = [job for job in jobs("run").values() if job.group == group]
        needed = dict.fromkeys(x for job in members for x in job.needs)
        total = sum(job.minutes for job in members) + sum(prepared[x].minutes for x in needed)
        lines.append(f"{group}: about {total / 60:.1f} hours")
        for job in members:
            about = {"": "no result", "run": "has a result", "stale": "has a result of other code"}[state(job)]
            needs = f"; needs {', '.join(job.needs)}" if job.needs else ""
            lines.append(f"  {job.name:28}{job.minutes:4g} min  {about}{needs}")
    lines.append("preparations")
    lines += [
        f"  {job.name:28}{job.minutes:4g} min  {'there' if (REPOSITORY / job.makes).exists() else 'missing'}"
        for job in prepared.values()
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="groups or runs; nothing lists them")
    parser.add_argument(
        "--stale", action="store_true", help="also runs whose result other code made; trained models stay"
    )
    parser.add_argument(
        "--again", action="store_true", help="everything anew, trained models of the benchmark included"
    )
    args = parser.parse_args()
    if not args.names:
        print(listing())
        return 0
    prepared, failed = jobs("preparation"), []
    for job in chosen(args.names):
        wanted = {"", "stale"} if args.stale else {""}
        if not args.again and state(job) not in wanted:
            print(f"== {job.name} has a result")
        elif not run(job, prepared, again=args.again):
            failed.append(job.name)
    if failed:
        print(f"not measured: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
