"""All readers show the same picture: the video and not its cover, turned and mirrored as the file says."""

from __future__ import annotations

import io
import json
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_files import CAMERA, EpisodeArrays, encode, make_v2, make_v30

from jidm.checkpoint import load_checkpoint
from jidm.datasets import open_dataset, validate_dataset
from jidm.errors import CheckpointError, DatasetError, JidmError, VideoError
from jidm.git_lfs import is_lfs_pointer
from jidm.video.io import open_video, read_video

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
IDENTITY = (1, 0, 0, 1)
# (a, b, c, d) of x' = a x + c y, y' = b x + d y (ISO 14496-12), and the same with axes of an array (v, u).
MATRICES = {
    "90": ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
    "180": ((-1, 0, 0, -1), lambda x: x[::-1, ::-1]),
    "270": ((0, -1, 1, 0), lambda x: np.rot90(x)),
    "left-right": ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
    "up-down": ((1, 0, 0, -1), lambda x: x[::-1]),
    "transposed": ((0, 1, 1, 0), lambda x: x.swapaxes(0, 1)),
    "other diagonal": ((0, -1, -1, 0), lambda x: x[::-1, ::-1].swapaxes(0, 1)),
    "upright": (IDENTITY, lambda x: x),
}
EXIF = {1: "upright", 2: "left-right", 3: "180", 4: "up-down", 5: "transposed", 6: "90", 7: "other diagonal", 8: "270"}


