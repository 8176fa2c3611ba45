"""`jidm fit-scales`, `score`, `rank` and `report` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from jidm import cli, load_embodiment
from jidm.sim import Appearance, Scene
from jidm.sim.motion import random_motion
from jidm.video.io import write_video

pytest.importorskip("pybullet", reason="renders the robot: extra sim")

NAME, FRAMES, FPS, VIDEOS = "planar_finger_2", 6, 16.0, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos, some with a jump and one too short, their initial poses, a camera and scales."""
    folder = tmp_path_factory.mktemp("reward")
    robot = load_embodiment(NAME)
    camera = robot.camera().resized(70, 100)
    camera.save(folder / "camera.json")
    poses = {}
    with Scene(robot, appearance=Appearance.textured(), exact=False) as renderer:
        for k in range(VIDEOS):
            q = random_motion(robot, FRAMES, 1 / FPS, k)
            video = torch.from_numpy(renderer.render_video(q, camera).rgb).permute(0, 3, 1, 2).float() / 255
            write_video(folder / f"good{k}.mp4", video, fps=FPS)
            poses[f"good{k}.mp4"] = poses[f"bad{k}.mp4"] = q[0].tolist()
            video[3:] = video[3:].roll(20, -1)
            write_video(folder / f"bad{k}.mp4", video, fps=FPS)
    write_video(folder / "short.mp4", video[:2], fps=FPS)
    poses["short.mp4"] = poses["bad0.mp4"]
    (folder / "q0.json").write_text(json.dumps(poses))
    model = f"--embodiment {NAME} --camera {folder}/camera.json --q0 {folder}/q0.json"
    (folder / "model").write_text(model)
    good = " ".join(str(folder / f"good{k}.mp4") for k in range(VIDEOS))
    assert cli.main(f"fit-scales {good} {model} --out {folder}/scales.json".split()) == 0
    return folder


def run(folder: Path, line: str) -> int:
    return cli.main(line.format(f=folder, model=(folder / "model").read_text()).split())


def test_scored_ranked_and_resumed(folder: Path, capsys: pytest.CaptureFixture[str]):
    videos = "{f}/good0.mp4 {f}/bad0.mp4 {f}/good1.mp4 {f}/short.mp4"
    line = f"score {videos} {{model}} --scales {{f}}/scales.json --out {{f}}/scores.jsonl"
    assert run(folder, line) == 0
    out = capsys.readouterr().out
    assert "4 videos, 4 of them new" in out and "1 could not be scored" in out and "2 frames" in out
    lines = {Path(line.split()[0]).name: line for line in out.splitlines() if line.split()[0].endswith(".mp4")}
    assert set(lines) == {"good0.mp4", "bad0.mp4", "good1.mp4", "short.mp4"}
    records = {Path(r["video"]).name: r for r in map(json.loads, (folder / "scores.jsonl").read_text().splitlines())}
    for name in ("good0.mp4", "bad0.mp4"):
        assert f"{records[name]['reward']:.2f}  EVA's {records[name]['eva']:.2f}; penalties: " in lines[name]
        assert all(f"{term} {value:.2f}" in lines[name] for term, value in records[name]["penalties"].items())
    assert records["bad0.mp4"]["reasons"][0] in lines["bad0.mp4"] and "not scored: " in lines["short.mp4"]
    assert run(folder, line) == 0
    assert "0 of them new" in capsys.readouterr().out
    assert run(folder, "rank {f}/scores.jsonl --best 3 --out {f}/ranking.png") == 0
    ranked = capsys.readouterr().out.splitlines()
    assert "bad0.mp4" in ranked[3] and "frame 3" in ranked[3] and "left out" in ranked[4]
    assert (folder / "ranking.png").stat().st_size > 1000


def test_a_report_is_self_contained(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert run(folder, "report {f}/bad1.mp4 {model} --scales {f}/scales.json --out {f}/report.html") == 0
    assert "frame 3" in capsys.readouterr().out
    page = (folder / "report.html").read_text()
    assert page.count("data:image/") == 3 and "http" not in page and "frame 3" in page


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("score {f}/good0.mp4", "--checkpoint"),
        ("score {f}/good0.mp4 {model} --out {f}/x.jsonl", "jidm fit-scales"),
        ("score {f}/nothing {model} --scales {f}/scales.json", "nothing"),
        ("score {f}/good0.mp4 {model} --scales {f}/q0.json --out {f}/x.jsonl", "no scales"),
        ("score {f}/good0.mp4 {model} --scales {f}/scales.json --shard 2/2 --out {f}/x.jsonl", "i/N"),
        ("fit-scales {f}/good0.mp4 {model} --out {f}/few.json", "at least 5 good videos"),
        ("rank {f}/absent.jsonl", "jidm score"),
        ("report {f}/short.mp4 {model} --scales {f}/scales.json", "2 frames"),
    ],
)
def test_errors_are_one_line_with_the_remedy(folder: Path, capsys: pytest.CaptureFixture[str], line: str, says: str):
    assert run(folder, line) == 1
    error = capsys.readouterr().err.strip()
    assert says in error and len(error.splitlines()) == 1
