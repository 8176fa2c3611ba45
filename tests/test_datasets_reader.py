"""Reading third-party data sets: every version, packing and form of names in use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import material
from lerobot_files import (
    CAMERA,
    EpisodeArrays,
    bar_width,
    encode,
    info,
    make_episode,
    make_v2,
    make_v30,
    measured_bar_width,
)

from jidm.datasets import Feature, RecordedDataset, open_dataset, validate_dataset
from jidm.datasets.metadata import DatasetMetadata
from jidm.errors import DatasetError

LENGTHS = {0: 9, 1: 14, 2: 5, 3: 11, 4: 7}


@pytest.fixture(scope="module")
def truth() -> dict[int, EpisodeArrays]:
    return {index: make_episode(index, length) for index, length in LENGTHS.items()}


def assert_holds(dataset: RecordedDataset, truth: dict[int, EpisodeArrays]) -> None:
    assert dataset.episode_indices == tuple(sorted(truth)) and len(dataset) == len(truth)
    assert [e.index for e in dataset] == sorted(truth)
    for index, expected in truth.items():
        episode = dataset.episode(index)
        assert (episode.length, len(episode), episode.task) == (len(expected), len(expected), expected.task)
        np.testing.assert_array_equal(episode.state, expected.state)
        assert episode.action is not None
        np.testing.assert_array_equal(episode.action, expected.action.astype(np.float32))
        np.testing.assert_allclose(episode.time, np.arange(len(expected)) / dataset.fps, atol=1e-6)
        video = episode.video()
        assert video.shape == expected.frames.shape and video.dtype == np.uint8
        assert np.abs(video.astype(int) - expected.frames).mean() < 4
        for t, frame in enumerate(video):
            assert abs(measured_bar_width(frame) - bar_width(t)) <= 1, f"episode {index}: image {t} is a different one"


@pytest.mark.parametrize("per_file", [1, 2, 5])
@pytest.mark.parametrize("row_groups", [True, False])
def test_v30_with_several_episodes_in_a_file(
    tmp_path: Path, truth: dict[int, EpisodeArrays], per_file: int, row_groups: bool
) -> None:
    dataset = open_dataset(make_v30(tmp_path, truth, per_file=per_file, row_groups=row_groups))
    assert (dataset.version, dataset.fps, dataset.robot_type) == ("v3.0", 30.0, "toy")
    assert (dataset.joint_names, dataset.cameras) == (("a", "b", "c"), ("top",))
    assert_holds(dataset, truth)
    assert validate_dataset(tmp_path) == []


@pytest.mark.parametrize("version", ["v2.1", "v2.0"])
@pytest.mark.parametrize("flat", [True, False])
def test_v2_with_gaps(tmp_path: Path, truth: dict[int, EpisodeArrays], version: str, flat: bool) -> None:
    gappy = {3 * index + 1: episode for index, episode in truth.items()}
    dataset = open_dataset(make_v2(tmp_path, gappy, version=version, flat=flat))
    assert dataset.version == version
    assert_holds(dataset, gappy)
    assert [str(p).split(" is")[0] for p in validate_dataset(tmp_path)] == ["note: episode 0"]


def test_v2_folders_of_few_episodes_each(tmp_path: Path, truth: dict[int, EpisodeArrays]) -> None:
    root = make_v2(tmp_path, {index: truth[index] for index in (1, 4)}, chunks_size=2)
    for kind in ("data", "videos"):
        (root / kind / "chunk-002").mkdir()
        for path in (root / kind).glob("chunk-000/**/episode_000004.*"):
            target = root / kind / "chunk-002" / path.relative_to(root / kind / "chunk-000")
            target.parent.mkdir(exist_ok=True)
            path.rename(target)
    assert_holds(open_dataset(root), {index: truth[index] for index in (1, 4)})


def test_a_video_with_few_key_frames_and_reordered_frames(tmp_path: Path, truth: dict[int, EpisodeArrays]) -> None:
    make_v30(tmp_path, truth, per_file=5)
    options = {"crf": "10", "g": "250", "bf": "3"}
    images = np.concatenate([episode.frames for episode in truth.values()])
    encode(tmp_path / "videos" / CAMERA / "chunk-000" / "file-000.mp4", images, 30, options=options)
    assert_holds(open_dataset(tmp_path), truth)
    assert validate_dataset(tmp_path) == []


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "b", "c"], ("a", "b", "c")),
        ([["a", "b", "c"]], ("a", "b", "c")),
        ({"motors": ["a", "b", "c"]}, ("a", "b", "c")),
        ({"arm": ["a", "b"], "hand": ["c"]}, ("a", "b", "c")),
        ({"b": 1, "a": 0, "c": 2}, ("a", "b", "c")),
        (None, ("joint_0", "joint_1", "joint_2")),
        (["a", "b"], ("joint_0", "joint_1", "joint_2")),
        (["a", "a", "b"], ("joint_0", "joint_1", "joint_2")),
    ],
)
def test_every_form_of_joint_names(tmp_path: Path, truth: dict[int, EpisodeArrays], names: Any, expected: Any) -> None:
    root = make_v2(tmp_path, {0: truth[0]})
    change(root, lambda facts: facts["features"]["observation.state"].update(names=names))
    assert open_dataset(root).joint_names == expected


def change(root: Path, edit: Any) -> None:
    path = root / "meta" / "info.json"
    facts = json.loads(path.read_text())
    edit(facts)
    path.write_text(json.dumps(facts))


def test_columns_of_every_kind(tmp_path: Path, truth: dict[int, EpisodeArrays]) -> None:
    episode = make_episode(0, 4)
    grid = np.arange(4 * 2 * 3, dtype=np.int16).reshape(4, 2, 3)
    episode.extras = {"done": np.array([False, False, False, True]), "note": np.array(["a", "b", "c", "d"])}
    root = make_v2(tmp_path, {0: episode})
    path = root / "data" / "chunk-000" / "episode_000000.parquet"
    table = pq.read_table(path).append_column("grid", pa.array(grid.tolist(), pa.list_(pa.list_(pa.int16()))))
    pq.write_table(table.append_column("ragged", pa.array([[1], [1, 2], [], [3]])), path)

    def declare(facts: dict[str, Any]) -> None:
        for key, dtype, shape in [("done", "bool", [1]), ("note", "string", [1]), ("grid", "int16", [2, 3])]:
            facts["features"][key] = {"dtype": dtype, "shape": shape, "names": None}
        facts["features"]["ragged"] = {"dtype": "int64", "shape": [2], "names": None}
        facts["features"]["absent"] = {"dtype": "int64", "shape": [2], "names": None}

    change(root, declare)
    read = open_dataset(root).episode(0)
    assert read.column("done").tolist() == [False, False, False, True]
    assert read.column("note").tolist() == ["a", "b", "c", "d"]
    np.testing.assert_array_equal(read.column("grid"), grid)
    assert read.column("grid").dtype == np.int16
    for key, complaint in [
        ("ragged", "between 0 and 2 entries"),
        ("absent", "no column 'absent'"),
        (CAMERA, "holds images"),
    ]:
        with pytest.raises(DatasetError, match=complaint):
            read.column(key)
    with pytest.raises(DatasetError, match="did you mean 'grid'"):
        read.column("grd")


class Grid(pa.ExtensionType):
    """An extension type for grids, like that of LeRobot's writer."""

    def __init__(self) -> None:
        super().__init__(pa.list_(pa.list_(pa.int16())), "tests.grid")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: Any, serialized: bytes) -> Grid:
        return cls()