def corners(height: int = 48, width: int = 64) -> np.ndarray:
    """A picture that no turn and no mirror leaves as it is."""
    image = np.full((height, width, 3), 30, np.uint8)
    image[: height // 3, : width // 3] = (220, 20, 20)
    image[: height // 3, -width // 3 :] = (20, 220, 20)
    image[-height // 3 :, : width // 3] = (20, 20, 220)
    return image


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.abs(a.astype(int) - b).mean() < 4)


def set_matrix(path: Path, entries: tuple[int, ...], *, height: int = 48, width: int = 64) -> None:
    """Write the display matrix into the header of the first track, shifted so that the picture begins at (0, 0)."""
    a, b, c, d = entries
    x, y = -min(0, a * width) - min(0, c * height), -min(0, b * width) - min(0, d * height)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    data[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, x << 16, y << 16, 1 << 30)
    path.write_bytes(data)


def pictures(path: Path, fps: float | None = None) -> np.ndarray:
    """(T, H, W, 3) of `read_video`."""
    return read_video(path, fps=fps).pixels.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("name", MATRICES)
def test_videos_are_shown_by_their_display_matrix(tmp_path: Path, name: str) -> None:
    entries, apply = MATRICES[name]
    encode(tmp_path / "x.mp4", np.stack([corners()] * 4), 30)
    set_matrix(tmp_path / "x.mp4", entries)
    shown = pictures(tmp_path / "x.mp4")
    assert len(shown) == 4 and all(close(image, apply(corners())) for image in shown)
    stream = open_video(tmp_path / "x.mp4")
    assert (stream.height, stream.width) == apply(corners()).shape[:2]


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_data_sets_show_the_same_pictures_as_videos(tmp_path: Path, name: str, version: str) -> None:
    entries, apply = MATRICES[name]
    episode = EpisodeArrays(np.stack([corners()] * 6), np.zeros((6, 3)), np.zeros((6, 2)))
    root = (make_v30 if version == "v3.0" else make_v2)(tmp_path, {0: episode})
    (video,) = root.rglob("*.mp4")
    set_matrix(video, entries)
    height, width = apply(corners()).shape[:2]
    np.testing.assert_array_equal(open_dataset(root).episode(0).video(), pictures(video))
    path = root / "meta" / "info.json"
    facts = json.loads(path.read_text())
    for stated in ([height, width, 3], [width, height, 3]):
        facts["features"][CAMERA]["shape"] = stated
        path.write_text(json.dumps(facts))
        problems = validate_dataset(root, decode=True)
        if stated[:2] == [height, width]:
            assert problems == []
        else:
            assert f"{CAMERA} is {width}x{height}, info.json says {height}x{width}" in problems[0].message


@pytest.mark.parametrize("orientation", EXIF)
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
def test_images_are_shown_by_their_exif_orientation(tmp_path: Path, orientation: int, kind: str) -> None:
    exif = PIL.Image.Exif()
    exif[274] = orientation
    PIL.Image.fromarray(corners()).save(tmp_path / f"0.{kind}", exif=exif, quality=95)
    expected = MATRICES[EXIF[orientation]][1](corners())
    assert close(pictures(tmp_path)[0], expected)
    data = (tmp_path / f"0.{kind}").read_bytes()
    root = stored(tmp_path / "set", [{"bytes": data, "path": None}] * 5, expected.shape)
    assert validate_dataset(root, decode=True) == []
    assert all(close(image, expected) for image in open_dataset(root).episode(0).video())


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_motion_jpeg_whose_frames_have_exif_is_turned(tmp_path: Path, orientation: int) -> None:
    import av

    exif, picture = PIL.Image.Exif(), io.BytesIO()
    exif[274] = orientation
    PIL.Image.fromarray(corners()).save(picture, "JPEG", exif=exif, quality=95)
    with av.open(str(tmp_path / "x.mkv"), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for k in range(3):
            packet = av.Packet(picture.getvalue())
            packet.pts = packet.dts = 100 * k
            packet.time_base, packet.stream = Fraction(1, 1000), stream
            container.mux(packet)
    shown = pictures(tmp_path / "x.mkv")
    assert len(shown) == 3 and all(close(image, MATRICES[EXIF[orientation]][1](corners())) for image in shown)


# ---- cover pictures --------------------------------------------------------------------------------------------------


def box(kind: bytes, *content: bytes) -> bytes:
    data = b"".join(content)
    return struct.pack(">I", 8 + len(data)) + kind + data


def with_cover(raw: bytes) -> bytes:
    """The mp4 with a cover picture before its tracks, so that the cover is stream 0; `moov` must be the last box."""
    at = 0
    while raw[at + 4 : at + 8] != b"moov":
        at += struct.unpack(">I", raw[at : at + 4])[0]
    size = struct.unpack(">I", raw[at : at + 4])[0]
    jpeg = io.BytesIO()
    PIL.Image.fromarray(np.full((100, 80, 3), 128, np.uint8)).save(jpeg, "JPEG")
    cover = box(b"covr", box(b"data", struct.pack(">II", 13, 0), jpeg.getvalue()))
    handler = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    tags = box(b"udta", box(b"meta", bytes(4), handler, box(b"ilst", cover)))
    return raw[:at] + box(b"moov", tags, raw[at + 8 : at + size].replace(b"udta", b"skip")) + raw[at + size :]


def test_the_video_is_read_and_not_its_cover(tmp_path: Path) -> None:
    import av

    episode = EpisodeArrays(np.stack([corners()] * 12), np.zeros((12, 3)), np.zeros((12, 2)))
    root = make_v2(tmp_path, {0: episode})
    (video,) = root.rglob("*.mp4")
    video.write_bytes(with_cover(video.read_bytes()))
    with av.open(str(video)) as container:
        assert container.streams[0].width == 80  # the cover comes first
    assert pictures(video).shape == (12, 48, 64, 3)
    assert open_video(video).length == 12
    assert open_dataset(root).episode(0).video().shape == (12, 48, 64, 3)
    assert validate_dataset(root, decode=True) == []


# ---- stored images ---------------------------------------------------------------------------------------------------


def stored(root: Path, cells: list[object], shape: tuple[int, ...]) -> Path:
    """A data set of one episode with images in its table or in files."""
    length = len(cells)
    episode = EpisodeArrays(np.zeros((length, 48, 64, 3), np.uint8), np.zeros((length, 3)), np.zeros((length, 2)))
    make_v2(root, {0: episode})
    path = root / "data" / "chunk-000" / "episode_000000.parquet"
    kind = pa.string() if isinstance(cells[0], str) else pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pq.read_table(path).append_column(CAMERA, pa.array(cells, kind)), path)
    info = root / "meta" / "info.json"
    facts = json.loads(info.read_text())
    facts["features"][CAMERA] = {"dtype": "image", "shape": list(shape), "names": ["height", "width", "channels"]}
    info.write_text(json.dumps(facts))
    return root


def png(image: np.ndarray) -> bytes:
    data = io.BytesIO()
    PIL.Image.fromarray(image).save(data, "PNG")
    return data.getvalue()


GOOD = png(corners())
FAULTS = {
    "size": ({"bytes": png(corners(24, 32)), "path": None}, "is 32x24, info.json says 64x48"),
    "channels": ({"bytes": png(corners()[..., 0]), "path": None}, r"is of 1 channel\(s\), info.json says 3"),
    "unreadable": ({"bytes": b"no picture", "path": None}, "not a readable image"),
    "pointer": ({"bytes": POINTER, "path": None}, "run `git lfs pull`"),
    "missing file": ({"bytes": None, "path": "images/4.png"}, r"the image images/4\.png is missing"),
    "empty": ({"bytes": None, "path": None}, "is empty"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_stored_images_are_named_with_row_and_key(tmp_path: Path, fault: str) -> None:
    cell, complaint = FAULTS[fault]
    cells: list[object] = [{"bytes": GOOD, "path": None} for _ in range(8)]
    assert validate_dataset(stored(tmp_path / "good", cells, (48, 64, 3)), decode=True) == []
    cells[4] = cell
    root = stored(tmp_path / "bad", cells, (48, 64, 3))
    with pytest.raises(DatasetError, match=complaint) as error:
        open_dataset(root).episode(0).video()
    assert f"{CAMERA} of frame 4" in str(error.value) and "\n" not in str(error.value)
    for decode in (False, True):
        (problem,) = validate_dataset(root, decode=decode)
        assert f"{CAMERA} of frame 4" in problem.message and problem.episode == 0


def test_truncated_images_are_found_by_decoding(tmp_path: Path) -> None:
    noise = png(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))
    cells = [{"bytes": noise[: len(noise) // 2 if k == 2 else None], "path": None} for k in range(4)]
    root = stored(tmp_path, cells, (48, 64, 3))
    (problem,) = validate_dataset(root, decode=True)
    assert f"{CAMERA} of frame 2: a damaged image" in problem.message


@pytest.mark.parametrize("as_text", [True, False])
def test_images_in_files_of_their_own_are_read(tmp_path: Path, as_text: bool) -> None:
    names = [f"images/{k}.png" for k in range(4)]
    root = stored(tmp_path, list(names) if as_text else [{"bytes": None, "path": x} for x in names], (48, 64, 3))
    (root / "images").mkdir()
    for name in names:
        (root / name).write_bytes(GOOD)
    assert validate_dataset(root, decode=True) == []
    np.testing.assert_array_equal(open_dataset(root).episode(0).video()[3], corners())


# ---- git LFS ---------------------------------------------------------------------------------------------------------


def test_pointers_of_git_lfs_are_recognized(tmp_path: Path) -> None:
    assert is_lfs_pointer(POINTER) and not is_lfs_pointer(POINTER + bytes(1024)) and not is_lfs_pointer(GOOD)
    assert not is_lfs_pointer(tmp_path) and not is_lfs_pointer(tmp_path / "absent")
    (tmp_path / "x").write_bytes(POINTER)
    assert is_lfs_pointer(tmp_path / "x")


@pytest.mark.parametrize("pattern", ["*.mp4", "*.parquet", "info.json", "episodes.jsonl"])
def test_a_pointer_in_a_data_set_is_one_line_with_the_remedy(tmp_path: Path, pattern: str) -> None:
    episode = EpisodeArrays(np.stack([corners()] * 6), np.zeros((6, 3)), np.zeros((6, 2)))
    root = make_v2(tmp_path, {0: episode})
    (path,) = root.rglob(pattern)
    path.write_bytes(POINTER)
    assert_names_the_remedy(
        lambda: open_dataset(root).episode(0).state.sum() + open_dataset(root).episode(0).video().sum()
    )
    problems = validate_dataset(root)
    assert problems and all("git-LFS pointer" in p.message and "git lfs pull" in p.remedy for p in problems)


@pytest.mark.parametrize("name", ["x.mp4", "folder/0.png", "folder/0.jpg", "x.gif"])
def test_a_pointer_in_the_place_of_a_video_or_image(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(POINTER)
    with pytest.raises(VideoError):
        read_video(path.parent if "/" in name else path)
    assert_names_the_remedy(lambda: read_video(path.parent if "/" in name else path))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pointer_in_a_checkpoint(tmp_path: Path, name: str) -> None:
    for file in ("model.safetensors", "config.json"):
        (tmp_path / file).write_bytes(POINTER if file == name else b"{}")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)
    assert_names_the_remedy(lambda: load_checkpoint(tmp_path))


def assert_names_the_remedy(read: object) -> None:
    with pytest.raises(JidmError, match="git-LFS pointer, not the file itself; run `git lfs pull`") as error:
        read()  # type: ignore[operator]
    assert "\n" not in str(error.value)
