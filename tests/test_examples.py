"""Every numbered example runs on its own, in a small size, and says what it should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))
_ERROR = r"mean \|error of a step\| / mean \|step\| = ([\d.]+)"


def run(name: str, *arguments: str, folder: Path) -> str:
    """What the example prints."""
    pytest.importorskip("pybullet", reason="renders a video: extra sim")
    command = [sys.executable, str(REPOSITORY / "examples" / name), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JIDM_CACHE": str(folder / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_examples_are_six_and_short():
    assert [path.name[:2] for path in EXAMPLES] == [f"{k}_" for k in range(1, 7)]
    assert all(len(path.read_text(encoding="utf-8").splitlines()) < 80 for path in EXAMPLES)


def test_decode_video(tmp_path: Path):
    said = run("1_decode_video.py", "--embodiment", "planar_finger_2", "--frames", "4", "--out", "out", folder=tmp_path)
    assert float(re.findall(_ERROR, said)[0]) < 0.3
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"rendered.mp4", "motion.npz", "motion.csv", "plot.png"}


def test_my_robot_from_urdf(tmp_path: Path):
    said = run("2_my_robot_from_urdf.py", "--frames", "8", folder=tmp_path)
    assert "3 joints: joint_1, joint_2, joint_3" in said
    assert float(re.findall(r"largest position error ([\d.]+) rad", said)[0]) < 0.02


def test_train_from_babbling(tmp_path: Path):
    pytest.importorskip("lightning", reason="trains: extra train")
    small = ("--episodes", "4", "--frames", "6", "--size", "64", "--steps", "4")
    said = run("3_train_from_babbling.py", *small, folder=tmp_path)
    assert float(re.findall(_ERROR, said)[0]) < 10  # four steps teach nothing; it must run
    assert (tmp_path / "learned" / "checkpoint" / "model.safetensors").exists()


def test_reward(tmp_path: Path):
    said = run("4_reward.py", folder=tmp_path)
    reward = {name: float(value) for name, value in re.findall(r"^(\w+) +reward ([\d.]+)", said, flags=re.M)}
    assert reward["good"] > 9 and reward["cut"] < 6 and reward["melting"] < 6


def test_commands_for_a_robot(tmp_path: Path):
    said = run("5_commands_for_a_robot.py", "--seconds", "3", folder=tmp_path)
    moved, used = re.findall(r"moved ([\d.]+) rad, at most (\d+)% of the velocity limits", said)[0]
    assert float(moved) > 0.01 and int(used) <= 100
    assert "plan" in said


def test_swap_robot(tmp_path: Path):
    robots = ("planar_finger_2", "ur5")
    said = run("6_swap_robot.py", "--frames", "6", "--robots", *robots, folder=tmp_path)
    errors = [float(x) for x in re.findall(r"relative error ([\d.]+)", said)]
    assert len(errors) == len(robots) and max(errors) < 0.3
