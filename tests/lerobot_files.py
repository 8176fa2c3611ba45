"""LeRobot data sets written and read with plain pyarrow and PyAV, by the public layout, without jidm.datasets.

The writers follow LeRobot's recorders: several episodes in one table and one video (v3.0), one file per episode (v2.1,
v2.0). The reader is the oracle for the writer of jidm.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CAMERA = "observation.images.top"


@dataclass
class EpisodeArrays:
    """One episode in memory: frames (T, H, W, 3) uint8, state (T, n), action (T, m)."""

    frames: np.ndarray
    state: np.ndarray
    action: np.ndarray
    task: str = "reach"
    extras: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.state)


def make_episode(seed: int, length: int, *, joints: int = 3, height: int = 48, width: int = 64) -> EpisodeArrays:
    """Smooth images that encode the frame number by the width of a bar, `bar_width(t)`."""
    rng = np.random.default_rng(seed)
    v, u = np.mgrid[:height, :width]
    frames = np.zeros((length, height, width, 3), np.uint8)
    for t in range(length):
        frames[t] = np.stack([90 + 40 * np.sin(u / 9 + seed), 100 + 30 * np.cos(v / 8 + seed), 60 + 0 * u], -1)
        frames[t, : height // 2, : bar_width(t)] = (235, 30, 30)
    state = rng.normal(size=(length, joints)).cumsum(0) * 0.1
    return EpisodeArrays(frames, state, rng.normal(size=(length, 2)), task=f"task {seed % 2}")


def bar_width(t: int) -> int:
    """Width of the bar in frame t [px]."""
    return 2 * (t % 30) + 4


def measured_bar_width(frame: np.ndarray) -> int:
    """Width of the bar in a decoded image, to about a pixel."""
    row = frame[frame.shape[0] // 4].astype(int)
    return int(((row[:, 0] - row[:, 1]) > 90).sum())


def encode(
    path: Path, frames: np.ndarray, fps: int, *, codec: str = "libx264", options: dict[str, str] | None = None
) -> None:
    """(T, H, W, 3) uint8 as an mp4, frame k at k / fps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.options = {"crf": "10"} if options is None else options
        for k, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = k, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _fixed_size_list(values: np.ndarray, dtype: Any) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values).reshape(-1), dtype)
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _rows(index: int, episode: EpisodeArrays, fps: int, start_index: int, tasks: list[str]) -> dict[str, pa.Array]:
    count = np.arange(len(episode))
    return {
        "observation.state": _fixed_size_list(episode.state, pa.float64()),
        "action": _fixed_size_list(episode.action, pa.float32()),
        "timestamp": pa.array((count / fps).astype(np.float32)),
        "frame_index": pa.array(count),
        "episode_index": pa.array(np.full(len(episode), index)),
        "index": pa.array(count + start_index),
        "task_index": pa.array(np.full(len(episode), tasks.index(episode.task))),
        **{key: pa.array(list(values)) for key, values in episode.extras.items()},
    }


def info(version: str, episodes: dict[int, EpisodeArrays], fps: int, **changes: Any) -> dict[str, Any]:
    """`info.json` of these episodes."""
    one = next(iter(episodes.values()))
    height, width = one.frames.shape[1:3]
    number = {"shape": [1], "names": None}
    v3 = version == "v3.0"
    data = (
        "chunk-{chunk_index:03d}/file-{file_index:03d}"
        if v3
        else "chunk-{episode_chunk:03d}/episode_{episode_index:06d}"
    )
    return {
        "codebase_version": version, "robot_type": "toy", "total_episodes": len(episodes),
        "total_frames": sum(map(len, episodes.values())), "total_tasks": 2, "chunks_size": 1000, "fps": fps,
        "splits": {"train": f"0:{len(episodes)}"}, "data_path": f"data/{data}.parquet",
        "video_path": f"videos/{{video_key}}/{data}.mp4" if v3
        else "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": {
            "observation.state": {"dtype": "float64", "shape": [one.state.shape[1]], "names": ["a", "b", "c"]},
            "action": {"dtype": "float32", "shape": [2], "names": {"motors": ["u", "v"]}},
            CAMERA: {"dtype": "video", "shape": [height, width, 3], "names": ["height", "width", "channels"],
                     "info": {"video.fps": fps, "video.codec": "h264", "video.is_depth_map": False}},
            "timestamp": {"dtype": "float32", **number},
            **{key: {"dtype": "int64", **number} for key in ("frame_index", "episode_index", "index", "task_index")},
        },
        **changes,
    }  # fmt: skip


