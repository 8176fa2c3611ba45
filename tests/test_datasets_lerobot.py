"""Interoperability with LeRobot's library: it reads data sets of jidm, and jidm reads its data sets.

Skipped where the package `lerobot` (0.4 or later) is not installed; no other part of the tests needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lerobot_files import CAMERA, bar_width, make_episode, measured_bar_width, read_reference
from test_datasets_writer import EXTRAS, RECIPE, TOP, arrays, length_of, write

from jidm.datasets import open_dataset, validate_dataset

pytestmark = pytest.mark.slow  # loading the package alone takes seconds


@pytest.fixture(scope="module")
def lerobot() -> Any:
    reason = "LeRobot is not installed; pip install 'lerobot>=0.4' into the tests' environment to run this"
    return pytest.importorskip("lerobot.datasets.lerobot_dataset", reason=reason).LeRobotDataset


def test_lerobot_reads_what_jidm_writes(tmp_path: Path, lerobot: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    root = write(tmp_path / "ours", [0, 1, 2, 3])
    theirs = lerobot("nobody/nothing", root=root)
    assert (theirs.meta.total_episodes, theirs.fps, theirs.meta.robot_type) == (4, 16, "toy")
    assert theirs.meta.info["jidm"] == RECIPE
    row = 0
    for index in range(4):
        expected = arrays(index)
        assert (root / theirs.meta.get_video_file_path(index, TOP)).is_file()
        for t in range(length_of(index)):
            item = theirs.hf_dataset[row]
            assert (int(item["episode_index"]), int(item["frame_index"]), int(item["index"])) == (index, t, row)
            assert theirs.meta.tasks.iloc[int(item["task_index"])].name == expected["task"]
            np.testing.assert_allclose(item["observation.state"], expected["state"][t], rtol=1e-6)
            np.testing.assert_allclose(item["action"], expected["action"][t], rtol=1e-6)
            for key in EXTRAS:
                np.testing.assert_allclose(np.asarray(item[key]), expected["extras"][key][t], rtol=1e-6)
            row += 1
    assert row == len(theirs)
    states = np.concatenate([arrays(index)["state"] for index in range(4)])
    np.testing.assert_allclose(theirs.meta.stats["observation.state"]["std"], states.std(0), rtol=1e-6)
    assert np.shape(theirs.meta.stats[TOP]["mean"]) == (3, 1, 1)


def test_jidm_reads_what_lerobot_writes(tmp_path: Path, lerobot: Any) -> None:
    features = {
        "observation.state": {"dtype": "float32", "shape": (3,), "names": ["a", "b", "c"]},
        "action": {"dtype": "float32", "shape": (2,), "names": ["u", "v"]},
        CAMERA: {"dtype": "video", "shape": (48, 64, 3), "names": ["height", "width", "channels"]},
        "observation.grid": {"dtype": "int16", "shape": (2, 3), "names": None},
        "next.done": {"dtype": "bool", "shape": (1,), "names": None},
    }
    root = tmp_path / "theirs"
    theirs = lerobot.create("nobody/nothing", fps=30, features=features, root=root, robot_type="toy", vcodec="h264")
    truth = {index: make_episode(index, 7 + 3 * index) for index in range(5)}
    for episode in truth.values():
        for t in range(len(episode)):
            frame = {"observation.state": episode.state[t].astype(np.float32), CAMERA: episode.frames[t]}
            frame |= {"action": episode.action[t].astype(np.float32), "task": episode.task}
            last = np.array([t == len(episode) - 1])
            theirs.add_frame(frame | {"observation.grid": np.full((2, 3), t, np.int16), "next.done": last})
        theirs.save_episode()
    theirs.finalize()
    assert len(list(root.glob("data/*/*.parquet"))) == len(list(root.glob("videos/*/*/*.mp4"))) == 1

    dataset = open_dataset(root)
    assert (dataset.joint_names, dataset.cameras, dataset.robot_type) == (("a", "b", "c"), ("top",), "toy")
    plain = read_reference(root)
    for index, expected in truth.items():
        episode = dataset.episode(index)
        assert (episode.length, episode.task) == (len(expected), expected.task)
        np.testing.assert_array_equal(episode.state, expected.state.astype(np.float32))
        # The reader must handle LeRobot's extension type for grids, which is registered by now.
        grid = np.broadcast_to(np.arange(len(expected))[:, None, None], (len(expected), 2, 3))
        np.testing.assert_array_equal(episode.column("observation.grid"), grid)
        assert np.flatnonzero(episode.column("next.done")).tolist() == [len(expected) - 1]
        np.testing.assert_array_equal(episode.video(), plain[index]["frames"][CAMERA])
        assert all(abs(measured_bar_width(frame) - bar_width(t)) <= 2 for t, frame in enumerate(episode.video()))
    assert validate_dataset(root, decode=True) == []
