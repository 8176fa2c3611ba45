"""Results of benchmarks: the page is made of them, each figure has its target, and what became worse is noticed."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import compare  # noqa: E402
import page  # noqa: E402
import results  # noqa: E402
import run_all  # noqa: E402
from results import Bound, Metric  # noqa: E402

FOUND = results.load()
MODULES = "results", "idm_figures", "hostile_episodes", "hostile_scenes", "motion_check"
SCRIPTS = [x for x in sorted((REPOSITORY / "benchmarks").glob("*.py")) if x.stem not in MODULES]


# ---- what is in the repository --------------------------------------------------------------------------------------


def test_the_page_is_fresh():
    assert page.PAGE.read_text(encoding="utf-8") == page.rendered(FOUND), "out of date: run python benchmarks/page.py"


def test_a_changed_figure_changes_the_page():
    changed = json.loads(json.dumps(FOUND))
    changed["oracle-panda"]["rows"][0]["value"] = 1.0
    text = page.rendered(changed)
    assert text != page.rendered(FOUND) and "(must ≤ 0.0002 ✗)" in text


def test_a_row_that_no_table_shows_is_refused():
    extra = {**FOUND, "another": {**FOUND["memory"], "rows": [results.row("panda", "ours", "nve", 0.1)]}}
    with pytest.raises(ValueError, match=r"page\.py shows.*another"):
        page.rendered(extra)


def test_every_result_has_a_run_and_every_run_a_script():
    runs, prepared = run_all.jobs("run"), run_all.jobs("preparation")
    assert set(FOUND) <= set(runs)
    for job in runs.values():
        assert job.group in run_all.GROUPS and set(job.needs) <= set(prepared), job.name
        for command in job.commands:
            script = re.match(r"python (benchmarks/\w+\.py) ?", command)
            assert script is not None and (REPOSITORY / script[1]).exists(), command
            assert run_all.arguments(command)[0] == sys.executable


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_starts(script: Path):
    """Its imports work and it says what it does; renames are easily forgotten where nothing else runs."""
    command = [sys.executable, str(script), "--help"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and f"usage: {script.name}" in done.stdout, done.stderr


def test_every_target_is_about_something_and_no_row_has_two():
    targets = results.targets()
    rows = [(run, one) for run, result in FOUND.items() for one in result["rows"]]
    met = {id(results.target_of(run, one, targets)) for run, one in rows}
    assert [t.where for t in targets if id(t) not in met] == []


def test_every_metric_is_known_and_directions_are_words():
    metrics = results.metrics()
    assert {one["metric"] for result in FOUND.values() for one in result["rows"]} <= set(metrics)
    for name, metric in metrics.items():
        assert metric.better in ("lower", "higher", "nominal", "none"), name
        assert (metric.better == "nominal") == (metric.nominal is not None), name


def test_results_say_where_they_are_from_and_nothing_of_the_machine_but_its_class():
    for name, result in FOUND.items():
        assert {"benchmark", "command", "date", "source", "jidm", "machine", "seeds", "rows", "raw"} <= set(result), (
            name
        )
        assert result["source"] == "run" or "transcribed from" in result["source"], name
        assert not re.search(r"(?<![\w.])/(?:home|root|tmp|opt|work|usr)/", json.dumps(result)), name
        assert results.dumped(result) == (results.RESULTS / f"{name}.json").read_text(encoding="utf-8"), name


# ---- writing --------------------------------------------------------------------------------------------------------


def saved(path: Path, rows: list[dict[str, Any]], raw: Any = None) -> dict[str, Any]:
    results.save(str(path), "memory", rows, raw=raw, seeds=(1, 2), note="a note")
    return results.read(path)


def test_what_is_saved_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = REPOSITORY / "benchmarks" / "memory.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--minutes", "1 2", "--save", "x"])
    monkeypatch.setenv("JIDM_MATERIAL", str(tmp_path))
    rows = results.rows("panda", "ours", {"nve": 0.5, "tip_error": None, "correlation": math.nan}, case="wide")
    found = saved(tmp_path / "x.json", rows, {"a": math.nan, "b": (1, 2), "c": tmp_path / "g1", "d": f"{REPOSITORY}/x"})
    assert found["command"] == "python benchmarks/memory.py --minutes '1 2'"
    assert found["rows"] == [
        {"robot": "panda", "method": "ours", "case": "wide", "metric": "nve", "value": 0.5, "unit": ""}
    ]
    assert found["raw"] == {"a": None, "b": [1, 2], "c": "$JIDM_MATERIAL/g1", "d": "x"}
    assert found["seeds"] == [1, 2] and found["source"] == "run"
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([results.row("panda", "ours", "nvee", 0.5)], "unknown metric 'nvee'"),
        ([results.row("panda", "ours", "nve", math.inf)], "no finite number"),
        ([results.row("panda", "ours", "nve", 0.5), results.row("panda", "ours", "nve", 0.6)], "several rows"),
    ],
)
def test_what_is_no_result_is_refused_and_the_old_one_stays(rows: list[dict[str, Any]], says: str, tmp_path: Path):
    before = saved(tmp_path / "x.json", [results.row("panda", "ours", "nve", 0.5)])
    with pytest.raises(ValueError, match=says):
        saved(tmp_path / "x.json", rows)
    assert results.read(tmp_path / "x.json") == before and len(list(tmp_path.iterdir())) == 1


def test_without_a_name_nothing_is_written():
    parser = argparse.ArgumentParser()
    results.add_save(parser)
    assert results.save(parser.parse_args([]).save, "memory", [], raw={}) is None


def test_the_hash_of_the_sources_sees_names_and_contents(tmp_path: Path):
    (tmp_path / "a.py").write_text("x = 1\n")
    first = results.sources_hash(tmp_path)
    (tmp_path / "notes.txt").write_text("not code")
    assert results.sources_hash(tmp_path) == first
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    second = results.sources_hash(tmp_path)
    (tmp_path / "b.py").write_text("x = 2\n")
    assert len({first, second, results.sources_hash(tmp_path)}) == 3


# ---- comparing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("better", "old", "new", "factor"),
    [
        ("lower", 0.10, 0.11, 1.1),
        ("lower", 0.10, 0.05, 0.5),
        ("lower", 0.0, 1.0, math.inf),
        ("lower", 0.0, 0.0, 1.0),
        ("higher", 60.0, 50.0, 1.2),
        ("higher", 50.0, 60.0, 1 / 1.2),
        ("higher", 0.5, 0.0, math.inf),
        ("nominal", 0.68, 0.85, 1.25),
        ("nominal", 0.85, 0.70, 0.7 / 0.85),
        ("nominal", 0.60, 0.80, 0.8 / 0.6),  # over the nominal value to further away on the other side
        ("nominal", 0.60, 0.72, 0.6 / 0.72),
    ],
)
def test_how_much_worse(better: str, old: float, new: float, factor: float):
    metric = Metric("x", better=better, nominal=0.68 if better == "nominal" else None)
    assert compare.worsening(metric, old, new) == pytest.approx(factor)


def test_signs_and_figures_that_are_not_judged_have_no_factor():
    assert math.isnan(compare.worsening(Metric("x", better="lower"), -0.02, 0.03))
    assert math.isnan(compare.worsening(Metric("x"), 1.0, 2.0))


def verdict(metric: str, old: float | None, new: float | None, *, run: str = "x", **more: Any) -> str:
    a, b = (None if x is None else results.row("panda", "learned", metric, x) for x in (old, new))
    if a is not None:
        a |= more
    return compare.verdict_on(run, results.metrics()[metric], a, b, results.targets(), 1.05)


def test_verdicts():
    assert verdict("nve", 0.100, 0.104) == "" and verdict("nve", 0.100, 0.106) == "WORSE"
    assert verdict("frames_per_second", 30, 28) == "WORSE" and verdict("frames_per_second", 28, 30) == "better"
    assert verdict("nve", 0.02, 0.0215, rounding=0.0005) == "rounding"
    assert verdict("nve", 0.02, 0.0217, rounding=0.0005) == "WORSE"
    assert verdict("nve", None, 1.0) == "new" and verdict("nve", 1.0, None) == "GONE"
    assert verdict("nve", 0.249, 0.251, run="bundled-panda-sim") == "MUST MISSED"


def test_bounds():
    share = Metric("share", "%")
    assert Bound(high=0.25).shown(Metric("NVE")) == "≤ 0.25" and Bound(low=0.6, high=0.76).shown(share) == "60 to 76 %"
    assert Bound(low=1000, high=1000).shown(Metric("lines", digits=4)) == "1000"
    assert Bound(low=0.6, high=0.76).holds(0.76) and not Bound(low=0.6, high=0.76).holds(0.77)


# ---- running --------------------------------------------------------------------------------------------------------


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of results and work folder, with a script that counts how often it measured."""
    monkeypatch.setattr(run_all, "RESULTS", tmp_path)
    monkeypatch.setattr(run_all, "WORK", tmp_path)
    monkeypatch.setattr(run_all, "REPOSITORY", tmp_path)
    script = f"""
import sys
sys.path.insert(0, {str(REPOSITORY / "benchmarks")!r})
import results
with open("count", "a") as file:
    file.write("x")
results.save(sys.argv[sys.argv.index("--save") + 1] + ".json", "memory", [results.row("panda", "ours", "nve", 0.5)], raw=None)
"""
    (tmp_path / "script.py").write_text(script)
    return tmp_path


