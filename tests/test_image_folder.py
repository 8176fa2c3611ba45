"""Names of images are ordered by the numbers in them; names with two readings are refused."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from jidm import read_video
from jidm.errors import VideoError
from jidm.video.image_folder import image_files


def order(folder: Path, stems: list[str], suffix: str = ".png") -> list[str]:
    """The order of empty files that were made in another one."""
    for stem in random.Random(0).sample(stems, len(stems)):
        (folder / f"{stem}{suffix}").touch()
    return [file.stem for file in image_files(folder)]


IN_ORDER = {
    "times": [str(1700000000 + k * 0.025) for k in range(60)],
    "times of two decimals": [str(k / 100) for k in range(130)],
    "a part of such times": [str((11 + k) / 100) for k in range(11)],
    "quarters": [str(k / 4) for k in range(50)],
    "short forms of times": [f"{k / 4:g}" for k in range(50)],
    "fixed decimals of growing numbers": [f"{x:.3f}" for x in (0.5, 1.25, 10.125)],
    "integers": [str(k) for k in range(120)],
    "padded": [f"{k:04d}" for k in range(120)],
    "nanoseconds": [str(1700000000000000000 + 25_000_000 * k) for k in range(12)],
    "a prefix": [f"frame_{k}" for k in range(120)],
    "a dash is no minus": [f"frame-{k}" for k in range(12)],
    "prefix, time and camera": [f"cam0_{1.5 + k * 0.25}_rgb" for k in range(20)],
    "negative times": [str((k - 5) * 0.5) for k in range(12)],
    "negative numbers": [str(k) for k in range(-12, 0)],
    "negative times in a name": [f"t{(k - 5) * 0.5}s" for k in range(12)],
    "scientific": [str(k * 1e-5) for k in range(1, 30)],
    "scientific in a name": [f"t_{k * 1e-5}" for k in range(1, 30)],
    "parts with counters": [f"{part}.{k}" for part in (1, 2) for k in range(1, 13)],
    "dates with counters": [f"2024-01-0{day}_{k}" for day in (1, 2) for k in range(12)],
    "versions": [f"1.2.{k}" for k in range(12)],
    "one without number": ["img", "img1", "img2", "img10"],
}


@pytest.mark.parametrize("names", IN_ORDER.values(), ids=IN_ORDER)
def test_order(tmp_path: Path, names: list[str]) -> None:
    assert order(tmp_path, names) == names


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["1.8", "1.9", "1.11", "1.12"], "may be decimal numbers or pairs of counters"),
        (["1.5", "1.7", "1.10", "1.20"], "may be decimal numbers or pairs of counters"),
        (["1", "01", "2"], "01.png and 1.png have the same number"),
        (["t1.5", "t1.50"], "may be decimal numbers or pairs of counters"),
        (["t0.05", "t0.5", "t0.50"], "have the same number"),
        (["1e-5", "0.00001"], "have the same number"),
    ],
)
def test_ambiguous_names_are_refused(tmp_path: Path, names: list[str], complaint: str) -> None:
    with pytest.raises(VideoError, match=complaint) as error:
        order(tmp_path, names)
    assert "\n" not in str(error.value) and "frame_000012.png" in str(error.value)


def test_two_formats_of_one_number_are_refused(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").touch()
    with pytest.raises(VideoError, match=r"1\.jpg and 1\.png have the same number"):
        order(tmp_path, ["1", "2"])


def test_images_named_by_time_are_read_in_order_of_time(tmp_path: Path) -> None:
    for k in range(12):
        gray = np.full((16, 16, 3), 10 * k + 5, np.uint8)
        PIL.Image.fromarray(gray).save(tmp_path / f"{1700000000 + k * 0.025}.png")
    assert read_video(tmp_path, fps=40).pixels[:, 0, 0, 0].tolist() == [10 * k + 5 for k in range(12)]
