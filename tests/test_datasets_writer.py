"""Writing data sets: against plain pyarrow and PyAV, atomic episodes, deterministic bytes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from lerobot_files import bar_width, make_episode, measured_bar_width, read_reference

from jidm.datasets import DatasetWriter, Feature, open_dataset, validate_dataset
from jidm.datasets.staging import StagingFolder
from jidm.errors import DatasetError

TOP, DEPTH, LINKS, POSE = (
    "observation.images.top",
    "observation.depth.top",
    "observation.links.top",
    "observation.camera.top",
)
EXTRAS = {DEPTH: Feature("float32", (12, 16)), LINKS: Feature("int16", (12, 16)), POSE: Feature("float64", (16,))}
RECIPE = {"embodiment": "toy", "seed": 7, "cameras": {"top": {"width": 64}}}


def writer(root: Path, **changes: Any) -> DatasetWriter:
    options: dict[str, Any] = {
        "fps": 16, "joint_names": ["a", "b", "c"], "action_names": ["u", "v"], "cameras": {"top": (64, 48)},
        "robot_type": "toy", "extras": EXTRAS, "recipe": RECIPE,
    }  # fmt: skip
    return DatasetWriter(root, **{**options, **changes})


def length_of(index: int) -> int:
    return 5 + 3 * (index % 3)


def arrays(index: int, length: int | None = None) -> dict[str, Any]:
    """Arguments of `write_episode`, a function of the index only."""
    length = length or length_of(index)
    episode, rng = make_episode(index, length), np.random.default_rng(index)
    extras = {
        DEPTH: rng.random((length, 12, 16), dtype=np.float32),
        LINKS: rng.integers(-1, 5, (length, 12, 16)).astype(np.int16),
        POSE: rng.normal(size=(length, 16)),
    }
    return {
        "frames": {"top": episode.frames}, "state": episode.state, "action": episode.action, "extras": extras,
        "task": episode.task,
    }  # fmt: skip


def write(root: Path, indices: list[int], **changes: Any) -> Path:
    to = writer(root, **changes)
    for index in indices:
        to.write_episode(index, **arrays(index))
    to.finalize()
    return root


def digest(root: Path) -> dict[str, str]:
    """Every file's path and SHA-256, hidden ones too."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module", params=["v3.0", "v2.1"])
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, version: str) -> Path:
    return write(tmp_path_factory.mktemp(version), [0, 1, 2, 3], version=version)


# ---- content of the files --------------------------------------------------------------------------------------------


def test_an_independent_reader_agrees(written: Path) -> None:
    found = read_reference(written)
    assert sorted(found) == [0, 1, 2, 3]
    first = 0
    for index, episode in found.items():
        expected, rows = arrays(index), episode["rows"]
        length = length_of(index)
        assert len(rows) == episode["row"]["length"] == length and episode["row"]["tasks"] == [expected["task"]]
        np.testing.assert_array_equal([r["observation.state"] for r in rows], expected["state"])
        np.testing.assert_array_equal([r["action"] for r in rows], expected["action"])
        for key in EXTRAS:
            np.testing.assert_array_equal(
                np.array([r[key] for r in rows], expected["extras"][key].dtype), expected["extras"][key]
            )
        np.testing.assert_allclose([r["timestamp"] for r in rows], np.arange(length) / 16, atol=1e-6)
        assert [r["frame_index"] for r in rows] == list(range(length))
        assert [r["index"] for r in rows] == list(range(first, first + length))
        frames = episode["frames"][TOP]
        assert np.abs(frames.astype(int) - expected["frames"]["top"]).mean() < 4
        assert all(abs(measured_bar_width(frame) - bar_width(t)) <= 1 for t, frame in enumerate(frames))
        first += length