def make_v30(
    root: Path,
    episodes: dict[int, EpisodeArrays],
    *,
    fps: int = 30,
    per_file: int = 2,
    row_groups: bool = True,
    **changes: Any,
) -> Path:
    """LeRobot's v3.0 layout: `per_file` episodes per table and video, listed in meta/episodes."""
    tasks = sorted({episode.task for episode in episodes.values()})
    numbers, rows, first = list(episodes), [], 0
    for file in range(0, len(numbers), per_file):
        tables, images, shown = [], [], 0
        place = {"chunk_index": 0, "file_index": file // per_file}
        for index in numbers[file : file + per_file]:
            episode = episodes[index]
            tables.append(pa.table(_rows(index, episode, fps, first, tasks)))
            images.append(episode.frames)
            rows.append({
                "episode_index": index, "tasks": [episode.task], "length": len(episode),
                "data/chunk_index": 0, "data/file_index": file // per_file,
                "dataset_from_index": first, "dataset_to_index": first + len(episode),
                f"videos/{CAMERA}/chunk_index": 0, f"videos/{CAMERA}/file_index": file // per_file,
                f"videos/{CAMERA}/from_timestamp": shown / fps,
                f"videos/{CAMERA}/to_timestamp": (shown + len(episode)) / fps,
                "stats/observation.state/min": episode.state.min(0).tolist(),
                "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0,
            })  # fmt: skip
            first, shown = first + len(episode), shown + len(episode)
        path = root / "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet".format(**place)
        path.parent.mkdir(parents=True, exist_ok=True)
        if row_groups:
            with pq.ParquetWriter(path, tables[0].schema, compression="snappy") as writer:
                for table in tables:
                    writer.write_table(table)
        else:
            pq.write_table(pa.concat_tables(tables), path, compression="snappy")
        encode(root / "videos" / CAMERA / "chunk-{chunk_index:03d}/file-{file_index:03d}.mp4".format(**place),
               np.concatenate(images), fps)  # fmt: skip
    listed = root / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    listed.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), listed)
    # The name that pandas gives the unnamed index in LeRobot's files.
    table = pa.table({"task_index": list(range(len(tasks))), "__index_level_0__": tasks})
    pq.write_table(table, root / "meta" / "tasks.parquet")
    (root / "meta" / "info.json").write_text(json.dumps(info("v3.0", episodes, fps, **changes)))
    return root


def make_v2(
    root: Path,
    episodes: dict[int, EpisodeArrays],
    *,
    fps: int = 30,
    version: str = "v2.1",
    flat: bool = False,
    **changes: Any,
) -> Path:
    """One table and one video per episode, listed in JSON lines; `flat` without chunk, camera and meta folders."""
    meta = root if flat else root / "meta"
    meta.mkdir(parents=True, exist_ok=True)
    tasks, first, lines = sorted({episode.task for episode in episodes.values()}), 0, []
    for index, episode in episodes.items():
        name = f"episode_{index:06d}"
        table = root / ("data" if flat else "data/chunk-000") / f"{name}.parquet"
        table.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(_rows(index, episode, fps, first, tasks)), table)
        encode(root / ("videos" if flat else f"videos/chunk-000/{CAMERA}") / f"{name}.mp4", episode.frames, fps)
        lines.append(json.dumps({"episode_index": index, "tasks": [episode.task], "length": len(episode)}))
        first += len(episode)
    (meta / "episodes.jsonl").write_text("\n".join(lines) + "\n")
    (meta / "tasks.jsonl").write_text("\n".join(json.dumps({"task_index": k, "task": t}) for k, t in enumerate(tasks)))
    (meta / "info.json").write_text(json.dumps(info(version, episodes, fps, **changes)))
    return root


def read_reference(root: Path) -> dict[int, dict[str, Any]]:
    """Every episode of a v3.0 or v2.1 data set, by the documented layout from info.json to rows and images."""
    facts = json.loads((root / "meta" / "info.json").read_text())
    keys = [key for key, feature in facts["features"].items() if feature["dtype"] == "video"]
    v3 = facts["codebase_version"] == "v3.0"
    if v3:
        listed = [row for f in sorted(root.glob("meta/episodes/*/*.parquet")) for row in pq.read_table(f).to_pylist()]
    else:
        listed = [
            json.loads(line)
            for line in (root / "meta" / "episodes.jsonl").read_text(encoding="utf-8").split("\n")
            if line
        ]
    found = {}
    for row in listed:
        index = row["episode_index"]
        place = {"episode_index": index, "episode_chunk": index // facts["chunks_size"]}
        if v3:
            place = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
        table = pq.read_table(root / facts["data_path"].format(**place)).to_pylist()
        rows = [r for r in table if r["episode_index"] == index]
        episode: dict[str, Any] = {"row": row, "rows": rows, "frames": {}}
        for key in keys:
            start = 0.0
            if v3:
                place = {"chunk_index": row[f"videos/{key}/chunk_index"], "file_index": row[f"videos/{key}/file_index"]}
                start = row[f"videos/{key}/from_timestamp"]
            with av.open(str(root / facts["video_path"].format(video_key=key, **place))) as container:
                shown = [(float(f.pts * f.time_base), f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
            times = np.array([time for time, _ in shown])
            wanted = np.array([start + r["timestamp"] for r in rows])
            nearest = np.abs(times[None] - wanted[:, None]).argmin(1)
            assert np.abs(times[nearest] - wanted).max() < 1e-4  # LeRobot's tolerance
            episode["frames"][key] = np.stack([shown[k][1] for k in nearest])
        found[index] = episode
    return found
