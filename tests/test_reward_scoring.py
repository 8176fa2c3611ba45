"""Scoring of many files: every video once, whatever happens on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from jidm import load_embodiment
from jidm.errors import InputError
from jidm.rewards import ExecutabilityReward, scoring
from jidm.rewards.scoring import RewardConfig, read_scores, score_files
from jidm.video.io import write_video

pytest.importorskip("pybullet", reason="renders the robot: extra sim")

NAME, FRAMES, FPS, VIDEOS = "planar_finger_2", 6, 16.0, 6


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory):
    """Video files, and the recipe of a reward for them."""
    from jidm.sim import Appearance, Scene
    from jidm.sim.motion import smooth_motion

    folder = tmp_path_factory.mktemp("scoring")
    robot = load_embodiment(NAME)
    camera = robot.camera().resized(70, 100)
    paths, poses, videos = [], {}, []
    with Scene(robot, appearance=Appearance.textured(), exact=False) as world:
        for k in range(VIDEOS):
            q = smooth_motion(robot, FRAMES, 1 / FPS, k)
            videos.append(torch.from_numpy(world.render_video(q, camera).rgb).permute(0, 3, 1, 2).float() / 255)
            paths.append(str(folder / f"{k}.mp4"))
            write_video(paths[-1], videos[-1], fps=FPS)
            poses[f"{k}.mp4"] = q[0].tolist()
    recipe = RewardConfig(
        scales=str(folder / "scales.json"), embodiment=NAME, camera=camera.to_dict(), q0=poses
    )  # fmt: skip
    good = ExecutabilityReward(recipe.build_idm()).fit_scales(paths, q0=[recipe.initial_pose(path) for path in paths])
    good.scales.save(recipe.scales)
    return paths, recipe


class Quick:
    """Scores at once; counts."""

    seen: ClassVar[list[str]] = []

    def __init__(self, recipe: RewardConfig) -> None:
        self.by = recipe.content_hash

    def record(self, video: str) -> dict[str, Any]:
        self.seen.append(video)
        return {"video": video, "reward": 1.0, "problem": None, "by": self.by}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(scoring, "Scorer", Quick)
    monkeypatch.setattr(Quick, "seen", [])
    return Quick.seen


def test_lines_are_what_the_reward_says_and_finite(scene, tmp_path: Path):
    paths, recipe = scene
    videos = [*paths[:2], str(tmp_path / "absent.mp4")]
    known = {**recipe.q0, "absent.mp4": [0.0, 0.0]}
    recipe = RewardConfig(**{**vars(recipe), "q0": known})
    assert score_files(videos, recipe, tmp_path / "scores.jsonl") == 3
    records = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [record["video"] for record in records] == videos
    expected = recipe.build()(paths[:2], q0=[recipe.initial_pose(path) for path in paths[:2]])
    assert [record["reward"] for record in records[:2]] == pytest.approx(expected.tolist())
    assert records[2]["reward"] == 0 and "absent.mp4" in records[2]["problem"]
    assert set(records[0]["by_joint"]) == set(load_embodiment(NAME).joint_names)
    assert all(len(values) == FRAMES - 1 and np.isfinite(values).all() for values in records[0]["by_frame"].values())


def test_what_is_there_is_not_scored_again(scene, quick, tmp_path: Path):
    paths, recipe = scene
    out = tmp_path / "scores.jsonl"
    assert score_files(paths[:2], recipe, out) == 2 and score_files(paths, recipe, out) == VIDEOS - 2
    assert score_files(paths, recipe, out) == 0
    assert quick == paths and [record["video"] for record in read_scores(out)] == paths


def test_a_line_cut_short_is_scored_again(scene, quick, tmp_path: Path):
    paths, recipe = scene
    out = tmp_path / "scores.jsonl"
    score_files(paths[:3], recipe, out)
    raw = out.read_bytes()
    out.write_bytes(raw[: -len(raw.splitlines()[-1]) // 2])
    assert score_files(paths[:3], recipe, out) == 1 and out.read_bytes() == raw


def test_shards_share_the_work(scene, quick, tmp_path: Path):
    paths, recipe = scene
    for i in range(4):
        score_files(paths, recipe, tmp_path / f"{i}.jsonl", shard=(i, 4))
    assert sorted(quick) == paths
    assert [record["video"] for record in read_scores(tmp_path / "1.jsonl")] == paths[1::4]


def test_refuses_what_cannot_be_meant(scene, quick, tmp_path: Path):
    paths, recipe = scene
    out = tmp_path / "scores.jsonl"
    with pytest.raises(InputError, match="given twice"):
        score_files([paths[0], paths[0]], recipe, out)
    with pytest.raises(InputError, match="i/N"):
        score_files(paths, recipe, out, shard=(2, 2))
    score_files(paths[:1], recipe, out)
    other = replace(recipe, weights={"still": 0.0})
    with pytest.raises(InputError, match="another reward"):
        score_files(paths, other, out)
    out.write_text("what is this\n")
    with pytest.raises(InputError, match="no file of scores"):
        score_files(paths, recipe, out)
    with pytest.raises(InputError, match="no first pose"):
        recipe.start("unknown.mp4")


_RUN = """
import json, sys
from jidm.rewards.scoring import RewardRecipe, score_files
paths, recipe, out, ray = json.loads(sys.argv[1])
score_files(paths, RewardRecipe(**recipe), out, ray=ray, workers=2)
"""


def started(paths: list[str], recipe: RewardConfig, out: Path, ray: str | None = None) -> subprocess.Popen[bytes]:
    fields = {name: value for name, value in vars(recipe).items() if name != "content_hash"}
    told = json.dumps([paths, fields, str(out), ray])
    return subprocess.Popen([sys.executable, "-c", _RUN, told], start_new_session=True)


def lines(out: Path) -> int:
    return out.read_bytes().count(b"\n") if out.exists() else 0


def wait_for(done: Any, process: subprocess.Popen[bytes], seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until and process.poll() in (None, 0)
        time.sleep(0.02)


def actors_of(driver: int) -> list[int]:
    """Processes of Ray's actors below a driver."""
    table = subprocess.check_output(["ps", "-eo", "pid=,ppid=,args="]).decode().splitlines()
    rows = [(int(pid), int(parent), what) for pid, parent, what in (line.split(None, 2) for line in table)]
    parents = {pid: parent for pid, parent, _ in rows}

    def is_below(pid: int) -> bool:
        while pid in parents and pid != driver:
            pid = parents[pid]
        return pid == driver

    return [pid for pid, _, what in rows if "MapWorker" in what and is_below(pid)]


