"""Validation finds and names every fault, and reports none in valid data sets; summaries; `jidm dataset`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import material
from lerobot_files import CAMERA, EpisodeArrays, encode, make_episode, make_v2, make_v30

from jidm import Embodiment, load_embodiment
from jidm.cli import main
from jidm.datasets import Problem, open_dataset, validate_dataset
from jidm.datasets.image_motion import sample_camera
from jidm.datasets.summary import summarize_dataset
from jidm.errors import DatasetError

TABLE, VIDEO = "data/chunk-000/episode_000003.parquet", f"videos/chunk-000/{CAMERA}/episode_000003.mp4"


def faults(root: Path, **options: Any) -> list[Problem]:
    """The problems that are no notes: the data sets here have gaps in the numbers of their episodes."""
    return [problem for problem in validate_dataset(root, **options) if not problem.is_note]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A valid data set: episodes 0 and 3 of 6 and 8 frames."""
    made = make_v2(tmp_path / "set", {0: make_episode(0, 6), 3: make_episode(3, 8)})
    assert faults(made) == []
    return made


def change(root: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = root / "meta" / "info.json"
    facts = json.loads(path.read_text())
    edit(facts)
    path.write_text(json.dumps(facts))


def replace_column(root: Path, key: str, values: Any) -> None:
    table = pq.read_table(root / TABLE)
    pq.write_table(table.set_column(table.schema.names.index(key), key, values), root / TABLE)


def with_state(root: Path, edit: Callable[[np.ndarray], Any]) -> None:
    state = np.array(pq.read_table(root / TABLE).column("observation.state").to_pylist())
    edit(state)
    replace_column(root, "observation.state", pa.array(state.tolist()))


def set_entry(frame: int, joint: int, value: float) -> Callable[[np.ndarray], None]:
    return lambda state: state.__setitem__((frame, joint), value)


def no_state(root: Path) -> None:
    change(root, lambda facts: facts["features"].pop("observation.state"))


def other_length(root: Path) -> None:
    pq.write_table(pq.read_table(root / TABLE).slice(0, 7), root / TABLE)


def other_rate(root: Path) -> None:
    replace_column(root, "timestamp", pa.array((np.arange(8) / 25).astype(np.float32)))


def gap_in_time(root: Path) -> None:
    replace_column(root, "timestamp", pa.array((np.arange(8) / 30 + 0.5 * (np.arange(8) > 4)).astype(np.float32)))


def mixed_rows(root: Path) -> None:
    replace_column(root, "frame_index", pa.array([0, 1, 2, 3, 5, 4, 6, 7]))


def wrong_width(root: Path) -> None:
    replace_column(root, "observation.state", pa.array(np.zeros((8, 4)).tolist()))


def damaged_inside(root: Path) -> None:
    data = bytearray((root / VIDEO).read_bytes())
    middle = data.index(b"mdat") + 900
    data[middle : middle + 3000] = bytes(3000)
    (root / VIDEO).write_bytes(data)


FAULTS: list[tuple[Callable[[Path], Any], int | None, str]] = [
    (no_state, None, "has no observation.state"),
    (lambda root: change(root, lambda f: f["features"].pop(CAMERA)), None, "has no camera"),
    (lambda root: change(root, lambda f: f.update(total_episodes=5)), None, "says 5 episodes, 2 are listed"),
    (lambda root: change(root, lambda f: f.update(total_frames=15)), None, "says 15 frames, the episodes have 14"),
    (lambda root: change(root, lambda f: f["features"]["observation.state"].update(names=["a", "b"])), None, "3 distinct"),
    (lambda root: (root / TABLE).unlink(), 3, "its table is missing"),
    (lambda root: (root / TABLE).write_bytes(b"PAR1 no"), 3, "not a readable parquet table"),
    (lambda root: (root / VIDEO).unlink(), 3, "this video is missing"),
    (lambda root: (root / VIDEO).write_bytes(b"no video"), 3, "not a readable video"),
    (lambda root: encode(root / VIDEO, make_episode(3, 7).frames, 30), 3, f"{CAMERA} has 7 images, the table has 8 rows"),
    (lambda root: encode(root / VIDEO, make_episode(3, 8).frames, 25), 3, "image 7 is presented"),
    (lambda root: encode(root / VIDEO, make_episode(3, 8, height=96, width=128).frames, 30), 3, "128x96, info.json says 64x48"),
    (other_length, 3, "has 7 rows, the list of episodes says 8"),
    (other_rate, 3, "frames 0 and 1 are 0.0400 s apart, 30 frames per second are 0.0333 s (7 such steps)"),
    (gap_in_time, 3, "frames 4 and 5 are 0.5333 s apart, 30 frames per second are 0.0333 s (1 such steps)"),
    (mixed_rows, 3, "frame_index is 5 in row 4, must be 4"),
    (wrong_width, 3, "observation.state is (4,) per frame, info.json says (3,)"),
    (lambda root: with_state(root, set_entry(5, 1, np.nan)), 3, "observation.state of 'b' is nan in frame 5 (1 such frames)"),
    (lambda root: with_state(root, set_entry(2, 2, np.inf)), 3, "observation.state of 'c' is inf in frame 2"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "episode", "what"), FAULTS, ids=[b[2][:40] for b in FAULTS])
def test_every_fault_is_found_and_named(root: Path, damage: Any, episode: int | None, what: str) -> None:
    damage(root)
    problems = faults(root)
    assert any(what in p.message and p.episode == episode for p in problems), "\n".join(map(str, problems))
    assert {p.episode for p in problems} <= {episode, None}  # the valid episode is not reported
    for p in problems:
        assert p.remedy and "\n" not in str(p) and str(p).endswith(p.remedy)


def test_declared_columns_that_tables_lack_are_named_once(root: Path) -> None:
    change(
        root, lambda f: f["features"].update({"observation.extra": {"dtype": "float32", "shape": [2], "names": None}})
    )
    (problem,) = faults(root)
    assert (problem.episode, problem.message) == (None, "'observation.extra' is declared, but no table has it")
    table = pq.read_table(root / TABLE)
    pq.write_table(table.append_column("observation.extra", pa.array(np.zeros((8, 2)).tolist())), root / TABLE)
    (problem,) = faults(root)
    assert (problem.episode, problem.message) == (0, "its table has no 'observation.extra', others have")


def test_damage_inside_a_video_is_found_by_decoding(root: Path) -> None:
    encode(root / VIDEO, np.random.default_rng(0).integers(0, 255, (8, 48, 64, 3), np.uint8), 30)
    damaged_inside(root)
    assert faults(root) == []
    assert [p.episode for p in faults(root, decode=True)] == [3]


def test_packed_videos_are_checked_per_episode(tmp_path: Path) -> None:
    truth = {0: make_episode(0, 6), 1: make_episode(1, 8), 2: make_episode(2, 5)}
    root = make_v30(tmp_path, truth, per_file=3)
    encode(
        root / "videos" / CAMERA / "chunk-000" / "file-000.mp4",
        np.concatenate([e.frames for e in truth.values()])[:17],
        30,
    )
    assert [(p.episode, p.message.split(" (")[0]) for p in faults(root)] == [
        (2, f"{CAMERA} has 3 images, the table has 5 rows")
    ]


@pytest.mark.parametrize(("drift", "complaint"), [(-1, "they overlap"), (1, "belong to no episode")])
def test_overlaps_and_gaps_in_a_shared_video_are_named(tmp_path: Path, drift: int, complaint: str) -> None:
    """from_timestamp that counts an episode of T frames as (T - 1) / fps or (T + 1) / fps long."""
    truth = {k: make_episode(k, 9) for k in range(4)}
    root = make_v30(tmp_path, truth, per_file=4)
    assert validate_dataset(root) == []
    listed = root / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    table, key = pq.read_table(listed), f"videos/{CAMERA}/from_timestamp"
    starts = pa.array([k * (9 + drift) / 30 for k in range(4)])
    pq.write_table(table.set_column(table.schema.names.index(key), key, starts), listed)
    frames = np.concatenate([e.frames for e in truth.values()] + [truth[0].frames[:3]] * (drift > 0))
    encode(root / "videos" / CAMERA / "chunk-000" / "file-000.mp4", frames, 30)
    found = [p for p in validate_dataset(root, decode=True) if complaint in p.message and CAMERA in p.message]
    assert {1, 2, 3} <= {p.episode for p in found}
    assert all("from_timestamp" in p.remedy for p in found)


def test_missing_values_in_other_columns_are_noted(tmp_path: Path) -> None:
    episode = make_episode(0, 6)
    root = make_v2(tmp_path, {0: episode})
    force = np.zeros((6, 3))
    force[2, 1] = np.nan
    table = root / "data" / "chunk-000" / "episode_000000.parquet"
    pq.write_table(pq.read_table(table).append_column("force", pa.array(force.tolist())), table)
    change(root, lambda f: f["features"].update(force={"dtype": "float64", "shape": [3], "names": ["x", "y", "z"]}))
    (note,) = validate_dataset(root)
    assert note.is_note and note.message == "force of 'y' is nan in frame 2 (1 such frames)" and note.episode == 0
    assert main(["dataset", "validate", str(root)]) == 0


@pytest.mark.parametrize("numbers", [(0, 1, 2), (0, 2), (1, 2)])
def test_numbers_that_lerobot_cannot_read_are_noted(tmp_path: Path, numbers: tuple[int, ...]) -> None:
    notes = validate_dataset(make_v2(tmp_path, {k: make_episode(k, 5) for k in numbers}))
    assert [p.is_note and "LeRobot reads only sets whose episodes count from 0" in p.message for p in notes] == (
        [] if numbers == (0, 1, 2) else [True]
    )


def test_a_folder_that_is_no_data_set_is_one_problem(tmp_path: Path) -> None:
    (problem,) = faults(tmp_path)
    assert "no data set" in problem.message and problem.remedy == "give the folder that contains meta/"


# ---- against a robot -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finger() -> Embodiment:
    return load_embodiment("planar_finger_3")


def of_robot(tmp_path: Path, names: list[str], state: np.ndarray) -> Path:
    episode = make_episode(0, len(state))
    root = make_v2(tmp_path, {0: EpisodeArrays(episode.frames, state, episode.action)})
    change(root, lambda f: f["features"]["observation.state"].update(names=names))
    return root


def test_joints_and_limits_are_compared_with_the_robot(tmp_path: Path, finger: Embodiment) -> None:
    inside = np.clip(np.linspace(-0.3, 0.3, 18).reshape(6, 3), finger.lower, finger.upper)
    names = list(finger.joint_names)
    assert faults(of_robot(tmp_path / "good", names, inside), embodiment=finger) == []
    (wrong,) = faults(of_robot(tmp_path / "order", names[::-1], inside), embodiment=finger)
    assert f"'{names[-1]}' is in the place of '{names[0]}'" in wrong.message
    (wrong,) = faults(of_robot(tmp_path / "dof", names, inside), embodiment=load_embodiment("planar_finger_2"))
    assert wrong.message == "has 3 joints, 'planar_finger_2' has 2"
    degrees = faults(of_robot(tmp_path / "degrees", names, np.rad2deg(inside)), embodiment=finger)
    assert degrees and all(
        "the limits are" in p.message and "convert the recording to rad" in p.remedy for p in degrees
    )


# ---- summary ----------------------------------------------------------------------------------------------------------


def test_summary_of_a_known_motion(tmp_path: Path) -> None:
    """Joint a sweeps its range uniformly, b rests, c alternates between the ends."""
    length = 41
    state = np.stack([np.linspace(-1, 1, length), np.full(length, 0.2), np.arange(length) % 2], 1)
    episode = make_episode(0, length)
    figures = summarize_dataset(
        open_dataset(make_v2(tmp_path, {0: EpisodeArrays(episode.frames, state, episode.action)}))
    )
    a, b, c = figures.joints
    assert (a.coverage, b.coverage, c.coverage) == (1.0, 0.05, 0.1)
    assert (a.low, a.high) == (-1, 1) and a.mean == pytest.approx(0) and a.histogram.sum() == length
    assert a.step_rms == pytest.approx(0.05) and a.step_max == pytest.approx(0.05)
    assert (a.moving_fraction, b.moving_fraction, c.moving_fraction) == (1.0, 0.0, 1.0) and c.step_rms == 1.0
    assert figures.pair_coverage == pytest.approx(((10 + 20 + 2) / 3) / 100, abs=0.01)
    assert figures.lengths == (41, 41, 41) and figures.frames == 41 and figures.tasks == {"reach": 1}


def test_repeated_images_are_counted(tmp_path: Path) -> None:
    """A camera of half the rate: every second image repeats its predecessor."""
    smooth, half = make_episode(0, 40), make_episode(0, 40)
    half.frames = half.frames[np.arange(40) // 2 * 2]
    state = np.stack([np.sin(np.arange(40) / 5)] * 3, 1)
    for name, episode, expected in (("smooth", smooth, 0.0), ("half", half, 0.5)):
        dataset = open_dataset(make_v2(tmp_path / name, {0: EpisodeArrays(episode.frames, state, episode.action)}))
        (sample,) = sample_camera(dataset, "top", frames=4)
        assert sample.repeated_fraction == pytest.approx(expected, abs=0.1)
        assert sample.frame_indices == (0, 13, 26, 39) and len(sample.images) == 4
        assert sample.flow is not None and sample.flow.flow.shape == (2, 48, 64)


@pytest.mark.parametrize(("still", "expected"), [(slice(0, 20), 0.0), (slice(20, 40), 1.0)])
def test_images_that_repeat_while_the_robot_rests_do_not_count(tmp_path: Path, still: slice, expected: float) -> None:
    episode = make_episode(0, 40)
    episode.frames[still] = episode.frames[still.start]
    state = np.cumsum(np.where(np.arange(40) < 20, 0.001, 0.1))[:, None].repeat(3, 1)
    dataset = open_dataset(make_v2(tmp_path, {0: EpisodeArrays(episode.frames, state, episode.action)}))
    (sample,) = sample_camera(dataset, "top", flow=False)
    assert sample.repeated_fraction == pytest.approx(expected, abs=0.11) and sample.flow is None


def test_non_finite_positions_have_no_summary(root: Path) -> None:
    with_state(root, set_entry(1, 1, np.nan))
    with pytest.raises(DatasetError, match="not finite everywhere; run jidm dataset validate"):
        summarize_dataset(open_dataset(root))


# ---- the command line ------------------------------------------------------------------------------------------------


def test_show_prints_figures_and_draws(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "images"
    assert main(["dataset", "show", str(root), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    for expected in ("LeRobot v2.1, robot toy", "episodes   2, of 6 to 8", "top: 64x48", "JOINT", "ACTION", "REPEATED"):
        assert expected in text
    assert sorted(path.name for path in out.iterdir()) == ["coverage.png", "flow_top.png", "frames_top.png"]
    for path in out.iterdir():
        picture = cv2.imread(str(path))
        assert picture is not None and min(picture.shape[:2]) > 60 and picture.std() > 5


def test_show_without_images_decodes_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for video in root.glob("videos/**/*.mp4"):
        video.unlink()
    assert main(["dataset", "show", str(root), "--episodes", "0"]) == 0
    assert "REPEATED" not in capsys.readouterr().out
    assert main(["dataset", "show", str(root)]) == 1
    assert "this video is missing" in capsys.readouterr().err


def test_check_prints_problems_and_sets_the_exit_code(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dataset", "validate", str(root)]) == 0
    assert "no problem found" in capsys.readouterr().out
    (root / VIDEO).unlink()
    assert main(["dataset", "validate", str(root)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in lines[:2]] == ["note:", "episode"] and lines[2].endswith("1 problem(s)")
    assert main(["dataset", "validate", str(root), "--embodiment", "planar_finger_2"]) == 1
    assert "has 3 joints, 'planar_finger_2' has 2" in capsys.readouterr().out


def test_check_uses_the_robot_of_the_recipe(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(root, lambda f: f.update(jidm={"embodiment": "planar_finger_2"}))
    assert main(["dataset", "validate", str(root)]) == 1
    assert "has 3 joints, 'planar_finger_2' has 2" in capsys.readouterr().out
    change(root, lambda f: f.update(jidm={"embodiment": "a robot of another house"}))
    assert main(["dataset", "validate", str(root)]) == 0


def test_problems_of_third_party_data_sets() -> None:
    assert faults(material("g1_inspire_real")) == []
    found = faults(material("gr1_sim"))
    assert {p.episode for p in found} == {3, 4, None} and len(found) == 3
