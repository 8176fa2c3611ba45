"""Video files: write and read, presentation times, broken files."""

from __future__ import annotations

import gc
import struct
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import material
from torch import Tensor

from jidm.errors import InputError, VideoError
from jidm.video.io import Video, open_video, read_video, write_video

PIL = pytest.importorskip("PIL.Image")


def clip(t: int = 12, h: int = 48, w: int = 64) -> Tensor:
    """(T, 3, H, W) smooth moving colors, so that chroma subsampling and x264 lose little."""
    v, u = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    phase = torch.arange(t)[:, None, None] * 0.7
    waves = [torch.sin(u / 9 + phase), torch.cos(v / 7 - phase), torch.sin((u + v) / 11 + phase)]
    return torch.stack([0.5 + 0.4 * x for x in waves], 1).float()


def encode(
    path: Path, frames: np.ndarray, pts: list[int] | None = None, *, fmt: str = "yuv420p", movflags: str = ""
) -> Path:
    """An independent writer: (T, H, W, 3) uint8 at 1/30 s ticks `pts`."""
    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], fmt
        stream.codec_context.time_base = Fraction(1, 30)
        stream.options = {"crf": "8", "g": "5"}
        for k, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = (pts or range(len(frames)))[k], Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def as_bytes(video: Tensor) -> np.ndarray:
    return (video * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


# ---- write and read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(48, 64), (47, 64), (48, 63), (33, 45), (2, 2), (1, 1)])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_written_video_reads_back(tmp_path: Path, size: tuple[int, int], suffix: str) -> None:
    truth = clip(7, *size)
    path = tmp_path / f"clip{suffix}"
    write_video(path, truth, 16, layout="TCHW")
    got = read_video(path)
    assert got.pixels.dtype == torch.uint8 and got.frames.shape == truth.shape
    assert (got.frames - truth).abs().mean() < 0.03
    torch.testing.assert_close(got.time, torch.arange(7, dtype=torch.float64) / 16, rtol=0, atol=1e-3)
    assert got.fps == pytest.approx(16, rel=2e-2)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_every_kind_of_frame_can_be_written(tmp_path: Path) -> None:
    truth = clip()
    images = as_bytes(truth)
    kinds = {
        "tensor": truth,
        "bytes, channels last": images,
        "Video": Video(torch.from_numpy(images).permute(0, 3, 1, 2), None),
        "signed": truth * 2 - 1,
        "iterator of tensors": (frame for frame in truth),
        "iterator of arrays": iter(images),
        "iterator of float arrays": (image / 255 for image in images),
        "iterator of PIL": (PIL.fromarray(image) for image in images),
    }
    for name, frames in kinds.items():
        write_video(tmp_path / "x.mp4", frames, 29.97)
        got = read_video(tmp_path / "x.mp4")
        assert (got.frames - truth).abs().mean() < 0.03, name
        assert got.fps == pytest.approx(29.97, abs=0.01), name


def test_bright_frames_of_an_iterator_are_not_rescaled(tmp_path: Path) -> None:
    """The range of single frames is not inferred: floats of an iterator are [0, 1], or refused."""
    write_video(tmp_path / "x.mp4", iter([torch.full((3, 16, 16), 0.9)] * 3), 10)
    assert read_video(tmp_path / "x.mp4").frames.mean() == pytest.approx(0.9, abs=0.02)
    with pytest.raises(VideoError, match="outside value_range"):
        write_video(tmp_path / "x.mp4", iter([torch.full((3, 16, 16), -0.9)] * 3), 10)


def test_nan_is_written_black(tmp_path: Path) -> None:
    frames = torch.full((4, 3, 16, 16), 0.8)
    frames[2] = torch.nan
    write_video(tmp_path / "x.mp4", frames, 10)
    means = read_video(tmp_path / "x.mp4").frames.mean((1, 2, 3))
    assert means[2] < 0.05 and means[1] > 0.7


def test_colors_are_tagged_as_they_are_encoded(tmp_path: Path) -> None:
    """HD players assume BT.709 without a tag; OpenCV, an independent reader, must decode the same red."""
    import cv2

    red = torch.tensor([0.8, 0.2, 0.1])[:, None, None].expand(3, 720, 1280)
    write_video(tmp_path / "x.mp4", iter([red] * 2), 10)
    with av.open(str(tmp_path / "x.mp4")) as container:
        assert int(next(container.decode(video=0)).colorspace) == 5
    capture = cv2.VideoCapture(str(tmp_path / "x.mp4"))
    _, bgr = capture.read()
    np.testing.assert_allclose(bgr[300, 300, ::-1], red[:, 0, 0] * 255, atol=6)


def test_failure_keeps_the_old_file_and_leaves_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    path.write_bytes(b"old")

    def broken() -> Iterator[Tensor]:
        yield from clip(1).expand(90, 3, 48, 64)  # long enough for the encoder to start the file
        raise KeyError("an error of the caller")

    with pytest.raises(KeyError, match="error of the caller"):
        write_video(path, broken(), 10)
    for frames, message in [
        (iter([]), "no frames"),
        (iter([torch.zeros(3, 8, 8), torch.zeros(3, 8, 10)]), "differ in size"),
        (torch.rand(2, 3, 3, 8, 8), "layout="),
        (torch.rand(2, 4, 3, 8, 8), "batch"),
    ]:
        with pytest.raises(VideoError, match=message):
            write_video(path, frames, 10)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x.mp4"]
    for bad in (tmp_path / "absent" / "x.mp4", tmp_path / "x.nonsense"):
        with pytest.raises(InputError, match="cannot be written"):
            write_video(bad, clip(2), 10)
    for fps in (0, -1, float("nan")):
        with pytest.raises(VideoError, match="fps"):
            write_video(path, clip(2), fps)


# ---- time -----------------------------------------------------------------------------------------------------------


def test_variable_frame_rate_keeps_its_times(tmp_path: Path) -> None:
    pts = [0, 1, 2, 6, 7, 12, 13, 20]
    path = encode(tmp_path / "x.mp4", as_bytes(clip(8)), pts)
    got = read_video(path)
    torch.testing.assert_close(got.time, torch.tensor(pts, dtype=torch.float64) / 30, rtol=0, atol=1e-4)
    whole = read_video(path, fps=15)
    torch.testing.assert_close(whole.time, torch.arange(11, dtype=torch.float64) / 15, rtol=0, atol=1e-9)
    for tick, frame in zip(whole.time, whole.pixels, strict=True):
        nearest = int((got.time - tick).abs().argmin())
        chosen = [k for k in range(8) if torch.equal(frame, got.pixels[k])]
        assert abs(float(got.time[chosen[0]] - tick)) <= abs(float(got.time[nearest] - tick)) + 1e-3


def test_resampling_to_the_same_rate_is_the_identity(tmp_path: Path) -> None:
    write_video(tmp_path / "x.mp4", clip(9), 12)
    once = read_video(tmp_path / "x.mp4")
    again = read_video(tmp_path / "x.mp4", fps=12)
    assert torch.equal(once.pixels, again.pixels)
    with pytest.raises(VideoError, match="fps"):
        read_video(tmp_path / "x.mp4", fps=0)


def test_a_stream_equals_the_video_and_can_seek(tmp_path: Path) -> None:
    write_video(tmp_path / "x.mp4", clip(40), 20)
    whole, stream = read_video(tmp_path / "x.mp4"), open_video(tmp_path / "x.mp4")
    assert (stream.length, stream.fps, stream.height, stream.width) == (40, 20.0, 48, 64)
    for _ in range(2):  # every iteration starts at the first frame
        assert torch.equal(torch.stack(list(stream)), whole.frames)
    late = list(stream.pixels(start=1.3))
    assert [t for t, _ in late] == pytest.approx(whole.time[26:].tolist())
    assert torch.equal(torch.stack([p for _, p in late]), whole.pixels[26:])
    assert list(stream.pixels(start=99.0)) == []


def test_slicing_keeps_times(tmp_path: Path) -> None:
    write_video(tmp_path / "x.mp4", clip(10), 10)
    part = read_video(tmp_path / "x.mp4")[2:6]
    assert len(part) == 4 and part.time is not None and part.time[0] == pytest.approx(0.2)


def test_rotation_is_applied(tmp_path: Path) -> None:
    """A phone's portrait video: the display matrix of the track header turned by 90 degrees clockwise."""
    frames = as_bytes(clip(3))
    data = bytearray(encode(tmp_path / "x.mp4", frames).read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    # ISO 14496-12: x' = a x + c y + tx, y' = b x + d y + ty, so (0, 0) goes to the top right corner.
    data[matrix : matrix + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 48 * one, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    upright, turned = read_video(tmp_path / "x.mp4"), read_video(tmp_path / "turned.mp4")
    assert torch.equal(turned.pixels, torch.rot90(upright.pixels, -1, (-2, -1)))


# ---- images ---------------------------------------------------------------------------------------------------------


def test_folder_of_images_in_natural_order(tmp_path: Path) -> None:
    frames = as_bytes(clip(12))
    for k, image in enumerate(frames):
        PIL.fromarray(image).save(tmp_path / f"frame_{k}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    got = read_video(tmp_path)
    assert torch.equal(got.pixels, torch.from_numpy(frames).permute(0, 3, 1, 2))
    assert got.time is None and got.fps is None
    timed = read_video(tmp_path, fps=4)
    assert timed.fps == pytest.approx(4) and open_video(tmp_path, fps=4).length == 12


@pytest.mark.parametrize("kind", ["gray", "rgba", "palette", "jpg", "bmp", "tif", "gray16"])
def test_kinds_of_images(tmp_path: Path, kind: str) -> None:
    rgb = as_bytes(clip(1, 31, 45))[0]
    image, truth = PIL.fromarray(rgb), rgb.astype(float)
    if kind == "gray":
        image = PIL.fromarray(rgb[..., 0])
        truth = np.repeat(rgb[..., :1], 3, -1).astype(float)
    elif kind == "gray16":
        image = PIL.fromarray(rgb[..., 0].astype(np.uint16) * 257)
        truth = np.repeat(rgb[..., :1], 3, -1).astype(float)
    elif kind == "rgba":
        alpha = np.linspace(0, 255, rgb[..., 0].size).astype(np.uint8).reshape(rgb.shape[:2])
        image, truth = PIL.fromarray(np.dstack([rgb, alpha])), rgb * (alpha[..., None] / 255.0)
    elif kind == "palette":
        image = image.quantize(64)
        truth = np.asarray(image.convert("RGB")).astype(float)
    suffix = kind if kind in ("jpg", "bmp", "tif") else "png"
    image.save(tmp_path / f"0.{suffix}", **({"quality": 98, "subsampling": 0} if suffix == "jpg" else {}))
    got = read_video(tmp_path).pixels[0].permute(1, 2, 0).numpy().astype(float)
    assert np.abs(got - truth).max() <= (6 if suffix == "jpg" else 1)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="no images"):
        read_video(tmp_path)
    PIL.new("RGB", (8, 8)).save(tmp_path / "0.png")
    PIL.new("RGB", (9, 8)).save(tmp_path / "1.png")
    with pytest.raises(VideoError, match=r"1\.png.*9x8.*8x8"):
        read_video(tmp_path)
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes()[:40])
    with pytest.raises(VideoError, match=r"1\.png"):
        read_video(tmp_path)


# ---- broken files ---------------------------------------------------------------------------------------------------


def big_clip(path: Path) -> bytes:
    """Faststart, so that a truncated file still declares all its frames; textured, so that damage changes images."""
    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    frames = np.stack([np.roll(noise, 3 * k, 1) for k in range(30)])
    return encode(path, frames, movflags="faststart").read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9, 0.99])
