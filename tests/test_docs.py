"""What the documents say is true: their snippets run, their tables are fresh, their links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (REPOSITORY / document).read_text(), flags=re.S | re.M)


@pytest.fixture
def rendered(tmp_path: Path) -> Path:
    """A folder with robot.mp4 and camera.json, as the README's snippets expect them."""
    pytest.importorskip("pybullet", reason="renders a video: extra sim")
    from jidm import load_embodiment, write_video
    from jidm.sim import Scene, smooth_motion

    robot = load_embodiment("panda")
    camera = robot.camera().resized(160, 120)
    camera.save(tmp_path / "camera.json")
    with Scene(robot, supersample=1) as world:
        pictures = [world.render(q, camera).rgb for q in smooth_motion(robot, 3, 1 / 16, seed=0, start=robot.home)]
    write_video(tmp_path / "robot.mp4", iter(pictures), 16)
    return tmp_path


def test_quick_start_runs_and_says_the_right_shapes(rendered: Path, monkeypatch: pytest.MonkeyPatch):
    program, _ = blocks("README.md", "python")
    assert len([line for line in program.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(rendered)
    names: dict = {}
    exec(compile(program, "README.md", "exec"), names)
    motion, steps = names["motion"], 2
    for field, shape in re.findall(r"motion\.(\w+) +# \((.*?)\)", program):
        expected = tuple(steps if part.strip() == "T-1" else int(part) for part in shape.split(",") if part.strip())
        assert tuple(getattr(motion, field).shape) == expected, field
    assert (rendered / "motion.csv").exists()


def test_reward_snippet_runs():
    _, program = blocks("README.md", "python")
    names: dict = {"videos": torch.rand(2, 5, 3, 48, 48, generator=torch.Generator().manual_seed(0))}
    exec(compile(program, "README.md", "exec"), names)
    rewards = names["rewards"]
    assert rewards.shape == (2,) and bool(((rewards > 0) & (rewards <= 10)).all())


def test_control_snippets_run_and_say_the_right_shapes():
    decoding, loop, numbers = blocks("docs/control.md", "python")
    names: dict = {}
    exec(compile(decoding, "docs/control.md", "exec"), names)
    for field in ("action", "position"):
        assert getattr(names["commands"], field).shape == (16, 8)
    exec(compile(loop, "docs/control.md", "exec"), names)
    assert names["command"].action.shape == (1, 8)
    exec(compile(numbers, "docs/control.md", "exec"), names)
    assert names["numbers"].shape == (2, 30) and abs(names["q"] - names["robot"].home).max() < 1e-12


def test_conventions_snippet_runs():
    for program in blocks("docs/conventions.md", "python"):
        exec(compile(program, "docs/conventions.md", "exec"), {})


def test_camera_files_of_the_conventions_load(tmp_path: Path):
    from jidm import Camera

    for text in blocks("docs/conventions.md", "json"):
        (tmp_path / "c.json").write_text(text)
        camera = Camera.load(tmp_path / "c.json")
        assert (camera.width, camera.height) == (json.loads(text)["width"], json.loads(text)["height"])


def test_table_of_robots_is_fresh():
    sys.path.insert(0, str(REPOSITORY / "docs"))
    import embodiment_table

    text = (REPOSITORY / "README.md").read_text()
    assert embodiment_table.renewed(text) == text, "out of date: run python docs/embodiment_table.py"
    stale = text.replace("| `panda` |", "| `pnda` |")
    assert embodiment_table.renewed(stale) == text


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(document: Path):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target
    for path in re.findall(r"`((?:docs|tests|benchmarks|examples|jidm)/[\w./]+\.\w+)`", document.read_text()):
        assert (REPOSITORY / path).exists(), path


def test_benchmark_commands_exist():
    for path in re.findall(r"`python (benchmarks/\w+\.py)", (REPOSITORY / "docs/benchmarks.md").read_text()):
        assert (REPOSITORY / path).exists(), path


def test_every_room_is_on_the_map():
    map_ = (REPOSITORY / "docs/architecture.md").read_text()
    rooms = {
        p.stem for p in (REPOSITORY / "jidm").iterdir() if not p.name.startswith(("_", ".")) and p.suffix in ("", ".py")
    }
    assert {room for room in rooms if f"`{room}`" not in map_} == set()


def test_commands_of_the_readme_exist():
    from jidm.cli import VERBS

    makefile = (REPOSITORY / "Makefile").read_text()
    for block in blocks("README.md", "bash"):
        for line in block.splitlines():
            word, verb = line.split()[:2]
            assert (word == "make" and f"\n{verb}:" in makefile) or (word == "jidm" and verb in VERBS), line


def test_example_runs(tmp_path: Path):
    pytest.importorskip("pybullet", reason="renders a video: extra sim")
    example = REPOSITORY / "examples" / "decode_video.py"
    assert len(example.read_text().splitlines()) <= 80
    command = [sys.executable, example, "--embodiment", "planar_finger_2", "--frames", "4", "--out", tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    error = float(done.stdout.strip().splitlines()[-1].split("=")[-1])
    assert error < 0.3
    assert {p.name for p in tmp_path.iterdir()} == {"rendered.mp4", "motion.npz", "motion.csv", "plot.png"}
