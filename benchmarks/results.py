"""Results of the benchmarks as files: `benchmarks/results/NAME.json`, one for each run.

A script takes `--save NAME` (`add_save`) and ends with `save`. What stands in a file:

    benchmark  the script                    rows   one figure each: robot, method, case, metric, value, unit, and where
    command    the command line that ran            several seeds ran their lowest and highest value as `spread`
    date       of the end of the run         raw    what the script printed, with the figures that no table shows
    jidm       version, commit, hash of the package's sources
    machine    its class: cores, threads, accelerator, versions of Python and torch
    seeds      of what was measured          source "run", or where the figures were copied from

Labels, units and directions of the metrics are in `metrics.toml`, required and desired figures in `targets.toml`;
neither is copied into a result, so that a table always shows the present ones. `page.py` makes the tables of
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import datetime as dt
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BENCHMARKS = Path(__file__).resolve().parent
REPOSITORY = BENCHMARKS.parent
RESULTS = BENCHMARKS / "results"
MATERIAL = "../shared/material"
"""Where third-party files lie if the environment variable JIDM_MATERIAL does not say it."""
KEY = ("robot", "method", "case", "metric")
"""What tells one row of a result from another."""


# ---- metrics and targets --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """One quantity that benchmarks measure.

    Attributes:
        label: heading of its column.
        unit: of the stored value; "%" means that a share in [0, 1] is stored and a percentage shown.
        better: "lower", "higher", "nominal" (near `nominal`), or "none" for a figure without a direction.
        digits: significant digits shown.
        meaning: a sentence for the page, where the label does not say it all.
    """

    label: str
    unit: str = ""
    better: str = "none"
    nominal: float | None = None
    digits: int = 3
    meaning: str = ""

    @property
    def heading(self) -> str:
        """Label with unit."""
        return self.label if self.unit in ("", "%") else f"{self.label} [{self.unit}]"

    def shown(self, value: float, rounding: float | None = None) -> str:
        """The value as the page writes it, without its unit unless that is a percentage.

        Args:
            rounding: half the last digit that is known; where it is not given, `digits` significant ones are.
        """
        scale = 100 if self.unit == "%" else 1
        value = value * scale
        last = None if not rounding else math.floor(math.log10(2.001 * rounding * scale))  # decimal place of that digit
        if value == round(value) and abs(value) < 1e6 and last is None:
            text = f"{value:.0f}"
        elif value == 0:  # known to a few digits only
            text = "0"
        elif abs(value) < 1e-3:
            digits = self.digits if last is None or not value else math.floor(math.log10(abs(value))) - last + 1
            text = f"{value:.{min(digits, self.digits) - 1}e}".replace("e-0", "e-")
        elif last is not None:
            text = f"{value:.{max(0, -last)}f}"
        else:
            text = f"{value:#.{self.digits}g}".rstrip(".")
            text = f"{value:,.0f}" if "e" in text else text
        return f"{text} %" if self.unit == "%" else text


@dataclass(frozen=True)
class Bound:
    """A closed interval in which a figure must lie."""

    low: float = -math.inf
    high: float = math.inf

    def holds(self, value: float) -> bool:
        """Whether it does."""
        return self.low <= value <= self.high

    def shown(self, metric: Metric) -> str:
        """As the page writes it."""
        percent = metric.unit == "%"

        def plain(value: float) -> str:
            return f"{100 * value if percent else value:.6g}".replace("e-0", "e-")

        if self.low == self.high:
            text = plain(self.low)
        elif math.isinf(self.low):
            text = f"≤ {plain(self.high)}"
        elif math.isinf(self.high):
            text = f"≥ {plain(self.low)}"
        else:
            text = f"{plain(self.low)} to {plain(self.high)}"
        return f"{text} %" if percent else text


@dataclass(frozen=True)
class Target:
    """What is required of one figure (`must`) and what we would like (`aim`); `where` holds patterns of run and row."""

    where: Mapping[str, str | list[str]]
    must: Bound | None
    aim: Bound | None

    def matches(self, run: str, row: Mapping[str, Any]) -> bool:
        """Whether it is about that row."""
        about = {"run": run, "case": "", **row}
        wanted = {key: [x] if isinstance(x, str) else x for key, x in self.where.items()}
        return all(any(fnmatchcase(about[key], pattern) for pattern in some) for key, some in wanted.items())


def metrics() -> dict[str, Metric]:
    """All metrics by name."""
    return {name: Metric(**entry) for name, entry in toml("metrics.toml")["metric"].items()}


def labels(kind: str) -> dict[str, str]:
    """How the page writes a "robot" or a "method"."""
    table: dict[str, str] = toml("metrics.toml")[kind]
    return table


def targets() -> list[Target]:
    """All musts and aims."""

    def bound(entry: Mapping[str, float] | None) -> Bound | None:
        return None if entry is None else Bound(**entry)

    return [
        Target(
            where={k: v for k, v in entry.items() if k not in ("must", "aim")},
            must=bound(entry.get("must")),
            aim=bound(entry.get("aim")),
        )
        for entry in toml("targets.toml")["target"]
    ]


def target_of(run: str, row: Mapping[str, Any], among: Sequence[Target]) -> Target | None:
    """The one target of that row.

    Raises:
        ValueError: there are several.
    """
    found = [target for target in among if target.matches(run, row)]
    if len(found) > 1:
        raise ValueError(f"{run}: {[row.get(key) for key in KEY]} has {len(found)} targets; keep one in targets.toml")
    return found[0] if found else None


def toml(name: str) -> dict[str, Any]:
    """A table of this folder."""
    return tomllib.loads((BENCHMARKS / name).read_text(encoding="utf-8"))


# ---- writing a result -----------------------------------------------------------------------------------------------


def add_save(parser: argparse.ArgumentParser) -> None:
    """The option that every benchmark has."""
    parser.add_argument(
        "--save", metavar="NAME", help="write benchmarks/results/NAME.json; or a path that ends with .json"
    )


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What a script was asked for, for its report: all options but `--save`."""
    return {key: value for key, value in vars(args).items() if key != "save"}