def test_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    data = big_clip(tmp_path / "whole.mp4")
    path = tmp_path / "cut.mp4"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(VideoError, match=r"cut\.mp4.*(copy|encode)"):
        read_video(path)


@pytest.mark.parametrize("missing", [1, 4, 20])
def test_truncation_between_two_frames_is_detected(tmp_path: Path, missing: int) -> None:
    """No frame is damaged; only the frame count and the declared end reveal it."""
    data = big_clip(tmp_path / "whole.mp4")
    with av.open(str(tmp_path / "whole.mp4")) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    # B-frames are stored out of order: cut so that the remaining frames are the first ones in presentation order.
    keep = len(packets) - missing
    while max(p.pts for p in packets[:keep]) != sorted(p.pts for p in packets)[keep - 1]:
        keep -= 1
    path = tmp_path / "cut.mp4"
    path.write_bytes(data[: packets[keep].pos])
    with pytest.raises(VideoError, match=r"cut\.mp4"):
        read_video(path)


def test_long_last_frame_is_not_a_truncation(tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    even = encode(tmp_path / "even.mp4", as_bytes(clip(6)))
    with av.open(str(even)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [p for p in source.demux(video=0) if p.size]
        packets[-1].duration *= 50  # the last frame lasts nearly two seconds
        for packet in packets:
            packet.stream = stream
            target.mux(packet)
    with av.open(str(path)) as container:
        assert container.streams.video[0].duration * container.streams.video[0].time_base > 1.5
    assert len(read_video(path)) == 6


def test_damaged_bytes_are_detected(tmp_path: Path) -> None:
    """The decoder stops, or marks concealed frames. Damage that parses without a mark cannot be detected."""
    whole = big_clip(tmp_path / "whole.mp4")
    path = tmp_path / "damaged.mp4"
    refused = 0
    for seed in range(12):
        rng, data = np.random.default_rng(seed), bytearray(whole)
        start = int(rng.uniform(0.2, 0.95) * len(data))
        data[start : start + 100] = rng.integers(0, 256, 100, dtype=np.uint8).tobytes()
        path.write_bytes(bytes(data))
        try:
            assert len(read_video(path)) == 30
        except VideoError as error:
            assert "damaged.mp4" in str(error) and ("copy" in str(error) or "encode" in str(error))
            refused += 1
    print(f"{refused} of 12 damaged files were refused")
    assert refused >= 8


def test_not_a_video(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="no such file"):
        read_video(tmp_path / "absent.mp4")
    (tmp_path / "text.mp4").write_text("hello " * 100)
    with pytest.raises(VideoError, match=r"text\.mp4: not a readable video"):
        open_video(tmp_path / "text.mp4")
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match=r"holds no images \(audio\)"):
        read_video(tmp_path / "sound.wav")


def test_one_frame_and_too_many(tmp_path: Path) -> None:
    write_video(tmp_path / "x.mp4", clip(1), 10)
    assert len(read_video(tmp_path / "x.mp4")) == 1
    write_video(tmp_path / "x.mp4", clip(8), 10)
    with pytest.raises(VideoError, match="open_video"):
        read_video(tmp_path / "x.mp4", max_bytes=5 * 3 * 48 * 64)


# ---- third-party files ----------------------------------------------------------------------------------------------


def test_third_party_video() -> None:
    folder = material("aloha_sim")
    stream = open_video(folder / "aloha_sim_insertion_human.mp4")
    states = np.load(folder / "aloha_sim_insertion_human_state.npz")
    assert (stream.height, stream.width, stream.fps, stream.length) == (480, 640, 50.0, len(states["qpos"]))
    times = []
    for time, _ in stream.pixels(start=9.0):
        times.append(time)
    np.testing.assert_allclose(times, states["timestamp"][states["timestamp"] > 8.999], atol=1e-3)


def test_frames_are_freed_while_a_video_is_read(tmp_path: Path) -> None:
    """Not by the garbage collector, which counts objects and not their memory."""
    path = tmp_path / "v.mp4"
    write_video(path, (np.full((32, 48, 3), k, np.uint8) for k in range(60)), 30)
    gc.collect()
    gc.disable()
    try:
        alive = [sum(type(x) is av.VideoFrame for x in gc.get_objects()) for _ in open_video(path).pixels()]
    finally:
        gc.enable()
    assert len(alive) == 60 and max(alive) <= 16  # what decoding threads hold


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_ten_minutes_stream_in_little_memory(tmp_path: Path) -> None:
    program = f"""
import re, torch
from pathlib import Path
from jidm.video.io import open_video, write_video
ramp = torch.linspace(0, 1, 320).expand(3, 240, 320)
write_video({str(tmp_path / "long.mp4")!r}, (ramp.roll(k, -1) for k in range(18000)), 30)
count = sum(1 for _ in open_video({str(tmp_path / "long.mp4")!r}))
# Not ru_maxrss: in a child started by vfork it includes the parent's peak.
peak_kib = re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text()).group(1)
print(count, int(peak_kib) / 2**20)
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    print(f"18000 frames of 320x240 written and streamed in {float(answer[1]):.2f} GiB")
    assert int(answer[0]) == 18000 and float(answer[1]) < 1.0