def test_our_reader_agrees(written: Path) -> None:
    dataset = open_dataset(written)
    assert (dataset.joint_names, dataset.cameras, dataset.robot_type) == (("a", "b", "c"), ("top",), "toy")
    assert dataset.recipe == RECIPE and dataset.fps == 16.0
    for episode, (index, other) in zip(dataset, read_reference(written).items()):
        expected = arrays(index)
        np.testing.assert_array_equal(episode.state, expected["state"])
        for key in EXTRAS:
            np.testing.assert_array_equal(episode.column(key), expected["extras"][key])
            assert episode.column(key).dtype == expected["extras"][key].dtype
        np.testing.assert_array_equal(episode.video("top"), other["frames"][TOP])
    assert validate_dataset(written, decode=True) == []


def test_info_and_statistics_are_those_of_the_arrays(written: Path, version: str) -> None:
    info = json.loads((written / "meta" / "info.json").read_text())
    states = np.concatenate([arrays(index)["state"] for index in range(4)])
    assert (info["codebase_version"], info["fps"], info["total_episodes"]) == (version, 16, 4)
    assert (info["total_frames"], info["total_tasks"], info["splits"]) == (len(states), 2, {"train": "0:4"})
    assert info["features"][DEPTH] == {"dtype": "float32", "shape": [12, 16], "names": None}
    assert info["features"][TOP]["shape"] == [48, 64, 3] and info["jidm"] == RECIPE
    if version == "v3.0":
        stats = json.loads((written / "meta" / "stats.json").read_text())
        listed = pq.read_table(written / "meta" / "episodes" / "chunk-000" / "file-000.parquet").to_pylist()
        np.testing.assert_allclose(listed[2]["stats/index/min"], listed[2]["dataset_from_index"])
        np.testing.assert_allclose(listed[1]["stats/observation.state/std"], arrays(1)["state"].std(0))
    else:
        lines = [json.loads(line) for line in (written / "meta" / "episodes_stats.jsonl").read_text().splitlines()]
        np.testing.assert_allclose(lines[1]["stats"]["observation.state"]["mean"], arrays(1)["state"].mean(0))
        return
    for name in ("min", "max", "mean", "std"):
        np.testing.assert_allclose(stats["observation.state"][name], getattr(np, name)(states, axis=0), rtol=1e-9)
    assert stats["observation.state"]["count"] == [len(states)]
    images = np.concatenate([arrays(index)["frames"]["top"] for index in range(4)]) / 255
    np.testing.assert_allclose(np.ravel(stats[TOP]["mean"]), images.mean((0, 1, 2)), rtol=1e-9)
    assert np.shape(stats[TOP]["std"]) == (3, 1, 1)


def test_image_statistics_equal_those_of_the_pixels() -> None:
    """Computed from histograms, without a float64 copy of the images: 100 of VGA size would be 0.7 GB."""
    from jidm.datasets.stats import image_stats

    rng = np.random.default_rng(0)
    images = rng.integers((3, 0, 40), (200, 256, 41), (150, 10, 12, 3), dtype=np.uint8)
    seen = images[np.unique(np.linspace(0, 149, 100).round().astype(int))] / 255
    found = image_stats(images)
    assert found["count"] == [100]
    for name in ("min", "max", "mean", "std"):
        expected = getattr(np, name)(seen, axis=(0, 1, 2)).reshape(3, 1, 1)
        np.testing.assert_allclose(found[name], expected, rtol=1e-12, atol=1e-12)
    large = np.zeros((100, 240, 320, 3), np.uint8)
    tracemalloc.start()
    image_stats(large)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * large.nbytes


def test_the_task_is_the_index_in_pandas(tmp_path: Path) -> None:
    """LeRobot uses `tasks.iloc[k].name` and `task in tasks.index`."""
    write(tmp_path, [0, 1])
    table = pq.read_table(tmp_path / "meta" / "tasks.parquet")
    note = json.loads(table.schema.metadata[b"pandas"])
    assert note["index_columns"] == ["task"] and {c["name"] for c in note["columns"]} == {"task", "task_index"}
    assert table.to_pylist() == [{"task_index": 0, "task": "task 0"}, {"task_index": 1, "task": "task 1"}]
    pandas = pytest.importorskip("pandas", reason="only to see what pandas makes of the note")
    frame = pandas.read_parquet(tmp_path / "meta" / "tasks.parquet")
    assert list(frame.index) == ["task 0", "task 1"] and frame.iloc[1].name == "task 1"