def material(name: str) -> Path:
    """Where third-party files are, or should be: in the folder that the environment variable JIDM_MATERIAL names."""
    return Path(os.environ.get("JIDM_MATERIAL") or REPOSITORY / MATERIAL) / name


def row(
    robot: str, method: str, metric: str, value: float, *, case: str = "", spread: Sequence[float] | None = None
) -> dict[str, Any]:
    """One figure; `case` tells apart what one method did on several kinds of input."""
    made: dict[str, Any] = {"robot": robot, "method": method}
    if case:
        made["case"] = case
    made |= {"metric": metric, "value": value}
    if spread is not None:
        made["spread"] = list(spread)
    return made


def rows(robot: str, method: str, figures: Mapping[str, float | None], *, case: str = "") -> list[dict[str, Any]]:
    """Figures by metric; one that does not exist (None, NaN) has no row."""
    return [
        row(robot, method, metric, value, case=case)
        for metric, value in figures.items()
        if value is not None and not math.isnan(value)
    ]


def save(
    name: str | None,
    benchmark: str,
    figures: Iterable[dict[str, Any]],
    *,
    raw: Any,
    seeds: Iterable[int] = (),
    note: str = "",
) -> Path | None:
    """Write the result of a run under that name, whole or not at all; without a name nothing is written.

    Args:
        benchmark: the script's name without its suffix.
        figures: from `row` and `rows`.
        raw: what the script prints.
        seeds: of motions, appearances, videos or training, whichever the figures depend on.
        note: what a reader of the table should know of this run.

    Raises:
        ValueError: an unknown metric, a figure that is no finite number, or two rows of the same key.
    """
    if name is None:
        return None
    path = Path(name) if name.endswith(".json") else RESULTS / f"{name}.json"
    document: dict[str, Any] = {
        "benchmark": benchmark,
        "command": command_line(),
        "date": dt.date.today().isoformat(),
        "source": "run",
        "jidm": code(),
        "machine": machine(),
        "seeds": list(seeds),
        "note": note,
        "rows": list(figures),
        "raw": raw,
    }
    write(path, document)
    return path


