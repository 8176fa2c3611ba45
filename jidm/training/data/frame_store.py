"""A recording as tables for random access in training: every frame decoded once, at the size that the model sees.

The tables are memory-mapped arrays in a cache folder, so several processes share them and a second run starts at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from jidm.errors import DatasetError, did_you_mean
from jidm.training.data.batch import JointStats
from jidm.training.data.cache import cached_folder, default_cache
from jidm.training.data.recorded_geometry import RecordedGeometry
from jidm.training.data.table_writer import write_tables
from jidm.video.letterbox import Letterbox

_TABLE_VERSION = 3
_CORRELATION_SHRINKAGE = 0.05  # of the measured correlation toward independent joints
_STATIC_THRESHOLD = 1e-4
"""[rad or m] Joints whose range is less count as not moving; scales are not taken below it."""


@dataclass(frozen=True, eq=False)
class FrameStore:
    """N frames of E episodes, one after the other.

    Attributes:
        frames: (N, 3, s H, s W) uint8 RGB, s = `input_scale`; all else is in pixels of the (H, W) training image.
        state: (N, m) float64 all recorded joint positions [rad or m], in the order of `state_names`.
        joints: (n,) columns of `state` that are learned.
        state_names: names of the m columns.
        episode: (E,) episode indices.
        first, length: (E,) row of each episode's first frame, and its number of frames.
        fps: frame rate [1/s].
        letterbox: from the recorded to the training images.
        geometry: depth, links and cameras; None where they are not recorded.
        source: the folder, for messages.
        cache_key: names these tables.
        source_hash: names the images they were made from, whichever of their episodes these are.
        input_scale: factor by which the frames are larger than the training images; 1 where they were reduced.
    """

    frames: UInt8[Tensor, "N 3 image_height image_width"]
    state: Float[Tensor, "N m"]
    joints: Int[Tensor, " n"]
    state_names: tuple[str, ...]
    episode: Int[Tensor, " E"]
    first: Int[Tensor, " E"]
    length: Int[Tensor, " E"]
    fps: float
    letterbox: Letterbox
    geometry: RecordedGeometry | None
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
        """(H, W) of the training images."""
        return self.letterbox.height, self.letterbox.width

    def __len__(self) -> int:
        return len(self.frames)

    def stats(self, strides: Sequence[int] = (1,)) -> JointStats:
        """Statistics of positions over all frames, and of steps over all pairs of the given strides within episodes.

        A joint that never moves gets a standard deviation of 1e-4, so that dividing by it stays finite.
        """
        q, spans = self.q, list(zip(self.first.tolist(), self.length.tolist()))
        steps = [q[a + k : a + n] - q[a : a + n - k] for a, n in spans for k in strides if n > k]
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


def load_frame_store(
    dataset: Any, episodes: Sequence[int], *, height: int, width: int, input_scale: int = 1, downsampled: bool = False,
    image_key: str | None = None, joints: Sequence[str] = (), order: Sequence[str] = (),
    cache: str | Path | None = None, progress: Callable[[str], None] = lambda line: None,
) -> FrameStore:  # fmt: skip
    """The tables of some episodes, decoded now or taken from the cache.

    Args:
        dataset: a `RecordedDataset`.
        episodes: indices, in the order of the tables.
        height, width: size of the training images [px], multiples of 4.
        input_scale: factor by which the frames are larger.
        downsampled: keep frames of height x width only, reduced from the larger ones as the model does it: all that is
            needed where no photometric refinement is trained.
        image_key: which of the data set's videos; may be left out where there is only one.
        joints: names of the joints to learn; all if empty.
        order: order of all joints, a robot's for instance; the data set's own if empty.
        cache: folder for tables; `default_cache()` if not given.
        progress: called with lines that report how far the decoding is.

    Raises:
        DatasetError: no such image key or joint, no episodes, or episodes that contradict themselves.
    """
    image_key = select_image_key(dataset, image_key)
    names = tuple(order) or tuple(dataset.joint_names)
    columns = joint_columns(names, dataset.joint_names, dataset.root)
    chosen = joint_columns(joints or names, names, dataset.root)
    if not episodes:
        raise DatasetError(f"{dataset.root}: no episodes are chosen; choose some of {len(dataset)}")
    source_hash = _source_hash(dataset, image_key, height, width)
    key = (
        f"{Path(dataset.root).name}-{height}x{width}-{digest([source_hash, list(episodes), input_scale, downsampled])}"
    )

    def make(folder: Path) -> None:
        write_tables(
            folder, dataset, episodes, image_key, (height, width),
            input_scale=input_scale, downsampled=downsampled, progress=progress,
        )  # fmt: skip

    folder = cached_folder(Path(cache or default_cache()) / key, make)
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    length = torch.tensor(index["length"])
    geometry = None
    if (folder / "link.npy").exists():
        geometry = RecordedGeometry(
            *(_open_table(folder, name) for name in ("depth", "link", "intrinsics", "T_camera_base"))
        )
    return FrameStore(
        frames=_open_table(folder, "frames"),
        state=_open_table(folder, "state")[:, columns].contiguous(),
        joints=torch.tensor(chosen),
        state_names=names,
        episode=torch.tensor(list(episodes)),
        first=length.cumsum(0) - length,
        length=length,
        fps=float(dataset.fps),
        letterbox=Letterbox(index["size"][0], index["size"][1], height, width),
        geometry=geometry,
        source=str(dataset.root),
        cache_key=key,
        source_hash=source_hash,
        input_scale=1 if downsampled else input_scale,
    )


def image_size(dataset: Any, image_key: str) -> tuple[int, int]:
    """(height, width) of the recorded images."""
    height, width = dataset.features[dataset.camera_key(image_key)].shape[:2]
    return int(height), int(width)


def select_image_key(dataset: Any, image_key: str | None) -> str:
    """The named video of a data set, or the only one.

    Raises:
        DatasetError: there is none of that name, several share it, or there are several and no name.
    """
    return str(dataset.camera(image_key))


def joint_columns(names: Sequence[str], recorded: Sequence[str], source: Any) -> list[int]:
    """Positions of the named joints among the recorded ones.

    Raises:
        DatasetError: one is not recorded, or is named twice; the message begins with the source.
    """
    for name in names:
        if name not in recorded:
            raise DatasetError(f"{source}: no joint '{name}' is recorded: {did_you_mean(name, recorded)}")
    if len(set(names)) != len(names):
        raise DatasetError(f"{source}: a joint is chosen twice: {', '.join(names)}")
    return [list(recorded).index(name) for name in names]


def _open_table(folder: Path, name: str) -> Tensor:
    # Copy on write: torch wants writable memory, and the file must not change.
    return torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c"))


def _source_hash(dataset: Any, image_key: str, height: int, width: int) -> str:
    """Hash of everything the images depend on; of videos size and modification time, which is fast."""
    files = sorted((dataset.root / "videos").rglob("*.mp4")) if (dataset.root / "videos").is_dir() else []
    files = files or sorted(Path(dataset.root).rglob("*.mp4"))
    versions = [(str(x.relative_to(dataset.root)), x.stat().st_size, x.stat().st_mtime_ns) for x in files]
    return digest([_TABLE_VERSION, dataset.content_hash, image_key, height, width, versions])


def digest(parts: list[Any]) -> str:
    """Short hash of JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