@pytest.mark.parametrize("known", [False, True])
def test_grids_of_an_extension_type(tmp_path: Path, truth: dict[int, EpisodeArrays], known: bool) -> None:
    """The values must not depend on whether the type is registered, which depends on other packages."""
    root = make_v30(tmp_path, truth, per_file=5, row_groups=False)
    path = root / "data" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    grid = np.arange(len(table) * 6, dtype=np.int16).reshape(-1, 2, 3)
    column = pa.ExtensionArray.from_storage(Grid(), pa.array(grid.tolist(), pa.list_(pa.list_(pa.int16()))))
    pq.write_table(table.append_column("grid", column), path)
    change(root, lambda facts: facts["features"].update(grid={"dtype": "int16", "shape": [2, 3], "names": None}))
    if known:
        pa.register_extension_type(Grid())
    try:
        assert isinstance(pq.read_table(path).schema.field("grid").type, Grid) == known
        read = np.concatenate([episode.column("grid") for episode in open_dataset(root)])
    finally:
        if known:
            pa.unregister_extension_type("tests.grid")
    np.testing.assert_array_equal(read, grid)


@pytest.mark.parametrize("row_groups", [True, False])
def test_columns_of_a_shared_file_in_any_order(
    tmp_path: Path, truth: dict[int, EpisodeArrays], row_groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import jidm.datasets.table as module

    dataset = open_dataset(make_v30(tmp_path, truth, per_file=3, row_groups=row_groups))
    reads, real = [], module._read_table
    monkeypatch.setattr(module, "_read_table", lambda *given: reads.append(given[-1]) or real(*given))
    for room in (module._CACHE_BYTES, 0):
        monkeypatch.setattr(module, "_CACHE_BYTES", room)
        for index in (4, 0, 2, 1, 0, 3):
            episode = dataset.episode(index)
            np.testing.assert_array_equal(episode.state, truth[index].state)
            np.testing.assert_array_equal(episode.column("frame_index"), np.arange(LENGTHS[index]))
            np.testing.assert_array_equal(episode.state, truth[index].state)
        if not row_groups and room:
            # Two files, visited in the order 2, 1, 2: each visit reads each column once.
            assert len(reads) == 6


def test_a_rewritten_shared_file_is_read_again(tmp_path: Path, truth: dict[int, EpisodeArrays]) -> None:
    root = make_v30(tmp_path, truth, per_file=5)
    dataset = open_dataset(root)
    np.testing.assert_array_equal(dataset.episode(1).state, truth[1].state)
    moved = {k: EpisodeArrays(e.frames, e.state + 1, e.action, e.task) for k, e in truth.items()}
    make_v30(root, moved, per_file=5)
    np.testing.assert_array_equal(dataset.episode(1).state, truth[1].state + 1)


def test_an_episode_missing_from_its_shared_file(tmp_path: Path, truth: dict[int, EpisodeArrays]) -> None:
    root = make_v30(tmp_path, truth, per_file=5)
    path = root / "data" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.filter(pa.compute.not_equal(table.column("episode_index"), 3)), path)
    with pytest.raises(DatasetError, match=r"episode 3: file-000\.parquet has 0 rows, the list of episodes says 11"):
        _ = open_dataset(root).episode(3).state
    pq.write_table(table.drop_columns(["episode_index"]), path)
    with pytest.raises(DatasetError, match="has no column 'episode_index'"):
        _ = open_dataset(root).episode(3).state