def test_video_times_are_exact_at_odd_rates(tmp_path: Path) -> None:
    for fps in (16, 29.97, 12.5, 7):
        to = DatasetWriter(
            tmp_path / str(fps), fps=fps, joint_names=["a", "b", "c"], action_names=[], cameras={"top": (64, 48)}
        )
        to.write_episode(0, {"top": make_episode(0, 40).frames}, make_episode(0, 40).state)
        to.finalize()
        read_reference(tmp_path / str(fps))  # asserts LeRobot's tolerance
        assert validate_dataset(tmp_path / str(fps)) == []
        assert open_dataset(tmp_path / str(fps)).episode(0).action is None


# ---- the same bytes --------------------------------------------------------------------------------------------------


def test_video_encoding_is_deterministic(tmp_path: Path) -> None:
    """Many runs with different memory contents: x264's defaults give different bytes in one of 5 to 100 runs."""
    from jidm.datasets.video_file import encode

    chance, frames = random.Random(0), make_episode(0, 5).frames
    held: list[np.ndarray] = []
    seen: set[bytes] = set()
    for _ in range(400):
        held.append(np.full(chance.randrange(1, 400_000), chance.randrange(256), np.uint8))
        held = held[-chance.randrange(1, 20) :]
        encode(tmp_path / "video.mp4", frames, 16)
        seen.add((tmp_path / "video.mp4").read_bytes())
    assert len(seen) == 1


def test_bytes_do_not_depend_on_order_repetition_or_early_finalize(tmp_path: Path, written: Path, version: str) -> None:
    to = writer(tmp_path, version=version)
    for index in (3, 1, 0, 2):
        to.write_episode(index, **arrays(index))
        to.write_episode(index, **arrays(index + 1, 4))  # it exists: no effect
        to.finalize()
    writer(tmp_path, version=version).finalize()
    assert digest(tmp_path) == digest(written)


def test_concurrent_workers_write_the_same_bytes_as_one(tmp_path: Path) -> None:
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_datasets_writer import arrays, writer
to = writer(Path(sys.argv[1]))
for index in (2, 0, 1, 3): to.write_episode(index, **arrays(index))
"""
    together = tmp_path / "together"
    # Both write all four episodes, so that they compete for every file.
    workers = [subprocess.Popen([sys.executable, "-c", script, str(together)], env=environment()) for _ in range(2)]
    assert [worker.wait(timeout=60) for worker in workers] == [0, 0]
    writer(together).finalize()
    assert digest(together) == digest(write(tmp_path / "alone", [0, 1, 2, 3]))


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}


def test_gaps_are_kept(tmp_path: Path) -> None:
    write(tmp_path, [4, 1001])
    assert open_dataset(tmp_path).episode_indices == (4, 1001)
    assert (tmp_path / "data" / "chunk-001" / "file-001.parquet").is_file()
    assert open_dataset(tmp_path).episode(1001).column("index")[0] == length_of(4)
    assert [p.is_note for p in validate_dataset(tmp_path)] == [True]


def test_an_empty_data_set(tmp_path: Path) -> None:
    write(tmp_path, [])
    assert len(open_dataset(tmp_path)) == 0
    assert [p.message for p in validate_dataset(tmp_path)] == ["holds no episode"]


# ---- killed at any moment --------------------------------------------------------------------------------------------

_LOOP = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import av, pyarrow.parquet  # before "ready", so that kills happen while something is written, not during imports
from test_datasets_writer import arrays, writer
to = writer(Path(sys.argv[1]))
done = to.completed_episodes()
print("ready", flush=True)
for index in range(int(sys.argv[2])):
    if index not in done:
        to.write_episode(index, **arrays(index))
        print(index, flush=True)
    if index % 5 == 4: to.finalize()
to.finalize()
"""


