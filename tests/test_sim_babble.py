"""Motor babbling as a data set: the same bytes however the work is shared or interrupted, and correct labels."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jidm.camera.model import Camera
from jidm.cli import main
from jidm.datasets import open_dataset, validate_dataset
from jidm.errors import DatasetError, InputError
from jidm.evaluation.held_out import HeldOut
from jidm.robot.registry import load_embodiment
from jidm.robot.urdf.writer import write_urdf
from jidm.sim.appearance import Appearance
from jidm.sim.babble import BabbleConfig, Recorder, babble
from jidm.sim.babble_motion import usable_range
from jidm.sim.scene import Scene

SMALL = BabbleConfig(embodiment="planar_finger_2", episodes=6, frames=5, width=32, height=32, seed=3)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file by its path. Data sets are the same if their trees are equal."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def recorded(config: BabbleConfig, index: int) -> dict[str, Any]:
    """Episode `index` from a recorder of its own."""
    with Recorder(config) as recorder:
        return recorder.episode(index)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("babble") / "plain"
    babble(SMALL, out)
    return out


# ---- sharing the work -------------------------------------------------------------------------------------------


def test_an_episode_is_a_function_of_configuration_and_number():
    with Recorder(SMALL) as recorder:
        in_order = [recorder.episode(k) for k in (4, 0, 2)]
    alone = recorded(SMALL, 2)
    for key in ("state", "action"):
        assert (alone[key] == in_order[2][key]).all()
    for key in ("frames", "extras"):
        assert alone[key].keys() == in_order[2][key].keys()
        assert all((alone[key][name] == in_order[2][key][name]).all() for name in alone[key])
    assert not (alone["frames"]["front"] == in_order[0]["frames"]["front"]).all()
    other = recorded(replace(SMALL, seed=4), 2)
    assert not np.allclose(other["state"], alone["state"])
    # More episodes do not change the first ones.
    assert (recorded(replace(SMALL, episodes=60), 2)["state"] == alone["state"]).all()


def test_shards_in_any_order_write_the_same(plain: Path, tmp_path: Path):
    for i in (2, 0, 1):
        assert not (tmp_path / "meta" / "info.json").exists()
        babble(SMALL, tmp_path, shard=(i, 3))
    assert tree(tmp_path) == tree(plain)
    babble(SMALL, tmp_path)  # all episodes are there: nothing changes
    assert tree(tmp_path) == tree(plain)


def test_workers_write_the_same(plain: Path, tmp_path: Path):
    babble(SMALL, tmp_path, workers=2)
    assert tree(tmp_path) == tree(plain)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'jidm[ray]'")
def test_ray_writes_the_same(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = str(Path(__file__).resolve().parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    babble(SMALL, tmp_path, workers=2, ray="local")
    assert tree(tmp_path) == tree(plain)


# ---- interruptions ----------------------------------------------------------------------------------------------


def kill_repeatedly(out: Path, times: int, config: BabbleConfig) -> int:
    """Start recording and kill it at a random moment, `times` times; the number of kills that hit a running process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jidm.sim.babble"])
    rng, finished, hits = np.random.default_rng(0), set(), 0
    for _ in range(times):
        process = context.Process(target=babble, args=(config, out))
        process.start()
        time.sleep(float(rng.uniform(0.3, 1.5)))
        hits += process.is_alive()
        process.kill()  # no effect if it has ended by itself
        process.join()
        whole = {p.name for p in (out / "data").rglob("*.parquet")} if (out / "data").is_dir() else set()
        assert whole >= finished  # no finished episode is lost
        finished = whole
        for table in (out / "data").rglob("*.parquet") if whole else ():
            video = out / "videos" / "observation.images.front" / "chunk-000" / table.with_suffix(".mp4").name
            assert video.stat().st_size > 0  # a finished episode is complete
    return hits


