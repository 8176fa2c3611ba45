"""A recording as tables that training reads at random: every picture decoded once, at the size the model sees.

Tables lie in a cache folder as memory-mapped arrays, so several processes share them and a second run starts at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from jidm.errors import DatasetError, did_you_mean
from jidm.fields.free.blocks import downsample
from jidm.training.data.batch import FIELD_STRIDE, JointStats
from jidm.training.data.cache import cached_folder, default_cache
from jidm.video.letterbox import Letterbox

_TABLE_VERSION = 3
_CORRELATION_SHRINKAGE = 0.05  # share by which joints are thought to move on their own, whatever was recorded
_STATIC_THRESHOLD = 1e-4
"""Joints whose steps spread less than this [rad or m] count as not moving; scales are not taken below it."""


@dataclass(frozen=True, eq=False)
class Geometry:
    """What self-play knows beyond pictures, for the N frames of a recording, on the grid of the field.

    Attributes:
        depth: (N, y, x) float32 distance along the optical axis [m]; 0 off the robot.
        link: (N, y, x) int16 link index, -1 = not the robot.
        intrinsics: (N, 4) float64 fx, fy, cx, cy of the training picture [px].
        T_camera_base: (N, 4, 4) float64.
    """

    depth: Float[Tensor, "N y x"]
    link: Int[Tensor, "N y x"]
    intrinsics: Float[Tensor, "N 4"]
    T_camera_base: Float[Tensor, "N 4 4"]


@dataclass(frozen=True, eq=False)
class FrameStore:
    """N frames of E episodes, one after the other.

    Attributes:
        frames: (N, 3, detail H, detail W) uint8 RGB; everything else is told in pixels of the (H, W) training picture.
        state: (N, m) float64 all recorded joint positions [rad or m], in the order of `state_names`.
        joints: (n,) columns of `state` that are learned.
        state_names: names of the m columns.
        episode: (E,) episode indices; first: (E,) row of each one's first frame; length: (E,).
        fps: frame rate [1/s].
        letterbox: how the recorded pictures lie in the training pictures.
        input_scale: how much larger the frames are than those; 1 where they were reduced.
        geometry: None where the recording does not hold it.
        source: the folder, for messages. cache_key: names this recording's tables. source_hash: names the pictures it could show,
            whichever of their episodes it holds.
    """

    frames: UInt8[Tensor, "N 3 picture_height picture_width"]
    state: Float[Tensor, "N m"]
    joints: Int[Tensor, " n"]
    state_names: tuple[str, ...]
    episode: Int[Tensor, " E"]
    first: Int[Tensor, " E"]
    length: Int[Tensor, " E"]
    fps: float
    letterbox: Letterbox
    geometry: Geometry | None
    source: str
    cache_key: str
    source_hash: str
    input_scale: int = 1

    @property
    def joint_names(self) -> tuple[str, ...]:
        """Names of the n learned joints."""
        return tuple(self.state_names[i] for i in self.joints.tolist())

    @property
    def q(self) -> Float[Tensor, "N n"]:
        """Positions of the learned joints [rad or m]."""
        return self.state[:, self.joints]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the training pictures."""
        return self.letterbox.height, self.letterbox.width

    def __len__(self) -> int:
        return len(self.frames)

    def stats(self, strides: Sequence[int] = (1,)) -> JointStats:
        """Positions over all frames, steps over all pairs of the given strides, within episodes.

        A joint that never moves has a spread of 1e-4, so that dividing by it stays finite.
        """
        q = self.q
        steps = [q[a + k : a + n] - q[a : a + n - k] for a, n in self._spans() for k in strides if n > k]
        delta = torch.cat(steps) if steps else q[:0]
        std = delta.square().mean(0).sqrt() if len(delta) else torch.zeros(q.shape[1])

        def numbers(x: Tensor) -> tuple[float, ...]:
            return tuple(x.tolist())

        normalized = delta / std.clamp(min=_STATIC_THRESHOLD)
        correlation = _CORRELATION_SHRINKAGE * torch.eye(len(std)).to(q)
        correlation = correlation + (1 - _CORRELATION_SHRINKAGE) * (normalized.mT @ normalized / max(1, len(delta)))
        correlation.fill_diagonal_(1.0)
        return JointStats(
            q_mean=numbers(q.mean(0)), q_std=numbers(q.std(0, correction=0).clamp(min=_STATIC_THRESHOLD)),
            delta_std=numbers(std.clamp(min=_STATIC_THRESHOLD)), q_lower=numbers(q.amin(0)), q_upper=numbers(q.amax(0)),
            delta_correlation=tuple(numbers(row.round(decimals=4)) for row in correlation),
        )  # fmt: skip

    def static_joints(self) -> tuple[str, ...]:
        """Joints of `joint_names` that do not move anywhere in the recording."""
        span = self.q.amax(0) - self.q.amin(0)
        return tuple(name for name, x in zip(self.joint_names, span.tolist()) if x < _STATIC_THRESHOLD)

    def _spans(self) -> Iterator[tuple[int, int]]:
        yield from zip(self.first.tolist(), self.length.tolist())