def stopped(process: subprocess.Popen[bytes]) -> bool:
    """Stop a child where it is; false if it has ended."""
    process.send_signal(signal.SIGSTOP)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        process.returncode = os.waitstatus_to_exitcode(status)
    return os.WIFSTOPPED(status)


def kill_and_resume(root: Path, kills: int, episodes: int, pace: float) -> int:
    """Kill a writer repeatedly; after each kill every episode on disk must be complete.

    Args:
        pace: about how long an episode takes to write [s].

    Returns:
        Number of kills that left partial files behind.
    """
    chance, struck = random.Random(kills), 0
    command = [sys.executable, "-c", _LOOP, str(root), str(episodes)]
    for kill in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment())
        assert process.stdout is not None
        for _ in range(1 + chance.randrange(2)):  # "ready", and perhaps one more episode
            process.stdout.readline()
        if kill % 2:
            time.sleep(chance.uniform(0.0, 1.5 * pace))
        else:  # certainly while something is written, at any speed of the machine: it is looked at while stopped
            while stopped(process) and not any((root / ".writing").glob("*")):
                process.send_signal(signal.SIGCONT)
                time.sleep(chance.uniform(0.0, 0.3 * pace))
        process.kill()
        process.stdout.close()
        code = process.wait()
        struck += any((root / ".writing").glob("*"))
        assert_all_complete(root)
        if code == 0:  # a busy machine let it finish before it was killed
            break
        assert code == -signal.SIGKILL
    subprocess.run(command, check=True, env=environment(), stdout=subprocess.DEVNULL)
    return struck