def test_av1_video(tmp_path: Path, truth: dict[int, EpisodeArrays]) -> None:
    import av

    if "libsvtav1" not in av.codecs_available:
        pytest.skip("this PyAV has no AV1 encoder to make the file with")
    make_v30(tmp_path, truth, per_file=5)
    images = np.concatenate([episode.frames for episode in truth.values()])
    path = tmp_path / "videos" / CAMERA / "chunk-000" / "file-000.mp4"
    encode(path, images, 30, codec="libsvtav1", options={"crf": "8", "g": "30", "preset": "8"})
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name in ("libdav1d", "libaom-av1", "av1")
    assert_holds(open_dataset(tmp_path), truth)
    assert validate_dataset(tmp_path) == []


def test_images_stored_in_the_table(tmp_path: Path) -> None:
    episode = make_episode(0, 5)
    root = make_v2(tmp_path, {0: episode})
    path = root / "data" / "chunk-000" / "episode_000000.parquet"
    cells = [
        {"bytes": cv2.imencode(".png", np.ascontiguousarray(f[..., ::-1]))[1].tobytes(), "path": None}
        for f in episode.frames
    ]
    pq.write_table(pq.read_table(path).append_column(CAMERA, pa.array(cells)), path)
    change(root, lambda facts: facts["features"][CAMERA].update(dtype="image"))
    shutil.rmtree(root / "videos")
    np.testing.assert_array_equal(open_dataset(root).episode(0).video("top"), episode.frames)
    assert validate_dataset(root) == []


