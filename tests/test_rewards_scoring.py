"""Scoring of many files: every video exactly once, also after a kill."""

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
from jidm.rewards.config import RewardConfig
from jidm.rewards.scoring import read_scores, score_files
from jidm.video.io import write_video

pytest.importorskip("pybullet", reason="renders the robot: extra sim")

NAME, FRAMES, FPS, VIDEOS = "planar_finger_2", 6, 16.0, 6


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory):
    """Video files, and the configuration of a reward for them."""
    from jidm.sim import Appearance, Scene
    from jidm.sim.motion import random_motion

    folder = tmp_path_factory.mktemp("scoring")
    robot = load_embodiment(NAME)
    camera = robot.camera().resized(70, 100)
    paths, poses, videos = [], {}, []
    with Scene(robot, appearance=Appearance.textured(), exact=False) as renderer:
        for k in range(VIDEOS):
            q = random_motion(robot, FRAMES, 1 / FPS, k)
            videos.append(torch.from_numpy(renderer.render_video(q, camera).rgb).permute(0, 3, 1, 2).float() / 255)
            paths.append(str(folder / f"{k}.mp4"))
            write_video(paths[-1], videos[-1], fps=FPS)
            poses[f"{k}.mp4"] = q[0].tolist()
    config = RewardConfig(
        scales=str(folder / "scales.json"), embodiment=NAME, camera=camera.to_dict(), q0=poses
    )  # fmt: skip
    good = ExecutabilityReward(config.build_idm()).fit_scales(paths, q0=[config.initial_pose(path) for path in paths])
    good.scales.save(config.scales)
    return paths, config


class CountingScorer:
    """Gives constant scores and records the videos."""

    seen: ClassVar[list[str]] = []

    def __init__(self, config: RewardConfig) -> None:
        self.config_hash = config.content_hash

    def record(self, video: str) -> dict[str, Any]:
        self.seen.append(video)
        return {"video": video, "reward": 1.0, "problem": None, "config_hash": self.config_hash}