def load_frame_store(
    dataset: Any, episodes: Sequence[int], *, height: int, width: int, input_scale: int = 1, downsampled: bool = False,
    camera: str | None = None, joints: Sequence[str] = (), order: Sequence[str] = (), cache: str | Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> FrameStore:  # fmt: skip
    """The tables of some episodes, decoded now or taken from the cache.

    Args:
        dataset: a `RecordedDataset`.
        episodes: indices, in the order of the tables.
        height, width: size of the training pictures [px], multiples of 4. input_scale: how much larger the model's own are.
        downsampled: keep frames of height x width only, reduced from the larger ones as the model does it: all it needs
            where it does not look closer.
        camera: which camera; may be left out where there is only one.
        joints: names of the joints to learn; all if empty.
        order: order of all joints, a robot's for instance; the data set's own if empty.
        cache: folder for tables; `default_cache()` if not given.
        progress: called with lines that tell how far the decoding is.

    Raises:
        DatasetError: no such camera or joint, no episodes, or episodes that contradict themselves.
    """
    camera = select_camera(dataset, camera)
    names = tuple(order) or tuple(dataset.joint_names)
    columns = _columns(names, dataset.joint_names, dataset.root)
    chosen = _columns(joints or names, names, dataset.root)
    if not episodes:
        raise DatasetError(f"{dataset.root}: no episodes are chosen; choose some of {len(dataset)}")
    source_hash = _source_hash(dataset, camera, height, width)
    key = (
        f"{Path(dataset.root).name}-{height}x{width}-{digest([source_hash, list(episodes), input_scale, downsampled])}"
    )
    folder = cached_folder(
        Path(cache or default_cache()) / key,
        lambda new: _make_tables(
            dataset, tuple(episodes), camera, (height, width), input_scale, downsampled, new, progress
        ),
    )
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    length = torch.tensor(index["length"])
    geometry = None
    if (folder / "link.npy").exists():
        geometry = Geometry(*(_open_table(folder, name) for name in ("depth", "link", "intrinsics", "T_camera_base")))
    return FrameStore(
        frames=_open_table(folder, "frames"), state=_open_table(folder, "state")[:, columns].contiguous(), joints=torch.tensor(chosen),
        state_names=names, episode=torch.tensor(list(episodes)), first=length.cumsum(0) - length, length=length,
        fps=float(dataset.fps), letterbox=Letterbox(index["size"][0], index["size"][1], height, width), geometry=geometry, source=str(dataset.root), cache_key=key, source_hash=source_hash,
        input_scale=1 if downsampled else input_scale,
    )  # fmt: skip


def image_size(dataset: Any, camera: str) -> tuple[int, int]:
    """(height, width) of a camera's recorded pictures."""
    height, width = dataset.features[f"observation.images.{camera}"].shape[:2]
    return int(height), int(width)


def select_camera(dataset: Any, camera: str | None) -> str:
    """The named camera, or the only one.

    Raises:
        DatasetError: there is none of that name, or several and no name.
    """
    if camera is None and len(dataset.cameras) == 1:
        return str(dataset.cameras[0])
    if camera not in dataset.cameras:
        wanted = f"has no camera '{camera}'" if camera else "has several cameras, name one"
        raise DatasetError(f"{dataset.root}: {wanted}: {did_you_mean(camera or '', dataset.cameras)}")
    return str(camera)


# ---- building the tables ---------------------------------------------------------------------------------------------


def _make_tables(
    dataset: Any,
    episodes: tuple[int, ...],
    camera: str,
    size: tuple[int, int],
    input_scale: int,
    downsampled: bool,
    folder: Path,
    progress: Callable[[str], None],
) -> None:
    lengths = [int(dataset.episode(i).length) for i in episodes]
    writer = _TableWriter(folder, sum(lengths), *size, input_scale, downsampled)
    for done, (index, length) in enumerate(zip(episodes, lengths)):
        writer.add(dataset.episode(index), camera, length)
        if (done + 1) % max(1, len(episodes) // 10) == 0:
            progress(f"decoded {done + 1} of {len(episodes)} episodes")
    writer.close({"length": lengths, "episodes": list(episodes), "size": list(writer.size_in)})


class _TableWriter:
    """Memory-mapped tables, filled episode by episode."""

    def __init__(self, folder: Path, count: int, height: int, width: int, input_scale: int, downsampled: bool) -> None:
        self.folder, self.count, self.size, self.input_scale = folder, count, (height, width), input_scale
        self.downsampled = downsampled
        self.row = 0
        self.size_in: tuple[int, int] = (0, 0)
        self.tables: dict[str, NDArray[Any]] = {}

    def add(self, episode: Any, camera: str, length: int) -> None:
        video, state = episode.video(camera), np.asarray(episode.state, dtype=np.float64)
        if len(video) != length or len(state) != length:
            raise DatasetError(
                f"episode {episode.index}: {len(video)} pictures and {len(state)} states for {length} frames; "
                f"run `jidm dataset check`"
            )
        if not np.isfinite(state).all():
            raise DatasetError(f"episode {episode.index}: a joint position is not finite; run `jidm dataset check`")
        size_in = (video.shape[1], video.shape[2])
        if self.size_in not in ((0, 0), size_in):
            raise DatasetError(
                f"episode {episode.index}: pictures are {size_in}, earlier ones {self.size_in}; split the set"
            )
        self.size_in = size_in
        letterbox = Letterbox(*size_in, *self.size)
        pixels = torch.from_numpy(np.ascontiguousarray(video)).permute(0, 3, 1, 2)
        full_letterbox = Letterbox(*size_in, *(side * self.input_scale for side in self.size))
        self._append(
            "frames",
            torch.cat(
                [self._maybe_downsample(full_letterbox.apply_to_uint8(part)) for part in pixels.split(64)]
            ).numpy(),
        )
        self._append("state", state)
        extras = [f"observation.{kind}.{camera}" for kind in ("depth", "links", "camera")]
        if known := _extras(episode, extras):
            depth, link, pose = known
            for name, value in letterbox_geometry(depth, link, pose, letterbox).items():
                self._append(name, value)
        self.row += length

    def _maybe_downsample(self, pixels: Tensor) -> Tensor:
        if not self.downsampled or self.input_scale == 1:
            return pixels
        return downsample(pixels.float(), self.input_scale).round().to(torch.uint8)

    def _append(self, name: str, values: NDArray[Any]) -> None:
        if name not in self.tables:
            if self.row:
                raise DatasetError(f"some episodes have {name} and some have not; record all of them alike")
            shape = (self.count, *values.shape[1:])
            self.tables[name] = np.lib.format.open_memmap(
                self.folder / f"{name}.npy", mode="w+", dtype=values.dtype, shape=shape
            )
        self.tables[name][self.row : self.row + len(values)] = values

    def close(self, index: dict[str, Any]) -> None:
        for table in self.tables.values():
            table.flush()  # type: ignore[attr-defined]
        self.tables.clear()
        (self.folder / "index.json").write_text(json.dumps(index), encoding="utf-8")


def _extras(episode: Any, keys: Sequence[str]) -> list[NDArray[Any]] | None:
    try:
        return [np.asarray(episode.column(key)) for key in keys]
    except (KeyError, DatasetError):
        return None


def letterbox_geometry(
    depth: NDArray[Any], link: NDArray[Any], pose: NDArray[Any], letterbox: Letterbox
) -> dict[str, NDArray[Any]]:
    """Recorded depth, links and cameras of T frames as those of the training picture and the grid of its field.

    Args:
        depth, link: (T, h_in, w_in) on a coarse grid over the recorded picture.
        pose: (T, 16) fx, fy, cx, cy [px of the recorded picture], then T_camera_base's upper rows.

    Returns:
        depth float32 and link int16 (T, H/2, W/2), intrinsics (T, 4) and T_camera_base (T, 4, 4), as in `Geometry`.
    """
    h, w = letterbox.height // FIELD_STRIDE, letterbox.width // FIELD_STRIDE
    if not (letterbox.is_identity and depth.shape[1:] == (h, w)):
        depth, link = _resample(depth, link, letterbox, h, w)
    scale, offset = np.array([letterbox.scale_u, letterbox.scale_v]), np.array([letterbox.left, letterbox.top])
    K = np.asarray(pose[:, :4], dtype=np.float64)
    T = np.tile(np.eye(4), (len(pose), 1, 1))
    T[:, :3] = np.asarray(pose[:, 4:], dtype=np.float64).reshape(-1, 3, 4)
    return {
        "depth": np.ascontiguousarray(depth, dtype=np.float32),
        "link": np.ascontiguousarray(link, dtype=np.int16),
        "intrinsics": np.concatenate([K[:, :2] * scale, (K[:, 2:] + 0.5) * scale - 0.5 + offset], axis=1),
        "T_camera_base": T,
    }


def _resample(
    depth: NDArray[Any], link: NDArray[Any], letterbox: Letterbox, h: int, w: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """On another grid: the nearest cell's link; between four cells of one link 1/depth is linear, as on a plane."""

    def axis(cells: int, offset: int, inner: int, cells_in: int) -> tuple[NDArray[Any], NDArray[Any]]:
        position = (np.arange(cells) + 0.5) * FIELD_STRIDE - offset  # from the picture's edge, in training pixels
        x = position * (cells_in / inner) - 0.5
        return x, (position > 0) & (position < inner)

    v, row_inside = axis(h, letterbox.top, letterbox.inner_height, depth.shape[1])
    u, column_inside = axis(w, letterbox.left, letterbox.inner_width, depth.shape[2])

    def at(table: NDArray[Any], rows: NDArray[Any], columns: NDArray[Any]) -> NDArray[Any]:
        rows = np.clip(rows, 0, table.shape[1] - 1).astype(int)
        columns = np.clip(columns, 0, table.shape[2] - 1).astype(int)
        return np.asarray(table[:, rows[:, None], columns[None]])

    nearest = at(link, np.round(v), np.round(u))
    inverse = 1 / np.where(link >= 0, np.maximum(depth, 1e-6), 1.0)
    fv, fu = (v - np.floor(v))[:, None], (u - np.floor(u))[None]
    mixed, alike = np.zeros(nearest.shape), np.ones(nearest.shape, dtype=bool)
    for rows, share_v in ((np.floor(v), 1 - fv), (np.floor(v) + 1, fv)):
        for columns, share_u in ((np.floor(u), 1 - fu), (np.floor(u) + 1, fu)):
            mixed += at(inverse, rows, columns) * share_v * share_u
            alike &= at(link, rows, columns) == nearest
    z = np.where(alike, 1 / mixed, at(depth, np.round(v), np.round(u)))
    on_robot = (nearest >= 0) & row_inside[:, None] & column_inside[None]
    return np.where(on_robot, z, 0.0), np.where(on_robot, nearest, -1)


def _open_table(folder: Path, name: str) -> Tensor:
    # Copy on write: torch wants writable memory, and the file must not change.
    return torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c"))


def _columns(wanted: Sequence[str], names: Sequence[str], where: Any) -> list[int]:
    for name in wanted:
        if name not in names:
            raise DatasetError(f"{where}: no joint '{name}' is recorded: {did_you_mean(name, names)}")
    if len(set(wanted)) != len(wanted):
        raise DatasetError(f"{where}: a joint is chosen twice: {', '.join(wanted)}")
    return [list(names).index(name) for name in wanted]


def _source_hash(dataset: Any, camera: str, height: int, width: int) -> str:
    """Names pictures by everything they depend on; videos by size and time of change, because hashing takes longer."""
    files = sorted((dataset.root / "videos").rglob("*.mp4")) if (dataset.root / "videos").is_dir() else []
    files = files or sorted(Path(dataset.root).rglob("*.mp4"))
    seen = [(str(x.relative_to(dataset.root)), x.stat().st_size, x.stat().st_mtime_ns) for x in files]
    return digest([_TABLE_VERSION, dataset.content_hash, camera, height, width, seen])


def digest(parts: list[Any]) -> str:
    """Names what is made of these JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