def write(path: Path, document: dict[str, Any]) -> None:
    """Check a result, fill in its units and write it."""
    known = metrics()
    for one in document["rows"]:
        if one["metric"] not in known:
            raise ValueError(f"unknown metric '{one['metric']}'; add it to metrics.toml")
        if not math.isfinite(one["value"]):
            raise ValueError(f"{[one.get(key) for key in KEY]}: {one['value']} is no finite number")
        one["value"] = _rounded(one["value"])
        if "spread" in one:
            one["spread"] = [_rounded(x) for x in one["spread"]]
        one["unit"] = known[one["metric"]].unit
    keys = [key_of(one) for one in document["rows"]]
    if repeated := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"{path.stem}: several rows have the key {sorted(repeated)[0]}")
    if not document.get("note"):
        document = {key: value for key, value in document.items() if key != "note"}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp")
    try:
        temporary.write_text(dumped(document), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _rounded(value: float) -> float:
    """To seven significant digits, more than any figure deserves."""
    return value if isinstance(value, int) else float(f"{value:.7g}")


def dumped(document: Mapping[str, Any]) -> str:
    """JSON with one line for each row, so that a changed figure is one changed line."""

    def compact(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)

    parts = []
    for key, value in document.items():
        if key == "rows":
            text = "[\n" + ",\n".join(f"  {compact(one)}" for one in value) + "\n ]"
        elif key == "raw":
            text = _folded(_plain(value), 1)
        else:
            text = compact(value)
        parts.append(f' "{key}": {text}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _folded(value: Any, depth: int) -> str:
    """JSON in which whatever fits on a line stands on one."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if len(text) <= 110 or not isinstance(value, (dict, list)):
        return text
    inner, outer = " " * (depth + 1), " " * depth
    if isinstance(value, list):
        return "[\n" + ",\n".join(inner + _folded(x, depth + 1) for x in value) + f"\n{outer}]"
    items = (f"{inner}{json.dumps(k, ensure_ascii=False)}: {_folded(x, depth + 1)}" for k, x in value.items())
    return "{\n" + ",\n".join(items) + f"\n{outer}}}"


def requirements(run: str, figures: Iterable[Mapping[str, Any]]) -> list[tuple[str, bool]]:
    """A line for each figure of a run that has a must, and whether it is reached."""
    known, among, lines = metrics(), targets(), []
    for one in figures:
        target, metric = target_of(run, one, among), known[one["metric"]]
        if target is not None and target.must is not None:
            what = ", ".join(filter(None, (one["robot"], one["method"], one.get("case", ""), metric.label)))
            holds = target.must.holds(one["value"])
            figure = metric.shown(one["value"])
            lines.append((f"{what}: {figure}, must {target.must.shown(metric)}{'' if holds else ': MISSED'}", holds))
    return lines


def _plain(value: Any) -> Any:
    """As JSON has it: no NaN, no arrays, no paths of this machine."""
    if isinstance(value, Mapping):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    if value is None or isinstance(value, (bool, int)):
        return value
    if hasattr(value, "tolist"):  # NumPy and torch
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return _portable(str(value))


def _portable(text: str) -> str:
    """With the folders of third-party files and of this repository by name."""
    material = os.environ.get("JIDM_MATERIAL") or MATERIAL
    return text.replace(material, "$JIDM_MATERIAL").replace(f"{REPOSITORY}{os.sep}", "")


def key_of(one: Mapping[str, Any]) -> tuple[str, ...]:
    """Robot, method, case and metric of a row."""
    return tuple(str(one.get(key, "")) for key in KEY)


def command_line() -> str:
    """What this process was started with, from the repository's root, `--save` left out."""
    script = Path(sys.argv[0]).resolve()
    where = script.relative_to(REPOSITORY).as_posix() if script.is_relative_to(REPOSITORY) else script.name
    arguments = list(sys.argv[1:])
    for k in reversed(range(len(arguments))):
        if arguments[k] == "--save":
            del arguments[k : k + 2]
        elif arguments[k].startswith("--save="):
            del arguments[k]
    return _portable(shlex.join(["python", where, *arguments]))


def code() -> dict[str, Any]:
    """Which jidm ran: its version, the commit of the repository if it lies in one, and a hash of the sources."""
    import jidm

    package = Path(jidm.__file__).resolve().parent
    here = package.parent == REPOSITORY
    commit = _git("rev-parse", "--short=12", "HEAD") if here else None
    return {
        "version": jidm.__version__,
        "commit": commit,
        "modified": bool(commit and _git("status", "--porcelain", "-uno", "--", package.name)),
        "sources": sources_hash(package),
    }


def sources_hash(package: Path) -> str:
    """Of all Python files of the package, by relative name and content."""
    found = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        found.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def machine() -> dict[str, Any]:
    """The class of this machine; nothing that tells one machine of a class from another."""
    torch = sys.modules.get("torch")
    accelerator = torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None
    return {
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "threads": None if torch is None else torch.get_num_threads(),
        "accelerator": accelerator,
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


# ---- reading results ------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    """One result."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def load(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Name -> result, in alphabetical order."""
    return {path.stem: read(path) for path in sorted(folder.glob("*.json"))}