def test_channels_first_shapes_and_depth_maps(tmp_path: Path, truth: dict[int, EpisodeArrays]) -> None:
    root = make_v2(tmp_path, {0: truth[0]})

    def edit(facts: dict[str, Any]) -> None:
        facts["features"][CAMERA].update(shape=[3, 48, 64], names=["channels", "height", "width"])
        depth = {"dtype": "video", "shape": [48, 64, 1], "names": None, "info": {"video.is_depth_map": True}}
        facts["features"]["observation.images.depth"] = depth

    change(root, edit)
    dataset = open_dataset(root)
    assert dataset.cameras == ("top",) and dataset.features[CAMERA].shape == (48, 64, 3)


def test_cameras_by_name(tmp_path: Path, truth: dict[int, EpisodeArrays]) -> None:
    root = make_v2(tmp_path, {0: truth[0]})
    change(root, lambda facts: facts["features"].update({"observation.images.wrist": facts["features"][CAMERA]}))
    dataset = open_dataset(root)
    assert dataset.cameras == ("top", "wrist")
    np.testing.assert_array_equal(dataset.episode(0).video("top"), dataset.episode(0).video(CAMERA))
    with pytest.raises(DatasetError, match=r"2 cameras .top, wrist.; name one"):
        dataset.episode(0).video()
    with pytest.raises(DatasetError, match="did you mean 'wrist'"):
        dataset.episode(0).video("wirst")
    with pytest.raises(DatasetError, match=r"wrist.*this video is missing"):
        dataset.episode(0).video("wrist")


def test_the_camera_of_flat_files_is_inferred_from_the_image_size(
    tmp_path: Path, truth: dict[int, EpisodeArrays]
) -> None:
    root = make_v2(tmp_path, truth, flat=True, version="v2.0")
    facts = info("v2.0", truth, 30)
    facts["features"]["observation.images.big"] = {**facts["features"][CAMERA], "shape": [480, 640, 3]}
    (root / "info.json").write_text(json.dumps(facts))
    assert open_dataset(root).cameras == ("top",)
    assert [p.message for p in validate_dataset(root)] == ["'observation.images.big' is declared, but it has no video"]
    facts["features"]["observation.images.big"]["shape"] = [48, 64, 3]
    (root / "info.json").write_text(json.dumps(facts))
    with pytest.raises(DatasetError, match=r"may be of any of .*top, .*big"):
        open_dataset(root)
    (root / "modality.json").write_text(json.dumps({"video": {"x": {"original_key": "observation.images.big"}}}))
    assert open_dataset(root).cameras == ("big",)


def test_the_hash_depends_on_content_not_on_the_path(tmp_path: Path, truth: dict[int, EpisodeArrays]) -> None:
    first, second = (make_v2(tmp_path / name, truth) for name in "ab")
    assert open_dataset(first).content_hash == open_dataset(second).content_hash
    other = {**truth, 3: make_episode(9, LENGTHS[3])}
    assert open_dataset(make_v2(tmp_path / "c", other)).content_hash != open_dataset(first).content_hash
    change(second, lambda facts: facts.update(robot_type="another"))
    assert open_dataset(second).content_hash != open_dataset(first).content_hash