def test_a_killed_run_goes_on_where_it_was(scene, tmp_path: Path):
    paths, recipe = scene
    out = tmp_path / "scores.jsonl"
    for count in (1, 3):
        process = started(paths, recipe, out)
        wait_for(lambda count=count: lines(out) >= count, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert started(paths, recipe, out).wait(300) == 0
    assert [record["video"] for record in read_scores(out, recipe.content_hash)] == paths


@pytest.mark.slow
def test_ray_survives_the_loss_of_a_worker_and_of_the_driver(scene, tmp_path: Path):
    pytest.importorskip("ray", reason="extra ray")
    pytest.importorskip("pandas", reason="Ray Data: extra ray")
    paths, recipe = scene
    many = []
    for k in range(24):
        many.append(str(tmp_path / f"{k}_{Path(paths[k % VIDEOS]).name}"))
        os.link(paths[k % VIDEOS], many[-1])
    recipe = replace(recipe, q0={Path(p).name: recipe.start(paths[k % VIDEOS]) for k, p in enumerate(many)})
    out = tmp_path / "scores.jsonl"

    process = started(many, recipe, out, "local")
    wait_for(lambda: lines(out) >= 2 and actors_of(process.pid), process)
    os.kill(actors_of(process.pid)[0], signal.SIGKILL)
    before = lines(out)
    wait_for(lambda: lines(out) >= min(before + 4, len(many)), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert started(many, recipe, out, "local").wait(300) == 0
    assert sorted(record["video"] for record in read_scores(out, recipe.content_hash)) == sorted(many)