def assert_all_complete(root: Path) -> None:
    """Every episode with a table is complete; checked without our reader, which relies on meta/."""
    for table in root.glob("data/chunk-*/file-*.parquet"):
        index = int(pq.read_table(table).column("episode_index")[0].as_py())
        assert pq.read_table(table).num_rows == length_of(index)
        video = root / "videos" / TOP / table.parent.name / f"{table.stem}.mp4"
        import av

        with av.open(str(video)) as container:
            assert sum(1 for _ in container.decode(video=0)) == length_of(index)
    if (root / "meta" / "info.json").is_file():
        # Between two files of meta/ the totals may be outdated; an episode is never broken.
        assert [
            str(p) for p in validate_dataset(root) if p.episode is not None or "info.json says" not in p.message
        ] == []


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_writer_leaves_complete_episodes_and_resumes(tmp_path: Path, kills: int) -> None:
    episodes = 4 * kills
    write(tmp_path / "warm", [0])
    start = time.perf_counter()
    straight = write(tmp_path / "straight", list(range(episodes)))
    struck = kill_and_resume(tmp_path / "killed", kills, episodes, (time.perf_counter() - start) / episodes)
    assert digest(tmp_path / "killed") == digest(straight)
    assert struck >= max(1, kills // 4), f"only {struck} of {kills} kills came while something was being written"


@pytest.mark.parametrize("at", range(6))
def test_death_before_any_file_appears_leaves_the_episode_absent(
    tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same law deterministically: the process dies before its k-th encoding, table or rename."""
    import jidm.datasets.writer as module

    steps: list[str] = []

    def dying(name: str) -> Callable[..., Any]:
        real = getattr(module, name)

        def step(*args: Any, **kwargs: Any) -> Any:
            steps.append(name)
            if len(steps) == at + 1:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return step

    to = writer(tmp_path, cameras={"top": (64, 48), "side": (64, 48)}, extras={})
    given = {**arrays(0), "extras": {}}
    given["frames"] = {"top": given["frames"]["top"], "side": given["frames"]["top"]}
    with monkeypatch.context() as patch:
        for name in ("encode", "write_table", "move"):
            patch.setattr(module, name, dying(name))
        with pytest.raises(KeyboardInterrupt):
            to.write_episode(0, **given)
    assert steps == ["encode", "encode", "write_table", "move", "move", "move"][: at + 1]
    assert to.completed_episodes() == set()
    to.write_episode(0, **given)
    assert to.completed_episodes() == {0}


def test_files_appear_atomically(tmp_path: Path) -> None:
    """By renaming, which keeps the inode; a copy could be read when incomplete."""
    stage, target = StagingFolder(tmp_path), tmp_path / "data" / "file.txt"
    target.parent.mkdir()
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), stage.atomic_file(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old" and not any((tmp_path / ".writing").iterdir())
    with stage.atomic_file(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
        same = temporary.stat().st_ino
    assert target.read_text() == "new" and target.stat().st_ino == same


def test_folders_of_dead_processes_are_removed_and_of_running_ones_kept(tmp_path: Path) -> None:
    write(tmp_path, [0])
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    gone = ["episode-000000--elsewhere--1--a", f"episode-000007--{host}--{dead.pid}--a", f"file--{host}--{dead.pid}--a"]
    kept = ["episode-000007--elsewhere--1--a", f"file--{host}--{os.getpid()}--a"]
    for name in gone + kept:
        (tmp_path / ".writing" / name).mkdir(parents=True)
        (tmp_path / ".writing" / name / "table.parquet").write_bytes(b"half")
    assert writer(tmp_path).completed_episodes() == {0} and len(open_dataset(tmp_path)) == 1
    writer(tmp_path).finalize()
    assert {path.name for path in (tmp_path / ".writing").iterdir()} == set(kept)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"state": np.zeros((5, 4))}, r"observation.state is float64 \(5, 4\), must be float64 \(5, 3\)"),
        ({"state": np.full((5, 3), np.nan)}, r"observation.state of 'a' is nan in frame 0 \(5 such frames\)"),
        ({"state": np.zeros((0, 3))}, "has no frames"),
        ({"action": None}, r"columns \['action'\] are missing or unknown"),
        ({"action": np.zeros((4, 2))}, r"action is float64 \(4, 2\)"),
        ({"extras": {}}, "observation.depth.top"),
        ({"time": np.arange(5) / 15}, "times are not k / 16 s"),
        ({"time": np.full(5, np.nan)}, "times are not k / 16 s"),
        ({"frames": {}}, r"images of \[\], must be of \['top'\]"),
        ({"frames": {"top": np.zeros((4, 48, 64, 3), np.uint8)}}, r"\(4, 48, 64, 3\), must be uint8 \(5, 48, 64, 3\)"),
        ({"frames": {"top": np.zeros((5, 48, 64, 3), np.float32)}}, "'top' are float32"),
    ],
)
def test_invalid_arrays_are_refused_and_leave_no_files(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    to = writer(tmp_path)
    with pytest.raises(DatasetError, match=complaint) as error:
        to.write_episode(0, **{**arrays(0), **change})
    assert str(error.value).startswith("episode 0: ") and digest(tmp_path) == {}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"version": "v2.0"}, "'v2.0' are not written; choose v3.0 or v2.1"),
        ({"cameras": {"top": (63, 48)}}, "'top' is 63x48; video needs even sizes"),
        ({"joint_names": ["a", "a"]}, "joint names must be distinct"),
        ({"joint_names": []}, "there are none"),
        ({"fps": 0}, "fps=0"),
        ({"extras": {"action": Feature("int64", (1,))}}, "extra feature 'action'"),
        ({"recipe": {"when": {1, 2}}}, "the recipe cannot be stored as JSON"),
        ({"recipe": {"share": float("nan")}}, "the recipe cannot be stored as JSON"),
        ({"extras": {"a/b": Feature("int64", (1,))}}, "extra feature 'a/b'"),
    ],
)
def test_invalid_schemas_are_refused(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DatasetError, match=complaint):
        writer(tmp_path, **change)


@pytest.mark.parametrize("change", [{"fps": 15}, {"recipe": {"seed": 8}}, {"joint_names": ["a", "b", "d"]}])
def test_a_folder_has_one_schema(tmp_path: Path, change: dict[str, Any]) -> None:
    write(tmp_path, [0])
    other = writer(tmp_path, **change)
    for call in (other.completed_episodes, other.finalize):
        with pytest.raises(DatasetError, match="was not written with these features"):
            call()