JOB = run_all.Job("x", ("python script.py",), 1.0, outputs=("lines.jsonl",), models=("models",))


def test_a_run_is_measured_once_and_says_how_long_it_took(work: Path, capsys: pytest.CaptureFixture[str]):
    assert run_all.state(JOB) == "" and run_all.run(JOB, {}, again=False)
    found = results.read(work / "x.json")
    assert run_all.state(JOB) == "run" and found["minutes"] >= 0 and "note" not in found
    assert found["jidm"]["sources"] == results.code()["sources"]


def test_figures_copied_from_a_page_are_no_run_and_those_of_other_code_are_stale(work: Path):
    assert run_all.run(JOB, {}, again=False)
    found = results.read(work / "x.json")
    results.write(work / "x.json", found | {"source": "transcribed from a page"})
    assert run_all.state(JOB) == ""
    results.write(work / "x.json", found | {"jidm": {**found["jidm"], "sources": "other"}})
    assert run_all.state(JOB) == "stale"


def test_what_other_code_began_is_not_gone_on_with_and_models_stay_unless_asked(work: Path):
    (work / "models").mkdir()
    (work / "lines.jsonl").write_text("by nobody knows what code")
    assert run_all.run(JOB, {}, again=False) and not (work / "lines.jsonl").exists()
    (work / "lines.jsonl").write_text("by this code")
    assert run_all.run(JOB, {}, again=False) and (work / "lines.jsonl").exists() and (work / "models").exists()
    assert run_all.run(JOB, {}, again=True)
    assert not (work / "lines.jsonl").exists() and not (work / "models").exists()


def test_a_script_that_fails_leaves_the_old_result(work: Path):
    assert run_all.run(JOB, {}, again=False)
    before = (work / "x.json").read_bytes()
    (work / "script.py").write_text("raise SystemExit(3)")
    assert not run_all.run(JOB, {}, again=True) and (work / "x.json").read_bytes() == before


def test_preparations_are_made_once(work: Path):
    (work / "make.py").write_text("open('made', 'a').write('x')")
    prepared = {"p": run_all.Job("p", ("python make.py",), 1.0, makes="made")}
    needs = run_all.Job("x", JOB.commands, 1.0, needs=("p",))
    assert run_all.run(needs, prepared, again=False) and run_all.run(needs, prepared, again=True)
    assert (work / "made").read_text() == "x" and (work / "count").read_text() == "xx"
