"""Labeled data sets, read back by an independent reader, hold the decoded motion."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lerobot_files import CAMERA, encode, make_episode, make_v2, make_v30, read_reference

from jidm import JacobianIDM, load_embodiment, write_video
from jidm.control.action_labeling import (
    COVARIANCE,
    SOURCE_INDEX,
    VALID,
    LabelOptions,
    average_windows,
    label_dataset,
    label_video,
    windows,
)
from jidm.datasets import DatasetWriter, Feature, open_dataset, validate_dataset
from jidm.datasets.metadata import read_tasks
from jidm.errors import DatasetError, InputError

ROBOT = load_embodiment("planar_finger_5")
FPS = 10.0
DEPTH = "observation.images.depth"


@cache
def idm() -> JacobianIDM:
    return JacobianIDM.from_pretrained("finger-5")


def make_video(seed: int, length: int = 7) -> np.ndarray:
    return make_episode(seed, length, height=64, width=64).frames


def read_columns(root: Path) -> dict[int, dict[str, np.ndarray]]:
    """Episode -> column -> values, from the independent reader."""
    found = read_reference(root)
    return {
        k: {key: np.array([row[key] for row in episode["rows"]]) for key in episode["rows"][0]}
        for k, episode in found.items()
    }


def unlabeled_dataset(root: Path, episodes: int = 3, names: Sequence[str] = ROBOT.joint_names) -> Path:
    """A data set with states and one more column, but no actions."""
    writer = DatasetWriter(
        root,
        fps=FPS,
        joint_names=names,
        cameras={"top": (64, 64)},
        action_names=(),
        extras={"force": Feature("float32", (2,))},
    )
    for k in range(episodes):
        frames = make_video(k)
        state = ROBOT.home + 0.05 * np.random.default_rng(k).normal(size=(len(frames), ROBOT.n))
        more = {"force": np.full((len(frames), 2), k, np.float32)}
        writer.write_episode(k, {"top": frames}, state, extras=more, task=f"task {k % 2}")
    writer.finalize()
    return root


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_an_independent_reader_finds_the_decoded_motion(tmp_path: Path, version: str) -> None:
    source = unlabeled_dataset(tmp_path / "source")
    result = label_dataset(source, idm(), tmp_path / "out", version=version, modality=True)
    assert result.written == 3 and not result.problems
    found, before = read_columns(tmp_path / "out"), read_columns(source)
    assert sorted(found) == [0, 1, 2]
    for k, episode in found.items():
        recording = open_dataset(source).episode(k)
        motion = idm().decode(recording.video("top"), q0=recording.state[0], fps=FPS, smooth=True)
        ahead = torch.cat([motion.position[1:], motion.position[-1:]])
        np.testing.assert_allclose(episode["action"], ahead, atol=1e-12)
        np.testing.assert_allclose(episode[COVARIANCE][:-1], motion.covariance, rtol=1e-6)
        assert episode[VALID].tolist() == [*motion.valid.tolist(), False]
        for key in ("observation.state", "force"):
            np.testing.assert_array_equal(episode[key], before[k][key])
    modality = json.loads((tmp_path / "out" / "meta" / "modality.json").read_text())
    assert modality["action"] == {"joints": {"start": 0, "end": 5}}
    assert modality["video"] == {"top": {"original_key": "observation.images.top"}}
    info = json.loads((tmp_path / "out" / "meta" / "info.json").read_text())
    assert info["features"]["action"]["names"] == list(ROBOT.joint_names)
    assert info["jidm"]["labeled_by"]["content_hash"] == idm().checkpoint["content_hash"]


@pytest.mark.parametrize("space", ["joint_position", "joint_velocity", "joint_delta"])
def test_actions_are_in_the_requested_space(space: str) -> None:
    video = make_video(4)
    motion = idm().decode(video, fps=FPS, layout="THWC")
    got = label_video(idm(), video, FPS, options=LabelOptions(action_space=space, smooth=False))
    expected = {"joint_position": motion.position[1:], "joint_velocity": motion.velocity, "joint_delta": motion.delta_q}
    np.testing.assert_allclose(got.action[:-1], expected[space], atol=1e-6)
    np.testing.assert_array_equal(
        got.action[-1], motion.position[-1] if space == "joint_position" else 0 * got.action[-1]
    )


RICH_FEATURES = {
    "language_instruction": {"dtype": "string", "shape": [1], "names": None},
    "next.done": {"dtype": "bool", "shape": [1], "names": None},
    "subtask_index": {"dtype": "int64", "shape": [1], "names": None},
    "force": {"dtype": "float32", "shape": [3], "names": ["x", "y", "z"]},
    "grid": {"dtype": "int16", "shape": [2, 3], "names": None},
    "observation.images.wrist": {"dtype": "image", "shape": [8, 8, 3], "names": ["height", "width", "channels"]},
    "observation.images.depth": {
        "dtype": "video", "shape": [64, 64, 3], "names": ["height", "width", "channels"], "info": {"video.is_depth_map": True},
    },
}  # fmt: skip


def rich_dataset(root: Path, version: str, episodes: int = 3, length: int = 6) -> Path:
    """Two tasks per episode, text, flags, a sensor with a missing value, a grid, stored images, a depth video, subtasks."""
    made = {k: make_episode(k, length, height=64, width=64) for k in range(episodes)}
    for k, episode in made.items():
        episode.state = np.tile(ROBOT.home, (length, 1)) + 0.01 * k
        force = np.random.default_rng(k).normal(size=(length, 3)).astype(np.float32)
        force[2] = np.nan
        picture = io.BytesIO()
        PIL.Image.fromarray(np.full((8, 8, 3), 40 * k, np.uint8)).save(picture, "PNG")
        episode.extras = {
            "language_instruction": np.array([f"say\u2028{t // 3}" for t in range(length)]),
            "next.done": np.arange(length) == length - 1,
            "subtask_index": np.arange(length) // 2,
            "force": force, "grid": np.zeros((length, 6), np.int16),
            "observation.images.wrist": np.array([{"bytes": picture.getvalue(), "path": None}] * length),
        }  # fmt: skip
    depth = np.concatenate([255 - episode.frames for episode in made.values()])
    if version == "v3.0":
        make_v30(root, made, per_file=episodes)
        # An encoder that starts each episode with a key frame, as files joined by LeRobot do.
        options = {"crf": "10", "g": str(length), "keyint_min": str(length), "bf": "0", "sc_threshold": "0"}
        for key, frames in ((CAMERA, np.concatenate([e.frames for e in made.values()])), (DEPTH, depth)):
            encode(root / "videos" / key / "chunk-000" / "file-000.mp4", frames, 30, options=options)
        listed = root / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
        table = pq.read_table(listed)
        for name in ("chunk_index", "file_index", "from_timestamp"):
            table = table.append_column(f"videos/{DEPTH}/{name}", table.column(f"videos/{CAMERA}/{name}"))
        pq.write_table(table.append_column("note", pa.array([f"note {k}" for k in range(episodes)])), listed)
    else:
        make_v2(root, made)
        for k in range(episodes):
            encode(
                root / "videos" / "chunk-000" / DEPTH / f"episode_{k:06d}.mp4", depth[k * length : (k + 1) * length], 30
            )
        listed = root / "meta" / "episodes.jsonl"
        lines = [
            json.loads(line) | {"note": f"note {k}"} for k, line in enumerate(listed.read_text().split("\n")[:episodes])
        ]
        listed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for path in (root / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        rows = np.arange(len(table)) % length
        place = table.schema.names.index("task_index")
        table = table.set_column(place, "task_index", pa.array(1 - rows // 3))
        grid = pa.array(np.zeros((len(table), 2, 3)).tolist(), pa.list_(pa.list_(pa.int16())))
        pq.write_table(table.set_column(table.schema.names.index("grid"), "grid", grid), path)
    pq.write_table(
        pa.table({"subtask_index": [0, 1, 2], "subtask": ["a", "b", "c"]}), root / "meta" / "subtasks.parquet"
    )
    info = root / "meta" / "info.json"
    facts = json.loads(info.read_text())
    facts["features"] |= RICH_FEATURES
    facts["features"]["observation.state"]["names"] = list(ROBOT.joint_names)
    facts["features"]["absent"] = {"dtype": "float32", "shape": [1], "names": None}
    info.write_text(json.dumps(facts))
    return root


def packets(path: Path) -> list[bytes]:
    """The coded images of a video."""
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def test_only_images_are_copied_in_the_place_of_images(tmp_path: Path) -> None:
    """A path in a downloaded table may name any file of this machine."""
    source, secret = rich_dataset(tmp_path / "source", "v2.1"), tmp_path / "secret.txt"
    secret.write_text("password")
    path = source / "data" / "chunk-000" / "episode_000001.parquet"
    table = pq.read_table(path)
    column = table.schema.names.index("observation.images.wrist")
    cells = pa.array(
        [{"bytes": None, "path": str(secret)}] * len(table), pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    pq.write_table(table.set_column(column, "observation.images.wrist", cells), path)
    result = label_dataset(source, idm(), tmp_path / "out", image_key="top", version="v2.1")
    assert result.written == 2 and "secret.txt" in result.problems["episode 1"]
    assert all(b"password" not in p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file())


@pytest.mark.parametrize("to", ["v3.0", "v2.1"])
@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_all_that_the_source_holds_is_kept(tmp_path: Path, version: str, to: str) -> None:
    source = rich_dataset(tmp_path / "source", version)
    lines: list[str] = []
    result = label_dataset(source, idm(), tmp_path / "out", image_key="top", version=to, progress=lines.append)
    assert result.written == 3 and not result.problems
    assert lines[0] == "not kept: 'absent', which a table lacks" and not any("anew" in line for line in lines)
    before, after = open_dataset(source), open_dataset(tmp_path / "out")
    assert set(before.features) - set(after.features) == {"absent"}
    for episode, labeled in zip(before, after, strict=True):
        for key in (
            "language_instruction",
            "next.done",
            "subtask_index",
            "force",
            "grid",
            "task_index",
            "observation.state",
        ):
            np.testing.assert_array_equal(labeled.column(key), episode.column(key))
        assert labeled.column("task_index").tolist() == [1, 1, 1, 0, 0, 0]
        assert labeled.metadata.tasks == episode.metadata.tasks and labeled.metadata.entries == {
            "note": f"note {episode.index}"
        }
        wrist = "observation.images.wrist"
        assert labeled.arrow_column(wrist).to_pylist() == episode.arrow_column(wrist).to_pylist()
        np.testing.assert_array_equal(labeled.video("top"), episode.video("top"))
    assert read_tasks(after.metadata) == read_tasks(before.metadata)
    assert (tmp_path / "out/meta/subtasks.parquet").read_bytes() == (source / "meta/subtasks.parquet").read_bytes()
    for key in (CAMERA, DEPTH):
        files = [sorted((root / "videos").rglob(f"*{key}*/**/*.mp4")) for root in (source, tmp_path / "out")]
        before_packets, after_packets = ([x for file in part for x in packets(file)] for part in files)
        assert after_packets == before_packets
        if version == "v2.1":
            assert [file.read_bytes() for file in files[1]] == [file.read_bytes() for file in files[0]]
    assert {p.message.split(" is nan")[0] for p in validate_dataset(tmp_path / "out", decode=True)} == {"force of 'x'"}


def test_a_video_that_cannot_be_cut_is_encoded_anew_and_depth_is_refused(tmp_path: Path) -> None:
    source = rich_dataset(tmp_path / "source", "v3.0")
    frames = np.concatenate([make_episode(k, 6, height=64, width=64).frames for k in range(3)])
    video = source / "videos" / CAMERA / "chunk-000" / "file-000.mp4"
    encode(video, frames, 30, options={"crf": "10", "g": "250", "bf": "0"})  # one key frame for all
    lines: list[str] = []
    result = label_dataset(source, idm(), tmp_path / "out", image_key="top", progress=lines.append)
    assert result.written == 3
    assert [line.partition("encoded anew: ")[2] for line in lines[1:]] == ["", CAMERA, CAMERA]
    for episode, labeled in zip(open_dataset(source), open_dataset(tmp_path / "out"), strict=True):
        assert np.abs(labeled.video("top").astype(int) - episode.video("top")).mean() < 2
    video.replace(source / "videos" / DEPTH / "chunk-000" / "file-000.mp4")
    encode(video, frames, 30, options={"crf": "10", "g": "6", "keyint_min": "6", "bf": "0", "sc_threshold": "0"})
    problems = label_dataset(source, idm(), tmp_path / "depth", image_key="top").problems
    assert (
        sorted(problems) == ["episode 1", "episode 2"]
        and "is depth, which encoding anew would change" in problems["episode 1"]
    )


def test_a_joint_position_that_is_not_a_number_is_named(tmp_path: Path) -> None:
    episode = make_episode(0, 6, height=64, width=64)
    episode.state[3, 1] = np.nan
    source = make_v30(tmp_path / "source", {0: episode, 1: make_episode(1, 6, height=64, width=64)})
    result = label_dataset(source, idm(), tmp_path / "out")
    assert result.written == 1
    assert result.problems["episode 0"].startswith("observation.state of 'b' is nan in frame 3 (1 such frames)")


def read_by_place(root: Path) -> list[int]:
    """Number in the source of each episode, found as LeRobot 0.6 finds it: by its place in the list of episodes."""
    info = json.loads((root / "meta/info.json").read_text())
    rows = [
        row for file in sorted((root / "meta/episodes").rglob("*.parquet")) for row in pq.read_table(file).to_pylist()
    ]
    table = pa.concat_tables(
        [pq.read_table(file, columns=["episode_index", "index", "timestamp", SOURCE_INDEX]) for file in sorted((root / "data").rglob("*.parquet"))]
    ).to_pylist()  # fmt: skip
    assert {row["episode_index"] for row in table} == set(range(info["total_episodes"])) and len(rows) == info[
        "total_episodes"
    ]
    found = []
    for place in range(info["total_episodes"]):
        episode = rows[place]
        frames = table[episode["dataset_from_index"] : episode["dataset_to_index"]]
        assert [row["index"] for row in frames] == list(
            range(episode["dataset_from_index"], episode["dataset_to_index"])
        )
        assert {row["episode_index"] for row in frames} == {place} and len(frames) == episode["length"]
        video = root / info["video_path"].format(
            video_key=CAMERA,
            chunk_index=episode[f"videos/{CAMERA}/chunk_index"],
            file_index=episode[f"videos/{CAMERA}/file_index"],
        )
        last = episode[f"videos/{CAMERA}/from_timestamp"] + frames[-1]["timestamp"]
        with av.open(str(video)) as container:
            assert min(abs(frame.time - last) for frame in container.decode(video=0)) < 0.5 / info["fps"]
        found.append(frames[0][SOURCE_INDEX])
    return found


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_episodes_are_numbered_without_gaps_whatever_could_not_be_read(tmp_path: Path, version: str) -> None:
    source, out = unlabeled_dataset(tmp_path / "source", episodes=5), tmp_path / "out"
    broken = source / "videos" / CAMERA / "chunk-000" / "file-001.mp4"
    whole = broken.read_bytes()
    broken.write_bytes(b"no video")

    def numbers() -> list[tuple[int, int]]:
        """(number, number in the source) by the independent reader, which checks files and images as well."""
        found = read_columns(out)
        assert all((episode["episode_index"] == k).all() for k, episode in found.items())
        rows = np.concatenate([episode["index"] for _, episode in sorted(found.items())])
        assert rows.tolist() == list(range(len(rows)))
        assert validate_dataset(out, decode=True) == []
        return [(k, int(episode[SOURCE_INDEX][0])) for k, episode in sorted(found.items())]

    assert sorted(label_dataset(source, idm(), out, version=version).problems) == ["episode 1"]
    assert numbers() == [(0, 0), (1, 2), (2, 3), (3, 4)]
    if version == "v3.0":
        assert [int(np.ravel(x)[0]) for x in read_by_place(out)] == [0, 2, 3, 4]
    if version == "v2.1":
        with pytest.raises(DatasetError, match="continue it without shards"):
            label_dataset(source, idm(), out, version=version, shard=(0, 2))
    broken.write_bytes(whole)  # the copy is repaired, and the run repeated
    assert label_dataset(source, idm(), out, version=version).written == 5
    assert numbers() == [(k, k) for k in range(5)]
    for k, episode in read_columns(out).items():
        np.testing.assert_array_equal(episode["force"], np.full((7, 2), k))


def test_shards_of_v21_leave_gaps_until_one_process_closes_them(tmp_path: Path) -> None:
    source, out = unlabeled_dataset(tmp_path / "source", episodes=4), tmp_path / "out"
    (source / "videos" / CAMERA / "chunk-000" / "file-000.mp4").write_bytes(b"no video")
    lines: list[str] = []
    for k in (0, 1):
        label_dataset(source, idm(), out, version="v2.1", shard=(k, 2), progress=lines.append)
    assert "run once more without shards" in lines[-1] and open_dataset(out).episode_indices == (1, 2, 3)
    label_dataset(source, idm(), out, version="v2.1")
    assert open_dataset(out).episode_indices == (0, 1, 2) and validate_dataset(out, decode=True) == []


def test_recorded_actions_are_replaced(tmp_path: Path) -> None:
    source = make_v30(tmp_path / "source", {k: make_episode(k, 6, height=64, width=64) for k in range(2)})
    label_dataset(source, idm(), tmp_path / "out", options=LabelOptions(action_space="joint_velocity"))
    for k, episode in read_columns(tmp_path / "out").items():
        assert episode["action"].shape == (6, 5) and (episode["action"][-1] == 0).all(), k


def test_a_folder_of_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idm(), "checkpoint", {"source": str(tmp_path / "mine"), "content_hash": "0"})
    (tmp_path / "videos").mkdir()
    for k in range(2):
        write_video(tmp_path / "videos" / f"{k}.mp4", make_video(k), FPS)
    write_video(tmp_path / "videos" / "2.mp4", make_video(2)[:, :32], FPS)
    (tmp_path / "videos" / "3.mp4").write_bytes(b"no video")
    write_video(tmp_path / "videos" / "4.mp4", make_video(4), 25.0)
    result = label_dataset(tmp_path / "videos", idm(), tmp_path / "out", q0=ROBOT.home)
    assert result.written == 2 and sorted(result.problems) == ["2.mp4", "3.mp4", "4.mp4"]
    assert "25 frames per second" in result.problems["4.mp4"]
    episode = read_columns(tmp_path / "out")[1]
    np.testing.assert_allclose(episode["observation.state"][0], ROBOT.home)
    np.testing.assert_allclose(episode["observation.state"][1:], episode["action"][:-1])
    info = json.loads((tmp_path / "out" / "meta" / "info.json").read_text())
    assert info["jidm"]["labeled_by"] == {"source": "mine", "content_hash": "0"}


@pytest.mark.parametrize(
    ("length", "window", "overlap"), [(20, 8, 0.5), (21, 8, 0.75), (5, 8, 0.5), (9, 8, 0.0), (10, 2, 0.9)]
)
def test_windows_cover_every_step(length: int, window: int, overlap: float) -> None:
    parts = list(windows(length, window, overlap))
    assert parts[0][0] == 0 and parts[-1][1] == length
    steps = [set(range(a, b - 1)) for a, b in parts]
    assert set().union(*steps) == set(range(length - 1))
    assert all(a < b for (a, _), (b, _) in pairwise(parts))


def test_windows_of_one_motion_average_to_it() -> None:
    motion = idm().decode(make_video(5, 12), fps=FPS, layout="THWC")
    whole = average_windows([(0, motion)], 12, FPS, "joint_delta")
    parts = [(a, motion[a:b]) for a, b in windows(12, 5, 0.5)]
    again = average_windows(parts, 12, FPS, "joint_delta")
    for name in ("position", "action", "covariance", "valid"):
        np.testing.assert_allclose(getattr(again, name), getattr(whole, name), atol=1e-12)


def test_windows_that_disagree_are_averaged_and_invalid_ones_ignored() -> None:
    from dataclasses import replace

    decoded = idm().decode(make_video(6, 4), fps=FPS, layout="THWC")
    motion = replace(decoded, delta_q=torch.rand(3, 5), valid=torch.ones(3, dtype=torch.bool))
    other = replace(motion, delta_q=motion.delta_q + 0.2, position=motion.position + 0.1)
    both = average_windows([(0, motion), (0, other)], 4, FPS, "joint_delta")
    np.testing.assert_allclose(both.action[:-1], motion.delta_q + 0.1, atol=1e-7)
    np.testing.assert_allclose(both.position, motion.position + 0.05, atol=1e-7)
    invalid = replace(other, valid=torch.zeros(3, dtype=torch.bool))
    one = average_windows([(0, motion), (0, invalid)], 4, FPS, "joint_delta")
    np.testing.assert_allclose(one.action[:-1], motion.delta_q, atol=1e-7)
    none = average_windows([(0, invalid)], 4, FPS, "joint_delta")
    assert not none.valid.any() and not none.action.any() and np.isfinite(none.covariance).all()


def test_existing_episodes_are_kept_and_other_settings_refused(tmp_path: Path) -> None:
    source = unlabeled_dataset(tmp_path / "source")
    assert label_dataset(source, idm(), tmp_path / "out", shard=(0, 2)).written == 2
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.mp4")}
    lines: list[str] = []
    assert label_dataset(source, idm(), tmp_path / "out", progress=lines.append).written == 3
    assert len(lines) == 1 and lines[0].startswith("episode 1:")
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in stamps.items())
    with pytest.raises(DatasetError, match="another folder"):
        label_dataset(source, idm(), tmp_path / "out", options=LabelOptions(window=4))


def test_wrong_sources_and_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="neither"):
        label_dataset(tmp_path / "absent", idm(), tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="no videos"):
        label_dataset(tmp_path / "empty", idm(), tmp_path / "out")
    for wrong in ({"window": 1}, {"overlap": 1.0}, {"action_space": "torque"}):
        with pytest.raises(InputError):
            LabelOptions(**wrong)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_killed_run_resumes_with_nothing_lost_or_doubled(tmp_path: Path) -> None:
    source = unlabeled_dataset(tmp_path / "source", episodes=12)
    command = [
        sys.executable,
        "-m",
        "jidm.cli",
        "label",
        str(source),
        "--checkpoint",
        "finger-5",
        "--out",
        str(tmp_path / "out"),
    ]
    for k in range(3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while process.poll() is None and len(list((tmp_path / "out").rglob("*.parquet"))) < 3 * k + 2:
            time.sleep(0.01)
        time.sleep(0.05 * k)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    label_dataset(source, idm(), tmp_path / "whole")
    killed, whole = (read_columns(tmp_path / name) for name in ("out", "whole"))
    assert sorted(killed) == sorted(whole) == list(range(12))
    for k in whole:
        np.testing.assert_allclose(killed[k]["action"], whole[k]["action"], atol=1e-5)
    assert len(list((tmp_path / "out" / "data").rglob("*.parquet"))) == 12