def test_listed_episodes_without_files_are_left_out(tmp_path: Path, truth: dict[int, EpisodeArrays]) -> None:
    root = make_v2(tmp_path, truth)
    (root / "data" / "chunk-000" / "episode_000002.parquet").unlink()
    dataset = open_dataset(root)
    assert dataset.episode_indices == (0, 1, 3, 4) and dataset.metadata.missing_tables == (2,)
    with pytest.raises(DatasetError, match="has no episode 2; it has 4: 0, 1, 3, 4"):
        dataset.episode(2)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda root: (root / "meta" / "info.json").unlink(), "no data set"),
        (lambda root: (root / "meta" / "info.json").write_text("{"), "not readable as JSON"),
        (lambda root: change(root, lambda f: f.update(codebase_version="v1.6")), "v1.6.*convert others"),
        (lambda root: change(root, lambda f: f.update(fps=0)), "fps is 0"),
        (lambda root: change(root, lambda f: f.pop("features")), "has no features"),
        (lambda root: change(root, lambda f: f["features"].update(x={"dtype": "int64"})), "'x' has no shape"),
        (lambda root: change(root, lambda f: f.update(data_path="data/{nonsense}.parquet")), "cannot be filled in"),
        (lambda root: (root / "meta" / "episodes.jsonl").unlink(), "this file is missing"),
        (lambda root: (root / "meta" / "episodes.jsonl").write_text("{}\n"), "lacks episode_index"),
        (lambda root: (root / "meta" / "episodes.jsonl").write_text("{\n"), "line 1 is not JSON"),
    ],
)
def test_damaged_metadata_files_give_a_one_line_error(
    tmp_path: Path, truth: dict[int, EpisodeArrays], damage: Any, complaint: str
) -> None:
    root = make_v2(tmp_path, {0: truth[2]})
    damage(root)
    with pytest.raises(DatasetError, match=complaint) as error:
        open_dataset(root)
    assert "\n" not in str(error.value)


def test_an_episode_listed_twice_is_refused(tmp_path: Path, truth: dict[int, EpisodeArrays]) -> None:
    root = make_v2(tmp_path, {0: truth[2]})
    listed = root / "meta" / "episodes.jsonl"
    listed.write_text(listed.read_text() * 2)
    with pytest.raises(DatasetError, match="listed twice"):
        open_dataset(root)


def test_a_video_with_another_number_of_frames_is_refused(tmp_path: Path, truth: dict[int, EpisodeArrays]) -> None:
    root = make_v2(tmp_path, {0: truth[0]})
    for count in (8, 10):
        encode(root / "videos" / "chunk-000" / CAMERA / "episode_000000.mp4", make_episode(0, count).frames, 30)
        with pytest.raises(DatasetError, match=f"holds {count} images, but the table has 9 rows"):
            open_dataset(root).episode(0).video()


def test_images_at_other_times_are_refused(tmp_path: Path, truth: dict[int, EpisodeArrays]) -> None:
    root = make_v30(tmp_path, truth, per_file=5)
    images = np.concatenate([episode.frames for episode in truth.values()])
    encode(root / "videos" / CAMERA / "chunk-000" / "file-000.mp4", images, 25)
    with pytest.raises(DatasetError, match="no image at"):
        open_dataset(root).episode(3).video()


def test_a_truncated_video_is_refused(tmp_path: Path, truth: dict[int, EpisodeArrays]) -> None:
    root = make_v2(tmp_path, {0: truth[0]})
    path = root / "videos" / "chunk-000" / CAMERA / "episode_000000.mp4"
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(DatasetError, match=r"episode_000000\.mp4: (not a readable video|broken after|holds)"):
        open_dataset(root).episode(0).video()


# ---- third-party data sets --------------------------------------------------------------------------------------------