def test_kills_leave_complete_episodes_and_recording_resumes(tmp_path: Path):
    config = replace(SMALL, episodes=20)
    assert kill_repeatedly(tmp_path / "killed", 3, config) >= 1
    babble(config, tmp_path / "killed")
    babble(config, tmp_path / "whole")
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")
    assert validate_dataset(tmp_path / "killed") == []


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found in /proc, which is not there")
def test_workers_end_with_their_parent(tmp_path: Path):
    parent = multiprocessing.get_context("spawn").Process(
        target=babble, args=(replace(SMALL, episodes=100_000), tmp_path), kwargs={"workers": 2}
    )
    parent.start()
    try:
        until(lambda: any((tmp_path / "data").rglob("*.parquet")))
        workers = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    finally:
        parent.kill()
        parent.join()
    assert len(workers) >= 2
    until(lambda: not any(runs(worker) for worker in workers))


def runs(process: str) -> bool:
    """Whether there is such a process that is no zombie."""
    try:
        return ") Z " not in Path("/proc", process, "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(true: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"nothing after {seconds} s"
        time.sleep(0.1)


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path):
    config = replace(SMALL, episodes=200)  # more than fast machines finish between the kills
    assert kill_repeatedly(tmp_path / "killed", 20, config) >= 10
    babble(config, tmp_path / "killed")
    babble(config, tmp_path / "whole")
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def test_another_configuration_in_the_same_folder_is_rejected(plain: Path):
    with pytest.raises(DatasetError):
        babble(replace(SMALL, seed=9), plain)


# ---- labels -----------------------------------------------------------------------------------------------------


def test_the_data_set_reads_back(plain: Path):
    assert validate_dataset(plain) == []
    data = open_dataset(plain)
    robot = load_embodiment(SMALL.embodiment)
    assert len(data) == SMALL.episodes and data.joint_names == robot.joint_names and data.fps == SMALL.fps
    recipe = data.recipe
    assert recipe["embodiment_hash"] == robot.content_hash and recipe["action"] == "delta_q"
    assert recipe["seed"] == SMALL.seed and recipe["embodiment"] == robot.name
    assert Camera.from_dict(recipe["cameras"]["front"]).width == SMALL.width
    with Recorder(SMALL) as recorder:
        all_made = [recorder.episode(k) for k in range(SMALL.episodes)]
    for episode in data:
        made = all_made[episode.index]
        assert (episode.state == made["state"]).all() and (episode.action == made["action"]).all()
        assert np.allclose(episode.action[:-1], np.diff(episode.state, axis=0)) and (episode.action[-1] == 0).all()
        for key, values in made["extras"].items():
            assert (episode.column(key) == values).all()
        # The video is compressed lossily, the rest is not.
        assert np.abs(episode.video().astype(int) - made["frames"]["front"]).mean() < 8


def test_the_path_of_a_robot_file_does_not_leave_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    urdf = tmp_path / "private" / "finger.urdf"
    urdf.parent.mkdir()
    write_urdf(load_embodiment(SMALL.embodiment).model, urdf)
    config = replace(SMALL, embodiment=str(urdf), mesh_roots=(str(urdf.parent),), episodes=1)
    babble(config, tmp_path / "data")
    assert "private" not in (tmp_path / "data/meta/info.json").read_text()
    data = open_dataset(tmp_path / "data")
    with pytest.raises(DatasetError, match=r"not found here.*finger\.urdf.*--embodiment"):
        HeldOut(data)
    assert HeldOut(data, embodiment=load_embodiment(urdf)).embodiment == load_embodiment(urdf)
    with pytest.raises(DatasetError, match=r"'planar_finger_5' known here.*--embodiment"):
        HeldOut(data, embodiment=load_embodiment("planar_finger_5"))
    monkeypatch.chdir(urdf.parent)
    assert HeldOut(data).embodiment == load_embodiment(urdf)