@pytest.fixture
def scored_videos(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(scoring, "Scorer", CountingScorer)
    monkeypatch.setattr(CountingScorer, "seen", [])
    return CountingScorer.seen


def test_lines_hold_the_rewards_and_are_finite(scene, tmp_path: Path):
    paths, config = scene
    videos = [*paths[:2], str(tmp_path / "absent.mp4")]
    known = {**config.q0, "absent.mp4": [0.0, 0.0]}
    config = RewardConfig(**{**vars(config), "q0": known})
    assert score_files(videos, config, tmp_path / "scores.jsonl") == 3
    records = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [record["video"] for record in records] == videos
    expected = config.build()(paths[:2], q0=[config.initial_pose(path) for path in paths[:2]])
    assert [record["reward"] for record in records[:2]] == pytest.approx(expected.tolist())
    assert records[2]["reward"] == 0 and "absent.mp4" in records[2]["problem"]
    assert set(records[0]["by_joint"]) == set(load_embodiment(NAME).joint_names)
    assert all(len(values) == FRAMES - 1 and np.isfinite(values).all() for values in records[0]["by_frame"].values())


def test_existing_scores_are_kept(scene, scored_videos, tmp_path: Path):
    paths, config = scene
    out = tmp_path / "scores.jsonl"
    assert score_files(paths[:2], config, out) == 2 and score_files(paths, config, out) == VIDEOS - 2
    assert score_files(paths, config, out) == 0
    assert scored_videos == paths and [record["video"] for record in read_scores(out)] == paths


def test_a_truncated_line_is_scored_again(scene, scored_videos, tmp_path: Path):
    paths, config = scene
    out = tmp_path / "scores.jsonl"
    score_files(paths[:3], config, out)
    raw = out.read_bytes()
    out.write_bytes(raw[: -len(raw.splitlines()[-1]) // 2])
    assert score_files(paths[:3], config, out) == 1 and out.read_bytes() == raw


def test_shards_share_the_work(scene, scored_videos, tmp_path: Path):
    paths, config = scene
    for i in range(4):
        score_files(paths, config, tmp_path / f"{i}.jsonl", shard=(i, 4))
    assert sorted(scored_videos) == paths
    assert [record["video"] for record in read_scores(tmp_path / "1.jsonl")] == paths[1::4]


def test_wrong_calls_are_refused(scene, scored_videos, tmp_path: Path):
    paths, config = scene
    out = tmp_path / "scores.jsonl"
    with pytest.raises(InputError, match="given twice"):
        score_files([paths[0], paths[0]], config, out)
    with pytest.raises(InputError, match="i/N"):
        score_files(paths, config, out, shard=(2, 2))
    with pytest.raises(InputError, match="workers are Ray's"):
        score_files(paths, config, out, workers=2)
    with pytest.raises(InputError, match="at least 1, got 0"):
        score_files(paths, config, out, ray="local", workers=0)
    score_files(paths[:1], config, out)
    other = replace(config, weights={"still": 0.0})
    with pytest.raises(InputError, match="another reward"):
        score_files(paths, other, out)
    out.write_text("something else\n")
    with pytest.raises(InputError, match="not a file of scores"):
        score_files(paths, config, out)
    with pytest.raises(InputError, match="no initial pose"):
        config.initial_pose("unknown.mp4")


_RUN = """
import json, sys
from jidm.rewards.config import RewardConfig
from jidm.rewards.scoring import score_files
paths, config, out, ray = json.loads(sys.argv[1])
score_files(paths, RewardConfig(**config), out, ray=ray, workers=ray and 2)
"""


def start_run(paths: list[str], config: RewardConfig, out: Path, ray: str | None = None) -> subprocess.Popen[bytes]:
    fields = {name: value for name, value in vars(config).items() if name != "content_hash"}
    arguments = json.dumps([paths, fields, str(out), ray])
    return subprocess.Popen([sys.executable, "-c", _RUN, arguments], start_new_session=True)


def count_lines(out: Path) -> int:
    return out.read_bytes().count(b"\n") if out.exists() else 0


def wait_for(done: Any, process: subprocess.Popen[bytes], seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until and process.poll() in (None, 0)
        time.sleep(0.02)


def actors_of(driver: int) -> list[int]:
    """Process ids of the Ray actors below a driver."""
    table = subprocess.check_output(["ps", "-eo", "pid=,ppid=,args="]).decode().splitlines()
    rows = [(int(pid), int(parent), what) for pid, parent, what in (line.split(None, 2) for line in table)]
    parents = {pid: parent for pid, parent, _ in rows}

    def is_below(pid: int) -> bool:
        while pid in parents and pid != driver:
            pid = parents[pid]
        return pid == driver

    return [pid for pid, _, what in rows if "MapWorker" in what and is_below(pid)]


@pytest.mark.slow
def test_a_killed_run_resumes(scene, tmp_path: Path):
    paths, config = scene
    out = tmp_path / "scores.jsonl"
    for count in (1, 3):
        process = start_run(paths, config, out)
        wait_for(lambda count=count: count_lines(out) >= count, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert start_run(paths, config, out).wait(300) == 0
    assert [record["video"] for record in read_scores(out, config.content_hash)] == paths


@pytest.mark.slow
def test_ray_survives_the_loss_of_a_worker_and_of_the_driver(scene, tmp_path: Path):
    pytest.importorskip("ray", reason="extra ray")
    pytest.importorskip("pandas", reason="Ray Data: extra ray")
    paths, config = scene
    many = []
    for k in range(24):
        many.append(str(tmp_path / f"{k}_{Path(paths[k % VIDEOS]).name}"))
        os.link(paths[k % VIDEOS], many[-1])
    config = replace(config, q0={Path(p).name: config.initial_pose(paths[k % VIDEOS]) for k, p in enumerate(many)})
    out = tmp_path / "scores.jsonl"

    process = start_run(many, config, out, "local")
    wait_for(lambda: count_lines(out) >= 2 and actors_of(process.pid), process)
    os.kill(actors_of(process.pid)[0], signal.SIGKILL)
    before = count_lines(out)
    wait_for(lambda: count_lines(out) >= min(before + 4, len(many)), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert start_run(many, config, out, "local").wait(300) == 0
    assert sorted(record["video"] for record in read_scores(out, config.content_hash)) == sorted(many)