def test_the_real_g1_recording_equals_plain_pyarrow() -> None:
    root = material("g1_inspire_real")
    dataset = open_dataset(root)
    listed = [json.loads(line) for line in (root / "meta" / "episodes.jsonl").read_text().splitlines()]
    assert dataset.episode_indices == tuple(entry["episode_index"] for entry in listed)
    assert (len(dataset), dataset.fps, dataset.version) == (72, 30.0, "v2.1")
    assert dataset.joint_names[:2] == ("kLeftShoulderPitch", "kLeftShoulderRoll") and len(dataset.joint_names) == 26
    assert sum(episode.length for episode in dataset) == 25295
    for index in (1, 87):
        episode = dataset.episode(index)
        table = pq.read_table(root / "data" / "chunk-000" / f"episode_{index:06d}.parquet")
        np.testing.assert_array_equal(episode.state, np.array(table.column("observation.state").to_pylist()))
        np.testing.assert_array_equal(episode.time, np.array(table.column("timestamp").to_pylist()))
        assert sum(1 for _ in episode.frames("cam_high")) == episode.length
        stats = json.loads((root / "meta" / "episodes_stats.jsonl").read_text().splitlines()[0])["stats"]
        if index == 1:
            np.testing.assert_allclose(episode.state.mean(0), stats["observation.state"]["mean"], atol=1e-5)
    assert [p.message[:23] for p in validate_dataset(root)] == ["episode 0 is not listed"]  # and nothing else


def test_the_flat_gr1_recording_reads() -> None:
    dataset = open_dataset(material("gr1_sim"))
    assert (dataset.episode_indices, dataset.version, dataset.fps) == ((0, 1, 2), "v2.0", 20.0)
    assert dataset.cameras == ("ego_view",) and dataset.metadata.missing_tables == (3, 4)
    episode = dataset.episode(1)
    assert episode.state.shape == (470, 44) and episode.task.startswith("pick the sweet potato")
    frames = iter(episode.frames())
    assert next(frames).shape == (256, 256, 3) and sum(1 for _ in frames) == 469


def test_a_camera_is_found_by_name_and_by_key() -> None:
    features = {key: Feature("video", (8, 8, 3)) for key in ("observation.image", "observation.images.wrist")}
    dataset = RecordedDataset(DatasetMetadata(Path("."), {"codebase_version": "v3.0", "fps": 10}, features, {}, ()))
    assert dataset.cameras == ("image", "wrist")
    for name, key in zip(dataset.cameras, features, strict=True):
        assert dataset.camera_key(name) == dataset.camera_key(key) == key


def test_cameras_of_one_short_name_are_two(tmp_path: Path) -> None:
    one, two = "observation.images.image", "observation.image"
    episode = make_episode(0, 6)
    root = make_v2(tmp_path, {0: episode})
    path = root / "meta" / "info.json"
    facts = json.loads(path.read_text())
    for key in (one, two):
        facts["features"][key] = facts["features"][CAMERA]
    path.write_text(json.dumps(facts))
    encode(root / "videos" / "chunk-000" / one / "episode_000000.mp4", episode.frames, 30)
    encode(root / "videos" / "chunk-000" / two / "episode_000000.mp4", 255 - episode.frames, 30)
    dataset = open_dataset(root)
    assert sorted(dataset.cameras) == sorted(["top", one, two])
    assert (dataset.camera_key("top"), dataset.camera_key(CAMERA)) == (CAMERA, CAMERA)
    for key, expected in ((one, episode.frames), (two, 255 - episode.frames)):
        assert dataset.camera_key(key) == key
        assert np.abs(dataset.episode(0).video(key).astype(int) - expected).mean() < 4
    with pytest.raises(DatasetError, match=f"camera 'image' may be {one} or {two}; give one of these keys"):
        dataset.camera_key("image")
    assert validate_dataset(root, decode=True) == []
