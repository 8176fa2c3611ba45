"""Frames per second that the reward scores with a bundled field, on all cores of this machine. Prints JSON.

    python benchmarks/reward_speed.py panda-sim

Videos of 25 frames of 128 x 128 from memory: once with all threads in one process, once with one single-threaded
process for each core, as Ray's actors or shards work. Both are measured in alternation; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from typing import Any

import numpy as np
import torch
from results import add_save, row, save
from reward_validity import FPS, FRAMES, EpisodeGenerator

from jidm.rewards import ExecutabilityReward

_SEED, _VIDEOS, _ROUNDS, _SIDE = 4800, 4, 5, 128
_worker_state: dict[str, Any] = {}


def _init_worker(checkpoint: str, videos: np.ndarray) -> None:
    torch.set_num_threads(1)
    _worker_state.update(reward=ExecutabilityReward.from_pretrained(checkpoint), videos=videos)
    _score(0)


def _score(k: int) -> float:
    return float(_worker_state["reward"](_worker_state["videos"][k : k + 1], fps=FPS, layout="BTHWC"))


def reward_speed(checkpoint: str) -> dict[str, Any]:
    """Both ways, in turns."""
    reward = ExecutabilityReward.from_pretrained(checkpoint)
    assert reward.idm.embodiment is not None
    generator = EpisodeGenerator(reward.idm.embodiment.name, _SEED, side=_SIDE)
    videos = np.stack([generator.episode(k).rendering.rgb for k in range(_VIDEOS)])
    cores = os.cpu_count() or 1
    frames, single_process, process_per_core = _VIDEOS * FRAMES, [], []
    reward(videos[:1], fps=FPS, layout="BTHWC")  # the first call pays for memory
    with multiprocessing.get_context("spawn").Pool(cores, _init_worker, (checkpoint, videos)) as pool:
        pool.map(_score, range(_VIDEOS), chunksize=1)
        for _ in range(_ROUNDS):
            began = time.perf_counter()
            reward(videos, fps=FPS, layout="BTHWC")
            single_process.append(frames / (time.perf_counter() - began))
            began = time.perf_counter()
            pool.map(_score, range(_VIDEOS), chunksize=1)
            process_per_core.append(frames / (time.perf_counter() - began))
    return {
        "checkpoint": checkpoint,
        "embodiment": reward.idm.embodiment.name,
        "one_process_frames_per_second": statistics.median(single_process),
        "threads": torch.get_num_threads(),
        "a_process_per_core_frames_per_second": statistics.median(process_per_core),
        "cores": cores,
        "rounds": _ROUNDS,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder, bundled name or hub id, with scales beside it")
    add_save(parser)
    args = parser.parse_args()
    found = reward_speed(args.checkpoint)
    print(json.dumps(found, indent=1))
    figures = [
        row(found["embodiment"], "ours", "frames_per_second", found[f"{key}_frames_per_second"], case=case)
        for key, case in (
            ("one_process", "one process, all threads"),
            ("a_process_per_core", "one process for each core"),
        )
    ]
    note = f"Videos of {FRAMES} frames of {_SIDE}x{_SIDE}."
    save(args.save, "reward_speed", figures, raw=found, seeds=(_SEED,), note=note)