def test_depth_links_and_camera_agree_with_an_exact_rendering():
    """Rendered again at the recorded pose with the recorded camera, sampled at the centers of the grid's cells."""
    config = replace(SMALL, width=96, height=96, max_objects=0, appearance="plain", frames=3)
    robot = load_embodiment(config.embodiment)
    with Scene(robot, supersample=1) as scene:
        for index in range(3):
            made = recorded(config, index)
            for t in range(config.frames):
                fx, fy, cx, cy, *T = made["extras"]["observation.camera.front"][t]
                K = torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64)
                pose = torch.eye(4, dtype=torch.float64)
                pose[:3] = torch.tensor(T).reshape(3, 4)
                camera = Camera(K=K, width=96, height=96, T_camera_base=pose)
                exact = scene.render(made["state"][t], camera.resized(24, 24))
                link = made["extras"]["observation.links.front"][t]
                depth = made["extras"]["observation.depth.front"][t]
                assert exact.on_robot.sum() > 10
                silhouette = sum((np.diff(exact.link, axis=k) != 0).sum() for k in (0, 1))
                assert (link != exact.link).sum() < 0.25 * silhouette
                same = (link == exact.link) & (link >= 0)
                assert np.median(np.abs(depth - exact.depth)[same]) < 2e-3 and (depth[link < 0] == 0).all()


def test_objects_in_front_hide_the_robot():
    """The same motion with and without objects: links differ only where an object covers the robot."""
    full, empty = (
        replace(SMALL, width=96, height=96, max_objects=30, frames=2),
        replace(SMALL, width=96, height=96, frames=2),
    )
    covered = 0
    with Recorder(full) as crowded, Recorder(replace(empty, max_objects=0)) as alone:
        for index in range(8):
            a, b = (s.episode(index)["extras"]["observation.links.front"] for s in (crowded, alone))
            differs = a != b
            assert (a[differs] == -1).all() and (b[differs] >= 0).all()
            covered += int(differs.sum())
    assert covered > 5


def test_episodes_vary_in_everything():
    config = replace(SMALL, frames=2, episodes=16)
    made, seeds = [], set()
    with Recorder(config) as recorder:
        for k in range(16):
            made.append(recorder.episode(k))
            seeds.add(recorder.scene.seed)
    assert len(seeds) == 16  # of textures and backgrounds
    rows = np.stack([m["extras"]["observation.camera.front"][0] for m in made])
    assert (rows[:, [0, 1, 7, 11, 15]].std(axis=0) > 0).all()  # focal lengths and positions
    corners = np.stack([m["frames"]["front"][0, 0, 0] for m in made]).astype(int)
    assert len({tuple(c // 16) for c in corners}) > 8
    starts = np.stack([m["state"][0] for m in made])
    low, high = usable_range(recorder.embodiment)
    assert (starts.std(axis=0) > 0.15 * (high - low)).all()


def test_a_plain_appearance_has_no_objects():
    with Recorder(replace(SMALL, appearance="plain")) as recorder:
        recorder.episode(0)
        assert recorder.scene.appearance == Appearance.plain() and recorder.scene.objects == ()


# ---- invalid input and the command line -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"frames": 1}, "frames >= 2"),
        ({"fps": 0.0}, "fps > 0"),
        ({"width": 30}, "multiples of 4"),
        ({"appearance": "pretty"}, "unknown appearance 'pretty'"),
        ({"cameras": ()}, "needs a camera"),
        ({"max_objects": -1}, "max_objects >= 0"),
        ({"range_fraction": 1.2}, "range_fraction in"),
    ],
)
def test_invalid_configurations_are_rejected(wrong: dict, words: str):
    with pytest.raises(InputError, match=words):
        replace(SMALL, **wrong)


@pytest.mark.parametrize("sharing", [{"shard": (3, 3)}, {"shard": (-1, 2)}, {"workers": 0}])
def test_invalid_shards_are_rejected(sharing: dict, tmp_path: Path):
    with pytest.raises(InputError, match=r"shard must be i/N"):
        babble(SMALL, tmp_path, **sharing)


def test_the_command_line_records(tmp_path: Path, plain: Path, capsys: pytest.CaptureFixture[str]):
    line = ["--episodes", "6", "--frames", "5", "--width", "32", "--height", "32", "--seed", "3"]
    out = tmp_path / "out"
    assert main(["babble", "planar_finger_2", "--out", str(out), *line]) == 0
    assert tree(out) == tree(plain)
    assert main(["babble", "planar_finger_2", "--out", str(out), *line, "--shard", "4/2"]) == 1
    assert "--shard must be i/N" in capsys.readouterr().err
    assert main(["babble", "planar_fnger_2", "--out", str(out)]) == 1
    assert "planar_finger_2" in capsys.readouterr().err
